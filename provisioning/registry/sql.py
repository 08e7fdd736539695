"""The registry in a database, SQLite or PostgreSQL: for a million rows, and for several stations that share it.

Rules:

- Two locks, always in this order: the one of the station's folder, which puts its processes in line and holds
  until the audit log has what the transaction tells of; and the database's own (`sql_database`), between stations.
- Audit entries wait in the outbox, written with the rows, until the log has them on disk (docs/adr/0003). Stations
  that share a database have a log each.
- A connection that breaks ends its transaction with an error; the next one gets a new connection.
- A registry that is being made, or that has moved elsewhere, says so of itself (`standing`), and may be
  overwritten; no other one ever is.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from sqlalchemy import insert, inspect, select, text, update
from sqlalchemy.exc import SQLAlchemyError

from birthmark.device.errors import RegistryError
from birthmark.provisioning.audit import RESTORED, append_missing
from birthmark.provisioning.registry.content import (
    PROGRAM,
    STANDING,
    UNFINISHED,
    check_standing,
    may_be_overwritten,
)
from birthmark.provisioning.registry.interface import Snapshot
from birthmark.provisioning.registry.place import Place, always
from birthmark.provisioning.registry.sql_content import documents_of, fill
from birthmark.provisioning.registry.sql_database import Database
from birthmark.provisioning.registry.sql_schema import FORMAT, INDEXES, LOGS, META, METADATA
from birthmark.provisioning.registry.sql_transaction import SqlTransaction
from birthmark.provisioning.registry.sql_views import SqlView

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import datetime
    from pathlib import Path

    from sqlalchemy.engine import Connection

    from birthmark.provisioning.audit import Head
    from birthmark.provisioning.registry.content import Placed


class SqlRegistry:
    """A registry in a database. Safe to use from several threads and processes.

    Args:
        folder: the station's: its lock, its audit log, and where a relative path of SQLite begins.
        url: of the database.
        clock: the current time, aware.
        actor: who is at work, for the audit log: `user@host`.
        log: the name of this station's audit log among those of the stations that share the database.
        in_force: raises `RegistryError` if another registry has taken over.

    Raises:
        ConfigurationError: the URL cannot be used, or what is needed for it is not installed.
    """

    def __init__(
        self,
        folder: Path,
        url: str,
        *,
        clock: Callable[[], datetime],
        actor: str,
        log: str = "",
        in_force: Callable[[], None] = always,
    ) -> None:
        self._place = Place(folder, in_force)
        self._database = Database(url, folder)
        self._clock = clock
        self._actor = actor
        self._log = log
        weakref.finalize(self, self._database.close)

    @classmethod
    def create(
        cls,
        folder: Path,
        url: str,
        *,
        clock: Callable[[], datetime],
        actor: str,
        log: str = "",
        documents: Iterable[Placed] = (),
    ) -> SqlRegistry:
        """Make a registry, empty or of these documents, in a database that has none.

        Raises:
            RegistryError: there is one already, or it could not be written; nothing was changed.
        """
        registry = cls(folder, url, clock=clock, actor=actor, log=log)
        registry.make(documents)
        return registry

    def make(self, documents: Iterable[Placed] = (), *, standing: str = "") -> None:
        """Write a new registry (`interface.StoredRegistry.make`)."""
        made = self._database.make_file()
        try:
            with self._connected() as connection:
                self._begin(connection, self._database.dialect.begin_making)
                self._make_tables(connection)
                fill(connection, documents, self._log)
                facts = {"program": PROGRAM, "format": str(FORMAT), STANDING: standing}
                connection.execute(insert(META), [{"name": name, "value": value} for name, value in facts.items()])
                connection.exec_driver_sql("COMMIT")
        except BaseException:
            if made:
                self._database.remove_file()
            raise

    @contextmanager
    def documents(self) -> Iterator[Iterable[Placed]]:
        """Open everything that it holds (`interface.StoredRegistry.documents`)."""
        with self._connected() as connection:
            for view in self._viewing(connection):
                yield documents_of(view, self._log)

    def arrive(self, standing: str, action: str, subject: str, **details: str | int | bool | None) -> list[str]:
        """Record how it came here (`interface.StoredRegistry.arrive`)."""
        with self._changing() as work:
            check_standing(standing, work.standing, self.shown)
            work.record(action, subject, **details)
        return work.lines

    def stand(self, standing: str) -> None:
        """Say how it stands (`interface.StoredRegistry.stand`)."""
        # The log is not looked at: it may be another registry's by now.
        with self._connected() as connection:
            self._begin(connection, self._database.dialect.begin_change)
            connection.execute(update(META).where(META.c.name == STANDING).values(value=standing))
            connection.exec_driver_sql("COMMIT")

    def shares(self) -> bool:
        """Whether other stations use it, too (`interface.StoredRegistry.shares`)."""
        with self.view() as view:
            return any(record["log"] != self._log for record in view.records(select(LOGS.c.log)))

    @property
    def audit_path(self) -> Path:
        """Where the audit log is."""
        return self._place.audit_path

    @property
    def shown(self) -> str:
        """Where the registry is, for people."""
        return self._database.shown

    @contextmanager
    def transaction(self) -> Iterator[SqlTransaction]:
        """Open a transaction (`interface.Registry.transaction`)."""
        with self._place.locked():
            with self._changing() as work:
                if work.standing.startswith(UNFINISHED):
                    work.stand("")  # it was killed who brought it here, after station.toml had changed
                yield work
            # The entries are durable already; if the log cannot take them now, the next transaction
            # appends them before it does anything else, or fails.
            with suppress(OSError):
                append_missing(self.audit_path, work.lines)

    @contextmanager
    def view(self) -> Iterator[SqlView]:
        """Open a view (`interface.Registry.view`)."""
        self._place.check_in_force()
        with self._connected() as connection:
            yield from self._viewing(connection)

    def audit_head(self) -> Head:
        """Bring the audit log up to date (`interface.Registry.audit_head`)."""
        reading = self.view if self._place.is_read_only else self._changing
        with self._place.locked(to_read=True), reading() as work:
            return work.head(self._log)

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Hold everybody else off and open the registry's content (`interface.StoredRegistry.snapshot`)."""
        with self._connected() as reading, ExitStack() as others:
            others.enter_context(self._place.locked())
            self._be_patient(others.enter_context(self._changing()))
            for view in self._viewing(reading):
                self._be_patient(view)
                documents = documents_of(view, self._log)
                yield Snapshot(documents, self._place.audit_bytes(), others.close)

    def discard(self, standing: str = "") -> None:
        """Remove it from its database (`interface.StoredRegistry.discard`).

        SQLite's file stays, empty: somebody may have it open already, to make a registry of his own in it.
        """
        with suppress(RegistryError), self._connected() as connection:
            self._begin(connection, self._database.dialect.begin_change)
            view = SqlView(self._database, connection)
            view.check_format()
            check_standing(standing, view.standing, self.shown)
            METADATA.drop_all(connection)
            connection.exec_driver_sql("COMMIT")

    @contextmanager
    def held_open(self) -> Iterator[None]:
        """Hold SQLite's file open (`interface.StoredRegistry.held_open`); a server's connections are kept anyway.

        Who closes it as the last one brings its log into it, with four waits for the disk. Not for longer than
        need be: what lies in the log of a process that was killed is lost to whoever copies the file alone.
        """
        with ExitStack() as held:
            for statement in self._database.dialect.hold_open:
                held.enter_context(self._connected()).exec_driver_sql(statement)
            yield

    def files(self) -> frozenset[Path]:
        """Return the files that it consists of: none, where a server keeps it."""
        return self._database.files()

    def close(self) -> None:
        """Let go of connections; the registry opens new ones if it is used again."""
        self._database.close()

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        """Open a connection, and close it whatever happens; what the database says becomes a `RegistryError`."""
        connection = self._database.connect()
        try:
            yield connection
        except BaseException as error:
            # It may be in the middle of a transaction, or broken: nobody is to get it again.
            with suppress(SQLAlchemyError):
                connection.invalidate()
            if isinstance(error, SQLAlchemyError):
                raise self._database.failure(error) from error
            raise
        finally:
            connection.close()

    @contextmanager
    def _changing(self) -> Iterator[SqlTransaction]:
        """Open a transaction of the database. The caller holds the folder's lock."""
        with self._connected() as connection:
            work = self._settled(connection)
            try:
                yield work
                if work.spoilt is not None:
                    raise work.spoilt
                if work.changed:
                    work.finish()
                connection.exec_driver_sql("COMMIT" if work.changed else "ROLLBACK")
            finally:
                work.end()

    def _settled(self, connection: Connection) -> SqlTransaction:
        """Begin, and append to the log what an earlier transaction could not, or what was cut since."""
        while True:
            self._begin(connection, self._database.dialect.begin_change)
            work = SqlTransaction(self._database, connection, clock=self._clock, actor=self._actor, log=self._log)
            work.check_format()
            try:
                missing = append_missing(self.audit_path, work.outbox())
                if not missing:
                    return work
                work.record(RESTORED, "audit-log", lines=missing)
                work.finish()
                connection.exec_driver_sql("COMMIT")
                append_missing(self.audit_path, work.lines)
            except OSError as error:
                raise self._place.log_failure(error) from error

    def _begin(self, connection: Connection, statements: Iterable[str]) -> None:
        for statement in statements:
            connection.exec_driver_sql(statement)

    def _viewing(self, connection: Connection) -> Iterator[SqlView]:
        before = self._database.state_if_unguarded()
        self._begin(connection, self._database.dialect.begin_view)
        view = SqlView(self._database, connection)
        view.check_format()
        try:
            yield view
        finally:
            view.end()
        with suppress(SQLAlchemyError):  # there is nothing to lose, and no connection if it broke
            connection.exec_driver_sql("ROLLBACK")
        if self._database.state_if_unguarded() != before:
            raise RegistryError(
                f"could not read the registry {self.shown}: it was written to meanwhile, from where it can be",
                hint="try again",
            )

    def _be_patient(self, view: SqlView) -> None:
        """Let a transaction wait for something else than the database."""
        for statement in self._database.dialect.wait_long:
            view.run(text(statement))

    def _make_tables(self, connection: Connection) -> None:
        if inspect(connection).has_table(META.name):
            standing = connection.execute(select(META.c.value).where(META.c.name == STANDING)).scalar()
            if not may_be_overwritten(standing):
                raise RegistryError(
                    f"could not make a registry in {self.shown}: there is one already",
                    hint="name another database, or another file; a registry is never overwritten",
                )
            METADATA.drop_all(connection)
        METADATA.create_all(connection)
        for statement in INDEXES:
            connection.exec_driver_sql(statement)
