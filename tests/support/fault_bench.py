"""Simulated boards with faults, a station that enrolls them, and what must hold afterwards, whatever happened."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from random import Random
from typing import TYPE_CHECKING, Any, Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from support.patience import PATIENCE_S

from birthmark.device.agent import keys
from birthmark.device.agent.enrollment import Board, Surroundings
from birthmark.device.agent.machine import Agent
from birthmark.device.agent.slots import Slots
from birthmark.device.agent.stop import Stop
from birthmark.device.errors import BirthmarkError
from birthmark.device.identity import DeviceId
from birthmark.device.link.timers import DEFAULT_BAUD
from birthmark.firmware_sim.board import Behaviour, SimulatedBoard
from birthmark.firmware_sim.faults import parse
from birthmark.firmware_sim.line import Line, LineFaults
from birthmark.firmware_sim.storage import FailingStorage, PowerCutError
from birthmark.provisioning.enrollment.exchange import Read, Send
from birthmark.provisioning.enrollment.journal import Wish
from birthmark.provisioning.enrollment.port import PortName
from birthmark.provisioning.enrollment.session import Session
from birthmark.provisioning.registry.model import State

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from support.board_station import Desk

    from birthmark.provisioning.registry.model import KeyMode, Row


class SimBoard:
    """A simulated board on a pty, in threads of this process, for the block."""

    def __init__(self, folder: Path, *faults: str, number: int = 1, link_path: Path | None = None) -> None:
        self.folder = folder
        self.events: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self.seen: list[str] = []
        behaviour = Behaviour(faults=parse(faults))
        self._board = SimulatedBoard(number, folder, behaviour, self._report, link_path)
        self._failures: list[BaseException] = []

    def __enter__(self) -> Self:
        self._stop = Stop()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.port = str(self.wait_for("ready")["link"])
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        self._stop.close()
        if self._failures:
            raise self._failures[0]

    def wait_for(self, event: str) -> dict[str, Any]:
        end_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                record = self.events.get(timeout=max(0.01, end_s - time.monotonic()))
            except Empty:
                raise AssertionError(f"no {event}: {self._failures or self.seen}") from None
            if record["event"] == event:
                return record

    def _run(self) -> None:
        try:
            self._board.run(self._stop)
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            self._failures.append(error)

    def _report(self, record: dict[str, Any]) -> None:
        self.seen.append(record["event"])
        self.events.put(record)


def enrol(
    desk: Desk,
    port: str,
    device_id: str = "unit-1",
    *,
    baud: int = DEFAULT_BAUD,
    keys: KeyMode | None = None,
    watch: Callable[[object], None] = lambda _event: None,
) -> Row:
    """One enrollment on a real port, as `birthmark flash` runs it."""
    return Session(PortName.of(port), baud, desk.journal, Wish(DeviceId(device_id), None, keys), watch).run()


class CableOutError(Exception):
    """The port went away, in virtual time."""


@dataclass
class VirtualBoard:
    """The device's agent behind the simulator's line, in virtual time: an hour of a bad line in milliseconds.

    It has a line like the one that a station's machine is driven on (`board_line.VirtualLine`), and `enrol` tries
    as often as an operator would.
    """

    folder: Path
    faults: LineFaults = field(default_factory=LineFaults)
    seed: int = 0
    hwid: bytes = bytes.fromhex("a1b2c3d4e5f60718")
    storage: FailingStorage = field(default_factory=FailingStorage)
    now_s: float = 1000.0
    cuts: int = 0

    def __post_init__(self) -> None:
        self.baud = self.faults.baud or DEFAULT_BAUD
        self.line = Line(self.faults, Random(self.seed))
        self.attempts = 0
        self.longest_s = 0.0
        self.slots = Slots(self.folder, self.storage)
        self._boot()

    def clock(self) -> float:
        return self.now_s

    def enrol(
        self, desk: Desk, device_id: str = "unit-1", *, tries: int = 4, failures: tuple[type[Exception], ...] = ()
    ) -> Row:
        """Run enrollments until one ends, over a cable that falls out and these failures; else the last one's."""
        expected: tuple[type[Exception], ...] = (CableOutError, *failures)
        for last in range(tries - 1, -1, -1):
            began_s = self.now_s
            self.attempts += 1
            try:
                return self._drive(desk.machine(self, device_id).run())  # type: ignore[arg-type]
            except expected:
                if not last:
                    raise
            finally:
                self.longest_s = max(self.longest_s, self.now_s - began_s)
                self._quiet()
        raise AssertionError("no tries")

    def _boot(self) -> None:
        while True:
            try:
                board = Board(self.hwid, "virtual", "1.0")
                outside = Surroundings(self.clock, Random(self.now_s).randbytes, keys.make_key)
                self.agent = Agent(self.slots, board, outside)
            except PowerCutError:
                self.cuts += 1
            else:
                return

    def _quiet(self) -> None:
        """What is on the line when the port is opened anew is discarded."""
        self.now_s += 0.3
        self.line.take(self.now_s)

    def _drive(self, machine: Generator[object, bytes, Row]) -> Row:
        reply = b""
        try:
            effect = next(machine)
            while True:
                reply = b""
                if isinstance(effect, Send):
                    self.line.station_says(effect.data, self.now_s)
                elif isinstance(effect, Read):
                    reply = self._read(effect.until_s)
                effect = machine.send(reply)
        except StopIteration as end:
            row: Row = end.value
            return row

    def _read(self, until_s: float) -> bytes:
        while True:
            self.now_s = max(self.now_s, min(self.line.next_s(), until_s))
            delivery = self.line.take(self.now_s)
            if delivery.to_board:
                self._hear(delivery.to_board)
            if delivery.unplug_s is not None:
                self.now_s += delivery.unplug_s
                self.line.replug()
                raise CableOutError
            if delivery.to_station or self.now_s >= until_s:
                return delivery.to_station

    def _hear(self, data: bytes) -> None:
        try:
            with closing(self.agent.receive(data)) as answers:
                for answer in answers:
                    self.line.board_says(answer, self.now_s)
        except PowerCutError:
            self.cuts += 1
            self._boot()


