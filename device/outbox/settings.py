"""How an outbox is kept: its limits, what gives way when it is full, when a message counts as durable."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, get_args

from birthmark.device.errors import ConfigurationError
from birthmark.device.escape import quoted
from birthmark.device.frozen import Frozen

if TYPE_CHECKING:
    from pathlib import Path

WhenFull = Literal["drop-oldest", "refuse-newest", "drop-lowest-priority"]
WhenFailing = Literal["refuse", "memory"]

FILE = "outbox.db"
"""Its name in a device's state folder."""
FEWEST_MESSAGES = 100
"""What is on its way is never dropped; a limit must leave room beside that."""
FEWEST_BYTES = 64 * 1024
LONGEST_BATCH_MS = 60_000
MOST_PER_S = 1_000_000
MAX_PRIORITY = 1_000_000

_BATCH = re.compile(r"batch:([1-9][0-9]{0,5})ms")


class OutboxSettings(Frozen):
    """The settings of one outbox.

    Raises:
        ConfigurationError: a value that makes no sense, named.
    """

    path: Path | None = None
    """Where; None: `outbox.db` in the state folder."""
    max_messages: int = 100_000
    """A week of a message every six seconds."""
    max_bytes: int = 64 * 1024 * 1024
    """Of topics and payloads. The file is larger: count on a third more, and 4 MiB."""
    when_full: WhenFull = "drop-oldest"
    durability: str = "message"
    """`message`: each is synced before it is acknowledged, and those that come meanwhile share the next sync.
    `batch:200ms`: they are gathered for so long, then synced together; the acknowledgement waits for that."""
    drain_per_s: float = 50.0
    """How many a second go out of what had gathered before a connection; 0: as fast as the broker takes them."""
    message_id: str = ""
    """The key under which JSON objects are given an id; empty: they go out as they are."""
    when_failing: WhenFailing = "refuse"
    """What becomes of a publication that the disk does not take: an error, or it waits in memory alone."""
    priorities: tuple[tuple[str, int], ...] = ()
    """MQTT filters and their priority, the first that matches counts; what no filter matches has 0."""

    def __post_init__(self) -> None:
        _check(self.max_messages >= FEWEST_MESSAGES, "max_messages", f"it is below {FEWEST_MESSAGES}")
        _check(self.max_bytes >= FEWEST_BYTES, "max_bytes", f"it is below {FEWEST_BYTES}")
        _check(0 <= self.drain_per_s <= MOST_PER_S, "drain_per_s", f"it is not from 0 to {MOST_PER_S}")
        _check(self.when_full in get_args(WhenFull), "when_full", f"it is none of {', '.join(get_args(WhenFull))}")
        _check(
            self.when_failing in get_args(WhenFailing),
            "when_failing",
            f"it is none of {', '.join(get_args(WhenFailing))}",
        )
        _check("\0" not in str(self.path or ""), "path", "it holds NUL")
        _check(
            all(abs(value) <= MAX_PRIORITY for _, value in self.priorities),
            "priorities",
            f"one is not from -{MAX_PRIORITY} to {MAX_PRIORITY}",
        )
        _ = self.batch_s

    @property
    def batch_s(self) -> float:
        """For how long publications are gathered before they are synced; 0: not at all."""
        if self.durability == "message":
            return 0.0
        found = _BATCH.fullmatch(self.durability)
        if found is None or int(found[1]) > LONGEST_BATCH_MS:
            raise ConfigurationError(
                f"could not use {quoted(self.durability)} as an outbox's durability",
                hint=f'it is "message" or, for example, "batch:200ms" (up to {LONGEST_BATCH_MS} ms)',
            )
        return int(found[1]) / 1000


def _check(is_good: bool, key: str, cause: str) -> None:
    if not is_good:
        raise ConfigurationError(f"could not use an outbox's {key}: {cause}", hint="see docs/outbox.md")
