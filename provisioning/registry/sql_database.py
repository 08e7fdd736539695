"""One database behind a URL: how it is reached, locked and read, and what its errors mean.

Rules:

- SQLite and PostgreSQL differ here and nowhere else.
- Every transaction is begun by a statement of ours, never by the driver. One that changes something holds the
  registry's write lock from its first moment: SQLite's `BEGIN IMMEDIATE`, PostgreSQL's lock on a table. A view is
  one snapshot, and waits for nobody.
- SQLite's file on a disk that is mounted read-only is read without SQLite's locks, which are files. The same disk
  may be mounted to write elsewhere: a view during which the file changed ends with an error.
- What is acknowledged is on disk, whatever the server's defaults say (`synchronous`, `synchronous_commit`).
- A password is shown to nobody: no error and no log has the URL but through `shown_url`.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from birthmark.device.durable import is_on_read_only_disk, sync_folder
from birthmark.device.errors import ConfigurationError, MissingLibraryError, RegistryError
from birthmark.device.escape import escaped
from birthmark.provisioning.registry.interface import RegistryAwayError

try:
    from sqlalchemy import create_engine, event
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, OperationalError, SQLAlchemyError
    from sqlalchemy.pool import NullPool, QueuePool
except ImportError as _missing:
    raise MissingLibraryError(
        "could not open a registry in a database: SQLAlchemy is not installed",
        hint="pip install 'birthmark[sql]'",
    ) from _missing

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Engine
    from sqlalchemy.engine import URL, Connection

SQLITE: Final = "sqlite"
POSTGRESQL: Final = "postgresql"
BUSY_TIMEOUT_S: Final = 60.0
"""How long SQLite waits for a program that holds its file, such as `sqlite3`; ours wait in line for a lock."""
CACHE_KIB: Final = 65_536
"""How much of its file SQLite may hold in memory, as it is needed: with its own 2 MiB, a transaction of thousands
of rows writes pages out and reads them again, over and over."""
LOG_PAGES: Final = 16_384
"""How long SQLite's log may get (64 MiB) before what is in it is brought into the file: with its own 1,000 pages,
each transaction of thousands of rows would do that, with three more waits for the disk. Whoever closes the file as
the last one does it anyway."""
_SESSION: Final = (
    "SET synchronous_commit = on",
    # A station that lost power in the middle of a transaction must not hold the others off for hours.
    "SET idle_in_transaction_session_timeout = '60s'",
    "SET tcp_keepalives_idle = 15",
    "SET tcp_keepalives_interval = 5",
    "SET tcp_keepalives_count = 3",
)
_CONNECTING: Final = {
    "application_name": "birthmark",
    "connect_timeout": "10",
    "keepalives_idle": "15",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
"""What libpq is told, unless the URL says otherwise."""
_NOT_THERE: Final = frozenset({"42P01", "3F000"})
"""SQLSTATE of a table, or a schema, that is not there."""
_AWAY: Final = ("08", "57P")
"""Classes of SQLSTATE: the connection failed; an operator intervened (the server stops, starts or recovers)."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """What the two databases do each in their own way."""

    begin_change: tuple[str, ...]
    begin_making: tuple[str, ...]
    """The same where the tables may not be there yet."""
    begin_view: tuple[str, ...]
    wait_long: tuple[str, ...]
    """What lets a transaction be idle for as long as a backup takes."""
    mark: str
    """What stands for a value in the driver's own words."""
    hold_open: tuple[str, ...] = ()
    """What has a connection hold open what the others share, if they do not keep it themselves."""


_DIALECTS: Final = {
    SQLITE: Dialect(
        ("BEGIN IMMEDIATE",), ("BEGIN IMMEDIATE",), ("BEGIN",), (), "?", hold_open=("PRAGMA schema_version",)
    ),
    POSTGRESQL: Dialect(
        # A lock on a table, not an advisory one: it cannot collide with another program's number, and is taken
        # before the first snapshot. EXCLUSIVE lets readers through, a dump too.
        ("BEGIN ISOLATION LEVEL READ COMMITTED", "LOCK TABLE birthmark_meta IN EXCLUSIVE MODE"),
        ("BEGIN ISOLATION LEVEL READ COMMITTED",),
        ("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",),
        ("SET LOCAL idle_in_transaction_session_timeout = 0",),
        "%s",
    ),
}


