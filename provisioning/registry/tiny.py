"""The registry on TinyDB: one JSON file, good for some ten thousand rows.

Rules:

- `transaction()` takes the lock (between processes and threads) before it reads and holds it until the new
  state is on disk. A lock inside the storage would come too late: between a read and the write after it another
  process can write, and its record is lost.
- One transaction is one write, whatever it changes.
- Audit entries wait in the `outbox` table, written with the rows, until the log has them on disk.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from birthmark.device.durable import private_folder
from birthmark.device.errors import BirthmarkError, RegistryError
from birthmark.provisioning.audit import RESTORED, Head, append_missing
from birthmark.provisioning.registry.content import (
    META,
    META_ID,
    OUTBOX,
    STANDING,
    UNFINISHED,
    audit_head_of,
    check_standing,
    from_tables,
    to_tables,
)
from birthmark.provisioning.registry.interface import Snapshot
from birthmark.provisioning.registry.place import REGISTRY_FILE, Place, always
from birthmark.provisioning.registry.storage import RegistryFile, TransactionStorage
from birthmark.provisioning.registry.tiny_transaction import TinyTransaction
from birthmark.provisioning.registry.tiny_views import TinyView

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import datetime
    from pathlib import Path
    from typing import Self

    from birthmark.provisioning.registry.content import Placed, Tables


class TinyRegistry:
    """A registry in one folder. Safe to use from several threads and processes.

    Args:
        folder: where `registry.json`, its lock and the audit log are.
        clock: the current time, aware.
        actor: who is at work, for the audit log: `user@host`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        clock: Callable[[], datetime],
        actor: str,
        in_force: Callable[[], None] = always,
    ) -> None:
        self._place = Place(folder, in_force)
        self._file = RegistryFile(folder / REGISTRY_FILE)
        self._clock = clock
        self._actor = actor
        weakref.finalize(self, self._file.close)

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        clock: Callable[[], datetime],
        actor: str,
        documents: Iterable[Placed] = (),
    ) -> Self:
        """Make a registry in `folder`, empty or of these documents.

        Raises:
            RegistryError: there is one already, or it could not be written.
        """
        registry = cls(private_folder(folder), clock=clock, actor=actor)
        with registry._place.locked():
            registry.make(documents)
        return registry

    def make(self, documents: Iterable[Placed] = (), *, standing: str = "") -> None:
        """Write a new registry (`interface.StoredRegistry.make`)."""
        if not self._file.may_be_made():
            raise RegistryError(
                f"could not make a registry in {self._place.folder}: there is one already",
                hint="choose another folder; a registry is never overwritten",
            )
        tables = to_tables(documents)
        if standing:
            tables[META][str(META_ID)][STANDING] = standing
        self._file.save(tables)

    @contextmanager
    def documents(self) -> Iterator[Iterable[Placed]]:
        """Open everything that it holds (`interface.StoredRegistry.documents`)."""
        yield from_tables(self._file.load())

    def arrive(self, standing: str, action: str, subject: str, **details: str | int | bool | None) -> list[str]:
        """Record how it came here (`interface.StoredRegistry.arrive`)."""
        with self._work_on(self._file.load()) as work:
            check_standing(standing, work.standing, self.shown)
            work.record(action, subject, **details)
        return work.lines

    def stand(self, standing: str) -> None:
        """Say how it stands (`interface.StoredRegistry.stand`)."""
        with self._work_on(self._file.load()) as work:
            work.stand(standing)

    def discard(self, standing: str = "") -> None:
        """Remove the file (`interface.StoredRegistry.discard`)."""
        with suppress(RegistryError, OSError):
            with self._work_on(self._file.load()) as work:
                check_standing(standing, work.standing, self.shown)
            self._file.path.unlink()
        self._file.close()

    def shares(self) -> bool:
        """Whether other stations use it, too: never."""
        return False

    @property
    def audit_path(self) -> Path:
        """Where the audit log is."""
        return self._place.audit_path

    @property
    def shown(self) -> str:
        """Where the registry is, for people."""
        return str(self._file.path)

    @contextmanager
    def transaction(self) -> Iterator[TinyTransaction]:
        """Open a transaction (`interface.Registry.transaction`)."""
        with self._place.locked():
            self._file.remove_leftovers()
            with self._work_on(self._settle(self._file.load())) as work:
                if str(work.standing).startswith(UNFINISHED):
                    work.stand("")  # it was killed who brought it here, after station.toml had changed
                yield work
            # The entries are durable already; if the log cannot take them now, the next transaction
            # appends them before it does anything else, or fails.
            with suppress(OSError):
                append_missing(self.audit_path, work.lines)

    @contextmanager
    def view(self) -> Iterator[TinyView]:
        """Open a view (`interface.Registry.view`)."""
        self._place.check_in_force()
        yield TinyView(TransactionStorage(self._file.load(), writable=False))

    def audit_head(self) -> Head:
        """Bring the audit log up to date (`interface.Registry.audit_head`)."""
        with self._place.locked(to_read=True):
            tables = self._file.load() if self._place.is_read_only else self._settle(self._file.load())
            return audit_head_of(tables[META][str(META_ID)])

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Hold everybody else off and open the registry's content (`interface.Registry.snapshot`)."""
        with ExitStack() as others:
            others.enter_context(self._place.locked())
            tables = self._settle(self._file.load())
            yield Snapshot(from_tables(tables), self._place.audit_bytes(), others.close)

    @contextmanager
    def held_open(self) -> Iterator[None]:
        """Hold nothing (`interface.StoredRegistry.held_open`): its file is written anew each time."""
        yield

    def files(self) -> frozenset[Path]:
        """Return the files that it consists of."""
        return frozenset({self._file.path})

    def close(self) -> None:
        """Let go of the file; the registry opens it again if it is used again."""
        self._file.close()

    def _settle(self, tables: Tables) -> Tables:
        """Append to the log what an earlier transaction could not, or what was cut since, and leave word of it."""
        try:
            missing = append_missing(self.audit_path, _waiting(tables))
            if not missing:
                return tables
            with self._work_on(tables) as work:
                work.record(RESTORED, "audit-log", lines=missing)
            append_missing(self.audit_path, work.lines)
        except OSError as error:
            raise self._place.log_failure(error) from error
        return self._file.load()

    @contextmanager
    def _work_on(self, tables: Tables) -> Iterator[TinyTransaction]:
        """Open a transaction that starts from `tables`, and write what it changes."""
        storage = TransactionStorage(tables, writable=True)
        work = TinyTransaction(storage, self._clock, self._actor)
        try:
            yield work
            if work.changed:
                work.finish()
                self._file.save(storage.tables)
        finally:
            storage.close()


def _waiting(tables: Tables) -> list[str]:
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
