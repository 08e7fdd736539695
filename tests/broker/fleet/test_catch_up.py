"""A gateway that starts: what the upstream has retained is judged before anybody is let in, within bounds."""

from __future__ import annotations

import shutil
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.fleet import (
    OTHERS,
    POLICY,
    running_member,
    signed_policy,
    told_by,
    write_gateway,
    write_member,
)
from support.mqtt_client import ConnectionEndedError
from support.mqtt_process import broker_process
from support.patience import PATIENCE_S
from support.pki import Authority, crl_pem

from birthmark.broker.gateway import Gateway

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.fleet import Member
    from support.pki import Pki

NARROW = f'[roles.device]\npublish = ["devices/{{id}}/telemetry/#"]\nsubscribe = []\n{OTHERS}'


@pytest.fixture
def cloud(tmp_path: Path, pki: Pki) -> Iterator[Member]:
    """A birthmark-broker that is the upstream: a gateway itself, which serves what it goes by."""
    with running_member(write_gateway(tmp_path / "cloud", pki, "cloud-1"), pki) as found:
        found.client("gw-other", "service-gateway")
        yield found


def bring(cloud: Member, topic: str, payload: bytes) -> None:
    """Have the upstream judge and retain something, as the station does."""
    client = cloud.client("station", "operator", client_id="station:1")
    client.send(mqtt.publish(topic, payload, qos=1, retain=True, pid=1))
    assert client.read() == mqtt.Packet(0x40, b"\0\1")
    client.close()
    cloud.wait_for(lambda: cloud.broker.own_retained(topic) == [payload], f"{topic} at the upstream")


def crl_topic(pki: Pki) -> str:
    return f"fleet/crl/{pki.issuing.issuer_id}"