class Database:
    """The database of a URL. Safe to use from several threads.

    Args:
        text: `sqlite:///registry.db` or `postgresql+psycopg://HOST/DATABASE`, as SQLAlchemy writes them.
        folder: where a relative path of SQLite begins.

    Raises:
        ConfigurationError: it is no such URL, or what is needed for it is not installed.
    """

    def __init__(self, text: str, folder: Path) -> None:
        url = _checked(text)
        self.dialect = _DIALECTS[url.get_backend_name()]
        self.path = folder / str(url.database) if url.get_backend_name() == SQLITE else None
        self.shown = shown_url(text)
        self.engine: Engine = _sqlite(url, self.path) if self.path is not None else _postgresql(url)

    def make_file(self) -> bool:
        """Make SQLite's file, for its owner alone, if it is not there; return whether it was made."""
        if self.path is None or self.path.exists():
            return False
        try:
            self.path.touch(mode=0o600, exist_ok=False)
            # WAL, because a reader then never waits for a writer; SQLite remembers it.
            with closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
            sync_folder(self.path.parent)
        except (OSError, sqlite3.Error) as error:
            self.remove_file()
            raise RegistryError(
                f"could not make the registry {self.path}: {getattr(error, 'strerror', None) or error}",
                hint="make room or repair the permissions of its folder",
            ) from error
        return True

    def state_if_unguarded(self) -> tuple[int, ...]:
        """Return what changes with SQLite's file where no lock keeps others from that; nothing elsewhere."""
        if self.path is None or not is_on_read_only_disk(self.path):
            return ()
        facts = self.path.stat()
        return facts.st_ino, facts.st_mtime_ns, facts.st_size

    def remove_file(self) -> None:
        """Remove SQLite's file and what belongs to it."""
        for path in self.files():
            path.unlink(missing_ok=True)

    def files(self) -> frozenset[Path]:
        """Return SQLite's file and those that it keeps beside it."""
        if self.path is None:
            return frozenset()
        return frozenset(self.path.with_name(self.path.name + end) for end in ("", "-wal", "-shm", "-journal"))

    def connect(self) -> Connection:
        """Open a connection, to be closed by the caller.

        Raises:
            RegistryError: there is none to be had.
        """
        if self.path is not None and not self.path.exists():
            raise RegistryError(
                f"could not read the registry {self.path}: it is not there",
                hint="restore it from a backup, together with the audit log",
            )
        try:
            return self.engine.connect()
        except SQLAlchemyError as error:
            raise self.failure(error, "reach") from error

    def failure(self, error: SQLAlchemyError, verb: str = "use") -> RegistryError:
        """Return what an error of the database means to the person who runs the station."""
        cause = _cause(error)
        if isinstance(error, DBAPIError) and _is_not_there(error):
            return RegistryError(
                f"could not read the registry {self.shown}: there is none in this database",
                hint="make one with `birthmark init --registry`, or bring one there: `birthmark registry migrate`",
            )
        if isinstance(error, IntegrityError):
            return RegistryError(
                f"could not write the registry {self.shown}: the database refuses it: {cause}",
                hint="nothing was changed; has another program written there? see `birthmark doctor`",
            )
        kind = RegistryError
        if self.path is None:
            kind = RegistryAwayError if _is_away(error) else RegistryError
            hint = "nothing is lost that was acknowledged; see that PostgreSQL runs and lets you in, then again"
        else:
            hint = "nothing was changed; make room or repair the permissions, then try again"
        return kind(f"could not {verb} the registry {self.shown}: {cause}", hint=hint)

    def close(self) -> None:
        """Let go of connections that are kept for later."""
        self.engine.dispose()


def shown_url(text: str) -> str:
    """Return a URL for people: without its password."""
    try:
        return escaped(_checked(text).render_as_string(hide_password=True))
    except ConfigurationError:
        return "(no URL)"


