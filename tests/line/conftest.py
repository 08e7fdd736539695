"""A station, its command, and boards to make."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support.line_board import LineBoard
from support.line_process import Process
from support.patience import PATIENCE_S
from support.station import PASSPHRASE, Command, new_station

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from birthmark.provisioning.station import Station


@pytest.fixture
def station(tmp_path: Path) -> Iterator[Station]:
    station = new_station(tmp_path / "station")
    yield station
    station.close()


@pytest.fixture
def birthmark(station: Station, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command `birthmark`, in this process, with the passphrase in the environment."""
    monkeypatch.setenv("BIRTHMARK_PASSPHRASE", PASSPHRASE.decode())
    return Command(station.folder, capsys)


@pytest.fixture
def boards(tmp_path: Path) -> Iterator[Callable[[int], list[LineBoard]]]:
    """Makes boards, blank and powered on; each call makes others."""
    with ExitStack() as stack:
        made: list[LineBoard] = []

        def make(count: int) -> list[LineBoard]:
            fresh = [LineBoard(tmp_path / f"board-{len(made) + n}") for n in range(1, count + 1)]
            made.extend(fresh)
            return [stack.enter_context(board) for board in fresh]

        yield make


@pytest.fixture
def board(boards: Callable[[int], list[LineBoard]]) -> LineBoard:
    """One blank board, powered on."""
    return boards(1)[0]


@pytest.fixture
def start(station: Station) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def begin(*words: str) -> Process:
        started.append(Process(station, *words))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate(timeout=PATIENCE_S)
