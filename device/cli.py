"""`birthmark-device`: a device, and what an operator asks of devices, on the command line."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from birthmark.device import (
    export_command,
    renew_command,
    run_command,
    service_commands,
    show_command,
)
from birthmark.device.console import Parser

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

_EXAMPLES = """
birthmark-device agent --tty /dev/ttyGS0 --state /var/lib/birthmark
birthmark-device run --state /var/lib/birthmark
birthmark-device status --state /var/lib/birthmark
birthmark-device doctor --state /var/lib/birthmark
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
    commands.add_parser("status", help="say how this device is, and what it lacks", real=_real("status"))
    commands.add_parser("doctor", help="walk the way to the broker, step by step", real=_real("doctor"))
    export_command.add_to(commands)
    service_commands.add_to(commands)
    commands.add_parser("agent", help="answer a station on a serial port", real=_real("agent"))
    return top


# What `run` does not need is not loaded with it: a small board takes longer to load `cryptography`, which the
# agent needs, than to connect.
_MODULES = {
    "status": "birthmark.device.status_command",
    "doctor": "birthmark.device.doctor_command",
    "agent": "birthmark.device.agent.command",
}


def _real(name: str) -> Callable[[], Parser]:
    def make() -> Parser:
        commands = Parser(prog="birthmark-device").add_subparsers(parser_class=Parser)
        import_module(_MODULES[name]).add_to(commands)
        return commands.choices[name]

    return make
