"""The policy at every place where it binds: publish, subscribe, will, retained, delivery, reload."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.mqtt_client import Delivery, Packet
from support.mqtt_gateway import POLICY_TOML, policy, running_gateway

from birthmark.broker.config import Limits, OnDenied
from birthmark.broker.session import MAX_REMEMBERED_DECISIONS

if TYPE_CHECKING:
    from pathlib import Path

    from support.mqtt_gateway import RunningGateway
    from support.pki import Pki

OWN, FOREIGN = "devices/sensor-1/telemetry/t", "devices/sensor-2/telemetry/t"


@pytest.mark.parametrize("topic", [FOREIGN, "fleet/announcements/x", "devices", "$SYS/broker/x", "$foo"])
def test_a_denied_publish_is_acknowledged_dropped_and_said_once(
    gateway: RunningGateway, caplog: pytest.LogCaptureFixture, topic: str
) -> None:
    """S11: on stock amqtt a PUBLISH to `$...` leaves a zombie."""
    caplog.set_level(logging.INFO, "birthmark")
    watcher = gateway.client("free-1").subscribed(("#", 0), ("$SYS/#", 0))
    device = gateway.client("sensor-1")
    device.send(mqtt.publish(topic, b"x"))
    device.send(mqtt.publish(topic, b"x", qos=1, pid=1, retain=True))
    assert device.read() == Packet(0x40, b"\x00\x01")
    device.send(mqtt.publish(topic, b"x", qos=2, pid=2))
    assert device.read() == Packet(0x50, b"\x00\x02")
    device.send(mqtt.pubrel(2))
    assert device.read() == Packet(0x70, b"\x00\x02")
    device.send(mqtt.publish(OWN, b"mine", qos=1, pid=3))
    assert device.read() == Packet(0x40, b"\x00\x03"), "it goes on working"
    assert watcher.read_delivery() == Delivery(OWN, b"mine")
    assert gateway.broker.counters.publishes_denied == 3
    assert len(gateway.broker.exchange.retained) == 0
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("denied")]
    assert len(lines) == 1
    assert f"sensor-1 may not publish to {topic}" in lines[0]


def test_a_topic_is_escaped_in_the_log(gateway: RunningGateway, caplog: pytest.LogCaptureFixture) -> None:
    device = gateway.client("sensor-1")
    device.send(mqtt.publish("devices/\x1b[31m\n\u202eevil", b"x"))
    device.ping()
    assert "\\x1b[31m\\x0a\\u202eevil" in caplog.text
    assert "\x1b" not in caplog.text


def test_a_denied_publish_ends_the_connection_if_so_set(tmp_path: Path, pki: Pki) -> None:
    with running_gateway(tmp_path, pki, on_denied=OnDenied.DISCONNECT) as gateway:
        device = gateway.client("sensor-1")
        device.send(mqtt.publish(OWN, b"x", qos=1, pid=1))
        device.read()
        device.send(mqtt.publish(FOREIGN, b"x", qos=1, pid=2))
        assert device.read_end() == []


@pytest.mark.parametrize("on_denied", list(OnDenied))
def test_every_message_of_a_burst_that_is_denied_is(tmp_path: Path, pki: Pki, on_denied: OnDenied) -> None:
    with running_gateway(tmp_path, pki, on_denied=on_denied) as gateway:
        watcher = gateway.client("free-1").subscribed(("devices/#", 1))
        device = gateway.client("sensor-1")
        burst = [mqtt.publish(FOREIGN, b"x", qos=1, pid=pid) for pid in (1, 2, 3)]
        device.send(b"".join([mqtt.publish(OWN, b"y", qos=1, pid=9), *burst]))
        assert device.read() == Packet(0x40, b"\x00\x09")
        if on_denied is OnDenied.DISCONNECT:
            assert device.read_end() == []
        else:
            assert [device.read() for _ in burst] == [Packet(0x40, pid.to_bytes(2, "big")) for pid in (1, 2, 3)]
        assert watcher.read_delivery().payload == b"y"
        watcher.ping()
        assert gateway.broker.counters.publishes_denied == 3


def test_what_the_gateway_takes_itself_it_is_given_one_by_one(gateway: RunningGateway) -> None:
    taken: list[bytes] = []

    def take(_topic: str, payload: bytes, _peer: object) -> None:
        taken.append(payload)
        if payload == b"end":
            gateway.broker.end_connections(lambda peer: str(peer.device_id) == "free-2", "it asked for it")

    gateway.call(gateway.broker.on_gateway_message, "taken/#", take)
    subscriber = gateway.client("free-1").subscribed(("taken/#", 1))
    publisher = gateway.client("free-2")
    publisher.send(b"".join(mqtt.publish("taken/x", payload) for payload in (b"1", b"2", b"end", b"4")))
    assert publisher.read_end() == []
    subscriber.ping()  # by then the gateway is done with the burst, and this has been sent nothing of it
    assert taken == [b"1", b"2", b"end"], "nothing of a client whose connection has ended"


@pytest.mark.parametrize(
    "topic_filter", ["#", "devices/#", "devices/+/status", "devices/sensor-2/#", "$SYS/#", "+/+/#"]
)
def test_a_denied_subscription_is_answered_with_0x80(gateway: RunningGateway, topic_filter: str) -> None:
    device = gateway.client("sensor-1")
    device.send(
        mqtt.subscribe(1, ("devices/sensor-1/commands/#", 1), (topic_filter, 1), ("fleet/announcements/#", 2))
    )
    assert device.read() == mqtt.suback(1, 1, 0x80, 2)
    free = gateway.client("free-1")
    free.send(mqtt.publish(FOREIGN, b"secret", qos=1, pid=1))
    free.read()
    device.ping()


def test_retained_messages_of_others_stay_with_them(gateway: RunningGateway) -> None:
    """S4: on stock amqtt every newcomer gets what anybody's filter matches."""
    other = gateway.client("sensor-2").subscribed(("devices/sensor-2/#", 1))
    other.send(mqtt.publish("devices/sensor-2/status", b"secret", qos=0, retain=True))
    assert other.read_delivery().payload == b"secret"
    device = gateway.client("sensor-1", clean=False)
    device.ping()
    device.subscribed(("devices/sensor-1/#", 1))
    device.ping()


