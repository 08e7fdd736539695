"""Files that are looked at for a change: by polling, which works on every file system and needs no library.

Rules:

- A file has changed when its identity has (inode, size, times): a new one was renamed over it, or it was written
  in place. Rewriting the same content counts: whoever brings a CRL twice wants a second receipt.
- A file that was replaced is taken at once; one that is written in place, only when it has come to rest for one
  look, so that half of it is not taken for all.
- A file that vanishes is no change; what was read from it stays in force, and the log says so, once.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from birthmark.device.errors import BirthmarkError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

_log = logging.getLogger(__name__)
_Identity = tuple[int, int, int, int, int]


class WatchedFiles:
    """One or several files that are taken up together.

    Args:
        paths: the files.
        take: called when one of them has changed; an error it raises is logged, and it is called again at the
            next change.
    """

    def __init__(self, paths: Sequence[Path], take: Callable[[], Awaitable[None]]) -> None:
        self._paths = paths
        self._taken = self._identities()
        self._resting = self._taken
        self._missing = {path for path, found in zip(paths, self._taken, strict=True) if found is None}
        self._take = take

    def has_changed(self) -> bool:
        """Look; true once per change."""
        found = self._identities()
        self._look_for_missing(found)
        if found == self._taken:
            return False
        moved = any(new and (not old or new[:2] != old[:2]) for new, old in zip(found, self._taken, strict=True))
        if not moved and found != self._resting:
            self._resting = found
            return False
        self._taken = self._resting = found
        return any(found)

    async def take(self) -> None:
        """Take the files up; an error is logged, and the old content stays in force."""
        try:
            await self._take()
        except BirthmarkError as error:
            self._refuse(error.message, error.hint)
        except OSError as error:
            self._refuse(f"could not read {error.filename or self._paths[0]}: {error.strerror or error}", "")

    def _refuse(self, cause: str, hint: str) -> None:
        fields = {"event": "file_refused", "path": str(self._paths[0]), "reason": cause, "hint": hint}
        because = f" ({hint})" if hint else ""
        _log.error("%s; what was in force stays%s", cause, because, extra={"fields": fields})

    def _look_for_missing(self, found: tuple[_Identity | None, ...]) -> None:
        missing = {path for path, identity in zip(self._paths, found, strict=True) if identity is None}
        for path in sorted(missing - self._missing):
            _log.warning(
                "%s is gone; what was in force stays; put it back before the broker starts again",
                path,
                extra={"fields": {"event": "file_gone", "path": str(path)}},
            )
        self._missing = missing

    def _identities(self) -> tuple[_Identity | None, ...]:
        return tuple(_identity(path) for path in self._paths)


class Watch:
    """Looks at files until it is cancelled.

    It looks in a timer's callback: mostly nothing has changed, and to wake a task for that costs as much again.

    Args:
        files: what to look at.
        interval_s: how often.
    """

    def __init__(self, files: Sequence[WatchedFiles], interval_s: float) -> None:
        self._files = files
        self._interval_s = interval_s
        self._due: list[WatchedFiles] = []
        self._is_due = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    def take_all(self) -> None:
        """Take every file up again, changed or not (SIGHUP)."""
        for files in self._files:
            files.has_changed()  # what has is taken with all else, and not once more after that
        self._due = list(self._files)
        self._is_due.set()

    async def run(self) -> None:
        """Look, and take up what has changed, one file at a time."""
        try:
            while True:
                self._look_later()
                await self._is_due.wait()
                self._look_no_more()
                due, self._due = self._due, []
                self._is_due.clear()
                for files in due:
                    try:
                        await files.take()
                    except Exception:  # noqa: BLE001 - a defect over one file must not end the watch over all
                        _log.exception("a watched file could not be taken up")
        finally:
            self._look_no_more()

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._look)

    def _look_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._look_later()
        if not self._due:
            self._due = [files for files in self._files if files.has_changed()]
            if self._due:
                self._is_due.set()


def _identity(path: Path) -> _Identity | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
