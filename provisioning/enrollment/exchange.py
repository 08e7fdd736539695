"""One request and its answer over a line that loses, damages and invents bytes (docs/serial-protocol.md §9).

Sans-I/O: the generators here yield `Send` and `Read` and are given what arrived; the clock and the randomness
are arguments, so hours of a bad line pass in milliseconds of a test.

Rules:

- A repeated request keeps its sequence number and its bytes; the device answers it from its cache.
- The first wait is the shortest that does not double a request on a sound line; unanswered waits grow by BACKOFF.
  BUSY moves the wait, NAK and a damaged run repeat at once, none of them past the cap: whatever arrives, a
  request ends.
- An answer counts if type, sequence number and session are those of the request. Sound frames that are something
  else are evidence for the verdict and nothing more.
- A payload that breaks its schema refuses the unit at once: the CRC was right, so the device meant it.
- One read takes at most MAX_READ_BYTES, and its frames are consumed before the next read, so nothing queues up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypeVar

from birthmark.device.errors import EnrollmentRefusedError, LinkError
from birthmark.device.escape import escaped
from birthmark.device.link import timers
from birthmark.device.link.frame import FROM_DEVICE, LINK_VERSION, Deframer, Frame
from birthmark.device.link.messages import (
    ErrAnswer,
    ErrorCode,
    MessageError,
    MessageType,
    UnlockProofRequest,
    decode_answer,
)
from birthmark.provisioning.enrollment.verdict import Evidence, judge

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from birthmark.device.link.messages import Answer, Request

AnswerT = TypeVar("AnswerT", bound="Answer")

MAX_READ_BYTES: Final = 4096
_MAX_SEQ: Final = 0xFFFF


@dataclass(frozen=True, slots=True)
class Send:
    """Put these bytes on the line."""

    data: bytes = field(repr=False)  # a KEYGEN frame may hold a private scalar


@dataclass(frozen=True, slots=True)
class Read:
    """Wait for bytes until then; the reply is what arrived (at most MAX_READ_BYTES), empty when time is up."""

    until_s: float


class DeviceRefusalError(EnrollmentRefusedError):
    """The device answered a request with an error code."""

    def __init__(self, request: MessageType, code: int) -> None:
        self.request = request
        self.code = code
        super().__init__(
            f"could not enrol the device: it answered {request.name} with {_code_name(code)}",
            hint=_HINTS.get(code, "the device says no; its own log may say why"),
        )


class MalformedAnswerError(EnrollmentRefusedError):
    """The device broke the link's rules; the row stays where it is."""

    def __init__(self, request: MessageType, cause: str) -> None:
        self.request = request
        super().__init__(
            f"could not enrol the device: its answer to {request.name} breaks the protocol: {cause}",
            hint="the firmware does not speak the enrollment link, or the device is not what it claims to be",
        )


class NoAnswerError(LinkError):
    """A request got no answer within its cap."""

    def __init__(self, request: MessageType, evidence: Evidence) -> None:
        self.request = request
        self.evidence = evidence
        self.verdict = judge(evidence)
        message = f"could not get an answer to {request.name}: {self.verdict}, {self.verdict.meaning}"
        if evidence.noise:
            message += f' (seen: "{evidence.shown_noise}")'
        super().__init__(message, hint=self.verdict.hint)


_HINTS: Final[dict[int, str]] = {
    ErrorCode.LOCKED: "the device carries an identity that this transaction may not replace",
    ErrorCode.STORE: "free space on the device, then run the same command again",
    ErrorCode.MODE: "choose the other key mode with --keys",
    ErrorCode.VERSION: "device and station have no link version in common: update one of them",
    ErrorCode.KEY: "the device holds another key than the one that was certified: run the same command again",
    ErrorCode.BUNDLE: "the device does not accept the bundle: check the station's broker settings and chain",
    ErrorCode.TXN: "another enrollment is open on the device: run the same command again",
    ErrorCode.STATE: "the device lost a step, as after a reboot: run the same command again",
}


def _code_name(code: int) -> str:
    try:
        return ErrorCode(code).name
    except ValueError:
        return f"the unknown error {code}"


