"""One sync of an outbox: what is new goes in, what was accepted goes out, what finds no room gives way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from birthmark.device.frozen import Frozen

if TYPE_CHECKING:
    from collections.abc import Iterable

    from birthmark.device.outbox.database import Database, Row
    from birthmark.device.outbox.settings import OutboxSettings


class Totals(Frozen):
    """How much is in an outbox that was not accepted yet, and how many had to give way, ever."""

    messages: int
    bytes: int
    dropped: int


class Stored(Frozen):
    """What became of what was new."""

    totals: Totals
    refused: frozenset[int]
    """The numbers of those that found no room."""
    given_way: tuple[int, ...]
    """The numbers of those that made room; one that was new may be among them."""


def store(
    database: Database,
    settings: OutboxSettings,
    new: Iterable[Row],
    accepted: Iterable[int],
    *,
    totals: Totals,
    after: int,
    proving: bool,
) -> Stored:
    """Store and remove in one sync.

    Args:
        database: the file.
        settings: the limits, and what gives way.
        new: what is to be stored, in order.
        accepted: the numbers to be removed; `totals` no longer has them.
        totals: before this.
        after: messages up to this number are on their way, and do not give way.
        proving: whether something is to be written in any case, to see that the disk takes it.

    Raises:
        DatabaseFailedError: the disk did not take it; nothing has changed.
    """
    messages, size, dropped = totals.messages, totals.bytes, totals.dropped
    refused: set[int] = set()
    given_way: list[int] = []
    with database.writing():
        database.remove(accepted)
        for row in new:
            while messages + 1 > settings.max_messages or size + row.size > settings.max_bytes:
                can_give_way = settings.when_full != "refuse-newest"
                found = database.victim(after, row.priority) if can_give_way else None
                dropped += 1
                if found is None:
                    refused.add(row.seq)
                    break
                database.remove([found[0]])
                given_way.append(found[0])
                messages, size = messages - 1, size - found[1]
            else:
                database.add(row)
                messages, size = messages + 1, size + row.size
        if proving or dropped != totals.dropped:
            database.count_dropped(dropped)
    return Stored(Totals(messages, size, dropped), frozenset(refused), tuple(given_way))
