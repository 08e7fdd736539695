"""The eleven behaviours that Eclipse's interoperability suite for MQTT 3.1.1 clients looks at, by plain clients.

They come through `support.tls_shim`, and so over mutual TLS, each with the certificate of its client id. One test
a behaviour; how to run the suite itself is in docs/testing.md.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import pytest
from support import mqtt_client as mqtt
from support.interop_stand import interop_stand
from support.mqtt_client import Delivery, RawClient, connack
from support.patience import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterator

A, B = "myclientid", "myclientid2"
TOPICS = ("TopicA", "TopicA/B", "Topic/C", "TopicA/C", "/TopicA")


class Suite:
    """Plain connections to the shim."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._opened: list[RawClient] = []

    def open(self) -> RawClient:
        client = RawClient(socket.create_connection(("127.0.0.1", self._port), timeout=PATIENCE_S))
        self._opened.append(client)
        return client

    def client(self, client_id: str, *, present: bool = False, **options: Any) -> RawClient:
        return self.open().handshake(mqtt.connect(client_id, **options), present=present)

    def close(self) -> None:
        for client in self._opened:
            client.close()


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with interop_stand(tmp_path_factory.mktemp("gateway")) as (_, shim_port):
        yield shim_port


@pytest.fixture
def suite(port: int) -> Iterator[Suite]:
    """Each test finds the two clients without sessions, and nothing retained."""
    suite = Suite(port)
    for name in (A, B):
        leave(suite.client(name))
    yield suite
    with suite.client("clean retained") as cleaner:
        cleaner.subscribed(("#", 0))
        for found in deliveries(cleaner):
            cleaner.send(mqtt.publish(found.topic, b"", retain=True))
        cleaner.send(mqtt.PINGREQ)
        while cleaner.read() != mqtt.PINGRESP:
            pass
    suite.close()


def leave(client: RawClient) -> None:
    client.send(mqtt.DISCONNECT)
    assert client.read_end() == []


def publish(client: RawClient, topic: str, payload: bytes, qos: int, *, retain: bool = False) -> None:
    """A whole exchange; what else comes meanwhile must not."""
    client.send(mqtt.publish(topic, payload, qos=qos, retain=retain, pid=7))
    if qos == 1:
        assert client.read() == (0x40, b"\0\7")
    elif qos == 2:
        assert client.read() == (0x50, b"\0\7")
        client.send(mqtt.pubrel(7))
        assert client.read() == (0x70, b"\0\7")


def deliveries(client: RawClient) -> list[Delivery]:
    """Take, and acknowledge, everything that is on its way."""
    client.send(mqtt.PINGREQ)
    found: list[Delivery] = []
    has_answered, open_ids = False, set[int]()
    while not has_answered or open_ids:
        packet = client.read()
        if packet == mqtt.PINGRESP:
            has_answered = True
        elif packet.first >> 4 == 3:
            found.append(mqtt.delivery(packet))
            pid = found[-1].packet_id
            if found[-1].qos == 1:
                client.send(mqtt.puback(pid))
            elif found[-1].qos == 2:
                client.send(mqtt.pubrec(pid))
                open_ids.add(pid)
        elif packet.first == 0x62:
            pid = int.from_bytes(packet.body)
            client.send(mqtt.pubcomp(pid))
            open_ids.discard(pid)
    return found


def test_01_basic(suite: Suite) -> None:
    """To oneself at all three levels; a second CONNECT and a wrong protocol name end the connection."""
    client = suite.client(A).subscribed((TOPICS[0], 2))
    client.send(mqtt.publish(TOPICS[0], b"qos 0"))
    assert client.read_delivery() == Delivery(TOPICS[0], b"qos 0")
    client.send(mqtt.publish(TOPICS[0], b"qos 1", qos=1, pid=1))
    client.send(mqtt.publish(TOPICS[0], b"qos 2", qos=2, pid=2) + mqtt.pubrel(2))
    found = [found for found in read_all(client, 5) if found.first >> 4 == 3]
    assert [(mqtt.delivery(packet).payload, mqtt.delivery(packet).qos) for packet in found] == [
        (b"qos 1", 1),
        (b"qos 2", 2),
    ]
    client.send(mqtt.connect(A))
    client.read_end()
    wrong = suite.open()
    wrong.send(mqtt.connect(A, name="hj"))
    assert wrong.read_end() in ([], [connack(1)])


def read_all(client: RawClient, count: int) -> list[mqtt.Packet]:
    return [client.read() for _ in range(count)]


