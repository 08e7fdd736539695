"""What is retained and found no room in a spool: above it is right all the same, once there is room."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from support.loopback_proxy import LoopbackProxy
from support.mqtt_gateway import RunningGateway, running_gateway
from support.upstreams import linked, publish, said, upstream_of, wait_until_up

from birthmark.broker.config import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.mqtt_client import RawClient
    from support.pki import Pki

NOBODY = 1
"""A port on which nobody listens."""
STATUS = "devices/sensor-1/status"
MODE = "devices/sensor-1/telemetry/mode"
TOPIC = "devices/sensor-1/telemetry/t"
SPOOL = 16


@contextmanager
def behind_a_proxy(
    above: RunningGateway, tmp_path: Path, pki: Pki, limits: Limits | None = None, **changes: Any
) -> Iterator[tuple[RunningGateway, LoopbackProxy]]:
    """A gateway that is up, with a small spool."""
    with LoopbackProxy(above.port) as proxy:
        values = linked(tmp_path, pki, proxy.port, spool_messages=SPOOL, **changes)
        with running_gateway(tmp_path, pki, limits=limits or Limits(), **values) as gateway:
            wait_until_up(gateway)
            yield gateway, proxy


def bring_down(gateway: RunningGateway, proxy: LoopbackProxy) -> None:
    upstream = upstream_of(gateway)
    gateway.wait_for(lambda: not upstream.spool.session.waiting_count, "acknowledged")
    proxy.target_port = NOBODY
    proxy.cut_all()
    gateway.wait_for(lambda: upstream.link is None, "down")


def fill(device: RawClient) -> list[tuple[str, bytes, int, bool]]:
    for number in range(1, SPOOL + 1):
        publish(device, TOPIC, b"%d" % number, pid=number)
    return [(TOPIC, b"%d" % number, 1, False) for number in range(1, SPOOL + 1)]


def is_retained_alone(above: RunningGateway, topic: str, payload: bytes) -> bool:
    """Whether a client that comes now is told of this, and of no other state."""
    late = above.client("bob", "operator").subscribed((STATUS, 1), (MODE, 1))
    found = said(late, 1)
    late.ping()  # nothing else comes before its answer
    return found == [(topic, payload, 1, True)]


@pytest.mark.parametrize("prefix", ["", "sites/berlin/"])
@pytest.mark.parametrize("spool_full", ["drop_oldest", "drop_newest"])
def test_a_state_that_was_dropped_goes_up_as_it_is_by_then_once(
    above: RunningGateway, tmp_path: Path, pki: Pki, spool_full: str, prefix: str
) -> None:
    free = above.client("free-1").subscribed(("#", 1))
    with behind_a_proxy(above, tmp_path, pki, spool_full=spool_full, prefix=prefix) as (gateway, proxy):
        device, beside = gateway.client(), gateway.client("sensor-2")
        publish(beside, "devices/sensor-2/status", b"online", retain=True)
        for topic in (STATUS, MODE):
            publish(device, topic, b"on", retain=True)
        assert [payload for _, payload, _, _ in said(free, 3)] == [b"online", b"on", b"on"]
        bring_down(gateway, proxy)

        def change() -> None:
            publish(device, STATUS, b"about to go", retain=True)
            publish(device, MODE, b"", retain=True)
            publish(device, STATUS, b"gone", retain=True)

        if spool_full == "drop_oldest":
            change()
            expected = fill(device)
        else:
            expected = fill(device)
            change()
        assert upstream_of(gateway).spool.dropped == 3
        proxy.target_port = above.port
        found = [(topic.removeprefix(prefix), *rest) for topic, *rest in said(free, SPOOL + 2)]
        assert found[:SPOOL] == expected
        assert sorted(found[SPOOL:]) == [(STATUS, b"gone", 1, False), (MODE, b"", 1, False)]
        # Nothing of it comes twice, and what was not dropped does not come again, over another connection either.
        bring_down(gateway, proxy)
        proxy.target_port = above.port
        publish(device, TOPIC, b"last")
        assert said(free, 1) == [(prefix + TOPIC, b"last", 1, False)]
    if not prefix:
        assert is_retained_alone(above, STATUS, b"gone")


def test_a_newer_state_that_waits_is_not_said_twice(above: RunningGateway, tmp_path: Path, pki: Pki) -> None:
    operator = above.client("alice", "operator").subscribed(("devices/#", 1))
    with behind_a_proxy(above, tmp_path, pki, spool_full="drop_oldest") as (gateway, proxy):
        device = gateway.client()
        bring_down(gateway, proxy)
        publish(device, STATUS, b"on", retain=True)
        expected = fill(device)
        publish(device, STATUS, b"off", retain=True)
        proxy.target_port = above.port
        assert said(operator, SPOOL) == [*expected[1:], (STATUS, b"off", 1, False)]
        publish(device, TOPIC, b"last")
        assert said(operator, 1) == [(TOPIC, b"last", 1, False)]


def test_a_will_that_found_no_room_is_above_when_there_is(above: RunningGateway, tmp_path: Path, pki: Pki) -> None:
    operator = above.client("alice", "operator").subscribed(("devices/#", 1))
    with behind_a_proxy(above, tmp_path, pki, up=["devices/#"], down=[]) as (gateway, proxy):
        device = gateway.client(will=(STATUS, b"offline", 1, True))
        bring_down(gateway, proxy)
        publish(device, STATUS, b"online", retain=True)
        for number in range(2, SPOOL + 1):
            # One message each, so that nobody is stopped before the spool is full.
            publish(gateway.client(f"sensor-{number}"), f"devices/sensor-{number}/telemetry/t", b"x")
        device.close()
        spool = upstream_of(gateway).spool
        gateway.wait_for(lambda: spool.dropped == 1, "the will finds no room")
        proxy.target_port = above.port
        found = said(operator, SPOOL + 1)
        assert [found[0], found[-1]] == [(STATUS, b"online", 1, False), (STATUS, b"offline", 1, False)]
    assert is_retained_alone(above, STATUS, b"offline")


def test_it_is_above_after_a_restart_too_once(above: RunningGateway, tmp_path: Path, pki: Pki) -> None:
    operator = above.client("alice", "operator").subscribed(("devices/#", 1))
    with behind_a_proxy(above, tmp_path, pki, spool_full="drop_newest") as (gateway, proxy):
        device = gateway.client()
        publish(device, STATUS, b"online", retain=True)
        assert said(operator, 1) == [(STATUS, b"online", 1, False)]
        bring_down(gateway, proxy)
        expected = fill(device)
        publish(device, STATUS, b"offline", retain=True)
    with behind_a_proxy(above, tmp_path, pki, spool_full="drop_newest") as (gateway, proxy):
        assert said(operator, SPOOL + 1) == [*expected, (STATUS, b"offline", 1, False)]
        bring_down(gateway, proxy)
    with behind_a_proxy(above, tmp_path, pki, spool_full="drop_newest") as (gateway, _proxy):
        publish(gateway.client(), TOPIC, b"last")
        assert said(operator, 1) == [(TOPIC, b"last", 1, False)]


def test_a_state_that_came_down_meanwhile_is_not_taken_back(
    above: RunningGateway, tmp_path: Path, pki: Pki
) -> None:
    operator = above.client("alice", "operator").subscribed(("devices/#", 1))
    with behind_a_proxy(above, tmp_path, pki, spool_full="drop_newest") as (gateway, proxy):
        device = gateway.client()
        bring_down(gateway, proxy)
        expected = fill(device)
        publish(device, STATUS, b"offline", retain=True)
        upstream = upstream_of(gateway)
        gateway.call(
            gateway.broker.exchange.publish,
            STATUS,
            b"online elsewhere",
            1,
            retain=True,
            publisher=upstream.spool.peer,
        )
        proxy.target_port = above.port
        assert said(operator, SPOOL) == expected
        publish(device, TOPIC, b"last")
        assert said(operator, 1) == [(TOPIC, b"last", 1, False)]


def test_what_is_owed_is_bounded_and_what_is_retained_stays_owed(
    above: RunningGateway, tmp_path: Path, pki: Pki
) -> None:
    operator = above.client("alice", "operator").subscribed(("devices/#", 1))
    bounds = Limits(max_retained_bytes=16_384)
    values: dict[str, Any] = {"spool_full": "drop_newest", "spool_bytes": 65_536, "limits": bounds}
    with behind_a_proxy(above, tmp_path, pki, **values) as (gateway, proxy):
        device = gateway.client()
        bring_down(gateway, proxy)
        fill(device)
        publish(device, STATUS, b"offline", retain=True)
        spool = upstream_of(gateway).spool
        # So many states come and go while there is no room that not all of them can be remembered.
        for number in range(1, 401):
            for payload in (b"x", b""):
                publish(device, f"{TOPIC}/{number}", payload, pid=number, retain=True)
        assert spool._owed_bytes <= bounds.max_retained_bytes + 65_536
        owed = len(spool.session.replay)
        assert owed < 400
        proxy.target_port = above.port
        assert (STATUS, b"offline", 1, False) in said(operator, SPOOL + owed)[SPOOL:]
        gateway.wait_for(lambda: not spool.session.waiting_count, "acknowledged")
        assert (spool._owed, spool._owed_bytes) == (set(), 0)
