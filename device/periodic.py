"""What a client does every so often: readings, mostly.

Rules:

- Times are counted from the start, not from the end of the last run: they do not drift. A run that takes longer
  than its interval costs the runs that it covers; they are not made up for.
- A run happens on the callbacks' thread like everything else of the user's. One that raises is reported, and the
  next one comes when it is due.
- The clock is a monotonic one: setting the system's clock changes nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Final

from birthmark.device.errors import LocalProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.device.publication import Payload

    Reading = Callable[[], Payload | None]

SHORTEST_S: Final = 0.001
LONGEST_S: Final = 366 * 86_400.0

_log = logging.getLogger("birthmark.device")


class _Task:
    def __init__(self, interval_s: float, reading: Reading, topic: str | None, due: float) -> None:
        self.interval_s = interval_s
        self.reading = reading
        self.topic = topic
        self.due = due
        self.is_queued = False


class Periodic:
    """Takes readings at intervals, and publishes them.

    Args:
        run: queues a job on the callbacks' thread.
        publish: is given a topic and a payload.
        failed: is told of a reading that raised: its name, and what it raised.
    """

    def __init__(
        self,
        run: Callable[[Callable[[], object]], object],
        publish: Callable[[str, Payload], object],
        failed: Callable[[str, Exception], object],
    ) -> None:
        self._run_job = run
        self._publish = publish
        self._failed = failed
        self._tasks: list[_Task] = []
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread: threading.Thread | None = None

    def add(self, interval_s: float, reading: Reading, *, topic: str | None = None, delay_s: float = 0.0) -> None:
        """Call `reading` after `delay_s`, and then every `interval_s`; publish what it returns on `topic`.

        Raises:
            LocalProtocolError: the interval is not from a millisecond to a year, or the delay not from 0 to that.
        """
        if not SHORTEST_S <= interval_s <= LONGEST_S:
            raise LocalProtocolError(
                f"could not do something every {interval_s} s: the interval is from {SHORTEST_S:g} s to a year"
            )
        if not 0 <= delay_s <= LONGEST_S:
            raise LocalProtocolError(f"could not begin after {delay_s} s: the delay is from 0 s to a year")
        with self._changed:
            # Before the start, `due` is a delay.
            begin = 0.0 if self._thread is None else time.monotonic()
            self._tasks.append(_Task(interval_s, reading, topic, begin + delay_s))
            self._changed.notify()

    def start(self) -> None:
        """Begin counting."""
        with self._changed:
            now = time.monotonic()
            for task in self._tasks:
                task.due += now
            self._thread = threading.Thread(target=self._run, name="birthmark-periodic", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Queue nothing any more, and end the thread."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._is_stopping:
                now = time.monotonic()
                for task in self._tasks:
                    if task.due <= now:
                        task.due = next_due(task.due, task.interval_s, now)
                        self._queue(task)
                soonest = min((task.due for task in self._tasks), default=None)
                self._changed.wait(None if soonest is None else max(0.0, soonest - time.monotonic()))

    def _queue(self, task: _Task) -> None:
        if task.is_queued:  # the callbacks are behind: one run of it waits already
            return
        task.is_queued = True

        def job() -> None:
            task.is_queued = False
            try:
                value = task.reading()
                if task.topic is not None and value is not None:
                    self._publish(task.topic, value)
            except Exception as error:  # noqa: BLE001 - it is somebody else's code; it is reported
                name = getattr(task.reading, "__name__", "a reading")
                _log.exception("%s failed", name)
                self._failed(name, error)

        self._run_job(job)


def next_due(due: float, interval_s: float, now: float) -> float:
    """Return the first time of the grid `due + n * interval_s` that is after `now`."""
    return due + interval_s * (int((now - due) / interval_s) + 1)
