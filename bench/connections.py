"""Connections: what one costs the broker, what an idle one holds, and a fleet that comes back at once.

Mosquitto and birthmark in turn, round by round, a fresh process each time. A device that connects says goodbye
again, so that the CPU is that of a whole visit. "known" are devices that the broker has let in before.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final

from bench.fleet import Fleet, Spent, raise_file_limit
from bench.peers import BIRTHMARK, MOSQUITTO, peer
from bench.report import Figure
from bench.wire import BenchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from bench.fleet_pki import FleetPki

SECTION: Final = "Connections"
WARM_UP: Final = 20
IN_TURN: Final = 8
"""Handshakes under way at a time, where no storm is measured."""
FIRST, KNOWN, RESUMED = "full, a device's first", "full, a device known", "resumed"
STORM: Final = "devices at once, until the last is let in"
_GOALS: Final = {FIRST: 1.15, KNOWN: 1.15, RESUMED: 1.15}


def figures(pki: FleetPki, rounds: int, devices: int, many: int, say: Callable[[str], None]) -> Iterator[Figure]:
    """Measure.

    Args:
        pki: makes the devices.
        rounds: how often each broker is measured.
        devices: how many connect.
        many: how many stay connected, once, for what each holds; 0: none.
        say: is told what comes.
    """
    identities = [pki.client(f"con-{number:05}") for number in range(max(devices, many) + WARM_UP)]
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    errors: list[str] = []
    idle = f"{devices} idle connections, each"
    for number in range(rounds):
        for name in (MOSQUITTO, BIRTHMARK):
            say(f"{devices} connections: {name}, round {number + 1} of {rounds}")
            try:
                for key, value in _visit(name, pki.folder, identities[: devices + WARM_UP]).items():
                    values[key][name].append(value)
            except (BenchError, OSError, RuntimeError) as error:
                errors.append(f"{name}: {error}")
    for key, goal in _GOALS.items():
        yield Figure(
            SECTION,
            f"connect, {key}: server CPU",
            "us",
            values[key],
            reference=MOSQUITTO,
            at_most=goal,
            errors=errors,
        )
    yield Figure(
        SECTION, f"{devices} {STORM}", "s", values[STORM], reference=MOSQUITTO, at_most=1.2, errors=errors
    )
    yield _idle(idle, values["idle"], errors)
    if many:
        held: dict[str, list[float]] = {}
        for name in (MOSQUITTO, BIRTHMARK):
            say(f"{many} idle connections: {name}")
            try:
                held[name] = [_held(name, pki.folder, identities[: many + WARM_UP])]
            except (BenchError, OSError, RuntimeError) as error:
                errors.append(f"{name}: {error}")
        yield _idle(f"{many} idle connections, each", held, errors)


def _idle(name: str, values: dict[str, list[float]], errors: Sequence[str]) -> Figure:
    return Figure(SECTION, name, "KB", values, reference=MOSQUITTO, errors=errors, note="the goal: 50 KB at most")


def _visit(name: str, folder: Path, identities: Sequence[Path]) -> dict[str, float]:
    raise_file_limit(2 * len(identities) + 100)
    found: dict[str, float] = {}
    with peer(name, folder) as broker:
        _warm_up(broker.port, folder, identities)
        fleet = Fleet(broker.port, folder / "root.pem", identities[WARM_UP:])
        count = len(identities) - WARM_UP

        def visit(*, resume: bool = False, at_once: int = IN_TURN) -> tuple[float, float, float]:
            before = Spent.by(broker.pid)
            elapsed_s = fleet.connect(at_once=at_once, resume=resume)
            there = Spent.by(broker.pid)
            fleet.leave()
            cpu_us = (Spent.by(broker.pid).cpu_us - before.cpu_us) / count
            return cpu_us, (there.private_kb - before.private_kb) / count, elapsed_s

        found[FIRST], found["idle"], _ = visit()
        found[KNOWN], _, _ = visit()
        found[RESUMED], _, _ = visit(resume=True)
        _, _, found[STORM] = visit(at_once=count)
    return found


def _held(name: str, folder: Path, identities: Sequence[Path]) -> float:
    raise_file_limit(2 * len(identities) + 100)
    with peer(name, folder) as broker:
        _warm_up(broker.port, folder, identities)
        fleet = Fleet(broker.port, folder / "root.pem", identities[WARM_UP:])
        before = Spent.by(broker.pid)
        fleet.connect(at_once=IN_TURN)
        held_kb = (Spent.by(broker.pid).private_kb - before.private_kb) / (len(identities) - WARM_UP)
        fleet.leave()
    return held_kb


def _warm_up(port: int, folder: Path, identities: Sequence[Path]) -> None:
    first = Fleet(port, folder / "root.pem", identities[:WARM_UP])
    first.connect(at_once=1)
    first.leave()
