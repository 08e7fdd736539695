"""What one client may use of the gateway, beside all others: rate, queue, retained messages, connections."""

from __future__ import annotations

import dataclasses
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import mqtt_client as mqtt
from support.mqtt_client import ConnectionEndedError, Packet
from support.mqtt_gateway import running_gateway
from support.repository import ROOT

from birthmark.broker.config import Limits, QueueFull
from birthmark.broker.listener import place_of
from birthmark.broker.peer import Peer, upstream_peer
from birthmark.broker.rate import MAX_METERS, Meters, TokenBucket
from birthmark.broker.retained import Retained, RetainedStore
from birthmark.device.identity import DeviceId, Role

if TYPE_CHECKING:
    from pathlib import Path

    from support.mqtt_client import RawClient
    from support.pki import Pki

WHEN = datetime(2026, 1, 1, tzinfo=UTC)


def peer(name: str) -> Peer:
    return Peer(
        DeviceId(name),
        Role("device"),
        is_service=False,
        issuer="a",
        cert_serial=1,
        not_before=WHEN,
        not_after=WHEN,
    )


def say(client: RawClient, topic: str, payload: bytes, pid: int = 1, *, retain: bool = False) -> None:
    client.send(mqtt.publish(topic, payload, qos=1, retain=retain, pid=pid))
    assert client.read() == Packet(0x40, pid.to_bytes(2, "big"))


def test_the_page_says_every_limit_and_its_default() -> None:
    said: dict[str, str] = {}
    for line in (ROOT / "docs/broker-delivery.md").read_text().partition("## Limits")[2].splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        names = re.findall(r"`([a-z_]+)`", cells[1]) if len(cells) > 3 else []
        defaults = re.findall(r'"?([\w.]+)"?', re.sub(r"\(.*", "", cells[2]).replace("`", "")) if names else []
        said.update(zip(names, defaults * len(names) if len(defaults) == 1 else defaults, strict=True))
    actual = {field.name: getattr(Limits(), field.name) for field in dataclasses.fields(Limits)}
    assert said == {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in actual.items()}


# --- rates ---------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 1_000),
    st.lists(st.tuples(st.floats(0, 5), st.integers(0, 3_000)), min_size=1, max_size=40),
)
def test_whoever_waits_as_told_never_exceeds_the_rate(rate: int, steps: list[tuple[float, int]]) -> None:
    """Over any span: at most a second's worth, what the time brings, and the one chunk that was read already."""
    bucket, now_s = TokenBucket(rate, 0.0), 0.0
    taken: list[tuple[float, int]] = []
    for pause_s, count in steps:
        now_s += pause_s
        delay_s = bucket.take(count, now_s)
        taken.append((now_s, count))
        for begin, (since_s, _) in enumerate(taken):
            span = taken[begin:]
            allowed = rate + (now_s - since_s) * rate + span[-1][1]
            assert sum(count for _, count in span) <= allowed + 1e-3
        now_s += delay_s


def test_no_rate_is_no_limit() -> None:
    assert TokenBucket(0, 0.0).take(10**9, 0.0) == 0
    assert Meters(0, 0).of("a", 0.0) is None


def test_an_identity_has_one_meter_and_idle_ones_are_forgotten() -> None:
    meters = Meters(10, 0)
    first = meters.of("a", 0.0)
    assert first is not None
    assert first.take(20, 0, 0.0) == pytest.approx(1)
    assert meters.of("a", 0.5) is first
    for number in range(2 * MAX_METERS):
        meters.of(f"b{number}", 0.5)
    assert meters.of("a", 0.5) is first, "it has not made good"
    assert len(meters) <= 2 * MAX_METERS
    for number in range(MAX_METERS):
        meters.of(f"c{number}", 100.0)
    assert len(meters) <= MAX_METERS


