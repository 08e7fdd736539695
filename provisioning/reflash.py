"""`birthmark reflash`: a supervisor has a unit made again that is made already.

Rules (docs/serial-protocol.md sections 6 and 8):

- A unit that still has its identity is unlocked by the issuing CA's signature. Its old identity works until the
  COMMIT of the new one; its old certificate is revoked with the new row's ATTESTED.
- A unit that has lost its identity gets a new one; the old certificate is revoked before anything else.
- Running the same command again resumes. A unit that is under way for another reason is finished instead.
- The CRL that says so is signed and brought to every gateway; one that has not got it makes the exit code 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from birthmark.device.console import command
from birthmark.device.identity import DeviceId, device_role
from birthmark.provisioning.enrollment.journal import Wish
from birthmark.provisioning.flash import make
from birthmark.provisioning.one_unit import add_unit_options
from birthmark.provisioning.options import (
    add_passphrase_option,
    add_station_option,
    revocation_reason,
)
from birthmark.provisioning.registry.model import KeyMode
from birthmark.provisioning.revocation import REASONS, parse_reason

if TYPE_CHECKING:
    import argparse

    from birthmark.device.console import Console, Parser

_EXAMPLES: Final = """
birthmark reflash sensor-17 --reason keyCompromise --port /dev/ttyUSB0
birthmark reflash sensor-17 --reason superseded --port /dev/ttyUSB0 --role meter
birthmark reflash sensor-17 --reason broken --port /dev/ttyUSB0 --broker gateway-2.example.com:8883 --json
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `reflash` to the commands of `birthmark`."""
    parser = command(commands, "reflash", _reflash, "give a device that is made already a new identity", _EXAMPLES)
    parser.add_argument("id", metavar="ID", help="the device id that it has, and keeps")
    parser.add_argument(
        "--reason",
        required=True,
        type=revocation_reason,
        metavar="REASON",
        help="why its certificate is revoked: " + ", ".join(REASONS),
    )
    parser.add_argument(
        "--port", required=True, help="the port: its name, a pyserial URL, by-path:NAME or usb:VID:PID[:SERIAL]"
    )
    add_unit_options(parser)
    add_station_option(parser)
    add_passphrase_option(parser)


def _reflash(arguments: argparse.Namespace, console: Console) -> int:
    reason = parse_reason(arguments.reason)
    if reason is None:
        raise ValueError("the parser lets no other reason through")
    wish = Wish(
        DeviceId(arguments.id),
        device_role(arguments.role) if arguments.role is not None else None,
        KeyMode(arguments.keys) if arguments.keys is not None else None,
        replaces_reason=reason.value,
    )
    return make(arguments, console, wish, "reflash")
