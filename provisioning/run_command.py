"""`birthmark run`: a whole fixture at once; `birthmark resume`: what is under way, finished.

Rules:

- The ports are named, by `--port` or in a fixture's file; nothing is sent to any other.
- New units get ids from a list, a template or a scanner; units that are under way keep theirs.
- What becomes revoked is brought to every gateway without waiting for the line's end (`line.revocations`).
- The exit code is that of the worst unit, or 1 if a gateway has not got the CRL; 130 after Ctrl-C, which prints
  the command that resumes.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from birthmark.device.console import INTERRUPTED, command
from birthmark.device.errors import EnrollmentRefusedError, UsageError
from birthmark.device.escape import escaped
from birthmark.device.identity import device_role
from birthmark.device.link.timers import DEFAULT_BAUD
from birthmark.device.options import number
from birthmark.provisioning.broker_choice import broker_address, warn_of_loopback
from birthmark.provisioning.crl_delivery import bring_missing, warn_of_pending
from birthmark.provisioning.line.batches import moment
from birthmark.provisioning.line.port_choice import read_fixture, slots_of
from birthmark.provisioning.line.revocations import LineRevocations
from birthmark.provisioning.line.run import run_line
from birthmark.provisioning.line.scanner import Scanner
from birthmark.provisioning.line.slot import DEFAULT_TRIES, Noted, Slot
from birthmark.provisioning.line.unit_ids import Known, Listed, Scanned, from_template, read_list
from birthmark.provisioning.line.view import Lines, LiveTable, Tally, display_for
from birthmark.provisioning.one_unit import add_unit_options, journal_of
from birthmark.provisioning.options import add_passphrase_option, add_station_option, open_station
from birthmark.provisioning.registry.grouped import GroupedRegistry
from birthmark.provisioning.registry.model import KeyMode, Kind, State

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from birthmark.device.console import Console, Parser
    from birthmark.provisioning.line.port_choice import SlotPort
    from birthmark.provisioning.line.slot import Report
    from birthmark.provisioning.line.unit_ids import IdSource
    from birthmark.provisioning.station import Station

UNFINISHED: Final = (State.RESERVED, State.KEYED, State.ISSUED, State.PREPARED, State.COMMITTED)

_RUN_EXAMPLES: Final = """
birthmark run --ports fixture.toml --template 'sensor-{n:05}'
birthmark run --port /dev/ttyUSB0 --port /dev/ttyUSB1 --list ids.csv --again
birthmark run --ports fixture.toml --scan --pattern 'S[0-9]{6}'
"""
_RESUME_EXAMPLES: Final = """
birthmark resume
birthmark resume --port /dev/ttyUSB0 --port /dev/ttyUSB1
birthmark resume --ports fixture.toml --json
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add these commands."""
    run = command(commands, "run", _run, "give the devices in a whole fixture their identities", _RUN_EXAMPLES)
    _add_ports(run)
    source = run.add_mutually_exclusive_group(required=True)
    source.add_argument("--list", type=Path, metavar="FILE", help="ids from CSV: id, role, what goes on the label")
    source.add_argument("--template", metavar="TEXT", help="ids made as in sensor-{n:05}")
    source.add_argument(
        "--scan", action="store_true", help="ids typed or scanned at the board, and again before COMMIT"
    )
    run.add_argument(
        "--start", type=number, default=1, metavar="N", help="the template's first number (default: 1)"
    )
    run.add_argument("--pattern", type=_pattern, metavar="REGEX", help="what a scanned id must match as a whole")
    run.add_argument("--again", action="store_true", help="wait for the next board when one is done, until Ctrl-C")
    add_unit_options(run)
    resume = command(
        commands, "resume", _resume, "list what is under way, or finish it on the ports given", _RESUME_EXAMPLES
    )
    _add_ports(resume)
    resume.add_argument(
        "--broker", metavar="HOST:PORT", help="where devices find their broker (default: the station's)"
    )
    resume.add_argument("--baud", type=number, default=DEFAULT_BAUD, metavar="N", help="default: %(default)s")
    for each in (run, resume):
        each.add_argument(
            "--tries", type=number, default=DEFAULT_TRIES, metavar="N", help="at a unit (default: %(default)s)"
        )
        add_station_option(each)
        add_passphrase_option(each)


def _add_ports(parser: Parser) -> None:
    ports = parser.add_mutually_exclusive_group()
    ports.add_argument(
        "--port",
        action="append",
        metavar="PORT",
        help="a port, pty, pyserial URL, by-path:NAME or usb:VID:PID[:SERIAL]; may be given several times",
    )
    ports.add_argument("--ports", type=Path, metavar="FILE", help="a fixture: [[slot]] tables with name and port")


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def _run(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.pattern is not None and not arguments.scan:
        raise UsageError("could not use --pattern: it is for --scan", hint="leave it out, or give --scan")
    station = open_station(arguments)
    try:
        ports = _ports(arguments)
        key_mode = KeyMode(arguments.keys) if arguments.keys is not None else None
        _check_local(ports, key_mode)
        line = _Line(station, console, arguments, ports)
        return line.run(_ids(arguments, station, key_mode, line))
    finally:
        station.close()


def _resume(arguments: argparse.Namespace, console: Console) -> int:
    station = open_station(arguments)
    try:
        if arguments.port is None and arguments.ports is None:
            _list(station, console)
            return 0
        return _Line(station, console, arguments, _ports(arguments)).run(Known())
    finally:
        station.close()


def _list(station: Station, console: Console) -> None:
    with station.registry.view() as view:
        # A renewal under way is no unit under way: it needs no port.
        rows = [row for row in view.rows(kind=Kind.DEVICE, states=UNFINISHED) if not row.is_open_renewal]
    columns = ["name", "state", "hwid", "batch", "changed_at"]
    records = [
        {
            "name": row.name,
            "role": row.role,
            "state": row.state.value,
            "hwid": row.hwid.hex() if row.hwid else None,
            "batch": row.batch or None,
            "changed_at": moment(row.changed_at),
        }
        for row in rows
    ]
    console.table(records, columns, empty="nothing is under way")
    if rows:
        console.say("\nTo go on: birthmark resume --port PORT, with the boards on their ports")


class _Line:
    """What `run` and `resume` do alike.

    Args:
        station: whose line it is.
        console: where it is shown.
        arguments: of the command.
        ports: the slots.
    """

    def __init__(
        self, station: Station, console: Console, arguments: argparse.Namespace, ports: Sequence[SlotPort]
    ) -> None:
        self.stop = threading.Event()
        self.tell: Callable[[Report], None]
        self.scanner = Scanner(sys.stdin.fileno(), self.stop.is_set) if getattr(arguments, "scan", False) else None
        self._station = station
        self._console = console
        self._arguments = arguments
        self._ports = ports

    def run(self, ids: IdSource) -> int:
        """Run the slots, say how it went, and return the exit code."""
        station, console, arguments = self._station, self._console, self._arguments
        broker = broker_address(arguments.broker, station.settings.broker)
        warn_of_loopback(console, arguments.broker, broker)
        journal = journal_of(station, broker, GroupedRegistry(station.registry))
        tally = Tally()
        display = display_for(console, [port.slot for port in self._ports], tally)
        again = getattr(arguments, "again", False)
        revocations = LineRevocations(station, journal.revoked)

        def make(tell: Callable[[Report], None]) -> list[Slot]:
            self.tell = tell = revocations.watching(tell)
            return [Slot(port, journal, ids, tell, self.stop, arguments.tries, again) for port in self._ports]

        try:
            with ExitStack() as terminal:
                if self.scanner is not None and isinstance(display, LiveTable):
                    terminal.enter_context(self.scanner.key_by_key(display.typed))
                run_line(make, display, tally, self.stop, revocations)
        finally:
            is_delivered = bring_missing(station, console, journal.revoked)
        is_delivered &= warn_of_pending(console, revocations.deliveries)
        if isinstance(display, Lines):  # a table has it below
            console.emit(tally.record(), "\n".join(tally.described()))
        if self.stop.is_set():
            resume = self._resume_command()
            record = {"event": "interrupted", "resume": resume}
            console.emit(record, f"interrupted; nothing is lost. To go on: {resume}")
            return INTERRUPTED
        return tally.worst_exit_code or (0 if is_delivered else 1)

    def ask(self, slot: str, kind: str, text: str) -> None:
        """Show what is to be scanned."""
        self.tell(Noted(slot, kind, text))

    def _resume_command(self) -> str:
        arguments = self._arguments
        words = ["birthmark", "resume"]
        if arguments.ports is not None:
            words += ["--ports", str(arguments.ports)]
        for port in arguments.port or ():
            words += ["--port", port]
        for option in ("broker", "station"):
            value = getattr(arguments, option)
            if value is not None:
                words += [f"--{option}", str(value)]
        if arguments.baud != DEFAULT_BAUD:
            words += ["--baud", str(arguments.baud)]
        return shlex.join(words)


def _ports(arguments: argparse.Namespace) -> list[SlotPort]:
    if arguments.ports is not None:
        return read_fixture(arguments.ports, arguments.baud)
    if not arguments.port:
        raise UsageError(
            "could not choose a port: none was given",
            hint="give --port PORT, once for each slot, or --ports FILE; no port is ever guessed",
        )
    return slots_of(arguments.port, arguments.baud)


def _check_local(ports: Sequence[SlotPort], key_mode: KeyMode | None) -> None:
    for port in ports:
        if key_mode is KeyMode.STATION and not port.name.is_local:
            raise EnrollmentRefusedError(
                f"could not use {escaped(port.port)}: a private key goes over no network port",
                hint="use --keys on-device, or local serial ports",
            )


def _ids(arguments: argparse.Namespace, station: Station, key_mode: KeyMode | None, line: _Line) -> IdSource:
    role = device_role(arguments.role) if arguments.role is not None else None
    registry = station.registry
    if line.scanner is not None:
        return Scanned(
            line.scanner.line,
            line.ask,
            registry,
            pattern=arguments.pattern,
            role=role,
            key_mode=key_mode,
            stopped=line.stop.is_set,
        )
    if arguments.list is not None:
        return Listed(read_list(arguments.list, role), registry, key_mode)
    return Listed(from_template(arguments.template, registry, role, start=arguments.start), registry, key_mode)
