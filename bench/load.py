"""The load generator: one process, one workload, one broker. `python -m bench.load` reads a `Workload` as JSON.

Rules:

- Traffic is bounded by `seconds`, and by a window: messages on their way, sent and not delivered to everybody.
- After a warm-up the clock and the broker's CPU are read; then it sends for `seconds`, waits until the last
  message is delivered and acknowledged, and reads them again. What is not there within `DRAIN_S` is lost, and an
  error. A figure with an error is no figure.
- Its own CPU is in the result: where it is near the elapsed time, the generator is what was measured.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.fleet_pki import client_context
from bench.peers import cpu_s
from bench.wire import CYCLE, Above, BenchError, Loop, Publisher, Subscriber, Wire, accepted, block
from birthmark.broker.packets import topic_field

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DRAIN_S: Final = 20.0
WARM_UP: Final = 1000
BURST: Final = 128
"""Messages in one send, at most: some 12 KB of 64-byte messages, one TLS record."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What to do to which broker."""

    port: int
    pid: int
    """The broker's process."""
    folder: str
    """Where the certificates are (`FleetPki`)."""
    publishers: int
    subscribers: int
    """One of the two is 1; or there are none, and what is published only goes up."""
    qos: int
    payload_bytes: int
    seconds: float
    window: int
    """Messages on their way, for one subscriber."""
    persistent: bool = False
    """Whether the subscribers have sessions that outlive their connections."""
    per_second: int = 0
    """A steady rate, whose latencies are taken; 0: as fast as it goes."""
    topics: int = 1
    """On how many topics each publisher publishes, in turn."""
    other_filters: int = 0
    """Subscriptions of other clients, which match none of the messages."""
    upstream_port: int = 0
    """Where the generator is itself the broker above, and takes what the broker sends up; 0: there is none."""


