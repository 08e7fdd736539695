"""What is acknowledged across a link waits for the gateway's disk, both ways. The disk here waits for the test."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.mqtt_gateway import RunningGateway, running_gateway
from support.patience import PATIENCE_S
from support.upstreams import linked, publish, said, upstream_of, wait_until_up

from birthmark.broker.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from support.pki import Pki

    from birthmark.broker.records import Changes

SILENCE_S = 0.2
TOPIC, COMMAND = "devices/sensor-1/telemetry/t", "devices/sensor-1/commands/c"


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Of the gateway, not of the broker above: nothing is written while it is not set."""
    turns, apply = threading.Event(), Store.apply
    turns.set()

    def wait_and_apply(store: Store, changes: Changes) -> None:
        if store.path.parent == tmp_path / "data":
            assert turns.wait(PATIENCE_S)
        apply(store, changes)

    monkeypatch.setattr(Store, "apply", wait_and_apply)
    return turns


def test_a_publishers_puback_waits_for_the_spool(
    above: RunningGateway, tmp_path: Path, pki: Pki, disk: threading.Event
) -> None:
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, 1)) as gateway:
        device = gateway.client()
        publish(device, TOPIC, b"1")
        disk.clear()
        try:
            device.send(mqtt.publish(TOPIC, b"2", qos=1, pid=2))
            with pytest.raises(TimeoutError):
                device.read(SILENCE_S)
            other = gateway.client("sensor-2")
            publish(other, "devices/sensor-2/private", b"owed to nobody")
        finally:
            disk.set()
        assert device.read() == mqtt.Packet(0x40, b"\x00\x02")


def test_the_upstreams_puback_waits_for_those_who_are_away(
    above: RunningGateway, tmp_path: Path, pki: Pki, disk: threading.Event
) -> None:
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port)) as gateway:
        wait_until_up(gateway)
        away = gateway.client(clean=False).subscribed(("devices/sensor-1/commands/#", 1))
        away.send(mqtt.DISCONNECT)
        away.read_end()
        session = above.broker.exchange.sessions.get("gw-1")
        assert session is not None
        operator = above.client("alice", "operator")
        disk.clear()
        try:
            publish(operator, COMMAND, b"x")
            received = gateway.broker.counters
            gateway.wait_for(lambda: received.upstream_received == 1, "it has come")
            pings = above.client("free-1")
            with pytest.raises(TimeoutError):
                pings.read(SILENCE_S)
            assert session.inflight_out_count == 1, "it was acknowledged before it was on disk"
        finally:
            disk.set()
        above.wait_for(lambda: not session.inflight_out_count, "acknowledged")
        back = gateway.client(clean=False, present=True)
        assert said(back, 1) == [(COMMAND, b"x", 1, False)]


def test_what_the_upstream_has_acknowledged_is_not_sent_again_after_a_restart(
    above: RunningGateway, tmp_path: Path, pki: Pki
) -> None:
    operator = above.client("alice", "operator").subscribed(("devices/#", 1))
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port)) as gateway:
        device = gateway.client()
        for number in range(50):
            publish(device, TOPIC, b"%d" % number, pid=number + 1)
        assert len(said(operator, 50)) == 50
        gateway.wait_for(lambda: not upstream_of(gateway).spool.session.waiting_count, "acknowledged")
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port)) as gateway:
        wait_until_up(gateway)
        publish(gateway.client(), TOPIC, b"next")
        assert said(operator, 1) == [(TOPIC, b"next", 1, False)]


def test_a_message_for_here_and_above_is_stored_once(tmp_path: Path, pki: Pki) -> None:
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, 1)) as gateway:
        away = gateway.client("free-1", clean=False).subscribed(("devices/#", 1))
        away.send(mqtt.DISCONNECT)
        away.read_end()
        publish(gateway.client(), TOPIC, b"shared")
        publish(gateway.client(), TOPIC, b"kept", retain=True, pid=2)
    store = Store.open(tmp_path / "data" / "sessions.db")
    try:
        stored = store.load()
    finally:
        store.close()
    # One of the retained message goes up with the flag, which a session of old does not get (§3.3.1-9).
    assert sorted((row.payload, row.retain) for row in stored.messages) == [
        (b"kept", False),
        (b"kept", True),
        (b"shared", False),
    ]
    assert len(stored.deliveries) == 4
