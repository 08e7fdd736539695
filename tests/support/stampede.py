"""A fleet whose gateway goes away, as numbers: who comes when. Only the backoff is real; nothing waits.

PYTHONPATH=tests python -m support.stampede      the table of docs/connection.md
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import dataclass

from birthmark.device.backoff import Backoff, RetryTimer
from birthmark.device.errors import UnreachableError


@dataclass(frozen=True)
class Shown:
    """What the gateway saw, in seconds since it went away."""

    connected: int
    busiest_second: int
    """The most attempts that reached it, once it was back, in any one second."""
    busiest_tenth: int
    """In any tenth of a second."""
    half_back_s: float
    all_back_s: float


def back_after(outage_s: float, *, devices: int, seed: int, first_s: float | None = None) -> Shown:
    """Have all devices lose the gateway at second 0, and come back once it is there again at `outage_s`."""
    draw = random.Random(seed)
    waits = None if first_s is None else Backoff(first_s, 120)
    gone = UnreachableError("gone")
    timers = [RetryTimer(draw.uniform, unreachable=waits) for _ in range(devices)]
    attempts = [(timer.wait_s(gone, connected_for_s=3600), number) for number, timer in enumerate(timers)]
    heapq.heapify(attempts)
    arrivals: list[float] = []
    while attempts:
        at, number = heapq.heappop(attempts)
        if at >= outage_s:
            arrivals.append(at)
        else:
            heapq.heappush(attempts, (at + timers[number].wait_s(gone), number))
    return Shown(
        connected=len(arrivals),
        busiest_second=max(_in_any(arrivals, 1.0)),
        busiest_tenth=max(_in_any(arrivals, 0.1)),
        half_back_s=arrivals[len(arrivals) // 2],
        all_back_s=arrivals[-1],
    )


def _in_any(arrivals: list[float], window_s: float) -> list[int]:
    return list(Counter(int(at / window_s) for at in arrivals).values())


if __name__ == "__main__":
    for outage in (2.0, 30.0, 600.0, 86_400.0):
        print(f"{outage:>8} s  {back_after(outage, devices=1000, seed=1)}")