def test_what_was_missed_is_in_force_before_anybody_is_let_in(
    cloud: Member, tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = pki.device("lost")
    config = write_member(tmp_path / "gw-1", pki, "gw-1", cloud.port)
    bring(cloud, crl_topic(pki), pki.issuing.crl([lost.cert_serial], number=4))
    bring(cloud, "fleet/policy", signed_policy(pki.issuing, 9, NARROW))
    before = []
    started = Gateway.start

    async def start(gateway: Gateway, *arguments: object) -> None:
        before.append((gateway.revocations.crls[pki.issuing.issuer_id].number, gateway._policies.version))
        await started(gateway, *arguments)  # type: ignore[arg-type]
        before.append((gateway.revocations.crls[pki.issuing.issuer_id].number, gateway._policies.version))

    monkeypatch.setattr(Gateway, "start", start)
    with running_member(config, pki) as member:
        # `start` is over before the broker listens (`GatewayBroker.before_listening`).
        assert before == [(1, 0), (4, 9)]
        status = member.call(told_by, member)
        assert (status.policy_version, status.crl_numbers, status.alarms) == (9, {pki.issuing.issuer_id: 4}, ())
        refused = member.open(member.context_of(lost))
        assert refused.read() == mqtt.connack(5)


def test_a_gateway_restored_from_an_old_image_comes_forward_by_itself(
    cloud: Member, tmp_path: Path, pki: Pki
) -> None:
    config = write_member(tmp_path / "gw-1", pki, "gw-1", cloud.port)
    bring(cloud, crl_topic(pki), pki.issuing.crl([], number=2))
    bring(cloud, "fleet/policy", signed_policy(pki.issuing, 1, POLICY))
    with running_member(config, pki) as member:
        assert member.call(told_by, member).policy_version == 1
    image = tmp_path / "image"
    shutil.copytree(config.parent / "data", image)
    bring(cloud, crl_topic(pki), pki.issuing.crl([], number=3))
    bring(cloud, "fleet/policy", signed_policy(pki.issuing, 2, NARROW))
    with running_member(config, pki) as member:
        assert member.call(told_by, member).policy_version == 2
    shutil.rmtree(config.parent / "data")
    shutil.copytree(image, config.parent / "data")
    with running_member(config, pki) as member:
        status = member.call(told_by, member)
        assert (status.policy_version, status.crl_numbers, status.alarms) == (2, {pki.issuing.issuer_id: 3}, ())


def test_an_upstream_that_is_behind_takes_nothing_back(cloud: Member, tmp_path: Path, pki: Pki) -> None:
    config = write_member(tmp_path / "gw-1", pki, "gw-1", cloud.port)
    (config.parent / "crl.pem").write_bytes(pki.issuing.crl([], number=8))
    with running_member(config, pki) as member:
        status = member.call(told_by, member)
        assert (status.crl_numbers, status.alarms) == ({pki.issuing.issuer_id: 8}, ("fleet-crl-refused",))
        bring(cloud, crl_topic(pki), pki.issuing.crl([], number=9))
        member.wait_for(lambda: told_by(member).crl_numbers == {pki.issuing.issuer_id: 9}, "the newer one")
        member.wait_for(lambda: told_by(member).alarms == (), "the end of the alarm")


def test_what_the_upstream_hears_later_comes_down_at_once(cloud: Member, tmp_path: Path, pki: Pki) -> None:
    with running_member(write_member(tmp_path / "gw-1", pki, "gw-1", cloud.port), pki) as member:
        lost = pki.device("lost")
        client = member.open(member.context_of(lost)).handshake(mqtt.connect("lost"))
        station = cloud.client("alice", "operator").subscribed(("gateway/gw-1/policy-receipts", 1))
        bring(cloud, crl_topic(pki), pki.issuing.crl([lost.cert_serial], number=2))
        with pytest.raises(ConnectionEndedError):
            client.read()
        bring(cloud, "fleet/policy", signed_policy(pki.issuing, 3, NARROW))
        assert b'"outcome":"installed","version":3' in station.read_delivery().payload
        cloud.wait_for(
            lambda: b'"policy_version":3' in _above(cloud, "gateway/gw-1/status"), "the gateway's status, above"
        )


def _above(cloud: Member, topic: str) -> bytes:
    found = cloud.broker.exchange.retained.get(topic)
    return found.payload if found else b""


def test_an_upstream_that_is_not_there_delays_nobody(tmp_path: Path, pki: Pki) -> None:
    with _nobody() as port:
        config = write_member(tmp_path / "gw-1", pki, "gw-1", port, catch_up_s=60)
        with running_member(config, pki) as member:
            assert set(member.call(told_by, member).alarms) >= {"fleet-unheard", "upstream-down"}
            member.client("sensor-1").ping()


def test_an_upstream_that_says_nothing_delays_for_a_while_only(tmp_path: Path, pki: Pki) -> None:
    with _silent() as port:
        config = write_member(tmp_path / "gw-1", pki, "gw-1", port, catch_up_s=0.3)
        with running_member(config, pki) as member:
            assert "fleet-unheard" in member.call(told_by, member).alarms
            member.client("sensor-1").ping()


def test_who_stops_a_start_does_not_wait_for_it(tmp_path: Path, pki: Pki) -> None:
    with _silent() as port:
        config = write_member(tmp_path / "gw-1", pki, "gw-1", port, catch_up_s=60)
        with broker_process(config) as broker:
            broker.wait_for_log("waiting for what the upstream has")
            assert not broker.out, "it is ready before it has waited"
            broker.process.terminate()
            assert broker.process.wait(PATIENCE_S) == 0
        assert not [record for record in broker.log if record.get("event") == "upstream_failed"], "it waited"


def test_an_upstream_without_the_crl_of_a_ca_is_an_alarm_and_no_obstacle(
    cloud: Member, tmp_path: Path, pki: Pki
) -> None:
    config = write_member(tmp_path / "gw-1", pki, "gw-1", cloud.port, catch_up_s=0.3)
    second = Authority.create("Second Issuing CA", parent=pki.root)
    (config.parent / "clients-ca.pem").write_bytes(pki.issuing.pem + second.pem)
    first = (cloud.folder / "crl.pem").read_bytes()
    (config.parent / "crl.pem").write_bytes(first + crl_pem(second.crl([], number=1)))
    with running_member(config, pki) as member:
        member.wait_for(lambda: told_by(member).alarms == ("fleet-unheard",), "the alarm, and no other")
        clients_ca = cloud.folder / "clients-ca.new"
        clients_ca.write_bytes(pki.issuing.pem + second.pem)
        clients_ca.replace(cloud.folder / "clients-ca.pem")
        cloud.wait_for(lambda: cloud.gateway._trust.has(second.issuer_id), "the upstream's trust")
        bring(cloud, f"fleet/crl/{second.issuer_id}", second.crl([], number=2))
        member.wait_for(lambda: told_by(member).alarms == (), "the end of the alarm")


def test_an_upstream_without_the_policy_that_there_was_before_is_an_alarm_and_no_obstacle(
    cloud: Member, tmp_path: Path, pki: Pki
) -> None:
    configs = (
        write_member(tmp_path / "gw-1", pki, "gw-1", cloud.port),
        write_gateway(tmp_path / "new", pki, "cloud-2"),
    )
    for config in configs:
        shutil.copy2(cloud.folder / "crl.pem", config.parent)
    bring(cloud, "fleet/policy", signed_policy(pki.issuing, 1, NARROW))
    with running_member(configs[0], pki) as member:
        assert member.call(told_by, member).policy_version == 1
    with running_member(configs[1], pki) as new:
        new.client("gw-other", "service-gateway")
        toml = configs[0].read_text().replace(f":{cloud.port}", f":{new.port}") + "catch_up_s = 0.3\n"
        configs[0].write_text(toml)
        with running_member(configs[0], pki) as member:
            member.wait_for(
                lambda: (told_by(member).policy_version, told_by(member).alarms) == (1, ("fleet-unheard",)),
                "the alarm, and no other",
            )
            bring(new, "fleet/policy", signed_policy(pki.issuing, 2, NARROW))
            member.wait_for(lambda: told_by(member).alarms == (), "the end of the alarm")


def test_crls_are_asked_for_by_their_very_topics(cloud: Member, tmp_path: Path, pki: Pki) -> None:
    """RabbitMQ gives what is retained for no filter with a wildcard in it."""
    config = write_member(tmp_path / "gw-1", pki, "gw-1", cloud.port)
    second = Authority.create("Second Issuing CA", parent=pki.root)
    with running_member(config, pki) as member:
        session = cloud.call(cloud.broker.exchange.sessions.get, "gw-1")
        assert session is not None
        assert crl_topic(pki) in session.subscriptions
        (config.parent / "crl.pem").write_bytes(crl_pem(pki.issuing.crl([])) + crl_pem(second.crl([], number=1)))
        (config.parent / "clients-ca.pem").write_bytes(pki.issuing.pem + second.pem)
        cloud.wait_for(lambda: f"fleet/crl/{second.issuer_id}" in session.subscriptions, "the new CA's topic")
        assert member.gateway.policy


@contextmanager
def _nobody() -> Iterator[int]:
    """A port where nobody listens, and nobody will."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@contextmanager
def _silent() -> Iterator[int]:
    """A port where connections are taken by the system, and nobody says anything."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        yield silent.getsockname()[1]
