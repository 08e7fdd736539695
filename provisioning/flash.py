"""`birthmark flash`: give the device on a port its identity, or finish what an earlier run began.

Rules:

- One line a step with its measured time, the same on a terminal and off it; one JSON object each with `--json`.
- Running the same command again is always right: it resumes where the last run stopped, or says why it may not.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from birthmark.device.console import command
from birthmark.device.identity import DeviceId, device_role
from birthmark.device.link.timers import DEFAULT_BAUD
from birthmark.provisioning.broker_choice import broker_address, warn_of_loopback
from birthmark.provisioning.enrollment.journal import Wish
from birthmark.provisioning.enrollment.session import Session
from birthmark.provisioning.line.progress import Progress
from birthmark.provisioning.one_unit import add_unit_options, checked_port, enrol_one, journal_of
from birthmark.provisioning.options import add_passphrase_option, add_station_option, open_station
from birthmark.provisioning.registry.model import KeyMode

if TYPE_CHECKING:
    import argparse

    from birthmark.device.console import Console, Parser

_EXAMPLES: Final = """
birthmark flash --port /dev/ttyUSB0 --id sensor-17
birthmark flash --port /dev/ttyUSB0 --id meter-4 --role meter --broker gateway-1.example.com:8883
birthmark flash --port /dev/pts/5 --id sensor-18 --keys station --json
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `flash` to the commands of `birthmark`."""
    parser = command(commands, "flash", _flash, "give the device on a serial port its identity", _EXAMPLES)
    parser.add_argument(
        "--port", required=True, help="the port: its name, a pyserial URL, by-path:NAME or usb:VID:PID[:SERIAL]"
    )
    parser.add_argument("--id", required=True, help="the device id: the certificate's CN and the MQTT client id")
    add_unit_options(parser)
    add_station_option(parser)
    add_passphrase_option(parser)


def _flash(arguments: argparse.Namespace, console: Console) -> int:
    wish = Wish(
        DeviceId(arguments.id),
        device_role(arguments.role) if arguments.role is not None else None,
        KeyMode(arguments.keys) if arguments.keys is not None else None,
    )
    return make(arguments, console, wish, "flash")


def make(arguments: argparse.Namespace, console: Console, wish: Wish, verb: str) -> int:
    """Carry out a wish on the one port that the arguments name, and return the exit code; `verb` resumes it."""
    station = open_station(arguments)
    try:
        broker = broker_address(arguments.broker, station.settings.broker)
        name = checked_port(arguments.port, wish.key_mode)
        warn_of_loopback(console, arguments.broker, broker)
        progress = Progress(console, wish.device_id.text)
        journal = journal_of(station, broker)
        session = Session(name, arguments.baud, journal, wish, progress.watch)
        resume = resume_command(arguments, verb)
        return enrol_one(session, journal, progress, station, console, resume=resume)
    finally:
        station.close()


def resume_command(arguments: argparse.Namespace, verb: str) -> str:
    """Return the command line that goes on with what these arguments began."""
    device = ["--id", arguments.id] if verb == "flash" else [arguments.id]
    words = ["birthmark", verb, "--port", arguments.port, *device]
    for option in ("reason", "role", "keys", "broker", "station"):
        value = getattr(arguments, option, None)
        if value is not None:
            words += [f"--{option}", str(value)]
    if arguments.baud != DEFAULT_BAUD:
        words += ["--baud", str(arguments.baud)]
    return shlex.join(words)
