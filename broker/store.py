"""The durable store: one SQLite file in the data folder, `sessions.db`.

Rules:

- WAL with synchronous=FULL: when `apply` returns, what it was given is on disk, all of it or, if it raises, none.
- The file is this process's alone while it is open (locking_mode=EXCLUSIVE): no shared memory, and a second
  broker is refused here even if it got past the lock of the data folder.
- A file of another program, of a newer version or with damage is an error that names it and says what to do.
  Nothing is ever emptied or repaired in silence.
- Adapter only: what is to be stored, and when it must be on disk, is the business of `journal.py`.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from typing import TYPE_CHECKING, Self

from birthmark.broker.records import (
    Changes,
    DeliveryRow,
    IncomingRow,
    MessageRow,
    RetainedRow,
    SessionRow,
    Stored,
    SubscriptionRow,
)
from birthmark.device.errors import ConfigurationError, SystemFailureError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILE_NAME = "sessions.db"
VERSION = 1
APPLICATION_ID = 0x62_6D_62_71
"""In the file's header: which program it belongs to."""
MAX_JOURNAL_BYTES = 67_108_864
"""The write-ahead log is cut back to this after a burst."""

_SCHEMA = """
CREATE TABLE sessions (
    key INTEGER PRIMARY KEY, client_id TEXT NOT NULL UNIQUE, peer TEXT NOT NULL, left_at REAL
) STRICT;
CREATE TABLE subscriptions (
    session INTEGER NOT NULL, topic_filter TEXT NOT NULL, qos INTEGER NOT NULL, is_replaying INTEGER NOT NULL,
    PRIMARY KEY (session, topic_filter)
) STRICT, WITHOUT ROWID;
CREATE TABLE messages (
    key INTEGER PRIMARY KEY, topic TEXT NOT NULL, payload BLOB NOT NULL, qos INTEGER NOT NULL,
    retain INTEGER NOT NULL
) STRICT;
CREATE TABLE deliveries (
    key INTEGER PRIMARY KEY, session INTEGER NOT NULL, message INTEGER NOT NULL, qos INTEGER NOT NULL,
    packet_id INTEGER NOT NULL, is_released INTEGER NOT NULL
) STRICT;
CREATE TABLE incoming (
    session INTEGER NOT NULL, packet_id INTEGER NOT NULL, PRIMARY KEY (session, packet_id)
) STRICT, WITHOUT ROWID;
CREATE TABLE retained (
    topic TEXT PRIMARY KEY, payload BLOB NOT NULL, qos INTEGER NOT NULL, publisher TEXT
) STRICT, WITHOUT ROWID;
"""

# For each table of `Changes`, in its order: how a row is put, and how one is removed by its key.
_STATEMENTS: tuple[tuple[str, str], ...] = (
    ("REPLACE INTO sessions VALUES (?,?,?,?)", "DELETE FROM sessions WHERE key=?"),
    (
        "REPLACE INTO subscriptions VALUES (?,?,?,?)",
        "DELETE FROM subscriptions WHERE session=? AND topic_filter=?",
    ),
    ("REPLACE INTO messages VALUES (?,?,?,?,?)", "DELETE FROM messages WHERE key=?"),
    ("REPLACE INTO deliveries VALUES (?,?,?,?,?,?)", "DELETE FROM deliveries WHERE key=?"),
    ("REPLACE INTO incoming VALUES (?,?)", "DELETE FROM incoming WHERE session=? AND packet_id=?"),
    ("REPLACE INTO retained VALUES (?,?,?,?)", "DELETE FROM retained WHERE topic=?"),
)


class StoreError(SystemFailureError):
    """The store could not take something: a full or broken disk. What it held before, it still holds."""