def has_password(text: str) -> bool:
    """Whether a URL has a password in it; `ConfigurationError` if it is none."""
    return _checked(text).password is not None


def _checked(text: str) -> URL:
    what, example = (
        "could not use the URL of the registry",
        "as in sqlite:///registry.db or postgresql://HOST/NAME",
    )
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ConfigurationError(f"{what}: it is no URL of a database", hint=example) from None
    backend = url.get_backend_name()
    if url.drivername == POSTGRESQL:
        url = url.set(drivername=f"{POSTGRESQL}+psycopg")
    if url.drivername not in (SQLITE, f"{POSTGRESQL}+psycopg"):
        raise ConfigurationError(f"{what}: {escaped(url.drivername, 40)} is not supported", hint=example)
    if "password" in url.query:  # shown_url would show it
        raise ConfigurationError(
            f"{what}: its password stands among the options", hint="use PGPASSFILE, or write it before the @"
        )
    if backend == SQLITE and (
        not url.database or url.database.startswith((":", "file:")) or url.query or url.host
    ):
        raise ConfigurationError(f"{what}: SQLite needs the path of a file, and nothing else", hint=example)
    if backend == POSTGRESQL and not url.database:
        raise ConfigurationError(f"{what}: it names no database", hint=example)
    return url


def _sqlite(url: URL, path: Path) -> Engine:
    def connect() -> sqlite3.Connection:
        # mode=rw: a file that is not there is not made by looking for it.
        mode = "rw"
        if is_on_read_only_disk(path):
            # What a killed station left in its log beside the file is only seen by SQLite's own ways.
            mode = "ro" if path.with_name(f"{path.name}-wal").exists() else "ro&immutable=1"
        connection = sqlite3.connect(
            f"file:{quote(str(path))}?mode={mode}",
            uri=True,
            timeout=BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            connection.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")
        except BaseException:  # it is no database, for instance
            connection.close()
            raise
        return connection

    # No connection is kept: closing one is cheap, and one that a fork inherits loses SQLite's locks.
    return create_engine(
        url, creator=connect, poolclass=NullPool, isolation_level="AUTOCOMMIT", hide_parameters=True
    )


def _postgresql(url: URL) -> Engine:
    given = {name: value for name, value in _CONNECTING.items() if name not in url.query}
    try:
        engine = create_engine(
            url,
            poolclass=QueuePool,
            pool_size=2,
            max_overflow=-1,
            # A server that was restarted meanwhile is found out before the first statement, not by it.
            pool_pre_ping=True,
            isolation_level="AUTOCOMMIT",
            hide_parameters=True,
            use_native_hstore=False,  # the server would be asked for a type that no table has
            connect_args=given,
        )
    except ImportError as error:
        raise MissingLibraryError(
            "could not open a registry on PostgreSQL: psycopg is not installed",
            hint="pip install 'birthmark[sql]'",
        ) from error
    event.listen(engine, "connect", _set_up)
    return engine


def _set_up(connection: Any, _record: object) -> None:
    connection.autocommit = True  # what is set within a transaction may end with it
    connection.execute("; ".join(_SESSION))  # at once: each alone would wait for the server's answer


def _cause(error: SQLAlchemyError) -> str:
    """Return the first line of what the database itself said; SQLAlchemy would add the statement."""
    said = str(error.orig if isinstance(error, DBAPIError) and error.orig is not None else error)
    return escaped(next(iter(said.strip().splitlines()), type(error).__name__), 300)


def _is_away(error: SQLAlchemyError) -> bool:
    """Whether no connection came about, or the one that there was broke."""
    if not isinstance(error, OperationalError):
        return False
    sqlstate = getattr(error.orig, "sqlstate", None)
    return error.connection_invalidated or sqlstate is None or sqlstate.startswith(_AWAY)


def _is_not_there(error: DBAPIError) -> bool:
    return getattr(error.orig, "sqlstate", None) in _NOT_THERE or "no such table" in str(error.orig)
