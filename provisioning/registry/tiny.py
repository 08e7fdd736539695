"""The registry on TinyDB: one JSON file, good for some ten thousand rows.

Rules:

- `transaction()` takes the lock (between processes and threads) before it reads and holds it until the new
  state is on disk. A lock inside the storage would come too late: between a read and the write after it another
  process can write, and its record is lost.
- One transaction is one write, whatever it changes.
- Document ids are row numbers of ours; TinyDB's query cache is off: it outlives changes by other processes.
- Audit entries wait in the `outbox` table, written with the rows, until the log has them on disk.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, cast

from tinydb import TinyDB, where
from tinydb.table import Document, Table

from birthmark.device.durable import exclusive_lock, private_folder
from birthmark.device.errors import BirthmarkError, RegistryError
from birthmark.provisioning.audit import GENESIS, Head, append_missing, chained
from birthmark.provisioning.registry.document import binary, from_document, to_document
from birthmark.provisioning.registry.interface import LAST_ISSUED_AT, DuplicateError
from birthmark.provisioning.registry.model import KeyMode, Kind, Row, State, check_change
from birthmark.provisioning.registry.storage import (
    META,
    META_ID,
    OUTBOX,
    ROWS,
    RegistryFile,
    TransactionStorage,
    empty_tables,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from datetime import datetime
    from pathlib import Path

    from tinydb.queries import QueryLike

REGISTRY_FILE: Final = "registry.json"
LOCK_FILE: Final = "registry.lock"
AUDIT_FILE: Final = "audit.jsonl"
_NO_BUNDLE: Final = frozenset({State.ATTESTED, State.VOID})


class TinyRegistry:
    """A registry in one folder. Safe to use from several threads and processes.

    Args:
        folder: where `registry.json`, its lock and the audit log are.
        clock: the current time, aware.
        actor: who is at work, for the audit log: `user@host`.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], datetime], actor: str) -> None:
        self.audit_path = folder / AUDIT_FILE
        self._file = RegistryFile(folder / REGISTRY_FILE)
        self._lock_path = folder / LOCK_FILE
        self._clock = clock
        self._actor = actor
        self._held = threading.local()

    @classmethod
    def create(cls, folder: Path, *, clock: Callable[[], datetime], actor: str) -> TinyRegistry:
        """Make an empty registry in `folder`.

        Raises:
            RegistryError: there is one already, or it could not be written.
        """
        registry = cls(private_folder(folder), clock=clock, actor=actor)
        with registry._locked():
            if registry._file.path.exists():
                raise RegistryError(
                    f"could not make a registry in {folder}: there is one already", hint="choose another folder"
                )
            registry._file.save(empty_tables())
        return registry

    @contextmanager
    def transaction(self) -> Iterator[TinyTransaction]:
        """Open a transaction (`interface.Registry.transaction`)."""
        with self._locked():
            self._file.remove_leftovers()
            tables = self._file.load()
            self._settle(tables)
            storage = TransactionStorage(tables, writable=True)
            work = TinyTransaction(storage, self._clock, self._actor)
            try:
                yield work
                if not work.changed:
                    return
                work.finish()
                self._file.save(storage.tables)
            finally:
                storage.close()
            # The entries are durable already; if the log cannot take them now, the next transaction
            # appends them before it does anything else, or fails.
            with suppress(OSError):
                append_missing(self.audit_path, _waiting(storage.tables))

    @contextmanager
    def view(self) -> Iterator[TinyView]:
        """Open a view (`interface.Registry.view`)."""
        yield TinyView(TransactionStorage(self._file.load(), writable=False))

    def audit_head(self) -> Head:
        """Bring the audit log up to date and return the number and hash that its last entry must have.

        Raises:
            RegistryError: registry or log cannot be used.
        """
        with self._locked():
            tables = self._file.load()
            self._settle(tables)
            return _head(tables[META][str(META_ID)])

    def close(self) -> None:
        """Let go of the file; the registry opens it again if it is used again."""
        self._file.close()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if getattr(self._held, "held", False):
            raise RuntimeError("transactions of one registry do not nest")
        if not self._lock_path.parent.is_dir():
            self._file.load()  # says what is missing
        with exclusive_lock(self._lock_path):
            self._held.held = True
            try:
                yield
            finally:
                self._held.held = False

    def _settle(self, tables: dict[str, dict[str, dict[str, Any]]]) -> None:
        """Append to the log what an earlier transaction could not."""
        try:
            append_missing(self.audit_path, _waiting(tables))
        except OSError as error:
            raise RegistryError(
                f"could not write the audit log {self.audit_path}: {error.strerror}",
                hint="nothing was changed; make room or repair the permissions, then try again",
            ) from error


