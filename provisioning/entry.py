"""Where the command `birthmark` begins: at the one command that is typed, without what the others need.

Loading every command's libraries takes longer than many a command: `show` starts in half the time without. And a
command that will need the CA's key has it derived meanwhile (`key_derivation`).
"""

from __future__ import annotations

from argparse import ArgumentError
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

from birthmark.device.console import Parser
from birthmark.provisioning.key_derivation import derive_ahead
from birthmark.provisioning.places import default_folder

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
    "gateways_command": ("gateways",),
    "policy_commands": ("policy",),
    "audit_commands": ("audit",),
    "ca_commands": ("ca",),
    "inspect_command": ("inspect",),
    "backup_commands": ("backup", "restore"),
    "registry_commands": ("registry",),
    "renewal_commands": ("renewd", "renew"),
}
"""Which module has which commands. One that is not here is found by the whole parser, later."""


_UNLOCKING: Final = ("revoke", "crl", "issue", "issue-broker", "issue-operator")
"""Which commands need the CA's key whatever happens, but for words of `_OTHERWISE`."""
_OF_EVERY_CA: Final = ("revoke", "crl")
"""Which of them may need that of every CA that has a CRL."""
_OTHERWISE: Final = frozenset({"-h", "--help", "serve", "status"})


def parser(words: Sequence[str]) -> Parser:
    """Return a parser for a command line: of the command that it begins with alone, else of all (`cli.parser`)."""
    for module, names in _MODULES.items():
        if words and words[0] in names:
            if words[0] in _UNLOCKING:
                _derive_ahead(words[1:], every=words[0] in _OF_EVERY_CA)
            top = Parser(prog="birthmark")
            commands: argparse._SubParsersAction[Parser] = top.add_subparsers(
                title="commands", metavar="COMMAND", required=True
            )
            import_module(f"birthmark.provisioning.{module}").add_to(commands)
            return top
    whole: Parser = import_module("birthmark.provisioning.cli").parser()
    return whole


def _derive_ahead(words: Sequence[str], *, every: bool) -> None:
    """Begin with what takes longest, if it is clear which station a command is about; the real parser judges."""
    options = Parser(add_help=False, exit_on_error=False)
    options.add_argument("--station", type=Path)
    options.add_argument("--passphrase-fd", type=int)
    for other in ("--pin-fd", "--root-passphrase-fd"):
        options.add_argument(other, type=int, dest="others_fd", action="append")
    try:
        known, others = options.parse_known_args(words)
    except ArgumentError:
        return
    # A descriptor that something else is to come from, too, is read in the order in which it is asked for.
    is_clear = known.passphrase_fd is None or known.passphrase_fd not in (known.others_fd or ())
    if is_clear and _OTHERWISE.isdisjoint(others):
        derive_ahead(known.station or default_folder(), descriptor=known.passphrase_fd, every=every)
