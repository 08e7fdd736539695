"""Station and board as processes, killed at random moments: `python -m support.fault_kills FOLDER KILLS SEED`.

One process without threads forks both for each unit, on a pty that outlives them, and kills one of them or both at
the same instant, by SIGKILL or SIGINT. Whoever died is started again, as an operator and a power supply would; in
the end every unit is enrolled, and after each kill and at the end the invariants hold. Prints what it did as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import select
import signal
import sys
import time
import traceback
import tty as terminal
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from support.board_station import open_desk
from support.fault_bench import check_no_half, enrol

from birthmark.device.agent import tty
from birthmark.device.agent.enrollment import Board, Surroundings
from birthmark.device.agent.machine import Agent
from birthmark.device.agent.slots import Slots
from birthmark.device.agent.stop import Stop
from birthmark.device.errors import LinkError
from birthmark.provisioning.enrollment.enrol import Stored, UnitRefusedError
from birthmark.provisioning.enrollment.exchange import DeviceRefusalError
from birthmark.provisioning.enrollment.journal import Action
from birthmark.provisioning.registry.model import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.board_station import Desk

ENROLLMENT_S = 0.12
"""About what an undisturbed one takes here: kills fall anywhere in it, and a little after."""
COMMIT_S = 0.006
RUNS = 12
LIMIT_S = 60.0
DONE, UNANSWERED, INTERRUPTED = 0, 4, 130
WAYS = ("station SIGKILL", "station SIGINT", "board SIGKILL", "both SIGKILL", "both at COMMIT")


class Ledger(list[int]):
    """Serial numbers of certificates that were signed, kept where no process takes them with it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        path.touch()

    def append(self, cert_serial: int) -> None:
        with self._path.open("a") as file:
            file.write(f"{cert_serial:x}\n")

    def read(self) -> list[int]:
        return [int(line, 16) for line in self._path.read_text().splitlines()]


def fork(work: Callable[[], int]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = work()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BaseException:  # noqa: BLE001 - it must not run on as a second parent
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int, timeout_s: float) -> int | None:
    """Wait for a process for so long; its exit code, negative for a signal."""
    with contextlib.closing(_Descriptor(child)) as descriptor:
        if not select.select([descriptor], [], [], timeout_s)[0]:
            return None
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class _Descriptor:
    def __init__(self, child: int) -> None:
        self._number = os.pidfd_open(child)

    def fileno(self) -> int:
        return self._number

    def close(self) -> None:
        os.close(self._number)


class Unit:
    """One unit on its port, until it is enrolled."""

    def __init__(self, desk: Desk, ledger: Ledger, root: Path, number: int) -> None:
        self.desk, self.ledger = desk, ledger
        self.name = f"unit-{number}"
        self.folder = root / self.name
        self.hwid = secrets.token_bytes(8)
        self.master, self.slave = os.openpty()
        terminal.setraw(self.slave)
        os.set_blocking(self.master, False)
        self.path = os.ttyname(self.slave)
        self.prepared, self._told = os.pipe()
        self.board = self.station = 0

    def close(self) -> None:
        for child in (self.board, self.station):
            if child:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        for descriptor in (self.master, self.slave, self.prepared, self._told):
            os.close(descriptor)

    def run(self, kills: int, chance: random.Random, done: Counter[str]) -> None:
        """Enrol it, with so many kills on the way."""
        for run in range(RUNS + kills):
            self.board = self.board or fork(self._board)
            self.station = self.station or fork(self._station)
            if run < kills:
                self._kill(chance.choice(WAYS), chance, done)
                if not self.station:
                    continue
            code = ended(self.station, LIMIT_S)
            assert code is not None, f"{self.name} did not end"
            self.station = 0
            if code == DONE and run >= kills:
                break
            assert code in (DONE, UNANSWERED, INTERRUPTED), f"{self.name} ended with {code}"
        else:
            raise AssertionError(f"{self.name} was not enrolled in {RUNS} runs")
        self._check()

    def _kill(self, way: str, chance: random.Random, done: Counter[str]) -> None:
        if way == "both at COMMIT":
            if not select.select([self.prepared], [], [], 1.0)[0]:
                return  # it is past it
            os.read(self.prepared, 1)
            time.sleep(chance.uniform(0, COMMIT_S))
        else:
            time.sleep(chance.uniform(0, ENROLLMENT_S))
        number = signal.SIGINT if way == "station SIGINT" else signal.SIGKILL
        done[way] += 1
        if not way.startswith("board"):
            os.kill(self.station, number)
        if not way.startswith("station"):
            os.kill(self.board, signal.SIGKILL)
            os.waitpid(self.board, 0)
            self.board = 0
        if not way.startswith("board"):
            code = ended(self.station, LIMIT_S)
            assert code in (DONE, UNANSWERED, INTERRUPTED, -signal.SIGKILL), f"{self.name} ended with {code}"
            self.station = 0
        if way.startswith("both"):
            self._check(booted=False)

    def _check(self, *, booted: bool = True) -> None:
        check_no_half(self.desk, self.folder, signed=self.ledger.read(), booted=booted)
        if booted:
            live = [row for row in self.desk.rows() if row.name == self.name and row.state is not State.VOID]
            assert [row.state for row in live] == [State.ATTESTED]
            active = Slots(self.folder).active()
            assert active is not None
            assert active.txn == live[0].txn

    def _board(self) -> int:
        slots = Slots(self.folder)
        agent = Agent(slots, Board(self.hwid, "killed", "1.0"), Surroundings(time.monotonic, secrets.token_bytes))
        tty.serve(self.master, agent, Stop())
        return 0

    def _station(self) -> int:
        def watch(event: object) -> None:
            if isinstance(event, Stored) and event.row.state is State.PREPARED:
                os.write(self._told, b"\1")

        try:
            enrol(self.desk, self.path, self.name, watch=watch)
        except UnitRefusedError as error:
            return DONE if error.action is Action.DUPLICATE else 3
        except (LinkError, DeviceRefusalError):
            return UNANSWERED
        return DONE


def main(root: Path, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    done: Counter[str] = Counter()
    units = 0
    while done.total() < kills:
        if units % 20 == 0:
            desk = open_desk(root / f"station-{units}")
            ledger = Ledger(root / f"signed-{units}")
            desk.authority.signed = ledger
        unit = Unit(desk, ledger, root, units)
        try:
            unit.run(chance.randint(1, 4), chance, done)
        finally:
            unit.close()
        known = {row.cert_serial for row in desk.rows()}
        assert set(ledger.read()) <= known, "a certificate that nobody knows"
        units += 1
    print(json.dumps({"units": units, "kills": done.total(), "ways": done}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
