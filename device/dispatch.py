"""The thread that runs a client's callbacks.

Rules:

- Callbacks run one after the other, in the order in which messages came, and never on the network's thread: one
  that takes its time, or waits for a publication, does not cost the connection.
- One that raises is reported and the next one runs.
- At most `MAX_WAITING` messages wait here; the network's thread then leaves the rest in the socket, and TCP slows
  the broker down.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.device.events import Event

MAX_WAITING = 256

_log = logging.getLogger("birthmark.device")


class Dispatcher:
    """Runs callbacks on a thread of its own.

    Args:
        observe: is given every event.
        made_room: is called, on the dispatcher's thread, when messages can be taken again.
    """

    def __init__(self, observe: Callable[[Event], object], made_room: Callable[[], None]) -> None:
        self._observe = observe
        self._made_room = made_room
        self._jobs: deque[Callable[[], object]] = deque()
        self._waiting_messages = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="birthmark-callbacks", daemon=True)
        self._thread.start()

    @property
    def is_full(self) -> bool:
        """Whether no more messages should be taken now."""
        return self._waiting_messages >= MAX_WAITING

    @property
    def is_current_thread(self) -> bool:
        """Whether the caller is a callback."""
        return threading.current_thread() is self._thread

    def tell(self, event: Event) -> None:
        """Queue an event for the observer."""
        self._put(lambda: self._observe(event))

    def do(self, job: Callable[[], object]) -> None:
        """Queue anything else."""
        self._put(job)

    def take(self, job: Callable[[], object]) -> None:
        """Queue the handling of one message."""

        def counted() -> None:
            try:
                job()
            finally:
                with self._changed:
                    was_full = self.is_full
                    self._waiting_messages -= 1
                if was_full:
                    self._made_room()

        with self._changed:
            self._waiting_messages += 1
        self._put(counted)

    def stop(self, timeout_s: float) -> None:
        """Run what is queued, then end the thread; a callback that takes longer than `timeout_s` is left alone."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None and not self.is_current_thread:
            self._thread.join(timeout_s)

    def _put(self, job: Callable[[], object]) -> None:
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs:
                    if self._stopping:
                        return
                    self._changed.wait()
                job = self._jobs.popleft()
            try:
                job()
            except Exception:  # noqa: BLE001 - it is somebody else's code; it is reported
                _log.exception("an observer failed")
