"""How a transaction on TinyDB changes what there is.

Rules:

- A transaction remembers how to undo each change, so that one caller's share of a common transaction can fail
  alone (`apart`).
- A document is replaced, never changed: the state before this transaction, which views still look at, has it too.
- One row or many: a change costs one look at all rows (for what must be unique), not one for each.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tinydb import where

from birthmark.provisioning.registry.claims import CLAIMED, values_of
from birthmark.provisioning.registry.content import META_ID, OUTBOX, STANDING, audit_head_of
from birthmark.provisioning.registry.document import (
    batch_document,
    binary,
    encoded,
    quarantined_document,
    to_document,
)
from birthmark.provisioning.registry.rules import RuledTransaction
from birthmark.provisioning.registry.tiny_views import TinyView

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from datetime import datetime

    from tinydb.table import Document, Table

    from birthmark.provisioning.registry.line import Batch, Quarantined
    from birthmark.provisioning.registry.model import Row
    from birthmark.provisioning.registry.storage import TransactionStorage


class TinyTransaction(TinyView, RuledTransaction):
    """An exclusive read, change and write (`interface.Transaction`)."""

    def __init__(self, storage: TransactionStorage, clock: Callable[[], datetime], actor: str) -> None:
        TinyView.__init__(self, storage)
        RuledTransaction.__init__(self, clock, actor, audit_head_of(self._facts()))
        self._undo: list[tuple[str, int, dict[str, Any] | None]] = []
        """For each change the table, the id, and what was there before."""
        self.changed = False

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Undo what was done in the block if it ends in an exception (`interface.Transaction.apart`)."""
        changes, head, lines, changed = len(self._undo), self._head, len(self._lines), self.changed
        try:
            yield
        except BaseException:
            while len(self._undo) > changes:
                self._take_back(*self._undo.pop())
            self._head, self.changed = head, changed
            del self._lines[lines:]
            raise

    @property
    def standing(self) -> str:
        """What the registry says of itself, beyond the usual."""
        return str(self._facts().get(STANDING, ""))

    def stand(self, standing: str) -> None:
        """Say how the registry stands."""
        self._set_facts({STANDING: standing})

    def put_batch(self, batch: Batch) -> None:
        """Add a batch, or change the one of that name (`interface.Transaction.put_batch`)."""
        known = self._batches.get(where("name_folded") == batch.name.lower())
        number = known.doc_id if known is not None else len(self._batches) + 1
        self._put(self._batches, number, batch_document(batch))

    def quarantine(self, unit: Quarantined) -> None:
        """Remember a unit, in the place of what was remembered of it (`interface.Transaction.quarantine`)."""
        known = self._quarantine.get(where("hwid") == binary(unit.hwid))
        number = known.doc_id if known is not None else self.counter("quarantined") + 1
        if known is None:
            self.set_counter("quarantined", number)
        self._put(self._quarantine, number, quarantined_document(unit))

    def clear_quarantine(self, hwid: bytes) -> bool:
        """Forget a unit; whether it was remembered (`interface.Transaction.clear_quarantine`)."""
        known = self._quarantine.get(where("hwid") == binary(hwid))
        if known is None:
            return False
        self._remove(self._quarantine, known)
        return True

    def put_note(self, topic: str, key: str, note: dict[str, Any] | None) -> None:
        """Note a small JSON object, or forget it (`interface.Transaction.put_note`)."""
        known = self._notes.get((where("topic") == topic) & (where("key") == key))
        if note is None:
            if known is not None:
                self._remove(self._notes, known)
            return
        number = known.doc_id if known is not None else self.counter("notes") + 1
        if known is None:
            self.set_counter("notes", number)
        self._put(self._notes, number, {"topic": topic, "key": key, "note": dict(note)})

    def finish(self) -> None:
        """Put the entries into the outbox, in the place of those that the log has."""
        first = self._head.seq - len(self._lines) + 1
        self._storage.tables[OUTBOX] = {
            str(number): {"line": line} for number, line in enumerate(self._lines, start=first)
        }
        self._set_facts({"audit_seq": self._head.seq, "audit_hash": self._head.hash})

    def _changed(self) -> None:
        self.changed = True

    def _put_counter(self, name: str, value: int) -> None:
        self._set_facts({f"counter {name}": f"{value:x}"})

    def _rows_sharing(self, rows: Sequence[Row]) -> Iterable[Row]:
        """Look at all rows once, however many these are."""
        wanted = [(field, {encoded(field, value) for value in values_of(rows, field)}) for field in CLAIMED]
        return self._search(lambda facts: any(facts.get(field) in values for field, values in wanted))

    def _add_rows(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._put(self._rows, row.number, to_document(row))

    def _change_rows(self, changes: Sequence[tuple[Row, Row]]) -> None:
        self._add_rows([new for _, new in changes])

    def _set_facts(self, facts: dict[str, Any]) -> None:
        self._put(self._meta, META_ID, facts)

    def _put(self, table: Table, number: int, facts: dict[str, Any]) -> None:
        """Add a document, or change the facts named in the one that is there.

        Past TinyDB, which copies the table's index at every change: a transaction of many would be quadratic.
        """
        documents = self._storage.tables.setdefault(table.name, {})
        before = documents.get(str(number))
        self._undo.append((table.name, number, before))
        self.changed = True
        documents[str(number)] = {**before, **facts} if before is not None else dict(facts)

    def _remove(self, table: Table, known: Document) -> None:
        self._undo.append((table.name, known.doc_id, dict(known)))
        self.changed = True
        del self._storage.tables[table.name][str(known.doc_id)]

    def _take_back(self, name: str, number: int, before: dict[str, Any] | None) -> None:
        table = self._storage.tables[name]
        if before is None:
            del table[str(number)]
        else:
            table[str(number)] = before
