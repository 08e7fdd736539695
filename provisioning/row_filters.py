"""The options by which a command picks rows of the registry: `birthmark list`, `birthmark registry export`."""

from __future__ import annotations

import argparse
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from birthmark.provisioning.registry.model import Kind, State

if TYPE_CHECKING:
    from datetime import datetime

    from birthmark.device.console import Parser
    from birthmark.provisioning.registry.interface import RowFilters, View

_UNITS: Final = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
_DURATION: Final = re.compile("([0-9]{1,4})([hdw])")
_GLOB: Final = re.compile("[A-Za-z0-9.:*?-]{1,255}")
"""Letters, digits, dots, colons and dashes are all that a device's, a service's or a broker's name consists of."""


def add_filter_options(parser: Parser) -> None:
    """Let a command say which rows it is about; what fits every option is meant."""
    parser.add_argument(
        "--state",
        type=str.upper,
        choices=[state.value for state in State],
        action="append",
        help="only those in this state (may be given several times)",
    )
    parser.add_argument("--role", help="only those with this role")
    parser.add_argument("--kind", choices=[kind.value for kind in Kind], help="only those of this kind")
    parser.add_argument("--batch", metavar="NAME", help="only those made in this batch")
    parser.add_argument(
        "--name", type=_glob, metavar="GLOB", help="only those so named: `*` is any text, `?` one character"
    )
    parser.add_argument(
        "--expiring",
        type=_duration,
        metavar="TIME",
        help="only those whose certificate ends within this time (30d, 12h, 2w) or has ended",
    )
    revoked = parser.add_mutually_exclusive_group()
    revoked.add_argument(
        "--revoked", action="store_true", default=None, help="only those whose certificate is revoked"
    )
    revoked.add_argument("--not-revoked", action="store_false", dest="revoked", help="only those where it is not")


def picked(view: View, arguments: argparse.Namespace, now: datetime) -> RowFilters:
    """Return which rows the options pick."""
    batch: str | None = arguments.batch
    if batch is not None:  # names of batches are unique without regard to case
        batch = next((one.name for one in view.batches() if one.name.lower() == batch.lower()), batch)
    return {
        "kind": Kind(arguments.kind) if arguments.kind else None,
        "states": {State(state) for state in arguments.state} if arguments.state else None,
        "role": arguments.role,
        "batch": batch,
        "name_glob": arguments.name,
        "expires_before": None if arguments.expiring is None else now + arguments.expiring,
        "revoked": arguments.revoked,
    }


def _glob(text: str) -> str:
    if not _GLOB.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} can match no name: write it like 'pump-*'")
    return text


def _duration(text: str) -> timedelta:
    found = _DURATION.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no time: write it like 30d, 12h or 2w")
    return int(found[1]) * _UNITS[found[2]]
