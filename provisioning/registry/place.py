"""A station's folder as every registry uses it: the lock that puts its processes in line, and the audit log.

Rules:

- The lock is the same file whichever back end keeps the rows. So a registry that is moved from one back end to
  another while processes are at work is moved between two of their transactions, and none of them writes to the
  old one after that: each asks, with the lock in its hand, whether its registry is still in force.
- Transactions of one registry do not nest.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from birthmark.device.durable import exclusive_lock, is_on_read_only_disk
from birthmark.device.errors import RegistryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

REGISTRY_FILE: Final = "registry.json"
LOCK_FILE: Final = "registry.lock"
AUDIT_FILE: Final = "audit.jsonl"


def always() -> None:
    """Say that a registry is in force: nobody moves it."""


class Place:
    """Where a registry's lock and audit log are. Safe to use from several threads.

    Args:
        folder: the station's.
        in_force: raises `RegistryError` if another registry has taken over.
    """

    def __init__(self, folder: Path, in_force: Callable[[], None] = always) -> None:
        self.folder = folder
        self.audit_path = folder / AUDIT_FILE
        self.check_in_force = in_force
        self._lock_path = folder / LOCK_FILE
        self._held = threading.local()

    @property
    def is_read_only(self) -> bool:
        """Whether nothing here can be written, and what is to be put right stays as it is."""
        return self.folder.is_dir() and is_on_read_only_disk(self.folder)

    @contextmanager
    def locked(self, *, to_read: bool = False) -> Iterator[None]:
        """Hold the lock, between processes and threads.

        Args:
            to_read: nothing is written where nothing can be: the lock is held as it is there.

        Raises:
            RegistryError: another registry has taken over, or there is no such folder.
        """
        if getattr(self._held, "held", False):
            raise RuntimeError("transactions of one registry do not nest")
        if not self.folder.is_dir():
            raise RegistryError(
                f"could not read the registry in {self.folder}: it is not there",
                hint="make a station with `birthmark init`, or name its folder with --station",
            )
        with exclusive_lock(self._lock_path, as_it_is=to_read and self.is_read_only):
            self.check_in_force()
            self._held.held = True
            try:
                yield
            finally:
                self._held.held = False

    def audit_bytes(self) -> int:
        """Return the length of the audit log."""
        return self.audit_path.stat().st_size if self.audit_path.exists() else 0

    def log_failure(self, error: OSError) -> RegistryError:
        """Return the error of a log that cannot be written."""
        return RegistryError(
            f"could not write the audit log {self.audit_path}: {error.strerror}",
            hint="nothing was changed; make room or repair the permissions, then try again",
        )
