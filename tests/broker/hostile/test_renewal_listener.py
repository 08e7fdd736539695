"""The second listener: what has expired gets in there, to renew itself, and can do nothing else to anybody."""

from __future__ import annotations

import asyncio
import datetime as dt
import ssl
from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.mqtt_client import ConnectionEndedError, RawClient
from support.mqtt_gateway import policy, settings
from support.mqtt_process import BROKER_TOML
from support.mqtt_world import process_world, replace
from support.pki import SERVER, Authority, Pki, crl_pem, now
from support.repository import ROOT

from birthmark.broker.config import Durability, Limits, RenewalListener
from birthmark.broker.peer import PeerRefusedError, Trust, check_peer
from birthmark.broker.server import GatewayBroker, RenewalDoor
from birthmark.broker.tls import X509_V_FLAG_NO_CHECK_TIME, renewal_context, server_context
from birthmark.device.messages import Sighting

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.mqtt_world import ProcessWorld
    from support.pki import Issued

DAY = dt.timedelta(days=1)
GRACE = dt.timedelta(days=30)
POLICY = (ROOT / "broker" / "policy.default.toml").read_bytes()
TOML = BROKER_TOML + '\n[renewal_listener]\nlisten = "127.0.0.1:0"\n'
REQUEST, ANSWER = "devices/sensor-1/renewal/request", "devices/sensor-1/renewal/answer"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[ProcessWorld]:
    folder = tmp_path_factory.mktemp("gateway")
    with process_world(folder, pki, broker_toml=TOML, policy_toml=POLICY) as running:
        yield running


def expired(pki: Pki, *, by: dt.timedelta = DAY, name: str = "sensor-1", role: str = "device") -> Issued:
    return pki.issuing.issue(cns=[name], ous=[role], not_before=now() - 400 * DAY, not_after=now() - by)


def renewal_port(world: ProcessWorld) -> int:
    port: int = world.broker.wait_for_event("ready")["renewal_listen"][0]["port"]
    return port


def code(port: int, context: ssl.SSLContext, hello: bytes, *, session: ssl.SSLSession | None = None) -> int | None:
    """The code of the CONNACK; None if the connection ended without one."""
    try:
        with RawClient.connect(port, context, session=session) as client:
            client.send(hello)
            return client.read().body[1]
    except (OSError, ConnectionEndedError):
        return None


def opened(world: ProcessWorld, issued: Issued) -> RawClient:
    client = RawClient.connect(renewal_port(world), world.context_of(issued))
    world.clients.append(client)
    return client.handshake(mqtt.connect("sensor-1"))


def test_openssl_looks_away_on_the_renewal_listener_only(tmp_path: Path, pki: Pki) -> None:
    pki.write_broker_files(tmp_path)
    files = tmp_path / "server.pem", tmp_path / "clients-ca.pem"
    main, renewal = server_context(*files), renewal_context(*files)
    assert not main.verify_flags & X509_V_FLAG_NO_CHECK_TIME
    assert renewal.verify_flags & X509_V_FLAG_NO_CHECK_TIME
    assert renewal.verify_flags & ~X509_V_FLAG_NO_CHECK_TIME == main.verify_flags
    assert (main.verify_mode, main.minimum_version) == (renewal.verify_mode, renewal.minimum_version)


def test_credentials_that_come_during_a_start_are_those_of_both_listeners(tmp_path: Path, pki: Pki) -> None:
    """A gateway of a fleet may take a minute to start, and its files are watched meanwhile."""
    pki.write_broker_files(tmp_path)
    files = tmp_path / "server.pem", tmp_path / "clients-ca.pem"

    def shown_by(port: int) -> bytes | None:
        # Not by asyncio, which leaves the alert that follows in OpenSSL, for whoever comes next in this thread.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with RawClient.connect(port, context) as client:
            return client.tls.getpeercert(binary_form=True)

    async def main() -> None:
        door = RenewalDoor(
            RenewalListener("127.0.0.1", 0, GRACE),
            renewal_context(*files),
            lambda _: pytest.fail("nobody is let in"),
        )
        broker = GatewayBroker(
            settings(tmp_path, Limits(), durability=Durability.NONE),
            server_context(*files),
            door.admit,
            policy(POLICY),
            renewal=door,
        )
        successor = pki.issuing.server("localhost")
        successor.write(tmp_path / "server.pem")

        async def take() -> None:
            broker.set_tls_context(server_context(*files), renewal_context(*files))

        broker.before_listening = take
        await broker.start()
        for _, port in (*broker.addresses, *broker.renewal_addresses):
            assert await asyncio.to_thread(shown_by, port) == successor.der
        await broker.shutdown()

    asyncio.run(main())


