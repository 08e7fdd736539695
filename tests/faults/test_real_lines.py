"""The same bad lines on real ptys by the real clock, at 115200 baud, all at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from support.fault_bench import SimBoard, check_no_half, enrol

from birthmark.device.errors import LinkError
from birthmark.provisioning.enrollment.session import Replugged, Unplugged
from birthmark.provisioning.registry.model import State

if TYPE_CHECKING:
    from pathlib import Path

    from support.board_station import Desk

DAMAGED = ["loss=1e-4", "loss=1e-3", "flips=1e-5", "flips=1e-4"]
WHOLE_LINES = ["latency=16", "log=20", "stall=1@900"]
UNPLUGGED = [20, 100, 380, 700, 1350, 2000]


def test_bad_lines(desk: Desk, tmp_path: Path) -> None:
    """Enrolled within four attempts, and at the first one where nothing is lost; one certificate each."""

    def one(fault: str) -> int:
        folder = tmp_path / fault
        with SimBoard(folder, fault, "baud=115200") as board:
            for attempt in range(1, 5):
                try:
                    row = enrol(desk, board.port, f"unit-{faults.index(fault)}")
                except LinkError:
                    continue
                assert row.state is State.ATTESTED
                check_no_half(desk, folder)
                return attempt
        pytest.fail(f"{fault}: not enrolled in four attempts")

    faults = [*DAMAGED, *WHOLE_LINES]
    with ThreadPoolExecutor(len(faults)) as together:
        attempts = dict(zip(faults, together.map(one, faults), strict=True))
    assert {attempts[fault] for fault in WHOLE_LINES} == {1}
    assert len(desk.authority.signed) == len(faults)


def test_the_port_goes_for_a_second(desk: Desk, tmp_path: Path) -> None:
    """It comes back under another number; the same run finds it, and goes on with the same certificate."""

    def one(offset: int) -> None:
        seen: list[object] = []
        folder = tmp_path / str(offset)
        with SimBoard(folder, f"unplug=1@{offset}", "baud=115200") as board:
            row = enrol(desk, board.port, f"unit-{offset}", watch=seen.append)
            assert board.seen.count("unplugged") == board.seen.count("replugged") == 1
        assert row.state is State.ATTESTED
        kinds = [type(event) for event in seen]
        assert (kinds.count(Unplugged), kinds.count(Replugged)) == (1, 1)
        check_no_half(desk, folder)

    with ThreadPoolExecutor(len(UNPLUGGED)) as together:
        list(together.map(one, UNPLUGGED))
    assert desk.states() == [State.ATTESTED] * len(UNPLUGGED)
    assert len(desk.authority.signed) == len(UNPLUGGED)
