"""Load over a gateway's link to the broker above it, from both ends, by clients that keep to MQTT over faults.

A device publishes numbers at the gateway and a collector with a session above takes them; an operator above
publishes numbers, and a device with a session at the gateway takes them. Whatever is cut or killed meanwhile, each
number acknowledged to its publisher has to arrive, in order, and again only as QoS 1 allows.
"""

from __future__ import annotations

import itertools
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from support import mqtt_client as mqtt
from support.loopback_proxy import LoopbackProxy
from support.mqtt_client import RawClient, client_context
from support.mqtt_durable import DurableLoad, DurablePublisher, DurableSubscriber
from support.mqtt_process import BROKER_TOML, BrokerProcess, broker_process, write_files
from support.patience import PATIENCE_S
from support.upstreams import ROLE, upstream_toml, write_credentials

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence
    from pathlib import Path

    from support.pki import Pki

PREFIX = "sites/berlin/"
UP_TOPIC, DOWN_TOPIC = "devices/sensor-1/telemetry/n", "devices/sensor-2/commands/n"
GATEWAY, COLLECTOR, COMMANDER = "berlin", "collector", "commander"
"""Who connects above: the gateway's link, who takes what comes up, who publishes what goes down."""
PROBES = 400
MAX_AHEAD = 5_000
"""How far a publisher is ahead of who takes it at most. A Mosquitto 2.0 to which many PUBACKs come at once sends
all that it has, whatever `max_inflight_messages` says, and its own PUBACKs only behind that: what is behind grows,
on a slow machine, faster than it can be seen through."""
LIMITS = "\n[limits]\nmax_queued_messages = 1000000\nmax_queued_bytes = 1000000000\n"
"""A device that is away must miss nothing: how much waits for it at most is not what is tested here."""