@pytest.mark.parametrize("limits", [Limits(max_messages_per_s=50), Limits(max_bytes_per_s=20_000)])
def test_a_client_that_is_too_fast_is_slowed_down_and_loses_nothing(
    tmp_path: Path, pki: Pki, limits: Limits
) -> None:
    with running_gateway(tmp_path, pki, limits=limits) as gateway:
        subscriber = gateway.client("free-1").subscribed(("t", 0))
        fast = gateway.client("free-2")
        fast.send(mqtt.publish("t", bytes(380)) * 100)
        gateway.wait_for(lambda: gateway.broker.counters.rate_limited == 1, "it is not read from")
        fast.send(mqtt.PINGREQ)
        with pytest.raises(TimeoutError):
            fast.read(0.1)
        gateway.client("free-3").ping()
        for _ in range(100):
            assert len(subscriber.read_delivery().payload) == 380
        assert fast.read() == mqtt.PINGRESP


def test_connecting_again_brings_no_fresh_budget(tmp_path: Path, pki: Pki) -> None:
    with running_gateway(tmp_path, pki, limits=Limits(max_messages_per_s=10)) as gateway:
        gateway.client("free-2").send(mqtt.publish("t") * 20)
        gateway.wait_for(lambda: gateway.broker.counters.rate_limited == 1, "it is slowed down")
        again = gateway.client("free-2")
        again.send(mqtt.publish("t"))
        gateway.wait_for(lambda: gateway.broker.counters.rate_limited >= 2, "so is its next connection")


# --- queues --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (QueueFull.DROP_OLDEST, [b"3", b"4", b"5"]),
        (QueueFull.DROP_NEWEST, [b"0", b"1", b"2"]),
        (QueueFull.DISCONNECT, [b"0", b"1", b"2"]),
    ],
)
def test_what_gives_way_in_a_full_queue(tmp_path: Path, pki: Pki, policy: QueueFull, kept: list[bytes]) -> None:
    limits = Limits(max_queued_messages=3, queue_full=policy)
    with running_gateway(tmp_path, pki, limits=limits) as gateway:
        gateway.client("free-1", clean=False).subscribed(("t", 1)).close()
        gateway.wait_for(lambda: gateway.broker.connected_count == 0, "it has gone")
        publisher = gateway.client("free-2")
        for number in range(6):
            say(publisher, "t", b"%d" % number)
        assert gateway.broker.counters.dropped_queue_full == 3
        back = gateway.client("free-1", clean=False, present=True)
        assert [back.read_delivery().payload for _ in range(3)] == kept
        back.ping()
        assert gateway.broker.exchange.outbound.queued_bytes == 0


def test_a_client_that_does_not_keep_up_is_disconnected_if_so_wished(tmp_path: Path, pki: Pki) -> None:
    limits = Limits(max_inflight=1, max_queued_messages=2, queue_full=QueueFull.DISCONNECT)
    with running_gateway(tmp_path, pki, limits=limits) as gateway:
        slow = gateway.client("free-1", clean=False).subscribed(("t", 1))
        publisher = gateway.client("free-2")
        for number in range(4):
            say(publisher, "t", b"%d" % number)
        assert len(slow.read_end()) == 1
        assert gateway.broker.counters.fell_behind == 1
        back = gateway.client("free-1", clean=False, present=True)
        for number in range(3):
            message = back.read_delivery()
            assert message.payload == b"%d" % number
            back.send(mqtt.puback(message.packet_id))
        back.ping()


def test_all_queues_together_are_bounded(tmp_path: Path, pki: Pki) -> None:
    limits = Limits(max_queued_bytes_total=50_000)
    with running_gateway(tmp_path, pki, limits=limits) as gateway:
        for number in range(3):
            gateway.client(f"free-{number}", clean=False).subscribed(("t", 1)).close()
        gateway.wait_for(lambda: gateway.broker.connected_count == 0, "they have gone")
        publisher = gateway.client("free-9")
        for _ in range(10):
            say(publisher, "t", bytes(10_000))
        exchange = gateway.broker.exchange
        assert exchange.outbound.queued_bytes <= 50_000
        assert exchange.outbound.queued_bytes == sum(session.queued_bytes for session in exchange.sessions)
        for number in range(3):
            gateway.client(f"free-{number}", clean=True)
        assert exchange.outbound.queued_bytes == 0


