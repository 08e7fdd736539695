"""The bundle's way to the device: DATA in a window, repeated one by one (docs/serial-protocol.md sections 3, 9).

Rules:

- Up to WINDOW chunks are in flight. A chunk that was passed by the acknowledgement of a later one is repeated
  at once; after an idle wait all in flight are. Every repetition takes a new sequence number, so that it is
  known which one was acknowledged.
- The device's next wanted offset decides; acknowledgements of single chunks only save repetitions.
- An offset past the end, or an acknowledgement of another chunk than the one sent, breaks the protocol. An offset
  that runs backwards is no progress.
- It ends: without a growing offset, and by a cap over the whole, however busily the device acknowledges.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from birthmark.device.link import timers
from birthmark.device.link.messages import Data, DataAnswer, MessageType
from birthmark.provisioning.enrollment.exchange import MalformedAnswerError, NoAnswerError, Read, Send, read_answer

if TYPE_CHECKING:
    from collections.abc import Generator

    from birthmark.device.link.frame import Frame
    from birthmark.provisioning.enrollment.exchange import Line

_REMEMBERED_SENDS: Final = 64
"""How many of the last chunks sent an acknowledgement may still be about."""
_FRAME_OVERHEAD_BYTES: Final = 12 + 4 + 2
"""Head and CRC, the chunk's offset, and COBS with its codes for up to 500 bytes."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A chunk on its way, as sent last."""

    seq: int
    order: int
    sent_s: float


class Transfer:
    """One run of DATA requests, from the offset that BEGIN was answered with to the end of the bundle.

    Args:
        line: the port's session.
        bundle: all of it.
        start: the offset that the device wants first, 0..length.
        max_frame_bytes: the longest encoded frame the device takes (HELLO key 7).
    """

    def __init__(self, line: Line, bundle: bytes, start: int, max_frame_bytes: int) -> None:
        self._line = line
        self._bundle = bundle
        self._next = start
        self._chunk_bytes = min(timers.CHUNK_BYTES, max_frame_bytes - _FRAME_OVERHEAD_BYTES)
        self._wait_s = timers.transfer_wait_s(self._chunk_bytes + _FRAME_OVERHEAD_BYTES, line.baud)
        self._first_wait_s = self._wait_s
        self._todo: deque[int] = deque()
        self._flight: dict[int, _Flight] = {}
        self._sends: dict[int, tuple[int, int]] = {}
        """Sequence number to (offset, order) of the chunks sent last, oldest first."""
        self._order = 0
        self._naks = 0
        self._idle_s = 0.0
        self._growth_end_s = 0.0
        self._queue_from(start)

    def run(self) -> Generator[Send | Read, bytes, None]:
        """Send until the device has everything.

        Raises:
            DeviceRefusalError: the device answered with an error code (STATE: it lost the transfer).
            MalformedAnswerError: an acknowledgement that cannot be.
            NoAnswerError: it did not get on.
        """
        line = self._line
        line.start_evidence()
        now_s = line.clock()
        end_s = now_s + timers.transfer_cap_s(len(self._bundle), line.baud)
        self._growth_end_s = now_s + timers.TRANSFER_STALL_S
        self._idle_s = now_s + self._wait_s
        while self._next < len(self._bundle):
            now_s = line.clock()
            if now_s >= min(end_s, self._growth_end_s):
                raise NoAnswerError(MessageType.DATA, line.evidence)
            if now_s >= self._idle_s:
                self._wait_s = min(self._wait_s * timers.BACKOFF, timers.WAIT_MAX_S)
                yield from self._repeat_all()
            while self._todo and len(self._flight) < timers.WINDOW:
                yield from self._send(self._todo.popleft())
            until_s = min(end_s, self._growth_end_s, self._idle_s)
            frames = line.feed((yield Read(until_s)))
            repeats = self._take(frames)
            for offset in repeats:
                yield from self._send(offset)

    def _queue_from(self, start: int) -> None:
        self._todo = deque(range(start, len(self._bundle), self._chunk_bytes))

    def _repeat_all(self) -> Generator[Send | Read, bytes, None]:
        if not self._flight and not self._todo:
            # Every chunk was acknowledged, and yet the device wants one: it lost some of them.
            self._queue_from(self._next)
        self._idle_s = self._line.clock() + self._wait_s
        for offset in sorted(self._flight):
            yield from self._send(offset)

    def _send(self, offset: int) -> Generator[Send | Read, bytes, None]:
        chunk = self._bundle[offset : offset + self._chunk_bytes]
        seq, frame = self._line.frame(MessageType.DATA, Data(offset, chunk).to_payload())
        self._order += 1
        self._sends[seq] = (offset, self._order)
        while len(self._sends) > _REMEMBERED_SENDS:
            del self._sends[next(iter(self._sends))]
        yield Send(frame)
        now_s = self._line.clock()
        self._flight[offset] = _Flight(seq, self._order, now_s)
        self._idle_s = max(self._idle_s, now_s + self._wait_s)

    def _take(self, frames: list[Frame]) -> list[int]:
        """Take what arrived and return the offsets of the chunks to repeat at once."""
        now_s = self._line.clock()
        passed_order = 0
        damaged = bool(self._line.damaged)
        for frame in frames:
            damaged |= frame.type == MessageType.NAK
            sent = self._sends.get(frame.seq)
            if sent is None:
                continue
            if frame.type == MessageType.BUSY:
                self._idle_s = now_s + timers.BUSY_GRACE_OTHER_S
                continue
            answer = read_answer(MessageType.DATA, frame)
            if isinstance(answer, DataAnswer):
                self._acknowledge(answer, sent[0])
                passed_order = max(passed_order, sent[1])
        repeats = [offset for offset, flight in self._flight.items() if flight.order < passed_order]
        if damaged and not repeats:
            repeats = self._damaged_repeats(now_s)
        return sorted(repeats)

    def _acknowledge(self, answer: DataAnswer, offset: int) -> None:
        if answer.chunk_offset != offset:
            raise MalformedAnswerError(MessageType.DATA, "it acknowledges another chunk than the one sent")
        if answer.next_offset > len(self._bundle):
            raise MalformedAnswerError(MessageType.DATA, "it wants an offset past the end of the bundle")
        progress = self._flight.pop(offset, None) is not None
        now_s = self._line.clock()
        if answer.next_offset > self._next:
            self._next = answer.next_offset
            self._growth_end_s = now_s + timers.TRANSFER_STALL_S
            self._wait_s = self._first_wait_s
            progress = True
            for done in [at for at in self._flight if at + self._chunk_bytes <= self._next]:
                del self._flight[done]
            while self._todo and self._todo[0] + self._chunk_bytes <= self._next:
                self._todo.popleft()
        if progress:
            self._idle_s = now_s + self._wait_s

    def _damaged_repeats(self, now_s: float) -> list[int]:
        if not self._flight or self._naks >= timers.NAKS:
            return []
        offset, oldest = min(self._flight.items(), key=lambda item: item[1].order)
        if (
            now_s - oldest.sent_s
            <= timers.wire_time_s(self._chunk_bytes + _FRAME_OVERHEAD_BYTES, self._line.baud) / 2
        ):
            return []
        self._naks += 1
        return [offset]
