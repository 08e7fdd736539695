"""How a transaction on a database changes what there is.

Rules:

- The rules are checked before the database is written (`rules.RuledTransaction`); its unique indexes stand behind.
- A share of a common transaction that fails is undone by a savepoint. What failed outside of one, or a savepoint
  that is gone (the connection broke), spoils the whole transaction: it is not committed.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, delete, func, insert, select, text, update

from birthmark.device.errors import RegistryError
from birthmark.provisioning.registry.claims import CLAIMED, values_of
from birthmark.provisioning.registry.content import STANDING
from birthmark.provisioning.registry.rules import RuledTransaction
from birthmark.provisioning.registry.sql_schema import (
    BATCHES,
    COUNTERS,
    LOGS,
    META,
    NOTES,
    OUTBOX,
    QUARANTINE,
    ROW_COLUMNS,
    ROWS,
    batch_record,
    changed_values,
    quarantined_record,
    row_columns,
    row_from,
)
from birthmark.provisioning.registry.sql_views import SqlView

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from datetime import datetime

    from sqlalchemy import ColumnElement, Insert, Table, Update
    from sqlalchemy.engine import Connection

    from birthmark.provisioning.registry.line import Batch, Quarantined
    from birthmark.provisioning.registry.model import Row
    from birthmark.provisioning.registry.sql_database import Database


class SqlTransaction(SqlView, RuledTransaction):
    """An exclusive read, change and write (`interface.Transaction`).

    Args:
        database: where it is.
        connection: in a transaction that holds the write lock; the caller ends it.
        clock: the current time, aware.
        actor: who is at work, for the audit log.
        log: which audit log its entries belong to.
    """

    def __init__(
        self,
        database: Database,
        connection: Connection,
        *,
        clock: Callable[[], datetime],
        actor: str,
        log: str,
    ) -> None:
        SqlView.__init__(self, database, connection)
        self._log = log
        self._depth = 0
        self.changed = False
        self.spoilt: RegistryError | None = None
        """Why this may not be committed."""
        RuledTransaction.__init__(self, clock, actor, self.head(log))

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Undo what was done in the block if it ends in an exception (`interface.Transaction.apart`)."""
        head, lines, changed, spoilt = self._head, len(self._lines), self.changed, self.spoilt
        name = f"share_{self._depth}"
        self.run(text(f"SAVEPOINT {name}"))
        self._depth += 1
        try:
            yield
        except BaseException:
            self._head, self.changed = head, changed
            del self._lines[lines:]
            self._undo_to(name, spoilt)
            raise
        finally:
            self._depth -= 1
        self.run(text(f"RELEASE SAVEPOINT {name}"))

    def put_batch(self, batch: Batch) -> None:
        """Add a batch, or change the one of that name (`interface.Transaction.put_batch`)."""
        record = batch_record(batch)

        def next_number() -> int:
            return 1 + int(self.run(select(func.count()).select_from(BATCHES)).scalar_one())

        self._put(BATCHES, {"name_folded": record["name_folded"]}, record, next_number)

    def quarantine(self, unit: Quarantined) -> None:
        """Remember a unit, in the place of what was remembered of it (`interface.Transaction.quarantine`)."""
        number = self._counted("quarantined")
        self._put(QUARANTINE, {"hwid": unit.hwid}, quarantined_record(unit), number)

    def clear_quarantine(self, hwid: bytes) -> bool:
        """Forget a unit; whether it was remembered (`interface.Transaction.clear_quarantine`)."""
        return self._remove(QUARANTINE, {"hwid": hwid})

    def put_note(self, topic: str, key: str, note: dict[str, Any] | None) -> None:
        """Note a small JSON object, or forget it (`interface.Transaction.put_note`)."""
        which = {"topic": topic, "key": key}
        if note is None:
            self._remove(NOTES, which)
        else:
            self._put(NOTES, which, {**which, "note": json.dumps(note)}, self._counted("notes"))

    def stand(self, standing: str) -> None:
        """Say how the registry stands."""
        self.changed = True
        self.run(update(META).where(META.c.name == STANDING).values(value=standing))
        self.standing = standing

    def outbox(self) -> list[str]:
        """Return the lines that may not be in the log yet, in their order."""
        found = self.run(select(OUTBOX.c.line).where(OUTBOX.c.log == self._log).order_by(OUTBOX.c.seq))
        return [line for (line,) in found]

    def finish(self) -> None:
        """Put the entries into the outbox, in the place of those that the log has."""
        self.run(delete(OUTBOX).where(OUTBOX.c.log == self._log))
        first = self._head.seq - len(self._lines) + 1
        lines = [(self._log, seq, line) for seq, line in enumerate(self._lines, start=first)]
        if lines:
            self._run_many(insert(OUTBOX), ("log", "seq", "line"), lines)
            facts = {"log": self._log, "seq": self._head.seq, "hash": self._head.hash}
            if self.run(update(LOGS).where(LOGS.c.log == self._log).values(**facts)).rowcount == 0:
                self.run(insert(LOGS), facts)

    def _changed(self) -> None:
        self.changed = True

    def _put_counter(self, name: str, value: int) -> None:
        self.changed = True
        stored = f"{value:x}"
        if self.run(update(COUNTERS).where(COUNTERS.c.name == name).values(value=stored)).rowcount == 0:
            self.run(insert(COUNTERS), {"name": name, "value": stored})

    def _rows_sharing(self, rows: Sequence[Row]) -> Iterable[Row]:
        found: dict[int, Row] = {}
        for field in CLAIMED:
            values = [_stored(field, value) for value in values_of(rows, field)]
            found.update((record[0], row_from(record)) for record in self.among(field, values))
        return found.values()

    def _add_rows(self, rows: Sequence[Row]) -> None:
        if rows:
            self.changed = True
            # Without what none of them has, two thirds of it: the driver takes as long to hand over nothing.
            stored = zip(ROW_COLUMNS, row_columns(rows), strict=True)
            columns = {name: values for name, values in stored if values.count(None) < len(values)}
            self._run_many(insert(ROWS), list(columns), list(zip(*columns.values(), strict=True)))

    def _change_rows(self, changes: Sequence[tuple[Row, Row]]) -> None:
        """Write what differs; rows in which the same fields do, in one statement."""
        for names, records in changed_values(changes).items():
            self.changed = True
            changed = update(ROWS).where(ROWS.c.number == bindparam("which"))
            self._run_many(changed.values({name: bindparam(name) for name in names}), [*names, "which"], records)

    def _run_many(
        self, statement: Insert | Update, columns: Sequence[str], records: Sequence[Sequence[Any]]
    ) -> None:
        """Run a statement for many records, each a value for each of `columns`, as they are to be stored.

        SQLAlchemy writes the statement, and the driver gets the values: to have every one of them looked after by
        SQLAlchemy takes longer than SQLite takes to store them. `columns` are in the order of their table, as they
        are in a statement.
        """
        compiled: Any = statement.compile(dialect=self._connection.dialect, column_keys=list(columns))
        values: Any = records
        if not compiled.positional:
            values = [dict(zip(columns, record, strict=True)) for record in records]
        elif compiled.positiontup != list(columns):
            raise RuntimeError("SQLAlchemy puts the columns of a statement in another order")
        self.run_text(compiled.string, values)

    def _counted(self, name: str) -> Callable[[], int]:
        def next_number() -> int:
            number = self.counter(name) + 1
            self.set_counter(name, number)
            return number

        return next_number

    def _put(
        self, table: Table, which: dict[str, Any], record: dict[str, Any], next_number: Callable[[], int]
    ) -> None:
        """Change the record in which these fields are so, or add one with the next number."""
        self.changed = True
        if self.run(update(table).where(*_are(table, which)).values(record)).rowcount == 0:
            self.run(insert(table), {"number": next_number(), **record})

    def _remove(self, table: Table, which: dict[str, Any]) -> bool:
        there = self.run(delete(table).where(*_are(table, which))).rowcount > 0
        self.changed = self.changed or there
        return there

    def _failed(self, error: RegistryError) -> RegistryError:
        # After a connection broke, every further statement fails with another word for it.
        self.spoilt = self.spoilt or error
        return self.spoilt

    def _undo_to(self, name: str, spoilt: RegistryError | None) -> None:
        try:
            self.run(text(f"ROLLBACK TO SAVEPOINT {name}"))
            self.run(text(f"RELEASE SAVEPOINT {name}"))
        except RegistryError:
            return  # spoilt: nothing of this transaction is written
        self.spoilt = spoilt


def _are(table: Table, which: dict[str, Any]) -> list[ColumnElement[bool]]:
    return [table.c[name] == value for name, value in which.items()]


def _stored(field: str, value: Any) -> Any:
    return f"{value:x}" if field == "cert_serial" else value
