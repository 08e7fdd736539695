"""What time does to a session: a will fires late, a certificate or a CRL runs out, a policy changes.

Each on a real gateway over real TLS; what has to be waited for is waited for once.
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.mqtt_gateway import POLICY_TOML
from support.mqtt_process import BROKER_TOML
from support.mqtt_world import STATUS, process_world, replace
from support.pki import crl_pem, now

from birthmark.device.messages import GatewayStatus

if TYPE_CHECKING:
    from pathlib import Path

    from support.mqtt_client import RawClient
    from support.mqtt_world import ProcessWorld
    from support.pki import Pki

NARROW = POLICY_TOML.replace(b'publish = ["devices/{id}/#"]', b'publish = ["devices/{id}/telemetry/#"]').replace(
    b'subscribe = ["devices/{id}/#", "fleet/announcements/#"]', b'subscribe = ["devices/{id}/commands/#"]'
)
"""Devices lose their status, and every subscription but commands."""


def put_policy(world: ProcessWorld, text: bytes) -> None:
    before = len(world.broker.log)
    replace(world.folder / "policy.toml", text)
    world.broker.wait_for_log("a new policy is in force", after=before)


def payloads(watcher: RawClient) -> set[bytes]:
    """What has been delivered by now."""
    watcher.send(mqtt.PINGREQ)
    found = set()
    while (packet := watcher.read()) != mqtt.PINGRESP:
        found.add(mqtt.delivery(packet).payload)
    return found


def test_a_will_is_held_to_the_policy_of_the_moment_it_fires(tmp_path: Path, pki: Pki) -> None:
    """By a cut and by a keepalive that expires; a right that was lost meanwhile is lost for the will too."""

    def play(world: ProcessWorld, *, narrowed: bool) -> set[bytes]:
        watcher = world.client("free-1").subscribed(("devices/+/status", 0))
        payloads(watcher)
        doomed = []
        for name, keepalive in (("cut", 60), ("silent", 1)):
            will = (f"devices/{name}/status", name.encode(), 0, True)
            doomed.append(world.client(name, will=will, keepalive=keepalive))
        if narrowed:
            put_policy(world, NARROW)
        doomed[0].close()
        assert doomed[1].read_end() == [], "the keepalive has expired"
        with world.client("cut"):  # so that the end of the first is known by now
            return payloads(watcher)

    with process_world(tmp_path, pki) as world:
        assert play(world, narrowed=False) == {b"cut", b"silent"}, "the control: they do fire"
        assert play(world, narrowed=True) == set()
        for name in ("cut", "silent"):
            world.broker.wait_for_log(f"{name} may not have its last will on")
        said = [record for record in world.broker.log if record.get("action") == "will"]
        assert {record["id"] for record in said} == {"cut", "silent"}
        assert all("no publish entry matches" in record["rule"] for record in said)
        assert world.status().counters["wills_denied"] == 2


def test_a_will_into_anothers_topics_never_gets_that_far(world: ProcessWorld) -> None:
    for topic in ("devices/other/status", "devices/other/commands/x", "$SYS/x", "fleet/announcements/x"):
        will = (topic, b"evil", 1, True)
        assert world.answer(world.context("sensor-1"), mqtt.connect("sensor-1", will=will)) == 5
    own = ("devices/sensor-1/status", b"gone", 1, False)
    assert world.answer(world.context("sensor-1"), mqtt.connect("sensor-1", will=own)) == 0
    with world.client("free-1", will=("devices/other/status", b"good", 0, False)) as free:
        watcher = world.operator("alice", ("devices/other/status", 0))
        free.sock.close()
        assert watcher.read_delivery().payload == b"good", "the control: where it is allowed, it fires"


def test_a_certificate_that_expires_ends_its_session(world: ProcessWorld) -> None:
    watcher = world.operator("alice", ("devices/short/status", 0))
    # Time enough for two handshakes on a busy machine.
    short = world.pki.issuing.issue(cns=["short"], not_after=now() + dt.timedelta(seconds=6))
    context = world.context_of(short)
    will = ("devices/short/status", b"expired", 0, False)
    client = world.open(context).handshake(mqtt.connect("short", will=will))
    client.ping()  # so that there is a ticket
    session = client.tls.session
    long = world.client("sensor-1")
    assert client.read_end() == []
    assert watcher.read_delivery().payload == b"expired", "its will says so"
    assert "its certificate has expired" in world.broker.wait_for_log("closed the connection of short")["message"]
    assert not world.lets_in(context, "short")
    assert not world.lets_in(context, "short", session=session), "nor with the ticket of when it was good"
    long.ping()


def test_a_denial_is_seen_by_the_client_in_the_log_and_in_a_counter(world: ProcessWorld) -> None:
    before = world.status().counters
    with world.client("curious") as client:
        client.send(mqtt.subscribe(1, ("devices/other/#", 1)))
        assert client.read() == mqtt.suback(1, 0x80)
        for qos in (0, 1, 2):
            client.send(mqtt.publish("devices/other/commands/x", b"x", qos=qos, pid=qos))
        assert [client.read().first for _ in range(2)] == [0x40, 0x50]
    world.broker.wait_for_log("curious may not publish to devices/other/commands/x")  # a line takes its own way
    said = {
        record["action"]: record
        for record in world.broker.log
        if record.get("id") == "curious" and "rule" in record
    }
    assert said["subscribe"]["topic"] == "devices/other/#"
    assert said["publish"]["topic"] == "devices/other/commands/x"
    for action, record in said.items():
        assert (record["event"], record["level"]) == ("denied", "warning")
        assert record["rule"] == f"role 'device' (assignment 3, ou 'device'): no {action} entry matches"
        assert all(str(record[key]) in record["message"] for key in ("id", "topic", "rule"))
    after = world.status().counters
    assert after["subscribes_denied"] == before["subscribes_denied"] + 1
    assert after["publishes_denied"] == before["publishes_denied"] + 3


def test_a_denied_publish_ends_the_connection_if_so_set(tmp_path: Path, pki: Pki) -> None:
    with process_world(tmp_path, pki, broker_toml=BROKER_TOML + 'on_denied = "disconnect"\n') as world:
        watcher = world.operator("alice", ("devices/sensor-1/status", 0))
        for qos in (0, 1, 2):
            device = world.client("sensor-1", will=("devices/sensor-1/status", b"out", 0, False))
            device.send(mqtt.publish("devices/sensor-1/x", b"x", qos=1, pid=9))
            assert device.read().first == 0x40, "the control: what is allowed goes on"
            device.send(mqtt.publish("devices/sensor-2/x", b"x", qos=qos, pid=qos))
            assert device.read_end() == [], "no acknowledgement either"
            assert watcher.read_delivery().payload == b"out"
        closed = world.broker.wait_for_log("the policy denied a PUBLISH")
        assert (closed["event"], closed["client_id"]) == ("closed", "sensor-1")


def test_a_new_policy_takes_live_subscriptions_away_and_says_so(tmp_path: Path, pki: Pki) -> None:
    with process_world(tmp_path, pki) as world:
        device = world.client("sensor-1").subscribed(
            ("fleet/announcements/#", 1), ("devices/sensor-1/commands/#", 1)
        )
        free = world.client("free-1")
        free.send(mqtt.publish("fleet/announcements/x", b"before"))
        assert device.read_delivery().payload == b"before", "the control"
        put_policy(world, NARROW)
        assert "it ended 1 subscriptions" in world.broker.wait_for_log("a new policy is in force")["message"]
        said = world.broker.wait_for_log("keep its subscription")
        assert (said["id"], said["topic"]) == ("sensor-1", "fleet/announcements/#")
        assert said["rule"].endswith("no subscribe entry matches"), "the rule of the new policy that decided"
        free.send(mqtt.publish("fleet/announcements/x", b"after"))
        free.send(mqtt.publish("devices/sensor-1/commands/x", b"still"))
        assert device.read_delivery().payload == b"still"
        device.send(mqtt.subscribe(2, ("fleet/announcements/#", 1)))
        assert device.read() == mqtt.suback(2, 0x80), "nor is an old decision remembered"
        put_policy(world, POLICY_TOML)
        device.subscribed(("fleet/announcements/#", 1), pid=3)


@pytest.mark.parametrize("rules", ["fail_closed = true", "grace_days = 0"])
def test_a_crl_too_old_to_go_by_ends_live_sessions(tmp_path: Path, pki: Pki, rules: str) -> None:
    """As new ones are refused. They are not revoked: a will is sent, and a persistent session is there again."""
    with process_world(tmp_path, pki, broker_toml=f"{BROKER_TOML}[revocation]\n{rules}\n") as world:
        will = ("devices/sensor-1/status", b"out", 1, True)
        device = world.client("sensor-1", clean=False, will=will).subscribed(("devices/sensor-1/commands/#", 1))
        operator = world.operator("alice", (STATUS, 1))
        soon = pki.issuing.crl(number=2, next_update=now() + dt.timedelta(seconds=8))
        replace(tmp_path / "crl.pem", crl_pem(soon))
        world.broker.wait_for_log("CRL 2 from")
        device.ping()
        said = [packet for packet in operator.read_end() if packet.first >> 4 == 3]
        assert device.read_end() == []
        status = GatewayStatus.from_bytes(mqtt.delivery(said[-1]).payload)
        assert status.alarms == ("crl-refusing",), "the operators are told why before they are out as well"
        assert not world.lets_in(world.context("sensor-1"))
        world.broker.wait_for_log("ended 2 connections")

        replace(tmp_path / "crl.pem", crl_pem(pki.issuing.crl(number=3)))
        world.broker.wait_for_log("CRL 3 from")
        assert world.lets_in(world.context("alice", "operator"), "alice")
        late = world.operator("bob", ("devices/sensor-1/status", 0))
        assert late.read_delivery().payload == b"out"
        world.client("sensor-1", clean=False, present=True).ping()
        assert list(world.status().alarms) == []
        assert world.status().counters["unchecked_closed"] == 2


def test_within_the_grace_live_sessions_go_on_under_an_alarm(tmp_path: Path, pki: Pki) -> None:
    expired = pki.issuing.crl(number=1, next_update=now() - dt.timedelta(seconds=1))
    with process_world(tmp_path, pki, crl=expired) as world:
        device = world.client("sensor-1")
        assert world.status().alarms == ("crl-expired",)
        assert world.broker.wait_for_log("ALARM crl-expired")["code"] == "crl-expired"
        device.ping()


def test_past_half_its_life_a_crl_is_an_alarm_on_the_status(tmp_path: Path, pki: Pki) -> None:
    """It is retained: an operator who comes later reads it too."""
    began, ends = now() - dt.timedelta(minutes=20), now() + dt.timedelta(minutes=10)
    old = pki.issuing.crl(number=2, this_update=began, next_update=ends)
    with process_world(tmp_path, pki) as world:
        operator = world.operator("alice", (STATUS, 0))
        status = GatewayStatus.from_bytes(operator.read_delivery().payload)
        assert list(status.alarms) == [], "the control: not yet"
        replace(tmp_path / "crl.pem", crl_pem(old))
        while not status.alarms:
            status = GatewayStatus.from_bytes(operator.read_delivery().payload)
        assert status.alarms == ("crl-due",)
        late = world.operator("bob", (STATUS, 0)).read_delivery()
        assert late.retain
        assert GatewayStatus.from_bytes(late.payload).counters["alarms"] == 1
        world.broker.wait_for_log("ALARM crl-due")
