"""What of the broker's state must survive, noted as it changes and put on disk in groups.

Rules:

- The state in memory is what the broker goes by; the journal follows it. Each change is noted as the row that it
  leaves (`records.py`), so what is put and removed again before it reached the disk costs nothing.
- One thread writes. While it commits one group, the next one gathers: the busier the broker, the larger the
  groups, with one fsync each.
- Every change has a number (`recorded`); what is on disk has one (`durable`). With "acknowledged" durability, what
  promises something to a client leaves only once the change behind it is on disk: `send_after`. Since a stream
  keeps its order, nothing that is said later overtakes it. What needs no change on disk waits for nothing.
- With "periodic" the changes of a second are a group and nobody waits; with "none" nothing is noted.
- A group that cannot be written stays, joined by what changes meanwhile, and is tried again. Until then nothing
  is promised: who waits for a promise is disconnected, and `is_failing` tells others not to ask for one.
- When the writer falls behind, those who publish what must be kept are not read from until it has caught up.

Everything here but `_write` runs in the loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from birthmark.broker.config import Durability
from birthmark.broker.records import (
    ROW_BYTES,
    Changes,
    DeliveryRow,
    IncomingRow,
    MessageRow,
    RetainedRow,
    SessionRow,
    SubscriptionRow,
    peer_text,
)
from birthmark.broker.store import StoreError

if TYPE_CHECKING:
    from birthmark.broker.counters import Counters
    from birthmark.broker.records import Stored
    from birthmark.broker.retained import Retained
    from birthmark.broker.session import Message, Outgoing, Session

PERIOD_S = 1.0
"""With "periodic": what a crash may cost."""
RETRY_S = 1.0
"""After a write that failed."""
HIGH_WATER_BYTES = 8_388_608
"""Noted and not handed to the writer yet; beyond it, publishers are not read from."""

R = TypeVar("R")

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where changes go; `store.Store` is one."""

    def apply(self, changes: Changes) -> None:
        """Make changes durable, or raise `StoreError`."""

    def close(self) -> None:
        """Close it."""


class Waiting(Protocol):
    """A stream, as far as the journal knows it; `stream.TlsStream` is one."""

    def write(self, data: bytes) -> None:
        """Send data after all that was written before."""

    def hold(self, number: int, data: bytes) -> None:
        """Keep data, and whatever is written after it, until `release` is called with that number."""

    def release(self, number: int) -> bool:
        """Send what is held up to a number; return whether nothing is held any more."""

    def abort(self, error: Exception | None = None) -> None:
        """End the connection now."""

    def pause(self) -> None:
        """Read no more."""

    def resume(self) -> None:
        """Read again."""


class _Group(NamedTuple):
    changes: Changes
    number: int
    size_bytes: int


