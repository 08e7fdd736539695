"""One request over a bad line, in virtual time: waits, repeats, caps, and hostile answers."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agent_vectors import section, vectors
from support.board import Board
from support.board_line import VirtualLine

from birthmark.device.errors import BirthmarkError
from birthmark.device.link import messages as m
from birthmark.device.link import timers
from birthmark.device.link.frame import FROM_DEVICE, Deframer, Frame
from birthmark.device.link.messages import MessageType
from birthmark.provisioning.enrollment.exchange import Line, NoAnswerError, Send
from birthmark.provisioning.enrollment.verdict import Evidence, Verdict, judge

if TYPE_CHECKING:
    from collections.abc import Callable

SID = 439041101
NONCE = bytes(range(16))


class Scripted:
    """Answers each station frame with whatever a function makes of it."""

    def __init__(self, answer: Callable[[Frame], bytes]) -> None:
        self._answer = answer
        self._deframer = Deframer()
        self.requests: list[Frame] = []

    def receive(self, data: bytes) -> bytes:
        out = b""
        for frame in self._deframer.feed(data):
            self.requests.append(frame)
            out += self._answer(frame)
        return out


class Raw:
    """Answers every write with the same bytes, or with the write itself."""

    def __init__(self, answer: bytes | None) -> None:
        self._answer = answer

    def receive(self, data: bytes) -> bytes:
        return data if self._answer is None else self._answer


ANY: Any = object
"""Whatever answers."""


def ask(line: VirtualLine, request: Any = None) -> Any:
    session = Line(clock=line.clock, sid=SID, baud=line.baud)
    return line.run(session.ask(request or m.HelloRequest(NONCE), ANY))


def times_of(line: VirtualLine, request: Any) -> list[float]:
    """When each copy of the request was sent, in seconds after the first."""
    sent: list[float] = []
    session = Line(clock=line.clock, sid=SID, baud=line.baud)

    def noting() -> Any:
        machine = session.ask(request, ANY)
        reply = None
        try:
            while True:
                effect = next(machine) if reply is None else machine.send(reply)
                if isinstance(effect, Send):
                    sent.append(line.clock())
                reply = yield effect
        except StopIteration as end:
            return end.value

    with pytest.raises(NoAnswerError):
        line.run(noting())
    return [at - sent[0] for at in sent]


class TestWaits:
    def test_the_waits_of_a_silent_line(self) -> None:
        line = VirtualLine()
        begun = line.now_s
        copies = times_of(line, m.HelloRequest(NONCE))
        frame_bytes = len(line.sent[0])
        first_s = (frame_bytes + 300) * 10 / 115_200 + 0.120
        gaps = [later - sooner for sooner, later in pairwise(copies)]
        assert gaps == pytest.approx([first_s * 1.5**n for n in range(6)])
        assert len(set(line.sent)) == 1, "a repeated request keeps its bytes"
        assert line.now_s - begun <= timers.HELLO_CAP_S

    def test_a_step_has_eight_tries_and_no_wait_over_two_seconds(self) -> None:
        line = VirtualLine(baud=9600)
        begun = line.now_s
        copies = times_of(line, m.AttestRequest(NONCE))
        gaps = [later - sooner for sooner, later in pairwise(copies)]
        assert len(copies) <= 8
        assert max(gaps) == pytest.approx(2.0)
        assert line.now_s - begun == pytest.approx(timers.STEP_CAP_S)

    def test_a_sound_line_sees_each_request_once(self) -> None:
        board = Board()
        ask(VirtualLine(board, turnaround_s=0.110))
        assert len(board.requests) == 1

    @pytest.mark.parametrize(
        ("kind", "grace_s"), [(m.KeygenRequest(bytes(16)), 2.0), (m.BeginRequest(bytes(16), 1, bytes(32)), 0.5)]
    )
    def test_busy_moves_the_wait(self, kind: Any, grace_s: float) -> None:
        busy_once = [True]

        def answer(frame: Frame) -> bytes:
            return (
                Frame(MessageType.BUSY, frame.seq, frame.sid, b"").to_bytes()
                if busy_once and busy_once.pop()
                else b""
            )

        line = VirtualLine(Scripted(answer))
        gap = times_of(line, kind)[1]
        assert gap == pytest.approx(grace_s, abs=0.05)

    def test_a_nak_repeats_at_once_if_it_can_be_about_this_request(self) -> None:
        nak = Frame(MessageType.NAK, 0, 0, b"").to_bytes()
        naks = [nak]
        line = VirtualLine(Scripted(lambda _: naks.pop() if naks else b""), turnaround_s=0.040)
        assert times_of(line, m.HelloRequest(NONCE))[1] < 0.06
        naks = [nak]
        line = VirtualLine(Scripted(lambda _: naks.pop() if naks else b""), turnaround_s=0.001)
        assert times_of(line, m.HelloRequest(NONCE))[1] > 0.1, "it came too soon to be about this request"

    def test_a_damaged_answer_is_asked_for_again_at_once(self) -> None:
        board = Board()
        damage = [True]

        def hurt(data: bytes) -> bytes:
            return data[:9] + b"\x55" + data[10:] if damage and damage.pop() else data

        line = VirtualLine(board, to_station=hurt, turnaround_s=0.02)
        begun = line.now_s
        assert isinstance(ask(line), m.HelloAnswer)
        assert line.now_s - begun < 0.1

    def test_the_sequence_number_wraps_past_zero(self) -> None:
        line = Line(clock=lambda: 0.0, sid=SID, baud=115_200)
        numbers = [line.frame(MessageType.HELLO, b"")[0] for _ in range(0x1_0001)]
        assert numbers[:2] == [1, 2]
        assert numbers[0xFFFE:] == [0xFFFF, 1, 2]


def framed(**changes: Any) -> Callable[[Frame], bytes]:
    """A sound answer to HELLO, but for `changes` in its frame."""

    def answer(frame: Frame) -> bytes:
        fields: dict[str, Any] = {"type": frame.type | FROM_DEVICE, "seq": frame.seq, "sid": frame.sid}
        board = Board()
        hello = board._hello(m.HelloRequest(NONCE))
        return Frame(
            **fields | {"payload": hello.to_payload()} | {k: v(frame) for k, v in changes.items()}
        ).to_bytes()

    return answer


BUSY = Scripted(lambda f: Frame(MessageType.BUSY, f.seq, f.sid, b"").to_bytes())
FLOOD = b"the quick brown fox jumps over the lazy dog\r\n" * 2000
ENDINGS: dict[str, tuple[Any, Verdict]] = {
    "silence": (None, Verdict.SILENT),
    "echo": (Raw(None), Verdict.ECHO),
    "getty": (Raw(b"\r\nDebian GNU/Linux 12 gateway ttyS0\r\n\r\ngateway login: "), Verdict.CONSOLE),
    "password": (Raw(b"Password:"), Verdict.CONSOLE),
    "shell": (Raw(b"sh: not found\r\nroot@gw:~# "), Verdict.CONSOLE),
    "esp boot loader": (Raw(b"rst:0x1,boot:0x3\r\nwaiting for download\r\n"), Verdict.BOOTLOADER),
    "u-boot": (Raw(b"Hit any key to stop autoboot:  3 "), Verdict.BOOTLOADER),
    "wrong speed": (Raw(bytes(range(0x80, 0xFF))), Verdict.BAUD),
    "text": (Raw(b"temperature 21.5\r\n"), Verdict.NOISE),
    "flood of text": (Raw(FLOOD), Verdict.NOISE),
    "flood of zeros": (Raw(bytes(100_000)), Verdict.NOISE),
    "random bytes": (Raw(random.Random(1).randbytes(8000)), Verdict.BAUD),
    "busy for ever": (BUSY, Verdict.STUCK),
    "nak for ever": (Raw(Frame(MessageType.NAK, 0, 0, b"").to_bytes()), Verdict.STUCK),
    "wrong sid": (Scripted(framed(sid=lambda f: f.sid ^ 1)), Verdict.STUCK),
    "wrong seq": (Scripted(framed(seq=lambda f: f.seq + 1)), Verdict.STUCK),
    "wrong type": (Scripted(framed(type=lambda _: 0x82)), Verdict.STUCK),
    "other version": (Scripted(framed(version=lambda _: 2)), Verdict.VERSION),
    "wrong crc": (Scripted(lambda f: framed()(f)[:-3] + b"\x01\x01\0"), Verdict.BAUD),
    "oversize": (Raw(b"A" * 5000 + b"\0"), Verdict.NOISE),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_not_a_device_gets_its_verdict_in_time(ending: str) -> None:
    listener, verdict = ENDINGS[ending]
    line = VirtualLine(listener)
    begun = line.now_s
    with pytest.raises(NoAnswerError) as caught:
        ask(line)
    assert caught.value.verdict is verdict
    assert line.now_s - begun <= 6
    assert caught.value.exit_code == 4
    assert caught.value.message.isascii()
    assert caught.value.message.isprintable()
    assert caught.value.hint


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_later_step_ends_by_its_cap_too(ending: str) -> None:
    line = VirtualLine(ENDINGS[ending][0])
    begun = line.now_s
    with pytest.raises(NoAnswerError):
        ask(line, m.AttestRequest(NONCE))
    assert line.now_s - begun <= timers.STEP_CAP_S + 0.001


def test_a_dribbling_device_ends_by_the_cap() -> None:
    line = VirtualLine()
    answer = framed()(Frame(MessageType.HELLO, 1, SID, b""))
    for number, byte in enumerate(answer):
        line.say(bytes([byte]), after_s=0.2 * (number + 1))
    begun = line.now_s
    with pytest.raises(NoAnswerError):
        ask(line)
    assert line.now_s - begun <= timers.HELLO_CAP_S + 0.001


def test_naks_cannot_multiply_a_request() -> None:
    nak = Frame(MessageType.NAK, 0, 0, b"").to_bytes()
    line = VirtualLine(Raw(nak * 50), turnaround_s=0.05)
    with pytest.raises(NoAnswerError):
        ask(line, m.AttestRequest(NONCE))
    assert len(line.sent) <= timers.NAKS + timers.TRIES


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=20))
def test_any_bytes_in_only_our_own_errors_out(pieces: list[bytes]) -> None:
    line = VirtualLine()
    for number, piece in enumerate(pieces):
        line.say(piece, after_s=0.1 * number)
    with pytest.raises(BirthmarkError):
        ask(line)


@settings(deadline=None)
@given(st.binary(max_size=400), st.sampled_from([0x81, 0xFF, 0xFD, 0xFE]))
def test_any_payload_in_only_our_own_errors_out(payload: bytes, kind: int) -> None:
    line = VirtualLine()
    line.say(Frame(kind, 1, SID, payload).to_bytes(), after_s=0.05)
    with pytest.raises(BirthmarkError):
        ask(line)


@pytest.mark.parametrize(
    "vector",
    [p for p in section("frames") if p.values[0]["from"] == "station"],
)
def test_golden_frames_of_the_station(vector: dict[str, Any]) -> None:
    request = m.decode_request(vector["type"], bytes.fromhex(vector["payload"]))
    line = Line(clock=lambda: 0.0, sid=vector["sid"], baud=115_200)
    line._seq = vector["seq"] - 1
    assert line.frame(request.TYPE, request.to_payload()) == (vector["seq"], bytes.fromhex(vector["encoded"]))


def test_the_first_frame_of_a_session_is_the_golden_one() -> None:
    golden = vectors()["frames"][0]
    nonce = bytes.fromhex(golden["fields"]["1"]["hex"])
    line = VirtualLine(Board())
    ask(line, m.HelloRequest(nonce))
    assert line.sent == [bytes.fromhex(golden["encoded"])]


class TestVerdicts:
    """The order of section 10: the first rule that holds."""

    def test_the_order(self) -> None:
        everything = Evidence(
            byte_count=5000,
            noise=b"login: boot:0x1" + bytes(range(0x80, 0xFF)),
            echoes=1,
            other_version=2,
            sound_frames=1,
        )
        expected = list(Verdict)
        seen = [judge(everything)]
        everything.noise = everything.noise.replace(b"login:", b"")
        seen.append(judge(everything))
        everything.noise = bytes(range(0x80, 0xFF))
        seen.append(judge(everything))
        everything.echoes = 0
        seen.append(judge(everything))
        everything.other_version = None
        seen.append(judge(everything))
        everything.sound_frames = 0
        seen.append(judge(everything))
        everything.noise = b"hello, world"
        seen.append(judge(everything))
        everything.byte_count = 0
        seen.append(judge(everything))
        assert seen == expected

    def test_a_third_of_sixteen(self) -> None:
        assert judge(Evidence(16, b"\x80" * 6 + b"a" * 10)) is Verdict.BAUD
        assert judge(Evidence(16, b"\x80" * 5 + b"a" * 11)) is Verdict.NOISE
        assert judge(Evidence(15, b"\x80" * 15)) is Verdict.NOISE
        assert judge(Evidence(64, b"\x1b[0m\t\r\n" * 8)) is Verdict.NOISE

    @pytest.mark.parametrize("prompt", [b"$ ", b"# ", b"> "])
    def test_a_prompt_counts_at_the_end_only(self, prompt: bytes) -> None:
        assert judge(Evidence(9, b"\r\nuser" + prompt)) is Verdict.CONSOLE
        assert judge(Evidence(9, prompt + b"and more")) is Verdict.NOISE

    def test_noise_is_shown_escaped(self) -> None:
        assert Evidence(9, b"\x1b[2J\xff\n").shown_noise == "\\x1b[2J\\xff\\x0a"

    def test_every_verdict_says_what_to_do(self) -> None:
        for verdict in Verdict:
            assert verdict.meaning
            assert verdict.hint
