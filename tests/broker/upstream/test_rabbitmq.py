"""A gateway below a RabbitMQ cluster of three nodes: faults under load, and what the docs say of one."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest
from support import mosquitto, rabbitmq
from support import mqtt_client as mqtt
from support.fleet import running_member, signed_policy, told_by, write_member
from support.mqtt_client import ConnectionEndedError, RawClient, client_context
from support.mqtt_gateway import running_gateway
from support.ports import HOST
from support.rabbitmq import Cluster, User, cluster
from support.repository import ROOT
from support.station import new_station
from support.station_upstream import PlayedGateway
from support.upstream_load import COLLECTOR, COMMANDER, GATEWAY, Loaded
from support.upstream_triangle import GATEWAYS, check_triangle
from support.upstreams import POLICY, upstream_toml, upstreams, write_credentials

from birthmark.device.credentials import BrokerAddress
from birthmark.provisioning.crl_delivery import deliver_crl
from birthmark.provisioning.crls import sign_and_store_crl
from birthmark.provisioning.delivery import Outcome
from birthmark.provisioning.gateway_look import look_at
from birthmark.provisioning.gateway_settings import Gateway, Upstream
from birthmark.provisioning.settings import read_settings
from birthmark.provisioning.settings_edit import add_gateway, add_upstream

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from pathlib import Path

    from support.pki import Pki

WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
ROUNDS = 5 if WHOLE else 1
OWN = r"^sites\.{username}\."
NARROW = "narrow"
"""A gateway that may publish telemetry, and nothing else."""
READERS = [f"reader-{number}" for number in range(6)]
"""One for each connection: who comes again at once may find its last queue on its way out, and be thrown out."""
STATION = "alice"
USERS = (
    User(GATEWAY, write=OWN, read=OWN),
    User(NARROW, write=r"^sites\.{username}\.devices\.[^.]+\.telemetry\.", read=OWN),
    User(STATION, suffix=":[a-z]+-[0-9a-f]+"),
    *(User(name) for name in (COLLECTOR, COMMANDER, *GATEWAYS, *READERS)),
)


def context(folder: Path, pki: Pki, name: str) -> ssl.SSLContext:
    (folder / "root.pem").write_bytes(pki.root.pem)
    path = pki.device(name, "service-gateway").write(folder / f"{name}.pem")
    return client_context(path, folder / "root.pem")


def said_hello(port: int, trusted: ssl.SSLContext) -> mqtt.Packet:
    with RawClient.connect(port, trusted) as client:
        client.send(mqtt.connect(GATEWAY))
        return client.read()


def who_has_no_certificate_of_ours_or_no_rights_is_not_let_in(engine: Cluster, tmp_path: Path, pki: Pki) -> None:
    port = engine.ports[0]
    (tmp_path / "root.pem").write_bytes(pki.root.pem)
    stranger = pki.stranger.device(GATEWAY).write(tmp_path / "stranger.pem")
    for credentials in (None, stranger):
        with pytest.raises((OSError, ConnectionEndedError)):
            said_hello(port, client_context(credentials, tmp_path / "root.pem"))
    with RawClient.connect(port, context(tmp_path, pki, "unknown")) as client:
        client.handshake(mqtt.connect("unknown"), code=4)
    berlin = context(tmp_path, pki, GATEWAY)
    for said in (
        mqtt.publish("sites/paris/devices/sensor-1/status", b"x", qos=1, pid=1),
        mqtt.subscribe(1, ("sites/#", 1)),
    ):
        with RawClient.connect(port, berlin) as client:
            client.handshake(mqtt.connect(GATEWAY)).send(said)
            assert client.read_end() == [], "it is ended without an answer"


def what_is_retained_is_so_on_one_node_and_found_by_its_exact_name_only(
    engine: Cluster, tmp_path: Path, pki: Pki
) -> None:
    """Why docs/upstream.md says that a RabbitMQ keeps no presence, and docs/fleet.md that it keeps no CRL."""
    topic = "fleet/policy"
    with (
        RawClient.connect(engine.ports[1], context(tmp_path, pki, COMMANDER)) as publisher,
        RawClient.connect(engine.ports[1], context(tmp_path, pki, COLLECTOR)) as live,
    ):
        live.handshake(mqtt.connect(COLLECTOR)).subscribed((topic, 0))
        publisher.handshake(mqtt.connect(COMMANDER)).send(mqtt.publish(topic, b"1", qos=1, pid=1, retain=True))
        assert publisher.read() == mqtt.Packet(0x40, b"\0\1")
        assert live.read_delivery() == mqtt.Delivery(topic, b"1", retain=False)
    readers = iter(READERS)
    for topic_filter, found in ((topic, [None, b"1", None]), ("fleet/+", [None, None, None])):
        for port, payload in zip(engine.ports, found, strict=True):
            name = next(readers)
            with RawClient.connect(port, context(tmp_path, pki, name)) as late:
                late.handshake(mqtt.connect(name)).subscribed((topic_filter, 0))
                if payload is not None:
                    assert late.read_delivery() == mqtt.Delivery(topic, payload, retain=True)
                late.ping()


def a_message_that_it_does_not_allow_does_not_keep_the_others_from_it(
    engine: Cluster, tmp_path: Path, pki: Pki
) -> None:
    folder = tmp_path / NARROW
    write_credentials(folder, pki, NARROW)
    table = upstream_toml(NARROW, *engine.ports, prefix=f"sites/{NARROW}/", down=[], down_shared=[])
    with (
        RawClient.connect(engine.ports[-1], context(tmp_path, pki, COLLECTOR)) as collector,
        running_gateway(folder, pki, policy_toml=POLICY, upstreams=upstreams(folder, table)) as gateway,
    ):
        collector.handshake(mqtt.connect(COLLECTOR)).subscribed((f"sites/{NARROW}/#", 1))
        device = gateway.client()
        topics = [f"devices/sensor-1/{name}" for name in ("telemetry/a", "replies/b", "telemetry/c")]
        for number, topic in enumerate(topics, start=1):
            device.send(mqtt.publish(topic, b"x", qos=1, pid=number))
        for number in range(1, len(topics) + 1):
            assert device.read() == mqtt.Packet(0x40, bytes((0, number)))
        taken: dict[str, None] = {}  # the first may come again: what was acknowledged with the connection's end
        while len(taken) < 2:
            message = collector.read_delivery()
            collector.send(mqtt.puback(message.packet_id))
            taken[message.topic] = None
        assert list(taken) == [f"sites/{NARROW}/{topics[number]}" for number in (0, 2)]
        gateway.wait_for(lambda: gateway.broker.counters.upstream_refused == 1, "one message set aside")


def two_gateways_and_it_in_a_triangle_pass_each_message_on_once(engine: Cluster, tmp_path: Path, pki: Pki) -> None:
    check_triangle(tmp_path, pki, engine.ports)


def a_fleet_below_it_catches_up_and_its_devices_roam(engine: Cluster, tmp_path: Path, pki: Pki) -> None:
    """What is retained is asked for by its exact topic; nothing rests on RETAIN, which is not kept."""
    configs = [write_member(tmp_path / name, pki, name, *engine.ports) for name in GATEWAYS]
    # After the CRLs of number 1 that the gateways begin with: one that is dated before them would be refused.
    crl, policy = pki.issuing.crl([], number=2), signed_policy(pki.issuing, 5)
    for port in engine.ports:
        with RawClient.connect(port, context(tmp_path, pki, COMMANDER)) as station:
            station.handshake(mqtt.connect(COMMANDER))
            for topic, payload in ((f"fleet/crl/{pki.issuing.issuer_id}", crl), ("fleet/policy", policy)):
                station.send(mqtt.publish(topic, payload, qos=1, pid=1, retain=True))
                assert station.read() == mqtt.Packet(0x40, b"\0\1")
    with running_member(configs[0], pki) as first, running_member(configs[1], pki) as second:
        for member in (first, second):
            status = member.call(told_by, member)
            assert (status.crl_numbers, status.policy_version) == ({pki.issuing.issuer_id: 2}, 5)
            assert status.alarms == ()
        old = first.client("sensor-1", clean=False)
        second.knows("sensor-1", 1)
        second.client("sensor-1", clean=False).ping()
        assert old.read_end() == []
        first.wait_for(lambda: first.broker.counters.moved_away == 1, "the farewell")
        second.wait_for(lambda: second.broker.roamers.is_here("sensor-1"), "the device")


def a_station_finds_each_gateway_and_brings_each_node_what_it_may_be_asked_for(
    engine: Cluster, tmp_path: Path, pki: Pki
) -> None:
    station = new_station(tmp_path / "station")
    (tmp_path / "root.pem").write_bytes(pki.root.pem)
    operator_path = pki.operator(STATION).write(tmp_path / "alice.pem")
    servers = tuple(BrokerAddress(HOST, port) for port in engine.ports)
    add_upstream(station.settings_path, Upstream("cloud", servers, operator_path, tmp_path / "root.pem"))
    for name in GATEWAYS:
        add_gateway(station.settings_path, Gateway(name, via="cloud"))
    station.settings = read_settings(station.settings_path)
    trusted = frozenset(ca.key_id for ca in station.cas.issuing)
    with contextlib.ExitStack() as stack:
        for name, port in zip(GATEWAYS, engine.ports[1:], strict=True):
            path = pki.device(name, "service-gateway").write(tmp_path / f"{name}.pem")
            played = PlayedGateway(name, port, path, tmp_path / "root.pem", trusted, client_id=name)
            stack.enter_context(played)
        looks = look_at(
            station.settings.gateways,
            anchors_path=station.root_path,
            timeout_s=60,
            upstreams=station.settings.upstreams,
        )
        assert [look.status is not None and look.status.online for look in looks] == [True, True]
        crls = sign_and_store_crl(station)
        engine.nodes[0].kill()
        told = deliver_crl(station, crls, 60)
        assert [one.outcome for one in told] == [Outcome.DONE] * 2, told
        assert all(str(engine.ports[0]) in one.missed[0] and len(one.missed) == 1 for one in told)
        engine.restore()
        assert [(one.outcome, one.missed) for one in deliver_crl(station, crls, 60)] == [(Outcome.DONE, ())] * 2
    for port, name in zip(engine.ports, READERS, strict=False):
        with RawClient.connect(port, context(tmp_path, pki, name)) as late:
            late.handshake(mqtt.connect(name)).subscribed((f"fleet/crl/{crls.current.issuer}", 0))
            assert late.read_delivery().payload == crls.current.der


@pytest.mark.proof
def nothing_acknowledged_is_lost_whatever_breaks(engine: Cluster, tmp_path: Path, pki: Pki) -> None:
    with Loaded(tmp_path / GATEWAY, pki, engine.ports) as load:
        for _ in range(ROUNDS):
            engine.restore()
            load.both_ways(50)
            load.cut_link()
            load.both_ways(50)
            load.kill_gateway()
            load.both_ways(50)
            killed = load.linked_to
            engine.nodes[killed].kill()
            load.both_ways(50)
            assert load.linked_to != killed
        # A RabbitMQ gives a session that comes back what it had given before mixed with what is new.
        load.see_through(in_order_above=load.taken_above.connections == 1, in_order_below=False)


CASES = (
    who_has_no_certificate_of_ours_or_no_rights_is_not_let_in,
    what_is_retained_is_so_on_one_node_and_found_by_its_exact_name_only,
    a_message_that_it_does_not_allow_does_not_keep_the_others_from_it,
    two_gateways_and_it_in_a_triangle_pass_each_message_on_once,
    a_fleet_below_it_catches_up_and_its_devices_roam,
    a_station_finds_each_gateway_and_brings_each_node_what_it_may_be_asked_for,
    nothing_acknowledged_is_lost_whatever_breaks,
)


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_below_a_cluster(
    pki: Pki, tmp_path: Path, subtests: pytest.Subtests, proven: Callable[[str], None]
) -> None:
    """One cluster for all of them: its start takes as long as everything that is done with it."""
    with cluster(tmp_path / "cluster", pki, USERS) as engine:
        for case in CASES:
            folder = tmp_path / case.__name__
            folder.mkdir()
            with subtests.test(case.__name__):
                engine.restore()
                case(engine, folder, pki)
    proven("three nodes of RabbitMQ: " + "; ".join(case.__name__.replace("_", " ") for case in CASES))


def test_the_docs_give_the_settings_that_are_tested() -> None:
    said = (ROOT / "docs" / "upstream.md").read_text()
    for settings in (rabbitmq.SETTINGS, mosquitto.SETTINGS):
        for line in settings.splitlines():
            is_placed = "{" in line  # where a file or a port is, is the operator's
            assert (line.split("{")[0].rsplit(" ", 1)[0] if is_placed else line) in said, line