class Loaded(DurableLoad):
    """A gateway as a process, its link through a network that can be cut, and the clients at both ends.

    Args:
        folder: gets the gateway's files.
        pki: of everybody.
        ports: where the broker above listens; several for a cluster. The link tries the first of them first, the
            other clients above the last.
    """

    def __init__(self, folder: Path, pki: Pki, ports: Sequence[int]) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.pki = pki
        self.ports = list(ports)
        self._stack = ExitStack()
        self.proxies = [self._stack.enter_context(LoopbackProxy(port)) for port in ports]
        write_credentials(folder, pki, GATEWAY)
        table = upstream_toml(
            GATEWAY, *(proxy.port for proxy in self.proxies), prefix=PREFIX, down_shared=[], keepalive_s=5
        )
        self.config = write_files(folder, pki, broker_toml=BROKER_TOML + LIMITS + table)
        self.gateway: BrokerProcess | None = None
        self._process = ExitStack()
        self._port = 0
        above = [itertools.cycle(reversed(ports)) for _ in range(2)]
        self.up = DurablePublisher("sensor-1", self._context("sensor-1"), lambda: self._port, topic=UP_TOPIC)
        self.taken_below = DurableSubscriber(
            "sensor-2",
            self._context("sensor-2"),
            lambda: self._port,
            filters=(("devices/sensor-2/commands/#", 1),),
        )
        self.down = DurablePublisher(
            COMMANDER, self._context(COMMANDER, ROLE), lambda: next(above[0]), topic=PREFIX + DOWN_TOPIC
        )
        self.taken_above = DurableSubscriber(
            COLLECTOR,
            self._context(COLLECTOR, ROLE),
            lambda: next(above[1]),
            filters=((PREFIX + "devices/+/telemetry/#", 1),),
        )
        self.up.has_room = lambda: self.up.sent < _last(self.taken_above) + MAX_AHEAD
        self.down.has_room = lambda: self.down.sent < _last(self.taken_below) + MAX_AHEAD
        self.publishers = [self.up, self.down]
        self.subscribers = [self.taken_above, self.taken_below]

    def __enter__(self) -> Self:
        self.start_gateway()
        self.everybody_subscribes()
        self._wait_for_the_way_down()
        for publisher in self.publishers:
            publisher.start()
        return self

    def _wait_for_the_way_down(self) -> None:
        """Publish nought above until it comes out below: until then, the broker above owes the gateway nothing."""
        with RawClient.connect(self.ports[-1], self.down.context) as client:
            client.handshake(mqtt.connect(COMMANDER))
            for packet_id in itertools.count(1):
                client.send(mqtt.publish(PREFIX + DOWN_TOPIC, b"0", qos=1, pid=packet_id))
                client.read()
                if self.taken_below.delivered:
                    break
                assert packet_id < PROBES, "nothing comes down"
                self.taken_below.is_stopped.wait(0.05)
            client.send(mqtt.DISCONNECT)

    def __exit__(self, *_: object) -> None:
        for client in self.clients:
            client.is_stopped.set()
        for client in self.clients:
            if client.thread is not None:
                client.thread.join(PATIENCE_S)
        self._process.close()
        self._stack.close()

    # --- faults ------------------------------------------------------------------------------------------

    def start_gateway(self) -> None:
        self.gateway = self._process.enter_context(broker_process(self.config))
        self._port = self.gateway.port

    def kill_gateway(self) -> None:
        """Kill the gateway and start it again, on another port."""
        assert self.gateway is not None
        self._port = 0
        self.gateway.process.send_signal(signal.SIGKILL)
        self.gateway.process.wait(PATIENCE_S)
        self._process.close()
        self.start_gateway()

    def cut_link(self) -> None:
        for proxy in self.proxies:
            proxy.cut_all()

    @property
    def linked_to(self) -> int:
        """Which of the servers the link is with, or was with last."""
        assert self.gateway is not None
        said = [line for line in self.gateway.log if line.get("event") == "upstream_connected"]
        return next(
            number for number, proxy in enumerate(self.proxies) if f":{proxy.port}," in said[-1]["message"]
        )

    @property
    def counted(self) -> str:
        """What went over the link, for who reads of it; once it is seen through, none of it was lost."""
        return f"of {self.up.acknowledged:,} messages up and {self.down.acknowledged:,} down none lost"

    # --- what has to hold --------------------------------------------------------------------------------

    def both_ways(self, count: int = 1) -> None:
        """Wait until some more has arrived at both ends."""
        before = [self._count(self.taken_above), self._count(self.taken_below)]
        self.eventually(
            lambda: (
                self._count(self.taken_above) >= before[0] + count
                and self._count(self.taken_below) >= before[1] + count
            ),
            "messages pass the link both ways",
        )

    def see_through(self, *, in_order_above: bool = True, in_order_below: bool = True) -> None:
        """Publish nothing new, wait until all that was sent has arrived, and check it.

        Args:
            in_order_above: whether the broker above keeps the order for its own clients.
            in_order_below: whether it does for the gateway.
        """
        self.finish_publishing()
        self.eventually(lambda: has_all(self.taken_above, self.up), "everything arrives above")
        self.eventually(lambda: has_all(self.taken_below, self.down), "everything arrives below")
        for client in self.clients:
            client.stop()
        assert list(self.taken_above.delivered) == [PREFIX + UP_TOPIC]
        assert list(self.taken_below.delivered) == [DOWN_TOPIC]
        if in_order_above:
            check_order(self.taken_above.delivered[PREFIX + UP_TOPIC])
        if in_order_below:
            check_order(self.taken_below.delivered[DOWN_TOPIC])

    @staticmethod
    def _count(subscriber: DurableSubscriber) -> int:
        return next((len(numbers) for numbers in subscriber.delivered.values()), 0)

    def _context(self, name: str, role: str = "device") -> ssl.SSLContext:
        path = self.pki.device(name, role).write(self.folder / f"{name}-client.pem")
        (self.folder / "root.pem").write_bytes(self.pki.root.pem)
        return client_context(path, self.folder / "root.pem")


def _last(subscriber: DurableSubscriber) -> int:
    """Return the number that has arrived last."""
    return next((numbers[-1] for numbers in subscriber.delivered.values()), 0)


def has_all(subscriber: DurableSubscriber, publisher: DurablePublisher) -> bool:
    """Whether everything has arrived that was sent, all of it acknowledged."""
    numbers = next(iter(subscriber.delivered.values()))
    return len(numbers) >= publisher.sent and set(range(1, publisher.sent + 1)) <= set(numbers)


def check_order(numbers: list[int]) -> None:
    """Nothing overtook anything; and again came only what follows on from where a sender began again (§4.4)."""
    numbers = [number for number in numbers if number]
    first_of_each = list(dict.fromkeys(numbers))
    assert first_of_each == sorted(first_of_each), "out of order"
    leaps = [(one, other) for one, other in itertools.pairwise(numbers) if other > one + 1]
    assert not leaps, f"something was left out, and came later: {leaps[:5]}"