def test_02_retained_messages(suite: Suite) -> None:
    client = suite.client(A)
    for qos, topic in enumerate(TOPICS[1:4]):
        publish(client, topic, b"qos %d" % qos, qos, retain=True)
    client.send(mqtt.subscribe(1, ("+/+", 2)))
    assert client.read() == mqtt.suback(1, 2)
    found = deliveries(client)
    assert sorted((d.topic, d.payload, d.qos) for d in found) == sorted(
        [(TOPICS[1], b"qos 0", 0), (TOPICS[2], b"qos 1", 1), (TOPICS[3], b"qos 2", 2)]
    )
    assert all(delivery.retain for delivery in found)
    leave(client)
    client = suite.client(A)
    for qos, topic in enumerate(TOPICS[1:4]):
        publish(client, topic, b"", qos, retain=True)
    client.subscribed(("+/+", 2))
    assert deliveries(client) == []


def test_03_offline_message_queueing(suite: Suite) -> None:
    leave(suite.client(A, clean=False).subscribed(("+/+", 2)))
    with suite.client(B) as sender:
        for qos, topic in enumerate(TOPICS[1:4]):
            publish(sender, topic, b"qos %d" % qos, qos)
    back = suite.client(A, clean=False, present=True)
    assert [(d.payload, d.qos) for d in deliveries(back)] == [(b"qos 1", 1), (b"qos 2", 2)]


def test_04_will_message(suite: Suite) -> None:
    doomed = suite.client(A, will=(TOPICS[2], b"client not disconnected", 0, False), keepalive=2)
    watcher = suite.client(B, clean=False).subscribed((TOPICS[2], 2))
    doomed.close()
    assert watcher.read_delivery() == Delivery(TOPICS[2], b"client not disconnected")
    assert deliveries(watcher) == []


def test_05_overlapping_subscriptions(suite: Suite) -> None:
    """One message, at the highest of the matching levels."""
    client = suite.client(A)
    client.send(mqtt.subscribe(1, ("TopicA/#", 2), ("TopicA/+", 1)))
    assert client.read() == mqtt.suback(1, 2, 1)
    with suite.client(B) as sender:
        publish(sender, TOPICS[3], b"overlapping topic filters", 2)
    assert [(d.payload, d.qos) for d in deliveries(client)] == [(b"overlapping topic filters", 2)]


def test_06_keepalive(suite: Suite) -> None:
    silent = suite.client(A, keepalive=1, will=(TOPICS[4], b"keepalive expiry", 0, False))
    watcher = suite.client(B, keepalive=0).subscribed((TOPICS[4], 2))
    assert watcher.read_delivery().payload == b"keepalive expiry"
    assert silent.read_end() == []
    assert deliveries(watcher) == []


def test_07_redelivery_on_reconnect(suite: Suite) -> None:
    """What was not acknowledged comes again, with DUP and in order."""
    away = suite.client(B, clean=False).subscribed(("TopicA/#", 2))
    with suite.client(A) as sender:
        publish(sender, TOPICS[1], b"1", 1)
        publish(sender, TOPICS[3], b"2", 2)
    assert [away.read_delivery().dup for _ in range(2)] == [False, False]
    leave(away)
    back = suite.client(B, clean=False, present=True)
    assert [(d.payload, d.qos, d.dup) for d in deliveries(back)] == [(b"1", 1, True), (b"2", 2, True)]
    leave(back)
    assert deliveries(suite.client(B, clean=False, present=True)) == []


def test_08_zero_length_client_id(suite: Suite) -> None:
    refused = suite.open()
    refused.send(mqtt.connect("", clean=False))
    assert refused.read_end() == [connack(2)]
    leave(suite.client("", clean=True))


def test_09_subscribe_failure(suite: Suite) -> None:
    client = suite.client(A)
    client.send(mqtt.subscribe(1, ("test/nosubscribe", 2), ("+/+", 2)))
    assert client.read() == mqtt.suback(1, 0x80, 2)
    publish(client, "test/nosubscribe", b"", 1)
    assert deliveries(client) == [], "nor by a wider filter"


def test_10_dollar_topics(suite: Suite) -> None:
    """A filter that begins with a wildcard matches no topic that begins with $; and nobody may publish there."""
    watcher = suite.client(B, keepalive=0).subscribed(("+/+", 2))
    publish(watcher, "$" + TOPICS[1], b"", 1)
    assert deliveries(watcher) == []
    publish(watcher, TOPICS[1], b"", 0)
    assert [d.topic for d in deliveries(watcher)] == [TOPICS[1]], "the control"


def test_11_unsubscribe(suite: Suite) -> None:
    watcher = suite.client(B)
    for topic in TOPICS[:3]:
        watcher.subscribed((topic, 2))
    watcher.send(mqtt.unsubscribe(9, TOPICS[0]))
    assert watcher.read() == (0xB0, b"\0\x09")
    with suite.client(A) as sender:
        for topic in TOPICS[:3]:
            publish(sender, topic, b"", 1)
    assert [d.topic for d in deliveries(watcher)] == list(TOPICS[1:3])
