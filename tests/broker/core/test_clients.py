"""Who a client is, its one session, its will, its time: CONNECT and the end of a connection."""

from __future__ import annotations

import logging
import ssl
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.mqtt_client import Delivery, connack
from support.mqtt_gateway import running_gateway
from support.pki import now

from birthmark.broker.config import Limits

if TYPE_CHECKING:
    from pathlib import Path

    from support.mqtt_gateway import RunningGateway
    from support.pki import Pki

WILL = ("devices/sensor-1/status", b"lost", 1, True)


@pytest.mark.parametrize(
    ("client_id", "clean", "code"),
    [
        ("sensor-1", True, 0),
        ("sensor-1", False, 0),
        ("", True, 0),
        ("", False, 2),
        ("sensor-2", True, 2),
        ("sensor-2", False, 2),
        ("SENSOR-1", True, 2),
        ("sensor-1:x", True, 2),
        ("sensor-1 ", True, 2),
    ],
)
def test_a_device_may_only_be_itself(gateway: RunningGateway, client_id: str, clean: bool, code: int) -> None:
    client = gateway.open(gateway.context("sensor-1"))
    client.send(mqtt.connect(client_id, clean=clean))
    assert client.read() == connack(code)
    if code:
        assert client.read_end() == []
        assert len(gateway.broker.exchange.sessions) == 0
    else:
        session = gateway.call(gateway.broker.exchange.sessions.get, "sensor-1")
        assert session is not None


@pytest.mark.parametrize(
    ("client_id", "code"), [("alice", 0), ("alice:laptop", 0), ("bob:laptop", 2), ("alicex", 2)]
)
def test_a_service_may_have_several_sessions(gateway: RunningGateway, client_id: str, code: int) -> None:
    first = gateway.client("alice", "operator")
    client = gateway.open(gateway.context("alice", "operator"))
    client.send(mqtt.connect(client_id))
    assert client.read() == connack(code)
    if client_id == "alice:laptop":
        first.ping()


def test_another_version_is_answered_with_1(gateway: RunningGateway) -> None:
    for hello in (mqtt.connect("sensor-1", level=5, tail=b"\0"), mqtt.connect("sensor-1", name="MQIsdp", level=3)):
        client = gateway.open(gateway.context("sensor-1"))
        client.send(hello)
        assert client.read_end() == [connack(1)]


@pytest.mark.parametrize("data", [mqtt.PINGREQ, mqtt.publish("a", b"x"), b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 10])
def test_anything_before_connect_ends_the_connection(gateway: RunningGateway, data: bytes) -> None:
    client = gateway.open(gateway.context("sensor-1"))
    client.send(data)
    assert client.read_end() == []


def test_a_second_connect_ends_the_connection(gateway: RunningGateway) -> None:
    client = gateway.client("sensor-1")
    client.send(mqtt.connect("sensor-1"))
    assert client.read_end() == []


@pytest.mark.parametrize("clean", [True, False])
def test_a_new_connection_takes_over(gateway: RunningGateway, clean: bool) -> None:
    """S6 and S7: one of the two lives, and it gets the messages."""
    old = gateway.client("sensor-1", clean=clean).subscribed(("devices/sensor-1/commands/#", 1))
    new = gateway.client("sensor-1", clean=clean, present=not clean)
    assert old.read_end() == []
    if clean:
        new.subscribed(("devices/sensor-1/commands/#", 1))
    operator = gateway.client("alice", "operator")
    operator.send(mqtt.publish("devices/sensor-1/commands/x", b"1", qos=1, pid=1))
    assert new.read_delivery().payload == b"1"
    assert gateway.broker.connected_count == 2
    assert gateway.broker.counters.take_overs == 1


def test_take_overs_in_a_row_leave_one_session(gateway: RunningGateway) -> None:
    context = gateway.context("sensor-1")
    clients = [gateway.open(context) for _ in range(20)]
    for client in clients:
        client.send(mqtt.connect("sensor-1", clean=False) + mqtt.subscribe(1, ("devices/sensor-1/#", 0)))
    gateway.wait_for(
        lambda: gateway.broker.counters.clients_connected == 20 and len(gateway.broker._connections) == 1,
        "all but the last are gone",
    )
    assert gateway.broker.connected_count == 1
    assert gateway.broker.exchange.router.count == 1


