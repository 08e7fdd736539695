"""An outbox by itself: what it keeps and drops, with a test in the place of whoever sends."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING, Any

from support.patience import PATIENCE_S
from support.waiting import eventually

from birthmark.device.outbox.outbox import Outbox
from birthmark.device.outbox.settings import OutboxSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from birthmark.device.events import OutboxChanged

TOPIC = "devices/sensor-1/telemetry/t"


@contextlib.contextmanager
def outbox_at(path: Path, **settings: Any) -> Iterator[tuple[Outbox, list[OutboxChanged]]]:
    """An outbox of sensor-1's at a path, and what it tells."""
    told: list[OutboxChanged] = []
    outbox = Outbox(
        OutboxSettings(**settings),
        path,
        "sensor-1",
        tell=told.append,
        wake=lambda: None,
        send_from_memory=lambda _outgoing, _acknowledgement: None,
        now_s=lambda: 1_800_000_000.0,
    )
    try:
        yield outbox, told
    finally:
        outbox.close(PATIENCE_S)


def put(outbox: Outbox, text: str, topic: str = TOPIC) -> str:
    """Put a message in, wait until it is stored, and return its id."""
    acknowledgement = outbox.put(topic, text, retain=False)
    acknowledgement.wait_stored(PATIENCE_S)
    assert acknowledgement.is_stored
    return acknowledgement.message_id


def stored(path: Path) -> list[str]:
    """What is in its file, in order."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return [row[0].decode() for row in connection.execute("SELECT payload FROM messages ORDER BY seq")]


def take_all(outbox: Outbox, count: int) -> list[str]:
    """Take and accept until so many have come."""
    taken: list[str] = []
    outbox.connected()

    def more() -> bool:
        for delivery in outbox.take():
            taken.append(delivery.outgoing.payload.decode())
            delivery.settle()
        return len(taken) >= count

    eventually(more, f"{count} messages; these came: {taken}")
    return taken
