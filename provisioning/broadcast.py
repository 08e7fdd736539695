"""Something signed and numbered, put before every gateway at one contact, and what each of them says to it.

Rules:

- It is published retained, for all: a gateway that is away finds it there when it is back. When all that are there
  have answered, those whose link is down are given up: nobody waits for them.
- A gateway's status speaks for it where no receipt is to come: all go by it, it is away, or time is up.
- The broker must end up with the newest, whoever published last: what it holds is watched until the end. What is
  older than ours, or is none of ours, is replaced; what is newer is the subclass's to judge.
- Nothing is published where it is in place and everybody who is there goes by it.
- Topics are asked for one by one where a retained message is to be had: RabbitMQ gives none to a wildcard.
- What is retained is so at one server, and may be at no other: each is brought it, and each is watched. A
  gateway's status is the newest, by its own clock, of those that the servers hold: where it was connected before,
  an old one stays. A server that fails is missed; the others do.
"""

from __future__ import annotations

import contextlib
import queue
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from birthmark.device.errors import RemoteProtocolError, UnreachableError
from birthmark.device.identity import BrokerName
from birthmark.device.messages import GatewayStatus
from birthmark.device.topics import gateway_status
from birthmark.provisioning.gateway_contact import left, unknown_at

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from birthmark.device.credentials import BrokerAddress
    from birthmark.device.received import Message
    from birthmark.provisioning.gateway_contact import Connected, Contact

_MOST_PUBLICATIONS: Final = 3
"""Of one thing at one server: whoever overwrites it that often is somebody else's station, or is replaying."""


class _Outcome(Protocol):
    @property
    def outcome(self) -> str: ...


R = TypeVar("R", bound=_Outcome)


@dataclass(slots=True)
class Known(Generic[R]):
    """What one gateway said."""

    name: str
    statuses: dict[BrokerAddress, GatewayStatus] = field(default_factory=dict)
    """By who holds them."""
    receipts: dict[str, R] = field(default_factory=dict)
    """By the SHA-256 of what each is for."""
    trouble: str = ""
    """What was wrong with a receipt."""

    def keep(self, sha256: str, receipt: R) -> None:
        """Keep a receipt. What was brought to several servers is installed once, and once more only current."""
        if receipt.outcome != "current" or sha256 not in self.receipts:
            self.receipts[sha256] = receipt

    @property
    def status(self) -> GatewayStatus | None:
        """The newest."""
        return max(self.statuses.values(), key=lambda status: status.clock, default=None)

    @property
    def is_away(self) -> bool:
        """Whether the broker says that its link is down, or it was stopped."""
        return self.status is not None and not self.status.online