# --- retained messages ---------------------------------------------------------------------------------------


def test_retained_messages_of_one_client_are_bounded(tmp_path: Path, pki: Pki) -> None:
    with running_gateway(tmp_path, pki, limits=Limits(max_retained_messages_per_client=2)) as gateway:
        one, other = gateway.client("free-1"), gateway.client("free-2")
        for topic in ("a", "b", "c"):
            say(one, topic, b"x", retain=True)
        say(other, "d", b"x", retain=True)
        assert gateway.broker.counters.not_retained == 1
        reader = gateway.client("free-3").subscribed(("#", 0))
        assert {reader.read_delivery().topic for _ in range(3)} == {"a", "b", "d"}
        reader.ping()


def test_who_speaks_for_many_has_half_of_the_store() -> None:
    store = RetainedStore(10, 1_000_000, 2)
    below = dataclasses.replace(peer("gw-1"), role=Role("service-gateway"), is_service=True)
    for publisher in (upstream_peer(DeviceId("cloud")), upstream_peer(DeviceId("far")), below):
        for number in range(3):
            store.put(Retained(f"{publisher.device_id}/{number}", b"x", 1, publisher))
    assert sorted(message.topic for message in store) == [
        *("cloud/0", "cloud/1", "cloud/2", "far/0", "far/1"),  # all that is above has one share
        *("gw-1/0", "gw-1/1", "gw-1/2"),
    ]
    assert store.put(Retained("own", b"x", 1, None))
    assert store.put(Retained("here", b"x", 1, peer("sensor-1")))
    small = RetainedStore(10, 5_000, 2, 600)
    big = Retained("a", bytes(1_900), 1, below)
    assert small.put(big)
    assert not small.put(Retained("b", b"x", 1, below)), "half of its bytes"
    assert not small.put(Retained("c", bytes(2_000), 1, peer("sensor-1")))


@given(
    st.lists(
        st.tuples(st.sampled_from(["s-1", "s-2", ""]), st.sampled_from("abcd"), st.integers(0, 40)), max_size=60
    )
)
def test_nobody_has_more_than_a_share(steps: list[tuple[str, str, int]]) -> None:
    store = RetainedStore(100, 1_000_000, 2, 1_600)
    model: dict[str, tuple[str, int]] = {}
    for name, topic, length in steps:
        message = Retained(topic, bytes(length), 1, peer(name) if name else None)
        if store.put(message):
            model.pop(topic, None)
            if length:
                model[topic] = (name, message.size_bytes)
        for owner in ("s-1", "s-2"):
            sizes = [size for of, size in model.values() if of == owner]
            assert len(sizes) <= 2
            assert sum(sizes) <= 1_600
    assert {message.topic for message in store} == set(model)
    for topic in "abcd":
        assert store.put(Retained(topic, b"", 0, None))
    assert store._shares == {}


# --- connections ---------------------------------------------------------------------------------------------


def test_one_address_does_not_take_all_connections(tmp_path: Path, pki: Pki) -> None:
    with running_gateway(tmp_path, pki, limits=Limits(max_connections_per_address=2)) as gateway:
        first = gateway.client("free-1")
        gateway.client("free-2")
        with pytest.raises((OSError, ConnectionEndedError)):
            gateway.client("free-3")
        assert gateway.broker.counters.address_refused == 1
        first.close()
        gateway.wait_for(lambda: len(gateway.broker._connections) == 1, "it has gone")
        gateway.client("free-3").ping()


def test_an_ipv6_network_is_one_place() -> None:
    assert place_of("192.0.2.7:50112") == "192.0.2.7"
    assert place_of("[2001:db8::7]:1") == place_of("[2001:db8::8:1]:2") == "2001:db8::/64"
    assert place_of("[fe80::1%eth0]:1") == "fe80::/64"
