"""Several simulated boards in one process, each on threads of its own, powered on and off together."""

from __future__ import annotations

import select
import threading
from typing import TYPE_CHECKING

from birthmark.device.durable import private_folder
from birthmark.firmware_sim.board import SimulatedBoard

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from birthmark.device.agent.stop import Stop
    from birthmark.firmware_sim.board import Behaviour, Report


def board_folder(folder: Path, number: int) -> Path:
    """Return the state folder of a board."""
    return folder / f"board-{number}"


def run_boards(folder: Path, behaviours: Sequence[Behaviour], report: Report, stop: Stop) -> None:
    """Run a board for each behaviour, with their state in `folder/board-1` and so on, until `stop`.

    Args:
        folder: made if needed (0700); boards that were enrolled in an earlier run still are.
        behaviours: how each board behaves, from the first on.
        report: is told what happens, one record at a time.
        stop: ends all of them.

    Raises:
        BirthmarkError: a board could not run; the others were stopped.
        OSError: the same, for a reason of the machine.
    """
    private_folder(folder)
    telling = threading.Lock()
    failures: list[Exception] = []

    def tell(record: dict[str, object]) -> None:
        try:
            with telling:
                report(record)
        except OSError as error:
            # Nobody hears us any more (`birthmark-sim board | head`): that ends it, and is not the board's fault.
            failures.append(error)
            stop.set()

    def power_on(number: int, behaviour: Behaviour) -> None:
        try:
            SimulatedBoard(number, board_folder(folder, number), behaviour, tell).run(stop)
        except Exception as error:  # noqa: BLE001 - it is raised again below, in the caller's thread
            failures.append(error)
            stop.set()

    boards = [threading.Thread(target=power_on, args=each) for each in enumerate(behaviours, 1)]
    for board in boards:
        board.start()
    while not stop.is_set:
        select.select([stop], [], [])  # and not in `join`: a signal may come just before that blocks
    for board in boards:
        board.join()
    if failures:
        raise failures[0]
