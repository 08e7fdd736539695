"""Messages between clients over mutual TLS: every QoS, order, sessions, redelivery, retained messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.mqtt_client import Delivery, Packet
from support.mqtt_gateway import running_gateway

from birthmark.broker.config import Limits

if TYPE_CHECKING:
    from pathlib import Path

    from support.mqtt_client import RawClient
    from support.mqtt_gateway import RunningGateway
    from support.pki import Pki

COMMANDS = "devices/sensor-1/commands"


def say(
    client: RawClient, topic: str, payload: bytes, qos: int = 1, *, retain: bool = False, pid: int = 1
) -> None:
    """Publish, and see it through to the end of its handshake."""
    client.send(mqtt.publish(topic, payload, qos=qos, retain=retain, pid=pid))
    if qos == 1:
        assert client.read() == Packet(0x40, pid.to_bytes(2, "big"))
    elif qos == 2:
        assert client.read() == Packet(0x50, pid.to_bytes(2, "big"))
        client.send(mqtt.pubrel(pid))
        assert client.read() == Packet(0x70, pid.to_bytes(2, "big"))
    else:
        client.ping()


def test_a_device_subscribes_and_gets_what_an_operator_says(gateway: RunningGateway) -> None:
    device = gateway.client("sensor-1").subscribed((f"{COMMANDS}/#", 1))
    say(gateway.client("alice", "operator"), f"{COMMANDS}/blink", b"3")
    assert device.read_delivery() == Delivery(f"{COMMANDS}/blink", b"3", 1, packet_id=1)


@pytest.mark.parametrize("granted", [0, 1, 2])
@pytest.mark.parametrize("published", [0, 1, 2])
def test_a_message_arrives_at_the_lower_qos(gateway: RunningGateway, published: int, granted: int) -> None:
    """S14: stock amqtt delivers at the subscription's QoS."""
    subscriber = gateway.client("free-1").subscribed(("t", granted))
    say(gateway.client("free-2"), "t", b"x", published, pid=9)
    got = subscriber.read_delivery()
    assert (got.topic, got.payload, got.qos, got.dup) == ("t", b"x", min(published, granted), False)


def test_qos_2_both_ways_is_exactly_once(gateway: RunningGateway) -> None:
    subscriber = gateway.client("free-1").subscribed(("t", 2))
    publisher = gateway.client("free-2")
    for _ in range(2):  # the same packet again before PUBREL is the same message
        publisher.send(mqtt.publish("t", b"once", qos=2, pid=5))
        assert publisher.read() == Packet(0x50, b"\x00\x05")
    for _ in range(2):  # a PUBREL again gets its PUBCOMP again
        publisher.send(mqtt.pubrel(5))
        assert publisher.read() == Packet(0x70, b"\x00\x05")
    got = subscriber.read_delivery()
    assert (got.payload, got.qos) == (b"once", 2)
    subscriber.send(mqtt.pubrec(got.packet_id))
    assert subscriber.read() == Packet(0x62, got.packet_id.to_bytes(2, "big"))
    subscriber.send(mqtt.pubcomp(got.packet_id))
    subscriber.ping()
    say(publisher, "t", b"again", 2, pid=5)
    assert subscriber.read_delivery().payload == b"again"


def test_overlapping_filters_give_one_message_at_the_highest_qos(gateway: RunningGateway) -> None:
    subscriber = gateway.client("free-1").subscribed(("a/#", 0), ("a/+", 2), ("a/b", 1))
    say(gateway.client("free-2"), "a/b", b"x", 2)
    assert subscriber.read_delivery().qos == 2
    subscriber.ping()


def test_a_second_subscribe_changes_the_qos_and_sends_retained_again(gateway: RunningGateway) -> None:
    """S14: stock amqtt keeps the first QoS."""
    say(gateway.client("free-2"), "a/b", b"kept", 1, retain=True)
    subscriber = gateway.client("free-1").subscribed(("a/b", 0))
    assert subscriber.read_delivery() == Delivery("a/b", b"kept", 0, retain=True)
    subscriber.subscribed(("a/b", 1), pid=2)
    again = subscriber.read_delivery()
    assert (again.payload, again.qos, again.retain) == (b"kept", 1, True)
    say(gateway.client("free-3"), "a/b", b"new", 2, retain=True)
    live = subscriber.read_delivery()
    assert (live.payload, live.qos, live.retain) == (b"new", 1, False), "a live message has retain 0"


def test_an_empty_retained_message_removes_and_is_delivered(gateway: RunningGateway) -> None:
    publisher = gateway.client("free-2")
    say(publisher, "a/b", b"kept", 1, retain=True)
    watcher = gateway.client("free-1").subscribed(("a/#", 0))
    assert watcher.read_delivery().payload == b"kept"
    say(publisher, "a/b", b"", 1, retain=True)
    assert watcher.read_delivery() == Delivery("a/b", b"")
    late = gateway.client("free-3").subscribed(("a/#", 0))
    late.ping()


