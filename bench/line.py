"""The line's figures: one board, cables that fall out, and sixteen at once, on simulated lines at 115,200 baud.

The boards run in a process of their own, so that the CPU is the station's alone. The floor of one board is the
time that the bytes which crossed take on the wire. Cables fall out for a second, each after another number of
bytes; the time runs from the port's return to ATTESTED. Registries of several sizes show what a station's age
costs.
"""

from __future__ import annotations

import secrets
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.peers import BIRTHMARK
from bench.registry import fill
from bench.report import Figure
from birthmark.device.errors import BirthmarkError
from birthmark.device.identity import DeviceId
from birthmark.device.link.timers import BITS_PER_BYTE, DEFAULT_BAUD
from birthmark.provisioning.enrollment.bundles import BrokerAddress
from birthmark.provisioning.enrollment.enrol import Enrolment
from birthmark.provisioning.enrollment.exchange import Line
from birthmark.provisioning.enrollment.journal import Wish
from birthmark.provisioning.enrollment.port import PortName, SerialPort
from birthmark.provisioning.enrollment.session import Session, drive
from birthmark.provisioning.line.port_choice import read_fixture
from birthmark.provisioning.line.run import run_line
from birthmark.provisioning.line.slot import Slot
from birthmark.provisioning.line.unit_ids import Listed, from_template
from birthmark.provisioning.line.view import Tally
from birthmark.provisioning.one_unit import journal_of
from birthmark.provisioning.registry.grouped import GroupedRegistry
from birthmark.provisioning.station import Station
from demo.processes import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from birthmark.provisioning.line.slot import Report

SLOTS = 16
SECTION = "The line"
WIRE = "the wire"
UNPLUGGED_AT, QUICK_UNPLUGGED_AT = (20, 100, 400, 700, 1200, 1700, 2100, 2500), (100, 1200, 2100)
"""Bytes, of the 2800 or so that cross in both directions."""
BROKER = BrokerAddress("gateway-1.example.com", 8883, 60)


class CountingPort(SerialPort):
    """A port that counts what crosses it."""

    crossed = 0

    def write(self, data: bytes) -> None:
        """Count and write."""
        self.crossed += len(data)
        super().write(data)

    def read(self, timeout_s: float) -> bytes:
        """Read and count."""
        data = super().read(timeout_s)
        self.crossed += len(data)
        return data


@contextmanager
def fixture(stage: Stage, name: str, count: int, *faults: str) -> Iterator[Path]:
    """Power on blank boards on lines of 115,200 baud, for the block; the fixture's file."""
    written = " ".join([f"baud={DEFAULT_BAUD}", *faults])
    command = f"birthmark-sim fixture --slots {count} --state {name} --faults {written} --json"
    boards = stage.start(name, command)
    seen: set[int] = set()

    def all_ready(record: dict[str, Any]) -> bool:
        if record.get("event") == "ready":
            seen.add(record["board"])
        return len(seen) == count

    boards.wait_for("ready", all_ready, timeout_s=20)
    try:
        yield stage.folder / name / "fixture.toml"
    finally:
        boards.signal(signal.SIGTERM)
        boards.finish(timeout_s=10)


def one_board(station: Station, port: str, device_id: str) -> tuple[float, float]:
    """Enrol a blank board; seconds from opening the port to ATTESTED, and what its bytes take on the wire."""
    journal = journal_of(station, BROKER)
    begun_s = time.perf_counter()
    line = Line(clock=time.monotonic, sid=secrets.randbits(32), baud=DEFAULT_BAUD)
    wish = Wish(DeviceId(device_id))
    machine = Enrolment(line, journal, wish, random_bytes=secrets.token_bytes, is_local=True)
    with CountingPort(PortName.of(port), DEFAULT_BAUD) as opened:
        drive(machine.run(), opened, lambda _: None)
        elapsed_s = time.perf_counter() - begun_s
        return elapsed_s, opened.crossed * BITS_PER_BYTE / DEFAULT_BAUD


def one_unplugged(station: Station, port: str, device_id: str) -> float:
    """Enrol a board whose port goes away once; seconds from the port's return to ATTESTED."""
    link = Path(port)
    first_ns = link.lstat().st_mtime_ns
    session = Session(
        PortName.of(port), DEFAULT_BAUD, journal_of(station, BROKER), Wish(DeviceId(device_id)), lambda _: None
    )
    session.run()
    attested_ns, returned_ns = time.time_ns(), link.lstat().st_mtime_ns  # the link is made anew for the new pty
    if returned_ns == first_ns:
        raise RuntimeError(f"the port of {device_id} never went away")
    return (attested_ns - returned_ns) / 1e9


