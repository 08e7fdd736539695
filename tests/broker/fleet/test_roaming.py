"""Devices that go from one gateway of a fleet to another: two real gateways, a real upstream, TLS between all."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.device_folder import enrolled
from support.fleet import running_member, write_gateway, write_member
from support.loopback_proxy import LoopbackProxy
from support.mqtt_client import ConnectionEndedError, RawClient
from support.pki import now
from support.upstreams import upstream_toml, write_credentials
from support.watching import Watching

from birthmark.device.backoff import Backoff, RetryTimer
from birthmark.device.client import Client
from birthmark.device.credentials import BrokerAddress
from birthmark.device.events import Connected
from birthmark.device.identity import DeviceId
from birthmark.device.messages import MAX_VISIT
from birthmark.device.presence import Presence

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.fleet import Member
    from support.pki import Pki

STATUS = "devices/sensor-1/status"
COMMANDS = "devices/sensor-1/commands/#"
WILL = (STATUS, b"offline", 1, True)


@pytest.fixture
def cloud(tmp_path: Path, pki: Pki) -> Iterator[Member]:
    with running_member(write_gateway(tmp_path / "cloud", pki, "cloud-1"), pki) as found:
        yield found


@contextmanager
def gateway(tmp_path: Path, pki: Pki, name: str, port: int) -> Iterator[Member]:
    config = write_member(tmp_path / name, pki, name, port)
    with running_member(config, pki) as found:
        found.wait_for(lambda: all(up.caught_up.is_set() for up in found.broker.upstreams), "the link")
        yield found


@pytest.fixture
def first(cloud: Member, tmp_path: Path, pki: Pki) -> Iterator[Member]:
    with gateway(tmp_path, pki, "gw-1", cloud.port) as found:
        yield found


@pytest.fixture
def second(cloud: Member, tmp_path: Path, pki: Pki) -> Iterator[Member]:
    with gateway(tmp_path, pki, "gw-2", cloud.port) as found:
        yield found


def come(member: Member, *, presence: bytes = b"online") -> RawClient:
    """The device, with its will; it says that it is there."""
    client = member.client("sensor-1", clean=False, will=WILL).subscribed((COMMANDS, 1))
    client.send(mqtt.publish(STATUS, presence, qos=1, retain=True, pid=2))
    assert client.read() == mqtt.Packet(0x40, b"\0\2")
    return client


def retained(member: Member, topic: str = STATUS) -> bytes | None:
    found = member.broker.exchange.retained.get(topic)
    return found.payload if found else None


def is_at(member: Member) -> bool:
    return member.broker.roamers.is_here("sensor-1")


def visit_of(member: Member) -> tuple[int, str]:
    assert member.gateway._visits is not None
    number, moved_to = member.gateway._visits.of("sensor-1")
    return number, moved_to


def command(member: Member, what: str, pid: int = 9) -> None:
    """Have a command sent to the device from somewhere, and acknowledged."""
    client = member.client("alice", "operator", client_id="alice:1")
    client.send(mqtt.publish(f"devices/sensor-1/commands/{what}", b"now", qos=1, pid=pid))
    assert client.read() == mqtt.Packet(0x40, pid.to_bytes(2, "big"))
    client.close()


def heard(client: RawClient) -> str:
    found = client.read_delivery()
    client.send(mqtt.puback(found.packet_id))
    return found.topic.rpartition("/")[2]


def test_the_old_session_makes_way_without_its_will(cloud: Member, first: Member, second: Member) -> None:
    alice = cloud.client("alice", "operator").subscribed((STATUS, 1))
    old = come(first, presence=b"online at 1")
    assert alice.read_delivery().payload == b"online at 1"
    second.knows("sensor-1", 1)
    come(second, presence=b"online at 2")
    with pytest.raises(ConnectionEndedError):
        old.read()
    first.wait_for(lambda: retained(first) is None, "its presence here is gone")
    second.wait_for(lambda: visit_of(second) == (2, "") and is_at(second), "the visit")
    first.wait_for(lambda: visit_of(first) == (2, "gw-2"), "the farewell")
    assert first.broker.counters.moved_away == 1
    said = [alice.read_delivery().payload, alice.read_delivery().payload]
    assert said == [b"online at 2", b"online at 2"], "presence is said again, and no will"
    assert retained(cloud) == b"online at 2"
    assert retained(second) == b"online at 2"


def test_what_it_is_owed_waits_and_what_is_said_meanwhile_it_gets_where_it_is(
    cloud: Member, first: Member, second: Member
) -> None:
    come(first).close()
    first.wait_for(lambda: not is_at(first), "its end")
    command(first, "owed")
    second.knows("sensor-1", 1)
    new = come(second)
    first.wait_for(lambda: visit_of(first) == (2, "gw-2"), "the farewell")
    command(cloud, "meanwhile")
    assert heard(new) == "meanwhile"
    command(first, "said-here-only")  # a command given at a gateway reaches who is there
    new.send(mqtt.DISCONNECT)
    back = come_back(first)
    assert heard(back) == "owed"
    command(cloud, "after")
    assert heard(back) == "after"
    first.wait_for(lambda: visit_of(first) == (3, ""), "the visit")


def come_back(member: Member) -> RawClient:
    return member.client("sensor-1", clean=False, will=WILL, present=True)


def test_who_is_away_is_away_after_a_restart_too(cloud: Member, second: Member, tmp_path: Path, pki: Pki) -> None:
    config = write_member(tmp_path / "gw-1", pki, "gw-1", cloud.port)
    with running_member(config, pki) as first:
        come(first)
        second.knows("sensor-1", 1)
        come(second)
        first.wait_for(lambda: visit_of(first) == (2, "gw-2"), "the farewell")
        first.wait_for(lambda: retained(first, "gateway/gw-1/seen/sensor-1") is not None, "what is said of it")
    with running_member(config, pki) as first:
        session = first.call(first.broker.exchange.sessions.get, "sensor-1")
        assert session is not None
        assert session.is_away
        assert session.subscriptions == {COMMANDS: 1}
        command(cloud, "meanwhile")
        back = come_back(first)
        back.ping()  # nothing waited
        command(cloud, "after")
        assert heard(back) == "after"
        second.wait_for(lambda: visit_of(second) == (3, "gw-1"), "its farewell")


def test_a_will_that_was_spooled_does_not_have_the_last_word(
    cloud: Member, second: Member, tmp_path: Path, pki: Pki
) -> None:
    with LoopbackProxy(cloud.port) as cable, gateway(tmp_path, pki, "gw-1", cable.port) as first:
        old = come(first, presence=b"online at 1")
        cloud.wait_for(lambda: retained(cloud) == b"online at 1", "its presence")
        cable.lets_through = lambda _number: 0
        cable.cut_all()
        link = next(iter(first.broker.upstreams))
        first.wait_for(lambda: link.link is None, "the end of the link")
        old.close()  # without a DISCONNECT: the will waits in the spool
        first.wait_for(lambda: retained(first) == b"offline", "the will")
        come(second, presence=b"online at 2")
        cloud.wait_for(lambda: retained(cloud) == b"online at 2", "its presence")
        alice = cloud.client("alice", "operator").subscribed((STATUS, 1))
        assert alice.read_delivery().payload == b"online at 2"
        cable.lets_through = lambda _number: None
        said = [b""]
        while said[-1] != b"online at 2":
            said.append(alice.read_delivery().payload)
        assert said[-2] == b"offline", "what had waited, before it was said again by where it is"
        assert retained(cloud) == b"online at 2"


def arrive(member: Member) -> RawClient:
    """The device connects, and is let in."""
    client, before = member.open(member.context()), member.broker.counters.clients_connected
    client.send(mqtt.connect("sensor-1", clean=False, will=WILL))
    member.wait_for(lambda: member.broker.counters.clients_connected > before, "the device")
    return client


@pytest.mark.parametrize("times", [1, 2, 3])
def test_who_flaps_ends_up_connected_where_it_came_last(first: Member, second: Member, times: int) -> None:
    for _ in range(times):
        for member in (first, second):
            arrive(member)
    device, more = arrive(first), 0
    while not (
        first.call(is_at, first)
        and first.call(visit_of, first)[1] == ""
        and second.call(visit_of, second)[1] == "gw-1"
    ):
        try:
            device.send(mqtt.PINGREQ)
            while device.read() != mqtt.PINGRESP:
                pass
        except (ConnectionEndedError, OSError):
            more += 1
            device = arrive(first)
    assert more <= times, "more than one for each stay that was heard of late"


def test_services_are_at_several_gateways_at_once(cloud: Member, first: Member, second: Member) -> None:
    clients = [
        member.client("alice", "operator", client_id=client_id)
        for member in (first, second)
        for client_id in ("alice", "alice:1")
    ]
    come(first)
    second.knows("sensor-1", 1)
    come(second)
    first.wait_for(lambda: visit_of(first) == (2, "gw-2"), "a device's move, after theirs")
    cloud.wait_for(lambda: retained(cloud, "gateway/gw-2/seen/alice") is not None, "what is said of the service")
    assert second.gateway._visits is not None
    assert second.gateway._visits.of("alice") == (0, ""), "a service is counted"
    assert not second.call(partial(second.broker.roamers.let_go, DeviceId("alice"), "gw-1", is_certain=True))
    for client in clients:
        client.ping()
    assert (first.broker.counters.moved_away, second.broker.counters.moved_away) == (1, 0)


def test_who_renews_what_has_expired_is_nobodys_move(
    cloud: Member, second: Member, tmp_path: Path, pki: Pki
) -> None:
    config = write_member(tmp_path / "gw-1", pki, "gw-1", cloud.port)
    config.write_text(f'{config.read_text()}\n[renewal_listener]\nlisten = "127.0.0.1:0"\n')
    with running_member(config, pki) as first:
        first.wait_for(lambda: all(up.caught_up.is_set() for up in first.broker.upstreams), "the link")
        expired = pki.issuing.issue(
            cns=["sensor-1"],
            ous=["device"],
            not_before=now() - timedelta(days=400),
            not_after=now() - timedelta(days=1),
        )
        first.client("sensor-1").close()
        second.knows("sensor-1", 1)
        first.wait_for(lambda: not is_at(first), "its end")
        with RawClient.connect(first.broker.renewal_addresses[0][1], first.context_of(expired)) as client:
            client.handshake(mqtt.connect("sensor-1"))
            come(second)
            first.wait_for(lambda: visit_of(first) == (2, "gw-2"), "the farewell")
            client.ping()
        assert first.broker.counters.moved_away == 0


def test_nobody_speaks_for_a_gateway_but_itself(cloud: Member, first: Member) -> None:
    """At the upstream: neither a device, nor an operator, nor the link of another gateway for the upstream."""
    come(first)
    sighting = b'{"id":"sensor-1","cert_serial":"5a","first_seen":1,"last_seen":2,"addresses":[],"visit":99}'
    for name, role in (("sensor-2", "device"), ("bob", "operator")):
        liar = cloud.client(name, role)
        liar.send(mqtt.publish("gateway/gw-9/seen/sensor-1", sighting, qos=1, pid=1))
        assert liar.read() == mqtt.Packet(0x40, b"\0\1")
    link = cloud.client("gw-8", "service-gateway")
    link.send(mqtt.publish("gateway/cloud-1/status", b"{}", qos=1, retain=True, pid=1))
    assert link.read() == mqtt.Packet(0x40, b"\0\1")
    link.send(mqtt.publish("gateway/CLOUD-1/status", b"{}", qos=1, retain=True, pid=1))
    assert link.read() == mqtt.Packet(0x40, b"\0\1")
    assert cloud.broker.counters.publishes_denied == 4
    assert retained(cloud, "gateway/cloud-1/status") != b"{}"
    link.send(mqtt.publish("gateway/gw-8/seen/sensor-1", sighting, qos=1, pid=2))
    assert link.read() == mqtt.Packet(0x40, b"\0\2")
    first.wait_for(lambda: not is_at(first), "the other gateway's word")
    assert visit_of(first) == (99, "gw-8")


def test_a_gateway_is_told_nothing_in_its_own_name_however_its_case(first: Member) -> None:
    come(first)
    sighting = b'{"id":"sensor-1","cert_serial":"5a","first_seen":1,"last_seen":2,"addresses":[],"visit":99}'
    roaming = first.gateway._member._roaming
    assert roaming is not None
    first.call(roaming.heard, "gateway/GW-1/seen/sensor-1", sighting)
    assert (is_at(first), visit_of(first)) == (True, (1, ""))
    first.call(roaming.heard, "gateway/GW-2/seen/sensor-1", sighting)
    assert (is_at(first), visit_of(first)) == (False, (99, "GW-2"))


def test_an_upstream_that_is_named_like_a_device_is_not_that_device(
    cloud: Member, tmp_path: Path, pki: Pki
) -> None:
    """What the upstream says of the device is its own: neither taken away nor said again for the device."""
    folder = tmp_path / "gw-1"
    folder.mkdir()
    write_credentials(folder, pki, "gw-1")
    above = upstream_toml("gw-1", cloud.port, name="sensor-1", fleet=True, up=[], down=["devices/+/status"])
    config = write_gateway(folder, pki, "gw-1", above)
    link = cloud.client("gw-8", "service-gateway")
    link.send(mqtt.publish(STATUS, b"as seen above", qos=1, retain=True, pid=1))
    assert link.read() == mqtt.Packet(0x40, b"\0\1")
    with running_member(config, pki) as member:
        member.wait_for(lambda: retained(member) == b"as seen above", "the word from above")
        device = member.client("sensor-1")
        hearing = member.client("alice", "operator").subscribed((STATUS, 0))
        assert hearing.read_delivery().payload == b"as seen above"
        member.call(member.broker.roamers.say_presence_again, "sensor-1")
        hearing.ping()  # and nothing else
        assert member.call(member.broker.roamers.let_go, DeviceId("sensor-1"), "gw-2", is_certain=True)
        with pytest.raises(ConnectionEndedError):
            device.read()
        hearing.ping()
        assert retained(member) == b"as seen above"


def test_a_gateway_whose_link_is_revoked_is_not_said_to_be_there(cloud: Member, pki: Pki) -> None:
    issued = pki.device("gw-8", "service-gateway")
    link = cloud.open(cloud.context_of(issued))
    link.handshake(mqtt.connect("gw-8", will=("gateway/gw-8/status", b"away", 1, True)))
    link.send(mqtt.publish("gateway/gw-8/status", b"there", qos=1, retain=True, pid=1))
    assert link.read() == mqtt.Packet(0x40, b"\0\1")
    alice = cloud.client("alice", "operator").subscribed(("gateway/gw-8/status", 1))
    assert heard_payload(alice) == b"there"
    cloud.call(cloud.broker.close_identities, lambda peer: peer.cert_serial == issued.cert_serial)
    assert heard_payload(alice) == b""
    assert retained(cloud, "gateway/gw-8/status") is None


def heard_payload(client: RawClient) -> bytes:
    found = client.read_delivery()
    client.send(mqtt.puback(found.packet_id))
    return found.payload


@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        ("gateway/gw-8/seen/sensor-1", b""),
        ("gateway/gw-8/seen/sensor-1", b"no sighting"),
        (
            "gateway/gw-8/seen/sensor-1",
            b'{"id":"sensor-2","cert_serial":"","first_seen":1,"last_seen":2,"visit":99}',
        ),
        (
            "gateway/gw-8/seen/sensor-2",
            b'{"id":"sensor-1","cert_serial":"","first_seen":1,"last_seen":2,"visit":99}',
        ),
        ("gateway/gw-8/seen/a_b", b'{"id":"a_b","cert_serial":"","first_seen":1,"last_seen":2,"visit":99}'),
        (
            "gateway/gw-8/seen/sensor-1",
            b'{"id":"sensor-1","cert_serial":"","first_seen":1,"last_seen":2,"visit":-1}',
        ),
        (
            "gateway/gw-8/seen/sensor-1",
            b'{"id":"sensor-1","cert_serial":"","first_seen":1,"last_seen":2,"visit":%d}' % (MAX_VISIT + 1),
        ),
        ("gateway/gw-8/status", b'{"id":"sensor-1","cert_serial":"","first_seen":1,"last_seen":2,"visit":99}'),
    ],
)
def test_what_is_no_sighting_moves_nobody(cloud: Member, first: Member, topic: str, payload: bytes) -> None:
    device = come(first)
    link = cloud.client("gw-8", "service-gateway")
    link.send(mqtt.publish(topic, payload, qos=1, pid=1))
    assert link.read() == mqtt.Packet(0x40, b"\0\1")
    # Behind it on the same way, something that does arrive.
    command(cloud, "behind")
    assert heard(device) == "behind"
    assert is_at(first)
    assert visit_of(first) == (1, "")


def test_no_number_keeps_a_device_out(cloud: Member, first: Member, second: Member) -> None:
    """The most that a liar can say costs connections, and the device still comes, is told of, and moves."""
    link = cloud.client("gw-8", "service-gateway")
    highest = b'{"id":"sensor-1","cert_serial":"","first_seen":1,"last_seen":2,"visit":%d}' % MAX_VISIT
    link.send(mqtt.publish("gateway/gw-8/seen/sensor-1", highest, qos=1, pid=1))
    assert link.read() == mqtt.Packet(0x40, b"\0\1")
    for member in (first, second):
        member.knows("sensor-1", MAX_VISIT)
    old = come(first)
    assert visit_of(first) == (MAX_VISIT, "")
    new = come(second)
    first.wait_for(lambda: not is_at(first), "the other gateway's word")
    with pytest.raises(ConnectionEndedError):
        old.read()
    second.wait_for(lambda: visit_of(first) == (0, "gw-2"), "given up")
    command(cloud, "found")
    assert heard(new) == "found"
    assert visit_of(second) == (MAX_VISIT, "")


def test_a_real_client_moves_and_moves_back(cloud: Member, first: Member, second: Member, tmp_path: Path) -> None:
    at_once = RetryTimer(unreachable=Backoff(0.01, 0.05), refused=Backoff(0.01, 0.05), stable_after_s=0.001)
    watching = Watching()
    with LoopbackProxy(first.port) as way:
        state = enrolled(tmp_path / "state", first.pki, port=way.port)
        client = Client.from_folder(
            state,
            observe=watching,
            renewal=False,
            retry=at_once,
            further_addresses=[BrokerAddress("127.0.0.1", second.port)],
            return_after_s=1,
        )
        with client:
            assert watching.wait_for(Connected).broker.port == way.port
            cloud.wait_for(lambda: _is_online(cloud), "its presence")
            second.knows("sensor-1", 1)
            way.lets_through = lambda _number: 0
            way.cut_all()
            assert watching.wait_for(Connected, 2).broker.port == second.port
            second.wait_for(lambda: visit_of(second) == (2, ""), "the visit")
            first.wait_for(lambda: visit_of(first) == (2, "gw-2"), "the farewell")
            cloud.wait_for(lambda: _is_online(cloud), "its presence")
            way.lets_through = lambda _number: None
            assert watching.wait_for(Connected, 3).broker.port == way.port
            first.wait_for(lambda: visit_of(first) == (3, "") and is_at(first), "the visit")
            second.wait_for(lambda: visit_of(second) == (3, "gw-1") and retained(second) is None, "the farewell")
            cloud.wait_for(lambda: _is_online(cloud), "its presence")
            client.publish("devices/sensor-1/telemetry/t", "21", wait=10)
        cloud.wait_for(lambda: not _is_online(cloud), "its goodbye")


def _is_online(member: Member) -> bool:
    payload = retained(member)
    return payload is not None and Presence.from_bytes(payload).online