def test_unsubscribe_stops_messages(gateway: RunningGateway) -> None:
    subscriber = gateway.client("free-1").subscribed(("a", 0), ("b", 0))
    subscriber.send(mqtt.unsubscribe(2, "a", "never/had"))
    assert subscriber.read() == Packet(0xB0, b"\x00\x02")
    publisher = gateway.client("free-2")
    say(publisher, "a", b"no")
    say(publisher, "b", b"yes")
    assert subscriber.read_delivery() == Delivery("b", b"yes")


def test_a_wildcard_does_not_match_dollar_topics(gateway: RunningGateway) -> None:
    subscriber = gateway.client("free-1").subscribed(("#", 0), ("+/broker", 0))
    gateway.call(gateway.broker.publish, "$SYS/broker", b"secret")
    subscriber.ping()
    subscriber.subscribed(("$SYS/#", 0), pid=2)
    gateway.call(gateway.broker.publish, "$SYS/broker", b"asked for")
    assert subscriber.read_delivery() == Delivery("$SYS/broker", b"asked for")


def test_a_persistent_session_gets_what_it_missed_in_order(gateway: RunningGateway) -> None:
    """S14: stock amqtt delivers what was queued with retain=1."""
    device = gateway.client("free-1", clean=False).subscribed(("t", 1))
    device.send(mqtt.DISCONNECT)
    device.read_end()
    publisher = gateway.client("free-2")
    for number in range(20):
        say(publisher, "t", b"%d" % number, 1 + number % 2, retain=number == 3)
    say(publisher, "t", b"qos 0 is not kept", 0)
    back = gateway.client("free-1", clean=False, present=True)
    got = [back.read_delivery() for _ in range(20)]
    assert [int(message.payload) for message in got] == list(range(20))
    assert {(message.qos, message.retain, message.dup) for message in got} == {(1, False, False)}
    back.ping()


def test_what_was_not_acknowledged_comes_again_with_dup_in_order(gateway: RunningGateway) -> None:
    """MQTT-4.4.0-1, for QoS 1 and both halves of QoS 2."""
    device = gateway.client("free-1", clean=False).subscribed(("t", 2))
    publisher = gateway.client("free-2")
    for number, qos in enumerate((1, 2, 2, 1)):
        say(publisher, "t", b"%d" % number, qos)
    first = [device.read_delivery() for _ in range(4)]
    device.send(mqtt.pubrec(first[1].packet_id))
    assert device.read() == Packet(0x62, first[1].packet_id.to_bytes(2, "big"))
    device.send(mqtt.puback(first[0].packet_id))
    device.ping()
    device.close()
    back = gateway.client("free-1", clean=False, present=True)
    assert back.read() == Packet(0x62, first[1].packet_id.to_bytes(2, "big")), "released: PUBREL again"
    again = [back.read_delivery() for _ in range(2)]
    assert again == [message._replace(dup=True) for message in first[2:]]
    back.ping()


def test_a_clean_session_leaves_nothing(gateway: RunningGateway) -> None:
    gateway.client("free-1", clean=False).subscribed(("t", 1)).close()
    gateway.wait_for(lambda: gateway.broker.connected_count == 0, "it has gone")
    gateway.client("free-1", clean=True).subscribed(("u", 1)).close()
    gateway.wait_for(lambda: len(gateway.broker.exchange.sessions) == 0, "the clean session has gone")
    say(gateway.client("free-2"), "t", b"x")
    gateway.client("free-1", clean=False, present=False).ping()


def test_no_more_than_max_inflight_is_on_its_way_and_a_full_queue_drops_the_oldest(
    tmp_path: Path, pki: Pki
) -> None:
    with running_gateway(tmp_path, pki, limits=Limits(max_inflight=3, max_queued_messages=5)) as gateway:
        device = gateway.client("free-1").subscribed(("t", 1))
        publisher = gateway.client("free-2")
        for number in range(12):
            say(publisher, "t", b"%d" % number)
        got = [device.read_delivery() for _ in range(3)]
        device.ping()
        assert gateway.broker.counters.dropped_queue_full == 4
        while len(got) < 8:
            device.send(mqtt.puback(got[len(got) - 3].packet_id))
            got.append(device.read_delivery())
        device.ping()
        assert [int(message.payload) for message in got] == [0, 1, 2, 7, 8, 9, 10, 11]


def test_a_queue_is_bounded_in_bytes(tmp_path: Path, pki: Pki) -> None:
    with running_gateway(tmp_path, pki, limits=Limits(max_queued_bytes=100_000)) as gateway:
        gateway.client("free-1", clean=False).subscribed(("t", 1)).close()
        gateway.wait_for(lambda: gateway.broker.connected_count == 0, "it has gone")
        publisher = gateway.client("free-2")
        for number in range(10):
            say(publisher, "t", b"%d" % number + bytes(30_000))
        session = gateway.call(gateway.broker.exchange.sessions.get, "free-1")
        assert session is not None
        assert session.queued_bytes <= 100_000
        back = gateway.client("free-1", clean=False, present=True)
        assert [back.read_delivery().payload[:1] for _ in range(3)] == [b"7", b"8", b"9"]


