"""What a test needs to wait for a client: an observer, and a timer without patience."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, TypeVar

from support.patience import PATIENCE_S

from birthmark.device.backoff import Backoff, RetryTimer

if TYPE_CHECKING:
    from birthmark.device.events import Event

Kind = TypeVar("Kind")


class Watching:
    """Keeps every event; call it as the observer."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait_for(self, kind: type[Kind], count: int = 1) -> Kind:
        """Return the count-th event of this kind, once it has happened."""
        deadline = time.monotonic() + PATIENCE_S
        with self._changed:
            while True:
                found = [event for event in self.events if isinstance(event, kind)]
                if len(found) >= count:
                    return found[count - 1]
                left_s = deadline - time.monotonic()
                assert left_s > 0, f"no {kind.__name__}; these happened: {self.events}"
                self._changed.wait(left_s)


def impatient() -> RetryTimer:
    """Return a timer by which a client tries again at once."""
    at_once = Backoff(0.01, 0.01)
    return RetryTimer(unreachable=at_once, refused=at_once)
