"""A client that minds its own business beside an attack, and notes how long that takes."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from support import mqtt_client as mqtt
from support.patience import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.mqtt_client import RawClient

PAUSE_S = 0.05


@dataclass
class Canary:
    """What has happened to it so far."""

    latest_s: float = 0.0
    """The longest that one of its messages was on its way and back."""
    count: int = 0
    failures: list[BaseException] = field(default_factory=list)


@contextmanager
def singing(client: RawClient, name: str) -> Iterator[Canary]:
    """Have a connected client publish to itself at QoS 1 again and again, until the block ends.

    Each message must be acknowledged and come back, and nothing else may come. How long it took is told: many
    other tests share the machine.
    """
    canary, stop = Canary(), threading.Event()
    topic = f"devices/{name}/telemetry/song"
    client.subscribed((topic, 1))

    def sing() -> None:
        try:
            while not stop.wait(PAUSE_S):
                payload = b"%d" % canary.count
                began_s = time.monotonic()
                client.send(mqtt.publish(topic, payload, qos=1, pid=1))
                answers = [client.read(), client.read()]
                canary.latest_s = max(canary.latest_s, time.monotonic() - began_s)
                (acknowledgement,) = [answer for answer in answers if answer.first == 0x40]
                (found,) = [mqtt.delivery(answer) for answer in answers if answer.first >> 4 == 3]
                assert acknowledgement.body == b"\0\1"
                assert (found.topic, found.payload) == (topic, payload)
                client.send(mqtt.puback(found.packet_id))
                canary.count += 1
        except BaseException as error:  # noqa: BLE001 - told to the test below
            canary.failures.append(error)

    thread = threading.Thread(target=sing)
    thread.start()
    try:
        yield canary
    finally:
        stop.set()
        thread.join(2 * PATIENCE_S)
    assert not thread.is_alive()
    if canary.failures:
        raise AssertionError("the canary fell silent") from canary.failures[0]
    assert canary.count, "it sang"
