"""Ids from a scanner: read at the board, refused if they cannot be, and read again before COMMIT."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING

import pytest
from support.patience import PATIENCE_S
from support.station import PASSPHRASE

from birthmark.provisioning.registry.model import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.line_board import LineBoard
    from support.station import Command

    from birthmark.provisioning.station import Station

WHERE = ("--broker", "gateway-1.example.com:8883")


@pytest.fixture
def scanner(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A scanner at the standard input; each call scans some text and then puts the scanner away."""
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as stdin, os.fdopen(write_end, "w") as gun:
        monkeypatch.setattr("sys.stdin", stdin)

        def scan(text: str) -> None:
            gun.write(text)
            gun.close()

        yield scan


def test_an_id_is_scanned_and_confirmed(
    birthmark: Command,
    station: Station,
    boards: Callable[[int], list[LineBoard]],
    scanner: Callable[[str], None],
) -> None:
    other, board = boards(2)
    assert birthmark("flash", "--port", other.port, "--id", "S000001", *WHERE).exit_code == 0
    scanner("a/b\nsensor-1\ns000001\nS000002\r\ns000002\n")
    done = birthmark("run", "--port", board.port, "--scan", "--pattern", "[sS][0-9]{6}", "--json", *WHERE)
    assert done.exit_code == 0, done.stderr
    asked = [(record["for"], record["text"]) for record in done.records if record["event"] == "scan"]
    hwid = board.hwid.hex()
    assert asked == [
        ("id", f"scan the id of the board {hwid}"),
        ("id", "not a/b: it is no device id; scan another"),
        ("id", "not sensor-1: it does not match [sS][0-9]{6}; scan another"),
        ("id", "not s000001: it belongs to device S000001 already; scan another"),
        ("confirm", f"scan S000002 again, on the board {hwid}"),
    ]
    assert board.bundle.config.device_id.text == "S000002"


def test_another_id_before_commit_locks_nothing(
    birthmark: Command, station: Station, board: LineBoard, scanner: Callable[[str], None]
) -> None:
    scanner("S1\nS2\n")
    done = birthmark("run", "--port", board.port, "--scan", *WHERE)
    assert done.exit_code == 3
    assert "could not lock the device as S1: S2 was scanned at the board" in done.stdout
    assert not board.is_made
    with station.registry.view() as view:
        assert [(row.name, row.state) for row in view.rows()] == [("S1", State.PREPARED)]


def test_an_id_is_used_once_and_the_end_of_the_input_is_no_failure(
    birthmark: Command,
    station: Station,
    boards: Callable[[int], list[LineBoard]],
    scanner: Callable[[str], None],
) -> None:
    pair = boards(2)
    scanner("S1\nS1\nS1\n")
    where = [word for board in pair for word in ("--port", board.port)]
    done = birthmark("run", *where, "--scan", "--json", *WHERE)
    # Whichever board was first: one is made or waits for its confirmation when the input ends.
    with station.registry.view() as view:
        names = [row.name for row in view.rows()]
    assert names == ["S1"]
    assert sum(board.is_made for board in pair) <= 1
    assert any("the input has ended" in str(record.get("text")) for record in done.records)


def test_a_pattern_is_for_a_scanner(birthmark: Command, board: LineBoard) -> None:
    done = birthmark("run", "--port", board.port, "--template", "u-{n}", "--pattern", "x", *WHERE)
    assert done.exit_code == 2
    assert "--scan" in done.stderr
    assert birthmark("run", "--port", board.port, "--scan", "--pattern", "(", *WHERE).exit_code == 2


def test_typed_on_a_terminal_under_the_table(station: Station, board: LineBoard) -> None:
    """Nothing is on the screen but the table, drawn over itself; the terminal is left as it was."""
    master, slave = os.openpty()
    environment = {
        **{name: value for name, value in os.environ.items() if name != "NO_COLOR"},
        "BIRTHMARK_PASSPHRASE": PASSPHRASE.decode(),
        "BIRTHMARK_STATION": str(station.folder),
        "COLUMNS": "80",
        "LINES": "24",
    }
    before = termios.tcgetattr(slave)
    process = subprocess.Popen(
        [sys.executable, "-m", "birthmark.provisioning", "run", "--port", board.port, "--scan", *WHERE],
        env=environment,
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
    )
    shown = b""

    def wait_for(text: bytes) -> None:
        nonlocal shown
        deadline_s = time.monotonic() + 60
        while text not in shown and time.monotonic() < deadline_s:
            shown += os.read(master, 65536)
        assert text in shown

    wait_for(b"slot 1: scan the id of the board")
    os.write(master, b"a/b\r")
    wait_for(b"not a/b: it is no device id; scan another")
    os.write(master, b"sensor-18\x7f7")
    wait_for(b"> sensor-17")
    os.write(master, b"\r")
    wait_for(b"scan sensor-17 again, on the board")
    os.write(master, b"sensor-17\r")
    wait_for(b"PASS ")
    assert process.wait(PATIENCE_S) == 0
    assert process.stderr is not None
    process.stderr.close()
    assert termios.tcgetattr(slave) == before
    os.close(slave)
    os.close(master)
    assert board.bundle.config.device_id.text == "sensor-17"
    up = ""
    for drawing in shown.decode().split("\x1b[J")[:-1]:
        assert re.match(r"(\x1b\[\d+F)?SLOT ", drawing)
        assert drawing.startswith(up)
        up = f"\x1b[{drawing.count(chr(10))}F"
