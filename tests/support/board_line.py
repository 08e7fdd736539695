"""A line in virtual time between a sans-I/O station and a board: seconds of it pass in microseconds.

Bytes take their time at the line's speed, one byte at a time if a test says so; noise works in both directions.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from birthmark.provisioning.enrollment.exchange import Read, Send

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

T = TypeVar("T")
PIECE_BYTES = 64
"""What arrives at once, as from a UART's FIFO."""


class Listener(Protocol):
    def receive(self, data: bytes) -> bytes: ...


class UnpluggedError(Exception):
    """The cable fell out."""


def clean(data: bytes) -> bytes:
    return data


@dataclass
class VirtualLine:
    board: Listener | None = None
    baud: int = 115_200
    turnaround_s: float = 0.002
    to_board: Callable[[bytes], bytes] = clean
    to_station: Callable[[bytes], bytes] = clean
    byte_by_byte: bool = False
    unplug_after_bytes: int | None = None
    """Bytes in either direction after which the cable falls out."""
    now_s: float = 1000.0
    sent: list[bytes] = field(default_factory=list)
    carried: int = 0

    def __post_init__(self) -> None:
        self._arrivals: list[tuple[float, int, bytes]] = []
        self._number = itertools.count()
        self._free_s = 0.0

    def clock(self) -> float:
        return self.now_s

    def say(self, data: bytes, after_s: float = 0.0) -> None:
        """Let bytes arrive at the station, starting `after_s` from now."""
        start_s = max(self._free_s, self.now_s + after_s)
        step_s = 10 / self.baud
        size = 1 if self.byte_by_byte else PIECE_BYTES
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        for piece in pieces:
            start_s += step_s * len(piece)
            heapq.heappush(self._arrivals, (start_s, next(self._number), piece))
        self._free_s = start_s

    def send(self, data: bytes) -> None:
        self.sent.append(data)
        self._carry(len(data))
        if self.board is None:
            return
        answer = self.board.receive(self.to_board(data))
        self.say(self.to_station(answer), len(data) * 10 / self.baud + self.turnaround_s)

    def read(self, until_s: float) -> bytes:
        if self._arrivals and self._arrivals[0][0] <= until_s:
            at_s, _, data = heapq.heappop(self._arrivals)
            self.now_s = max(self.now_s, at_s)
            self._carry(len(data))
            return data
        self.now_s = max(self.now_s, until_s)
        return b""

    def run(self, machine: Generator[object, bytes, T], watch: Callable[[object], None] | None = None) -> T:
        """Drive a machine to its end; its result, or its exception."""
        reply = b""
        try:
            effect = next(machine)
            while True:
                match effect:
                    case Send(data):
                        self.send(data)
                        reply = b""
                    case Read(until_s):
                        reply = self.read(until_s)
                    case _:
                        reply = b""
                        if watch is not None:
                            watch(effect)
                effect = machine.send(reply)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    def _carry(self, count: int) -> None:
        self.carried += count
        if self.unplug_after_bytes is not None and self.carried >= self.unplug_after_bytes:
            raise UnpluggedError
