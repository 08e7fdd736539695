"""What other threads ask of a client's worker: messages to publish, filters to subscribe to.

Other threads put in, the worker takes out; both under the condition that they share, which is notified when a
message is acknowledged. What was not acknowledged when a connection ends is MQTT's to send again (paho keeps it);
here is kept who waits for it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from birthmark.device.errors import UnreachableError
from birthmark.device.escape import escaped
from birthmark.device.publication import Acknowledgement

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from birthmark.device.outbox.outbox import Delivery, Outbox
    from birthmark.device.publication import Outgoing

MAX_UNACKNOWLEDGED = 10_000
"""Messages kept for a broker that is not there or does not answer."""


class Publications:
    """The messages that the broker does not have yet, and who waits for its word.

    Those in memory go before those in the outbox, which may be a week's.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._unsent: deque[tuple[Outgoing, Acknowledgement]] = deque()
        self._unacknowledged: dict[int, tuple[Outgoing, Acknowledgement | Delivery]] = {}
        self._is_closed = False
        self.outbox: Outbox | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the broker has everything."""
        in_memory = self._unsent or self._unacknowledged
        return not in_memory and (self.outbox is None or self.outbox.is_empty)

    def add(self, outgoing: Outgoing, acknowledgement: Acknowledgement | None = None) -> Acknowledgement:
        """Queue a message in memory.

        Raises:
            UnreachableError: too many wait already, or the client has stopped.
        """
        what = f"publish to {escaped(outgoing.topic)}"
        acknowledgement = acknowledgement or Acknowledgement(what)
        with self._changed:
            if self._is_closed:
                raise UnreachableError(f"could not {what}: the client has stopped")
            if len(self._unsent) + len(self._unacknowledged) >= MAX_UNACKNOWLEDGED:
                raise UnreachableError(
                    f"could not {what}: {MAX_UNACKNOWLEDGED} messages wait for the broker already",
                    hint="publish less, or wait for acknowledgements",
                )
            self._unsent.append((outgoing, acknowledgement))
        return acknowledgement

    def send_unsent(self, publish: Callable[[Outgoing], int]) -> None:
        """Publish what waits with `publish`, which returns the packet id, in order."""
        # Under the lock to the end: whoever waits for `is_empty` must see each message in one of the two.
        with self._changed:
            while self._unsent:
                outgoing, acknowledgement = self._unsent.popleft()
                self._unacknowledged[publish(outgoing)] = (outgoing, acknowledgement)
            for delivery in self.outbox.take() if self.outbox else ():
                self._unacknowledged[publish(delivery.outgoing)] = (delivery.outgoing, delivery)

    def send_now(self, outgoing: Outgoing, publish: Callable[[Outgoing], int]) -> None:
        """Publish one message before all that wait."""
        with self._changed:
            self._unacknowledged[publish(outgoing)] = (outgoing, Acknowledgement(f"publish to {outgoing.topic}"))

    def acknowledged(self, packet_id: int) -> None:
        """Take the broker's word for one message."""
        with self._changed:
            _, acknowledgement = self._unacknowledged.pop(packet_id, (None, None))
            self._changed.notify_all()
        if acknowledgement is not None:
            acknowledgement.settle()

    def connection_lost(self) -> None:
        """Give up what is sent once or not at all (QoS 0, MQTT 3.1.1 §4.3.1)."""
        with self._changed:
            once = [packet_id for packet_id, (sent, _) in self._unacknowledged.items() if sent.qos == 0]
            for packet_id in once:
                sent, acknowledgement = self._unacknowledged.pop(packet_id)
                what = f"publish to {escaped(sent.topic)}"
                acknowledgement.settle(UnreachableError(f"could not {what}: the connection was lost"))
            self._changed.notify_all()

    def close(self) -> None:
        """Take no more, and give up what waits."""
        with self._changed:
            self._is_closed = True
            for sent, acknowledgement in (*self._unsent, *self._unacknowledged.values()):
                acknowledgement.settle(stopped_first(f"publish to {escaped(sent.topic)}"))
            self._unsent.clear()
            self._unacknowledged.clear()
            self._changed.notify_all()


class Subscriptions:
    """The filters a client wants, and which of them the broker has yet to hear of."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._wanted: dict[str, tuple[int, Acknowledgement]] = {}
        self._new: set[str] = set()
        self._dropped: set[str] = set()
        self._asked: dict[int, list[str]] = {}

    def add(self, topic_filter: str, qos: int) -> Acknowledgement:
        """Want a filter."""
        acknowledgement = Acknowledgement(f"subscribe to {escaped(topic_filter)}")
        with self._changed:
            self._wanted[topic_filter] = (qos, acknowledgement)
            self._new.add(topic_filter)
            self._dropped.discard(topic_filter)
        return acknowledgement

    def remove(self, topic_filter: str) -> None:
        """Want a filter no more."""
        with self._changed:
            if self._wanted.pop(topic_filter, None) is not None:
                self._new.discard(topic_filter)
                self._dropped.add(topic_filter)

    def ask_for_all(self, subscribe: Callable[[Sequence[tuple[str, int]]], int]) -> None:
        """Ask a new connection for every filter with `subscribe`, which returns the packet id."""
        with self._changed:
            self._asked.clear()
            self._new = set(self._wanted)
        self.ask_for_new(subscribe)

    def ask_for_new(self, subscribe: Callable[[Sequence[tuple[str, int]]], int]) -> None:
        """Ask for the filters that are new."""
        with self._changed:
            names, self._new = sorted(self._new), set()
            if names:
                self._asked[subscribe([(name, self._wanted[name][0]) for name in names])] = names

    def take_dropped(self) -> set[str]:
        """Return the filters to unsubscribe from, once."""
        with self._changed:
            dropped, self._dropped = self._dropped, set()
            return dropped

    def answered(self, packet_id: int, granted: Sequence[bool]) -> list[tuple[str, Acknowledgement]]:
        """Take the broker's answer; settle what it granted, and return what it denied."""
        with self._changed:
            names = self._asked.pop(packet_id, [])
            answers = [
                (name, self._wanted[name][1], is_granted)
                for name, is_granted in zip(names, granted, strict=False)
                if name in self._wanted
            ]
        for _, acknowledgement, is_granted in answers:
            if is_granted:
                acknowledgement.settle()
        return [(name, acknowledgement) for name, acknowledgement, is_granted in answers if not is_granted]

    def close(self) -> None:
        """Give up what was not answered."""
        with self._changed:
            for _, acknowledgement in self._wanted.values():
                acknowledgement.settle(stopped_first(acknowledgement.what))


def stopped_first(what: str) -> UnreachableError:
    """Say that a client was stopped before the broker answered."""
    return UnreachableError(f"could not {what}: the client stopped first")
