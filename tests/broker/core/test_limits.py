"""What one client, or many, can make the gateway hold: bounded, and then cut off (S15)."""

from __future__ import annotations

import contextlib
import random
import threading
from typing import TYPE_CHECKING

from support import mqtt_client as mqtt
from support.mqtt_gateway import running_gateway
from support.patience import PATIENCE_S

from birthmark.broker.config import Limits

if TYPE_CHECKING:
    from pathlib import Path

    from support.mqtt_gateway import RunningGateway
    from support.pki import Pki


def waiting_bytes(gateway: RunningGateway) -> int:
    return max(c.stream.waiting_bytes for c in gateway.call(lambda: list(gateway.broker._connections)))


def test_a_client_that_does_not_read_holds_a_bounded_buffer(tmp_path: Path, pki: Pki) -> None:
    """Stock amqtt: 78 to 290 MB in ten seconds. QoS 0 is dropped, and said once; others go on."""
    with running_gateway(tmp_path, pki, limits=Limits(max_queued_bytes=200_000)) as gateway:
        # What the kernel takes for it is bounded as well, whatever the machine is set to.
        deaf = gateway.open(gateway.context("free-1"), receive_bytes=65_536)
        deaf.handshake(mqtt.connect("free-1")).subscribed(("load", 0))
        hearing = gateway.client("free-2").subscribed(("load", 1))
        publisher = gateway.client("free-3")
        for number in range(1, 301):
            publisher.send(mqtt.publish("load", bytes(50_000), qos=1, pid=number))
            assert publisher.read().first == 0x40
            message = hearing.read_delivery()
            hearing.send(mqtt.puback(message.packet_id))
            assert waiting_bytes(gateway) <= 250_100
        assert gateway.broker.counters.dropped_slow > 100
        # It reads again, and is still a client: what was dropped is gone, what comes now arrives.
        deaf.send(mqtt.PINGREQ)
        while deaf.read() != mqtt.PINGRESP:
            pass
        publisher.send(mqtt.publish("load", b"now"))
        assert deaf.read_delivery().payload == b"now"


def test_unread_acknowledged_messages_wait_in_the_bounded_queue(tmp_path: Path, pki: Pki) -> None:
    with running_gateway(tmp_path, pki, limits=Limits(max_queued_bytes=200_000)) as gateway:
        gateway.client("free-1").subscribed(("load", 1))
        publisher = gateway.client("free-3")
        for number in range(1, 301):
            publisher.send(mqtt.publish("load", bytes(50_000), qos=1, pid=number))
            assert publisher.read().first == 0x40
        session = gateway.call(gateway.broker.exchange.sessions.get, "free-1")
        assert session is not None
        assert session.queued_bytes <= 200_000
        assert session.inflight_bytes <= 260_000
        assert gateway.broker.counters.dropped_queue_full > 200


def test_a_client_that_asks_and_never_reads_is_cut_off(tmp_path: Path, pki: Pki) -> None:
    """What it asks for cannot be dropped, so it is."""
    with running_gateway(tmp_path, pki, limits=Limits(max_queued_bytes=2_000, max_packet_bytes=2_000)) as gateway:
        greedy = gateway.open(gateway.context("sensor-1"), receive_bytes=4_096)
        greedy.handshake(mqtt.connect("sensor-1"))
        pings = mqtt.PINGREQ * 50_000
        with contextlib.suppress(OSError):
            for _ in range(1_000):
                greedy.send(pings)
        gateway.wait_for(lambda: gateway.broker.counters.slow_cut_off == 1, "it is counted")


def test_a_socket_that_takes_nothing_is_cut_off(tmp_path: Path, pki: Pki) -> None:
    with running_gateway(tmp_path, pki, limits=Limits(stall_timeout_s=0.5)) as gateway:
        deaf = gateway.open(gateway.context("free-1"), receive_bytes=65_536)
        deaf.handshake(mqtt.connect("free-1")).subscribed(("load", 0))
        publisher = gateway.client("free-2")
        for _ in range(100):
            publisher.send(mqtt.publish("load", bytes(100_000)))
        publisher.ping()
        gateway.wait_for(lambda: gateway.broker.counters.slow_cut_off == 1, "it is cut off")
        publisher.ping()


def test_random_bytes_never_break_the_gateway(gateway: RunningGateway) -> None:
    """S12. The fixture fails the test if anything was raised inside the gateway."""
    chance = random.Random(7)
    context = gateway.context("sensor-1")
    for number in range(60):
        client = gateway.open(context)
        if number % 3:
            client.handshake(mqtt.connect("sensor-1"))
        good = [
            mqtt.publish("devices/sensor-1/x", b"y", qos=1, pid=3),
            mqtt.subscribe(1, ("a", 0)),
            mqtt.pubrel(9),
        ]
        data = bytearray(chance.choice(good) + chance.randbytes(chance.randrange(60)))
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        client.send(bytes(data))
        client.close()
    gateway.client("sensor-2").ping()


def test_subscription_churn_loses_nothing(gateway: RunningGateway) -> None:
    """S10: stock amqtt drops deliveries while others subscribe and unsubscribe."""
    subscriber = gateway.client("free-1").subscribed(("t", 0))
    churning = gateway.client("free-2")
    publisher = gateway.client("free-3")
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            churning.send(mqtt.subscribe(1, ("t", 0), ("x/+", 0)) + mqtt.unsubscribe(2, "t", "x/+"))
            while churning.read().first != 0xB0:
                pass

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for number in range(1_000):
            publisher.send(mqtt.publish("t", b"%d" % number))
        for number in range(1_000):
            assert subscriber.read_delivery().payload == b"%d" % number
    finally:
        stop.set()
        thread.join(PATIENCE_S)
