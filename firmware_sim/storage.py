"""A storage on which the power is cut, or that is full, for the device's own records.

A write is four moments: before it, with half of a temporary file, with a whole one, and after the rename. A
rename and a removal are two each, a sync is one. The power can be cut at any of them; what is on the disk then
is what a real cut would leave, and the next boot finds it.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from birthmark.device.agent.storage import Storage
from birthmark.device.durable import TEMPORARY_SUFFIX

if TYPE_CHECKING:
    from pathlib import Path


class PowerCutError(Exception):
    """The board has no power any more. No error of the board's own: it ends whatever runs there."""


class FailingStorage(Storage):
    """The file system, until something is wrong with it.

    Args:
        cut_at: the moment at which the power is cut, counted from 1 over the board's whole life; once.
        full_for: how many writes find the disk full before there is room again.
    """

    def __init__(self, *, cut_at: int | None = None, full_for: int = 0) -> None:
        self._cut_at = cut_at
        self._full_for = full_for
        self.moments = 0
        """Moments so far at which a cut could happen."""

    def write(self, path: Path, content: bytes) -> None:
        """Write a record, or fail as the arguments say."""
        if self._full_for:
            self._full_for -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        temporary = path.with_name(f".{path.name}.cut{TEMPORARY_SUFFIX}")
        self._moment()
        for part in (content[: len(content) // 2], content):
            if self._is_next():
                temporary.touch(mode=0o600)
                temporary.write_bytes(part)
            self._moment()
        super().write(path, content)
        self._moment()

    def rename(self, source: Path, target: Path) -> None:
        """Rename, with a cut before or after it."""
        self._moment()
        super().rename(source, target)
        self._moment()

    def remove(self, path: Path) -> None:
        """Remove, with a cut before or after it."""
        self._moment()
        super().remove(path)
        self._moment()

    def sync(self, folder: Path) -> None:
        """Sync, with a cut before it."""
        self._moment()
        super().sync(folder)

    def _is_next(self) -> bool:
        return self.moments + 1 == self._cut_at

    def _moment(self) -> None:
        self.moments += 1
        if self.moments == self._cut_at:
            raise PowerCutError