class Broadcast(ABC, Generic[R]):
    """One delivery at one contact.

    Args:
        contact: where.
        connected: to its servers.
        deadline: until when to wait (`time.monotonic`).
    """

    def __init__(self, contact: Contact, connected: Connected, deadline: float) -> None:
        self.where = contact.where
        self._is_upstream = bool(contact.upstream)
        self.gateways: dict[str, Known[R]] = {
            gateway.name.lower(): Known(gateway.name) for gateway in contact.gateways
        }
        self.conflict = ""
        """Why this cannot end well."""
        self._connected = connected
        self._deadline = deadline
        self._inbox: queue.Queue[tuple[BrokerAddress, Message]] = queue.Queue()
        self._held: dict[tuple[BrokerAddress, str], bytes] = {}
        """What a server holds on a topic, as far as it has said."""
        self._asks = False
        """Whether somebody who is there did not go by it, so that receipts are to come."""
        self._publications: dict[tuple[BrokerAddress, str], int] = {}
        """How often something was published; empty: nothing was."""

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
        """Judge what a server holds in the place of ours: whether it is newer, and stays.

        It is taken as what is wanted from then on, or there is a `conflict`.
        """

    def run(self) -> None:
        """Bring what is wanted, and wait for the answers.

        Raises:
            BirthmarkError: a server denies it, or none answers in time.
        """
        self._listen()
        if not self.conflict:
            servers = self._lacking()
            for topic in self.wanted if servers else ():
                self._publish(topic, servers)
        with contextlib.suppress(queue.Empty):
            while not self.conflict and not all(map(self._is_settled, self.gateways.values())):
                self._take(*self._inbox.get(timeout=max(0.0, self._deadline - time.monotonic())))

    @property
    def missed(self) -> tuple[str, ...]:
        """The servers that were not brought it, and why."""
        return tuple(
            f"{self.where} was not brought it at {server}: {cause}"
            for server, cause in self._connected.missed.items()
        )

    def final(self, known: Known[R]) -> dict[str, R]:
        """Return what a gateway has said in the end; its status makes up for no receipt that is wrong."""
        return self.told(known, by_status=not known.trouble)

    def silence(self, known: Known[R]) -> str:
        """Say why nothing is known of a gateway."""
        if not self._is_upstream:
            return f"no receipt from {self.where}" if known.status else f"nothing of that name at {self.where}"
        if known.status is None:
            return unknown_at(self.where, self._connected)
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
        for client in self._connected.clients.values():
            client.wait_for_callbacks(left(self._deadline))
        with contextlib.suppress(queue.Empty):
            while True:
                self._take(*self._inbox.get_nowait())

    def _subscribe(self, topics: Iterable[str]) -> None:
        asked = [
            client.subscribe(topic, partial(self._keep, server))
            for topic in topics
            for server, client in self._connected.clients.items()
        ]
        for acknowledgement in asked:
            acknowledgement.wait(left(self._deadline))

    def _keep(self, server: BrokerAddress, message: Message) -> None:
        self._inbox.put((server, message))

    def _lacking(self) -> list[BrokerAddress]:
        """Return the servers that lack something; all, if somebody who is there does not go by it."""
        wanted, servers = self.wanted, list(self._connected.clients)
        self._asks = any(
            not known.is_away and len(self.told(known, by_status=True)) < len(wanted)
            for known in self.gateways.values()
        )
        if self._asks:
            return servers
        return [
            server
            for server in servers
            if any(self._held.get((server, topic)) != payload for topic, payload in wanted.items())
        ]

    def _is_settled(self, known: Known[R]) -> bool:
        told = self.told(known, by_status=known.is_away or not self._asks)
        refused = any(receipt.outcome == "refused" for receipt in told.values())
        return known.is_away or refused or bool(known.trouble) or self.is_complete(told)

    def _publish(self, topic: str, servers: Sequence[BrokerAddress]) -> None:
        for server in servers:
            count = self._publications[server, topic] = self._publications.get((server, topic), 0) + 1
            if count > _MOST_PUBLICATIONS:
                self.conflict = (
                    f"somebody else keeps putting something else in the place of ours on {topic} at {self.where}: "
                    "is that another station?"
                )
                return
        self._put(topic, self.wanted[topic], servers)

    def _put(self, topic: str, payload: bytes, servers: Sequence[BrokerAddress]) -> None:
        """Retain it at these servers; raises `UnreachableError` if no server is left."""
        clients, missed = self._connected.clients, self._connected.missed
        asked = {server: clients[server].publish(topic, payload, retain=True) for server in servers}
        for server, acknowledgement in asked.items():
            try:
                acknowledgement.wait(left(self._deadline))
            except UnreachableError as error:
                missed[server] = error.message
                if missed.keys() >= clients.keys():
                    raise

    def _take(self, server: BrokerAddress, message: Message) -> None:
        """Go by a message; what is no such message is nobody's word."""
        if message.topic in self.wanted:
            self._take_held(server, message.topic, message.payload)
            return
        _, name, last = message.topic.split("/", 2)
        known = self.gateways[name.lower()]
        with contextlib.suppress(RemoteProtocolError):
            if last == "status":
                known.statuses[server] = GatewayStatus.from_bytes(message.payload)
            elif not message.retained:  # a receipt of before: this attempt may fare better, or worse
                self.take_receipt(known, message.payload)

    def _take_held(self, server: BrokerAddress, topic: str, payload: bytes) -> None:
        self._held[server, topic] = payload
        is_other = payload != self.wanted[topic] and not self.supersedes(topic, payload)
        if not self._publications:
            return
        if self.conflict:
            # It came late, and ours may be in its place by now.
            self._put(topic, payload, [server])
        elif is_other:
            self._publish(topic, [server])
