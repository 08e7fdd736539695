"""What waits to go up: in order, over restarts, bounded, with the policy that was chosen when it is full."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from support import mqtt_client as mqtt
from support.loopback_proxy import LoopbackProxy
from support.mqtt_client import ConnectionEndedError
from support.mqtt_gateway import RunningGateway, running_gateway
from support.upstreams import DOWN, linked, publish, said, upstream_of, upstream_toml, upstreams, wait_until_up

from birthmark.broker.config import Durability
from birthmark.broker.store import FILE_NAME, Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.pki import Pki

NOBODY = 1
"""A port on which nobody listens."""
TOPIC = "devices/sensor-1/telemetry/t"


@contextmanager
def spooling(tmp_path: Path, pki: Pki, **changes: Any) -> Iterator[tuple[RunningGateway, LoopbackProxy]]:
    """A gateway whose upstream is behind a proxy that leads nowhere yet."""
    with (
        LoopbackProxy(NOBODY) as proxy,
        running_gateway(tmp_path, pki, **linked(tmp_path, pki, proxy.port, **changes)) as gateway,
    ):
        yield gateway, proxy


def numbers(first: int, last: int) -> list[tuple[str, bytes, int, bool]]:
    return [(TOPIC, b"%d" % number, 1, False) for number in range(first, last + 1)]


def test_what_was_published_meanwhile_goes_up_in_order_over_a_restart(
    above: RunningGateway, tmp_path: Path, pki: Pki
) -> None:
    operator = above.client("alice", "operator").subscribed(("devices/#", 1))
    values = linked(tmp_path, pki, NOBODY, max_inflight=10)
    with running_gateway(tmp_path, pki, **values) as gateway:
        device = gateway.client()
        for number in range(1, 101):
            publish(device, TOPIC, b"%d" % number, pid=number)
        device.send(mqtt.publish(TOPIC, b"of QoS 0"))
        device.ping()
        spool = upstream_of(gateway).spool
        assert (spool.session.waiting_count, spool.dropped) == (100, 1)
    values = linked(tmp_path, pki, above.port, max_inflight=10)
    with running_gateway(tmp_path, pki, **values) as gateway:
        publish(gateway.client(), TOPIC, b"101")
        assert said(operator, 101) == numbers(1, 101)
        spool = upstream_of(gateway).spool
        gateway.wait_for(lambda: not spool.session.waiting_count, "acknowledged")
        assert (spool.forwarded, spool.session.queued_bytes, spool.session.inflight_bytes) == (101, 0, 0)
    with running_gateway(tmp_path, pki, **values) as gateway:
        wait_until_up(gateway)
        assert upstream_of(gateway).spool.session.waiting_count == 0
    operator.ping()


def test_without_durability_it_is_in_memory(above: RunningGateway, tmp_path: Path, pki: Pki) -> None:
    operator = above.client("alice", "operator").subscribed(("devices/#", 1))
    with LoopbackProxy(NOBODY) as proxy:
        values = linked(tmp_path, pki, proxy.port) | {"durability": Durability.NONE}
        with running_gateway(tmp_path, pki, **values) as gateway:
            publish(gateway.client(), TOPIC, b"1")
            proxy.target_port = above.port
            assert said(operator, 1) == numbers(1, 1)


@pytest.mark.parametrize(("spool_full", "kept"), [("drop_oldest", (5, 20)), ("drop_newest", (1, 16))])
def test_what_gives_way_in_a_full_spool(
    above: RunningGateway, tmp_path: Path, pki: Pki, spool_full: str, kept: tuple[int, int]
) -> None:
    operator = above.client("alice", "operator").subscribed(("devices/#", 1))
    with spooling(tmp_path, pki, spool_full=spool_full, spool_messages=16) as (gateway, proxy):
        device = gateway.client()
        for number in range(1, 21):
            publish(device, TOPIC, b"%d" % number, pid=number)
        upstream = upstream_of(gateway)
        assert upstream.spool.dropped == gateway.broker.counters.upstream_dropped == 4
        assert "upstream-spool-full" in [alarm.code for alarm in upstream.alarms(datetime.now(UTC))]
        proxy.target_port = above.port
        assert said(operator, kept[1] - kept[0] + 1) == numbers(*kept)
        gateway.wait_for(lambda: not upstream.spool.is_filling, "room")
        publish(device, TOPIC, b"21")
        assert said(operator, 1) == numbers(21, 21)


def test_a_spool_that_is_full_by_bytes_drops_too(tmp_path: Path, pki: Pki) -> None:
    with spooling(tmp_path, pki, spool_full="drop_newest", spool_bytes=65_536) as (gateway, _proxy):
        device = gateway.client()
        for number in range(1, 9):
            publish(device, TOPIC, b"x" * 10_000, pid=number)
        spool = upstream_of(gateway).spool
        assert (spool.session.waiting_count, spool.dropped) == (6, 2)
        assert spool.session.queued_bytes <= 65_536


def test_hold_stops_those_who_publish_what_should_go_up_and_nobody_else(
    above: RunningGateway, tmp_path: Path, pki: Pki
) -> None:
    operator = above.client("alice", "operator").subscribed(("devices/+/telemetry/#", 1))
    with spooling(tmp_path, pki, spool_messages=16, down=DOWN) as (gateway, proxy):
        device, other = gateway.client(), gateway.client("sensor-2")
        for number in range(1, 15):  # seven eighths of 16
            publish(device, TOPIC, b"%d" % number, pid=number)
        counters = gateway.broker.counters
        assert counters.publishers_held == 1
        device.send(mqtt.publish(TOPIC, b"15", qos=1, pid=15))
        # What does not go up goes on; whoever is stopped still gets what is for it.
        publish(other, "devices/sensor-2/private", b"x")
        with pytest.raises(TimeoutError):
            device.read(0.2)
        proxy.target_port = above.port
        assert device.read() == mqtt.Packet(0x40, b"\x00\x0f")
        assert said(operator, 15) == numbers(1, 15)
        assert upstream_of(gateway).spool.dropped == 0
        publish(device, TOPIC, b"16", pid=16)
        assert said(operator, 1) == numbers(16, 16)


def test_hold_loses_nothing_of_a_burst_that_is_larger_than_the_spool(
    above: RunningGateway, tmp_path: Path, pki: Pki
) -> None:
    operator = above.client("alice", "operator").subscribed(("devices/+/telemetry/#", 1))
    with spooling(tmp_path, pki, spool_messages=16) as (gateway, proxy):
        device = gateway.client()
        device.send(b"".join(mqtt.publish(TOPIC, b"%d" % number, qos=1, pid=number) for number in range(1, 41)))
        acknowledged = len(device.read_end())
        # They came in one read, so all of them were looked at; the one that found no room ended the connection.
        assert acknowledged <= 16
        spool = upstream_of(gateway).spool
        assert (spool.session.waiting_count, spool.dropped) == (16, 0)
        proxy.target_port = above.port
        assert said(operator, 16) == numbers(1, 16)
        gateway.wait_for(lambda: not spool.is_filling, "room")
        again = gateway.client()
        again.send(b"".join(mqtt.publish(TOPIC, b"%d" % number, qos=1, pid=number) for number in range(17, 31)))
        assert said(operator, 14) == numbers(17, 30)
        assert spool.dropped == 0


def test_hold_cuts_off_who_comes_again_with_more_and_drops_what_nobody_can_be_asked_to_keep(
    above: RunningGateway, tmp_path: Path, pki: Pki
) -> None:
    operator = above.client("alice", "operator").subscribed(("devices/+/telemetry/#", 1))
    with spooling(tmp_path, pki, spool_messages=16, up=["devices/#"], down=[]) as (gateway, proxy):
        for number in range(1, 17):
            # One message each, so that nobody is stopped before the spool is full.
            client = gateway.client(f"sensor-{number}")
            publish(client, f"devices/sensor-{number}/telemetry/t", b"%d" % number)
        last = gateway.client("sensor-17", will=("devices/sensor-17/status", b"offline", 1, True))
        last.send(mqtt.publish("devices/sensor-17/telemetry/t", b"17", qos=1, pid=1))
        with pytest.raises(ConnectionEndedError):
            last.read()
        spool = upstream_of(gateway).spool
        gateway.wait_for(lambda: spool.dropped == 1, "its will finds no room")
        assert spool.session.waiting_count == 16
        proxy.target_port = above.port
        assert [payload for _, payload, _, _ in said(operator, 16)] == [b"%d" % number for number in range(1, 17)]
        gateway.wait_for(lambda: not spool.is_filling, "room")
        again = gateway.client("sensor-17")
        publish(again, "devices/sensor-17/telemetry/t", b"17")
        assert [payload for _, payload, _, _ in said(operator, 1)] == [b"17"]


def test_hold_acknowledges_nothing_that_finds_no_room_at_one_of_two_upstreams(tmp_path: Path, pki: Pki) -> None:
    values = linked(tmp_path, pki, NOBODY)
    tables = (
        upstream_toml("gw-1", NOBODY, spool_messages=16, down=[], down_shared=[]),
        upstream_toml("gw-1", NOBODY, name="roomy", down=[], down_shared=[]),
    )
    with running_gateway(tmp_path, pki, **values | {"upstreams": upstreams(tmp_path, *tables)}) as gateway:
        for number in range(1, 17):
            publish(gateway.client(f"sensor-{number}"), f"devices/sensor-{number}/telemetry/t", b"x")
        last = gateway.client("sensor-17")
        last.send(mqtt.publish("devices/sensor-17/telemetry/t", b"x", qos=1, pid=1))
        with pytest.raises(ConnectionEndedError):
            last.read()
        spools = [upstream_of(gateway, name).spool for name in ("cloud", "roomy")]
        assert [(spool.session.waiting_count, spool.dropped) for spool in spools] == [(16, 0), (16, 0)]


def test_the_spool_of_an_upstream_that_is_taken_out_waits_for_its_return(
    above: RunningGateway, tmp_path: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, NOBODY)) as gateway:
        publish(gateway.client(), TOPIC, b"1")
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, NOBODY)):
        pass
    assert left_at(tmp_path) is None, "it counts as gone only when it is not in the settings"
    with running_gateway(tmp_path, pki) as gateway:
        assert "1 messages wait for the upstream cloud, which is not in broker.toml any more" in caplog.text
        gateway.call(gateway.broker.forget_expired_sessions)
    assert left_at(tmp_path) is not None
    operator = above.client("alice", "operator").subscribed(("devices/#", 1))
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port)) as gateway:
        assert said(operator, 1) == numbers(1, 1)
        gateway.wait_for(lambda: not upstream_of(gateway).spool.session.waiting_count, "acknowledged")


def left_at(folder: Path) -> float | None:
    store = Store.open(folder / "data" / FILE_NAME)
    try:
        return next(row.left_at for row in store.load().sessions if row.client_id == "$upstream/cloud")
    finally:
        store.close()


def test_and_not_for_ever(tmp_path: Path, pki: Pki) -> None:
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, NOBODY)) as gateway:
        publish(gateway.client(), TOPIC, b"1")
    with running_gateway(tmp_path, pki) as gateway:
        gateway.call(gateway.broker.upstreams.forget_orphans, float("inf"))
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, NOBODY)) as gateway:
        assert upstream_of(gateway).spool.session.waiting_count == 0
