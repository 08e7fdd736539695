"""A gateway, its upstream and the link between them killed under load, with SIGKILL and in any order.

What was acknowledged to a publisher at the gateway arrives above, what was acknowledged to one above arrives at
the gateway, each topic's in order; what arrives twice was on its way, unacknowledged, when something was killed.
The quick count kills a few times, `make proof` forty times.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.loopback_proxy import LoopbackProxy
from support.mqtt_client import ConnectionEndedError, RawClient, client_context
from support.mqtt_durable import WINDOW, DurableLoad, DurablePublisher, DurableSubscriber
from support.mqtt_process import BROKER_TOML, BrokerProcess, broker_process, write_files
from support.patience import PATIENCE_S
from support.upstreams import POLICY, publish, said, upstream_toml, write_credentials

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from support.pki import Pki

WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
KILLS = 40 if WHOLE else 5
INFLIGHT = 100
NOWHERE = 1
"""A port that nobody listens on."""
QUEUES = "\n[limits]\nmax_queued_messages = 1000000\nmax_queued_bytes = 1000000000\n"
UP, DOWN = "devices/free-p1/telemetry/t", "devices/free-s1/commands/c"


class Side:
    """A broker in a process, that is killed and started again."""

    def __init__(self, folder: Path, pki: Pki, broker_toml: str) -> None:
        self.config = write_files(folder, pki, broker_toml=broker_toml)
        (folder / "policy.toml").write_bytes(POLICY)
        self.port = 0
        self._context: AbstractContextManager[BrokerProcess] | None = None
        self.process: BrokerProcess

    def start(self) -> None:
        self._context = broker_process(self.config)
        self.process = self._context.__enter__()
        self.port = self.process.port

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self._context is not None:
            self.port = 0
            self.process.process.send_signal(number)
            self.process.process.wait(PATIENCE_S)
            self._context.__exit__(None, None, None)
            self._context = None


class Bench(DurableLoad):
    """Two brokers, the link between them by way of a proxy, and a publisher and a subscriber each way."""

    def __init__(self, folder: Path, pki: Pki, proxy: LoopbackProxy) -> None:
        self.proxy = proxy
        self._folder, self._pki = folder, pki
        for name in ("above", "below"):
            (folder / name).mkdir()
        self.above = Side(folder / "above", pki, BROKER_TOML + QUEUES)
        write_credentials(folder / "below", pki, "gw-1")
        linked = upstream_toml("gw-1", proxy.port, max_inflight=INFLIGHT, spool_messages=1_000_000)
        self.below = Side(folder / "below", pki, BROKER_TOML + linked + QUEUES)
        self.goes_up = DurablePublisher(*self.client("free-p1", self.below), topic=UP)
        self.comes_up = DurableSubscriber(*self.client("free-s2", self.above), filters=((UP, 1),))
        self.goes_down = DurablePublisher(*self.client("free-p2", self.above), topic=DOWN)
        self.comes_down = DurableSubscriber(*self.client("free-s1", self.below), filters=((DOWN, 1),))
        self.publishers = [self.goes_up, self.goes_down]
        self.subscribers = [self.comes_up, self.comes_down]

    def client(self, name: str, side: Side) -> tuple[str, ssl.SSLContext, Callable[[], int]]:
        path = self._pki.device(name).write(self._folder / f"{name}.pem")
        context = client_context(path, self._folder / "above" / "root.pem")
        return name, context, lambda: side.port

    def connect(self, name: str, side: Side) -> RawClient:
        return RawClient.connect(side.port, self.client(name, side)[1])

    def begin(self) -> None:
        self.start_above()
        self.below.start()
        self.everybody_subscribes()
        for publisher in self.publishers:
            publisher.start()
        # What is published above before the gateway has subscribed is nobody's.
        self.eventually(lambda: bool(self.comes_down.delivered), "the link is up")

    def start_above(self) -> None:
        self.above.start()
        self.proxy.target_port = self.above.port

    def see_through(self) -> None:
        self.finish_publishing()
        for publisher, subscriber in zip(self.publishers, self.subscribers, strict=True):
            self.eventually(
                lambda p=publisher, s=subscriber: s.delivered[p.topic][-1] == p.sent,  # type: ignore[misc]
                "everything arrives",
            )

    def stop(self) -> None:
        for client in self.clients:
            client.is_stopped.set()
        self.below.end()
        self.above.end()


def check(numbers: list[int], first: int, publisher: DurablePublisher, kills: int) -> None:
    assert set(range(first, publisher.acknowledged + 1)) <= set(numbers), "an acknowledged message is lost"
    firsts = list(dict.fromkeys(numbers))
    assert firsts == sorted(firsts), "out of order"
    assert len(numbers) - len(firsts) <= (kills + 1) * (INFLIGHT + 2 * WINDOW), "sent again without need"


@pytest.mark.proof
@pytest.mark.timeout(1_500)
def test_nothing_acknowledged_is_lost_on_the_way_up_or_down(
    tmp_path: Path, pki: Pki, proven: Callable[[str], None]
) -> None:
    chance = random.Random(7)
    with LoopbackProxy(NOWHERE) as proxy:
        bench = Bench(tmp_path, pki, proxy)
        try:
            bench.begin()
            first = bench.comes_down.delivered[DOWN][0]
            for number in range(KILLS):
                bench.everybody_publishes()
                time.sleep(chance.uniform(0, 0.3))  # the moment is what is tested, not waited for
                match ("gateway", "upstream", "link", "both", "stop")[number % 5]:
                    case "gateway":
                        bench.below.end()
                        bench.below.start()
                    case "upstream":
                        bench.above.end()
                        before = bench.goes_up.acknowledged
                        bench.eventually(lambda b=before: bench.goes_up.acknowledged > b + 100, "it is spooled")  # type: ignore[misc]
                        bench.start_above()
                    case "link":
                        proxy.cut_all()
                    case "both":
                        bench.above.end()
                        bench.below.end()
                        bench.below.start()
                        bench.start_above()
                    case _:
                        bench.below.end(signal.SIGTERM)
                        bench.below.start()
            bench.see_through()
            check(bench.comes_up.delivered[UP], 1, bench.goes_up, KILLS)
            check(bench.comes_down.delivered[DOWN], first, bench.goes_down, KILLS)
            proven(
                f"{KILLS} faults of the gateway, the one above and the link: of {bench.goes_up.acknowledged:,} "
                f"messages up and {bench.goes_down.acknowledged:,} down none lost, all in order"
            )
        finally:
            bench.stop()


def full(side: Side, *, is_full: bool) -> None:
    """Let no file of a broker grow: to a write, this is a full disk."""
    limit = 4_096 if is_full else resource.RLIM_INFINITY
    resource.prlimit(side.process.process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def test_on_a_full_disk_nothing_is_acknowledged_up_or_down_and_all_goes_on_when_there_is_room(
    tmp_path: Path, pki: Pki
) -> None:
    with LoopbackProxy(NOWHERE) as proxy:
        bench = Bench(tmp_path, pki, proxy)
        bench.start_above()
        bench.below.start()
        try:
            with bench.connect("free-1", bench.above) as watcher, bench.connect("free-2", bench.below) as device:
                watcher.handshake(mqtt.connect("free-1")).subscribed((UP, 1))
                device.handshake(mqtt.connect("free-2", clean=False)).subscribed((DOWN, 1))
                publish(device, UP, b"before")
                assert said(watcher, 1)[0][1] == b"before"
                # With the link up, a message may be above before its turn on the disk: rightly acknowledged.
                proxy.target_port, logged = NOWHERE, len(bench.below.process.log)
                proxy.cut_all()
                bench.below.process.wait_for_log("messages wait, and it is tried again by itself", logged)
                full(bench.below, is_full=True)
                device.send(mqtt.publish(UP, b"not acknowledged", qos=1, pid=2))
                with pytest.raises(ConnectionEndedError):
                    device.read()
                bench.below.process.wait_for_log("could not write to the store")
                proxy.target_port = bench.above.port
                with bench.connect("free-3", bench.above) as operator:
                    publish(operator.handshake(mqtt.connect("free-3")), DOWN, b"kept above")
                bench.below.process.wait_for_log("what it sends cannot be stored")
                full(bench.below, is_full=False)
                bench.below.process.wait_for_log("the store takes changes again")
            with bench.connect("free-2", bench.below) as back:
                back.handshake(mqtt.connect("free-2", clean=False), present=True)
                assert back.read_delivery().payload == b"kept above"
        finally:
            bench.stop()
