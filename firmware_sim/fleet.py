"""A fleet of simulated devices: a few processes of many clients each, in one process group, and what they did.

Rules:

- A device is a state folder, as the agent leaves it, and the device's own client on it. Nothing is imitated.
- It stops by itself: after the time that it was given, on a signal, and when a process of it ends early.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.credentials import ACTIVE
from birthmark.device.errors import ConfigurationError, CredentialError, SystemFailureError
from birthmark.firmware_sim.fleet_worker import REPORT_EVERY_S, STOP_S, Share, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from birthmark.device.agent.stop import Stop

END_S: Final = 30.0
"""What the processes get to say goodbye; then they are killed."""
MAX_SAMPLES: Final = 1_000_000
_COUNTS: Final = ("resumed", "lost", "published", "acknowledged", "refused", "commands")


@dataclass(slots=True)
class Totals:
    """What a fleet did since its start."""

    devices: int
    began: float = field(default_factory=time.time)
    online: int = 0
    connects: int = 0
    resumed: int = 0
    lost: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    published: int = 0
    acknowledged: int = 0
    pending: int = 0
    refused: int = 0
    commands: int = 0
    latency_ms: list[float] = field(default_factory=list)
    connects_by_second: Counter[int] = field(default_factory=Counter)
    """By the second since the start."""
    never: list[str] = field(default_factory=list)
    max_rss_kb: int = 0

    def add(self, before: Share, share: Share) -> None:
        """Add what one process said; `before` is what it had said the time before."""
        self.online += share.online - before.online
        self.pending += share.pending - before.pending
        self.max_rss_kb += share.max_rss_kb - before.max_rss_kb
        self.connects += len(share.connects)
        self.failures.update(share.failures)
        self.never += share.never
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(share, name))
        self.latency_ms += share.latency_ms[: MAX_SAMPLES - len(self.latency_ms)]
        self.connects_by_second.update(int(at - self.began) for at in share.connects)

    def latency(self, part: float) -> float | None:
        """Return the latency in ms that this part of the messages stayed below."""
        ordered = sorted(self.latency_ms)
        return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else None

    def record(self) -> dict[str, Any]:
        """Return the figures for a machine."""
        plain = {one.name: getattr(self, one.name) for one in fields(self)}
        for name in ("began", "latency_ms", "connects_by_second"):
            del plain[name]
        busiest = max(self.connects_by_second.values(), default=0)
        return plain | {
            "failures": dict(self.failures),
            "latency_count": len(self.latency_ms),
            "p50_ms": self.latency(0.5),
            "p99_ms": self.latency(0.99),
            "connects_by_second": dict(sorted(self.connects_by_second.items())),
            "most_connects_in_a_second": busiest,
        }


def device_folders(folder: Path, count: int | None) -> list[Path]:
    """Return the first `count` (None: all) folders in `folder` that an enrolled device's state is in, by name.

    Raises:
        ConfigurationError: there are fewer.
    """
    try:
        found = sorted((path for path in folder.iterdir() if (path / ACTIVE).is_file()), key=_natural)
    except OSError as error:
        raise ConfigurationError(f"could not read the devices in {folder}: {error.strerror}") from error
    if not found or (count or 0) > len(found):
        raise ConfigurationError(
            f"could not run {count or 'any'} devices: {folder} holds the state of {len(found)}",
            hint="docs/simulator.md says how to make many of them",
        )
    return found[:count]


def run_fleet(
    folders: Sequence[Path],
    task: Task,
    *,
    processes: int,
    seconds: float,
    stop: Stop,
    show: Callable[[Totals], object],
) -> Totals:
    """Run a client for each folder, until it is time or `stop`.

    Args:
        folders: the devices.
        task: what each process does; its folders are dealt out here.
        processes: how many.
        seconds: how long.
        stop: ends it early.
        show: is given the totals, about once a second.

    Returns:
        What they did, to the end.

    Raises:
        BirthmarkError: as a process could not run; the others were stopped.
    """
    totals = Totals(len(folders))
    shares = [folders[number::processes] for number in range(min(processes, len(folders)))]
    ends_at = time.monotonic() + seconds
    shown_at = time.monotonic()
    with selectors.DefaultSelector() as ready:
        children = [_Child(asdict(task) | {"folders": [str(path) for path in share]}) for share in shares]
        try:
            for child in children:
                ready.register(child.output, selectors.EVENT_READ, child)
            ready.register(stop, selectors.EVENT_READ)
            while not stop.is_set and (left_s := ends_at - time.monotonic()) > 0:
                for key, _ in ready.select(left_s):
                    if key.data is not None:
                        key.data.read(totals)
                if time.monotonic() >= shown_at + REPORT_EVERY_S:
                    shown_at = time.monotonic()
                    show(totals)
            for child in children:
                child.ask_to_end()
            for child in children:
                child.finish(totals)
        finally:
            for child in children:
                child.close()
    return totals


class _Child:
    """One process of the fleet."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "birthmark.firmware_sim.fleet_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise TypeError("a process without its pipes")
        self._input, self.output = self._process.stdin, self._process.stdout
        self._before = Share()
        self._has_ended = False
        self._input.write(json.dumps(task) + "\n")
        self._input.flush()

    def read(self, totals: Totals) -> None:
        """Add the next thing that it says to the totals.

        Raises:
            BirthmarkError: it could not run, or has ended.
        """
        line = self.output.readline()
        if not line:
            raise SystemFailureError(
                f"could not run the fleet to its end: one of its processes ended with {self._process.wait(END_S)}",
                hint="its own words are above; is there enough memory?",
            )
        said = json.loads(line)
        if "error" in said:
            raise CredentialError(said["error"], said["hint"])
        self._has_ended = said.pop("last", False)
        share = Share(**said)
        totals.add(self._before, share)
        self._before = share

    def ask_to_end(self) -> None:
        """Have it say goodbye for all its clients."""
        self._input.close()

    def finish(self, totals: Totals) -> None:
        """Read until its last word."""
        while not self._has_ended:
            self.read(totals)

    def close(self) -> None:
        """End it."""
        self._input.close()
        try:
            self._process.wait(0 if not self._has_ended else STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.output.close()


def _natural(path: Path) -> tuple[int, str]:
    """Order board-2 before board-10."""
    return len(path.name), path.name


def default_processes() -> int:
    """Return how many processes make sense here: one for each processor that we may use."""
    return len(os.sched_getaffinity(0))