def test_the_will_is_published_when_a_client_is_lost(gateway: RunningGateway) -> None:
    watcher = gateway.client("alice", "operator").subscribed(("devices/+/status", 1))
    device = gateway.client("sensor-1", will=WILL)
    device.sock.close()
    assert watcher.read_delivery() == Delivery(WILL[0], b"lost", 1, packet_id=1)
    late = gateway.client("bob", "operator").subscribed(("devices/+/status", 0))
    assert late.read_delivery() == Delivery(WILL[0], b"lost", 0, retain=True)


def test_the_will_is_not_published_after_a_goodbye(gateway: RunningGateway) -> None:
    watcher = gateway.client("alice", "operator").subscribed(("devices/+/status", 1))
    device = gateway.client("sensor-1", will=WILL)
    device.send(mqtt.DISCONNECT + mqtt.publish("devices/sensor-1/status", b"after the end"))
    assert device.read_end() == []
    gateway.wait_for(lambda: gateway.broker.connected_count == 1, "it has gone")
    watcher.ping()


@pytest.mark.parametrize("how", ["take-over", "violation"])
def test_the_will_is_published_when_the_broker_ends_the_connection(gateway: RunningGateway, how: str) -> None:
    watcher = gateway.client("alice", "operator").subscribed(("devices/+/status", 0))
    device = gateway.client("sensor-1", will=WILL)
    if how == "take-over":
        gateway.client("sensor-1")
    else:
        device.send(b"\x00\x00")
    assert watcher.read_delivery().payload == b"lost"
    watcher.ping()


@pytest.mark.parametrize("topic", ["devices/sensor-2/status", "$SYS/broker/x", "fleet/announcements/all"])
def test_a_will_on_a_foreign_topic_refuses_the_connection(gateway: RunningGateway, topic: str) -> None:
    """S5, at CONNECT: before any session is touched."""
    gateway.client("sensor-1", clean=False).subscribed(("devices/sensor-1/commands/#", 1))
    client = gateway.open(gateway.context("sensor-1"))
    client.send(mqtt.connect("sensor-1", will=(topic, b"x", 1, True)))
    assert client.read_end() == [connack(5)]
    assert gateway.broker.counters.take_overs == 0
    assert gateway.broker.counters.wills_denied == 1


def test_silence_of_one_and_a_half_keepalives_ends_the_connection(gateway: RunningGateway) -> None:
    """S16. A packet, whichever, starts the time anew."""
    watcher = gateway.client("alice", "operator").subscribed(("devices/+/status", 0))
    device = gateway.open(gateway.context("sensor-1"))
    started = time.monotonic()  # no later than the gateway's own start
    device.handshake(mqtt.connect("sensor-1", keepalive=1, will=WILL))
    assert device.read_end() == []
    assert time.monotonic() - started >= 1.4
    assert watcher.read_delivery().payload == b"lost"
    assert gateway.broker.counters.keepalives_missed == 1
    assert gateway.broker.connected_count == 1


def test_no_connect_in_time_ends_the_connection(tmp_path: Path, pki: Pki) -> None:
    """S16."""
    with running_gateway(tmp_path, pki, limits=Limits(connect_timeout_s=0.3)) as gateway:
        client = gateway.open(gateway.context("sensor-1"))
        client.send(mqtt.connect("sensor-1")[:5])
        assert client.read_end() == []
        assert len(gateway.broker.exchange.sessions) == 0


def test_a_keepalive_of_none_is_held_to_the_longest(tmp_path: Path, pki: Pki) -> None:
    with running_gateway(tmp_path, pki, limits=Limits(max_keepalive_s=1)) as gateway:
        client = gateway.client("sensor-1", keepalive=0)
        assert client.read_end() == []


