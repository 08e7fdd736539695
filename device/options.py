"""The options that several commands share, and the types of what is given with them.

A type refuses what no command can use, with words that argparse puts behind the option's name; the exit code is 2.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.errors import ConfigurationError, MissingLibraryError, UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from birthmark.device.console import Parser

MAX_TIMEOUT_S: Final = 3600.0
MAX_PORT: Final = 65535
MAX_NUMBER: Final = 10**9
SHORTEST_S: Final = 0.001
LONGEST_S: Final = 1e9


@contextmanager
def taken_from_options() -> Iterator[None]:
    """Make what is wrong with a value, or with several together, wrong usage: it came with the command's options.

    Raises:
        UsageError: in the place of a `ConfigurationError` in the block, which a file would end with.
    """
    try:
        yield
    except MissingLibraryError:
        raise  # the options are right
    except ConfigurationError as error:
        raise UsageError(error.message, hint=error.hint) from error


def add_state_option(parser: Parser) -> None:
    """Let a command say which device it is about."""
    parser.add_argument("--state", required=True, metavar="DIR", type=Path, help="the device's state folder")


def add_broker_option(parser: Parser) -> None:
    """Let a command go to another broker than the one that the device belongs to."""
    parser.add_argument("--broker", metavar="HOST:PORT", help="connect there, not where the bundle says")


def add_renewal_port_option(parser: Parser) -> None:
    """Let a command say where the gateway renews what has expired."""
    parser.add_argument(
        "--renewal-port",
        type=port,
        metavar="PORT",
        help="where the gateway renews certificates that have expired (default: the port after its own)",
    )


def given_broker(arguments: argparse.Namespace) -> BrokerAddress | None:
    """Return the broker that the command was given; None for the one that the device belongs to.

    Raises:
        UsageError: it is no address.
    """
    return broker_address(arguments.broker) if arguments.broker else None


def broker_address(text: str) -> BrokerAddress:
    """Return a broker's address that an option has; raises `UsageError` if it is none."""
    with taken_from_options():
        return BrokerAddress.parse(text)


def credentials_of(arguments: argparse.Namespace) -> Credentials:
    """Return the identity in the state folder that the command is about, for the broker that it was given.

    Raises:
        CredentialError: there is none that can be used.
        UsageError: what was given is no broker's address.
    """
    return Credentials.from_folder(arguments.state, broker=given_broker(arguments))


def timeout(text: str) -> float:
    """Read how long to wait for others, in seconds."""
    value = float(text)
    if not 0 < value <= MAX_TIMEOUT_S:
        raise ArgumentTypeError(f"{text!r} is not more than 0 and at most {MAX_TIMEOUT_S:g} seconds")
    return value


def seconds(text: str) -> float:
    """Read how long something takes, or how long it is between two of it, in seconds."""
    value = float(text)
    if not SHORTEST_S <= value < LONGEST_S:
        raise ArgumentTypeError(f"{text!r} is not from {SHORTEST_S:g} to {LONGEST_S:g} seconds")
    return value


def port(text: str) -> int:
    """Read the number of a TCP port."""
    return _whole(text, MAX_PORT)


def number(text: str) -> int:
    """Read a number of things."""
    return _whole(text, MAX_NUMBER)


def _whole(text: str, most: int) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= most:  # `int` takes signs and _ too
        raise ArgumentTypeError(f"{text[:80]!r} is no number from 1 to {most}")
    return int(text)