def check_no_half(desk: Desk, folder: Path, *, signed: list[int] | None = None, booted: bool = True) -> None:
    """No half: no active slot or one that attests, the journal accounts for it, one certificate unless VOID."""
    assert not booted or not list(folder.glob(".*.part")), "a leftover file"
    rows = desk.rows()
    slots = Slots(folder)
    active = slots.active()
    if active is not None:
        leaf = x509.load_der_x509_certificate(active.bundle.leaf_der)
        own = keys.key_from_der(active.key_der).public_key()
        assert isinstance(own, ec.EllipticCurvePublicKey)
        assert leaf.public_key() == own, "it could not attest"
        (row,) = [row for row in rows if row.txn == active.txn]
        assert row.state in (State.PREPARED, State.COMMITTED, State.ATTESTED)
        assert (row.bundle_sha256, row.cert_serial) == (active.bundle_sha256, leaf.serial_number)
    for name in {row.name for row in rows}:
        mine = [row for row in rows if row.name == name]
        voids = sum(row.state is State.VOID for row in mine)
        assert len(mine) - voids <= 1, "two rows for one unit"
        serials = {row.cert_serial for row in mine if row.cert_serial is not None}
        made = set(desk.authority.signed if signed is None else signed) & serials
        assert len(made) <= 1 + voids, "more certificates than enrollments"
    assert set(desk.authority.signed) <= {row.cert_serial for row in rows}, "a certificate that nobody knows"


@dataclass(frozen=True)
class Ended:
    """How an enrollment ended that was to fail."""

    error: BirthmarkError | None
    elapsed_s: float
    folder: Path


def enrol_each(desk: Desk, tmp_path: Path, faults: list[str]) -> dict[str, Ended]:
    """Enrol boards with these faults, all at the same time, on a real port each; how each of them ended."""
    ended: dict[str, Ended] = {}

    def one(number: int, fault: str) -> None:
        folder = tmp_path / f"board-{number}"
        with SimBoard(folder, fault, number=number) as board:
            began_s = time.monotonic()
            error: BirthmarkError | None = None
            try:
                enrol(desk, board.port, f"unit-{number}")
            except BirthmarkError as failure:
                error = failure
            ended[fault] = Ended(error, time.monotonic() - began_s, folder)

    threads = [threading.Thread(target=one, args=each) for each in enumerate(faults)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ended) == sorted(faults)
    return ended
