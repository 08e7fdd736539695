"""A gateway linked to another real birthmark-broker: what goes up, what comes down, and under which names."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.mqtt_gateway import RunningGateway, running_gateway
from support.ports import steady_port
from support.upstreams import (
    linked,
    publish,
    said,
    speaking,
    upstream_of,
    upstream_toml,
    upstreams,
    wait_until_up,
    write_credentials,
)

from birthmark.broker.config import Limits

if TYPE_CHECKING:
    import ssl
    from pathlib import Path

    from support.pki import Pki


def test_what_is_chosen_goes_up_and_comes_down(above: RunningGateway, tmp_path: Path, pki: Pki) -> None:
    operator = above.client("alice", "operator").subscribed(("devices/#", 1))
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port)) as gateway:
        wait_until_up(gateway)
        device = gateway.client().subscribed(("devices/sensor-1/commands/#", 1), ("fleet/announcements/#", 1))
        publish(device, "devices/sensor-1/telemetry/t", b"21")
        publish(device, "devices/sensor-1/private", b"x")
        publish(device, "devices/sensor-1/status", b"online")
        assert said(operator, 2) == [
            ("devices/sensor-1/telemetry/t", b"21", 1, False),
            ("devices/sensor-1/status", b"online", 1, False),
        ]
        operator.send(mqtt.publish("devices/sensor-1/commands/reboot", b"now", qos=1, pid=1))
        operator.send(mqtt.publish("fleet/announcements/tea", b"4pm", qos=2, pid=2))
        operator.send(mqtt.publish("devices/sensor-1/commands/blink", b""))
        assert said(device, 3) == [
            ("devices/sensor-1/commands/reboot", b"now", 1, False),
            ("fleet/announcements/tea", b"4pm", 1, False),
            ("devices/sensor-1/commands/blink", b"", 0, False),
        ]


def test_a_prefix_is_put_before_and_taken_off(above: RunningGateway, tmp_path: Path, pki: Pki) -> None:
    free = above.client("free-1").subscribed(("sites/#", 1))
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port, prefix="sites/berlin/")) as gateway:
        wait_until_up(gateway)
        device = gateway.client().subscribed(("devices/sensor-1/commands/#", 1), ("fleet/announcements/#", 1))
        beside = gateway.client("free-2", clean=False).subscribed(("#", 1))
        publish(device, "devices/sensor-1/telemetry/t", b"21")
        assert said(beside, 1) == [("devices/sensor-1/telemetry/t", b"21", 1, False)]
        assert said(free, 1) == [("sites/berlin/devices/sensor-1/telemetry/t", b"21", 1, False)]
        for topic in (
            "devices/sensor-1/commands/a",
            "sites/paris/devices/sensor-1/commands/b",
            "sites/berlin/devices/sensor-1/commands/c",
            "sites/berlin/fleet/announcements/d",
            "fleet/announcements/e",
        ):
            free.send(mqtt.publish(topic, b"x"))
        assert [topic for topic, *_ in said(device, 2)] == ["devices/sensor-1/commands/c", "fleet/announcements/e"]


def test_qos_and_retain_go_up_as_they_were(above: RunningGateway, tmp_path: Path, pki: Pki) -> None:
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port, up=["devices/#"], down=[])) as gateway:
        wait_until_up(gateway)
        operator = above.client("alice", "operator").subscribed(("devices/#", 2))
        device = gateway.client()
        device.send(mqtt.publish("devices/sensor-1/a", b"0"))
        device.send(mqtt.publish("devices/sensor-1/b", b"1", qos=1, pid=1))
        device.send(mqtt.publish("devices/sensor-1/c", b"2", qos=2, pid=2))
        device.send(mqtt.publish("devices/sensor-1/d", b"3", retain=True))
        assert [(topic[-1], qos, retain) for topic, _, qos, retain in said(operator, 4)] == [
            ("a", 0, False),
            ("b", 1, False),
            ("c", 1, False),
            ("d", 1, False),
        ]
        late = above.client("bob", "operator").subscribed(("devices/#", 2))
        assert said(late, 1) == [("devices/sensor-1/d", b"3", 1, True)]
        late.ping()


def test_retained_messages_go_up_once_to_an_upstream_that_has_none(
    above: RunningGateway, tmp_path: Path, pki: Pki
) -> None:
    values = linked(tmp_path, pki, above.port)
    with running_gateway(tmp_path, pki) as gateway:
        device = gateway.client()
        for number, topic in enumerate(("status", "telemetry/t", "private"), start=1):
            publish(device, f"devices/sensor-1/{topic}", b"kept", pid=number, retain=True)
    operator = above.client("alice", "operator").subscribed(("devices/#", 1))
    with running_gateway(tmp_path, pki, **values) as gateway:
        assert sorted(said(operator, 2)) == [
            ("devices/sensor-1/status", b"kept", 1, False),
            ("devices/sensor-1/telemetry/t", b"kept", 1, False),
        ]
        upstream = upstream_of(gateway)
        gateway.wait_for(lambda: not upstream.spool.session.waiting_count, "acknowledged")
        gateway.call(upstream.link.cut)  # type: ignore[union-attr]
        gateway.wait_for(lambda: upstream.spool.counters.upstream_lost == 1, "a connection lost")
        wait_until_up(gateway)
        publish(gateway.client(), "devices/sensor-1/telemetry/t", b"next")
        assert said(operator, 1) == [("devices/sensor-1/telemetry/t", b"next", 1, False)]
    with running_gateway(tmp_path, pki, **values) as gateway:
        wait_until_up(gateway)
        publish(gateway.client(), "devices/sensor-1/telemetry/t", b"last")
        assert said(operator, 1) == [("devices/sensor-1/telemetry/t", b"last", 1, False)]
    late = above.client("bob", "operator").subscribed(("devices/+/status", 1))
    assert said(late, 1) == [("devices/sensor-1/status", b"kept", 1, True)]


def test_retained_messages_that_were_going_up_when_the_gateway_stopped_go_up_after_it(
    above: RunningGateway, tmp_path: Path, pki: Pki
) -> None:
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port, up=["other"])) as gateway:
        wait_until_up(gateway)  # from now on it knows our session
        device = gateway.client()
        for number in range(1, 31):
            publish(device, f"devices/sensor-1/telemetry/{number}", b"kept", pid=number, retain=True)

    def take_and_say_nothing(peer: ssl.SSLSocket) -> None:
        peer.recv(4_096)
        peer.sendall(b"\x20\x02\x01\x00")  # accepted, session present
        peer.recv(65_536)

    with speaking(tmp_path, pki, take_and_say_nothing) as port:
        values = linked(tmp_path, pki, port, max_inflight=4)
        with running_gateway(tmp_path, pki, **values) as gateway:
            upstream = upstream_of(gateway)
            gateway.wait_for(lambda: len(upstream.spool.session.inflight) == 4, "the first are on their way")
    operator = above.client("alice", "operator").subscribed(("devices/#", 1))
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port, max_inflight=4)) as gateway:
        arrived: set[str] = set()
        while len(arrived) < 30:
            arrived |= {topic for topic, *_ in said(operator, 1)}
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port)) as gateway:
        wait_until_up(gateway)
        publish(gateway.client(), "devices/sensor-1/telemetry/t", b"last")
        while said(operator, 1)[0][1] != b"last":
            pass  # of the four that were on their way, some may come twice


def test_presence_is_right_above(above: RunningGateway, tmp_path: Path, pki: Pki) -> None:
    operator = above.client("alice", "operator").subscribed(("devices/+/status", 1))
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port)) as gateway:
        wait_until_up(gateway)
        issued = pki.device("sensor-1")
        device = gateway.open(gateway.context_of(issued))
        device.handshake(mqtt.connect("sensor-1", will=("devices/sensor-1/status", b"offline", 1, True)))
        publish(device, "devices/sensor-1/status", b"online", retain=True)
        assert said(operator, 1) == [("devices/sensor-1/status", b"online", 1, False)]
        device.close()
        assert said(operator, 1) == [("devices/sensor-1/status", b"offline", 1, False)]
        # A revocation takes it back here, and above.
        gateway.call(gateway.broker.close_identities, lambda peer: peer.cert_serial == issued.cert_serial)
        assert said(operator, 1) == [("devices/sensor-1/status", b"", 1, False)]
    above.client("bob", "operator").subscribed(("devices/+/status", 1)).ping()


def test_what_is_retained_above_is_retained_here(above: RunningGateway, tmp_path: Path, pki: Pki) -> None:
    operator = above.client("alice", "operator")
    publish(operator, "devices/sensor-1/commands/mode", b"eco", retain=True)
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port)) as gateway:
        upstream = wait_until_up(gateway)
        gateway.wait_for(upstream.caught_up.is_set, "caught up")
        device = gateway.client().subscribed(("devices/sensor-1/commands/#", 1))
        assert said(device, 1) == [("devices/sensor-1/commands/mode", b"eco", 1, True)]
        # It comes again when the link does, which is no news.
        gateway.call(upstream.link.cut)  # type: ignore[union-attr]
        gateway.wait_for(lambda: upstream.spool.counters.upstream_lost == 1, "a connection lost")
        wait_until_up(gateway)
        # Live, it comes without the flag; the topic's retained message here follows all the same.
        publish(operator, "devices/sensor-1/commands/mode", b"full", retain=True, pid=2)
        assert said(device, 1) == [("devices/sensor-1/commands/mode", b"full", 1, False)]
        late = gateway.client("free-1").subscribed(("devices/#", 1))
        assert said(late, 1) == [("devices/sensor-1/commands/mode", b"full", 1, True)]
        publish(operator, "devices/sensor-1/commands/mode", b"", retain=True, pid=3)
        assert said(device, 1) == [("devices/sensor-1/commands/mode", b"", 1, False)]
        gateway.client("free-2").subscribed(("devices/#", 1)).ping()
        # What somebody here has retained is not the upstream's to change.
        publish(gateway.client("bob", "operator"), "devices/sensor-1/commands/mode", b"ours", retain=True)
        assert said(device, 1) == [("devices/sensor-1/commands/mode", b"ours", 1, False)]
        publish(operator, "devices/sensor-1/commands/mode", b"theirs", pid=4)
        assert said(device, 1) == [("devices/sensor-1/commands/mode", b"theirs", 1, False)]
        late = gateway.client("free-3").subscribed(("devices/#", 1))
        assert said(late, 1) == [("devices/sensor-1/commands/mode", b"ours", 1, True)]


def test_what_an_upstream_has_retained_is_nobodys_share_and_no_clients_to_revoke(
    above: RunningGateway, tmp_path: Path, pki: Pki
) -> None:
    operator = above.client("alice", "operator")
    # The upstream is called `cloud`, and so is a device at another gateway, whose presence comes down.
    for number, name in enumerate(("cloud", "sensor-8", "sensor-9"), start=1):
        publish(above.client(name), f"devices/{name}/status", b"online", retain=True, pid=number)
    values = linked(tmp_path, pki, above.port, up=[], down=["devices/+/status"], down_shared=[])
    limits = Limits(max_retained_messages_per_client=1)
    with running_gateway(tmp_path, pki, limits=limits, **values) as gateway:
        gateway.wait_for(wait_until_up(gateway).caught_up.is_set, "caught up")
        gateway.call(gateway.broker.close_identities, lambda peer: peer.issuer != pki.issuing.issuer_id)
        late = gateway.client("free-1").subscribed(("devices/#", 1))
        assert sorted(topic for topic, *_ in said(late, 3)) == [
            "devices/cloud/status",
            "devices/sensor-8/status",
            "devices/sensor-9/status",
        ]
        assert gateway.broker.counters.not_retained == 0
    operator.ping()


def test_what_came_down_goes_up_nowhere(above: RunningGateway, tmp_path: Path, pki: Pki) -> None:
    with ExitStack() as stack:
        (tmp_path / "other").mkdir()
        other = stack.enter_context(
            running_gateway(tmp_path / "other", pki, policy_toml=linked(tmp_path, pki, 1)["policy_toml"])
        )
        tables = (
            upstream_toml("gw-1", above.port, down=["devices/+/commands/#"]),
            upstream_toml("gw-1", other.port, name="other", up=["devices/#"], down=[]),
        )
        values = linked(tmp_path, pki, above.port) | {"upstreams": upstreams(tmp_path, *tables)}
        gateway = stack.enter_context(running_gateway(tmp_path, pki, **values))
        wait_until_up(gateway)
        wait_until_up(gateway, "other")
        there = other.client("free-1").subscribed(("#", 1))
        device = gateway.client().subscribed(("devices/sensor-1/commands/#", 1))
        operator = above.client("alice", "operator")
        publish(operator, "devices/sensor-1/commands/a", b"x", retain=True)
        assert said(device, 1) == [("devices/sensor-1/commands/a", b"x", 1, False)]
        publish(device, "devices/sensor-1/status", b"here")
        assert said(there, 1) == [("devices/sensor-1/status", b"here", 1, False)]


@pytest.mark.parametrize("transit", [False, True])
def test_another_gateways_messages_go_on_up_in_a_tree_alone(
    above: RunningGateway, tmp_path: Path, pki: Pki, transit: bool
) -> None:
    operator = above.client("alice", "operator")
    publish(operator, "devices/sensor-2/commands/kept", b"x", retain=True)
    operator.subscribed(("devices/+/telemetry/#", 1))
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port, transit=transit)) as site:
        site.wait_for(wait_until_up(site).caught_up.is_set, "caught up")
        on_the_way = site.client("free-2").subscribed(("devices/+/commands/live", 1))
        (tmp_path / "edge").mkdir()
        values = linked(tmp_path / "edge", pki, site.port, "gw-2")
        with running_gateway(tmp_path / "edge", pki, **values) as edge:
            wait_until_up(edge)
            publish(edge.client("sensor-2"), "devices/sensor-2/telemetry/t", b"edge")
            watcher = site.client("free-1").subscribed(("devices/+/telemetry/#", 1))
            publish(edge.client("sensor-3"), "devices/sensor-3/telemetry/t", b"edge")
            assert said(watcher, 1) == [("devices/sensor-3/telemetry/t", b"edge", 1, False)]
            publish(site.client("sensor-1"), "devices/sensor-1/telemetry/t", b"site")
            expected = ["sensor-2", "sensor-3"] if transit else []
            found = said(operator, len(expected) + 1)
            assert [topic.split("/")[1] for topic, *_ in found] == [*expected, "sensor-1"]
            # And what comes down goes on down, live and retained.
            listener = edge.client("sensor-2").subscribed(("devices/sensor-2/commands/#", 1))
            expected = ["kept", "live", "last"] if transit else ["last"]
            publish(operator, "devices/sensor-2/commands/live", b"x", pid=2)
            said(on_the_way, 1)
            publish(site.client("bob", "operator"), "devices/sensor-2/commands/last", b"x")
            assert [topic.split("/")[3] for topic, *_ in said(listener, len(expected))] == expected


def test_what_an_upstream_retained_that_is_no_more_goes_on_to_no_gateway_below(
    above: RunningGateway, tmp_path: Path, pki: Pki
) -> None:
    """Whether it stood in a tree is not known any more."""
    publish(above.client("alice", "operator"), "devices/sensor-2/commands/kept", b"x", retain=True)
    with running_gateway(tmp_path, pki, **linked(tmp_path, pki, above.port)) as site:
        site.wait_for(wait_until_up(site).caught_up.is_set, "caught up")
    values = linked(tmp_path, pki, 1, name="renamed", transit=True)
    with running_gateway(tmp_path, pki, **values) as site:
        device = site.client("sensor-2").subscribed(("devices/sensor-2/commands/#", 1))
        assert [topic.split("/")[3] for topic, *_ in said(device, 1)] == ["kept"]
        below = site.client("gw-2", "service-gateway").subscribed(("devices/sensor-2/commands/#", 1))
        publish(site.client("alice", "operator"), "devices/sensor-2/commands/last", b"x")
        assert [topic.split("/")[3] for topic, *_ in said(below, 1)] == ["last"]


def test_a_triangle_of_two_gateways_and_a_broker_is_no_circle(
    above: RunningGateway, tmp_path: Path, pki: Pki
) -> None:
    """Each gateway is the other's upstream, and both have the broker above: all arrives, once for each way."""
    with ExitStack() as stack:
        running = {}
        for name in ("gw-1", "gw-2"):
            write_credentials(tmp_path / name, pki, name)
            running[name] = steady_port()
        gateways = {}
        for name, other in (("gw-1", "gw-2"), ("gw-2", "gw-1")):
            tables = (
                upstream_toml(name, above.port),
                upstream_toml(name, running[other], name="peer", up=["devices/+/telemetry/#"], down=[]),
            )
            values = linked(tmp_path / name, pki, above.port, name)
            values["upstreams"] = upstreams(tmp_path / name, *tables, gateway=name)
            gateways[name] = stack.enter_context(
                running_gateway(tmp_path / name, pki, listen_port=running[name], **values)
            )
        for gateway in gateways.values():
            wait_until_up(gateway)
            wait_until_up(gateway, "peer")
        watchers = [broker.client("free-1").subscribed(("#", 1)) for broker in (above, *gateways.values())]
        publish(gateways["gw-1"].client("sensor-1"), "devices/sensor-1/telemetry/t", b"1")
        publish(gateways["gw-2"].client("sensor-2"), "devices/sensor-2/telemetry/t", b"2")
        publish(above.client("alice", "operator"), "fleet/announcements/a", b"3")
        for watcher in watchers:
            assert sorted(payload for _, payload, _, _ in said(watcher, 3)) == [b"1", b"2", b"3"]
        # Whatever still circled would come before what is sent only now, and each link keeps its order.
        publish(gateways["gw-1"].client("sensor-3"), "devices/sensor-3/telemetry/t", b"4")
        publish(gateways["gw-2"].client("sensor-4"), "devices/sensor-4/telemetry/t", b"5")
        for watcher in watchers:
            assert sorted(payload for _, payload, _, _ in said(watcher, 2)) == [b"4", b"5"]
            watcher.ping()
