"""The options that the station's commands share, and what they open."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from string import hexdigits
from typing import TYPE_CHECKING

from birthmark.device.core_dumps import forbid_core_dumps
from birthmark.device.errors import UsageError
from birthmark.device.options import taken_from_options, timeout
from birthmark.provisioning.ca_keys import MODULE_VARIABLE, PIN_SOURCE, TokenPlace
from birthmark.provisioning.passphrase import PIN_VARIABLE, ROOT_VARIABLE, PassphraseSource
from birthmark.provisioning.places import FOLDER_VARIABLE, PASSPHRASE_VARIABLE, default_folder
from birthmark.provisioning.settings import TokenSettings
from birthmark.provisioning.station import Station
from birthmark.provisioning.tokens.uri import TokenUri

if TYPE_CHECKING:
    from birthmark.device.console import Parser

_HEX = frozenset(hexdigits)


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
        help=f"read the CA's passphrase from this descriptor (default: {PASSPHRASE_VARIABLE}, else a prompt)",
    )
    add_pin_option(parser)


def add_pin_option(parser: Parser) -> None:
    """Let a command say where the PIN of a token comes from."""
    parser.add_argument(
        "--pin-fd",
        type=int,
        metavar="N",
        help=f"read the PIN of the CA's token from this descriptor (default: {PIN_VARIABLE}, else the file in "
        "station.toml, else a prompt)",
    )


def add_key_options(parser: Parser, name: str, *, whose: str) -> None:
    """Let a command say that a key is to be in a PKCS#11 token."""
    parser.add_argument(
        name,
        dest="key",
        metavar="URI",
        help=f"make {whose} key in a PKCS#11 token: pkcs11:token=LABEL;object=NAME?module-path=FILE",
    )
    parser.add_argument("--existing-key", action="store_true", help="take the key that is in the token already")


def add_root_passphrase_option(parser: Parser) -> None:
    """Let a command say where the root's passphrase comes from."""
    parser.add_argument(
        "--root-passphrase-fd",
        type=int,
        metavar="N",
        help=f"read the root CA's passphrase from this descriptor (default: {ROOT_VARIABLE}, else the CA's)",
    )


def add_timeout_option(
    parser: Parser, default_s: float = 10.0, what: str = "how long to wait for the gateways' receipts"
) -> None:
    """Let a command say how long it waits for the gateways."""
    parser.add_argument(
        "--timeout", type=timeout, default=default_s, metavar="S", help=f"{what} (default: %(default)g)"
    )


def revocation_reason(word: str) -> str:
    """Check a reason for a revocation, as an argument's type."""
    from birthmark.provisioning.revocation import REASONS, parse_reason  # noqa: PLC0415 - it costs time to import

    if parse_reason(word) is None:
        raise argparse.ArgumentTypeError(f"unknown reason {word!r}; choose from {', '.join(REASONS)}")
    return word


def cert_serial(text: str) -> int:
    """Read a certificate's serial number, as an argument's type: hex, with or without colons."""
    digits = text.replace(":", "")
    if not digits or set(digits) - _HEX:  # `int` takes signs, _ and 0x too
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no serial number in hex")
    return int(digits, 16)


def station_folder(arguments: argparse.Namespace) -> Path:
    """Return the folder that the command is about."""
    folder: Path | None = arguments.station
    return folder or default_folder()


def open_station(arguments: argparse.Namespace) -> Station:
    """Open the station that the command is about; its passphrase is asked for when it is needed."""
    forbid_core_dumps()
    purpose = str(getattr(arguments, "command_line", "")).partition(" ")[2]
    return Station.open(
        station_folder(arguments),
        passphrase=passphrase_source(arguments),
        pin=pin_source(arguments),
        purpose=purpose,
    )


def passphrase_source(arguments: argparse.Namespace, *, confirm: bool = False) -> PassphraseSource:
    """Return where the issuing CA's passphrase comes from."""
    return PassphraseSource(descriptor=getattr(arguments, "passphrase_fd", None), confirm=confirm)


def pin_source(arguments: argparse.Namespace) -> PassphraseSource:
    """Return where the PIN of a token comes from."""
    return replace(PIN_SOURCE, descriptor=getattr(arguments, "pin_fd", None))


def token_place(arguments: argparse.Namespace) -> TokenPlace | None:
    """Return where in a token a key is to be; None if it is to be in a file.

    Raises:
        UsageError: the URI cannot be used, or an existing key is to be taken and none is named.
    """
    if arguments.key is None:
        if arguments.existing_key:
            raise UsageError("could not take an existing key: none is named", hint="name it by its URI")
        return None
    with taken_from_options():
        return TokenPlace(TokenUri.parse(arguments.key), arguments.existing_key)


def token_settings(uri: TokenUri) -> TokenSettings:
    """Return what a URI says of this machine, and the environment where it says nothing of the module."""
    module = uri.module_path or os.environ.get(MODULE_VARIABLE)
    return TokenSettings(Path(module) if module else None, uri.pin_path)


def root_passphrase(arguments: argparse.Namespace) -> bytes | None:
    """Return the root's passphrase if one of its own was given."""
    source = PassphraseSource(
        descriptor=arguments.root_passphrase_fd, variable=ROOT_VARIABLE, option="--root-passphrase-fd"
    )
    return source.read() if source.is_given else None
