"""What a client says of itself, on disk: `birthmark-device status` reads it, whether the client runs or not.

Rules:

- One small file in the state folder, written whole or not at all. It holds no secret.
- It is written when something has changed, a few times at once and then at most once a minute: a network that
  comes and goes all day must not wear out an SD card. What has changed meanwhile is written when that minute is
  over, and at the end.
- What waits in an outbox changes all the time: it is written along, and every ten minutes if it is another.
- That it cannot be written is logged, once, and stops nothing.
- A reader takes any file: one that is damaged says nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from birthmark.device.durable import write_durably
from birthmark.device.errors import RefusedError, RemoteProtocolError
from birthmark.device.events import (
    AttemptFailed,
    Connected,
    Disconnected,
    Event,
    HandlerFailed,
    OutboxChanged,
    RenewalChanged,
    SubscriptionDenied,
)
from birthmark.device.frozen import Frozen
from birthmark.device.json_fields import Fields, dump

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.device.clock import Clock
    from birthmark.device.errors import ConnectionFailedError
    from birthmark.device.outbox.outbox import OutboxState

RECORD_FILE: Final = "status"
WRITES_AT_ONCE: Final = 5
BETWEEN_WRITES_S: Final = 60.0
OUTBOX_EVERY_S: Final = 600.0
_MAX_FILE_BYTES: Final = 16 * 1024

_log = logging.getLogger(__name__)


class Failure(Frozen):
    """Why a connection did not come about, or ended."""

    at: float
    check: str
    reason: str
    hint: str
    refused: bool

    @classmethod
    def of(cls, error: ConnectionFailedError, at: float) -> Failure:
        """Take what an error says."""
        return cls(at, str(error.check), error.message, error.hint, isinstance(error, RefusedError))

    @classmethod
    def from_fields(cls, fields: Fields) -> Failure:
        """Read what `as_dict` has written; raises `RemoteProtocolError`."""
        check, reason, hint = (fields.text(key) for key in ("check", "reason", "hint"))
        return cls(fields.number("at"), check, reason, hint, fields.boolean("refused"))


class Waiting(Frozen):
    """What waited in the outbox, and when that was."""

    messages: int
    bytes: int
    dropped: int
    failing: str
    at: float

    @classmethod
    def from_fields(cls, fields: Fields) -> Waiting:
        """Read what `as_dict` has written; raises `RemoteProtocolError`."""
        messages, octets, dropped = (fields.whole(key) for key in ("messages", "bytes", "dropped"))
        return cls(messages, octets, dropped, fields.text("failing"), fields.number("at"))


class Record(Frozen):
    """What a client says of itself. Times are seconds since 1970, by the best guess at the time (`clock`)."""

    state: str = "connecting"
    """`connecting`, `connected`, `disconnected` or `stopped`."""
    since: float = 0.0
    broker: str = ""
    """Where it is or was connected."""
    tls: str = ""
    clock_is_before: float | None = None
    """The floor by which the broker was checked, where this machine's clock was before it."""
    connected_at: float | None = None
    """When it was last connected: when that connection began, or ended."""
    failure: Failure | None = None
    """The last one."""
    renewal: str = ""
    """What was last said of a renewal."""
    trouble: str = ""
    """The last thing that went wrong beside the connection: a callback that raised, a subscription denied."""
    trouble_at: float | None = None
    outbox: Waiting | None = None
    process: tuple[int, int] = (0, 0)
    """The process, and when it was started, as the kernel has it."""

    @property
    def is_running(self) -> bool:
        """Whether the client that wrote it is there."""
        return self.state != "stopped" and self.process[0] > 0 and _started_at(self.process[0]) == self.process[1]

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        process = dict(zip(("id", "started_at"), self.process, strict=True))
        return dump({**self.as_dict(), "process": process}) + b"\n"

    @classmethod
    def from_bytes(cls, content: bytes) -> Record:
        """Read a file's content; raises `RemoteProtocolError` if it is none."""
        fields = Fields("record of a client", content)
        failure, outbox, process = (fields.inner(key) for key in ("failure", "outbox", "process"))
        return cls(
            state=fields.text("state"),
            since=fields.number("since"),
            broker=fields.text("broker"),
            tls=fields.text("tls"),
            clock_is_before=_time(fields, "clock_is_before"),
            connected_at=_time(fields, "connected_at"),
            failure=None if failure is None else Failure.from_fields(failure),
            renewal=fields.text("renewal"),
            trouble=fields.text("trouble"),
            trouble_at=_time(fields, "trouble_at"),
            outbox=None if outbox is None else Waiting.from_fields(outbox),
            process=(0, 0) if process is None else (process.whole("id"), process.whole("started_at")),
        )


def read_record(folder: Path) -> Record | None:
    """Return what the client of a state folder last said of itself; None if there is nothing to be read."""
    with contextlib.suppress(OSError, RemoteProtocolError), (folder / RECORD_FILE).open("rb") as file:
        return Record.from_bytes(file.read(_MAX_FILE_BYTES))
    return None


