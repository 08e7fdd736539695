"""The registry on TinyDB: one JSON file, good for some ten thousand rows.

Rules:

- `transaction()` takes the lock (between processes and threads) before it reads and holds it until the new
  state is on disk. A lock inside the storage would come too late: between a read and the write after it another
  process can write, and its record is lost.
- One transaction is one write, whatever it changes.
- Audit entries wait in the `outbox` table, written with the rows, until the log has them on disk.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.durable import exclusive_lock, private_folder
from birthmark.device.errors import BirthmarkError, RegistryError
from birthmark.provisioning.audit import RESTORED, Head, append_missing
from birthmark.provisioning.registry.interface import Snapshot
from birthmark.provisioning.registry.storage import (
    META,
    META_ID,
    OUTBOX,
    RegistryFile,
    TransactionStorage,
    empty_tables,
)
from birthmark.provisioning.registry.tiny_transaction import TinyTransaction
from birthmark.provisioning.registry.tiny_views import TinyView, audit_head_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime
    from pathlib import Path

REGISTRY_FILE: Final = "registry.json"
LOCK_FILE: Final = "registry.lock"
AUDIT_FILE: Final = "audit.jsonl"
_Tables = dict[str, dict[str, dict[str, Any]]]


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
            tables = self._settle(self._file.load())
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
            tables = self._settle(self._file.load())
            return audit_head_of(tables[META][str(META_ID)])

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Hold everybody else off and open the registry's content (`interface.Registry.snapshot`)."""
        with self._locked():
            self._settle(self._file.load())
            size = self.audit_path.stat().st_size if self.audit_path.exists() else 0
            yield Snapshot(self._file.content(), size)

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

    def _settle(self, tables: _Tables) -> _Tables:
        """Append to the log what an earlier transaction could not, or what was cut since, and leave word of it."""
        try:
            missing = append_missing(self.audit_path, _waiting(tables))
            if not missing:
                return tables
            storage = TransactionStorage(tables, writable=True)
            work = TinyTransaction(storage, self._clock, self._actor)
            try:
                work.record(RESTORED, "audit-log", lines=missing)
                work.finish()
                self._file.save(storage.tables)
            finally:
                storage.close()
            append_missing(self.audit_path, _waiting(storage.tables))
        except OSError as error:
            raise RegistryError(
                f"could not write the audit log {self.audit_path}: {error.strerror}",
                hint="nothing was changed; make room or repair the permissions, then try again",
            ) from error
        return storage.tables


def _waiting(tables: _Tables) -> list[str]:
    """Return the outbox's lines in their order."""
    outbox = tables[OUTBOX]
    try:
        lines = [outbox[number]["line"] for number in sorted(outbox, key=int)]
    except (KeyError, TypeError, ValueError, BirthmarkError):
        lines = [None]
    if not all(isinstance(line, str) and line.isascii() and line.isprintable() for line in lines):
        raise RegistryError(
            "could not read the registry: its outbox is damaged",
            hint="restore it from a backup, together with the audit log",
        )
    return lines
