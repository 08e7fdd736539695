"""Opening an outbox's file, whatever became of it: one that will never do is put aside, and a new one begins.

What can still be read of a damaged file is taken along. A file of another device or another version is whole, and
is left as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from birthmark.device.frozen import Frozen
from birthmark.device.outbox.database import (
    Database,
    DatabaseFailedError,
    DatabaseUnfitError,
    salvaged,
    set_aside,
)

if TYPE_CHECKING:
    from pathlib import Path

    from birthmark.device.outbox.database import Contents

DAMAGED: Final = DatabaseUnfitError("").suffix


class Opened(Frozen):
    """An open file, and what it took to open it."""

    database: Database
    contents: Contents
    said: str = ""
    """What became of the file that was there, in words for people; empty if it is the one that is open."""


def open_file(path: Path, owner: str, *, by_priority: bool) -> Opened:
    """Open the file at `path`, made if it is not there; arguments as for `Database`.

    Raises:
        DatabaseFailedError: it cannot be opened now.
    """
    try:
        return _open(path, owner, by_priority=by_priority)
    except DatabaseUnfitError as unfit:
        return replaced(path, owner, unfit, by_priority=by_priority)


def replaced(path: Path, owner: str, unfit: DatabaseUnfitError, *, by_priority: bool) -> Opened:
    """Put the file at `path` aside, which nobody has open, and open a new one in its place.

    Raises:
        DatabaseFailedError: that cannot be done now; the old file is there, by one name or the other.
    """
    aside = set_aside(path, unfit.suffix)
    said = f"{unfit.cause}; it is now {aside}, and a new one began"
    if unfit.suffix == DAMAGED:
        said = f"{said}; {_take_along(aside, path, owner, by_priority=by_priority)}"
    opened = _open(path, owner, by_priority=by_priority)
    return Opened(opened.database, opened.contents, said)


def _open(path: Path, owner: str, *, by_priority: bool) -> Opened:
    database = Database(path, owner, by_priority=by_priority)
    try:
        return Opened(database, database.contents())
    except BaseException:
        database.close()  # or it would keep the file from whoever reads what is left
        raise


def _take_along(aside: Path, path: Path, owner: str, *, by_priority: bool) -> str:
    """Copy what can be read of a damaged file into a new one, and say how much that was."""
    kept = 0
    database = Database(path, owner, by_priority=by_priority)
    try:
        for rows in salvaged(aside):
            with database.writing():
                for row in rows:
                    database.add(row)
            kept += len(rows)
    except DatabaseFailedError as error:
        return f"{kept} messages were taken along, until it failed: {error.cause}"
    finally:
        database.close()
    return f"{kept} messages could still be read, and go out"
