"""The device's end of the link, sans I/O: bytes in, bytes out (docs/serial-protocol.md sections 1, 3 and 9).

Rules:

- A frame with bit 7 is an echo and ignored; one of another link version is answered with ERR VERSION.
- The last 8 answers to requests other than DATA are kept by (sid, seq). The same request gets the same answer
  again, another one under a kept number gets ERR PROTO. A request is remembered by its hash: a KEYGEN may hold a
  private key.
- BUSY goes before a KEYGEN, PREPARE or COMMIT; the driver repeats it every second that the work takes.
- A bad run is answered with a NAK, at most one in 30 ms; an oversize run is not.
- Staging is dropped after 30 s without a sound frame.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import time
from typing import TYPE_CHECKING, Final

from birthmark.device.agent.enrollment import Board, Enrollment, Refusal, Step, Surroundings
from birthmark.device.agent.slots import StoreError
from birthmark.device.errors import CredentialError
from birthmark.device.link.frame import FROM_DEVICE, LINK_VERSION, Deframer, Frame
from birthmark.device.link.messages import (
    BusyAnswer,
    ErrAnswer,
    ErrorCode,
    MessageError,
    MessageType,
    NakAnswer,
    decode_request,
)
from birthmark.device.link.timers import IDLE_S, NAK_GAP_S

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from birthmark.device.agent.slots import Slots
    from birthmark.device.link.messages import Answer, DeviceState, Request

KEPT_ANSWERS: Final = 8
_SLOW = frozenset({MessageType.KEYGEN, MessageType.PREPARE, MessageType.COMMIT})
_RUNS = re.compile(rb"[^\0]*\0|[^\0]+")


class Agent:
    """One boot of a device. Making one does what a boot does: it recovers the records.

    Args:
        slots: the device's records; the caller holds them exclusively.
        board: who the device is.
        surroundings: clock, randomness, key generator and who watches; the real ones by default.

    Raises:
        CredentialError: the active slot is damaged.
        StoreError: a crash's leftovers could not be removed.
    """

    def __init__(self, slots: Slots, board: Board, surroundings: Surroundings | None = None) -> None:
        self._outside = surroundings or Surroundings(clock=time.monotonic, random_bytes=secrets.token_bytes)
        self.board = board
        slots.recover()
        self._enrollment = Enrollment(slots, board, self._outside)
        self._deframer = Deframer()
        self._kept: dict[tuple[int, int], tuple[bytes, bytes]] = {}
        self._working: Frame | None = None
        self._no_nak_before = -math.inf
        self._last_sound = self._outside.clock()

    @property
    def state(self) -> DeviceState:
        """What HELLO would report now."""
        return self._enrollment.state

    def receive(self, data: bytes) -> Generator[bytes, None, None]:
        """Take bytes from the line and yield what to send, in order, each as the bytes of one frame.

        The generator has to be run to its end, or closed, before the next call. What it yields should be sent
        before it is asked for more: the work that a BUSY announces happens when the next bytes are asked for.
        """
        for run in _RUNS.findall(data):
            bad_before = self._deframer.bad
            for frame in self._deframer.feed(run):
                yield from self._take(frame)
            if self._deframer.bad > bad_before:
                yield from self._nak()

    def busy(self) -> bytes:
        """The BUSY to send every second while the work for a request goes on; empty where there is none."""
        frame = self._working
        return b"" if frame is None else _answer_frame(frame, MessageType.BUSY, BusyAnswer())

    def _nak(self) -> Iterator[bytes]:
        now = self._outside.clock()
        if now >= self._no_nak_before:
            self._no_nak_before = now + NAK_GAP_S
            yield Frame(type=MessageType.NAK, seq=0, sid=0, payload=NakAnswer().to_payload()).to_bytes()

    def _take(self, frame: Frame) -> Iterator[bytes]:
        now = self._outside.clock()
        if now - self._last_sound >= IDLE_S:
            self._enrollment.drop_staging()
        self._last_sound = now
        if frame.type & FROM_DEVICE:
            return
        if frame.version != LINK_VERSION:
            yield _error(frame, ErrorCode.VERSION)
            return
        number = (frame.sid, frame.seq)
        digest = hashlib.sha256(bytes([frame.type]) + frame.payload).digest()
        if number in self._kept:
            kept_digest, kept_answer = self._kept[number]
            yield kept_answer if digest == kept_digest else _error(frame, ErrorCode.PROTO)
            return
        try:
            request = decode_request(frame.type, frame.payload)
        except MessageError:
            answer = _error(frame, ErrorCode.PROTO)
        else:
            try:
                if request.TYPE in _SLOW:
                    self._working = frame
                    yield self.busy()
                answer = self._work(frame, request)
            finally:  # also if the driver gives up here, because the port is gone
                self._working = None
        if frame.type != MessageType.DATA:
            self._keep(number, digest, answer)
        yield answer

    def _work(self, frame: Frame, request: Request) -> bytes:
        try:
            answer = self._enrollment.answer(request, frame.sid)
        except Refusal as refusal:
            return self._refused(frame, request, refusal.code, str(refusal.__cause__ or ""))
        except (StoreError, CredentialError) as error:
            # An unreadable record is a storage failure like an unwritable one, and never a missing record.
            return self._refused(frame, request, ErrorCode.STORE, error.message)
        return _answer_frame(frame, frame.type | FROM_DEVICE, answer)

    def _refused(self, frame: Frame, request: Request, code: ErrorCode, cause: str) -> bytes:
        detail = f"{request.TYPE.name}: {code.name}" + (f" ({cause})" if cause else "")
        self._outside.watch(Step("refused", getattr(request, "txn", None), detail=detail))
        return _error(frame, code)

    def _keep(self, number: tuple[int, int], digest: bytes, answer: bytes) -> None:
        while len(self._kept) >= KEPT_ANSWERS:
            del self._kept[next(iter(self._kept))]
        self._kept[number] = (digest, answer)


def _error(frame: Frame, code: ErrorCode) -> bytes:
    return _answer_frame(frame, MessageType.ERR, ErrAnswer(code, frame.type))


def _answer_frame(request: Frame, type_: int, answer: Answer) -> bytes:
    return Frame(type=type_, seq=request.seq, sid=request.sid, payload=answer.to_payload()).to_bytes()