def test_a_deny_inside_an_allowed_subscription_holds_for_each_delivery(tmp_path: Path, pki: Pki) -> None:
    """A filter granted by an older policy must not deliver what the present one denies."""
    with running_gateway(tmp_path, pki) as gateway:
        watcher = gateway.client("alice", "operator").subscribed(("devices/#", 1))
        device = gateway.client("sensor-1")
        narrowed = POLICY_TOML.replace(b'subscribe = ["devices/#", "fleet/#"', b'subscribe = ["fleet/#"')
        assert gateway.call(gateway.broker.set_policy, policy(narrowed)) == 1
        device.send(mqtt.publish(OWN, b"x", qos=1, pid=1))
        device.read()
        watcher.ping()
        assert gateway.broker.exchange.router.count == 0


def test_a_new_policy_takes_hold_of_everything(gateway: RunningGateway) -> None:
    device = gateway.client("sensor-1", will=("devices/sensor-1/status", b"lost", 0, False))
    device.subscribed(("devices/sensor-1/commands/#", 1))
    watcher = gateway.client("free-1").subscribed(("#", 0))
    device.send(mqtt.publish(OWN, b"before"))
    assert watcher.read_delivery().payload == b"before"
    nothing = POLICY_TOML.replace(b'publish = ["devices/{id}/#"]', b"publish = []").replace(
        b'subscribe = ["devices/{id}/#", "fleet/announcements/#"]', b"subscribe = []"
    )
    assert gateway.call(gateway.broker.set_policy, policy(nothing)) == 1
    device.send(mqtt.publish(OWN, b"after"))
    device.ping()
    watcher.ping()
    device.send(mqtt.subscribe(2, ("devices/sensor-1/commands/#", 1)))
    assert device.read() == mqtt.suback(2, 0x80)
    device.sock.close()
    gateway.wait_for(lambda: gateway.broker.connected_count == 1, "it is gone")
    watcher.ping()
    assert gateway.broker.counters.wills_denied == 1, "S5: the will is decided again when it is due"
    gateway.call(gateway.broker.set_policy, policy())
    back = gateway.client("sensor-1")
    back.send(mqtt.publish(OWN, b"again"))
    assert watcher.read_delivery().payload == b"again"