class Recorder:
    """Keeps the record of one client. `take` is called on one thread, with each event.

    Args:
        folder: the state folder.
        clock: what is known of the time.
        outbox: what waits in the outbox; None if there is none.
        elapsed_s: seconds since some moment.
    """

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        *,
        outbox: Callable[[], OutboxState | None] = lambda: None,
        elapsed_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = folder / RECORD_FILE
        self._clock = clock
        self._outbox = outbox
        self._elapsed_s = elapsed_s
        self._lock = threading.Lock()
        self._record = Record()
        self._written = b""
        self._credit = float(WRITES_AT_ONCE)
        self._credit_at_s = elapsed_s()
        self._timer: threading.Timer | None = None
        self._has_failed = False

    def started(self) -> None:
        """Say that the client runs; what the one before it said of its last connection is kept."""
        before = read_record(self._path.parent) or Record()
        process = (os.getpid(), _started_at(os.getpid()))
        self._change(before.changed(state="connecting", since=self._now_s(), process=process))
        self._look_at_outbox_later()

    def take(self, event: Event) -> None:
        """Take note of an event."""
        now_s, record = self._now_s(), self._record
        if isinstance(event, Connected):
            floor = event.moment.at.timestamp() if event.moment.or_later else None
            record = record.changed(
                state="connected",
                since=now_s,
                broker=str(event.broker),
                tls=event.tls_version,
                clock_is_before=floor,
                connected_at=now_s,
            )
        elif isinstance(event, Disconnected):
            failure = Failure.of(event.error, now_s)
            record = record.changed(state="disconnected", since=now_s, connected_at=now_s, failure=failure)
        elif isinstance(event, AttemptFailed):
            known = record.failure
            if record.state == "disconnected" and known and known.check == event.error.check:
                return  # the same again
            since = record.since if record.state == "disconnected" else now_s
            record = record.changed(state="disconnected", since=since, failure=Failure.of(event.error, now_s))
        elif isinstance(event, RenewalChanged):
            record = record.changed(renewal=f"{event.state}: {event.detail}")
        elif isinstance(event, HandlerFailed | SubscriptionDenied) or (
            isinstance(event, OutboxChanged) and event.state in ("dropping", "failing", "set-aside")
        ):
            trouble = event.detail if isinstance(event, OutboxChanged) else event.in_words()
            if trouble == record.trouble:
                return
            record = record.changed(trouble=trouble, trouble_at=now_s)
        self._change(record)

    def stopped(self) -> None:
        """Say that the client has ended, at once; a second call does nothing."""
        now_s, record = self._now_s(), self._record
        if record.state == "stopped":
            return
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            connected_at = now_s if record.state == "connected" else record.connected_at
            stopped = record.changed(state="stopped", since=now_s, connected_at=connected_at)
            self._record = self._with_outbox(stopped)
            self._write()

    def _now_s(self) -> float:
        return round(self._clock.now().timestamp(), 3)

    def _change(self, record: Record) -> None:
        with self._lock:
            self._take(record)

    def _take(self, record: Record) -> None:
        """Write a record, now or when there is credit for it."""
        self._record = record = self._with_outbox(record)
        if self._timer is not None or record.to_bytes() == self._written:
            return
        now_s = self._elapsed_s()
        earned = (now_s - self._credit_at_s) / BETWEEN_WRITES_S
        self._credit, self._credit_at_s = min(self._credit + earned, WRITES_AT_ONCE), now_s
        if self._credit >= 1:
            self._credit -= 1
            self._write()
            return
        self._timer = threading.Timer((1 - self._credit) * BETWEEN_WRITES_S, self._write_later)
        self._timer.daemon = True
        self._timer.start()

    def _with_outbox(self, record: Record) -> Record:
        found, before = self._outbox(), record.outbox
        if found is None:
            return record.changed(outbox=None)
        is_same = before is not None and {**found.as_dict(), "at": before.at} == before.as_dict()
        return record if is_same else record.changed(outbox=Waiting(**found.as_dict(), at=self._now_s()))

    def _look_at_outbox_later(self) -> None:
        if self._outbox() is not None:
            timer = threading.Timer(OUTBOX_EVERY_S, self._look_at_outbox)
            timer.daemon = True
            timer.start()

    def _look_at_outbox(self) -> None:
        with self._lock:
            if self._record.state == "stopped":
                return
            self._take(self._record)
        self._look_at_outbox_later()

    def _write_later(self) -> None:
        with self._lock:
            self._timer, self._credit, self._credit_at_s = None, 0.0, self._elapsed_s()
            if self._record.state != "stopped":
                self._write()

    def _write(self) -> None:
        content = self._record.to_bytes()
        try:
            write_durably(self._path, content)
        except OSError as error:
            if not self._has_failed:
                _log.warning("could not keep the client's status in %s: %s", self._path, error.strerror or error)
            self._has_failed = True
        else:
            self._written, self._has_failed = content, False


def _time(fields: Fields, key: str) -> float | None:
    return fields.number(key) if fields.has(key) else None


def _started_at(process_id: int) -> int:
    """Return when a process was started (proc(5), field 22 of `stat`, in ticks since boot); 0: there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{process_id}/stat").read_bytes().rpartition(b")")[2].split()[19])
    return 0
