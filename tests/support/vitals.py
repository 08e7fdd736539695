"""What a process on Linux holds: memory and file descriptors (proc(5))."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from support.patience import PATIENCE_S


@dataclass(frozen=True)
class Vitals:
    """Taken at one moment."""

    resident_bytes: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Vitals:
        folder = Path("/proc") / str(pid)
        for line in (folder / "status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return cls(int(line.split()[1]) * 1_024, _descriptors(folder / "fd"))
        raise AssertionError("the process is gone")


def _descriptors(folder: Path) -> int:
    # The list is root's where a process forbids core dumps; the size of its folder, since Linux 6.2, is anybody's.
    return folder.stat().st_size or len(list(folder.iterdir()))


def wait_for_descriptors(pid: int, count: int) -> None:
    """Wait until a process has no more than so many."""
    deadline = time.monotonic() + PATIENCE_S
    while (found := Vitals.of(pid).descriptors) > count:
        assert time.monotonic() < deadline, f"{found} descriptors are open, {count} were"
        time.sleep(0.05)
