"""A board that does not keep to the link: the honest agent underneath, and one lie on top of it.

Rules:

- It is honest in everything but its one lie, so that the lie is met at the step that it is about.
- A lie sees the request and the agent's own answer, and says what goes on the line instead. A board that is deaf
  at a step never shows the request to its agent.
- Its lies end when the board is stopped: one that lasts waits on `pause`, which says whether to go on.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from birthmark.device.link import cbor
from birthmark.device.link.frame import FROM_DEVICE, Deframer, Frame
from birthmark.device.link.messages import MessageType

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from birthmark.device.agent.machine import Agent
    from birthmark.device.agent.slots import Slots


@dataclass(frozen=True, slots=True)
class Talk:
    """One request and what the agent answered it; what a lie is made of.

    Args:
        request: as it came.
        answer: the agent's own; None if the board was deaf to the request.
        hwid: the board's.
        slots: the board's records.
        pause: waits so many seconds; False once the board is stopped.
    """

    request: Frame
    answer: Frame | None
    hwid: bytes
    slots: Slots
    pause: Callable[[float], bool]

    @property
    def fields(self) -> dict[int, Any]:
        """The decoded payload of the agent's answer; empty if there is none, or it is no map."""
        fields = cbor.decode(self.answer.payload) if self.answer is not None and self.answer.payload else {}
        return dict(fields) if isinstance(fields, dict) else {}

    @property
    def asked(self) -> dict[int, Any]:
        """The decoded payload of the request."""
        fields = cbor.decode(self.request.payload)
        return dict(fields) if isinstance(fields, dict) else {}

    def frame(self, payload: bytes, *, kind: int | None = None) -> bytes:
        """Return an answer to the request with this payload, as bytes for the line."""
        answer_kind = self.request.type | FROM_DEVICE if kind is None else kind
        return Frame(answer_kind, self.request.seq, self.request.sid, payload).to_bytes()

    def with_fields(self, changes: dict[int, Any]) -> bytes:
        """Return the agent's answer with some fields changed."""
        return self.frame(cbor.encode(dict(sorted((self.fields | changes).items()))))


@dataclass(frozen=True, slots=True)
class Lie:
    """One way not to keep to the link.

    Args:
        meaning: in a few words, for the help.
        at: the request that it is about, unless the operator names another.
        tell: what goes on the line instead of the agent's answer, piece by piece.
        ask: changes the request before the agent sees it.
        is_deaf: whether the agent sees the request at all.
    """

    meaning: str
    at: MessageType
    tell: Callable[[Talk], Iterator[bytes]] | None = None
    ask: Callable[[Frame], Frame] | None = None
    is_deaf: bool = False


class HostileBoard:
    """An agent with a lie on top, in an agent's place; see `tty.Answering`.

    Args:
        agent: the honest one.
        slots: its records.
        lie: what it does.
        at: the request that it does it at.
        pause: see `Talk`.
    """

    def __init__(
        self, agent: Agent, slots: Slots, lie: Lie, at: MessageType, pause: Callable[[float], bool]
    ) -> None:
        self._agent = agent
        self._slots = slots
        self._lie = lie
        self._at = at
        self._pause = pause
        self._deframer = Deframer()

    def receive(self, data: bytes) -> Generator[bytes, None, None]:
        """Take bytes from the line and yield what to send."""
        for request in self._deframer.feed(data):
            if request.type != self._at:
                yield from self._agent.receive(request.to_bytes())
            elif self._lie.is_deaf:
                yield from self._told(request, None)
            else:
                yield from self._lied(request)

    def busy(self) -> bytes:
        """The agent's own."""
        return self._agent.busy()

    def _lied(self, request: Frame) -> Iterator[bytes]:
        asked = self._lie.ask(request) if self._lie.ask is not None else request
        with closing(self._agent.receive(asked.to_bytes())) as answers:
            for answer in answers:
                frame = Frame.from_run(answer[1:-1])
                if frame.type in (MessageType.BUSY, MessageType.ERR):
                    yield answer
                else:
                    yield from self._told(request, frame)

    def _told(self, request: Frame, answer: Frame | None) -> Iterator[bytes]:
        if self._lie.tell is not None:
            yield from self._lie.tell(Talk(request, answer, self._agent.board.hwid, self._slots, self._pause))
        elif answer is not None:
            yield answer.to_bytes()
