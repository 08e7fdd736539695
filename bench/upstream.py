"""What a link to the broker above costs a gateway, and how fast a spool drains, beside Mosquitto's own bridge.

Rules:

- The broker above is the generator itself (`wire.accepted`): it costs the gateway nothing but its traffic, checks
  every byte and the order, and acknowledges what a read has brought at once.
- A ratio of CPU is between two runs of the same broker, one after the other, by what each *published* message
  cost: once with the link, once without it. A forwarded message is one that the gateway keeps on disk until the
  broker above has acknowledged it. Mosquitto's bridge keeps it in memory.
- What drains was published while the broker above was away, and acknowledged; the clock runs from the connection
  to the last message.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from bench.fleet_pki import HOST, client_context
from bench.messages import generate
from bench.peers import BIRTHMARK, MOSQUITTO, free_port, peer
from bench.report import Figure
from bench.wire import Above, BenchError, Loop, Publisher, Wire, accepted, block
from birthmark.broker.packets import topic_field

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

SECTION: Final = "The upstream"
GATEWAY: Final = "gw-bench"
PAYLOAD_BYTES, WINDOW = 64, 400
SPOOLED: Final = 100_000
GOAL_CPU, GOAL_PER_S = 1.25, 10_000.0
DRAIN_S: Final = 120.0
LINKED, UNLINKED = "linked", "not linked"

_BIRTHMARK = """
[[upstream]]
name = "above"
servers = ["mqtts://{host}:{port}"]
credentials = "{folder}/{gateway}.pem"
ca = "{folder}/chain.pem"
up = ["devices/+/telemetry/#", "fleet/announcements/#"]
keepalive_s = 3600
longest_wait_s = 0.1
spool_messages = 1000000
spool_bytes = 1073741824
"""
_MOSQUITTO = """
connection above
address {host}:{port}
bridge_cafile {folder}/chain.pem
bridge_certfile {folder}/{gateway}.pem
bridge_keyfile {folder}/{gateway}.pem
bridge_protocol_version mqttv311
remote_clientid {gateway}
cleansession false
try_private false
notifications false
bridge_attempt_unsubscribe false
keepalive_interval 3600
restart_timeout 1
topic devices/+/telemetry/# out 1
topic fleet/announcements/# out 1
"""
_SETTINGS: Final = {BIRTHMARK: _BIRTHMARK, MOSQUITTO: _MOSQUITTO}

LOCAL: Final = {"publishers": 1, "subscribers": 1, "qos": 1}
TASKS: Final[Sequence[tuple[str, dict[str, Any], dict[str, Any]]]] = (
    # What is done, with the link, and without it: the two sides of a ratio.
    ("forwarded, to kept for a local session", LOCAL | {"subscribers": 0}, LOCAL | {"persistent": True}),
    (
        "to one session and forwarded, to two sessions",
        LOCAL | {"persistent": True},
        LOCAL | {"persistent": True, "subscribers": 2},
    ),
    (
        "to one session and forwarded, to one session",
        LOCAL | {"persistent": True},
        LOCAL | {"persistent": True},
    ),
    ("to one subscriber and forwarded, to one subscriber", LOCAL, LOCAL),
)


def figures(
    folder: Path, rounds: int, seconds: float, spooled: int, say: Callable[[str], None]
) -> Iterator[Figure]:
    """Measure the CPU of each task with and without the link, in turn, and the drain of a spool.

    Args:
        folder: has the certificates (`FleetPki`): `dev-000`, `dev-001`, `op-0`, `op-1` and `GATEWAY`.
        rounds: how often each is measured.
        seconds: how long messages are sent each time.
        spooled: how many messages wait for the broker above.
        say: is told what comes.
    """
    for task, linked, unlinked in TASKS:
        for name in (BIRTHMARK, MOSQUITTO):
            values: dict[str, list[float]] = {LINKED: [], UNLINKED: []}
            errors = []
            for number in range(rounds):
                say(f"{task}: {name}, round {number + 1} of {rounds}")
                for label, work in ((LINKED, linked), (UNLINKED, unlinked)):
                    result = run(name, folder, is_linked=label == LINKED, seconds=seconds, **work)
                    if "error" in result:
                        errors.append(f"{name}, {label}: {result['error']}")
                    else:
                        values[label].append(result["broker_cpu_us"] * result["delivered"] / result["sent"])
            yield Figure(
                SECTION,
                f"CPU: {task}, {name}",
                "us/message",
                values,
                ours=LINKED,
                reference=UNLINKED,
                at_most=GOAL_CPU if name == BIRTHMARK else None,
                errors=errors,
            )
    yield _drained(folder, rounds, spooled, say)


def _drained(folder: Path, rounds: int, spooled: int, say: Callable[[str], None]) -> Figure:
    values: dict[str, list[float]] = {BIRTHMARK: [], MOSQUITTO: [], "goal": []}
    errors = []
    for number in range(rounds):
        for name in (BIRTHMARK, MOSQUITTO):
            say(f"a spool of {spooled}: {name}, round {number + 1} of {rounds}")
            try:
                values[name].append(drain(name, folder, spooled))
            except (BenchError, RuntimeError, OSError) as error:
                errors.append(f"{name}: {error}")
        values["goal"].append(GOAL_PER_S)
    note = f"{spooled} messages that were acknowledged while the broker above was away"
    return Figure(
        SECTION,
        f"a spool of {spooled:,} drains",
        "messages/s",
        values,
        ours=BIRTHMARK,
        reference="goal",
        at_least=1.0,
        note=note,
        errors=errors,
    )


def run(name: str, folder: Path, *, is_linked: bool, **work: Any) -> Mapping[str, Any]:
    """Run one workload on a fresh broker, linked or not; the generator's result, or an `error` instead."""
    port = free_port()
    try:
        with peer(
            name, folder, operators=2, settings=_settings(name, folder, port) if is_linked else ""
        ) as broker:
            return generate(
                broker,
                folder,
                payload_bytes=PAYLOAD_BYTES,
                window=WINDOW,
                upstream_port=port if is_linked else 0,
                **work,
            )
    except (RuntimeError, OSError) as error:
        return {"error": str(error)}


