"""An outbox by itself: what it keeps and drops, with nobody who sends."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from support.patience import PATIENCE_S

from birthmark.device.outbox.outbox import Outbox
from birthmark.device.outbox.settings import OutboxSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from birthmark.device.events import OutboxChanged


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
