"""A serial line on a bad day, as a pure machine: bytes and the time go in, bytes come out when they are due.

Rules:

- The clock is the caller's and so is the randomness: the same calls with the same seed give the same line.
- Bytes take their time at the line's rate, in each direction by itself; nothing overtakes.
- Loss and flips happen to what either end says. Log lines and chatter are the board's, fall between any two
  bytes of it, and take their time on the line, too.
- The latency timer is the station's adapter's: what the board says is held until 62 bytes are there or the time
  is up, as in a USB packet of an FTDI chip.
- A stall holds everything that follows, and loses nothing. An unplug loses what is said until the port is back.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from birthmark.device.errors import ConfigurationError
from birthmark.device.link.timers import BITS_PER_BYTE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

PACKET_BYTES: Final = 62
"""What an adapter hands over without waiting for its timer: a full USB packet of 64 bytes less its status."""
MAX_QUEUED_BYTES: Final = 1 << 16
"""Of one direction; what is said beyond is lost, as in a UART that nobody reads."""
_PIECE_S = 0.002
_LOG_TEXT = (
    b"[  12.034000] usb 1-1: reset high-speed USB device\r\n",
    b"W (4711) wifi: pm start, type: 1\r\n",
    b"\x1b[0;32mI (5012) sensor: 21.4 C\x1b[0m\r\n",
)


@dataclass(frozen=True, slots=True)
class Interruption:
    """Something that happens once, when so many bytes have been said in both directions together."""

    lasts_s: float
    after_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Chatter:
    """What a board says without being asked.

    Args:
        every_s: between two of it, on average.
        say: makes it.
        is_regular: whether it is always so long between two; if not, each moment is as likely as any other.
    """

    every_s: float
    say: Callable[[Random], bytes]
    is_regular: bool = True

    def gap_s(self, random: Random) -> float:
        """Return how long it is until the next."""
        return self.every_s if self.is_regular else random.expovariate(1 / self.every_s)


def log_line(random: Random) -> bytes:
    """Return a line as firmware writes it."""
    return random.choice(_LOG_TEXT)


@dataclass(frozen=True, slots=True)
class LineFaults:
    """What is wrong with a line; by default nothing.

    Args:
        baud: its rate, 8N1; without one, bytes take no time.
        latency_s: of the adapter's timer.
        loss: probability that a byte is lost.
        flips: probability that a bit is flipped.
        chatter: what the board says between its frames, and in the middle of them.
        stall: when nothing moves for a while.
        unplug: when the port goes away for a while.

    Raises:
        ConfigurationError: a value is out of range.
    """

    baud: int | None = None
    latency_s: float = 0.0
    loss: float = 0.0
    flips: float = 0.0
    chatter: Chatter | None = None
    stall: Interruption | None = None
    unplug: Interruption | None = None

    def __post_init__(self) -> None:
        for name, value, highest in (
            ("baud", self.baud if self.baud is not None else 50, 12_000_000),
            ("latency", self.latency_s, 10.0),
            ("loss", self.loss, 1.0),
            ("flips", self.flips, 1.0),
            ("stall", self.stall.lasts_s if self.stall else 0.0, 3600.0),
            ("unplug", self.unplug.lasts_s if self.unplug else 0.0, 3600.0),
        ):
            if not 0 <= value <= highest or (name == "baud" and value < 50):
                raise ConfigurationError(f"could not make a line with {name} {value}: it is out of range")

    @property
    def is_perfect(self) -> bool:
        """Whether it needs no machine: what is said arrives."""
        return self == LineFaults()


@dataclass(frozen=True, slots=True)
class Delivery:
    """What has arrived by now."""

    to_board: bytes = field(repr=False, default=b"")
    to_station: bytes = field(repr=False, default=b"")
    unplug_s: float | None = None
    """The port goes away now, for so many seconds; `Line.replug` brings it back."""


class _Errors:
    """Which positions of an endless row of bytes or bits are hit: the distances are geometric."""

    def __init__(self, probability: float, random: Random) -> None:
        self._probability = probability
        self._random = random
        self._next = self._distance()

    def in_next(self, count: int) -> Iterator[int]:
        """Yield the positions hit among the next `count`."""
        while self._next < count:
            yield self._next
            self._next += 1 + self._distance()
        self._next -= count

    def _distance(self) -> int:
        if self._probability <= 0:
            return 1 << 62
        if self._probability >= 1:
            return 0
        return int(math.log(1.0 - self._random.random()) / math.log1p(-self._probability))


class _Direction:
    """One direction of a line."""

    def __init__(self, faults: LineFaults, random: Random, *, to_station: bool) -> None:
        self._random = random
        self._byte_s = BITS_PER_BYTE / faults.baud if faults.baud else 0.0
        self._piece_bytes = max(1, int(_PIECE_S / self._byte_s)) if self._byte_s else 16
        self._lost = _Errors(faults.loss, random)
        self._flipped = _Errors(faults.flips, random)
        self._latency_s = faults.latency_s if to_station else 0.0
        self._chatter = faults.chatter if to_station else None
        self._chatter_s = math.inf
        self._under_way: deque[tuple[float, bytes]] = deque()
        self._queued = 0
        self._held = bytearray()
        self._flush_s = math.inf
        self.free_s = -math.inf
        """When everything said so far is on the line."""

    def start(self, now_s: float) -> None:
        """Begin to chatter."""
        if self._chatter is not None and self._chatter_s == math.inf:
            self._chatter_s = now_s + self._chatter.gap_s(self._random)

    def say(self, data: bytes, now_s: float) -> None:
        """Put what one end says on the line, less what gets lost."""
        data = self._damaged(data)
        for start in range(0, len(data), self._piece_bytes):
            self._chatter_until(max(self.free_s, now_s))
            self._put(data[start : start + self._piece_bytes], now_s)

    def take(self, now_s: float) -> bytes:
        """Return what has arrived."""
        if self.free_s <= now_s:
            self._chatter_until(now_s)
        out = bytearray()
        while self._under_way and self._under_way[0][0] <= now_s:
            at_s, piece = self._under_way.popleft()
            self._queued -= len(piece)
            if self._latency_s:
                self._hold(piece, at_s, out)
            else:
                out += piece
        if self._flush_s <= now_s:
            self._flush(out)
        return bytes(out)

    def next_s(self) -> float:
        """When there is something to take, at the soonest."""
        first_s = self._under_way[0][0] if self._under_way else math.inf
        return min(first_s, self._flush_s, max(self._chatter_s, self.free_s))

    def stall_until(self, at_s: float) -> None:
        """Let nothing that is said from now on arrive before then."""
        self.free_s = max(self.free_s, at_s)

    def clear(self) -> None:
        """Lose everything that is under way."""
        self._under_way.clear()
        self._held.clear()
        self._queued, self._flush_s = 0, math.inf

    def _put(self, piece: bytes, now_s: float) -> None:
        if self._queued + len(piece) > MAX_QUEUED_BYTES:
            return
        self.free_s = max(self.free_s, now_s) + len(piece) * self._byte_s
        self._under_way.append((self.free_s, piece))
        self._queued += len(piece)

    def _chatter_until(self, at_s: float) -> None:
        if self._chatter is None or self._chatter_s > at_s:
            return
        self._put(self._chatter.say(self._random), self._chatter_s)
        # Never more than one at a time: a board that is late says less, and nobody waits for it in a loop.
        self._chatter_s = max(self._chatter_s + self._chatter.gap_s(self._random), at_s)

    def _damaged(self, data: bytes) -> bytes:
        damaged = bytearray(data)
        for bit in self._flipped.in_next(8 * len(data)):
            damaged[bit // 8] ^= 1 << bit % 8
        for position in reversed(list(self._lost.in_next(len(data)))):
            del damaged[position]
        return bytes(damaged)

    def _hold(self, piece: bytes, at_s: float, out: bytearray) -> None:
        if self._flush_s <= at_s:
            self._flush(out)
        if not self._held:
            self._flush_s = at_s + self._latency_s
        self._held += piece
        full = len(self._held) - len(self._held) % PACKET_BYTES
        if full:
            out += self._held[:full]
            del self._held[:full]
            self._flush_s = at_s + self._latency_s if self._held else math.inf

    def _flush(self, out: bytearray) -> None:
        out += self._held
        self._held.clear()
        self._flush_s = math.inf


class Line:
    """Both directions of a line, and what interrupts them."""

    def __init__(self, faults: LineFaults, random: Random) -> None:
        self._to_board = _Direction(faults, random, to_station=False)
        self._to_station = _Direction(faults, random, to_station=True)
        self._stall = faults.stall
        self._unplug = faults.unplug
        self._unplug_at_s = math.inf
        self._is_away = False
        self.carried = 0
        """Bytes said so far by both ends."""

    def station_says(self, data: bytes, now_s: float) -> None:
        """Take what the station wrote."""
        self._says(self._to_board, data, now_s)

    def board_says(self, data: bytes, now_s: float) -> None:
        """Take what the board wrote."""
        self._says(self._to_station, data, now_s)

    def take(self, now_s: float) -> Delivery:
        """Return what has arrived at either end, and whether the port goes away now."""
        if self._is_away:
            return Delivery()
        self._to_station.start(now_s)
        to_board, to_station = self._to_board.take(now_s), self._to_station.take(now_s)
        if now_s < self._unplug_at_s or self._unplug is None:
            return Delivery(to_board, to_station)
        lasts_s, self._unplug = self._unplug.lasts_s, None
        self._unplug_at_s = math.inf
        self._is_away = True
        self._to_board.clear()
        self._to_station.clear()
        return Delivery(to_board, to_station, lasts_s)

    def replug(self) -> None:
        """Bring the port back."""
        self._is_away = False

    def next_s(self) -> float:
        """When to take again at the soonest; infinite if nothing is under way."""
        if self._is_away:
            return math.inf
        return min(self._to_board.next_s(), self._to_station.next_s(), self._unplug_at_s)

    def _says(self, direction: _Direction, data: bytes, now_s: float) -> None:
        if self._is_away or self._unplug_at_s < math.inf:
            return
        if self._stall is not None and self.carried + len(data) > self._stall.after_bytes:
            before = max(0, self._stall.after_bytes - self.carried)
            direction.say(data[:before], now_s)
            for either in (self._to_board, self._to_station):
                either.stall_until(now_s + self._stall.lasts_s)
            self._stall = None
            direction.say(data[before:], now_s)
        elif self._unplug is not None and self.carried + len(data) > self._unplug.after_bytes:
            direction.say(data[: max(0, self._unplug.after_bytes - self.carried)], now_s)
            self._unplug_at_s = max(now_s, direction.free_s)
        else:
            direction.say(data, now_s)
        self.carried += len(data)
