"""The outbox of a client: what it publishes is on disk before it is acknowledged, and goes out in order.

Rules:

- Two acknowledgements. *Stored*: it is on this device's disk, and survives whatever happens to the process and
  the power. *Accepted*: the broker has it (PUBACK), and it is the broker's to keep.
- One thread has the file. All that was published while it synced shares the next sync (group commit).
- Messages go out in the order in which they were published, a bounded number unanswered. What had gathered before
  a connection goes out at a bounded rate; what comes after that does not wait longer than it must.
- What was accepted is removed along with the next message stored, or at the latest after `REMOVE_AFTER_S`: after a
  power cut these few go out again. A message's id tells (at least once, MQTT 3.1.1 §4.3.2).
- A file that is damaged is put aside, what can be read of it is kept, and both are said. A disk that takes
  nothing is said once, tried again, and no publication is acknowledged meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Final

from birthmark.device.errors import LocalProtocolError, SystemFailureError, UnreachableError
from birthmark.device.escape import escaped
from birthmark.device.events import OutboxChanged
from birthmark.device.frozen import Frozen
from birthmark.device.mqtt import topic_matches
from birthmark.device.outbox.database import DatabaseFailedError, DatabaseUnfitError, Row
from birthmark.device.outbox.drain import Drain
from birthmark.device.outbox.opening import open_file, replaced
from birthmark.device.outbox.storing import Totals, store
from birthmark.device.publication import Acknowledgement, Outgoing, as_bytes, check_size, with_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from birthmark.device.outbox.database import Database
    from birthmark.device.outbox.opening import Opened
    from birthmark.device.outbox.settings import OutboxSettings
    from birthmark.device.publication import Payload

IN_FLIGHT: Final = 16
"""How many wait for the broker's answer at a time; paho takes 20, and what goes past the outbox needs some."""
READY: Final = 32
"""How many are read ahead of that."""
READY_BYTES: Final = 1024 * 1024
MAX_PENDING: Final = 1000
"""How many wait for the disk at a time; whoever publishes more waits, too."""
MAX_PENDING_BYTES: Final = 4 * 1024 * 1024
REMOVE_TOGETHER: Final = 100
REMOVE_AFTER_S: Final = 60.0
RETRY_DISK_S: Final = 5.0

_log = logging.getLogger("birthmark.device")


class OutboxState(Frozen):
    """What is in an outbox, and how it does."""

    messages: int
    """Stored, and not accepted by the broker."""
    bytes: int
    dropped: int
    """How many had to give way to others, ever."""
    failing: str = ""
    """Why the disk takes nothing now; empty if it does."""


class Delivery(Frozen):
    """One stored message on its way to the broker."""

    outgoing: Outgoing
    row: Row
    _outbox: Outbox

    def settle(self, error: Exception | None = None) -> None:
        """Say that the broker has it; an error leaves it stored, to go out again."""
        if error is None:
            self._outbox.accepted(self.row)


class _Pending(Frozen):
    row: Row
    acknowledgement: Acknowledgement