def test_a_session_ends_with_its_certificate(gateway: RunningGateway) -> None:
    short = gateway.pki.issuing.issue(cns=["sensor-1"], not_after=now() + timedelta(seconds=4))
    client = gateway.open(gateway.context_of(short)).handshake(mqtt.connect("sensor-1"))
    assert client.read_end() == []
    assert gateway.broker.counters.expired == 1
    with pytest.raises((ssl.SSLError, ConnectionError, mqtt.ConnectionEndedError)):
        gateway.open(gateway.context_of(short)).handshake(mqtt.connect("sensor-1"))


def test_too_many_sessions_are_refused_with_3(tmp_path: Path, pki: Pki) -> None:
    with running_gateway(tmp_path, pki, limits=Limits(max_sessions=2)) as gateway:
        gateway.client("sensor-1")
        gateway.client("sensor-2")
        client = gateway.open(gateway.context("sensor-3"))
        client.send(mqtt.connect("sensor-3"))
        assert client.read_end() == [connack(3)]


def test_forgotten_sessions_are_forgotten(tmp_path: Path, pki: Pki) -> None:
    with running_gateway(tmp_path, pki, limits=Limits(session_expiry_s=3_600)) as gateway:
        gateway.client("sensor-1", clean=False).subscribed(("devices/sensor-1/commands/#", 1)).close()
        gateway.wait_for(lambda: gateway.broker.connected_count == 0, "it has gone")
        gateway.call(gateway.broker.forget_expired_sessions)
        assert len(gateway.broker.exchange.sessions) == 1
        gateway.call(setattr, gateway.broker, "now_s", lambda: gateway.loop.time() + 3_601)
        gateway.call(gateway.broker.forget_expired_sessions)
        assert len(gateway.broker.exchange.sessions) == 0
        assert gateway.broker.exchange.router.count == 0


def test_revoked_identities_are_closed_with_all_they_left(gateway: RunningGateway) -> None:
    watcher = gateway.client("alice", "operator").subscribed(("devices/#", 1))
    device = gateway.client("sensor-1", clean=False, will=WILL).subscribed(("devices/sensor-1/commands/#", 1))
    device.send(mqtt.publish(WILL[0], b"online", qos=1, retain=True, pid=1))
    device.read()
    assert watcher.read_delivery().payload == b"online"
    watcher.send(mqtt.publish("devices/sensor-1/commands/x", b"1", qos=1, pid=1))
    assert {watcher.read().first, watcher.read().first} == {0x40, 0x32}
    assert device.read_delivery().payload == b"1"
    silent = gateway.open(gateway.context("sensor-1"))
    gateway.wait_for(
        lambda: sum(1 for c in gateway.broker._connections if c.peer is not None) == 3, "three have shaken hands"
    )
    bystander = gateway.client("sensor-2")

    closed = gateway.call(gateway.broker.close_identities, lambda peer: str(peer.device_id) == "sensor-1")

    (report,) = closed
    assert (report.id, report.sessions_closed, report.will_suppressed) == ("sensor-1", 1, True)
    assert (report.queued_messages_purged, report.retained_presence_purged) == (1, True)
    assert report.elapsed_ms > 0
    assert device.read_end() == []
    assert silent.read_end() == [], "a connection before its CONNECT is closed as well"
    gone = watcher.read_delivery()
    assert (gone.topic, gone.payload) == (WILL[0], b"")
    watcher.ping()
    bystander.ping()
    assert gateway.call(gateway.broker.exchange.sessions.get, "sensor-1") is None
    assert gateway.broker.exchange.retained.get(WILL[0]) is None
    gateway.client("sensor-1", clean=False, present=False)


def test_offline_sessions_and_presence_of_the_revoked_are_purged(gateway: RunningGateway) -> None:
    device = gateway.client("sensor-1", clean=False).subscribed(("devices/sensor-1/commands/#", 1))
    device.send(mqtt.publish(WILL[0], b"online", qos=1, retain=True, pid=1) + mqtt.DISCONNECT)
    device.read_end()
    operator = gateway.client("alice", "operator")
    for number in range(3):
        operator.send(mqtt.publish("devices/sensor-1/commands/x", b"1", qos=1, pid=number + 1))
        operator.read()
    (report,) = gateway.call(gateway.broker.close_identities, lambda peer: str(peer.device_id) == "sensor-1")
    assert (report.sessions_closed, report.queued_messages_purged) == (0, 3)
    assert report.retained_presence_purged
    assert not report.will_suppressed
    assert gateway.call(gateway.broker.close_identities, lambda peer: str(peer.device_id) == "sensor-1") == []


