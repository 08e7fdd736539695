from __future__ import annotations

import os
import select
import termios
import tty
from pathlib import Path

import pytest

from birthmark.firmware_sim.terminal import Terminal

EVERY_BYTE = bytes(range(256))


def read(descriptor: int, length: int) -> bytes:
    data = b""
    while len(data) < length and select.select([descriptor], [], [], 5)[0]:
        data += os.read(descriptor, length - len(data))
    return data


def test_every_byte_passes_both_ways_and_nothing_is_echoed(tmp_path: Path) -> None:
    with Terminal(tmp_path / "tty") as terminal:
        station = os.open(terminal.path, os.O_RDWR | os.O_NOCTTY)
        try:
            os.write(station, EVERY_BYTE)
            assert read(terminal.board_fd, 256) == EVERY_BYTE
            os.write(terminal.board_fd, EVERY_BYTE)
            assert read(station, 256) == EVERY_BYTE
            assert select.select([station, terminal.board_fd], [], [], 0)[0] == []
        finally:
            os.close(station)


def test_the_port_stays_raw_from_one_station_to_the_next(tmp_path: Path) -> None:
    with Terminal(tmp_path / "tty") as terminal:
        for _ in range(2):
            station = os.open(terminal.path, os.O_RDWR | os.O_NOCTTY)
            local_flags = termios.tcgetattr(station)[tty.LFLAG]
            os.write(station, b"\x00\n\x03")
            os.close(station)
            assert local_flags & (termios.ECHO | termios.ICANON | termios.ISIG) == 0
            assert read(terminal.board_fd, 3) == b"\x00\n\x03"


def test_the_link_has_a_stable_name_and_goes_with_the_terminal(tmp_path: Path) -> None:
    link = tmp_path / "tty"
    link.symlink_to("/dev/pts/gone")
    with Terminal(link) as terminal:
        assert link.resolve() == terminal.path
        descriptors = (terminal.board_fd,)
    assert not link.is_symlink()
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_a_link_that_cannot_be_made_leaves_nothing_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FileNotFoundError):
        Terminal(tmp_path / "missing" / "tty")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
