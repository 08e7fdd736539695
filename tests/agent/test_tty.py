"""The driver on a descriptor: BUSY while it works, peers that do not read, hangups, a stop."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import termios
import threading
import time
from typing import TYPE_CHECKING

import pytest
from support.agent_bench import HWID
from support.agent_process import Pty, station_on
from support.patience import PATIENCE_S
from support.reference_station import BUSY, HELLO, KEYGEN, frame

from birthmark.device.agent import keys
from birthmark.device.agent.enrollment import Board, Surroundings
from birthmark.device.agent.machine import Agent
from birthmark.device.agent.slots import Slots
from birthmark.device.agent.stop import Stop
from birthmark.device.agent.tty import PortLostError, open_port, serve
from birthmark.device.errors import ConfigurationError, PortError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from birthmark.device.agent.keys import PrivateKey


class Served:
    """An agent that is served in a thread."""

    def __init__(self, pty: Pty, folder: Path, make_key: Callable[[], PrivateKey]) -> None:
        outside = Surroundings(clock=time.monotonic, random_bytes=secrets.token_bytes, make_key=make_key)
        self.agent = Agent(Slots(folder), Board(HWID, "m", "f"), outside)
        self.stop = Stop()
        self.fd = open_port(pty.path)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            serve(self.fd, self.agent, self.stop)
        except PortLostError as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def served(pty: Pty, folder: Path, make_key: Callable[[], PrivateKey] = keys.make_key) -> Iterator[Served]:
    serving = Served(pty, folder, make_key)
    try:
        yield serving
    finally:
        serving.stop.set()
        serving.join()
        os.close(serving.fd)
        serving.stop.close()


@pytest.fixture
def pty() -> Iterator[Pty]:
    with Pty() as pty:
        yield pty


def test_busy_every_second_while_it_works(tmp_path: Path, pty: Pty) -> None:
    may_go_on = threading.Event()

    def slow_key() -> PrivateKey:
        assert may_go_on.wait(PATIENCE_S)
        return keys.make_key()

    with served(pty, tmp_path, slow_key):
        station = station_on(pty)
        heard, requests = bytearray(), 0

        def busy() -> int:
            return heard.count(frame(BUSY, station.seq, station.sid, b""))

        class CountingLine:
            def send(self, data: bytes) -> None:
                nonlocal requests
                requests += 1
                station_line.send(data)

            def receive(self, timeout_s: float) -> bytes:
                came = station_line.receive(timeout_s)
                heard.extend(came)
                if busy() >= 3:
                    may_go_on.set()
                return came

        station_line, station.line = station.line, CountingLine()
        began_s = time.monotonic()
        station.keygen(secrets.token_bytes(16))
        assert station.seen == [BUSY] * busy() + [KEYGEN | 0x80]
        # No more often: but a busy machine may take seconds to read the third, or to hear of the first.
        assert 3 <= busy() <= time.monotonic() - began_s + requests


def test_a_stop_waits_for_the_work_to_end(tmp_path: Path, pty: Pty) -> None:
    at_work, may_go_on = threading.Event(), threading.Event()

    def slow_key() -> PrivateKey:
        at_work.set()
        assert may_go_on.wait(PATIENCE_S)
        return keys.make_key()

    with served(pty, tmp_path, slow_key) as serving:
        os.write(pty.master, frame(KEYGEN, 1, 1, b"\xa1\x01\x50" + bytes(16)))
        assert at_work.wait(PATIENCE_S)
        serving.stop.set()
        may_go_on.set()
        serving.join()
        assert (tmp_path / "pending").exists()


def _fill(pty: Pty) -> None:
    """Send requests and read no answer, until neither direction of the pty takes any more."""
    request = frame(HELLO, 1, 1, b"\xa2\x01\x50" + bytes(16) + b"\x02\x82\x01\x01")
    room = select.poll()
    room.register(pty.master, select.POLLOUT)
    os.set_blocking(pty.master, False)
    # An agent that still answers takes far less than this to make room.
    while room.poll(500):
        with contextlib.suppress(BlockingIOError):
            os.write(pty.master, request)
    os.set_blocking(pty.master, True)


def test_a_peer_that_does_not_read_costs_its_answers_only(tmp_path: Path, pty: Pty) -> None:
    with served(pty, tmp_path):
        _fill(pty)
        assert station_on(pty).hello()[4] == 0


def test_a_stop_does_not_wait_for_a_peer_that_does_not_read(tmp_path: Path, pty: Pty) -> None:
    with served(pty, tmp_path) as serving:
        _fill(pty)
        serving.stop.set()
        serving.join()
        assert serving.error is None


def test_a_hangup_ends_it(tmp_path: Path, pty: Pty) -> None:
    with served(pty, tmp_path) as serving:
        station_on(pty).hello()
        pty.hang_up()
        serving.join()
        assert isinstance(serving.error, PortLostError)


def test_a_hangup_in_the_middle_of_work_waits_for_its_end(
    tmp_path: Path, pty: Pty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs cannot be closed: the agent would end over that, and nobody would answer the next station."""
    at_work, may_go_on = threading.Event(), threading.Event()

    def slow_key() -> PrivateKey:
        at_work.set()
        assert may_go_on.wait(PATIENCE_S)
        return keys.make_key()

    def lost(_fd: int, data: bytes, _stop: Stop) -> None:
        if at_work.is_set():
            may_go_on.set()
            raise PortLostError("could not write to the port: it is unplugged")
        assert data

    monkeypatch.setattr("birthmark.device.agent.tty.BUSY_EVERY_S", 0.01)
    monkeypatch.setattr("birthmark.device.agent.tty._write", lost)
    with served(pty, tmp_path, slow_key) as serving:
        os.write(pty.master, frame(KEYGEN, 1, 1, b"\xa1\x01\x50" + bytes(16)))
        serving.join()
        assert isinstance(serving.error, PortLostError)
        assert (tmp_path / "pending").exists()


def test_a_stop_ends_it_at_once(tmp_path: Path, pty: Pty) -> None:
    with served(pty, tmp_path) as serving:
        serving.stop.set()
        serving.stop.set()
        serving.join()
        assert serving.error is None


def test_the_port_is_raw(pty: Pty) -> None:
    fresh_master, fresh_slave = os.openpty()
    try:
        fd = open_port(os.ttyname(fresh_slave), 9600)
        try:
            iflag, oflag, cflag, lflag, ispeed, ospeed, _ = termios.tcgetattr(fd)
            assert not lflag & (termios.ECHO | termios.ICANON | termios.ISIG)
            assert not oflag & termios.OPOST
            assert not iflag & (termios.IXON | termios.ICRNL)
            assert not cflag & (termios.CSTOPB | termios.PARENB)
            assert (ispeed, ospeed) == (termios.B9600, termios.B9600)
            every_byte = bytes(range(256))
            os.write(fresh_master, every_byte)
            assert os.read(fd, 512) == every_byte
            assert not os.get_blocking(fd)
        finally:
            os.close(fd)
    finally:
        os.close(fresh_master)
        os.close(fresh_slave)


def test_what_is_no_port(tmp_path: Path, pty: Pty) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "missing", tmp_path / "file", tmp_path):
        with pytest.raises(PortError):
            open_port(str(path))
    for baud in (0, -1, 12345):
        with pytest.raises(ConfigurationError):
            open_port(pty.path, baud)