@pytest.mark.parametrize("qos", [1, 2])
def test_what_was_on_its_way_and_is_no_longer_allowed_is_not_sent_again(gateway: RunningGateway, qos: int) -> None:
    """Sent to a socket that nobody read any more, it has not been seen yet."""
    device = gateway.client("sensor-1", clean=False).subscribed(("devices/sensor-1/#", 2))
    free = gateway.client("free-1")
    topics = [f"devices/sensor-1/{leaf}" for leaf in ("private/y", "commands/x")]
    for pid, topic in enumerate(topics, start=1):
        free.send(mqtt.publish(topic, b"1", qos=qos, pid=pid))
        free.read()
    assert [device.read_delivery().topic for _ in topics] == topics
    device.close()
    gateway.wait_for(lambda: gateway.broker.connected_count == 1, "it has gone")
    denied = POLICY_TOML.replace(b"[roles.free]", b'deny_subscribe = ["devices/{id}/private/#"]\n[roles.free]', 1)
    gateway.call(gateway.broker.set_policy, policy(denied))

    back = gateway.client("sensor-1", clean=False, present=True)
    if qos == 2:
        assert back.read() == mqtt.Packet(0x62, b"\x00\x01"), "it lets go of the identifier, and gets no message"
        back.send(mqtt.pubcomp(1))
    again = back.read_delivery()
    assert (again.topic, again.packet_id, again.dup) == (topics[1], 2, True), "what is allowed comes again"
    back.send(mqtt.puback(2) if qos == 1 else mqtt.pubrec(2))
    if qos == 2:
        assert back.read() == mqtt.Packet(0x62, b"\x00\x02")
        back.send(mqtt.pubcomp(2))
    back.ping()
    (session,) = [found for found in gateway.broker.exchange.sessions if found.client_id == "sensor-1"]
    assert (session.waiting_count, session.inflight_bytes) == (0, 0)


def test_what_is_queued_and_no_longer_allowed_is_dropped(gateway: RunningGateway) -> None:
    gateway.client("sensor-1", clean=False).subscribed(("devices/sensor-1/#", 1)).close()
    gateway.wait_for(lambda: gateway.broker.connected_count == 0, "it has gone")
    free = gateway.client("free-1")
    for pid, topic in enumerate(("commands/x", "private/y"), start=1):
        free.send(mqtt.publish(f"devices/sensor-1/{topic}", topic.encode(), qos=1, pid=pid))
        free.read()
    denied = POLICY_TOML.replace(b"[roles.free]", b'deny_subscribe = ["devices/{id}/private/#"]\n[roles.free]', 1)
    gateway.call(gateway.broker.set_policy, policy(denied))
    back = gateway.client("sensor-1", clean=False, present=True)
    assert back.read_delivery().payload == b"commands/x"
    back.ping()


def test_subscriptions_are_bounded(tmp_path: Path, pki: Pki) -> None:
    with running_gateway(tmp_path, pki, limits=Limits(max_subscriptions=3)) as gateway:
        free = gateway.client("free-1").subscribed(("a", 0), ("b", 0), ("c", 0))
        free.send(mqtt.subscribe(2, ("d", 0), ("a", 1)))
        assert free.read() == mqtt.suback(2, 0x80, 1), "a known filter may still change"
        free.send(mqtt.unsubscribe(3, "b"))
        free.read()
        free.subscribed(("d", 2), pid=4)
        free.send(mqtt.subscribe(5, ("a", 0), ("/".join("x" * 100), 0)))
        assert free.read() == mqtt.suback(5, 0, 0x80), "too deep"
        free.send(mqtt.subscribe(6, *[("a", 0)] * 100_000))
        assert free.read() == mqtt.suback(6, *[0] * 3, *[0x80] * 99_997), "no more are looked at than it may have"
        assert gateway.broker.counters.subscribes_denied == 99_999


def test_denials_and_decisions_remembered_are_bounded(gateway: RunningGateway) -> None:
    device = gateway.client("sensor-1")
    burst = b"".join(mqtt.publish(f"devices/sensor-2/{n}", b"x") for n in range(6_000))
    device.send(burst + mqtt.publish("devices/sensor-2/" + "x" * 60_000, b"x"))
    device.ping()
    session = gateway.call(gateway.broker.exchange.sessions.get, "sensor-1")
    assert session is not None
    assert gateway.broker.counters.publishes_denied == 6_001
    assert len(session.may_publish) <= MAX_REMEMBERED_DECISIONS
    assert all(len(topic) <= 512 for topic in session.may_publish)
    assert len(gateway.broker.exchange.denials._said) <= 4_096
