"""Clients that keep to MQTT over a broker that is killed: what they hold unacknowledged outlives a connection.

Publishers send numbers, 1 and on, and go on where they were after each reconnect, as MQTT 3.1.1 §4.4 says;
subscribers note every message that counts as delivered. Both speak with the raw client, packet by packet.
"""

from __future__ import annotations

import contextlib
import ssl
import struct
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from support import mqtt_client as mqtt
from support.mqtt_client import ConnectionEndedError, RawClient
from support.patience import PATIENCE_S
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WINDOW = 20
"""Messages on their way at once."""
MAX_PACKET_ID = 65_535
SERVER_UNAVAILABLE = 3
GONE = (OSError, ssl.SSLError, ConnectionEndedError)


def packet_id_of(body: bytes) -> int:
    return int(struct.unpack_from(">H", body)[0])


@dataclass
class DurableClient:
    """A client with a persistent session, that connects again and again until it is stopped."""

    client_id: str
    context: ssl.SSLContext
    port: Callable[[], int]
    """Where the broker listens at the moment; 0, where nobody does, while there is none."""
    connections: int = 0
    failures: list[BaseException] = field(default_factory=list)
    is_stopped: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    session_required: bool = False
    """Whether the broker must know the session, because it has acknowledged something of it."""

    def start(self) -> None:
        self.is_stopped.clear()
        self.thread = threading.Thread(target=self._run, name=self.client_id)
        self.thread.start()

    def stop(self) -> None:
        self.is_stopped.set()
        if self.thread is not None:
            self.thread.join(PATIENCE_S)
            assert not self.thread.is_alive()
        if self.failures:
            raise self.failures[0]

    def _run(self) -> None:
        while not self.is_stopped.is_set():
            try:
                with RawClient.connect(self.port(), self.context) as client:
                    self._serve(client)
            except GONE:
                self.is_stopped.wait(0.02)
            except BaseException as error:  # noqa: BLE001 - told to the test by `stop`
                self.failures.append(error)
                return

    def _serve(self, client: RawClient) -> None:
        client.send(mqtt.connect(self.client_id, clean=False))
        found = client.read()
        assert found.first == 0x20, found
        if found.body[1] == SERVER_UNAVAILABLE:
            raise ConnectionEndedError("for the moment")
        assert found.body[1] == 0, found
        if self.session_required:
            assert found.body[0] == 1, "the session is not there any more"
        self.connections += 1
        self.talk(client)

    def talk(self, client: RawClient) -> None:
        raise NotImplementedError

    def read(self, client: RawClient) -> mqtt.Packet | None:
        """A packet; None if there is none for a moment, so that a stop is noticed."""
        with contextlib.suppress(TimeoutError):
            return client.read(0.1)
        return None


@dataclass
class DurablePublisher(DurableClient):
    """Publishes numbers to a topic at QoS 1 or 2, with a window."""

    topic: str = "t"
    qos: int = 1
    retain: bool = False
    acknowledged: int = 0
    """Numbers 1 to this were acknowledged (QoS 2: with PUBREC)."""
    sent: int = 0
    is_ending: bool = False
    """Nothing new is published; what is on its way is seen through."""
    has_room: Callable[[], bool] = lambda: True
    """Whether something new may be published: how far ahead of its subscriber it is to be."""
    waiting: deque[tuple[int, int]] = field(default_factory=deque)
    """Packet identifier and number, not acknowledged yet."""
    unreleased: deque[int] = field(default_factory=deque)
    """QoS 2: packet identifiers with PUBREC and without PUBCOMP."""

    @property
    def is_done(self) -> bool:
        return self.is_ending and not self.waiting and not self.unreleased

    def talk(self, client: RawClient) -> None:
        for packet_id in self.unreleased:
            client.send(mqtt.pubrel(packet_id))
        for packet_id, number in self.waiting:
            client.send(self._publish(packet_id, number, dup=True))
        while not self.is_stopped.is_set():
            while not self.is_ending and self.has_room() and len(self.waiting) + len(self.unreleased) < WINDOW:
                self.sent += 1
                packet_id = (self.sent - 1) % MAX_PACKET_ID + 1
                self.waiting.append((packet_id, self.sent))
                client.send(self._publish(packet_id, self.sent))
            if (found := self.read(client)) is not None:
                self._take(client, found)

    def _publish(self, packet_id: int, number: int, *, dup: bool = False) -> bytes:
        return mqtt.publish(self.topic, b"%d" % number, qos=self.qos, retain=self.retain, dup=dup, pid=packet_id)

    def _take(self, client: RawClient, found: mqtt.Packet) -> None:
        packet_id = packet_id_of(found.body)
        if found.first in (0x40, 0x50):
            # In the order of sending (§4.6): a gap would be an acknowledgement lost.
            expected, number = self.waiting.popleft()
            assert packet_id == expected, (packet_id, expected)
            self.acknowledged = number
            self.session_required |= found.first == 0x50
            if found.first == 0x50:
                self.unreleased.append(packet_id)
                client.send(mqtt.pubrel(packet_id))
        else:
            assert found.first == 0x70, found
            assert packet_id == self.unreleased.popleft()


