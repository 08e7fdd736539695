"""A wish to stop that a poll can wait for, from another thread or from a signal handler."""

from __future__ import annotations

import os


class Stop:
    """Set once; from then on its file descriptor is readable."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._is_set = False

    @property
    def is_set(self) -> bool:
        """Whether somebody wishes to stop."""
        return self._is_set

    def set(self) -> None:
        """Wish to stop."""
        if not self._is_set:
            self._is_set = True
            os.write(self._writer, b"\1")

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._reader

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self._reader)
        os.close(self._writer)