def test_the_main_listener_never_looks_away(world: ProcessWorld, pki: Pki) -> None:
    late = world.context_of(expired(pki))
    assert code(world.port, late, mqtt.connect("sensor-1")) is None
    assert code(renewal_port(world), late, mqtt.connect("sensor-1")) == 0
    assert code(world.port, late, mqtt.connect("sensor-1")) is None, "after the other one let it in, too"


def test_a_session_of_the_one_listener_opens_nothing_at_the_other(world: ProcessWorld, pki: Pki) -> None:
    context = world.context_of(expired(pki))
    with RawClient.connect(renewal_port(world), context) as client:
        client.handshake(mqtt.connect("sensor-1")).ping()
        ticket = client.tls.session
    assert code(world.port, context, mqtt.connect("sensor-1"), session=ticket) in (None, 5)
    assert code(renewal_port(world), context, mqtt.connect("sensor-1"), session=ticket) == 0


def test_a_session_of_the_main_listener_is_resumed_there_alone(world: ProcessWorld, pki: Pki) -> None:
    context = world.context_of(pki.device())
    with RawClient.connect(world.port, context) as client:
        client.handshake(mqtt.connect("sensor-1")).ping()
        ticket = client.tls.session
    for port, resumed in ((renewal_port(world), False), (world.port, True)):
        with RawClient.connect(port, context, session=ticket) as client:
            client.handshake(mqtt.connect("sensor-1"))
            assert client.tls.session_reused is resumed


def test_who_is_let_in_there(world: ProcessWorld, pki: Pki) -> None:
    port, hello = renewal_port(world), mqtt.connect("sensor-1")

    def answer(issued: Issued) -> int | None:
        return code(port, world.context_of(issued), hello)

    assert answer(expired(pki)) == 0
    assert answer(pki.device()) == 0, "one that is valid may renew there as well"
    assert answer(expired(pki, by=GRACE - DAY)) == 0
    assert answer(expired(pki, by=GRACE + DAY)) == 5
    assert answer(pki.issuing.issue(not_before=now() + DAY, not_after=now() + 9 * DAY)) == 5
    assert answer(pki.stranger.issue(not_before=now() - 9 * DAY, not_after=now() - DAY)) is None
    assert answer(pki.issuing.issue(usages=[SERVER], not_before=now() - 9 * DAY, not_after=now() - DAY)) in (
        None,
        5,
    )
    alice = world.context_of(expired(pki, name="alice", role="operator"))
    assert code(port, alice, mqtt.connect("alice")) == 5, "a service renews at the station"
    other = world.context_of(expired(pki, name="sensor-2"))
    assert code(port, other, hello) == 2, "the client id is still the certificate's"


def test_an_issuing_ca_that_has_expired_vouches_for_nobody() -> None:
    ca = Authority.create(parent=Authority.create("Root"), not_after=now() - DAY)
    leaf = ca.issue(not_before=now() - 9 * DAY, not_after=now() - 2 * DAY)
    with pytest.raises(PeerRefusedError) as caught:
        check_peer(leaf.der, Trust.from_pem(ca.pem), now(), expired_by=GRACE)
    assert caught.value.reason == "issuer-validity"


def test_only_the_renewal_topics_exist_there(world: ProcessWorld, pki: Pki) -> None:
    watcher = world.operator("alice", ("devices/#", 1))
    service = world.client("renewd", "service-renewal").subscribed(("devices/+/renewal/request", 1))
    late = opened(world, expired(pki))
    own = [f"devices/sensor-1/{name}" for name in ("#", "commands/#", "+/answer", "time/answer")]
    wanted = [*own, "fleet/announcements/#", "#"]
    for number, topic_filter in enumerate(wanted, start=1):
        late.send(mqtt.subscribe(number, (topic_filter, 1)))
        assert late.read() == mqtt.suback(number, 0x80), topic_filter
    late.subscribed((ANSWER, 1), pid=9)
    denied = ("status", "telemetry/x", "replies/x", "time/request", "renewal/answer", "renewal/request/x")
    for name in denied:
        late.send(mqtt.publish(f"devices/sensor-1/{name}", b"evil"))
    late.send(mqtt.publish(REQUEST, b"kept?", retain=True))
    late.send(mqtt.publish(REQUEST, b"please", qos=1, pid=3))
    assert late.read() == mqtt.Packet(0x40, b"\0\3")
    assert service.read_delivery()[:2] == (REQUEST, b"please")
    assert watcher.read_delivery()[:2] == (REQUEST, b"please"), "nothing before it came through"
    service.send(mqtt.publish("devices/sensor-1/commands/reboot", b"no"))
    service.send(mqtt.publish(ANSWER, b"here"))
    assert late.read_delivery()[:2] == (ANSWER, b"here")
    late.ping()
    with world.operator("bob", (REQUEST, 0)) as nothing:
        nothing.ping()  # nothing is retained