@dataclass
class DurableSubscriber(DurableClient):
    """Subscribes once, and notes by topic the numbers that count as delivered."""

    filters: tuple[tuple[str, int], ...] = ()
    delivered: dict[str, list[int]] = field(default_factory=dict)
    received: set[int] = field(default_factory=set)
    """QoS 2: packet identifiers received and not released (§4.3.3)."""
    subscribed: threading.Event = field(default_factory=threading.Event)

    def talk(self, client: RawClient) -> None:
        if not self.session_required:
            client.send(mqtt.subscribe(1, *self.filters))
        while not self.is_stopped.is_set():
            found = self.read(client)
            if found is None:
                continue
            if found.first == 0x90:
                assert found == mqtt.suback(1, *(qos for _, qos in self.filters))
                self.session_required = True
                self.subscribed.set()
            elif found.first == 0x62:
                packet_id = packet_id_of(found.body)
                self.received.discard(packet_id)
                client.send(mqtt.pubcomp(packet_id))
            else:
                self._take(client, mqtt.delivery(found))

    def _take(self, client: RawClient, message: mqtt.Delivery) -> None:
        if message.qos == 2:
            if message.packet_id not in self.received:
                self.received.add(message.packet_id)
                self._note(message)
            client.send(mqtt.pubrec(message.packet_id))
        else:
            self._note(message)
            if message.qos:
                client.send(mqtt.puback(message.packet_id))

    def _note(self, message: mqtt.Delivery) -> None:
        self.delivered.setdefault(message.topic, []).append(int(message.payload))


class DurableLoad:
    """Publishers and subscribers at work, while what is between them is killed."""

    publishers: Sequence[DurablePublisher]
    subscribers: Sequence[DurableSubscriber]

    @property
    def clients(self) -> list[DurableClient]:
        return [*self.subscribers, *self.publishers]

    def everybody_subscribes(self) -> None:
        for subscriber in self.subscribers:
            subscriber.start()
        self.eventually(lambda: all(s.subscribed.is_set() for s in self.subscribers), "they subscribe")

    def everybody_publishes(self) -> None:
        """Wait until of each publisher some more is acknowledged."""
        before = [publisher.acknowledged for publisher in self.publishers]
        self.eventually(
            lambda: all(p.acknowledged > b for p, b in zip(self.publishers, before, strict=True)),
            "everybody's messages are acknowledged",
        )

    def finish_publishing(self) -> None:
        """Publish nothing new, and wait until all that was sent is acknowledged."""
        for publisher in self.publishers:
            publisher.is_ending = True
        self.eventually(lambda: all(p.is_done for p in self.publishers), "all is acknowledged")

    def eventually(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until something is true of the clients, none of which may fail meanwhile."""

        def holds() -> bool:
            for client in self.clients:
                if client.failures:
                    raise client.failures[0]
            return condition()

        eventually(holds, f"not in time: {what}")
