"""Each packet that promises something waits for the disk, and no other does. The disk here waits for the test."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.mqtt_client import Packet
from support.mqtt_gateway import running_gateway
from support.patience import PATIENCE_S

from birthmark.broker import connection as connection_module
from birthmark.broker.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.mqtt_client import RawClient
    from support.mqtt_gateway import RunningGateway
    from support.pki import Pki

    from birthmark.broker.records import Changes

SILENCE_S = 0.1


class Disk:
    """Lets writes pass, or holds them."""

    def __init__(self) -> None:
        self.turns = threading.Event()
        self.turns.set()

    @contextmanager
    def held(self) -> Iterator[None]:
        self.turns.clear()
        try:
            yield
        finally:
            self.turns.set()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk, apply = Disk(), Store.apply

    def wait_and_apply(store: Store, changes: Changes) -> None:
        assert disk.turns.wait(PATIENCE_S)
        apply(store, changes)

    monkeypatch.setattr(Store, "apply", wait_and_apply)
    return disk


@pytest.fixture
def gateway(tmp_path: Path, pki: Pki, disk: Disk) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path, pki) as running:
        yield running


def check_waits(disk: Disk, client: RawClient, said: bytes, answer: Callable[[Packet], bool]) -> Packet:
    """Say something, whose answer must not come before the disk has turned."""
    with disk.held():
        client.send(said)
        with pytest.raises(TimeoutError):
            client.read(SILENCE_S)
    found = client.read()
    assert answer(found), found
    return found


def first(byte: int) -> Callable[[Packet], bool]:
    return lambda packet: packet.first == byte


def away(gateway: RunningGateway) -> None:
    client = gateway.client("free-1", clean=False).subscribed(("t", 2))
    client.send(mqtt.DISCONNECT)
    client.read_end()


def test_puback_waits_for_a_session_that_is_away(gateway: RunningGateway, disk: Disk) -> None:
    away(gateway)
    check_waits(disk, gateway.client("free-2"), mqtt.publish("t", b"x", qos=1, pid=1), first(0x40))


def test_puback_waits_for_a_retained_message(gateway: RunningGateway, disk: Disk) -> None:
    check_waits(disk, gateway.client("free-2"), mqtt.publish("u", b"x", qos=1, pid=1, retain=True), first(0x40))


def test_pubrec_and_pubcomp_wait_for_the_packet_identifier(gateway: RunningGateway, disk: Disk) -> None:
    publisher = gateway.client("free-2", clean=False)
    check_waits(disk, publisher, mqtt.publish("nobody/listens", b"x", qos=2, pid=1), first(0x50))
    check_waits(disk, publisher, mqtt.pubrel(1), first(0x70))


def test_a_packet_identifier_said_again_waits_for_what_it_was_first_said_for(
    gateway: RunningGateway, disk: Disk
) -> None:
    publisher = gateway.client("free-2", clean=False)
    with disk.held():
        publisher.send(mqtt.publish("nobody/listens", b"x", qos=2, pid=1))
        gateway.wait_for(lambda: gateway.broker.counters.messages_in == 1, "it is taken")
        again = gateway.client("free-2", clean=False, present=True)
        again.send(mqtt.publish("nobody/listens", b"x", qos=2, pid=1, dup=True))
        with pytest.raises(TimeoutError):
            again.read(SILENCE_S)
    assert again.read() == Packet(0x50, b"\x00\x01")
    assert gateway.broker.counters.messages_in == 1


def test_suback_and_unsuback_wait_for_a_persistent_session(gateway: RunningGateway, disk: Disk) -> None:
    client = gateway.client("free-1", clean=False)
    check_waits(disk, client, mqtt.subscribe(1, ("t", 1)), first(0x90))
    check_waits(disk, client, mqtt.unsubscribe(2, "t"), first(0xB0))


def test_connack_of_a_clean_session_waits_for_the_end_of_the_former(gateway: RunningGateway, disk: Disk) -> None:
    away(gateway)
    again = gateway.open(gateway.context("free-1"))
    check_waits(disk, again, mqtt.connect("free-1", clean=True), lambda found: found == mqtt.connack(0))


def test_connack_waits_as_well_for_an_end_that_another_connection_began(
    gateway: RunningGateway, disk: Disk
) -> None:
    away(gateway)
    with disk.held():
        gateway.open(gateway.context("free-1")).send(mqtt.connect("free-1", clean=True))
        gateway.wait_for(lambda: gateway.broker.connected_count == 1, "it has ended the former session")
        again = gateway.open(gateway.context("free-1"))
        again.send(mqtt.connect("free-1", clean=False))
        with pytest.raises(TimeoutError):
            again.read(SILENCE_S)
        gateway.client("free-2", clean=True).ping()
    assert again.read() == mqtt.connack(0)


def test_qos_2_to_a_persistent_session_waits_at_each_step(gateway: RunningGateway, disk: Disk) -> None:
    device = gateway.client("free-1", clean=False).subscribed(("t", 2))
    publisher = gateway.client("free-2")
    with disk.held():
        publisher.send(mqtt.publish("t", b"x", qos=2, pid=1))
        with pytest.raises(TimeoutError):
            device.read(SILENCE_S)
    message = device.read_delivery()
    check_waits(disk, device, mqtt.pubrec(message.packet_id), first(0x62))


def test_what_promises_nothing_waits_for_nothing(gateway: RunningGateway, disk: Disk) -> None:
    away(gateway)
    hearing = gateway.client("free-3").subscribed(("u", 2), ("t", 1))
    waiting, free = gateway.client("free-2"), gateway.client("free-4")
    with disk.held():
        waiting.send(mqtt.publish("t", b"owed", qos=1, pid=1))
        assert hearing.read_delivery().payload == b"owed", "a clean session gets it at once"
        free.send(mqtt.publish("u", b"owed to nobody durable", qos=1, pid=1))
        assert free.read() == Packet(0x40, b"\x00\x01")
        assert hearing.read_delivery().payload == b"owed to nobody durable"
        free.subscribed(("v", 1), pid=2)
        gateway.client("free-5").ping()
        # Acknowledgements keep their order (MQTT-4.6.0-2): the second one waits for the first.
        waiting.send(mqtt.publish("u", b"second", qos=1, pid=2))
        with pytest.raises(TimeoutError):
            waiting.read(SILENCE_S)
    assert [waiting.read().body for _ in range(2)] == [b"\x00\x01", b"\x00\x02"]


def test_a_disk_that_falls_behind_slows_nobody_down_who_needs_none(
    gateway: RunningGateway, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "HIGH_WATER_BYTES", 1_000)
    greedy, free = gateway.client("free-1"), gateway.client("free-2")
    counters = gateway.broker.counters
    with disk.held():
        greedy.send(mqtt.publish("t/1", bytes(2_000), retain=True))
        journal = gateway.broker.exchange.journal
        gateway.wait_for(
            lambda: journal.recorded > 0 and not journal.pending_bytes, "the disk has it, and keeps it"
        )
        greedy.send(mqtt.publish("t/2", bytes(2_000), retain=True))
        gateway.wait_for(lambda: journal.pending_bytes > 1_000, "the second one waits behind it")
        paused = counters.publishers_paused
        for number in range(1, 4):
            free.send(mqtt.publish("u", b"owed to nobody durable", qos=1, pid=number))
            assert free.read() == Packet(0x40, number.to_bytes(2, "big"))
        assert counters.publishers_paused == paused
    greedy.ping()


def test_a_stop_says_what_it_has_promised(gateway: RunningGateway, disk: Disk) -> None:
    """Acknowledgements on their way leave before the connection ends."""
    away(gateway)
    publisher = gateway.client("free-2")
    publisher.send(b"".join(mqtt.publish("t", b"x", qos=1, pid=number) for number in range(1, 51)))
    gateway.wait_for(lambda: gateway.broker.counters.messages_in == 50, "they are taken")
    publisher.send(mqtt.DISCONNECT)
    assert len(publisher.read_end()) == 50