class Line:
    """The station's end of one opened port: its session, its sequence numbers, and what was seen on it.

    Args:
        clock: seconds, monotonic.
        sid: random per opened port, 32 bits.
        baud: the line's speed, for the time that bytes take.
    """

    def __init__(self, *, clock: Callable[[], float], sid: int, baud: int) -> None:
        self.clock = clock
        self.baud = baud
        self.evidence = Evidence()
        self._sid = sid
        self._seq = 0
        self._deframer = Deframer()
        self.damaged = 0
        """Bad runs seen in the last `feed`."""

    def frame(self, kind: MessageType, payload: bytes) -> tuple[int, bytes]:
        """Return a new request's sequence number and its frame."""
        self._seq = self._seq % _MAX_SEQ + 1
        return self._seq, Frame(kind, self._seq, self._sid, payload).to_bytes()

    def start_evidence(self) -> None:
        """Forget what was seen so far: a verdict is about the request that was not answered."""
        self.evidence = Evidence()
        self._deframer.forget_noise()

    def feed(self, data: bytes) -> list[Frame]:
        """Take bytes from the line and return the frames that a device of this session sent, NAKs included."""
        bad_before = self._deframer.bad
        frames = self._deframer.feed(data)
        self.damaged = self._deframer.bad - bad_before
        self.evidence.byte_count += len(data)
        self.evidence.noise = self._deframer.noise
        return [frame for frame in frames if self._is_ours(frame)]

    def _is_ours(self, frame: Frame) -> bool:
        if frame.version != LINK_VERSION:
            self.evidence.other_version = frame.version
        elif not frame.type & FROM_DEVICE:
            self.evidence.echoes += frame.sid == self._sid
        else:
            self.evidence.sound_frames += 1
            return frame.sid == self._sid or frame.type == MessageType.NAK
        return False

    def ask(self, request: Request, expected: type[AnswerT]) -> Generator[Send | Read, bytes, AnswerT]:
        """Send a request until it is answered, by an answer of the expected kind.

        Raises:
            DeviceRefusalError: the device answered with an error code.
            MalformedAnswerError: the answer breaks its schema.
            NoAnswerError: tries or time ran out.
        """
        answer = yield from _Exchange(self, request).run()
        if not isinstance(answer, expected):
            raise MalformedAnswerError(request.TYPE, f"an answer of the kind {type(answer).__name__}")
        return answer


class _Exchange:
    """One request's repetition: waits, grace and caps."""

    def __init__(self, line: Line, request: Request) -> None:
        self._line = line
        self._kind = request.TYPE
        self._phase: Literal[1, 2] = 2 if isinstance(request, UnlockProofRequest) else 1
        self._seq, self._frame = line.frame(request.TYPE, request.to_payload())
        self._turn_wire_s = timers.wire_time_s(len(self._frame), line.baud)
        self._naks = 0
        is_hello = self._kind is MessageType.HELLO
        self._tries = timers.HELLO_TRIES if is_hello else timers.TRIES
        self._cap_s = timers.HELLO_CAP_S if is_hello else timers.STEP_CAP_S
        self._sent_s = 0.0
        self._until_s = 0.0

    def run(self) -> Generator[Send | Read, bytes, Answer]:
        line = self._line
        line.start_evidence()
        end_s = line.clock() + self._cap_s
        wait_s = timers.first_wait_s(len(self._frame), line.baud)
        for _ in range(self._tries):
            yield from self._send(wait_s)
            while (now_s := line.clock()) < min(self._until_s, end_s):
                frames = line.feed((yield Read(min(self._until_s, end_s))))
                answer = self._sort(frames)
                if answer is not None:
                    return answer
                if self._repeats_at_once(frames):
                    yield from self._send(wait_s)
            if now_s >= end_s:
                break
            wait_s = min(wait_s * timers.BACKOFF, timers.WAIT_MAX_S)
        raise NoAnswerError(self._kind, line.evidence)

    def _send(self, wait_s: float) -> Generator[Send | Read, bytes, None]:
        yield Send(self._frame)
        self._sent_s = self._line.clock()
        self._until_s = self._sent_s + wait_s

    def _repeats_at_once(self, frames: list[Frame]) -> bool:
        damaged = self._line.damaged or any(frame.type == MessageType.NAK for frame in frames)
        # A NAK that comes sooner is about bytes that were on the line before this request.
        if not damaged or self._line.clock() - self._sent_s <= self._turn_wire_s / 2:
            return False
        self._naks += 1
        return self._naks <= timers.NAKS

    def _sort(self, frames: list[Frame]) -> Answer | None:
        for frame in frames:
            if frame.seq != self._seq:
                continue
            if frame.type == MessageType.BUSY:
                self._until_s = self._line.clock() + timers.BUSY_GRACE_S.get(self._kind, timers.BUSY_GRACE_OTHER_S)
                continue
            answer = read_answer(self._kind, frame, self._phase)
            if answer is not None:
                return answer
        return None


def read_answer(kind: MessageType, frame: Frame, phase: Literal[1, 2] = 1) -> Answer | None:
    """Return the answer that a frame with the request's `seq` and `sid` carries, or None if it is no answer to it.

    Raises:
        DeviceRefusalError: it is an error code.
        MalformedAnswerError: it breaks its schema.
    """
    if frame.type not in (kind | FROM_DEVICE, MessageType.ERR):
        return None
    try:
        answer = decode_answer(frame.type, frame.payload, phase=phase)
    except MessageError as error:
        raise MalformedAnswerError(kind, escaped(error.message)) from error
    if isinstance(answer, ErrAnswer):
        if answer.request_type != kind:
            raise MalformedAnswerError(kind, f"an error about request type {answer.request_type}")
        raise DeviceRefusalError(kind, answer.code)
    return answer
