"""Looking for the broker that is preferred, from a connection to another one.

It is looked at over TCP alone, on a thread of its own: the connection that there is goes on meanwhile, and is left
only when the other one listens again.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from birthmark.device.dialling import dial

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.device.route import Route


class Returning:
    """When to look, and whether it is there. All but the look itself belongs to the thread that connects.

    Args:
        route: the brokers.
        timeout_s: for a look.
        found: is called, on another thread, when the first is there again.
    """

    def __init__(self, route: Route, *, timeout_s: float, found: Callable[[], None]) -> None:
        self._route = route
        self._timeout_s = timeout_s
        self._found = found
        self._look_at: float | None = None
        self._connection = 0
        self._found_in = 0

    @property
    def is_due(self) -> bool:
        """Whether the first is there again, and this connection is to be left for it."""
        return self._look_at is not None and self._found_in == self._connection

    def connected(self) -> None:
        """Take note of a connection."""
        self._connection += 1
        wait_s = self._route.connected()
        self._look_at = None if wait_s is None else time.monotonic() + wait_s

    def ended(self) -> None:
        """Take note of its end; the first is tried next if that was why."""
        if self.is_due:
            self._route.go_back()
        self._look_at = None

    def look_in_s(self) -> float | None:
        """Look if it is time to, and return in how many seconds the next look is due, if ever."""
        if self._look_at is None:
            return None
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + self._route.look_again_s()
            threading.Thread(target=self._look, args=(self._connection,), daemon=True).start()
        return self._look_at - now

    def _look(self, connection: int) -> None:
        try:
            dial(self._route.first.host, self._route.first.port, timeout_s=self._timeout_s).close()
        except (OSError, UnicodeError):
            return
        self._found_in = connection
        self._found()
