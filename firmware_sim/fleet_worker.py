"""One process of a simulated fleet: many clients, each the device's own (`birthmark.device.Client`).

`fleet` starts it as `python -m birthmark.firmware_sim.fleet_worker`, and writes it a `Task` as a line of JSON. It
says what happened since the last time in a `Share` once a second, and ends when its standard input does: after
its parent, however that ended.
"""

from __future__ import annotations

import json
import logging
import random
import resource
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.client import Client
from birthmark.device.credentials import BrokerAddress
from birthmark.device.errors import BirthmarkError, UnreachableError
from birthmark.device.events import AttemptFailed, Connected, Disconnected

if TYPE_CHECKING:
    from birthmark.device.events import Event
    from birthmark.device.publication import Acknowledgement
    from birthmark.device.received import Command

STACK_BYTES: Final = 256 * 1024
"""Of a client's threads; the usual 8 MiB of address space for each would not do for thousands."""
DESCRIPTORS_EACH: Final = 8
STOP_S: Final = 5.0
STOPPING_AT_ONCE: Final = 64
SWITCH_S: Final = 0.1
"""Each thread that waits for the interpreter looks for it that often (CPython's 5 ms by default). When a thousand
lose their broker in one moment, the looking would take all of the processor, and nobody gets anywhere."""
REPORT_EVERY_S: Final = 1.0
TELEMETRY: Final = "load"


@dataclass(frozen=True, slots=True)
class Task:
    """What one process has to do."""

    folders: list[str]
    broker: str | None
    """Where to connect instead of where the devices belong."""
    interval_s: float
    payload_bytes: int
    ramp_s: float
    """Over how long the clients are started."""


@dataclass(slots=True)
class Share:
    """What happened in one process since it last said so; `online`, `pending` and `max_rss_kb` are as of now."""

    online: int = 0
    connects: list[float] = field(default_factory=list)
    """When, in seconds since 1970."""
    resumed: int = 0
    lost: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """Attempts that failed, by the check that did."""
    published: int = 0
    acknowledged: int = 0
    pending: int = 0
    refused: int = 0
    """What the client did not take, because too much waits already."""
    latency_ms: list[float] = field(default_factory=list)
    """From publishing to the broker's acknowledgement, of those that came within one interval."""
    commands: int = 0
    never: list[str] = field(default_factory=list)
    """At the end: who never came online."""
    max_rss_kb: int = 0


class _Tally:
    """Counts for all clients of this process; from any of their threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._share = Share()
        self._online: set[object] = set()
        self._pending = 0

    def take(self) -> Share:
        """Return what happened since the last call."""
        with self._lock:
            share, self._share = self._share, Share()
            share.online, share.pending = len(self._online), self._pending
        share.max_rss_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return share

    def see(self, who: object, event: Event) -> None:
        """Count an event of a client. One that renews its certificate connects anew and was never offline."""
        with self._lock:
            if isinstance(event, Connected):
                self._online.add(who)
                self._share.connects.append(round(time.time(), 3))
                self._share.resumed += event.tls_resumed
            elif isinstance(event, Disconnected):
                self._online.discard(who)
                self._share.lost += 1
            elif isinstance(event, AttemptFailed):
                check = event.error.check or "unknown"
                self._share.failures[check] = self._share.failures.get(check, 0) + 1

    def add(self, *, pending: int = 0, latency_ms: float | None = None, **counts: int) -> None:
        """Count a client's messages."""
        with self._lock:
            self._pending += pending
            for name, count in counts.items():
                setattr(self._share, name, getattr(self._share, name) + count)
            if latency_ms is not None:
                self._share.latency_ms.append(round(latency_ms, 3))


class _Device:
    """One client, and what it does all day."""

    def __init__(self, folder: Path, task: Task, tally: _Tally) -> None:
        broker = BrokerAddress.parse(task.broker) if task.broker else None
        self._tally = tally
        self._interval_s = task.interval_s
        self._payload_bytes = task.payload_bytes
        self._count = 0
        self._waiting: list[Acknowledgement] = []
        self.was_online = False
        self.client = Client.from_folder(folder, broker=broker, observe=self._observe)
        self.client.every(task.interval_s, delay_s=random.uniform(0, task.interval_s))(self._publish)
        self.client.command()(self._obey)

    def _observe(self, event: Event) -> None:
        self.was_online |= isinstance(event, Connected)
        self._tally.see(self, event)

    def _obey(self, command: Command) -> dict[str, Any]:
        self._tally.add(commands=1)
        return {"command": command.name, "received": True}

    def _publish(self) -> None:
        self.sweep()
        self._count += 1
        reading: dict[str, object] = {"count": self._count, "at": round(time.time(), 3)}
        filler = self._payload_bytes - len(json.dumps(reading)) - len('"":"",')
        if filler > 0:
            reading["."] = "." * filler
        began = time.monotonic()
        try:
            acknowledgement = self.client.publish(self.client.telemetry(TELEMETRY), reading)
        except UnreachableError:
            self._tally.add(refused=1)
            return
        try:
            acknowledgement.wait(self._interval_s)
        except UnreachableError:
            self._waiting.append(acknowledgement)
            self._tally.add(published=1, pending=1)
        else:
            self._tally.add(published=1, acknowledged=1, latency_ms=(time.monotonic() - began) * 1000)

    def sweep(self) -> None:
        """Count what was acknowledged meanwhile."""
        still = [one for one in self._waiting if not one.done]
        done = len(self._waiting) - len(still)
        self._waiting = still
        if done:
            self._tally.add(acknowledged=done, pending=-done)


def main() -> int:
    """Run until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it has us say goodbye
    task = Task(**json.loads(sys.stdin.readline()))
    logging.getLogger("birthmark.device").addHandler(logging.NullHandler())
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, DESCRIPTORS_EACH * len(task.folders) + 256), hard))
    threading.stack_size(STACK_BYTES)
    sys.setswitchinterval(SWITCH_S)
    tally = _Tally()
    try:
        devices = [_Device(Path(folder), task, tally) for folder in task.folders]
    except BirthmarkError as error:
        _say({"error": error.message, "hint": error.hint})
        return error.exit_code
    over = threading.Event()
    threading.Thread(target=_wait_for_the_end, args=(over,), daemon=True).start()
    began = time.monotonic()
    for number, device in enumerate(devices):
        if over.wait(max(0.0, began + task.ramp_s * number / len(devices) - time.monotonic())):
            break
        device.client.start()
        _say_if_due(tally)
    while not over.wait(REPORT_EVERY_S):
        _say(asdict(tally.take()))
    with ThreadPoolExecutor(STOPPING_AT_ONCE) as stopping:
        list(stopping.map(lambda device: device.client.stop(STOP_S), devices))
    for device in devices:
        device.sweep()
    last = tally.take()
    last.never = sorted(str(device.client.device_id) for device in devices if not device.was_online)
    _say(asdict(last) | {"last": True})
    return 0


def _wait_for_the_end(over: threading.Event) -> None:
    while sys.stdin.read(1):
        pass
    over.set()


_said_at = 0.0


def _say_if_due(tally: _Tally) -> None:
    if time.monotonic() >= _said_at + REPORT_EVERY_S:
        _say(asdict(tally.take()))


def _say(record: dict[str, Any]) -> None:
    global _said_at  # noqa: PLW0603 - one process, one voice
    _said_at = time.monotonic()
    with suppress(BrokenPipeError):  # the parent is gone: standard input ends, too
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    sys.exit(main())
