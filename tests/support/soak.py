"""A gateway under everything at once, for as long as wanted: `make soak`.

Flows of QoS 1 messages between persistent sessions, clients that come and vanish, consumers that do not read,
policies and CRLs that change under live sessions, and SIGKILL in between. Whatever was acknowledged must arrive;
whoever is revoked must be out; no exception may be logged, and memory must stay. The report is a page with curves.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from support import mqtt_client as mqtt
from support.mqtt_client import ConnectionEndedError, RawClient
from support.mqtt_gateway import POLICY_TOML, World
from support.mqtt_process import BROKER_TOML, BrokerProcess, broker_process, write_files
from support.mqtt_world import replace
from support.pki import Pki, crl_pem
from support.soak_chart import Curve, page
from support.vitals import Vitals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FLOWS, CHURNERS, SLOW = 4, 3, 2
SAMPLE_S, PUBLISH_PAUSE_S, RETRY_S = 0.5, 0.01, 0.05
POLICY_EVERY_S, CRL_EVERY_S, SLOW_FOR_S = 2.0, 3.0, 4.0
KILL_EVERY_S = 30.0
"""Or a third of the time, if that is less."""
ARRIVAL_S, END_S = 60.0, 60.0
MAX_GROWTH_BYTES = 50 * 1_048_576
_DISTURBED = (OSError, ConnectionEndedError, AssertionError)
"""What a client meets when the gateway is killed under it."""


@dataclass
class Flow:
    """From one publisher to one subscriber."""

    number: int
    is_awaited: threading.Event = field(default_factory=threading.Event)
    """Set once its subscriber has subscribed."""
    acknowledged: int = 0
    """Messages 0 to this, without it, have been."""
    arrived: set[int] = field(default_factory=set)
    waits_s: list[float] = field(default_factory=list)
    """From the publishing of each message to its arrival; emptied by the sampler."""
    sent_s: dict[int, float] = field(default_factory=dict)

    @property
    def lost(self) -> list[int]:
        return [number for number in range(self.acknowledged) if number not in self.arrived]


@dataclass
class Sample:
    """One moment."""

    at_s: float
    resident_mb: float
    descriptors: int
    arrived: int
    latest_ms: float


class Soak:
    """A gateway, those who work on it, and what they saw."""

    def __init__(self, folder: Path, seconds: float, seed: int) -> None:
        self._folder = folder
        self._seconds = seconds
        self._chance = random.Random(seed)
        self._pki = Pki.create()
        self._config = write_files(folder, self._pki, broker_toml=BROKER_TOML)
        self._world = World(folder, self._pki, 0)
        self._stop = threading.Event()
        self._has_arrived = False
        self._up = threading.Lock()
        """Held by whoever needs the gateway to stay up; while it is down, by us."""
        self._up.acquire()
        self._broker: BrokerProcess
        self._began_s = 0.0
        self.flows = [Flow(number) for number in range(FLOWS)]
        self.samples: list[Sample] = []
        self.events: list[tuple[float, str]] = []
        self.failures: list[str] = []
        self.growth_bytes = 0

    # --- the gateway -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Do all of it."""
        workers: list[Callable[[], None]] = [self._change_policy, self._change_crl, self._sample]
        workers += [partial(self._publish, flow) for flow in self.flows]
        workers += [partial(self._churn, f"churner-{number}") for number in range(CHURNERS)]
        workers += [partial(self._consume_slowly, f"free-slow-{number}") for number in range(SLOW)]
        threads, receivers = (
            [threading.Thread(target=self._guarded, args=(worker,), daemon=True) for worker in group]
            for group in (workers, [partial(self._receive, flow) for flow in self.flows])
        )
        pause_s = min(KILL_EVERY_S, self._seconds / 3)
        is_started = False
        while True:
            with self._running():
                if not is_started:
                    self._began_s = time.monotonic()
                    ends_s = self._began_s + self._seconds
                    for thread in (*threads, *receivers):
                        thread.start()
                    is_started = True
                is_last = time.monotonic() + 1.5 * pause_s > ends_s
                self._stop.wait(ends_s - time.monotonic() if is_last else pause_s)
                if is_last:
                    self._finish(threads, receivers)
                    return

    def _end(self, broker: BrokerProcess) -> None:
        if not self._has_arrived:
            self._note("SIGKILL")
            broker.process.kill()
            broker.process.wait(END_S)
            return
        broker.process.terminate()
        if code := broker.process.wait(END_S):
            self.failures.append(f"it stopped with exit code {code}")

    def _grown(self, since: Vitals) -> None:
        grown = Vitals.of(self._broker.process.pid).resident_bytes - since.resident_bytes
        self.growth_bytes = max(self.growth_bytes, grown)

    @contextmanager
    def _running(self) -> Iterator[None]:
        with broker_process(self._config, "--listen", f"127.0.0.1:{self._world.port}") as self._broker:
            self._world.port = self._broker.port
            self._up.release()
            before = Vitals.of(self._broker.process.pid)
            try:
                yield
                self._grown(before)
            finally:
                self._up.acquire()
            self._end(self._broker)
        self.failures += [
            f"the log: {record['exception']}" for record in self._broker.log if "exception" in record
        ]

    def _finish(self, threads: list[threading.Thread], receivers: list[threading.Thread]) -> None:
        """End the workers, and let what was acknowledged, to the last of it, arrive."""
        self._stop.set()
        for thread in threads:
            thread.join(ARRIVAL_S)
        deadline = time.monotonic() + ARRIVAL_S
        while any(flow.lost for flow in self.flows) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._has_arrived = True
        for thread in receivers:
            thread.join(ARRIVAL_S)
        self.failures += [f"flow {flow.number} lost {flow.lost[:10]}" for flow in self.flows if flow.lost]
        if self.growth_bytes > MAX_GROWTH_BYTES:
            self.failures.append(f"memory grew by {self.growth_bytes} bytes")

    def _note(self, what: str) -> None:
        self.events.append((time.monotonic() - self._began_s, what))

    def _guarded(self, worker: Callable[[], None]) -> None:
        try:
            worker()
        except BaseException as error:  # noqa: BLE001 - a worker that stops is a failure of the soak
            self.failures.append(f"{type(error).__name__}: {error}")
            self._stop.set()

    # --- those who work on it ----------------------------------------------------------------------------

    def _client(self, name: str, *, clean: bool = True) -> RawClient:
        client = RawClient.connect(self._world.port, self._world.context(name))
        try:
            client.send(mqtt.connect(name, clean=clean))
            assert client.read().body[1] == 0
        except BaseException:
            client.close()
            raise
        return client

    def _publish(self, flow: Flow) -> None:
        topic = f"flow/{flow.number}"
        flow.is_awaited.wait(ARRIVAL_S)
        while not self._stop.is_set():
            with contextlib.suppress(*_DISTURBED), self._client(f"free-pub-{flow.number}") as client:
                while not self._stop.wait(PUBLISH_PAUSE_S):
                    flow.sent_s.setdefault(flow.acknowledged, time.monotonic())
                    client.send(mqtt.publish(topic, b"%d" % flow.acknowledged, qos=1, pid=1))
                    assert client.read() == (0x40, b"\0\1")
                    flow.acknowledged += 1
            self._stop.wait(RETRY_S)

    def _receive(self, flow: Flow) -> None:
        while not self._has_arrived:
            name = f"free-sub-{flow.number}"
            with contextlib.suppress(*_DISTURBED), self._client(name, clean=False) as client:
                client.send(mqtt.subscribe(1, (f"flow/{flow.number}", 1)))
                while not flow.is_awaited.is_set():
                    assert client.read() == mqtt.suback(1, 1)
                    flow.is_awaited.set()
                while not self._has_arrived:
                    try:
                        packet = client.read(0.5)
                    except TimeoutError:
                        continue
                    if packet.first >> 4 == 3:
                        self._arrived(flow, mqtt.delivery(packet), client)
            time.sleep(RETRY_S)

    @staticmethod
    def _arrived(flow: Flow, found: mqtt.Delivery, client: RawClient) -> None:
        number = int(found.payload)
        flow.arrived.add(number)
        if (sent_s := flow.sent_s.pop(number, None)) is not None:
            flow.waits_s.append(time.monotonic() - sent_s)
        client.send(mqtt.puback(found.packet_id))

    def _churn(self, name: str) -> None:
        chance = random.Random(f"{name} {self._chance.random()}")
        while not self._stop.wait(chance.random() / 10):
            with contextlib.suppress(*_DISTURBED), self._client(name, clean=chance.random() < 0.5) as client:
                client.send(mqtt.subscribe(1, (f"devices/{name}/#", chance.randrange(3))))
                for number in range(chance.randrange(10)):
                    topic = f"devices/{chance.choice((name, name, 'other'))}/telemetry/{number}"
                    client.send(mqtt.publish(topic, bytes(chance.randrange(2_000)), retain=chance.random() < 0.2))
                if chance.random() < 0.5:
                    client.send(mqtt.DISCONNECT)

    def _consume_slowly(self, name: str) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(*_DISTURBED):
                context = self._world.context(name)
                with RawClient.connect(self._world.port, context, receive_bytes=4_096) as client:
                    client.send(mqtt.connect(name) + mqtt.subscribe(1, ("flow/#", 1), ("devices/#", 0)))
                    self._stop.wait(SLOW_FOR_S)
            self._stop.wait(RETRY_S)

    def _change_policy(self) -> None:
        for number in itertools.count():
            if self._stop.wait(POLICY_EVERY_S):
                return
            replace(self._folder / "policy.toml", POLICY_TOML + b"# %d\n" % number)
            self._note("policy")

    def _change_crl(self) -> None:
        """Revoke a device that is connected, every time; it must be out."""
        revoked: list[int] = []
        for number in itertools.count(2):
            if self._stop.wait(CRL_EVERY_S):
                return
            doomed = self._pki.device(f"doomed-{number}")
            context = self._world.context_of(doomed)
            with self._up, RawClient.connect(self._world.port, context) as client:
                client.handshake(mqtt.connect(f"doomed-{number}"))
                revoked.append(doomed.cert_serial)
                crl_der = self._pki.issuing.crl(revoked, number=number)
                replace(self._folder / "crl.pem", crl_pem(crl_der))
                self._note("CRL")
                client.read_end()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            waits_s = []
            for flow in self.flows:
                taken, flow.waits_s = flow.waits_s, []
                waits_s += taken
            with contextlib.suppress(OSError, AssertionError):
                vitals = Vitals.of(self._broker.process.pid)
                self.samples.append(
                    Sample(
                        at_s=time.monotonic() - self._began_s,
                        resident_mb=vitals.resident_bytes / 1_048_576,
                        descriptors=vitals.descriptors,
                        arrived=sum(len(flow.arrived) for flow in self.flows),
                        latest_ms=1_000 * max(waits_s, default=0.0),
                    )
                )

    # --- the report --------------------------------------------------------------------------------------

    def summary(self) -> dict[str, object]:
        """What came of it."""
        kinds = [what for _, what in self.events]
        return {
            "seconds": round(self._seconds),
            "acknowledged": sum(flow.acknowledged for flow in self.flows),
            "lost": sum(len(flow.lost) for flow in self.flows),
            "kills": kinds.count("SIGKILL"),
            "policies": kinds.count("policy"),
            "revocations": kinds.count("CRL"),
            "growth_mb": round(self.growth_bytes / 1_048_576, 1),
            "failures": self.failures,
        }

    def report(self) -> str:
        """The page with curves, as SVG."""
        at_s = [sample.at_s for sample in self.samples]
        rates = [
            (after.arrived - before.arrived) / (after.at_s - before.at_s)
            for before, after in itertools.pairwise(self.samples)
        ]
        curves = [
            Curve("messages arrived, per second", at_s[1:], rates),
            Curve("slowest message of each half second, ms", at_s, [s.latest_ms for s in self.samples]),
            Curve("resident memory of the gateway, MB", at_s, [s.resident_mb for s in self.samples]),
            Curve("its file descriptors", at_s, [float(s.descriptors) for s in self.samples]),
        ]
        kills_s = [at_s for at_s, what in self.events if what == "SIGKILL"]
        facts = ", ".join(f"{name} {value}" for name, value in self.summary().items() if name != "failures")
        return page(f"birthmark soak: {facts}", curves, kills_s)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m support.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, default=Path("soak.svg"), help="where the curves go")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), arguments.seconds, arguments.seed)
        soak.run()
    arguments.report.write_text(soak.report(), encoding="utf-8")
    print(json.dumps({**soak.summary(), "report": str(arguments.report)}))
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
