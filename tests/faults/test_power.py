"""Power cuts at every moment of the board's storage, reboots at every answer, full disks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from support.fault_bench import SimBoard, VirtualBoard, check_no_half, enrol

from birthmark.device.agent.slots import Slots
from birthmark.device.errors import LinkError
from birthmark.device.link.messages import DeviceState, ErrorCode
from birthmark.firmware_sim.faults import REQUESTS
from birthmark.firmware_sim.storage import FailingStorage
from birthmark.provisioning.enrollment.exchange import DeviceRefusalError
from birthmark.provisioning.registry.model import State

if TYPE_CHECKING:
    from pathlib import Path

    from support.board_station import Desk

BEFORE_ATTESTED = ["hello", "keygen", "begin", "data", "prepare", "commit", "attest"]


def test_the_power_is_cut_at_every_moment(desk: Desk, tmp_path: Path) -> None:
    moment = 0
    while True:
        moment += 1
        folder = tmp_path / f"board-{moment}"
        storage = FailingStorage(cut_at=moment)
        board = VirtualBoard(folder, storage=storage, hwid=moment.to_bytes(8, "big"))
        row = board.enrol(desk, f"unit-{moment}", failures=(LinkError,))
        mine = [each for each in desk.rows() if each.hwid == row.hwid]
        assert [each.state for each in mine] == [State.ATTESTED], f"resumed by another row at moment {moment}"
        active = Slots(folder).active()
        assert active is not None
        assert active.txn == row.txn
        assert desk.authority.signed.count(row.cert_serial or 0) == 1
        Slots(folder).recover()
        check_no_half(desk, folder)
        if storage.moments < moment:
            break
        assert board.cuts == 1
    assert len(desk.authority.signed) == moment
    assert moment > 20, "an enrollment writes and removes more than that"


def test_the_power_is_cut_twice(desk: Desk, tmp_path: Path) -> None:
    """Once while it enrols, and once more while it recovers from that."""
    for first in range(2, 30, 5):
        for second in (1, 3):
            name = f"{first}-{second}"
            board = VirtualBoard(tmp_path / name, hwid=f"{name:>8}".encode(), storage=_CutTwice(first, second))
            row = board.enrol(desk, f"unit-{name}", failures=(LinkError,))
            assert [each.state for each in desk.rows() if each.hwid == row.hwid] == [State.ATTESTED]
            assert desk.authority.signed.count(row.cert_serial or 0) == 1


class _CutTwice(FailingStorage):
    """The power is cut at a moment, and again so many moments later."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(cut_at=first)
        self._second = first + second

    def _moment(self) -> None:
        try:
            super()._moment()
        finally:
            if self.moments + 1 == self._second:
                self._cut_at = self._second


def test_it_reboots_before_an_answer(desk: Desk, tmp_path: Path) -> None:
    """Each board at another request, all at the same time: the second run, if one is needed, ends it."""
    assert set(BEFORE_ATTESTED) < set(REQUESTS)

    def one(name: str) -> None:
        folder = tmp_path / name
        with SimBoard(folder, f"reboot={name}") as board:
            try:
                row = enrol(desk, board.port, f"unit-{name}")
            except (LinkError, DeviceRefusalError):
                row = enrol(desk, board.port, f"unit-{name}")
            assert board.seen.count("power_cut") == 1
        assert row.state is State.ATTESTED
        check_no_half(desk, folder)

    with ThreadPoolExecutor(len(BEFORE_ATTESTED)) as together:
        list(together.map(one, BEFORE_ATTESTED))
    assert desk.states() == [State.ATTESTED] * len(BEFORE_ATTESTED)
    assert len(desk.authority.signed) == len(BEFORE_ATTESTED)


@pytest.mark.parametrize(("writes", "state"), [(0, State.RESERVED), (1, State.ISSUED)])
def test_the_disk_is_full(desk: Desk, tmp_path: Path, writes: int, state: State) -> None:
    """At KEYGEN, and at PREPARE: STORE, nothing changed, and it enrols once there is room."""
    board = VirtualBoard(tmp_path / "board", storage=_FullAfter(writes))
    with pytest.raises(DeviceRefusalError) as caught:
        board.enrol(desk, tries=1)
    assert caught.value.code == ErrorCode.STORE
    assert "free space" in caught.value.hint
    assert desk.states() == [state]
    assert board.agent.state is DeviceState.BLANK
    check_no_half(desk, tmp_path / "board")
    row = board.enrol(desk, tries=1)
    assert (desk.states(), desk.authority.signed) == ([State.ATTESTED], [row.cert_serial])


class _FullAfter(FailingStorage):
    """There is room for so many writes; the one that follows finds the disk full, and then somebody cleans up."""

    def __init__(self, writes: int) -> None:
        super().__init__()
        self._left = writes

    def write(self, path: Path, content: bytes) -> None:
        if self._left == 0:
            self._full_for = 1
        self._left -= 1
        super().write(path, content)


def test_a_full_disk_on_a_real_port(desk: Desk, tmp_path: Path) -> None:
    with SimBoard(tmp_path / "board", "disk-full=1") as board:
        with pytest.raises(DeviceRefusalError, match="STORE"):
            enrol(desk, board.port)
        assert enrol(desk, board.port).state is State.ATTESTED
