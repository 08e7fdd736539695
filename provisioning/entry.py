"""Where the command `birthmark` begins: at the one command that is typed, without what the others need.

Loading every command's libraries takes longer than many a command: `show` starts in half the time without.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

from birthmark.device.console import Parser

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

_MODULES: Final = {
    "station_commands": ("init", "issue-broker", "issue-operator", "list", "show"),
    "bulk_commands": ("issue",),
    "flash": ("flash",),
    "run_command": ("run", "resume"),
    "reflash": ("reflash",),
    "batch_commands": ("batch",),
    "label_command": ("label",),
    "quarantine_commands": ("quarantine",),
    "doctor_command": ("doctor",),
    "revocation_commands": ("revoke", "crl"),
    "gateway_commands": ("gateway", "upstream"),
    "audit_commands": ("audit",),
    "ca_commands": ("ca",),
    "inspect_command": ("inspect",),
    "backup_commands": ("backup", "restore"),
    "registry_commands": ("registry",),
    "renewal_commands": ("renewd", "renew"),
}
"""Which module has which commands. One that is not here is found by the whole parser, later."""


def parser(words: Sequence[str]) -> Parser:
    """Return a parser for a command line: of the command that it begins with alone, else of all (`cli.parser`)."""
    for module, names in _MODULES.items():
        if words and words[0] in names:
            top = Parser(prog="birthmark")
            commands: argparse._SubParsersAction[Parser] = top.add_subparsers(
                title="commands", metavar="COMMAND", required=True
            )
            import_module(f"birthmark.provisioning.{module}").add_to(commands)
            return top
    whole: Parser = import_module("birthmark.provisioning.cli").parser()
    return whole