class Run:
    """A workload, set up."""

    def __init__(self, work: Workload) -> None:
        self._work = work
        folder = Path(work.folder)
        self.loop = Loop()
        self._others: list[Wire] = []

        def wire(name: str, *, clean: bool = True) -> Wire:
            return Wire(client_context(folder, folder / f"{name}.pem"), work.port, name, clean=clean)

        is_fan_out = work.subscribers > 1
        self._subscribe_others(wire)
        sender_names = ["op-0"] if is_fan_out else [f"dev-{n:03}" for n in range(work.publishers)]
        receiver_names = (
            [f"dev-{n:03}" for n in range(work.subscribers)] if is_fan_out else ["op-0"][: work.subscribers]
        )
        topic_filter = "fleet/announcements/#" if is_fan_out else "devices/+/telemetry/#"
        topics = {name: self._topics(name, is_fan_out=is_fan_out) for name in sender_names}
        first = topics[sender_names[0]]
        expected, length = block(first, work.payload_bytes, work.qos)
        id_at = 2 + (length > 129) + len(topic_field(first[0])) if work.qos else 0
        self.subscribers: list[Subscriber] = []
        for name in receiver_names:
            connected = wire(name, clean=not work.persistent)
            connected.subscribe([topic_filter], work.qos)
            subscriber = Subscriber(
                connected, self.loop, expected if work.publishers == 1 else None, length=length, id_at=id_at
            )
            subscriber.count_senders_at(length - work.payload_bytes)
            self.subscribers.append(subscriber)
        if work.upstream_port:
            above = accepted(folder, work.upstream_port)
            self.subscribers.append(
                Above(above, self.loop, expected if work.publishers == 1 else None, length=length, id_at=id_at)
            )
            self.subscribers[-1].count_senders_at(length - work.payload_bytes)
        self.publishers = [
            Publisher(wire(name), self.loop, topics[name], work.payload_bytes, work.qos, sender=number)
            for number, name in enumerate(sender_names)
        ]

    def _topics(self, name: str, *, is_fan_out: bool) -> list[str]:
        if is_fan_out:
            return ["fleet/announcements/bench"]
        return [f"devices/{name}/telemetry/{number:04}" for number in range(self._work.topics)]

    def _subscribe_others(self, wire: Callable[[str], Wire]) -> None:
        left, number = self._work.other_filters, 0
        while left:
            number += 1
            count = min(left, 100)
            other = wire(f"op-{number}")
            other.subscribe([f"devices/nobody-{number}/telemetry/{n}" for n in range(count)], 0)
            self._others.append(other)
            left -= count

    @property
    def delivered(self) -> int:
        """What the slowest subscriber has got."""
        return min(subscriber.received for subscriber in self.subscribers)

    @property
    def sent(self) -> int:
        """What the publishers have sent, together."""
        return sum(publisher.sent for publisher in self.publishers)

    def go(self) -> dict[str, Any]:
        """Run it, and return the result."""
        self._flood(lambda: self.sent < WARM_UP)
        self._drain()
        begun_sent, cpu, own, begun_s = self.sent, cpu_s(self._work.pid), time.process_time(), time.perf_counter()
        latencies: list[float] = []
        if self._work.per_second:
            latencies = self._steadily(begun_s)
        else:
            until_s = begun_s + self._work.seconds
            self._flood(lambda: time.perf_counter() < until_s)
        self._drain()
        elapsed_s = time.perf_counter() - begun_s
        count = (self.sent - begun_sent) * len(self.subscribers)
        result = {
            "sent": self.sent - begun_sent,
            "delivered": count,
            "elapsed_s": elapsed_s,
            "per_second": count / elapsed_s,
            "broker_cpu_us": (cpu_s(self._work.pid) - cpu) / count * 1e6,
            "generator_cpu": (time.process_time() - own) / elapsed_s,
        }
        if latencies:
            cuts = statistics.quantiles(latencies, n=100)
            result |= {"p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3}
        return result

    def _flood(self, goes_on: Callable[[], bool]) -> None:
        work, publishers = self._work, self.publishers
        # Whole bursts only: a publisher that answers each delivery with one message would wait more than it sends.
        share = min(BURST, max(1, work.window // len(publishers) // 2))
        while goes_on():
            while self._send_round(share):
                pass
            self.loop.turn(0.05)

    def _send_round(self, share: int) -> bool:
        """Have each publisher send a burst of `share`, as far as the window is open; return whether any did."""
        window = self._work.window
        room, has_sent = window - (self.sent - self.delivered), False
        for publisher in self.publishers:
            if room < share:
                break
            unacknowledged = publisher.sent - publisher.acknowledged if publisher.qos else 0
            if publisher.is_blocked or window - unacknowledged < share:
                continue
            room -= publisher.publish(share)
            has_sent = True
        return has_sent

    def _steadily(self, begun_s: float) -> list[float]:
        """Send one message at a time at a steady rate, and time each from its sending to its arrival."""
        publisher, latencies = self.publishers[0], []
        gap_s = 1 / self._work.per_second
        for number in range(int(self._work.seconds * self._work.per_second)):
            due_s = begun_s + number * gap_s
            while (left_s := due_s - time.perf_counter()) > 0:
                self.loop.turn(left_s)
            sent_s = time.perf_counter()
            publisher.publish(1)
            deadline_s = sent_s + DRAIN_S
            while self.delivered < publisher.sent and time.perf_counter() < deadline_s:
                self.loop.turn(0.05)
            latencies.append(time.perf_counter() - sent_s)
        return latencies

    def _drain(self) -> None:
        deadline_s = time.monotonic() + DRAIN_S
        while time.monotonic() < deadline_s:
            acknowledged = all(one.acknowledged == one.sent for one in self.publishers if one.qos)
            if self.delivered == self.sent and acknowledged:
                self._count()
                return
            self.loop.turn(0.05)
        raise BenchError(f"{self.sent - self.delivered} of {self.sent} messages were not delivered")

    def _count(self) -> None:
        if len(self.publishers) > 1:
            expected = {number: one.sent for number, one in enumerate(self.publishers) if one.sent}
            if dict(self.subscribers[0].by_sender) != expected:
                raise BenchError("the messages that arrived are not those that were sent")

    def close(self) -> None:
        """End it."""
        self.loop.close()
        for other in self._others:
            other.close()


def main(arguments: Sequence[str] = ()) -> int:
    """Run the workload on stdin, print its result."""
    if arguments:
        print("usage: python -m bench.load < workload.json", file=sys.stderr)
        return 2
    run = Run(Workload(**json.load(sys.stdin)))
    try:
        result = run.go()
    except BenchError as error:
        result = {"error": str(error)}
    finally:
        run.close()
    print(json.dumps(result))
    return 0


def as_json(work: Workload) -> str:
    """Return what `main` reads."""
    return json.dumps(asdict(work))


if CYCLE % 256:
    raise ValueError("CYCLE is a multiple of 256")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