def test_presence_of_a_device_with_a_newer_certificate_stays(gateway: RunningGateway) -> None:
    old, new = gateway.pki.device("sensor-1"), gateway.pki.device("sensor-1")
    device = gateway.open(gateway.context_of(old)).handshake(mqtt.connect("sensor-1"))
    device.send(mqtt.publish(WILL[0], b"online", qos=1, retain=True, pid=1) + mqtt.DISCONNECT)
    device.read_end()
    renewed = gateway.open(gateway.context_of(new)).handshake(mqtt.connect("sensor-1"))
    closed = gateway.call(gateway.broker.close_identities, lambda peer: peer.cert_serial == old.cert_serial)
    assert closed == []
    renewed.ping()
    assert gateway.broker.exchange.retained.get(WILL[0]) is not None


def test_a_client_that_does_not_read_is_cut_off_by_a_revocation(gateway: RunningGateway) -> None:
    deaf = gateway.client("sensor-1").subscribed(("devices/sensor-1/commands/#", 0))
    operator = gateway.client("alice", "operator")
    for _ in range(40):
        operator.send(mqtt.publish("devices/sensor-1/commands/x", bytes(200_000)))
    operator.ping()
    gateway.call(gateway.broker.close_identities, lambda peer: str(peer.device_id) == "sensor-1")
    gateway.wait_for(lambda: len(gateway.broker._connections) == 1, "the deaf one is gone")
    deaf.close()


def test_the_gateway_takes_its_own_messages(gateway: RunningGateway) -> None:
    taken: list[tuple[str, bytes, str]] = []
    gateway.call(
        gateway.broker.on_gateway_message,
        "gateway/localhost/crl",
        lambda topic, payload, peer: taken.append((topic, payload, str(peer.device_id))),
    )
    operator = gateway.client("alice", "operator").subscribed(("gateway/#", 0))
    operator.send(mqtt.publish("gateway/localhost/crl", b"crl", qos=1, pid=1))
    assert operator.read().first == 0x40
    assert taken == [("gateway/localhost/crl", b"crl", "alice")]
    operator.ping()
    device = gateway.client("sensor-1")
    device.send(mqtt.publish("gateway/localhost/crl", b"evil", qos=1, pid=1))
    device.read()
    assert len(taken) == 1, "the policy decides first"


@pytest.mark.parametrize("behind", [b"", b"\0"], ids=["alone", "before what is no packet"])
def test_a_defect_ends_the_connection_that_met_it_and_no_other(gateway: RunningGateway, behind: bytes) -> None:
    def defect(*_: object) -> None:
        raise ZeroDivisionError

    other = gateway.client("sensor-2")
    gateway.call(gateway.broker.on_gateway_message, "devices/sensor-1/telemetry/#", defect)
    device = gateway.client("sensor-1")
    device.send(mqtt.publish("devices/sensor-1/telemetry/x", b"1") + behind)
    assert device.read_end() == []
    other.ping()
    assert gateway.broker.counters.defects == 1
    gateway.broker.counters.defects = 0  # this one was meant


def test_what_a_client_calls_itself_is_escaped_in_the_log(
    gateway: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "birthmark")
    client_id = "alice:\x1b[31m\nfake line\u202e"
    client = gateway.client("alice", "operator", client_id=client_id)
    client.send(mqtt.DISCONNECT)
    client.read_end()
    other = gateway.open(gateway.context("sensor-1"))
    other.send(mqtt.connect("\x1b[31m\n"))
    other.read_end()
    gateway.wait_for(lambda: len(caplog.records) >= 3, "all is logged")
    for record in caplog.records:
        shown = record.getMessage() + str(getattr(record, "fields", ""))
        assert shown.isascii()
        assert shown.isprintable(), shown
    assert "alice:\\x1b[31m\\x0afake line\\u202e" in caplog.text
