"""The serial port's adapter on real ptys."""

from __future__ import annotations

import os
import pty
import threading
import tty
from typing import TYPE_CHECKING

import pytest
from support.board import Board
from support.board_line import VirtualLine

from birthmark.device.errors import EnrollmentRefusedError, PortError, SystemFailureError
from birthmark.provisioning.enrollment.exchange import MAX_READ_BYTES
from birthmark.provisioning.enrollment.port import PortName, SerialPort, held
from birthmark.provisioning.registry.interface import DuplicateError
from birthmark.provisioning.registry.model import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.board_station import Desk

    from birthmark.provisioning.registry.model import Row

BAUD = 115_200


@pytest.fixture
def ends() -> Iterator[tuple[int, str]]:
    master, slave = pty.openpty()
    tty.setraw(slave)
    yield master, os.ttyname(slave)
    for descriptor in (slave, master):
        os.close(descriptor)


def test_bytes_go_both_ways(ends: tuple[int, str]) -> None:
    master, path = ends
    with SerialPort(PortName.of(path), BAUD) as port:
        port.write(bytes(range(256)))
        assert os.read(master, 1000) == bytes(range(256))
        os.write(master, bytes(range(255, -1, -1)))
        assert port.read(5.0) == bytes(range(255, -1, -1))


def test_a_read_ends_when_its_time_is_up(ends: tuple[int, str]) -> None:
    with SerialPort(PortName.of(ends[1]), BAUD) as port:
        assert port.read(0.01) == b""
        assert port.read(0.0) == b""
        assert port.read(-1.0) == b"", "a deadline that has passed"


def test_one_read_is_bounded(ends: tuple[int, str]) -> None:
    master, path = ends
    with SerialPort(PortName.of(path), BAUD) as port:
        writer = threading.Thread(target=os.write, args=(master, b"x" * 20_000))
        writer.start()
        received = 0
        while received < 20_000:
            data = port.read(5.0)
            assert 0 < len(data) <= MAX_READ_BYTES
            received += len(data)
        writer.join()


def test_pending_input_is_discarded_at_opening(ends: tuple[int, str]) -> None:
    master, path = ends
    os.write(master, b"boot messages")
    with SerialPort(PortName.of(path), BAUD) as port:
        os.write(master, b"fresh")
        assert port.read(5.0) == b"fresh"


def test_a_reader_that_is_stuck_costs_bytes_and_not_the_station(ends: tuple[int, str]) -> None:
    with SerialPort(PortName.of(ends[1]), BAUD) as port:
        port.write(b"x" * 200_000)  # comes back
        assert 0 < len(os.read(ends[0], 200_000)) < 200_000


@pytest.mark.parametrize(
    "use", [lambda port: port.read(5.0), lambda port: port.write(b"x")], ids=["read", "write"]
)
def test_a_port_that_goes_away_is_a_port_error(use: Callable[[SerialPort], object]) -> None:
    master, slave = pty.openpty()
    tty.setraw(slave)
    port = SerialPort(PortName.of(os.ttyname(slave)), BAUD)
    os.close(slave)
    os.close(master)
    with pytest.raises(PortError, match="it has gone") as caught:
        use(port)
    assert caught.value.exit_code == 5
    assert caught.value.hint
    port.close()
    with pytest.raises(PortError, match="it has gone"):
        use(port)


class TestNames:
    def test_a_link_is_followed_anew(self, ends: tuple[int, str], tmp_path: Path) -> None:
        link = tmp_path / "board"
        link.symlink_to(ends[1])
        name = PortName.of(str(link))
        assert name.find() == str(link)
        assert name.lock_key == ends[1] == PortName.of(ends[1]).lock_key
        with SerialPort(name, BAUD) as port:
            port.write(b"hello")
            assert os.read(ends[0], 100) == b"hello"
        link.unlink()
        assert name.find() is None
        with pytest.raises(PortError, match="there is none"):
            SerialPort(name, BAUD)

    @pytest.mark.parametrize("url", ["socket://127.0.0.1:1", "rfc2217://host:2217", "loop://", "spy:///dev/ttyS0"])
    def test_every_url_is_a_network_port(self, url: str) -> None:
        assert not PortName.of(url).is_local

    def test_a_held_port_is_refused_and_free_afterwards(self, ends: tuple[int, str], tmp_path: Path) -> None:
        link = tmp_path / "board"
        link.symlink_to(ends[1])
        with (
            held(PortName.of(ends[1])),
            pytest.raises(PortError, match="another station"),
            held(PortName.of(str(link))),
        ):
            pass
        with held(PortName.of(str(link))):
            pass

    def test_a_link_in_the_place_of_the_locks_is_not_followed(
        self, ends: tuple[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir(mode=0o755)
        (tmp_path / f"birthmark-ports-{os.getuid()}").symlink_to(elsewhere)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        with pytest.raises(SystemFailureError, match="own"), held(PortName.of(ends[1])):
            pass
        assert elsewhere.stat().st_mode & 0o777 == 0o755
        assert list(elsewhere.iterdir()) == []

    @pytest.mark.parametrize("baud", [0, -1, 1 << 40])
    def test_a_speed_that_is_none(self, ends: tuple[int, str], baud: int) -> None:
        with pytest.raises(PortError, match="no speed"):
            SerialPort(PortName.of(ends[1]), baud)


def test_one_id_on_two_ports_at_once(desk: Desk) -> None:
    """One wins, the other is refused, and there is one row."""
    barrier = threading.Barrier(2)
    made: list[Row] = []
    refused: list[EnrollmentRefusedError] = []

    def enrol(hwid: bytes) -> None:
        barrier.wait()
        try:
            made.append(desk.enrol(VirtualLine(Board(hwid=hwid))))
        except DuplicateError as error:
            refused.append(error)

    threads = [threading.Thread(target=enrol, args=(hwid,)) for hwid in (b"left", b"right")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == len(refused) == 1
    assert desk.states() == [State.ATTESTED]
    assert desk.authority.signed == [made[0].cert_serial]
