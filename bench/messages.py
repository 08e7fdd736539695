"""Messages through a broker: throughput, the broker's CPU for each delivered message, latency.

Every broker in turn, round by round; a fresh process each time. The generator verifies every message (`wire.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.load import Workload, as_json
from bench.peers import AMQTT, BIRTHMARK, MOSQUITTO, peer
from bench.report import Figure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.peers import Peer

SECTION: Final = "Messages"
DEVICES: Final = 100
OPERATORS: Final = 52
TIMEOUT_S: Final = 120.0
NONE, PERIODIC = "birthmark-none", "birthmark-periodic"


@dataclass(frozen=True, slots=True)
class Task:
    """One workload, and what to hold against what."""

    name: str
    work: dict[str, Any]
    at_least: float | None = None
    peers: Sequence[str] = (MOSQUITTO, BIRTHMARK)
    latency_at_most: dict[str, float] = field(default_factory=dict)
    note: str = ""
    times_as_long: float = 1.0
    """As the others: where few messages a second are sent, and the slowest of them are asked for."""
    in_quick: bool = True
    """Whether it says enough beside the others to be in a short run."""


def _work(
    publishers: int, subscribers: int, qos: int, *, window: int, payload_bytes: int = 64, **more: Any
) -> Any:
    return {
        "publishers": publishers,
        "subscribers": subscribers,
        "qos": qos,
        "payload_bytes": payload_bytes,
        "window": window,
        **more,
    }


TASKS: Final = (
    Task("1 to 1, 64 B, QoS 0", _work(1, 1, 0, window=8192), 2.3),
    Task("1 to 1, 64 B, QoS 1", _work(1, 1, 1, window=400), 2.8),
    Task("1 to 1, 1 KB, QoS 0", _work(1, 1, 0, window=2048, payload_bytes=1024), 1.3, in_quick=False),
    Task("1 to 1, 1 KB, QoS 1", _work(1, 1, 1, window=400, payload_bytes=1024), 1.8, in_quick=False),
    Task("fan-in 100 to 1, QoS 0", _work(100, 1, 0, window=800), 1.0, in_quick=False),
    Task("fan-in 100 to 1, QoS 1", _work(100, 1, 1, window=800), 1.0),
    Task("fan-out 1 to 100, QoS 0", _work(1, 100, 0, window=1024), 3.5),
    Task("fan-out 1 to 100, QoS 1", _work(1, 100, 1, window=400), 1.6, in_quick=False),
    Task("fan-out 1 to 100, QoS 0, one in flight", _work(1, 100, 0, window=1), 0.9, in_quick=False),
    Task(
        "200 a second",
        _work(1, 1, 0, window=1, per_second=200),
        latency_at_most={"p50_ms": 1.4, "p99_ms": 1.2},
        times_as_long=6.0,
    ),
    Task(
        "1 to 1, 64 B, QoS 1, session that persists",
        _work(1, 1, 1, window=400, persistent=True),
        peers=(MOSQUITTO, BIRTHMARK, PERIODIC, NONE),
        note="birthmark acknowledges what is on disk; birthmark-none, like Mosquitto, what is in memory",
        in_quick=False,
    ),
)


def figures(
    folder: Path, rounds: int, seconds: float, say: Callable[[str], None], *, quick: bool
) -> Iterator[Figure]:
    """Measure, a task at a time.

    Args:
        folder: has the certificates of `DEVICES` devices (`dev-000`...) and `OPERATORS` operators (`op-0`...).
        rounds: how often each broker is measured.
        seconds: how long messages are sent each time.
        say: is told what comes.
        quick: only what says most; else everything, and amqtt as it comes once.
    """
    for task in (task for task in TASKS if task.in_quick or not quick):
        results: dict[str, list[dict[str, Any]]] = defaultdict(list)
        errors: list[str] = []
        for number in range(rounds):
            for name in (*task.peers, *(() if quick or number else (AMQTT,))):
                say(f"{task.name}: {name}, round {number + 1} of {rounds}")
                result = run(name, folder, seconds=seconds * task.times_as_long, **task.work)
                if "error" in result:
                    errors.append(f"{name}: {result['error']}")
                else:
                    results[name].append(result)
        yield from _figures_of(task, results, errors)
    if not quick:
        yield from _filters(folder, rounds, seconds, say)


def run(name: str, folder: Path, **work: Any) -> dict[str, Any]:
    """Run one workload on a fresh broker; return the generator's result, or an `error` instead of figures."""
    try:
        with peer(name, folder, operators=OPERATORS) as broker:
            return generate(broker, folder, **work)
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}


def generate(broker: Peer, folder: Path, **work: Any) -> dict[str, Any]:
    """Put a workload on a broker that runs, with the certificates in `folder`; as `run`."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.load"],
        input=as_json(Workload(port=broker.port, pid=broker.pid, folder=str(folder), **work)),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    if done.returncode:
        return {"error": done.stderr.strip().rpartition("\n")[2]}
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _figures_of(task: Task, results: dict[str, list[dict[str, Any]]], errors: Sequence[str]) -> Iterator[Figure]:
    def of(key: str) -> dict[str, list[float]]:
        return {name: [result[key] for result in found] for name, found in results.items()}

    if task.latency_at_most:
        for key, goal in task.latency_at_most.items():
            yield Figure(
                SECTION,
                f"latency at {task.name}, {key.removesuffix('_ms')}",
                "ms",
                of(key),
                reference=MOSQUITTO,
                at_most=goal,
                errors=errors,
            )
    else:
        yield Figure(
            SECTION,
            task.name,
            "delivered/s",
            of("per_second"),
            reference=MOSQUITTO,
            at_least=task.at_least,
            note=task.note,
            errors=errors,
        )
    yield Figure(SECTION, f"... broker's CPU, {task.name}", "us/message", of("broker_cpu_us"), reference=MOSQUITTO)
    own = max((value for values in of("generator_cpu").values() for value in values), default=0.0)
    yield Figure(
        SECTION, f"... generator's CPU, {task.name}", "of a core", of("generator_cpu"), note=f"most {own:.2f}"
    )


def _filters(folder: Path, rounds: int, seconds: float, say: Callable[[str], None]) -> Iterator[Figure]:
    """What a publish costs where many others have subscribed to something else."""
    few, many = "5 filters", "5,000 filters"
    for name in (BIRTHMARK, MOSQUITTO):
        values: dict[str, list[float]] = {few: [], many: []}
        errors = []
        for number in range(rounds):
            for label, count in ((few, 5), (many, 5000)):
                say(f"{label} of others: {name}, round {number + 1} of {rounds}")
                work = _work(1, 1, 0, window=2048, topics=1024, other_filters=count)
                result = run(name, folder, seconds=seconds, **work)
                if "error" in result:
                    errors.append(f"{name}: {result['error']}")
                else:
                    values[label].append(result["broker_cpu_us"])
        yield Figure(
            SECTION,
            f"CPU of a publish on 1,024 topics: {name}",
            "us/message",
            values,
            ours=many,
            reference=few,
            at_most=1.2 if name == BIRTHMARK else None,
            errors=errors,
        )