class Quiet:
    """Shows nothing, and remembers what failed."""

    def __init__(self) -> None:
        self.failures: list[BirthmarkError] = []

    def show(self, report: Report) -> None:
        """Take a report."""
        error = getattr(report, "error", None)
        if isinstance(error, BirthmarkError):
            self.failures.append(error)

    def tick(self) -> None:
        """Nothing moves."""

    def close(self) -> None:
        """Nothing to show."""


def sixteen(station: Station, path: Path, template: str) -> tuple[float, float]:
    """Enrol all boards of a fixture at once; seconds on the wall, and of the station's CPU."""
    registry = GroupedRegistry(station.registry)
    journal = journal_of(station, BROKER, registry)
    ids = Listed(from_template(template, station.registry, None), station.registry, None)
    stop, quiet, tally = threading.Event(), Quiet(), Tally()
    ports = read_fixture(path, DEFAULT_BAUD)

    def make(tell: Callable[[Report], None]) -> list[Slot]:
        return [Slot(port, journal, ids, tell, stop) for port in ports]

    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    run_line(make, quiet, tally, stop, nullcontext())
    elapsed_s, cpu_s = time.perf_counter() - begun_s, time.process_time() - begun_cpu_s
    if quiet.failures:
        raise quiet.failures[0]
    return elapsed_s, cpu_s


def figures(
    folder: Path, rounds: int, ages: Sequence[int], unplugged_at: Sequence[int], say: Callable[[str], None]
) -> Iterator[Figure]:
    """Measure at a station made in `folder`, with registries of `ages` rows: `rounds` boards, and fixtures.

    One board after the other is unplugged once, each at the next of `unplugged_at`.
    """
    passphrase = secrets.token_urlsafe(24)
    (folder / "line").mkdir()
    stage = Stage(folder / "line", {"BIRTHMARK_PASSPHRASE": passphrase, "BIRTHMARK_STATION": "station"})
    try:
        stage.run("init", "birthmark init --organization Bench --json")
        station = Station.open(folder / "line" / "station", passphrase=passphrase.encode())
        for rows in ages:
            fill(station.folder, rows)
            yield from _measure(stage, station, rows, rounds, unplugged_at=unplugged_at, say=say)
        station.close()
    finally:
        stage.stop()


def _measure(
    stage: Stage,
    station: Station,
    rows: int,
    rounds: int,
    *,
    unplugged_at: Sequence[int],
    say: Callable[[str], None],
) -> Iterator[Figure]:
    where = f"{rows:,} rows"
    say(f"the line, {where}: one board after the other")
    with fixture(stage, f"one-{rows}", rounds) as path:
        ports = [slot.name.text for slot in read_fixture(path, DEFAULT_BAUD)]
        runs = [one_board(station, port, f"one-{rows}-{number}") for number, port in enumerate(ports)]
    elapsed_s, wire_s = ([value * 1e3 for value in values] for values in zip(*runs, strict=True))
    values = {BIRTHMARK: elapsed_s, WIRE: wire_s}
    yield Figure(SECTION, f"one board, port open to ATTESTED, {where}", "ms", values, reference=WIRE)
    say(f"the line, {where}: cables that fall out")
    faults = [f"{n}:unplug=1@{offset}" for n, offset in enumerate(unplugged_at, 1)]
    with fixture(stage, f"cable-{rows}", len(faults), *faults) as path:
        ports = [slot.name.text for slot in read_fixture(path, DEFAULT_BAUD)]
        resumed = [one_unplugged(station, port, f"cable-{rows}-{n}") * 1e3 for n, port in enumerate(ports)]
    yield Figure(SECTION, f"unplugged for 1 s, port back to ATTESTED, {where}", "ms", {BIRTHMARK: resumed})
    runs = []
    for number in range(rounds):
        say(f"the line, {where}: {SLOTS} boards at once, round {number + 1} of {rounds}")
        with fixture(stage, f"many-{rows}-{number}", SLOTS) as path:
            runs.append(sixteen(station, path, f"many-{rows}-{number}-{{n}}"))
    wall_s, cpu_s = ([value * 1e3 for value in values] for values in zip(*runs, strict=True))
    yield Figure(SECTION, f"{SLOTS} boards at once, {where}", "ms", {BIRTHMARK: wall_s, "station's CPU": cpu_s})
