"""SIGKILL at every step of what a station writes: run as `python killing_ground.py SCENARIO FOLDER STRIDE`.

A scenario's `act` runs in a forked child that is killed when it comes to its n-th line in the modules that touch
the disk, for n = 1, 1 + STRIDE, 1 + 2 STRIDE, ... until it finishes before it is killed. After each kill, `check`
looks at what is left, as the next process would. A process of its own: only one with one thread may fork safely.

Prints the number of kills; a failed check ends it with a traceback.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from birthmark.device.durable import TEMPORARY_SUFFIX
from birthmark.device.errors import RegistryError
from birthmark.provisioning import audit, audit_check
from birthmark.provisioning.registry.model import Kind
from birthmark.provisioning.registry.tiny import TinyRegistry

if TYPE_CHECKING:
    from types import FrameType

DEADLY = (
    "device/durable.py",
    "device/renewal/store.py",
    "provisioning/founding.py",
    "provisioning/issuing.py",
    "provisioning/renewal.py",
    "provisioning/retirement.py",
    "provisioning/revocation.py",
)
DEADLY_FUNCTIONS = ("append_missing", "_write_all", "transaction", "save")


class Scenario(Protocol):
    """What is killed, and what must then hold."""

    def prepare(self, folder: Path) -> None: ...

    def act(self, folder: Path) -> None: ...

    def check(self, folder: Path, *, finished: bool) -> None: ...


def utc() -> datetime:
    return datetime.now(UTC)


def open_registry(folder: Path) -> TinyRegistry:
    return TinyRegistry(folder, clock=utc, actor="test@host")


def check_registry(folder: Path) -> None:
    """The registry reads, the log agrees with it, no temporary file outlives the next transaction."""
    registry = open_registry(folder)
    with registry.transaction() as transaction:
        transaction.record("look", "station")  # takes the outbox over: what it held must be in the log by now
    verdict = audit_check.check(registry)
    assert not verdict.problems, verdict
    assert not list(folder.glob(f".registry.json*{TEMPORARY_SUFFIX}"))


class Write:
    """Two transactions: an acknowledged one is never lost, an unfinished one is all or nothing."""

    def prepare(self, folder: Path) -> None:
        registry = TinyRegistry.create(folder, clock=utc, actor="test@host")
        self._add(registry, "first")

    def act(self, folder: Path) -> None:
        registry = open_registry(folder)
        for name in ("second", "third"):
            self._add(registry, name)
            with (folder / "acknowledged").open("a") as file:
                file.write(name + "\n")

    def check(self, folder: Path, *, finished: bool) -> None:  # noqa: ARG002
        check_registry(folder)
        registry = open_registry(folder)
        with registry.view() as view:
            names = [row.name for row in view.rows()]
        acknowledged = folder / "acknowledged"
        told = acknowledged.read_text().split() if acknowledged.exists() else []
        assert names[: 1 + len(told)] == ["first", *told], (names, told)
        assert names == ["first", "second", "third"][: len(names)]
        entries = audit.read(registry.audit_path)
        recorded = [entry["subject"] for entry in entries if entry["action"] == "reserve"]
        assert recorded == names, (recorded, names)

    def _add(self, registry: TinyRegistry, name: str) -> None:
        with registry.transaction() as transaction:
            transaction.insert(
                kind=Kind.DEVICE, name=name, role="sensor", hwid=name.encode(), txn=name.encode().ljust(16)
            )
            transaction.record("reserve", name)


class DiskFull:
    """Not a kill: no room for the new state is a clear error, and changes nothing."""

    def run(self, folder: Path) -> None:
        Write().prepare(folder)
        registry = open_registry(folder)
        before = (folder / "registry.json").read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 1, resource.RLIM_INFINITY))
        with pytest.raises(RegistryError, match="could not write the registry") as caught:
            Write()._add(registry, "second")
        assert "nothing was changed" in caught.value.hint
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert (folder / "registry.json").read_bytes() == before
        Write()._add(registry, "second")
        check_registry(folder)


SCENARIOS: dict[str, Scenario] = {"write": Write()}


def die_at(step: int) -> Any:
    """Return a trace function that kills the process at its `step`-th deadly line."""
    count = 0

    def trace_line(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace_line

    def trace_call(frame: FrameType, _event: str, _argument: Any) -> Any:
        code = frame.f_code
        deadly = code.co_filename.endswith(DEADLY) or (
            "provisioning" in code.co_filename and code.co_name in DEADLY_FUNCTIONS
        )
        return trace_line if deadly else None

    return trace_call


def survive(scenario: Scenario, root: Path, stride: int) -> int:
    """Kill the scenario at every `stride`-th of its steps; return how often it was killed."""
    scenario.prepare(root / "prepared")
    kills = 0
    while True:
        step = 1 + kills * stride
        folder = root / str(step)
        shutil.copytree(root / "prepared", folder)
        child = os.fork()
        if child == 0:
            sys.settrace(die_at(step))
            scenario.act(folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        finished = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
        if not finished and os.WTERMSIG(status) != signal.SIGKILL:
            raise AssertionError(f"step {step} ended with status {status}")
        try:
            scenario.check(folder, finished=finished)
        except BaseException:
            print(f"killed at step {step}", file=sys.stderr)
            raise
        shutil.rmtree(folder)
        if finished:
            return kills
        kills += 1


def main(name: str, root: Path, stride: int = 1) -> None:
    if name == "disk-full":
        DiskFull().run(root / "prepared")
        return
    print(survive(SCENARIOS[name], root, stride))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