def test_many_retained_messages_all_arrive(tmp_path: Path, pki: Pki) -> None:
    """They are read from the store as the socket takes them: more than the bound on what waits."""
    with running_gateway(tmp_path, pki, limits=Limits(max_queued_bytes=50_000, max_inflight=4)) as gateway:
        for number in range(500):
            gateway.call(gateway.broker.publish, f"r/{number}", bytes(1_000), 1, retain=True)
        plain = gateway.client("free-1").subscribed(("r/#", 0))
        assert {plain.read_delivery().topic for _ in range(500)} == {f"r/{n}" for n in range(500)}
        sure = gateway.client("free-2").subscribed(("r/#", 1))
        seen = set()
        for _ in range(500):
            message = sure.read_delivery()
            assert message.retain
            seen.add(message.topic)
            sure.send(mqtt.puback(message.packet_id))
        assert len(seen) == 500
        sure.ping()


def test_large_messages_pass_and_larger_ones_end_the_connection(gateway: RunningGateway) -> None:
    subscriber = gateway.client("free-1").subscribed(("big", 1))
    publisher = gateway.client("free-2")
    payload = bytes(range(256)) * 4_000
    say(publisher, "big", payload)
    assert subscriber.read_delivery().payload == payload
    publisher.send(mqtt.publish("big", bytes(1_048_577))[:8])
    assert publisher.read_end() == []


def test_a_burst_arrives_whole_and_in_order(gateway: RunningGateway) -> None:
    subscriber = gateway.client("free-1").subscribed(("t/#", 0))
    publisher = gateway.client("free-2")
    publisher.send(b"".join(mqtt.publish("t/x", b"%d" % number) for number in range(5_000)))
    for number in range(5_000):
        assert subscriber.read_delivery().payload == b"%d" % number


def test_a_burst_at_qos_1_arrives_whole(gateway: RunningGateway) -> None:
    subscriber = gateway.client("free-1").subscribed(("t/#", 1))
    publisher = gateway.client("free-2")
    publisher.send(b"".join(mqtt.publish("t/x", b"%d" % n, qos=1, pid=n + 1) for n in range(500)))
    for number in range(500):
        message = subscriber.read_delivery()
        assert message.payload == b"%d" % number
        subscriber.send(mqtt.puback(message.packet_id))
        assert publisher.read() == Packet(0x40, (number + 1).to_bytes(2, "big"))


@pytest.mark.parametrize("granted", [0, 1, 2])
def test_a_burst_arrives_in_order_each_message_as_itself(gateway: RunningGateway, granted: int) -> None:
    """What comes in one TLS record is read, decided and sent on in runs of one topic."""
    subscriber = gateway.client("free-1").subscribed(("t/#", granted))
    publisher = gateway.client("free-2")
    said = [
        ("t/a", b"1", 1),
        ("t/a", b"22", 1),
        ("t/a", b"22", 1),
        ("t/b", b"3", 1),
        ("t/a", b"4", 0),
        ("t/a", b"", 0),
        ("t/a", b"4", 0),
        ("t/a", b"5", 1),
    ]
    publisher.send(
        b"".join(
            mqtt.publish(topic, payload, qos=qos, pid=number if qos else 1)
            for number, (topic, payload, qos) in enumerate(said, 1)
        )
    )
    for number, (_, _, qos) in enumerate(said, 1):
        if qos:
            assert publisher.read() == Packet(0x40, number.to_bytes(2, "big"))
    got = [subscriber.read_delivery() for _ in said]
    assert [(one.topic, one.payload, one.qos) for one in got] == [
        (topic, payload, min(qos, granted)) for topic, payload, qos in said
    ]
    assert [one.packet_id for one in got if one.qos] == list(range(1, 1 + sum(1 for one in got if one.qos)))
    assert gateway.broker.counters.messages_in == gateway.broker.counters.messages_out == len(said)


def test_a_burst_goes_out_as_far_as_there_is_room_and_the_rest_as_it_is_acknowledged(
    tmp_path: Path, pki: Pki
) -> None:
    with running_gateway(tmp_path, pki, limits=Limits(max_inflight=4)) as gateway:
        subscriber = gateway.client("free-1").subscribed(("t", 1))
        publisher = gateway.client("free-2")
        publisher.send(b"".join(mqtt.publish("t", b"%d" % one, qos=1, pid=one + 1) for one in range(10)))
        got = [subscriber.read_delivery() for _ in range(4)]
        subscriber.ping()  # and no more than those
        acknowledgements = [mqtt.puback(one.packet_id) for one in got]
        subscriber.send(b"".join([*acknowledgements[:3], mqtt.puback(60_000), *acknowledgements[:1]]))
        got += [subscriber.read_delivery() for _ in range(3)]
        subscriber.ping()
        subscriber.send(b"".join(mqtt.puback(one.packet_id) for one in got[3:]))
        got += [subscriber.read_delivery() for _ in range(3)]
        assert [int(one.payload) for one in got] == list(range(10))
