"""Bad lines, in virtual time: loss, flips, log lines, the latency timer, stalls, a cable that falls out anywhere.

The line is the simulator's own, at 115200 baud; agent and station are the real ones. `BIRTHMARK_PROOF=whole` runs
the full counts.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from support.board_station import open_desk
from support.fault_bench import VirtualBoard, check_no_half

from birthmark.device.errors import BirthmarkError, LinkError
from birthmark.firmware_sim.faults import parse
from birthmark.firmware_sim.line import Interruption, LineFaults
from birthmark.provisioning.registry.model import State

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.board_station import Desk

WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
DESK_UNITS = 25
ATTEMPT_LIMIT_S = 30.0


def _units(tmp_path: Path, count: int, faults: LineFaults) -> list[VirtualBoard]:
    """Enrol so many units over lines like this; each ends within four attempts, with one certificate."""
    boards = []
    for number in range(count):
        if number % DESK_UNITS == 0:
            desk = open_desk(tmp_path / f"station-{number}")
        folder = tmp_path / f"board-{number}"
        board = VirtualBoard(folder, faults, seed=number, hwid=number.to_bytes(8, "big"))
        row = board.enrol(desk, f"unit-{number}", failures=(LinkError,))
        assert row.state is State.ATTESTED
        assert desk.authority.signed.count(row.cert_serial or 0) == 1
        assert len(desk.authority.signed) == number % DESK_UNITS + 1, "one certificate a unit"
        check_no_half(desk, folder)
        boards.append(board)
    return boards


@pytest.mark.proof
@pytest.mark.parametrize(
    ("faults", "count", "at_once"),
    [
        ("loss=1e-4", 1000, 0.999),
        ("loss=1e-3", 200, 0.95),
        ("loss=5e-3", 200, 0.5),
        ("flips=1e-5", 200, 0.99),
        ("flips=1e-4", 200, 0.95),
        ("flips=5e-4", 200, 0.5),
    ],
)
def test_damage(tmp_path: Path, faults: str, count: int, at_once: float, proven: Callable[[str], None]) -> None:
    done = _units(tmp_path, count if WHOLE else 12, parse([faults, "baud=115200"]).line)
    assert max(board.longest_s for board in done) < ATTEMPT_LIMIT_S
    assert max(board.attempts for board in done) <= 4
    first = sum(board.attempts == 1 for board in done)
    most, longest_s = max(board.attempts for board in done), max(board.longest_s for board in done)
    proven(
        f"{len(done)} units, all complete, one certificate each: {first} at the first attempt, the last "
        f"at attempt {most}; the longest attempt took {longest_s:.1f} s on its line"
    )
    if WHOLE:
        assert first >= at_once * count


@pytest.mark.proof
@pytest.mark.parametrize("rate", [5, 20, 50])
def test_log_lines(tmp_path: Path, rate: int, proven: Callable[[str], None]) -> None:
    done = _units(tmp_path, 200 if WHOLE else 8, parse([f"log={rate}", "baud=115200"]).line)
    assert [board.attempts for board in done] == [1] * len(done)
    proven(f"{len(done)} units with {rate} log lines a second in between, all complete at the first attempt")


def test_a_line_that_only_takes_its_time(tmp_path: Path) -> None:
    (board,) = _units(tmp_path, 1, LineFaults(baud=115_200))
    assert board.attempts == 1
    wire_s = board.line.carried * 10 / 115_200
    assert board.longest_s <= 1.3 * wire_s, "bytes cross one after another, and nothing is said twice"


@pytest.mark.parametrize("baud", [115_200, 921_600])
def test_the_latency_timer(tmp_path: Path, baud: int) -> None:
    (board,) = _units(tmp_path, 1, LineFaults(baud=baud, latency_s=0.016))
    assert board.attempts == 1
    assert board.longest_s < 1.0


@pytest.mark.parametrize("lasts_s", [1.0, 4.0, 12.0])
@pytest.mark.parametrize("after_bytes", [700, 1400, 2100])
def test_a_stall_in_the_transfer(tmp_path: Path, lasts_s: float, after_bytes: int) -> None:
    stall = Interruption(lasts_s, after_bytes)
    (board,) = _units(tmp_path, 1, LineFaults(baud=115_200, stall=stall))
    assert board.attempts <= (1 if lasts_s < 4 else 3)


@pytest.mark.proof
def test_the_cable_falls_out_anywhere(tmp_path: Path, proven: Callable[[str], None]) -> None:
    offsets = range(20, 2900, 10 if WHOLE else 120)
    for number, offset in enumerate(offsets):
        if number % DESK_UNITS == 0:
            desk = open_desk(tmp_path / f"station-{number}")
        folder = tmp_path / f"board-{offset}"
        faults = LineFaults(baud=115_200, unplug=Interruption(1.0, offset))
        board = VirtualBoard(folder, faults, hwid=offset.to_bytes(8, "big"))
        row = board.enrol(desk, f"unit-{offset}", tries=2)
        assert board.attempts == 2 or offset > 2700
        assert row.state is State.ATTESTED
        assert len(desk.authority.signed) == number % DESK_UNITS + 1
        check_no_half(desk, folder)
    proven(
        f"unplugged for a second at {len(offsets)} offsets: all resumed at the next attempt, one certificate each"
    )


def test_the_end_of_a_line_that_lets_nothing_through(desk: Desk, tmp_path: Path) -> None:
    board = VirtualBoard(tmp_path / "board", LineFaults(baud=115_200, loss=0.5))
    with pytest.raises(BirthmarkError, match="could not get an answer to HELLO"):
        board.enrol(desk, tries=1)
    assert board.longest_s < ATTEMPT_LIMIT_S
    assert desk.rows() == []
