"""The broker killed with SIGKILL at random moments under load: nothing that it acknowledged is lost.

Every QoS 1 message acknowledged arrives at least once, every QoS 2 message exactly once, each topic's in order, at
subscribers that are there all the time, at one that comes and goes, and at one that is away until the end; the
last retained message acknowledged is there. The quick count kills a few times, `make proof` fifty times.
"""

from __future__ import annotations

import os
import random
import signal
import time
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.mqtt_client import RawClient, client_context
from support.mqtt_durable import DurableLoad, DurablePublisher, DurableSubscriber
from support.mqtt_process import BROKER_TOML, broker_process, write_files
from support.patience import PATIENCE_S

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from pathlib import Path

    from support.pki import Pki

WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
KILLS = 50 if WHOLE else 4
LIMITS = "\n[limits]\nmax_queued_messages = 1000000\nmax_queued_bytes = 1000000000\n"


class Bench(DurableLoad):
    """A broker that is killed and started again, and its clients."""

    def __init__(self, folder: Path, pki: Pki) -> None:
        self.folder = folder
        self.pki = pki
        self.config = write_files(folder, pki, broker_toml=BROKER_TOML + LIMITS)
        self.port = 0
        filters = (("q1", 1), ("q2", 2))
        self.present = DurableSubscriber(*self._client("free-present"), filters=filters)
        self.roaming = DurableSubscriber(*self._client("free-roaming"), filters=filters)
        self.away = DurableSubscriber(*self._client("free-away"), filters=filters)
        self.q1 = DurablePublisher(*self._client("free-p1"), topic="q1", qos=1)
        self.q2 = DurablePublisher(*self._client("free-p2"), topic="q2", qos=2)
        self.kept = DurablePublisher(*self._client("free-p3"), topic="kept", qos=1, retain=True)
        self.subscribers = [self.present, self.roaming, self.away]
        self.publishers = [self.q1, self.q2, self.kept]

    def context(self, name: str) -> ssl.SSLContext:
        path = self.pki.device(name, "device").write(self.folder / f"{name}.pem")
        return client_context(path, self.folder / "root.pem")

    def begin(self) -> None:
        self.everybody_subscribes()
        self.away.stop()
        for publisher in self.publishers:
            publisher.start()

    def see_through(self) -> None:
        """Publish nothing new, and wait until all that was sent has arrived."""
        self.away.start()
        self.finish_publishing()
        self.eventually(lambda: all(self._has_all(s) for s in self.subscribers), "everything arrives")
        for client in self.clients:
            client.stop()

    def stop(self) -> None:
        for client in self.clients:
            client.is_stopped.set()

    def _has_all(self, subscriber: DurableSubscriber) -> bool:
        q1, q2 = subscriber.delivered.get("q1", [0]), subscriber.delivered.get("q2", [])
        return q1[-1] == self.q1.sent and len(q2) >= self.q2.sent

    def _client(self, name: str) -> tuple[str, ssl.SSLContext, Callable[[], int]]:
        return name, self.context(name), lambda: self.port


def check_at_least_once(numbers: list[int], acknowledged: int) -> None:
    assert set(range(1, acknowledged + 1)) <= set(numbers), "an acknowledged message of QoS 1 is lost"
    first_of_each = list(dict.fromkeys(numbers))
    assert first_of_each == sorted(first_of_each), "out of order"


def check_exactly_once(numbers: list[int], acknowledged: int) -> None:
    assert all(earlier < later for earlier, later in pairwise(numbers)), "delivered twice, or out of order"
    assert numbers == list(range(1, acknowledged + 1)), "an acknowledged message of QoS 2 is lost"


@pytest.mark.proof
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
@pytest.mark.timeout(1_000)
def test_nothing_acknowledged_is_lost(
    tmp_path: Path, pki: Pki, end: signal.Signals, proven: Callable[[str], None]
) -> None:
    chance = random.Random(1)
    bench = Bench(tmp_path, pki)
    rounds = KILLS if end is signal.SIGKILL else max(1, KILLS // 4)
    try:
        for number in range(rounds):
            with broker_process(bench.config) as broker:
                bench.port = broker.port
                if number == 0:
                    bench.begin()
                bench.everybody_publishes()
                if number % 2:
                    bench.roaming.stop()
                time.sleep(chance.uniform(0, 0.3))  # the moment is what is tested, not waited for
                bench.port = 0
                broker.process.send_signal(end)
                assert broker.process.wait(PATIENCE_S) == (-signal.SIGKILL if end is signal.SIGKILL else 0)
                if number % 2:
                    bench.roaming.start()
        with broker_process(bench.config) as broker:
            bench.port = broker.port
            bench.see_through()
            for subscriber in bench.subscribers:
                check_at_least_once(subscriber.delivered["q1"], bench.q1.acknowledged)
                check_exactly_once(subscriber.delivered["q2"], bench.q2.acknowledged)
            with RawClient.connect(bench.port, bench.context("free-late")) as late:
                late.handshake(mqtt.connect("free-late")).subscribed(("kept", 1))
                message = late.read_delivery()
                assert message.retain
                assert int(message.payload) == bench.kept.sent == bench.kept.acknowledged
            assert min(publisher.sent for publisher in bench.publishers) > rounds, "it was no load"
            assert bench.present.connections > rounds
            proven(
                f"ended {rounds} times under load: of {bench.q1.acknowledged:,} messages of QoS 1 none lost, of "
                f"{bench.q2.acknowledged:,} of QoS 2 none lost and none twice, at three subscribers"
            )
    finally:
        bench.stop()