class Store:
    """The open store. `open` makes one; used by one thread at a time.

    Args:
        path: of the file.
        database: open, in order, in autocommit mode.
    """

    def __init__(self, path: Path, database: sqlite3.Connection) -> None:
        self.path = path
        self._database = database

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the store, or make an empty one where there is no file.

        Raises:
            ConfigurationError: the file is not a store, or one of a newer version.
            SystemFailureError: it is damaged, in use, or cannot be read or written.
        """
        try:
            # Made by us first: SQLite would leave its mode to the umask.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            database = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise SystemFailureError(f"could not open the store {path}: {_cause(error)}") from error
        try:
            _prepare(path, database)
        except sqlite3.OperationalError as error:
            database.close()
            raise SystemFailureError(
                f"could not open the store {path}: {_cause(error)}",
                hint="one broker at a time may use it, and the disk needs room for it",
            ) from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # what SQLite quotes need be no text
            database.close()
            raise _damaged(path, str(error)) from error
        except BaseException:
            database.close()
            raise
        return cls(path, database)

    def load(self) -> Stored:
        """Return all rows. Raises `SystemFailureError` if they cannot be read, or do not belong together."""
        read = self._database.execute
        try:
            stored = Stored(
                [SessionRow(*row) for row in read("SELECT * FROM sessions ORDER BY key")],
                [
                    SubscriptionRow(session, topic_filter, qos, bool(is_replaying))
                    for session, topic_filter, qos, is_replaying in read("SELECT * FROM subscriptions")
                ],
                [
                    MessageRow(key, topic, payload, qos, bool(retain))
                    for key, topic, payload, qos, retain in read("SELECT * FROM messages")
                ],
                [
                    DeliveryRow(key, session, message, qos, packet_id, bool(is_released))
                    for key, session, message, qos, packet_id, is_released in read(
                        "SELECT * FROM deliveries ORDER BY key"
                    )
                ],
                [IncomingRow(*row) for row in read("SELECT * FROM incoming")],
                [RetainedRow(*row) for row in read("SELECT * FROM retained")],
            )
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise _damaged(self.path, str(error)) from error
        return stored

    def apply(self, changes: Changes) -> None:
        """Make changes durable, in one transaction.

        Raises:
            StoreError: nothing of them was stored; the same changes may be tried again later.
        """
        try:
            with _transaction(self._database) as database:
                for (put, remove), table in zip(_STATEMENTS, changes.tables(), strict=True):
                    gone = [key if isinstance(key, tuple) else (key,) for key, row in table.items() if row is None]
                    if gone:
                        database.executemany(remove, gone)
                    if len(gone) < len(table):
                        database.executemany(put, [row for row in table.values() if row is not None])
        except sqlite3.Error as error:
            raise StoreError(
                f"could not write to the store {self.path}: {_cause(error)}",
                hint="make room on its disk; the broker goes on by itself",
            ) from error

    def close(self) -> None:
        """Close the file; everything applied is in it."""
        with contextlib.suppress(sqlite3.Error):
            self._database.close()


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield database
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            # After a full disk SQLite has rolled back by itself.
            with contextlib.suppress(sqlite3.Error):
                database.execute("ROLLBACK")
        raise


def _prepare(path: Path, database: sqlite3.Connection) -> None:
    database.execute("PRAGMA locking_mode=EXCLUSIVE")
    (application_id,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    (tables,) = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if tables and application_id != APPLICATION_ID:
        raise ConfigurationError(
            f"could not open the store {path}: it is a database of another program",
            hint="give the broker a data_folder of its own",
        )
    if version > VERSION:
        raise ConfigurationError(
            f"could not open the store {path}: it is of version {version}, this broker knows {VERSION}",
            hint="run the newer birthmark-broker that wrote it",
        )
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute(f"PRAGMA journal_size_limit={MAX_JOURNAL_BYTES}")
    if not tables:
        _create(database)
        return
    (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise _damaged(path, verdict)


def _create(database: sqlite3.Connection) -> None:
    with _transaction(database):
        for statement in _SCHEMA.split(";"):
            database.execute(statement)
        database.execute(f"PRAGMA application_id={APPLICATION_ID}")
        database.execute(f"PRAGMA user_version={VERSION}")


def _damaged(path: Path, cause: str) -> SystemFailureError:
    return SystemFailureError(
        f"could not open the store {path}: it is damaged ({cause.splitlines()[-1]})",
        hint="restore it from a backup; or move it away, and start without the sessions and messages in it",
    )


def _cause(error: OSError | sqlite3.Error) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
