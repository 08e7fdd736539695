"""The outbox's file: SQLite with a write-ahead log (https://sqlite.org/wal.html), used by one thread.

Rules:

- What is done within `writing` is on disk at its end (`synchronous=FULL`: one sync each), whole or not at all.
- One process has the file (`locking_mode=EXCLUSIVE`): two would send everything twice. No `-shm` file is needed.
- Numbers rise for as long as the file lives, and none comes twice: they are reserved a thousand at a time, so
  that a message costs no page of its own for that.
- The file and what belongs to it can be read by its owner alone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

from birthmark.device.durable import sync_folder
from birthmark.device.errors import LocalProtocolError
from birthmark.device.frozen import Frozen
from birthmark.device.publication import Outgoing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

T = TypeVar("T", str, int)

VERSION: Final = 1
APPLICATION: Final = 0x6269726D
RESERVED_AT_ONCE: Final = 1000
SALVAGED_AT_ONCE: Final = 256
PAGE_BYTES: Final = 1024
"""A sync writes whole pages: small ones make a small message cheap on an SD card (docs/outbox.md)."""
WAL_PAGES: Final = 2048
"""After so many the log is written back: pages that were written again and again since are written once then."""

_SCHEMA: Final = f"""
CREATE TABLE messages (
    seq INTEGER PRIMARY KEY, topic TEXT NOT NULL, payload BLOB NOT NULL, retain INTEGER NOT NULL,
    priority INTEGER NOT NULL, size INTEGER NOT NULL, at REAL NOT NULL
);
CREATE TABLE facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
"""
_COLUMNS: Final = "seq, topic, payload, retain, priority, at"
_PARTS: Final = ("", "-wal", "-journal", "-shm")


class DatabaseFailedError(Exception):
    """The file cannot be used now; it may be in a while. Raised within the outbox only.

    Args:
        cause: in words for people.
        is_readable: whether what is in it can be read meanwhile.
    """

    def __init__(self, cause: str, *, is_readable: bool = False) -> None:
        super().__init__(cause)
        self.cause = cause
        self.is_readable = is_readable


class DatabaseUnfitError(DatabaseFailedError):
    """The file will never do: it is damaged, or another device's.

    Args:
        cause: in words for people.
        suffix: what its name is to end in, out of the way (`opening`).
    """

    def __init__(self, cause: str, suffix: str = ".damaged") -> None:
        super().__init__(cause)
        self.suffix = suffix


class Row(Frozen):
    """One message."""

    seq: int
    topic: str
    payload: bytes
    retain: bool
    priority: int
    at: float
    """When it was published, in seconds since 1970 by the device's clock."""

    @property
    def size(self) -> int:
        """What counts against the limit in bytes."""
        return len(self.topic.encode()) + len(self.payload)


class Contents(Frozen):
    """What is in the file, counted."""

    messages: int
    bytes: int
    dropped: int
    """How many had to give way, ever."""


