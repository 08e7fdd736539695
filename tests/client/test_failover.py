"""Brokers that go away, come back, refuse, and networks that cut and fall silent."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
from support.broker_process import BrokerProcess
from support.broker_stub import CONNECT, DISCONNECT, PUBLISH, BrokerStub
from support.device_folder import enrolled
from support.loopback_proxy import LoopbackProxy
from support.patience import PATIENCE_S
from support.ports import steady_port
from support.waiting import eventually
from support.watching import Watching

from birthmark.device.backoff import Backoff, RetryTimer
from birthmark.device.client import Client
from birthmark.device.connection_checks import Check
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.events import AttemptFailed, Connected, Disconnected
from birthmark.device.outbox.settings import OutboxSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.pki import Pki

    from birthmark.device.received import Message

AT_ONCE = Backoff(0.01, 0.05)
TOPIC = "devices/sensor-1/telemetry/t"


def impatient() -> RetryTimer:
    return RetryTimer(unreachable=AT_ONCE, refused=AT_ONCE, stable_after_s=0.001)


@pytest.fixture
def second(pki: Pki) -> Iterator[BrokerStub]:
    with BrokerStub(pki) as stub:
        yield stub


def keepalive_of(broker: BrokerStub, count: int) -> int:
    return int.from_bytes(broker.wait_for(CONNECT, count=count).body[8:10])


def test_the_next_broker_is_taken_and_the_first_again_when_it_is_back(
    tmp_path: Path, pki: Pki, second: BrokerStub
) -> None:
    watching = Watching()
    port = steady_port()
    with BrokerStub(pki, port=port):
        state = enrolled(tmp_path / "state", pki, port=port)
        (state / "device.toml").write_text(
            f'[broker]\nfurther_addresses = ["127.0.0.1:{second.port}"]\nreturn_after_s = 1\n'
        )
        client = Client.from_folder(state, observe=watching, retry=impatient(), renewal=False)
        client.start()
        assert watching.wait_for(Connected).broker.port == port
    try:
        assert watching.wait_for(Connected, 2).broker.port == second.port
        failed = watching.wait_for(AttemptFailed)
        assert str(failed.error.message).startswith(f"could not connect to 127.0.0.1:{port}")
        with BrokerStub(pki, port=port) as first:
            assert watching.wait_for(Connected, 3).broker.port == port
            second.wait_for(DISCONNECT)  # it left in good order
            client.publish(TOPIC, "back", wait=PATIENCE_S)
            first.wait_for(PUBLISH, lambda packet: packet.payload == b"back")
            client.stop()
    finally:
        client.stop()


def test_one_that_refuses_does_not_keep_us_from_one_that_does_not(
    tmp_path: Path, pki: Pki, second: BrokerStub
) -> None:
    watching = Watching()
    further = [BrokerAddress("127.0.0.1", second.port)]
    with BrokerStub(pki, connack=5) as first:
        state = enrolled(tmp_path / "state", pki, port=first.port)
        with Client.from_folder(state, observe=watching, renewal=False, further_addresses=further) as client:
            assert client.is_connected
        refused = watching.wait_for(AttemptFailed)
        assert (refused.error.check, refused.retry_in_s) == (Check.NOT_AUTHORISED, 0)


def test_every_broker_is_checked_against_its_own_name(tmp_path: Path, pki: Pki) -> None:
    watching = Watching()
    with BrokerStub(pki, server=pki.issuing.server("127.0.0.1")) as one:
        state = enrolled(tmp_path / "state", pki, host="localhost", port=one.port)
        further = [BrokerAddress("127.0.0.1", one.port)]
        with Client.from_folder(state, observe=watching, renewal=False, further_addresses=further):
            assert watching.wait_for(AttemptFailed).error.check == Check.SERVER_NAME
            assert watching.wait_for(Connected).broker == further[0]


def test_when_all_have_failed_there_is_one_wait(tmp_path: Path, pki: Pki) -> None:
    watching = Watching()
    with BrokerStub(pki, connack=5) as one, BrokerStub(pki, connack=3) as other:
        state = enrolled(tmp_path / "state", pki, port=one.port)
        further = [BrokerAddress("127.0.0.1", other.port)]
        retry = RetryTimer(lambda _low, high: high, unreachable=Backoff(0.3, 0.3), refused=Backoff(77, 77))
        client = Client.from_folder(state, observe=watching, renewal=False, further_addresses=further, retry=retry)
        client.start()
        watching.wait_for(AttemptFailed, 4)
        client.stop()
    failed = [event for event in watching.events if isinstance(event, AttemptFailed)][:4]
    assert [event.retry_in_s for event in failed] == [0, 0.3, 0, 0.3]  # the one that may pass decides


def test_a_network_that_forgets_shortens_the_keepalive(tmp_path: Path, pki: Pki, second: BrokerStub) -> None:
    watching = Watching()
    with LoopbackProxy(second.port) as network:
        state = enrolled(tmp_path / "state", pki, port=network.port, keepalive_s=2)
        options: dict[str, Any] = {"renewal": False, "keepalive_s": (1, 2), "retry": impatient()}
        with Client.from_folder(state, observe=watching, **options):
            assert keepalive_of(second, 1) == 2
            network.stalls = True
            assert watching.wait_for(Disconnected).error.check == Check.NO_ANSWER
            network.stalls = False
            network.cut_all()
            assert keepalive_of(second, 2) == 1


def test_a_session_is_resumed_at_the_same_broker_only(tmp_path: Path, pki: Pki, second: BrokerStub) -> None:
    watching = Watching()
    with BrokerStub(pki) as first:
        state = enrolled(tmp_path / "state", pki, host="localhost", port=first.port)
        further = [BrokerAddress("127.0.0.1", second.port)]
        options: dict[str, Any] = {"renewal": False, "further_addresses": further, "retry": impatient()}
        with Client.from_folder(state, observe=watching, **options):
            for number in range(2, 4):
                watching.wait_for(Connected, number - 1)
                first.drop()
                watching.wait_for(Connected, number)
            first.connack = 3
            first.drop()
            watching.wait_for(Connected, 4)
    met = [(event.broker.host, event.tls_resumed) for event in watching.events if isinstance(event, Connected)]
    assert met == [("localhost", False), ("localhost", True), ("localhost", True), ("127.0.0.1", False)]


def test_behind_a_network_that_cuts_half_of_the_connections_everything_arrives(tmp_path: Path, pki: Pki) -> None:
    draw = random.Random(7)
    with BrokerProcess(tmp_path / "gw", pki) as broker:
        got: list[bytes] = []

        def take(message: Message) -> None:
            got.append(message.payload)

        anchors = tmp_path / "ca.pem"
        anchors.write_bytes(pki.root.pem)
        identity = pki.operator("alice").write(tmp_path / "alice.pem")
        operator = Credentials.from_files(identity, anchors, BrokerAddress("127.0.0.1", broker.port))

        def lets_through(number: int) -> int | None:
            return draw.randrange(0, 5_000) if number % 2 == 0 else None

        with Client(operator) as alice, LoopbackProxy(broker.port, lets_through) as network:
            alice.subscribe("devices/sensor-1/telemetry/#", take, wait=PATIENCE_S)
            state = enrolled(tmp_path / "state", pki, port=network.port)
            options: dict[str, Any] = {"renewal": False, "retry": impatient()}
            client = Client.from_folder(state, outbox=OutboxSettings(drain_per_s=0), **options)
            client.start()
            for number in range(400):
                acknowledgement = client.publish(TOPIC, str(number), defer=True)
                if number % 40 == 39:
                    acknowledgement.wait(PATIENCE_S)
                    network.cut_all()
            client.publish(TOPIC, "last", wait=PATIENCE_S)
            client.stop()
            eventually(lambda: b"last" in got, "the last one")
            assert network.connections > 10
            assert network.cut > 3
    assert list(dict.fromkeys(got)) == [*(str(number).encode() for number in range(400)), b"last"]


def test_after_a_connection_that_held_the_first_comes_first_again(
    tmp_path: Path, pki: Pki, second: BrokerStub
) -> None:
    watching = Watching()
    further = [BrokerAddress("127.0.0.1", second.port)]
    port = steady_port()
    state = enrolled(tmp_path / "state", pki, port=port)
    options: dict[str, Any] = {"renewal": False, "further_addresses": further, "return_after_s": 3600}
    with Client.from_folder(state, observe=watching, retry=impatient(), **options):
        assert watching.wait_for(Connected).broker.port == second.port
        with BrokerStub(pki, port=port):
            second.drop()
            assert watching.wait_for(Connected, 2).broker.port == port
