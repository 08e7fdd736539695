"""The four things that the records ask of a file system, each durable when it returns.

They are one object so that a simulated board can have a storage that fails: a power cut at any of them, or a disk
that is full. A device has this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from birthmark.device.durable import rename_durably, sync_folder, write_durably

if TYPE_CHECKING:
    from pathlib import Path


class Storage:
    """The file system itself. Every method raises `OSError` if it fails, and has then changed nothing."""

    def write(self, path: Path, content: bytes) -> None:
        """Put a record at `path`, whole, with mode 0600, replacing what was there."""
        write_durably(path, content, mode=0o600)

    def rename(self, source: Path, target: Path) -> None:
        """Rename one record to another in the same folder, replacing what was there."""
        rename_durably(source, target)

    def remove(self, path: Path) -> None:
        """Remove a record if it is there; durable with the next `sync`."""
        path.unlink(missing_ok=True)

    def sync(self, folder: Path) -> None:
        """Make the names in `folder` durable."""
        sync_folder(folder)
