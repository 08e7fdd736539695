"""The windowed transfer in virtual time: losses, liars and stalls."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
from support.board import Board, Noise
from support.board_line import VirtualLine

from birthmark.device.link import messages as m
from birthmark.device.link import timers
from birthmark.device.link.frame import FROM_DEVICE, Deframer, Frame
from birthmark.device.link.messages import ErrorCode, MessageType
from birthmark.provisioning.enrollment.exchange import (
    DeviceRefusalError,
    Line,
    MalformedAnswerError,
    NoAnswerError,
)
from birthmark.provisioning.enrollment.transfer import Transfer
from birthmark.provisioning.registry.model import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.board_station import Desk


class Receiver:
    """Takes DATA as a device does, or as `answer` says."""

    def __init__(self, length: int, answer: Callable[[Receiver, m.Data], Any] | None = None) -> None:
        self.content = bytearray(length)
        self.have: set[int] = set()
        self.chunks: list[m.Data] = []
        self.frames: list[Frame] = []
        self._answer = answer
        self._deframer = Deframer()

    @property
    def prefix(self) -> int:
        missing = set(range(len(self.content))) - self.have
        return min(missing, default=len(self.content))

    def receive(self, data: bytes) -> bytes:
        out, bad = b"", self._deframer.bad
        for frame in self._deframer.feed(data):
            self.frames.append(frame)
            chunk = m.Data.from_payload(frame.payload)
            self.chunks.append(chunk)
            self.content[chunk.offset : chunk.offset + len(chunk.chunk)] = chunk.chunk
            self.have |= set(range(chunk.offset, chunk.offset + len(chunk.chunk)))
            answer = m.DataAnswer(self.prefix, chunk.offset)
            if self._answer is not None:
                answer = self._answer(self, chunk)
            if answer is None:
                continue
            kind = MessageType.ERR if isinstance(answer, m.ErrAnswer) else MessageType.DATA | FROM_DEVICE
            out += Frame(kind, frame.seq, frame.sid, answer.to_payload()).to_bytes()
        if self._deframer.bad > bad:
            out += Frame(MessageType.NAK, 0, 0, b"").to_bytes()
        return out


BUNDLE = random.Random(5).randbytes(5000)


def transfer(line: VirtualLine, start: int = 0, max_frame_bytes: int = 1400) -> float:
    """Run a transfer and return how long it took."""
    begun = line.now_s
    session = Line(clock=line.clock, sid=7, baud=line.baud)
    line.run(Transfer(session, BUNDLE, start, max_frame_bytes).run())
    return line.now_s - begun


def test_each_chunk_goes_once_over_a_sound_line() -> None:
    receiver = Receiver(len(BUNDLE))
    transfer(VirtualLine(receiver))
    assert receiver.content == BUNDLE
    assert [chunk.offset for chunk in receiver.chunks] == list(range(0, 5000, timers.CHUNK_BYTES))
    assert len({frame.seq for frame in receiver.frames}) == len(receiver.frames)


def test_it_begins_where_the_device_wants() -> None:
    receiver = Receiver(len(BUNDLE))
    receiver.have = set(range(1000))
    transfer(VirtualLine(receiver), start=1000)
    assert receiver.chunks[0].offset == 1000
    assert receiver.content[1000:] == BUNDLE[1000:]


def test_nothing_is_sent_if_the_device_has_everything() -> None:
    line = VirtualLine(Receiver(len(BUNDLE)))
    transfer(line, start=len(BUNDLE))
    assert line.sent == []


def test_chunks_fit_the_shortest_frame_a_device_may_announce() -> None:
    receiver, line = Receiver(len(BUNDLE)), VirtualLine()
    line.board = receiver
    transfer(line, max_frame_bytes=320)
    assert receiver.content == BUNDLE
    assert max(len(frame) - 2 for frame in line.sent) <= 320


@pytest.mark.parametrize("lost", range(0, 20, 3))
def test_a_lost_chunk_is_repeated_alone(lost: int) -> None:
    receiver = Receiver(len(BUNDLE))
    clean_s = transfer(VirtualLine(Receiver(len(BUNDLE))))
    number = [0]

    def drop(data: bytes) -> bytes:
        number[0] += 1
        return b"" if number[0] == lost + 1 else data

    took_s = transfer(VirtualLine(receiver, to_board=drop))
    assert receiver.content == BUNDLE
    assert len(receiver.chunks) <= 20 + 3, "at most the window's last ones twice"
    assert took_s - clean_s < 0.5


@pytest.mark.parametrize("seed", range(8))
def test_heavy_loss_both_ways(seed: int) -> None:
    receiver = Receiver(len(BUNDLE))
    line = VirtualLine(receiver, to_board=Noise(seed, loss=1e-3), to_station=Noise(seed + 99, loss=5e-3))
    transfer(line)
    assert receiver.content == BUNDLE


@pytest.mark.parametrize("pause_s", [1.0, 4.0])
def test_a_stall_is_ridden_out(pause_s: float) -> None:
    receiver, line = Receiver(len(BUNDLE)), VirtualLine()
    line.board = receiver
    until_s = [0.0]

    def stall(data: bytes) -> bytes:
        if len(receiver.chunks) == 9 and not until_s[0]:
            until_s[0] = line.now_s + pause_s
        return b"" if line.now_s < until_s[0] else data

    line.to_board = stall
    assert transfer(line) > pause_s
    assert receiver.content == BUNDLE


LIARS: dict[str, Callable[[Receiver, m.Data], Any]] = {
    "stuck at zero": lambda _, chunk: m.DataAnswer(0, chunk.offset),
    "silent": lambda _, __: None,
    "backwards": lambda r, chunk: m.DataAnswer(max(0, 2000 - len(r.chunks)), chunk.offset),
    "busy acknowledging, never done": lambda r, chunk: m.DataAnswer(min(r.prefix, 4999), chunk.offset),
    "one byte at a time": lambda r, chunk: m.DataAnswer(min(len(r.chunks), 4999), chunk.offset),
}


@pytest.mark.parametrize("liar", LIARS)
def test_a_transfer_that_does_not_get_on_ends(liar: str) -> None:
    line = VirtualLine(Receiver(len(BUNDLE), LIARS[liar]))
    begun = line.now_s
    with pytest.raises(NoAnswerError):
        transfer(line)
    assert line.now_s - begun <= timers.transfer_cap_s(len(BUNDLE), line.baud) + 0.1
    assert len(line.sent) < 5000, "bounded, however busily it acknowledges"


@pytest.mark.parametrize(
    "answer",
    [lambda _, chunk: m.DataAnswer(5001, chunk.offset), lambda _, chunk: m.DataAnswer(256, chunk.offset + 1)],
    ids=["past the end", "another chunk"],
)
def test_impossible_acknowledgements_are_refused(answer: Callable[[Receiver, m.Data], Any]) -> None:
    with pytest.raises(MalformedAnswerError):
        transfer(VirtualLine(Receiver(len(BUNDLE), answer)))


def test_an_error_code_ends_it() -> None:
    liar = Receiver(len(BUNDLE), lambda _, __: m.ErrAnswer(ErrorCode.STATE, MessageType.DATA))
    with pytest.raises(DeviceRefusalError):
        transfer(VirtualLine(liar))


class TestRestarts:
    """STATE and SHA begin the transfer again: BEGINS times, then the unit stays in ISSUED."""

    def enrol(self, desk: Desk, board: Board) -> None:
        desk.enrol(VirtualLine(board))

    @pytest.mark.parametrize(
        ("kind", "code"),
        [
            (MessageType.DATA, ErrorCode.STATE),
            (MessageType.PREPARE, ErrorCode.STATE),
            (MessageType.PREPARE, ErrorCode.SHA),
        ],
    )
    def test_for_ever(self, desk: Desk, kind: MessageType, code: ErrorCode) -> None:
        board = Board()

        def lie(_: Any) -> m.ErrAnswer:
            board.staging = board.prepared = None
            return m.ErrAnswer(code, kind)

        board.lies[kind] = lie
        with pytest.raises(DeviceRefusalError):
            self.enrol(desk, board)
        assert board.count(MessageType.BEGIN) == timers.BEGINS
        assert board.count(MessageType.COMMIT) == 0
        assert desk.states() == [State.ISSUED]

    @pytest.mark.parametrize("code", [ErrorCode.STATE, ErrorCode.SHA])
    def test_once(self, desk: Desk, code: ErrorCode) -> None:
        board = Board()
        once = [True]

        def lie(answer: Any) -> Any:
            if once and once.pop():
                board.staging, board.prepared = None, None
                return m.ErrAnswer(code, MessageType.PREPARE)
            return answer

        board.lies[MessageType.PREPARE] = lie
        self.enrol(desk, board)
        assert board.count(MessageType.BEGIN) == 2
        assert desk.states() == [State.ATTESTED]

    def test_begin_refused_is_not_repeated(self, desk: Desk) -> None:
        board = Board()
        board.lies[MessageType.BEGIN] = lambda _: m.ErrAnswer(ErrorCode.STATE, MessageType.BEGIN)
        with pytest.raises(DeviceRefusalError):
            self.enrol(desk, board)
        assert board.count(MessageType.BEGIN) == 1

    def test_an_offset_past_the_end_in_begin(self, desk: Desk) -> None:
        board = Board()
        board.lies[MessageType.BEGIN] = lambda _: m.OffsetAnswer(16385)
        with pytest.raises(MalformedAnswerError):
            self.enrol(desk, board)
        assert desk.states() == [State.ISSUED]