def test_a_connection_there_outlives_the_certificate(world: ProcessWorld, pki: Pki) -> None:
    late = opened(world, expired(pki))
    silent = world.client("silent", keepalive=1)
    assert silent.read_end() == [], "the broker has looked for what is overdue"
    late.ping()


def test_it_does_not_blur_where_the_certificate_in_use_was_seen(world: ProcessWorld, pki: Pki) -> None:
    """A copied key shows by the addresses of its certificate; an older one must not wipe them out."""
    late = world.context_of(expired(pki, name="sensor-9"))
    with RawClient.connect(renewal_port(world), late) as client:
        client.handshake(mqtt.connect("sensor-9")).ping()
    with world.operator("alice", ("gateway/localhost/seen/sensor-10", 1)) as alice, world.client("sensor-10"):
        # In the order in which they came, within one round: with this one the other would have been told.
        assert Sighting.from_bytes(alice.read_delivery().payload).id == "sensor-10"
        alice.subscribed(("gateway/localhost/seen/sensor-9", 1), pid=2)
        alice.ping()


def test_it_leaves_no_last_will(world: ProcessWorld, pki: Pki) -> None:
    for topic in ("devices/sensor-1/status", REQUEST):
        hello = mqtt.connect("sensor-1", will=(topic, b"gone", 1, True))
        assert code(renewal_port(world), world.context_of(expired(pki)), hello) == 5


@pytest.mark.parametrize("clean", [True, False])
def test_the_session_of_a_valid_certificate_is_out_of_its_reach(
    world: ProcessWorld, pki: Pki, *, clean: bool
) -> None:
    name = f"sensor-{3 + clean}"
    alive = world.client(name, clean=False).subscribed((f"devices/{name}/commands/#", 1))
    late = world.context_of(expired(pki, name=name))
    with RawClient.connect(renewal_port(world), late) as client:
        client.handshake(mqtt.connect(name, clean=clean), present=False).ping()
        alive.ping()  # it was not taken over
        # Somebody who sends it a command: the session that waits is the old one's.
        alive.send(mqtt.DISCONNECT)
        assert alive.read_end() == []
        with world.operator("alice") as alice:
            alice.send(mqtt.publish(f"devices/{name}/commands/reboot", b"now", qos=1, pid=1))
            alice.read()
        client.ping()
    with RawClient.connect(renewal_port(world), late) as client:
        client.handshake(mqtt.connect(name, clean=clean), present=False).ping()
    with world.client(name, clean=False, present=True) as back:
        assert back.read_delivery().payload == b"now"


def test_the_name_of_that_session_is_no_client_id(world: ProcessWorld) -> None:
    for client_id in ("sensor-1/renewal", "sensor-1:renewal"):
        answered = code(world.port, world.context("sensor-1"), mqtt.connect(client_id))
        assert answered in (None, 2)


def test_a_revoked_certificate_stays_out_though_it_has_expired(tmp_path: Path, pki: Pki) -> None:
    lost, kept = expired(pki), expired(pki, name="sensor-2")
    with process_world(tmp_path, pki, broker_toml=TOML, policy_toml=POLICY) as world:
        late = opened(world, lost)
        replace(tmp_path / "crl.pem", crl_pem(pki.issuing.crl([lost.cert_serial], number=2, this_update=now())))
        assert late.read_end() == [], "the live connection is closed"
        port = renewal_port(world)
        assert code(port, world.context_of(lost), mqtt.connect("sensor-1")) == 5
        assert code(port, world.context_of(kept), mqtt.connect("sensor-2")) == 0


def test_without_its_table_there_is_none(tmp_path: Path, pki: Pki) -> None:
    with process_world(tmp_path, pki) as world:
        assert "renewal_listen" not in world.broker.wait_for_event("ready")
