"""The commands of the line, as they are killed: `flash`, `run`, `resume`, `reflash`; with a board that survives.

The board is the device's own agent on a pty, in a process of its own; what it stores is in the scenario's folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
import tty as terminal
from typing import TYPE_CHECKING

from support.board_killed import session
from support.scenario import Scenario, all_listed, rows_named, station
from support.shared_line import nothing_is_half

from birthmark.device.agent import tty
from birthmark.device.agent.enrollment import Board, Surroundings
from birthmark.device.agent.machine import Agent
from birthmark.device.agent.slots import Slots
from birthmark.device.agent.stop import Stop
from birthmark.provisioning import audit
from birthmark.provisioning.enrollment.enrol import Stored
from birthmark.provisioning.registry.model import KeyMode, State

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from birthmark.provisioning.enrollment.session import Event

NAME = "sensor-9"
HWID_BYTES = 8
PORT = ("--port", "@/board-1.tty", "--broker", "gateway-1.example.com:8883")


class CutError(Exception):
    pass


@contextlib.contextmanager
def powered(root: Path, boards: int) -> Iterator[None]:
    """Have so many boards on their ports for the block. The caller's process has one thread: it is forked."""
    with contextlib.ExitStack() as stack:
        for number in range(1, boards + 1):
            stack.enter_context(_board(root / f"board-{number}"))
        yield


@contextlib.contextmanager
def _board(folder: Path) -> Iterator[None]:
    master, slave = os.openpty()  # its slave stays open: nobody's end is a hang-up
    terminal.setraw(slave)
    os.set_blocking(master, False)
    link = folder.with_suffix(".tty")
    link.symlink_to(os.ttyname(slave))
    child = os.fork()
    if child == 0:
        try:
            slots = Slots(folder)
            board = Board(slots.kept_hwid(secrets.token_bytes, HWID_BYTES), "killed", "1.0")
            tty.serve(master, Agent(slots, board, Surroundings(time.monotonic, secrets.token_bytes)), Stop())
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        link.unlink()
        os.close(master)
        os.close(slave)


def enrolled_up_to(root: Path, state: State) -> None:
    """A board's enrollment was cut when its row had come to this state."""

    def cut(event: Event) -> None:
        if isinstance(event, Stored) and event.row.state is state:
            raise CutError

    with powered(root, 1), contextlib.suppress(CutError):
        session(station(root), str(root / "board-1.tty"), NAME, KeyMode.ON_DEVICE, cut).run()


def with_half_a_board(root: Path) -> None:
    enrolled_up_to(root, State.PREPARED)


def with_a_board(root: Path) -> None:
    enrolled_up_to(root, State.ATTESTED)


def with_a_board_that_was_wiped(root: Path) -> None:
    """It is made, and has lost its identity."""
    with_a_board(root)
    (root / "board-1" / "active").unlink()


def with_a_board_that_lost_its_key(root: Path) -> None:
    """Its certificate is signed, and it has lost the key."""
    enrolled_up_to(root, State.ISSUED)
    for record in (root / "board-1").iterdir():
        if record.name != "hwid":
            record.unlink()


def is_whole(root: Path) -> None:
    """Whenever it is killed, the board has what its row says, or what the row says that stands meanwhile."""
    with station(root).registry.view() as view:
        nothing_is_half(view.rows(), [root / "board-1"])


def is_made(root: Path) -> None:
    """One row is ATTESTED, and the board holds its identity; what was begun before is void, and revoked."""
    is_whole(root)
    rows = rows_named(root, NAME)
    (live,) = [row for row in rows if row.is_live]
    active = Slots(root / "board-1").active()
    assert active is not None
    assert (live.state, live.txn) == (State.ATTESTED, active.txn)
    for row in rows:
        if row is not live:
            assert row.state is State.VOID
            assert row.is_revoked or row.cert_serial is None
    all_listed(root)


def is_made_anew(root: Path) -> None:
    """Likewise; and no row was given up but for one that took its place, when that one stood."""
    is_made(root)
    entries = list(audit.read(root / "station" / "audit.jsonl"))
    attested = [entry["details"]["row"] for entry in entries if entry["action"] == "attest"]
    assert attested == [row.number for row in rows_named(root, NAME)], "a second row for the same wish"


LINE_SCENARIOS: dict[str, Scenario] = {
    "flash": Scenario(
        ["flash", "--id", NAME, *PORT], boards=1, killed=is_whole, finished=is_made, done_already=["DUPLICATE"]
    ),
    "flash --keys station": Scenario(
        ["flash", "--id", NAME, "--keys", "station", *PORT],
        boards=1,
        killed=is_whole,
        finished=is_made,
        done_already=["DUPLICATE"],
    ),
    "flash, a board that lost its key": Scenario(
        ["flash", "--id", NAME, *PORT],
        prepare=with_a_board_that_lost_its_key,
        boards=1,
        killed=is_whole,
        finished=is_made,
        done_already=["DUPLICATE"],
    ),
    "run": Scenario(
        ["run", "--template", "sensor-{n}", "--start", "9", *PORT],
        boards=1,
        killed=is_whole,
        finished=is_made,
        done_already=["DUPLICATE"],
    ),
    "resume": Scenario(["resume", *PORT], prepare=with_half_a_board, boards=1, killed=is_whole, finished=is_made),
    "reflash": Scenario(
        ["reflash", NAME, "--reason", "superseded", *PORT],
        prepare=with_a_board,
        boards=1,
        killed=is_whole,
        finished=is_made_anew,
    ),
    "reflash, a board that was wiped": Scenario(
        ["reflash", NAME, "--reason", "broken", *PORT],
        prepare=with_a_board_that_was_wiped,
        boards=1,
        finished=is_made_anew,
    ),
}
