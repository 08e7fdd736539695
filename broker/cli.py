"""The command line of the gateway's broker; no logic of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from birthmark.broker import crl_command, export_command, init_command, policy_command, run_command
from birthmark.device.console import Parser

if TYPE_CHECKING:
    import argparse

_EXAMPLES = """
birthmark-broker init --name gateway-1.example.com
birthmark-broker run
birthmark-broker policy explain sensor-17 publish devices/sensor-17/telemetry/temperature
"""


def parser() -> Parser:
    """Return the parser of `birthmark-broker`."""
    top = Parser(
        prog="birthmark-broker",
        description="The gateway's broker: mutual TLS, policy by certificate, revocation that takes hold at once.",
        examples=_EXAMPLES,
    )
    commands: argparse._SubParsersAction[Parser] = top.add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    init_command.add_to(commands)
    run_command.add_to(commands)
    policy_command.add_to(commands)
    crl_command.add_to(commands)
    export_command.add_to(commands)
    return top
