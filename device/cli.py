"""`birthmark-device`: a device, and what an operator asks of devices, on the command line."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from birthmark.device import export_command, renew_command, run_command, service_commands, show_command
from birthmark.device.console import Parser

if TYPE_CHECKING:
    import argparse

_EXAMPLES = """
birthmark-device agent --tty /dev/ttyGS0 --state /var/lib/birthmark
birthmark-device run --state /var/lib/birthmark
birthmark-device show --state /var/lib/birthmark
"""


def parser() -> Parser:
    """Return the parser of the whole command."""
    top = Parser(
        prog="birthmark-device",
        description="A device that lives by the identity it was given once.",
        examples=_EXAMPLES,
    )
    commands: argparse._SubParsersAction[Parser] = top.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=Parser
    )
    run_command.add_to(commands)
    renew_command.add_to(commands)
    show_command.add_to(commands)
    export_command.add_to(commands)
    service_commands.add_to(commands)
    commands.add_parser("agent", help="answer a station on a serial port", real=_agent)
    return top


def _agent() -> Parser:
    # Only the agent needs `cryptography`, which takes a small board longer to load than a connection takes.
    agent = import_module("birthmark.device.agent.command")
    commands = Parser(prog="birthmark-device").add_subparsers(parser_class=Parser)
    agent.add_to(commands)
    return commands.choices["agent"]
