"""A registry in a database as documents (`content`), and documents into a new database."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import insert, select

from birthmark.device.errors import RegistryError
from birthmark.provisioning.registry import sql_schema as schema
from birthmark.provisioning.registry.content import (
    BATCHES,
    COUNTER,
    META,
    META_ID,
    NOTES,
    OUTBOX,
    QUARANTINE,
    ROWS,
    Placed,
    audit_head_of,
    empty_tables,
    without_unset,
)
from birthmark.provisioning.registry.document import (
    batch_document,
    batch_from,
    from_document,
    quarantined_document,
    quarantined_from,
    to_document,
)
from birthmark.provisioning.registry.sql_views import AT_ONCE, SqlView, note_from

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from sqlalchemy import Table
    from sqlalchemy.engine import Connection


def documents_of(view: SqlView, log: str) -> Iterator[Placed]:
    """Yield everything in a registry that is this station's, and what belongs to its audit log.

    Raises:
        RegistryError: it cannot be read.
    """
    head = view.head(log)
    facts: dict[str, Any] = dict(empty_tables()[META][str(META_ID)])
    for record in view.records(select(schema.COUNTERS).order_by(schema.COUNTERS.c.name)):
        facts[COUNTER + record["name"]] = record["value"]
    if head.seq:
        facts.update(audit_seq=head.seq, audit_hash=head.hash)
    yield Placed(META, META_ID, facts)
    for record in _all(view, schema.ROWS):
        yield Placed(ROWS, record["number"], without_unset(to_document(schema.row_from([*record.values()]))))
    outbox = schema.OUTBOX
    for record in view.records(select(outbox).where(outbox.c.log == log).order_by(outbox.c.seq)):
        yield Placed(OUTBOX, record["seq"], {"line": record["line"]})
    for record in _all(view, schema.BATCHES):
        yield Placed(BATCHES, record["number"], without_unset(batch_document(schema.batch_from(record))))
    for record in _all(view, schema.QUARANTINE):
        yield Placed(QUARANTINE, record["number"], quarantined_document(schema.quarantined_from(record)))
    for record in _all(view, schema.NOTES):
        note = note_from(record["topic"], record["note"])
        yield Placed(NOTES, record["number"], {"topic": record["topic"], "key": record["key"], "note": note})


def fill(connection: Connection, documents: Iterable[Placed], log: str) -> None:
    """Write documents into tables that are empty, in a transaction of the caller's.

    Raises:
        RegistryError: one of them is damaged.
        SQLAlchemyError: the database cannot take them.
    """
    waiting: list[dict[str, Any]] = []
    into: Table | None = None
    for placed in documents:
        if placed.table == META:
            _fill_facts(connection, placed.document, log)
            continue
        table, record_of = _INTO[placed.table]
        if table is not into or len(waiting) == AT_ONCE:
            _write(connection, into, waiting)
            into = table
        waiting.append(record_of(placed, log))
    _write(connection, into, waiting)


def _all(view: SqlView, table: Table) -> Iterator[Any]:
    """Yield all records by ascending number, a portion at a time."""
    last = -1
    while found := view.records(
        select(table).where(table.c.number > last).order_by(table.c.number).limit(AT_ONCE)
    ):
        yield from found
        last = found[-1]["number"]


def _write(connection: Connection, table: Table | None, records: list[dict[str, Any]]) -> None:
    if table is not None and records:
        connection.execute(insert(table), records)
        records.clear()


def _fill_facts(connection: Connection, facts: dict[str, Any], log: str) -> None:
    counters = [
        {"name": name.removeprefix(COUNTER), "value": value}
        for name, value in facts.items()
        if name.startswith(COUNTER)
    ]
    if counters:
        connection.execute(insert(schema.COUNTERS), counters)
    head = audit_head_of(facts)
    if head.seq:
        connection.execute(insert(schema.LOGS), {"log": log, "seq": head.seq, "hash": head.hash})


def _row(placed: Placed, _log: str) -> dict[str, Any]:
    return schema.row_record(from_document(placed.number, placed.document))


def _line(placed: Placed, log: str) -> dict[str, Any]:
    return {"log": log, "seq": placed.number, "line": placed.document["line"]}


def _batch(placed: Placed, _log: str) -> dict[str, Any]:
    return {"number": placed.number, **schema.batch_record(batch_from(placed.document))}


def _unit(placed: Placed, _log: str) -> dict[str, Any]:
    return {"number": placed.number, **schema.quarantined_record(quarantined_from(placed.document))}


def _note(placed: Placed, _log: str) -> dict[str, Any]:
    note = placed.document
    try:
        return {
            "number": placed.number,
            "topic": note["topic"],
            "key": note["key"],
            "note": json.dumps(note["note"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise RegistryError("could not read a note of the registry: it is damaged") from error


_INTO: Final[dict[str, tuple[Table, Callable[[Placed, str], dict[str, Any]]]]] = {
    ROWS: (schema.ROWS, _row),
    OUTBOX: (schema.OUTBOX, _line),
    BATCHES: (schema.BATCHES, _batch),
    QUARANTINE: (schema.QUARANTINE, _unit),
    NOTES: (schema.NOTES, _note),
}
