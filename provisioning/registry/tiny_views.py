"""What a transaction or a view on TinyDB can be asked, and how a transaction changes it.

Rules:

- Document ids are row numbers of ours; TinyDB's query cache is off: it outlives changes by other processes.
- A transaction remembers how to undo each change, so that one caller's share of a common transaction can fail
  alone (`savepoint`, `roll_back`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from tinydb import TinyDB, where
from tinydb.table import Document, Table

from birthmark.device.errors import RegistryError
from birthmark.provisioning.audit import GENESIS, Head, chained
from birthmark.provisioning.registry.document import (
    batch_document,
    batch_from,
    binary,
    from_document,
    quarantined_document,
    quarantined_from,
    to_document,
)
from birthmark.provisioning.registry.interface import LAST_ISSUED_AT, DuplicateError
from birthmark.provisioning.registry.model import KeyMode, Kind, Row, State, check_change
from birthmark.provisioning.registry.storage import BATCHES, META, META_ID, NOTES, OUTBOX, QUARANTINE, ROWS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from datetime import datetime

    from tinydb.queries import QueryLike

    from birthmark.provisioning.registry.line import Batch, Quarantined
    from birthmark.provisioning.registry.storage import TransactionStorage

_UNIQUE = ("name_folded", "hwid", "public_key_der", "cert_serial")
_HEX = re.compile("[0-9a-f]{1,64}")
_NO_BUNDLE = frozenset({State.ATTESTED, State.VOID})


class TinyView:
    """One state of the registry (`interface.View`)."""

    def __init__(self, storage: TransactionStorage) -> None:
        database = TinyDB(storage=lambda: storage)
        self._storage = storage
        self._rows = _table(database, ROWS)
        self._meta = _table(database, META)
        self._outbox = _table(database, OUTBOX)
        self._batches = _table(database, BATCHES)
        self._quarantine = _table(database, QUARANTINE)
        self._notes = _table(database, NOTES)

    def rows(
        self, *, kind: Kind | None = None, states: Collection[State] | None = None, role: str | None = None
    ) -> list[Row]:
        """Return the rows that fit every given filter, by ascending number."""
        wanted = None if states is None else {state.value for state in states}

        def fits(document: dict[str, Any]) -> bool:
            return (
                (kind is None or document["kind"] == kind.value)
                and (wanted is None or document["state"] in wanted)
                and (role is None or document["role"] == role)
            )

        return self._search(cast("QueryLike", fits))

    def row(self, number: int) -> Row | None:
        """Return the row with this number."""
        document = self._rows.get(doc_id=number)
        return None if document is None else from_document(number, document)

    def named(self, name: str) -> list[Row]:
        """Return every row ever that had this name (without regard to case), by ascending number."""
        return self._having("name_folded", name.lower())

    def live_by_name(self, name: str) -> Row | None:
        """Return the live row that holds this name (without regard to case)."""
        return next((row for row in self.named(name) if row.is_live), None)

    def live_by_hwid(self, hwid: bytes) -> Row | None:
        """Return the live row that holds this hwid."""
        return next((row for row in self._having("hwid", binary(hwid)) if row.is_live), None)

    def by_cert_serial(self, cert_serial: int) -> Row | None:
        """Return the row whose certificate has this serial number."""
        return next(iter(self._having("cert_serial", f"{cert_serial:x}")), None)

    def by_public_key(self, public_key_der: bytes) -> Row | None:
        """Return the row with this SubjectPublicKeyInfo (DER)."""
        return next(iter(self._having("public_key_der", binary(public_key_der))), None)

    def revoked(self) -> list[Row]:
        """Return every row whose certificate is revoked, by ascending number."""
        return self._search(where("revoked_at") != None)  # noqa: E711 - TinyDB's way to write a query

    def counter(self, name: str) -> int:
        """Return a counter's value; 0 if it was never set."""
        value = self._facts().get(f"counter {name}", "0")
        if not isinstance(value, str) or not _HEX.fullmatch(value):
            raise _damaged(f"its counter {name}")
        return int(value, 16)

    def batches(self) -> list[Batch]:
        """Return every batch, the oldest first."""
        return [batch_from(found) for found in sorted(self._batches.all(), key=lambda one: one.doc_id)]

    def open_batch(self) -> Batch | None:
        """Return the batch that is open."""
        return next((batch for batch in self.batches() if batch.closed_at is None), None)

    def quarantined(self) -> list[Quarantined]:
        """Return every unit in quarantine, the oldest first."""
        return [quarantined_from(found) for found in sorted(self._quarantine.all(), key=lambda one: one.doc_id)]

    def notes(self, topic: str) -> dict[str, dict[str, Any]]:
        """Return everything noted under a topic, by key (`interface.View.notes`)."""
        found = self._notes.search(where("topic") == topic)
        if not all(isinstance(hit.get("key"), str) and isinstance(hit.get("note"), dict) for hit in found):
            raise _damaged(f"what it notes of {topic}")
        return {hit["key"]: dict(hit["note"]) for hit in sorted(found, key=lambda one: one.doc_id)}

    def _facts(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self._meta.get(doc_id=META_ID))

    def _having(self, key: str, value: str) -> list[Row]:
        """Return the rows with this stored value, by ascending number.

        Past TinyDB's queries: they make an object of every row that they look at, and cost ten times as much.
        """
        found = [(int(number), facts) for number, facts in self._stored_rows() if facts.get(key) == value]
        return [from_document(number, facts) for number, facts in sorted(found, key=lambda one: one[0])]

    def _stored_rows(self) -> Iterable[tuple[str, dict[str, Any]]]:
        return self._storage.tables.get(ROWS, {}).items()

    def _search(self, query: QueryLike) -> list[Row]:
        found = self._rows.search(query)
        return sorted((from_document(hit.doc_id, hit) for hit in found), key=lambda row: row.number)


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
        row = Row(
            number=self.counter("rows") + 1,
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
        old = None if replaces is None else self._existing(replaces)
        if old is not None and not old.is_live:
            raise RegistryError(
                f"could not replace row {old.number}: it is VOID or being replaced already",
                hint=f"look at it with `birthmark show {old.name}`",
            )
        self._check_unique(row, besides=replaces)
        if old is not None:
            self._store(replace(old, replaced_by=row.number))
        self.set_counter("rows", row.number)
        self._put(self._rows, row.number, to_document(row))
        return row

    def update(self, row: Row) -> Row:
        """Put `row` in the place of the row with its number (`interface.Transaction.update`)."""
        old = self._existing(row.number)
        bundle = None if row.state in _NO_BUNDLE else row.bundle
        row = replace(row, bundle=bundle, changed_at=self._clock())
        try:
            check_change(old, row)
        except ValueError as error:
            raise RegistryError(
                f"could not change the registry: {error}", hint="it was changed meanwhile: start this unit again"
            ) from error
        if _claims(row) != _claims(old):
            self._check_unique(row)
        self._store(row)
        if row.certificate_der is not None and old.certificate_der is None:
            self.set_counter(LAST_ISSUED_AT, max(int(row.changed_at.timestamp()), self.counter(LAST_ISSUED_AT)))
        if row.state is State.VOID and row.replaces is not None:
            self._reinstate(row.replaces, row.number)
        return row

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
        """Add a document, or change the facts named in the one that is there."""
        before = table.get(doc_id=number)
        self._undo.append((table.name, number, None if before is None else dict(before)))
        self.changed = True
        if before is None:
            table.insert(Document(facts, doc_id=number))
        else:
            table.update(facts, doc_ids=[number])

    def _remove(self, table: Table, known: Document) -> None:
        self._undo.append((table.name, known.doc_id, dict(known)))
        self.changed = True
        table.remove(doc_ids=[known.doc_id])

    def _reinstate(self, number: int, voided: int) -> None:
        old = self._existing(number)
        if old.state is not State.VOID and old.replaced_by == voided:
            self._check_unique(replace(old, replaced_by=None))
            self._store(replace(old, replaced_by=None))

    def _check_unique(self, row: Row, besides: int | None = None) -> None:
        mine = to_document(row)
        nothing = object()  # what is not set is shared with nobody
        name, hwid, key, cert_serial = (mine[field] or nothing for field in _UNIQUE)
        shared = [
            (int(number), facts)
            for number, facts in self._stored_rows()
            if facts.get("name_folded") == name
            or facts.get("hwid") == hwid
            or facts.get("public_key_der") == key
            or facts.get("cert_serial") == cert_serial
        ]
        for number, facts in sorted(shared, key=lambda one: one[0]):
            other = from_document(number, facts)
            if other.number == row.number:
                continue
            if row.public_key_der is not None and other.public_key_der == row.public_key_der:
                raise DuplicateError("public_key", other)
            if row.cert_serial is not None and other.cert_serial == row.cert_serial:
                raise DuplicateError("cert_serial", other)
            if not (row.is_live and other.is_live) or other.number == besides:
                continue
            if other.name_folded == row.name_folded:
                raise DuplicateError("name", other)
            if row.hwid is not None and other.hwid == row.hwid:
                raise DuplicateError("hwid", other)


def _claims(row: Row) -> tuple[object, ...]:
    """Return what a row wants to itself; while that stays, nobody else can have come by it."""
    return row.is_live, row.name_folded, row.hwid, row.public_key_der, row.cert_serial


def _table(database: TinyDB, name: str) -> Table:
    return database.table(name, cache_size=0)


def audit_head_of(facts: dict[str, Any]) -> Head:
    """Return the head of the audit log that the registry remembers in its facts."""
    seq, digest = facts.get("audit_seq", 0), facts.get("audit_hash", GENESIS)
    if isinstance(seq, bool) or not isinstance(seq, int) or seq < 0 or not isinstance(digest, str):
        raise _damaged("what it remembers of the audit log")
    return Head(seq, digest)


def _damaged(what: str) -> RegistryError:
    return RegistryError(
        f"could not read the registry: {what} is damaged",
        hint="restore it from a backup, together with the audit log",
    )
