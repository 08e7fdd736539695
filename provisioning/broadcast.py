"""Something signed and numbered, put before every gateway at one contact, and what each of them says to it.

Rules:

- It is published retained, for all: a gateway that is away finds it there when it is back. When all that are there
  have answered, those whose link is down are given up: nobody waits for them.
- A gateway's status speaks for it where no receipt is to come: nothing was published, it is away, or time is up.
- The broker must end up with the newest, whoever published last: what it holds is watched until the end. What is
  older than ours, or is none of ours, is replaced; what is newer is the subclass's to judge.
- Nothing is published where it is in place and everybody who is there goes by it.
- Topics are asked for one by one where a retained message is to be had: RabbitMQ gives none to a wildcard.
"""

from __future__ import annotations

import contextlib
import queue
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from birthmark.device.errors import RemoteProtocolError
from birthmark.device.identity import BrokerName
from birthmark.device.messages import GatewayStatus
from birthmark.device.topics import gateway_status
from birthmark.provisioning.gateway_contact import left

if TYPE_CHECKING:
    from collections.abc import Iterable

    from birthmark.device.client import Client
    from birthmark.device.received import Message
    from birthmark.provisioning.gateway_contact import Contact

_MOST_PUBLICATIONS: Final = 3
"""Of one thing: whoever overwrites it that often is somebody else's station, or is replaying."""


class _Outcome(Protocol):
    @property
    def outcome(self) -> str: ...


R = TypeVar("R", bound=_Outcome)


@dataclass(slots=True)
class Known(Generic[R]):
    """What one gateway said."""

    name: str
    status: GatewayStatus | None = None
    receipts: dict[str, R] = field(default_factory=dict)
    """By the SHA-256 of what each is for."""
    trouble: str = ""
    """What was wrong with a receipt."""

    @property
    def is_away(self) -> bool:
        """Whether the broker says that its link is down, or it was stopped."""
        return self.status is not None and not self.status.online


class Broadcast(ABC, Generic[R]):
    """One delivery at one contact.

    Args:
        contact: where.
        client: connected there.
        deadline: until when to wait (`time.monotonic`).
    """

    def __init__(self, contact: Contact, client: Client, deadline: float) -> None:
        self.where = contact.upstream or str(contact.address)
        self._is_upstream = bool(contact.upstream)
        self.gateways: dict[str, Known[R]] = {
            gateway.name.lower(): Known(gateway.name) for gateway in contact.gateways
        }
        self.conflict = ""
        """Why this cannot end well."""
        self._client = client
        self._deadline = deadline
        self._inbox: queue.Queue[Message] = queue.Queue()
        self._held: dict[str, bytes] = {}
        """What the broker holds, by topic, as far as it has said."""
        self._publications: dict[str, int] = {}
        """How often each was published, by topic; empty: nothing was."""

    @property
    @abstractmethod
    def wanted(self) -> dict[str, bytes]:
        """What every gateway is to have, by topic, in the order in which it is published."""

    @abstractmethod
    def receipts_topic(self, name: BrokerName) -> str:
        """Return where a gateway gives its receipts."""

    @abstractmethod
    def take_receipt(self, known: Known[R], payload: bytes) -> None:
        """Keep a receipt for what is wanted; raises `RemoteProtocolError` if it is none."""

    @abstractmethod
    def told(self, known: Known[R], *, by_status: bool) -> dict[str, R]:
        """Return the receipts for what is wanted, by SHA-256; `by_status`: its status speaks for missing ones."""

    @abstractmethod
    def is_complete(self, told: dict[str, R]) -> bool:
        """Whether these are all that a gateway must give."""

    @abstractmethod
    def supersedes(self, topic: str, payload: bytes) -> bool:
        """Judge what the broker holds in the place of ours: whether it is newer, and stays.

        It is taken as what is wanted from then on, or there is a `conflict`.
        """

    def run(self) -> None:
        """Bring what is wanted, and wait for the answers.

        Raises:
            BirthmarkError: the broker denies it, or does not answer in time.
        """
        self._listen()
        if not self.conflict and not self._is_in_place():
            for topic in self.wanted:
                self._publish(topic)
        with contextlib.suppress(queue.Empty):
            while not self.conflict and not all(map(self._is_settled, self.gateways.values())):
                self._take(self._inbox.get(timeout=max(0.0, self._deadline - time.monotonic())))

    def final(self, known: Known[R]) -> dict[str, R]:
        """Return what a gateway has said in the end; its status makes up for no receipt that is wrong."""
        return self.told(known, by_status=not known.trouble)

    def silence(self, known: Known[R]) -> str:
        """Say why nothing is known of a gateway."""
        if not self._is_upstream:
            return f"no receipt from {self.where}" if known.status else f"nothing of that name at {self.where}"
        if known.status is None:
            return f"{self.where} knows nothing of it: has it a link there, with fleet = true?"
        if known.is_away:
            return f"its link to {self.where} is down"
        return f"no receipt by way of {self.where}"

    def _listen(self) -> None:
        """Ask for everything, and take what is retained.

        A broker sends that before it answers the next SUBSCRIBE. One that does not may be told something older
        than it holds; it is watched, and set right.
        """
        names = [BrokerName(known.name) for known in self.gateways.values()]
        self._subscribe([*self.wanted, *map(gateway_status, names)])
        self._subscribe(map(self.receipts_topic, names))
        self._client.wait_for_callbacks(left(self._deadline))
        with contextlib.suppress(queue.Empty):
            while True:
                self._take(self._inbox.get_nowait())

    def _subscribe(self, topics: Iterable[str]) -> None:
        for asked in [self._client.subscribe(topic, self._inbox.put) for topic in topics]:
            asked.wait(left(self._deadline))

    def _is_in_place(self) -> bool:
        """Whether the broker holds everything, and whoever is there goes by it."""
        wanted = self.wanted
        return all(self._held.get(topic) == payload for topic, payload in wanted.items()) and all(
            known.is_away or len(self.told(known, by_status=True)) == len(wanted)
            for known in self.gateways.values()
        )

    def _is_settled(self, known: Known[R]) -> bool:
        told = self.told(known, by_status=known.is_away or not self._publications)
        refused = any(receipt.outcome == "refused" for receipt in told.values())
        return known.is_away or refused or bool(known.trouble) or self.is_complete(told)

    def _publish(self, topic: str) -> None:
        count = self._publications[topic] = self._publications.get(topic, 0) + 1
        if count > _MOST_PUBLICATIONS:
            self.conflict = (
                f"somebody else keeps putting something else in the place of ours on {topic} at {self.where}: "
                "is that another station?"
            )
            return
        self._client.publish(topic, self.wanted[topic], retain=True, wait=left(self._deadline))

    def _take(self, message: Message) -> None:
        """Go by a message; what is no such message is nobody's word."""
        if message.topic in self.wanted:
            self._take_held(message.topic, message.payload)
            return
        _, name, last = message.topic.split("/", 2)
        known = self.gateways[name.lower()]
        with contextlib.suppress(RemoteProtocolError):
            if last == "status":
                known.status = GatewayStatus.from_bytes(message.payload)
            elif not message.retained:  # a receipt of before: this attempt may fare better, or worse
                self.take_receipt(known, message.payload)

    def _take_held(self, topic: str, payload: bytes) -> None:
        self._held[topic] = payload
        is_other = payload != self.wanted[topic] and not self.supersedes(topic, payload)
        if not self._publications:
            return
        if self.conflict:
            # It came late, and ours may be in its place by now.
            self._client.publish(topic, payload, retain=True, wait=left(self._deadline))
        elif is_other:
            self._publish(topic)
