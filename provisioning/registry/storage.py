"""A TinyDB storage that survives a power cut.

Rules:

- The file is never written in place: a whole new one is written beside it, fsynced and renamed over it
  (`birthmark.device.durable`). A reader therefore always finds the old state or the new one, whole.
- A transaction works on a copy in memory and is written once, at its end. TinyDB's own storages read and write
  at every operation, under no lock that lasts from the read to the write.
- The state last read is kept together with an open descriptor of its file. While that descriptor is open the
  file's inode cannot be given to another file, so "same inode" means "same content", and nothing is parsed
  twice.
- A file that is damaged, of another program or of a newer format is refused as a whole and left as it is.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Final

import orjson
from tinydb.storages import Storage

from birthmark.device.durable import remove_leftovers, write_durably
from birthmark.device.errors import RegistryError
from birthmark.provisioning.registry.content import (
    FORMAT,
    META,
    META_ID,
    OUTBOX,
    PROGRAM,
    ROWS,
    STANDING,
    check_not_moved,
    may_be_overwritten,
)

if TYPE_CHECKING:
    from pathlib import Path

    from birthmark.provisioning.registry.content import Tables

_REQUIRED: Final = frozenset({"kind", "name", "name_folded", "role", "state", "created_at", "changed_at"})


class TransactionStorage(Storage):
    """The tables in memory, for the TinyDB of one transaction or one view.

    Args:
        tables: the state to start from. With `writable` its tables are copied first, but not the documents in
            them, ten thousand of them: those are replaced, never changed (`tiny_transaction`).
        writable: whether a write is allowed.
    """

    def __init__(self, tables: Tables, *, writable: bool) -> None:
        self._writable = writable
        self._closed = False
        self.tables = tables
        if writable:
            self.tables = {name: dict(table) for name, table in tables.items()}

    def read(self) -> Tables:
        """Return the tables."""
        if self._closed:
            raise RuntimeError("a transaction was used after its end")
        return self.tables

    def write(self, data: Tables) -> None:
        """Take changed tables; durable only when the transaction ends."""
        if not self._writable:
            raise RuntimeError("a view was written to")
        self.tables = data

    def close(self) -> None:
        """End the transaction: nothing may be read or written through it any more."""
        self._closed = True


class RegistryFile:
    """The registry's file: read whole, written whole. Safe to use from several threads.

    Args:
        path: where it is, or is to be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._guard = threading.Lock()
        self._tables: Tables | None = None
        self._descriptor = -1

    def load(self) -> Tables:
        """Return the last durable state, not to be changed by the caller.

        Raises:
            RegistryError: it is missing, unreadable, damaged, foreign or of a newer format.
        """
        with self._guard:
            try:
                if self._tables is not None and os.path.samestat(os.fstat(self._descriptor), self.path.stat()):
                    return self._tables
                return self._read()
            except OSError as error:
                raise self._failure("read", error) from error

    def save(self, tables: Tables) -> None:
        """Make `tables` the durable state. The caller holds the registry's lock.

        Raises:
            RegistryError: it could not be written (disk full, no permission); the old state stays.
        """
        content = orjson.dumps(tables)
        with self._guard:
            self._forget()
            try:
                write_durably(self.path, content)
                descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise self._failure("write", error) from error
            self._descriptor, self._tables = descriptor, tables

    def may_be_made(self) -> bool:
        """Whether there is nothing in the way of a new registry."""
        if not self.path.exists():
            return True
        try:
            return may_be_overwritten(orjson.loads(self.path.read_bytes())[META][str(META_ID)].get(STANDING))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def remove_leftovers(self) -> None:
        """Remove what a crash in the middle of a write left. The caller holds the registry's lock.

        Its own leftovers only: the folder's other files are written under other locks.
        """
        with contextlib.suppress(OSError):
            remove_leftovers(self.path.parent, self.path.name)

    def close(self) -> None:
        """Let go of the file."""
        with self._guard:
            self._forget()

    def _read(self) -> Tables:
        self._forget()
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with open(descriptor, "rb", closefd=False) as file:
                tables = self._parse(file.read())
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor, self._tables = descriptor, tables
        return tables

    def _parse(self, content: bytes) -> Tables:
        try:
            tables = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise self._refusal(f"it is damaged ({error})") from error
        meta = tables.get(META) if isinstance(tables, dict) else None
        facts = meta.get(str(META_ID)) if isinstance(meta, dict) else None
        if not isinstance(facts, dict) or facts.get("program") != PROGRAM:
            raise self._refusal("it is no registry of birthmark's")
        check_not_moved(facts.get(STANDING), str(self.path))
        version = facts.get("format")
        if not isinstance(version, int) or version < 1:
            raise self._refusal("it is damaged (no format number)")
        if version > FORMAT:
            raise RegistryError(
                f"could not read the registry {self.path}: it has format {version}, this birthmark knows {FORMAT}",
                hint="a newer birthmark wrote it: update this one",
            )
        for name in (ROWS, OUTBOX):
            if not isinstance(tables.get(name), dict):
                raise self._refusal(f"it is damaged (no table {name!r})")
        for number, document in tables[ROWS].items():
            if not number.isdecimal() or not isinstance(document, dict) or not document.keys() >= _REQUIRED:
                raise self._refusal(f"it is damaged (row {number[:20]!r})")
        result: Tables = tables
        return result

    def _forget(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._tables = -1, None

    def _refusal(self, cause: str) -> RegistryError:
        return RegistryError(
            f"could not read the registry {self.path}: {cause}",
            hint="nothing was changed; restore it from a backup, together with the audit log",
        )

    def _failure(self, verb: str, error: OSError) -> RegistryError:
        if isinstance(error, FileNotFoundError) and verb == "read":
            return RegistryError(
                f"could not read the registry {self.path}: it is not there",
                hint="make a station with `birthmark init`, or name its folder with --station",
            )
        return RegistryError(
            f"could not {verb} the registry {self.path}: {error.strerror}",
            hint="nothing was changed; make room or repair the permissions, then try again",
        )
