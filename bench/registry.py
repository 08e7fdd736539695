"""The registry by its size: a lookup, one row added durably, everything read; for each back end there is.

A lookup is measured in a registry that this process has open; a change is one transaction with its audit entry,
on disk when it returns. "All rows" is what `birthmark list` reads.
"""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Final

from bench.registry_commands import multiply
from bench.report import Figure
from birthmark.device.durable import private_folder
from birthmark.provisioning.registry.content import META, META_ID, ROWS
from birthmark.provisioning.registry.document import to_document
from birthmark.provisioning.registry.interface import LAST_ROW
from birthmark.provisioning.registry.model import Kind, Row, State
from birthmark.provisioning.registry.place import REGISTRY_FILE
from birthmark.provisioning.registry.sql import SqlRegistry
from birthmark.provisioning.registry.sql_database import Database
from birthmark.provisioning.registry.storage import RegistryFile
from birthmark.provisioning.registry.tiny import TinyRegistry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from birthmark.provisioning.registry.interface import StoredRegistry

SECTION: Final = "The registry ({})"
BACK_ENDS: Final = ("TinyDB", "SQLite")
SIZES: Final = (1_000, 10_000, 100_000)
OFTEN: Final = 3


def figures(folder: Path, rounds: int, sizes: tuple[int, ...], say: Callable[[str], None]) -> Iterator[Figure]:
    """Measure registries of these sizes, made in `folder`; a round's value is the median of `OFTEN`."""
    for back_end in BACK_ENDS:
        yield from _figures(folder, rounds, sizes, say, back_end)


def _figures(
    folder: Path, rounds: int, sizes: tuple[int, ...], say: Callable[[str], None], back_end: str
) -> Iterator[Figure]:
    names = [f"{size:,} rows" for size in sizes]
    found: dict[str, dict[str, list[float]]] = {what: {name: [] for name in names} for what in _DEEDS}
    for size, name in zip(sizes, names, strict=True):
        registry = _filled(folder / f"{back_end}-{size}", back_end, size)
        for number in range(rounds):
            say(f"registry of {name} on {back_end}, round {number + 1} of {rounds}")
            for what, deed in _DEEDS.items():
                found[what][name].append(_median_ms(partial(deed, registry, size)))
        registry.close()
    for what, values in found.items():
        yield Figure(SECTION.format(back_end), what, "ms", values, ours=names[-1], reference=names[0])


def _filled(place: Path, back_end: str, size: int) -> StoredRegistry:
    private_folder(place)
    if back_end == "TinyDB":
        TinyRegistry.create(place, clock=_now, actor="bench").close()
        fill(place, size)
        return TinyRegistry(place, clock=_now, actor="bench")
    url = "sqlite:///registry.db"
    registry = SqlRegistry.create(place, url, clock=_now, actor="bench")
    with registry.transaction() as transaction:
        transaction.insert_all([_device(1)])
    multiply(Database(url, place), 1, size)
    with registry.transaction() as transaction:
        transaction.set_counter(LAST_ROW, size)
    return registry


def fill(folder: Path, count: int) -> None:
    """Bring a registry that nobody uses to `count` rows of devices, each with what a made one has."""
    file = RegistryFile(folder / REGISTRY_FILE)
    tables = file.load()
    for number in range(len(tables[ROWS]) + 1, count + 1):
        tables[ROWS][str(number)] = to_document(_device(number))
    tables[META][str(META_ID)]["counter rows"] = f"{max(count, len(tables[ROWS])):x}"
    file.save(tables)
    file.close()


def _device(number: int) -> Row:
    now = _now()
    return Row(
        number=number,
        kind=Kind.DEVICE,
        name=f"device-{number}",
        role="sensor",
        state=State.ATTESTED,
        created_at=now,
        changed_at=now,
        hwid=secrets.token_bytes(8),
        txn=secrets.token_bytes(16),
        public_key_der=secrets.token_bytes(91),
        cert_serial=secrets.randbits(150) + 1,
        certificate_der=secrets.token_bytes(640),
        bundle_sha256=secrets.token_bytes(32),
    )


def _look_up(registry: StoredRegistry, size: int) -> None:
    with registry.view() as view:
        if view.live_by_name(f"device-{secrets.randbelow(size) + 1}") is None:
            raise RuntimeError("a row is missing")


def _add(registry: StoredRegistry, size: int) -> None:  # noqa: ARG001 - one signature for all
    with registry.transaction() as transaction:
        row = transaction.insert(
            kind=Kind.DEVICE,
            name=f"new-{secrets.token_hex(8)}",
            role="sensor",
            hwid=secrets.token_bytes(8),
            txn=secrets.token_bytes(16),
        )
        transaction.record("bench", row.name, row=row.number)


def _read_all(registry: StoredRegistry, size: int) -> None:
    with registry.view() as view:
        if len(view.rows()) < size:
            raise RuntimeError("rows are missing")


_DEEDS: Final = {
    "a device looked up by its id": _look_up,
    "a row added, durably": _add,
    "all rows read": _read_all,
}


def _median_ms(once: Callable[[], None]) -> float:
    taken = []
    for _ in range(OFTEN):
        begun_s = time.perf_counter()
        once()
        taken.append((time.perf_counter() - begun_s) * 1e3)
    return sorted(taken)[OFTEN // 2]


def _now() -> datetime:
    return datetime.now(UTC)
