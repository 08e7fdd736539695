"""The wrong unit on a port: clones, twins, foreign and erased boards, two with one key, one that is swapped."""

from __future__ import annotations

import shutil
import threading
from typing import TYPE_CHECKING

import pytest
from support.fault_bench import SimBoard, check_no_half, enrol
from support.patience import PATIENCE_S

from birthmark.device.errors import BirthmarkError, PortError
from birthmark.provisioning.enrollment.enrol import Reached, Step, UnitRefusedError
from birthmark.provisioning.enrollment.journal import Action
from birthmark.provisioning.registry.interface import DuplicateError
from birthmark.provisioning.registry.model import State

if TYPE_CHECKING:
    from pathlib import Path

    from support.board_station import Desk


def _refused(desk: Desk, port: str, device_id: str = "unit-1") -> Action:
    before = desk.rows()
    with pytest.raises(UnitRefusedError) as caught:
        enrol(desk, port, device_id)
    assert desk.rows() == before, "a refusal changes no row"
    return caught.value.action


@pytest.fixture
def made(desk: Desk, tmp_path: Path) -> Path:
    """The folder of a board that was made as unit-1."""
    with SimBoard(tmp_path / "made") as board:
        enrol(desk, board.port)
    return tmp_path / "made"


def test_a_clone_on_other_hardware(desk: Desk, tmp_path: Path, made: Path) -> None:
    with SimBoard(tmp_path / "clone", f"clone={made}") as board:
        assert _refused(desk, board.port) is Action.QUARANTINE
        assert _refused(desk, board.port, "unit-2") is Action.QUARANTINE


def test_a_twin(desk: Desk, tmp_path: Path, made: Path) -> None:
    with SimBoard(tmp_path / "twin", f"twin={made}") as board:
        assert _refused(desk, board.port) is Action.DUPLICATE


def test_a_foreign_board(desk: Desk, tmp_path: Path) -> None:
    with SimBoard(tmp_path / "board", "foreign") as board:
        assert _refused(desk, board.port) is Action.QUARANTINE
    assert (desk.rows(), desk.authority.signed) == ([], [])


def test_an_erased_board(desk: Desk, tmp_path: Path, made: Path) -> None:
    erased = tmp_path / "erased"
    erased.mkdir(mode=0o700)
    shutil.copy(made / "hwid", erased)
    with SimBoard(erased) as board:
        assert _refused(desk, board.port) is Action.ERASED
    assert len(desk.authority.signed) == 1


def test_two_boards_with_one_key(desk: Desk, tmp_path: Path) -> None:
    with SimBoard(tmp_path / "one", "key=1234") as board:
        enrol(desk, board.port, "unit-1")
    with SimBoard(tmp_path / "other", "key=1234") as board, pytest.raises(DuplicateError):
        enrol(desk, board.port, "unit-2")
    assert len(desk.authority.signed) == 1
    check_no_half(desk, tmp_path / "other")


def test_a_board_is_swapped_between_prepare_and_commit(desk: Desk, tmp_path: Path) -> None:
    port = tmp_path / "ttySLOT"
    first = SimBoard(tmp_path / "first", link_path=port)
    second = SimBoard(tmp_path / "second", link_path=port)
    swapped: list[bool] = []

    def swap(event: object) -> None:
        if isinstance(event, Reached) and event.step is Step.PREPARE and not swapped:
            swapped.append(True)
            first.__exit__()
            second.__enter__()

    first.__enter__()
    try:
        with pytest.raises(BirthmarkError) as caught:
            enrol(desk, str(port), watch=swap)
    finally:
        second.__exit__()
    assert isinstance(caught.value, UnitRefusedError | DuplicateError)
    assert desk.states() == [State.PREPARED]
    assert not (tmp_path / "second" / "active").exists()
    with SimBoard(tmp_path / "first", link_path=port):
        row = enrol(desk, str(port))
    assert (desk.states(), desk.authority.signed) == ([State.ATTESTED], [row.cert_serial])


def test_two_stations_on_one_port(desk: Desk, tmp_path: Path) -> None:
    refused: list[PortError] = []

    def meddle(event: object) -> None:
        if isinstance(event, Reached) and event.step is Step.KEYGEN:
            with pytest.raises(PortError, match="another station is at work on it") as caught:
                enrol(desk, board.port, "unit-2")
            refused.append(caught.value)

    with SimBoard(tmp_path / "board") as board:
        enrol(desk, board.port, "unit-1", watch=meddle)
    assert len(refused) == 1
    assert [row.name for row in desk.rows()] == ["unit-1"]


def test_one_id_on_two_ports(desk: Desk, tmp_path: Path) -> None:
    """Eight stations want one id for eight boards at the same instant: one has it."""
    count = 8
    results: list[object] = []
    together = threading.Barrier(count)

    def one(number: int) -> None:
        with SimBoard(tmp_path / f"board-{number}", number=number) as board:
            together.wait(PATIENCE_S)
            try:
                results.append(enrol(desk, board.port, "unit-1").state)
            except (UnitRefusedError, DuplicateError) as error:
                results.append(type(error))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count(State.ATTESTED) == 1
    assert len(results) == count
    assert [row.name for row in desk.rows()] == ["unit-1"]
    assert len(desk.authority.signed) == 1