def drain(name: str, folder: Path, spooled: int) -> float:
    """Have a broker keep so many messages for the broker above, then be that; return how many a second came.

    Raises:
        BenchError: a message is missing, out of order or changed.
        RuntimeError, OSError: something did not start.
    """
    port = free_port()
    with peer(name, folder, settings=_settings(name, folder, port)) as broker:
        topics = ["devices/dev-000/telemetry/0000"]
        loop = Loop()
        try:
            wire = Wire(client_context(folder, folder / "dev-000.pem"), broker.port, "dev-000")
            publisher = Publisher(wire, loop, topics, PAYLOAD_BYTES, 1, sender=0)
            while publisher.acknowledged < spooled:
                if (room := min(spooled - publisher.sent, WINDOW - publisher.sent + publisher.acknowledged)) > 0:
                    publisher.publish(room)
                loop.turn(1.0)
            expected, length = block(topics, PAYLOAD_BYTES, 1)
            above = accepted(folder, port)
            begun_s = time.perf_counter()
            taken = Above(above, loop, expected, length=length, id_at=2 + len(topic_field(topics[0])))
            while taken.received < spooled:
                if time.perf_counter() - begun_s > DRAIN_S:
                    raise BenchError(f"{spooled - taken.received} of {spooled} messages did not come")
                loop.turn(1.0)
            return spooled / (time.perf_counter() - begun_s)
        finally:
            loop.close()


def _settings(name: str, folder: Path, port: int) -> str:
    return _SETTINGS[name].format(host=HOST, port=port, folder=folder, gateway=GATEWAY)
