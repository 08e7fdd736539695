"""The options that the station's commands share, and what they open."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from birthmark.device.core_dumps import forbid_core_dumps
from birthmark.provisioning.passphrase import ROOT_VARIABLE, VARIABLE, PassphraseSource
from birthmark.provisioning.revocation import REASONS, parse_reason
from birthmark.provisioning.station import FOLDER_VARIABLE, Station, default_folder

if TYPE_CHECKING:
    from birthmark.device.console import Parser


def add_station_option(parser: Parser) -> None:
    """Let a command say which station it is about."""
    parser.add_argument(
        "--station",
        type=Path,
        metavar="DIR",
        help=f"the station's folder (default: {FOLDER_VARIABLE}, else $XDG_DATA_HOME/birthmark/station)",
    )


def add_passphrase_option(parser: Parser) -> None:
    """Let a command say where the issuing CA's passphrase comes from."""
    parser.add_argument(
        "--passphrase-fd",
        type=int,
        metavar="N",
        help=f"read the CA's passphrase from this descriptor (default: {VARIABLE}, else a prompt)",
    )


def add_root_passphrase_option(parser: Parser) -> None:
    """Let a command say where the root's passphrase comes from."""
    parser.add_argument(
        "--root-passphrase-fd",
        type=int,
        metavar="N",
        help=f"read the root CA's passphrase from this descriptor (default: {ROOT_VARIABLE}, else the CA's)",
    )


def add_timeout_option(parser: Parser) -> None:
    """Let a command say how long it waits for the gateways."""
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=10.0,
        metavar="S",
        help="how long to wait for the gateways' receipts (default: %(default)g)",
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError("the time-out is more than 0 and at most 3600 seconds")
    return seconds


def revocation_reason(word: str) -> str:
    """Check a reason for a revocation, as an argument's type."""
    if parse_reason(word) is None:
        raise argparse.ArgumentTypeError(f"unknown reason {word!r}; choose from {', '.join(REASONS)}")
    return word


def cert_serial(text: str) -> int:
    """Read a certificate's serial number, as an argument's type: hex, with or without colons."""
    try:
        return int(text.replace(":", ""), 16)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no serial number in hex") from None


def station_folder(arguments: argparse.Namespace) -> Path:
    """Return the folder that the command is about."""
    folder: Path | None = arguments.station
    return folder or default_folder()


def open_station(arguments: argparse.Namespace) -> Station:
    """Open the station that the command is about; its passphrase is asked for when it is needed."""
    forbid_core_dumps()
    return Station.open(station_folder(arguments), passphrase=passphrase_source(arguments))


def passphrase_source(arguments: argparse.Namespace, *, confirm: bool = False) -> PassphraseSource:
    """Return where the issuing CA's passphrase comes from."""
    return PassphraseSource(descriptor=getattr(arguments, "passphrase_fd", None), confirm=confirm)


def root_passphrase(arguments: argparse.Namespace) -> bytes | None:
    """Return the root's passphrase if one of its own was given."""
    source = PassphraseSource(descriptor=arguments.root_passphrase_fd, variable=ROOT_VARIABLE)
    return source.read() if source.is_given else None
