"""Messages between clients over mutual TLS: publish, subscribe, every QoS, sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.mqtt_client import Delivery, Packet

if TYPE_CHECKING:
    from support.mqtt_gateway import RunningGateway


def test_a_device_connects_subscribes_and_gets_what_an_operator_says(gateway: RunningGateway) -> None:
    device = gateway.client("sensor-1").subscribed(("devices/sensor-1/commands/#", 1))
    operator = gateway.client("alice", "operator")
    operator.send(mqtt.publish("devices/sensor-1/commands/blink", b"3", qos=1, pid=7))
    assert operator.read() == Packet(0x40, b"\x00\x07")
    assert device.read_delivery() == Delivery("devices/sensor-1/commands/blink", b"3", 1, packet_id=1)


@pytest.mark.parametrize("granted", [0, 1, 2])
@pytest.mark.parametrize("published", [0, 1, 2])
def test_a_message_arrives_at_the_lower_qos(gateway: RunningGateway, published: int, granted: int) -> None:
    free = gateway.client("free-1").subscribed(("t", granted))
    free.send(mqtt.publish("t", b"x", qos=published, pid=9 if published else 0))
    got = [free.read() for _ in range(2 if published else 1)]
    (message,) = [mqtt.delivery(p) for p in got if p.first >> 4 == 3]
    assert (message.topic, message.payload, message.qos) == ("t", b"x", min(published, granted))
