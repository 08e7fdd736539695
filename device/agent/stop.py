"""A wish to stop that a poll can wait for, from another thread or from a signal."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Stop:
    """Set once; from then on its file descriptor is readable."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._is_set = False
        self.signals: set[int] = set()
        """The signals that set it."""

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


@contextlib.contextmanager
def stop_on_signals(*numbers: signal.Signals) -> Iterator[Stop]:
    """Yield a `Stop` that these signals (SIGTERM and SIGINT if none is named) set during the block.

    For the main thread, which polls it. Python runs a signal's handler only when the main thread runs; one that
    comes just before it blocks would be noticed by nobody. So the signal itself makes the descriptor readable
    (`signal.set_wakeup_fd`), which ends the poll, and then the handler runs.
    """
    stop = Stop()

    def handle(number: int, _frame: object) -> None:
        stop.signals.add(number)
        stop.set()

    woken_before = signal.set_wakeup_fd(stop._writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, handle) for number in numbers or (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken_before)
        stop.close()
