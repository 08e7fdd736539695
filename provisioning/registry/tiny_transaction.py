"""How a transaction on TinyDB changes what there is.

Rules:

- A transaction remembers how to undo each change, so that one caller's share of a common transaction can fail
  alone (`savepoint`, `roll_back`).
- One row or many: a change costs one look at all rows (for what must be unique), not one for each.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tinydb import where
from tinydb.table import Document

from birthmark.device.errors import RegistryError
from birthmark.provisioning.audit import chained
from birthmark.provisioning.registry.claims import CLAIMED, check_unique, claims, values_of
from birthmark.provisioning.registry.document import (
    batch_document,
    binary,
    encoded,
    quarantined_document,
    to_document,
)
from birthmark.provisioning.registry.interface import LAST_ISSUED_AT, LAST_ROW
from birthmark.provisioning.registry.model import KeyMode, Kind, Row, State, check_change
from birthmark.provisioning.registry.storage import META_ID
from birthmark.provisioning.registry.tiny_views import TinyView, audit_head_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from datetime import datetime

    from tinydb.table import Table

    from birthmark.provisioning.audit import Head
    from birthmark.provisioning.registry.line import Batch, Quarantined
    from birthmark.provisioning.registry.storage import TransactionStorage

_NO_BUNDLE = frozenset({State.ATTESTED, State.VOID})


@dataclass(frozen=True, slots=True)
class Savepoint:
    """A point within a transaction to which it can be rolled back."""

    changes: int
    head: Head
    lines: int
    changed: bool


class TinyTransaction(TinyView):
    """An exclusive read, change and write (`interface.Transaction`)."""

    def __init__(self, storage: TransactionStorage, clock: Callable[[], datetime], actor: str) -> None:
        super().__init__(storage)
        self._clock = clock
        self._actor = actor
        self._head = audit_head_of(self._facts())
        self._lines: list[str] = []
        self._undo: list[tuple[str, int, dict[str, Any] | None]] = []
        """For each change the table, the id, and what was there before."""
        self.changed = False

    def savepoint(self) -> Savepoint:
        """Return what `roll_back` needs to undo everything from here on."""
        return Savepoint(len(self._undo), self._head, len(self._lines), self.changed)

    def roll_back(self, savepoint: Savepoint) -> None:
        """Undo every change since `savepoint`."""
        while len(self._undo) > savepoint.changes:
            name, number, before = self._undo.pop()
            table = self._storage.tables[name]
            if before is None:
                del table[str(number)]
            else:
                table[str(number)] = before
        self._head, self.changed = savepoint.head, savepoint.changed
        del self._lines[savepoint.lines :]

    def insert(
        self,
        *,
        kind: Kind,
        name: str,
        role: str = "",
        state: State | None = None,
        key_mode: KeyMode | None = None,
        hwid: bytes | None = None,
        txn: bytes | None = None,
        public_key_der: bytes | None = None,
        cert_serial: int | None = None,
        issuer: str = "",
        bundle_sha256: bytes | None = None,
        replaces: int | None = None,
        renews: int | None = None,
        replaces_reason: str = "",
        batch: str = "",
        label: str = "",
    ) -> Row:
        """Add a row (`interface.Transaction.insert`)."""
        now = self._clock()
        wanted = Row(
            number=1,
            kind=kind,
            name=name,
            role=role,
            state=state or State.RESERVED,
            created_at=now,
            changed_at=now,
            key_mode=key_mode,
            hwid=hwid,
            txn=txn,
            public_key_der=public_key_der,
            cert_serial=cert_serial,
            issuer=issuer,
            bundle_sha256=bundle_sha256,
            replaces=replaces,
            renews=renews,
            replaces_reason=replaces_reason,
            batch=batch,
            label=label,
        )
        return self.insert_all([wanted])[0]

    def insert_all(self, rows: Sequence[Row]) -> list[Row]:
        """Add many rows (`interface.Transaction.insert_all`)."""
        now, last = self._clock(), self.counter(LAST_ROW)
        numbered = [
            replace(row, number=number, created_at=now, changed_at=now, bundle=_kept_bundle(row))
            for number, row in enumerate(rows, start=last + 1)
        ]
        with self._all_or_nothing():
            for row in numbered:
                if row.replaces is not None:
                    self._give_way(row.replaces, to=row.number)
            self._check_unique(numbered)
            for row in numbered:
                self._store(row)
            self.set_counter(LAST_ROW, last + len(numbered))
            self._note_issuances(numbered)
        return numbered

    def update(self, row: Row) -> Row:
        """Put `row` in the place of the row with its number (`interface.Transaction.update`)."""
        return self.update_all([row])[0]

    def update_all(self, rows: Sequence[Row]) -> list[Row]:
        """Change many rows (`interface.Transaction.update_all`)."""
        now = self._clock()
        changed, claiming, issued = [], [], []
        for row in rows:
            old = self._existing(row.number)
            new = replace(row, changed_at=now, bundle=_kept_bundle(row))
            try:
                check_change(old, new)
            except ValueError as error:
                raise RegistryError(
                    f"could not change the registry: {error}",
                    hint="it was changed meanwhile: start this unit again",
                ) from error
            changed.append(new)
            if claims(new) != claims(old):
                claiming.append(new)
            if old.certificate_der is None:
                issued.append(new)
        with self._all_or_nothing():
            self._check_unique(claiming)
            for row in changed:
                self._store(row)
            self._note_issuances(issued)
            for row in changed:
                if row.state is State.VOID and row.replaces is not None:
                    self._reinstate(row.replaces, row.number)
        return changed

    def set_counter(self, name: str, value: int) -> None:
        """Set a counter, never below its value."""
        if value < self.counter(name):
            raise RegistryError(f"could not set the counter {name} to {value}: it is at {self.counter(name)}")
        self._set_facts({f"counter {name}": f"{value:x}"})

    def record(self, action: str, subject: str, **details: str | int | bool | None) -> None:
        """Add an entry to the audit log, durable with this transaction."""
        line, self._head = chained(
            self._head, at=self._clock(), actor=self._actor, action=action, subject=subject, details=details
        )
        self._lines.append(line)
        self.changed = True

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
        self._outbox.truncate()
        for offset, line in enumerate(self._lines):
            self._outbox.insert(Document({"line": line}, doc_id=self._head.seq - len(self._lines) + 1 + offset))
        self._set_facts({"audit_seq": self._head.seq, "audit_hash": self._head.hash})

    def _existing(self, number: int) -> Row:
        row = self.row(number)
        if row is None:
            raise RegistryError(f"could not change row {number}: there is no such row")
        return row

    def _store(self, row: Row) -> None:
        self._put(self._rows, row.number, to_document(row))

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
        table.remove(doc_ids=[known.doc_id])

    def _reinstate(self, number: int, voided: int) -> None:
        old = self._existing(number)
        if old.state is not State.VOID and old.replaced_by == voided:
            self._check_unique([replace(old, replaced_by=None)])
            self._store(replace(old, replaced_by=None))

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        mark = self.savepoint()
        try:
            yield
        except BaseException:
            self.roll_back(mark)
            raise

    def _give_way(self, number: int, *, to: int) -> None:
        old = self._existing(number)
        if not old.is_live:
            raise RegistryError(
                f"could not replace row {old.number}: it is VOID or being replaced already",
                hint=f"look at it with `birthmark show {old.name}`",
            )
        self._store(replace(old, replaced_by=to))

    def _note_issuances(self, rows: Iterable[Row]) -> None:
        """Let the counter follow those that have got their certificate."""
        issued = [int(row.changed_at.timestamp()) for row in rows if row.certificate_der is not None]
        if issued:
            self.set_counter(LAST_ISSUED_AT, max(*issued, self.counter(LAST_ISSUED_AT)))

    def _check_unique(self, rows: Sequence[Row]) -> None:
        """Check what `rows`, as they are to be, claim: one look at all rows, however many these are."""
        if not rows:
            return
        wanted = [(field, {encoded(field, value) for value in values_of(rows, field)}) for field in CLAIMED]
        check_unique(rows, self._search(lambda facts: any(facts.get(field) in values for field, values in wanted)))


def _kept_bundle(row: Row) -> bytes | None:
    return None if row.state in _NO_BUNDLE else row.bundle