class Journal:
    """Notes changes, and knows which of them are on disk.

    Args:
        loop: the running loop.
        durability: what acknowledgements wait for.
        counters: counts.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, durability: Durability, counters: Counters) -> None:
        self._loop = loop
        self._counters = counters
        self._waits = durability is Durability.ACKNOWLEDGED
        self.recorded = 0
        """The number of the last change noted."""
        self.durable = 0
        """The number up to which changes are on disk."""
        self.pending_bytes = 0
        """About how much is noted and not handed to the writer yet."""
        self.is_failing = False
        """The last write failed, and no other has succeeded since."""
        self.is_open = False
        """Whether anything is noted at all."""
        self._changes = Changes()
        self._handed: _Group | None = None
        self._groups: queue.SimpleQueue[_Group | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._due: asyncio.Handle | None = None
        self._waiting: dict[Waiting, None] = {}
        self._paused: dict[Waiting, None] = {}
        self._wiped: dict[str, int] = {}
        self._settled = asyncio.Event()
        self._settled.set()
        self._last_session = 0
        self._last_message = self._last_stored_message = 0
        self._last_delivery = self._last_stored_delivery = 0

    # --- life --------------------------------------------------------------------------------------------

    def start(self, store: Sink, stored: Stored) -> None:
        """Note from now on what changes against `stored`, which is what `store` holds; `close` closes it."""
        self._last_session = max((row.key for row in stored.sessions), default=0)
        self._last_message = self._last_stored_message = max((row.key for row in stored.messages), default=0)
        self._last_delivery = self._last_stored_delivery = max((row.key for row in stored.deliveries), default=0)
        self.is_open = True
        self._thread = threading.Thread(target=self._write, args=(store,), name="journal", daemon=True)
        self._thread.start()

    async def settle(self, timeout_s: float) -> bool:
        """Wait until all that has been noted is on disk; return whether it is."""
        if self._due is not None:
            self._hand_over()
        try:
            await asyncio.wait_for(self._settled.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def close(self, timeout_s: float) -> None:
        """Put on disk what is still to be, for at most `timeout_s`, and end."""
        thread = self._thread
        if thread is None:
            return
        if not await self.settle(timeout_s):
            said = "nothing of them was acknowledged" if self._waits else "what was acknowledged may be among them"
            _log.error("stopped with changes that are not on disk; %s", said)
        self.is_open = False
        self._thread = None
        if self._due is not None:
            self._due.cancel()
        self._groups.put(None)
        if not self._handed:
            await asyncio.to_thread(thread.join)

    # --- promises ----------------------------------------------------------------------------------------

    def send_after(self, stream: Waiting, number: int, data: bytes) -> None:
        """Have a stream send data once the changes up to `number` are on disk, in its order."""
        if number <= self.durable or not self._waits:
            stream.write(data)
        else:
            stream.hold(number, data)
            self._waiting[stream] = None

    def wiped(self, client_id: str) -> int:
        """The change that takes a client's former session off the disk; 0 if there is nothing to wait for."""
        return self._wiped.get(client_id, 0)

    def slow_down(self, stream: Waiting) -> None:
        """Read no more from a stream until the writer has caught up."""
        if stream not in self._paused:
            self._counters.publishers_paused += 1
            self._paused[stream] = None
            stream.pause()
            if self._due is not None and not self._waits and not self.is_failing:
                self._hand_over()  # the period is over early: nobody is to wait for its end with so much noted

    # --- what changes ------------------------------------------------------------------------------------

    def open_session(self, session: Session) -> None:
        """Keep a new persistent session from now on."""
        if self.is_open:
            self._last_session += 1
            session.key = self._last_session
            self.note_session(session)

    def note_session(self, session: Session, left_at: float | None = None) -> None:
        """Note whose session it is, and since when its client has been gone (seconds since 1970)."""
        row = SessionRow(session.key, session.client_id, peer_text(session.peer), left_at)
        self._changes.sessions[session.key] = row
        self._noted(ROW_BYTES)

    def drop_session(self, session: Session) -> None:
        """Note that a session, and all that it holds, is gone."""
        for topic_filter in session.subscriptions:
            self._changes.subscriptions[session.key, topic_filter] = None
        for packet_id in session.incoming:
            self._changes.incoming[session.key, packet_id] = None
        for outgoing in (*session.inflight.values(), *session.queue):
            self.drop_delivery(outgoing)
        self._changes.sessions[session.key] = None
        self._noted(ROW_BYTES)
        self._wiped[session.client_id] = self.recorded
        session.key = 0

    def note_subscription(self, session: Session, topic_filter: str, qos: int, *, is_replaying: bool) -> None:
        """Note a subscription, or its change."""
        row = SubscriptionRow(session.key, topic_filter, qos, is_replaying)
        self._changes.subscriptions[session.key, topic_filter] = row
        self._noted(ROW_BYTES + len(topic_filter))

    def drop_subscription(self, session: Session, topic_filter: str) -> None:
        """Note that a subscription is gone."""
        self._changes.subscriptions[session.key, topic_filter] = None
        self._noted(ROW_BYTES)

    def note_delivery(self, session: Session, outgoing: Outgoing, packet_id: int = 0) -> None:
        """Note a message owed to a session, or its new state."""
        message = outgoing.message
        if not outgoing.key:
            self._last_delivery = outgoing.key = self._last_delivery + 1
            self._owe(message)
        row = DeliveryRow(outgoing.key, session.key, message.key, outgoing.qos, packet_id, outgoing.is_released)
        self._changes.deliveries[outgoing.key] = row
        self._noted(ROW_BYTES)

    def drop_delivery(self, outgoing: Outgoing) -> None:
        """Note that a message is no longer owed to a session."""
        key, message = outgoing.key, outgoing.message
        if not key:
            return
        outgoing.key = 0
        _remove(self._changes.deliveries, key, self._last_stored_delivery)
        message.owed -= 1
        if not message.owed:
            _remove(self._changes.messages, message.key, self._last_stored_message)
            message.key = 0
        self._noted(ROW_BYTES)

    def note_incoming(self, session: Session, packet_id: int) -> None:
        """Note a packet identifier of QoS 2 whose message has been taken."""
        self._changes.incoming[session.key, packet_id] = IncomingRow(session.key, packet_id)
        self._noted(ROW_BYTES)

    def drop_incoming(self, session: Session, packet_id: int) -> None:
        """Note that a packet identifier has been released."""
        self._changes.incoming[session.key, packet_id] = None
        self._noted(ROW_BYTES)

    def note_retained(self, retained: Retained) -> None:
        """Note a retained message; an empty payload removes. `$...` is said anew by each broker, and not kept."""
        if not self.is_open or retained.topic.startswith("$"):
            return
        publisher = None if retained.publisher is None else peer_text(retained.publisher)
        row = RetainedRow(retained.topic, retained.payload, retained.qos, publisher) if retained.payload else None
        self._changes.retained[retained.topic] = row
        self._noted(ROW_BYTES + len(retained.topic) + len(retained.payload))

    def _owe(self, message: Message) -> None:
        if not message.key:
            self._last_message = message.key = self._last_message + 1
            row = MessageRow(message.key, message.topic, message.payload, message.qos, message.retain)
            self._changes.messages[message.key] = row
            self.pending_bytes += message.size_bytes
        message.owed += 1

    def _noted(self, size_bytes: int) -> None:
        self.recorded += 1
        self.pending_bytes += size_bytes
        if self._handed is None and self._due is None:
            self._schedule()

    # --- groups ------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        self._settled.clear()
        if (self._waits or self._paused) and not self.is_failing:
            # Not at once: what else happens in this turn of the loop shares the group.
            self._due = self._loop.call_soon(self._hand_over)
        else:
            self._due = self._loop.call_later(RETRY_S if self.is_failing else PERIOD_S, self._hand_over)

    def _hand_over(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if self._handed is not None:
            return
        self._handed = _Group(self._changes, self.recorded, self.pending_bytes)
        self._changes = Changes()
        self.pending_bytes = 0
        self._last_stored_message, self._last_stored_delivery = self._last_message, self._last_delivery
        self._groups.put(self._handed)
        paused, self._paused = self._paused, {}
        for stream in paused:
            stream.resume()

    def _write(self, store: Sink) -> None:
        """Write one group after another, in the writer's thread."""
        while (group := self._groups.get()) is not None:
            failure: StoreError | None = None
            try:
                store.apply(group.changes)
            except StoreError as error:
                failure = error
            except Exception as error:  # noqa: BLE001 - a writer that is gone in silence would stop every promise
                _log.exception("a defect in writing the store")
                failure = StoreError(f"could not write to the store: {type(error).__name__}", hint="see the log")
            try:
                self._loop.call_soon_threadsafe(self._written, group, failure)
            except RuntimeError:
                break  # the loop is gone, and with it everybody to whom something was promised
        store.close()

    def _written(self, group: _Group, failure: StoreError | None) -> None:
        self._handed = None
        if failure is None:
            self._succeeded(group)
        else:
            self._failed(group, failure)
        if self.recorded > self.durable:
            self._schedule()
        else:
            self._settled.set()

    def _succeeded(self, group: _Group) -> None:
        self.durable = group.number
        self._counters.commits += 1
        if self._wiped:
            self._wiped = {key: number for key, number in self._wiped.items() if number > group.number}
        if self.is_failing:
            self.is_failing = False
            _log.warning("the store takes changes again", extra={"fields": {"event": "store_recovered"}})
        for stream in list(self._waiting):
            if stream.release(group.number):
                del self._waiting[stream]

    def _failed(self, group: _Group, failure: StoreError) -> None:
        self._counters.store_failures += 1
        group.changes.add(self._changes)
        self._changes = group.changes
        self.pending_bytes += group.size_bytes
        if not self.is_failing:
            self.is_failing = True
            _log.error(
                "%s; nothing is acknowledged that should be kept, until it can be (%s)",
                failure.message,
                failure.hint,
                extra={"fields": {"event": "store_failed"}},
            )
        waiting, self._waiting = self._waiting, {}
        for stream in waiting:
            self._counters.unstored_closed += 1
            stream.abort(failure)


def _remove(table: dict[int, R | None], key: int, last_stored: int) -> None:
    """Take a row out of a group, or have it removed from the disk if it may be there already."""
    if key > last_stored:
        table.pop(key, None)
    else:
        table[key] = None
