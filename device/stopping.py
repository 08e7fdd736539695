"""SIGTERM and SIGINT as a wish that a command can wait for, so that it says goodbye before it ends."""

from __future__ import annotations

import contextlib
import select
import signal
from typing import TYPE_CHECKING

from birthmark.device.agent.stop import Stop, stop_on_signals
from birthmark.device.console import INTERRUPTED

if TYPE_CHECKING:
    from collections.abc import Iterator


class Stopping:
    """Whether and why a command is to end; may be told from any thread and from a signal handler."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    @property
    def is_set(self) -> bool:
        """Whether the command is to end."""
        return self._stop.is_set

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, else 0."""
        return INTERRUPTED if signal.SIGINT in self._stop.signals else 0

    def set(self) -> None:
        """End the command."""
        self._stop.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the command is to end, at most `timeout_s`; return whether it is."""
        # A pipe, not a threading.Event: setting an Event in a signal handler while the same thread waits for it
        # can deadlock.
        select.select([self._stop], [], [], timeout_s)
        return self.is_set


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[Stopping]:
    """Yield what SIGTERM and SIGINT set during the block; a second Ctrl-C is no different from the first."""
    with stop_on_signals() as stop:
        yield Stopping(stop)