class Outbox:
    """The messages of one identity that its broker does not have yet.

    Args:
        settings: the limits, and what happens at them.
        path: the file.
        owner: the identity.
        max_packet_bytes: what the gateway takes; None: any.
        tell: gives an event to the observer.
        wake: is called, on the outbox's thread, when there is something to take.
        send_from_memory: takes what the disk does not, where the settings want that.
        now_s: the clock, in seconds since 1970.
        monotonic_s: seconds, never going back.
    """

    def __init__(
        self,
        settings: OutboxSettings,
        path: Path,
        owner: str,
        *,
        max_packet_bytes: int | None = None,
        tell: Callable[[OutboxChanged], None],
        wake: Callable[[], None],
        send_from_memory: Callable[[Outgoing, Acknowledgement], None],
        now_s: Callable[[], float],
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._path = path
        self._owner = owner
        self._max_packet_bytes = max_packet_bytes
        self._tell = tell
        self._wake = wake
        self._send_from_memory = send_from_memory
        self._now_s = now_s
        self._monotonic_s = monotonic_s
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        # Guarded by `_changed`.
        self._is_open = False
        self._is_closing = False
        self._epoch = secrets.token_hex(4)
        self._next_seq = 1
        self._pending: deque[_Pending] = deque()
        self._pending_bytes = 0
        self._accepted: dict[int, int] = {}
        self._accepted_since_s = 0.0
        self._ready: deque[Row] = deque()
        self._on_their_way: set[int] = set()
        self._handed = 0
        self._newest = 0
        self._messages = self._bytes = self._dropped = 0
        self._failing = ""
        self._has_backlog = False
        self._waiting: weakref.WeakValueDictionary[int, Acknowledgement] = weakref.WeakValueDictionary()
        # The sender's alone.
        self._drain = Drain(settings.drain_per_s)
        # The outbox's thread's alone.
        self._database: Database | None = None
        self._retry_at_s = 0.0

    # From any thread.

    def put(self, topic: str, payload: Payload, *, retain: bool) -> Acknowledgement:
        """Have a message stored and sent; the acknowledgement's `wait_stored` says when it is durable.

        Raises:
            LocalProtocolError: MQTT has no such topic or payload, or it is larger, with its id, than what the
                gateway takes or the whole outbox.
            UnreachableError: the client has stopped.
        """
        what = f"publish to {escaped(topic)}"
        acknowledgement = Acknowledgement(what, is_kept=True)
        priority = self._priority(topic)
        self.start()
        with self._changed:
            self._changed.wait_for(self._has_room)
            if self._is_closing:
                raise UnreachableError(f"could not {what}: the client has stopped")
            seq = self._next_seq
            acknowledgement.message_id = f"{self._epoch}-{seq}"
            key = self._settings.message_id
            content = as_bytes(with_id(payload, key, acknowledgement.message_id) if key else payload)
            check_size(topic, content, self._max_packet_bytes)
            outgoing = Outgoing(topic, content, 1, retain)
            row = Row(seq, outgoing.topic, outgoing.payload, outgoing.retain, priority, self._now_s())
            if row.size > self._settings.max_bytes:
                raise LocalProtocolError(f"could not {what}: {row.size} bytes are more than the outbox may hold")
            self._next_seq += 1
            self._pending.append(_Pending(row, acknowledgement))
            self._pending_bytes += row.size
            self._changed.notify_all()
        return acknowledgement

    def wait_stored(self, acknowledgement: Acknowledgement) -> None:
        """Wait until a message is on the disk, or, where the settings want that, in memory alone.

        Raises:
            SystemFailureError: the disk does not take it.
            UnreachableError: the outbox is full.
        """
        with contextlib.suppress(*(() if self._settings.when_failing == "refuse" else (SystemFailureError,))):
            acknowledgement.wait_stored()

    @property
    def is_empty(self) -> bool:
        """Whether the broker has everything, as far as it can be known."""
        with self._changed:
            return not self._pending and (bool(self._failing) or not self._messages)

    def state(self) -> OutboxState:
        """Return what is in it."""
        with self._changed:
            return OutboxState(self._messages, self._bytes, self._dropped, self._failing)

    def start(self) -> None:
        """Start the thread that has the file; a second call does nothing."""
        with self._changed:
            if self._thread is not None or self._is_closing:
                return
            self._thread = threading.Thread(target=self._run, name="birthmark-outbox", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Store what was put, remove what was accepted, and close the file; what was not accepted stays in it."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
        with self._changed:
            lost, self._pending = list(self._pending), deque()
            stored = list(self._waiting.values())
        for item in lost:
            self._not_stored(item)
        for acknowledgement in stored:
            acknowledgement.settle(
                UnreachableError(
                    f"could not {acknowledgement.what}: the client stopped first",
                    "it is stored, and goes out when the client is started again",
                )
            )

    # From the thread that sends.

    def connected(self) -> None:
        """Take what is there by now for a backlog, to be sent at the bounded rate."""
        with self._changed:
            self._drain.begin(self._newest, self._monotonic_s())
            self._has_backlog = bool(self._messages)

    def take(self) -> list[Delivery]:
        """Return what may be sent now, in order."""
        taken: list[Delivery] = []
        with self._changed:
            while self._ready and len(self._on_their_way) < IN_FLIGHT:
                if not self._drain.lets_go(self._ready[0].seq, self._monotonic_s()):
                    break
                row = self._ready.popleft()
                self._on_their_way.add(row.seq)
                taken.append(Delivery(Outgoing(row.topic, row.payload, 1, row.retain), row, self))
            if taken:
                self._changed.notify_all()
        return taken

    def wait_s(self) -> float | None:
        """Return how long the bounded rate makes the next message wait; None: something else does."""
        with self._changed:
            if not self._ready or len(self._on_their_way) >= IN_FLIGHT:
                return None
            return self._drain.wait_s(self._ready[0].seq, self._monotonic_s())

    def accepted(self, row: Row) -> None:
        """Take the broker's word for a message; it is removed from the disk in a while."""
        with self._changed:
            self._on_their_way.discard(row.seq)
            if not self._accepted:
                self._accepted_since_s = self._monotonic_s()
            self._accepted[row.seq] = row.size
            self._messages = max(0, self._messages - 1)  # a damaged file may have lost it
            self._bytes = max(0, self._bytes - row.size)
            # Said of a backlog alone: it is no news that what was just published has arrived.
            has_drained = self._has_backlog and not self._messages
            self._has_backlog = self._has_backlog and not has_drained
            acknowledgement = self._waiting.pop(row.seq, None)
            if len(self._accepted) >= REMOVE_TOGETHER:
                self._changed.notify_all()
        if acknowledgement is not None:
            acknowledgement.settle()
        if has_drained:
            self._tell(OutboxChanged("drained", "the broker has everything that waited in the outbox"))

    # From the outbox's own thread.

    def _run(self) -> None:
        with self._failures():
            self._reopen()
        with self._changed:
            self._is_open = True
            self._changed.notify_all()
        while self._wait_for_work():
            self._work()
        if self._database is not None:
            self._database.close()

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; return whether this is not the end."""
        with self._changed:
            while not (self._is_closing or self._is_due()):
                self._changed.wait(self._sleep_s())
            if self._pending and self._settings.batch_s and self._may_write:
                gathered_by_s = self._monotonic_s() + self._settings.batch_s
                while not self._is_closing and self._has_room():
                    left_s = gathered_by_s - self._monotonic_s()
                    if left_s <= 0:
                        break
                    self._changed.wait(left_s)
            return bool(not self._is_closing or self._pending or (self._accepted and not self._failing))

    @property
    def _may_write(self) -> bool:
        return not self._failing or self._monotonic_s() >= self._retry_at_s

    def _is_due(self) -> bool:
        if self._pending or (self._failing and self._may_write):
            return True
        has_file = self._database is not None
        return has_file and (self._wants_rows or (self._may_write and self._removal_in_s() <= 0))

    @property
    def _wants_rows(self) -> bool:
        has_space = len(self._ready) <= READY // 2 and sum(row.size for row in self._ready) <= READY_BYTES // 2
        return has_space and self._handed < self._newest

    def _removal_in_s(self) -> float:
        if len(self._accepted) >= REMOVE_TOGETHER:
            return 0.0
        return self._accepted_since_s + (REMOVE_AFTER_S if self._accepted else float("inf")) - self._monotonic_s()

    def _sleep_s(self) -> float | None:
        if self._failing:
            return max(0.0, self._retry_at_s - self._monotonic_s())
        return max(0.0, self._removal_in_s()) if self._accepted else None

    def _has_room(self) -> bool:
        has_room = len(self._pending) < MAX_PENDING and self._pending_bytes < MAX_PENDING_BYTES
        return self._is_closing or (self._is_open and has_room)

    def _work(self) -> None:
        with self._changed:
            pending, self._pending = list(self._pending), deque()
            self._pending_bytes = 0
            self._changed.notify_all()
        with self._failures():
            try:
                self._write(pending)
            except DatabaseUnfitError as unfit:  # it turned out to be damaged: a new one is tried, once
                self._replace(unfit)
                self._write(pending)
        for item in pending:
            self._not_stored(item)
        if self._ready:
            self._wake()

    def _write(self, pending: list[_Pending]) -> None:
        """Store what waits, which leaves `pending` then, and read what is to be sent next."""
        if self._database is None and self._may_write:
            self._reopen()
        if self._database is None:
            return
        if self._may_write:
            self._stored(pending, self._store(self._database, pending))
            pending.clear()
        self._read_ahead(self._database)

    def _store(self, database: Database, pending: list[_Pending]) -> frozenset[int]:
        """Store and remove in one sync; return the numbers of those that found no room."""
        with self._changed:
            accepted = list(self._accepted)
            if not (pending or self._failing or self._removal_in_s() <= 0 or self._is_closing):
                return frozenset()
            # What is accepted meanwhile is counted off as it comes, from the same totals.
            before = Totals(self._messages, self._bytes, self._dropped)
            after, proving = self._handed, bool(self._failing)
        new = [item.row for item in pending]
        stored = store(database, self._settings, new, accepted, totals=before, after=after, proving=proving)
        with self._changed:
            for number in accepted:
                del self._accepted[number]
            self._accepted_since_s = self._monotonic_s()
            self._messages += stored.totals.messages - before.messages
            self._bytes += stored.totals.bytes - before.bytes
            self._newest = max(self._newest, *(row.seq for row in new), 0)
            for item in pending:
                if item.row.seq not in stored.refused:
                    self._waiting[item.row.seq] = item.acknowledgement
            given_way = [self._waiting.pop(number, None) for number in stored.given_way]
        self._say_dropped(stored.totals.dropped, [one for one in given_way if one is not None])
        return stored.refused

    def _stored(self, pending: Iterable[_Pending], refused: frozenset[int]) -> None:
        for item in pending:
            if item.row.seq in refused:
                error = UnreachableError(
                    f"could not {item.acknowledgement.what}: the outbox is full",
                    "it waits for a connection; docs/outbox.md says how to choose what gives way",
                )
                item.acknowledgement.settle_stored(error)
                item.acknowledgement.settle(error)
            else:
                item.acknowledgement.settle_stored()
        if self._failing:
            with self._changed:
                self._failing = ""
            self._tell(OutboxChanged("working", f"the outbox {self._path} works again"))

    def _not_stored(self, item: _Pending) -> None:
        what = item.acknowledgement.what
        error = SystemFailureError(
            f"could not {what}: the outbox {self._path} takes nothing: {self._failing}",
            hint="make room on the disk or repair it; until then `publish(..., keep=False)` sends from memory",
        )
        item.acknowledgement.settle_stored(error)
        if self._settings.when_failing == "refuse":
            item.acknowledgement.settle(error)
        else:
            row = item.row
            self._send_from_memory(Outgoing(row.topic, row.payload, 1, row.retain), item.acknowledgement)

    def _say_dropped(self, dropped: int, acknowledgements: Iterable[Acknowledgement]) -> None:
        for acknowledgement in acknowledgements:
            acknowledgement.settle(
                UnreachableError(f"could not {acknowledgement.what}: it gave way to others in the full outbox")
            )
        before, self._dropped = self._dropped, dropped
        # Once at each power of ten: a full outbox goes on for a week.
        if len(str(dropped)) > len(str(before)) or (dropped and not before):
            self._tell(
                OutboxChanged(
                    "dropping",
                    f"the outbox {self._path} is full ({self._messages} messages, {self._bytes} bytes):"
                    f" {dropped} messages gave way so far ({self._settings.when_full})",
                )
            )

    def _read_ahead(self, database: Database) -> None:
        with self._changed:
            if not self._wants_rows:
                return
            after, count = self._handed, READY - len(self._ready)
        rows = database.page(after, count, READY_BYTES)
        with self._changed:
            self._ready.extend(rows)
            self._handed = rows[-1].seq if rows else self._newest

    def _reopen(self) -> None:
        """Open the file; raises `DatabaseFailedError` if that cannot be done now."""
        opened = open_file(self._path, self._owner, by_priority=self._by_priority)
        self._use(opened)
        if not opened.said and self._messages and not self._is_open:
            said = f"{self._messages} messages from before wait in the outbox {self._path}"
            self._tell(OutboxChanged("waiting", said))

    def _replace(self, unfit: DatabaseUnfitError) -> None:
        """Go on with a new file: this one turned out to be damaged."""
        if self._database is not None:
            self._database.close()
            self._database = None
        self._use(replaced(self._path, self._owner, unfit, by_priority=self._by_priority))

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Say what fails in the block, and go on: whoever publishes waits for this thread, so it must not end."""
        try:
            yield
        except DatabaseFailedError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - a defect; it is reported, and the disk is tried again
            defect = DatabaseFailedError(f"a defect: {type(error).__name__}")
            if self._failing != defect.cause:  # once, as what fails is said
                _log.exception("a defect in the outbox %s", self._path)
            self._fail(defect)

    @property
    def _by_priority(self) -> bool:
        return self._settings.when_full == "drop-lowest-priority"

    def _use(self, opened: Opened) -> None:
        database, contents = opened.database, opened.contents
        with self._changed:
            self._database = database
            self._epoch = database.epoch
            self._next_seq = max(self._next_seq, database.next_seq)
            self._messages = max(0, contents.messages - len(self._accepted))
            self._bytes = max(0, contents.bytes - sum(self._accepted.values()))
            self._dropped = max(self._dropped, contents.dropped)
            self._newest = max(self._newest, database.next_seq - 1)
            self._has_backlog = bool(self._messages)
        if opened.said:
            self._tell(OutboxChanged("set-aside", f"the outbox {self._path} is of no use: {opened.said}"))

    def _fail(self, error: DatabaseFailedError) -> None:
        if self._database is not None and not error.is_readable:
            self._database.close()
            self._database = None
        self._retry_at_s = self._monotonic_s() + RETRY_DISK_S
        with self._changed:
            was, self._failing = self._failing, error.cause
        if was != error.cause:
            then = "publishing fails" if self._settings.when_failing == "refuse" else "publications wait in memory"
            self._tell(
                OutboxChanged(
                    "failing", f"the outbox {self._path} takes nothing: {error.cause}; until it does, {then}"
                )
            )

    def _priority(self, topic: str) -> int:
        return next((value for name, value in self._settings.priorities if topic_matches(name, topic)), 0)