class TinyView:
    """One state of the registry (`interface.View`)."""

    def __init__(self, storage: TransactionStorage) -> None:
        database = TinyDB(storage=lambda: storage)
        self._rows = _table(database, ROWS)
        self._meta = _table(database, META)
        self._outbox = _table(database, OUTBOX)

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
        return self._search(where("name_folded") == name.lower())

    def live_by_name(self, name: str) -> Row | None:
        """Return the live row that holds this name (without regard to case)."""
        return next((row for row in self.named(name) if row.is_live), None)

    def live_by_hwid(self, hwid: bytes) -> Row | None:
        """Return the live row that holds this hwid."""
        return next((row for row in self._search(where("hwid") == binary(hwid)) if row.is_live), None)

    def by_cert_serial(self, cert_serial: int) -> Row | None:
        """Return the row whose certificate has this serial number."""
        return next(iter(self._search(where("cert_serial") == f"{cert_serial:x}")), None)

    def by_public_key(self, public_key_der: bytes) -> Row | None:
        """Return the row with this SubjectPublicKeyInfo (DER)."""
        return next(iter(self._search(where("public_key_der") == binary(public_key_der))), None)

    def revoked(self) -> list[Row]:
        """Return every row whose certificate is revoked, by ascending number."""
        return self._search(where("revoked_at") != None)  # noqa: E711 - TinyDB's way to write a query

    def counter(self, name: str) -> int:
        """Return a counter's value; 0 if it was never set."""
        value = self._facts().get(f"counter {name}", 0)
        return int(value, 16) if isinstance(value, str) else int(value)

    def _facts(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self._meta.get(doc_id=META_ID))

    def _search(self, query: QueryLike) -> list[Row]:
        found = self._rows.search(query)
        return sorted((from_document(hit.doc_id, hit) for hit in found), key=lambda row: row.number)


class TinyTransaction(TinyView):
    """An exclusive read, change and write (`interface.Transaction`)."""

    def __init__(self, storage: TransactionStorage, clock: Callable[[], datetime], actor: str) -> None:
        super().__init__(storage)
        self._clock = clock
        self._actor = actor
        self._head = _head(self._facts())
        self._lines: list[str] = []
        self.changed = False

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
        replaces: int | None = None,
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
            replaces=replaces,
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
        self._rows.insert(Document(to_document(row), doc_id=row.number))
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
        self._rows.update(to_document(row), doc_ids=[row.number])
        self.changed = True

    def _set_facts(self, facts: dict[str, Any]) -> None:
        self._meta.update(facts, doc_ids=[META_ID])
        self.changed = True

    def _reinstate(self, number: int, voided: int) -> None:
        old = self._existing(number)
        if old.state is not State.VOID and old.replaced_by == voided:
            self._check_unique(replace(old, replaced_by=None))
            self._store(replace(old, replaced_by=None))

    def _check_unique(self, row: Row, besides: int | None = None) -> None:
        mine = to_document(row)
        keys = [key for key in ("name_folded", "hwid", "public_key_der", "cert_serial") if mine[key] is not None]

        def shares(document: dict[str, Any]) -> bool:
            return any(document.get(key) == mine[key] for key in keys)

        for other in self._search(cast("QueryLike", shares)):
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


def _table(database: TinyDB, name: str) -> Table:
    return database.table(name, cache_size=0)


def _head(facts: dict[str, Any]) -> Head:
    return Head(int(facts.get("audit_seq", 0)), str(facts.get("audit_hash", GENESIS)))


def _waiting(tables: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Return the outbox's lines in their order."""
    outbox = tables[OUTBOX]
    try:
        return [outbox[number]["line"] for number in sorted(outbox, key=int)]
    except (KeyError, TypeError, ValueError, BirthmarkError) as error:
        raise RegistryError("could not read the registry: its outbox is damaged") from error