class Database:
    """The open file.

    Args:
        path: where; it is made if it is not there.
        owner: whose messages these are.
        by_priority: whether `victim` goes by priority, and needs an index.

    Raises:
        DatabaseFailedError: it cannot be opened now.
        DatabaseUnfitError: it never can: see `set_aside`.
    """

    def __init__(self, path: Path, owner: str, *, by_priority: bool) -> None:
        self._order = "priority, seq" if by_priority else "seq"
        try:
            is_new = not path.exists()
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            if is_new:
                sync_folder(path.parent)
        except OSError as error:
            raise DatabaseFailedError(error.strerror or str(error)) from error
        with _failures():
            self._connection = sqlite3.connect(path, timeout=0, isolation_level=None)
        self._reserved = 0
        try:
            with _failures():
                self._prepare(owner, by_priority=by_priority)
        except BaseException:
            self.close()
            raise

    def _prepare(self, owner: str, *, by_priority: bool) -> None:
        run = self._connection.execute
        run(f"PRAGMA page_size = {PAGE_BYTES}")
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
        run(f"PRAGMA journal_size_limit = {WAL_PAGES * PAGE_BYTES}")
        with self._transaction():
            (version,) = run("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    run(statement)
                run("INSERT INTO facts VALUES ('owner', ?), ('epoch', ?)", (owner, secrets.token_hex(4)))
            elif version != VERSION:
                raise DatabaseUnfitError(f"it is of another version ({version})", f".version-{version}")
        whose = self._fact("owner", "")
        if whose != owner:
            raise DatabaseUnfitError(f"it is another device's ({whose})", ".of-another")
        if by_priority:
            run("CREATE INDEX IF NOT EXISTS by_priority ON messages (priority, seq)")
        else:
            run("DROP INDEX IF EXISTS by_priority")
        self.epoch = self._fact("epoch", "")
        (highest,) = run("SELECT max(seq) FROM messages").fetchone()
        self.next_seq = max(int(highest or 0) + 1, self._fact("reserved", 1))
        self._reserved = self.next_seq

    def contents(self) -> Contents:
        """Count what is there."""
        with _failures():
            run = self._connection.execute
            messages, size = run("SELECT count(*), coalesce(sum(size), 0) FROM messages").fetchone()
            if not isinstance(size, int):
                raise DatabaseUnfitError("it is damaged (a size is not what it was)")
            return Contents(messages, size, self._fact("dropped", 0))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Make what is done in the block durable at its end, in one sync; or nothing of it, if it fails."""
        with _failures(), self._transaction():
            yield

    def add(self, row: Row) -> None:
        """Add a message; within `writing`."""
        if row.seq >= self._reserved:
            self._reserved = row.seq + RESERVED_AT_ONCE
            self._set_fact("reserved", self._reserved)
        self._connection.execute(
            "INSERT OR REPLACE INTO messages (seq, topic, payload, retain, priority, size, at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (row.seq, row.topic, row.payload, row.retain, row.priority, row.size, row.at),
        )

    def remove(self, numbers: Iterable[int]) -> None:
        """Remove messages; within `writing`."""
        self._connection.executemany("DELETE FROM messages WHERE seq = ?", ((number,) for number in numbers))

    def victim(self, after: int, below_priority: int) -> tuple[int, int] | None:
        """Return number and size of the message after `after` that gives way first, if one does.

        Only the order by priority looks at `below_priority`: it names none that is more important than that.
        """
        limit = "AND priority <= ?" if self._order != "seq" else ""
        found = self._connection.execute(
            f"SELECT seq, size FROM messages WHERE seq > ? {limit} ORDER BY {self._order} LIMIT 1",  # noqa: S608
            (after, below_priority)[: 2 if limit else 1],
        ).fetchone()
        return (int(found[0]), int(found[1])) if found else None

    def count_dropped(self, total: int) -> None:
        """Remember how many had to give way, ever; within `writing`."""
        self._set_fact("dropped", total)

    def page(self, after: int, limit: int, max_bytes: int) -> Sequence[Row]:
        """Return the next messages after a number, in order: at most `limit`, and one or up to `max_bytes`."""
        rows: list[Row] = []
        size = 0
        with _failures():
            for row in self._connection.execute(
                f"SELECT {_COLUMNS} FROM messages WHERE seq > ? ORDER BY seq LIMIT ?",  # noqa: S608
                (after, limit),
            ):
                rows.append(_row(row))
                size += rows[-1].size
                if size >= max_bytes:
                    break
        return rows

    def close(self) -> None:
        """Close; what is in the log is written back, if that can be done."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    def _fact(self, name: str, default: T) -> T:
        found = self._connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        value = found[0] if found else default
        if not isinstance(value, type(default)):
            raise DatabaseUnfitError(f"it is damaged ({name} is not what it was)")
        return value

    def _set_fact(self, name: str, value: int) -> None:
        self._connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        reserved = self._reserved
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            self._reserved = reserved
            with contextlib.suppress(sqlite3.Error):  # a full disk has rolled it back already
                self._connection.execute("ROLLBACK")
            raise


def set_aside(path: Path, suffix: str) -> Path:
    """Rename a file that is of no use, with its log, in the place of an earlier one, and return its new name.

    Raises:
        DatabaseFailedError: it cannot be renamed.
    """
    aside = path.with_name(path.name + suffix)
    try:
        for part in _PARTS:
            aside.with_name(aside.name + part).unlink(missing_ok=True)
        for part in reversed(_PARTS):
            with contextlib.suppress(FileNotFoundError):
                path.with_name(path.name + part).rename(aside.with_name(aside.name + part))
        sync_folder(path.parent)
    except OSError as error:
        raise DatabaseFailedError(error.strerror or str(error)) from error
    return aside


def salvaged(path: Path) -> Iterator[list[Row]]:
    """Yield what can still be read of a damaged file, in pieces: from its beginning, and then from its end."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=0)) as connection:
        low, high = 0, 2**62
        for end in ("ASC", "DESC"):
            rows = _readable(connection, end, low, high)
            while piece := list(islice(rows, SALVAGED_AT_ONCE)):
                yield piece
                low, high = (piece[-1].seq, high) if end == "ASC" else (low, piece[-1].seq)


def _readable(connection: sqlite3.Connection, end: str, low: int, high: int) -> Iterator[Row]:
    """Yield the messages between two numbers from one end on, but for damaged ones, up to where none is found.

    Each is asked for by itself: of several, Python's driver drops the one before a damaged one, too.
    """
    following = f"SELECT seq FROM messages WHERE seq > ? AND seq < ? ORDER BY seq {end} LIMIT 1"  # noqa: S608
    with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
        while found := connection.execute(following, (low, high)).fetchone():
            (seq,) = found
            if not low < seq < high:
                return  # their order is damaged: it would go on for ever
            low, high = (seq, high) if end == "ASC" else (low, seq)
            with contextlib.suppress(sqlite3.Error, UnicodeDecodeError, DatabaseUnfitError):
                for row in connection.execute(f"SELECT {_COLUMNS} FROM messages WHERE seq = ?", found):  # noqa: S608
                    yield _row(row)


def _row(columns: tuple[int, str, bytes, int, int, float]) -> Row:
    """Read a message; raises `DatabaseUnfitError` for one that was never stored so.

    It would stop who sends it, or go out as another one: one bit makes a BLOB of a text, a number of four bytes.
    """
    seq, topic, payload, retain, priority, at = columns
    unfit = DatabaseUnfitError(f"it is damaged (message {seq} is none)")
    if [*map(type, columns[1:])] != [str, bytes, int, int, float]:
        raise unfit
    try:
        outgoing = Outgoing(topic, payload, 1, bool(retain))
    except LocalProtocolError as error:
        raise unfit from error
    return Row(seq, outgoing.topic, outgoing.payload, outgoing.retain, priority, at)


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:  # what SQLite says quotes the file, and Python cannot read it
        raise DatabaseUnfitError(_NO_TEXT) from error
    except sqlite3.Error as error:
        code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
        if isinstance(error, sqlite3.OperationalError) and not code:  # Python's own, of a column; it quotes that
            raise DatabaseUnfitError(_NO_TEXT) from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
            raise DatabaseUnfitError(f"it is damaged ({error})") from error
        is_readable = code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY)
        raise DatabaseFailedError(_CAUSES.get(code, str(error)), is_readable=is_readable) from error


_NO_TEXT: Final = "it is damaged (text that is not UTF-8)"
_CAUSES: Final = {
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_BUSY: "another process has it: two clients with one outbox would send everything twice",
    sqlite3.SQLITE_READONLY: "it cannot be written: the file system is read-only, or the file is another user's",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened",
    sqlite3.SQLITE_IOERR: "the disk fails (I/O error)",
}
