"""Messages on their way to each session: sent, queued, unacknowledged, sent again (MQTT 3.1.1 §4.3, §4.4, §4.6).

Rules:

- QoS 1 and 2: at most `max_inflight` (and `max_queued_bytes`) unacknowledged at a client; what is more waits in
  the session's queue, in order, connected or not. What gives way in a full queue is `queue_full`'s to say. What is
  unacknowledged is sent again, with DUP and in the first order, when the client is back (§4.4.0-1), and
  never before (§4.4 forbids nothing else, and a retransmission on a living TCP connection helps nobody).
- What is owed to a persistent session is noted in the journal, and what its client may hear only once that is on
  disk waits for it: here PUBLISH and PUBREL of QoS 2, since after a crash the same packet identifier must still
  mean the same message (§4.3.3, §4.4).
- Retained messages for a new subscription are read from the store as the socket takes them, not copied.
- Whatever waits is sent only if the policy allows it at that moment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from birthmark.broker.config import QueueFull
from birthmark.broker.packets import as_duplicate, publish_frame, pubrel, topic_field
from birthmark.broker.session import MAX_REMEMBERED_DECISIONS, Message, Outgoing, Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from birthmark.broker.config import Limits
    from birthmark.broker.counters import Counters
    from birthmark.broker.denials import Denials
    from birthmark.broker.journal import Journal
    from birthmark.broker.peer import Peer
    from birthmark.broker.retained import RetainedStore

MAX_REMEMBERED_TOPIC_CHARACTERS = 512
REPLAY_WATER_BYTES = 65_536
"""Retained messages are added to a socket that has less than this waiting."""


class Outbound:
    """Sends to sessions.

    Args:
        limits: of sessions.
        counters: counts.
        denials: says what was dropped.
        journal: is told what must survive.
        retained: where retained messages are read from.
    """

    def __init__(
        self, limits: Limits, counters: Counters, denials: Denials, journal: Journal, retained: RetainedStore
    ) -> None:
        self.limits = limits
        self.counters = counters
        self.denials = denials
        self.journal = journal
        self.retained = retained
        self.queued_bytes = 0
        """What waits in all queues together."""
        self.stays: Callable[[Peer], bool] | None = None
        """Whether what somebody has published goes to no other gateway; None where there is no upstream."""
        self._max_waiting_bytes = limits.max_queued_bytes
        self._max_inflight = limits.max_inflight

    def send(self, session: Session, messages: list[Message], qos: int) -> None:
        """Deliver at QoS 1 or 2: at once as far as there is room and nothing older waits."""
        outgoings = [Outgoing(message, qos) for message in messages]
        sent = 0 if session.queue else self._transmit(session, outgoings)
        if sent < len(outgoings):
            for outgoing in outgoings[sent:]:
                self._enqueue(session, outgoing)

    def _has_room(self, session: Session) -> bool:
        stream = session.stream
        return (
            stream is not None
            and len(session.inflight) < self._max_inflight
            and session.inflight_bytes <= self._max_waiting_bytes
            and stream.waiting_bytes <= self._max_waiting_bytes
        )

    def _transmit(self, session: Session, outgoings: Iterable[Outgoing]) -> int:
        """Send as many as there is room for; return how many they were."""
        stream = session.stream
        if stream is None:
            return 0
        inflight, max_inflight, max_bytes = session.inflight, self._max_inflight, self._max_waiting_bytes
        sent = 0
        for outgoing in outgoings:
            if (  # as `_has_room`
                len(inflight) >= max_inflight
                or session.inflight_bytes > max_bytes
                or stream.waiting_bytes > max_bytes
            ):
                break
            message, qos = outgoing.message, outgoing.qos
            packet_id = session.take_packet_id()
            inflight[packet_id] = outgoing
            session.inflight_bytes += message.size_bytes
            frame = message.head(qos) + packet_id.to_bytes(2, "big") + message.payload
            if session.key:
                self.journal.note_delivery(session, outgoing, packet_id)
                if qos == 2:
                    self.journal.send_after(stream, self.journal.recorded, frame)
                    sent += 1
                    continue
            stream.write(frame)
            sent += 1
        self.counters.messages_out += sent
        return sent

    def _enqueue(self, session: Session, outgoing: Outgoing) -> None:
        queue, message = session.queue, outgoing.message
        if self.limits.queue_full is not QueueFull.DROP_OLDEST and self._is_full(session, 1, message.size_bytes):
            self._find_no_room(session, message)
            return
        queue.append(outgoing)
        session.queued_bytes += message.size_bytes
        self.queued_bytes += message.size_bytes
        if session.key:
            self.journal.note_delivery(session, outgoing)
        while queue and self._is_full(session, 0, 0):
            self._drop_oldest(session)

    def _is_full(self, session: Session, messages: int, size_bytes: int) -> bool:
        """Whether a session's queue would be over a limit with so much more."""
        limits = self.limits
        return (
            len(session.queue) + messages > limits.max_queued_messages
            or session.queued_bytes + size_bytes > limits.max_queued_bytes
            or self.queued_bytes + size_bytes > limits.max_queued_bytes_total
        )

    def _drop_oldest(self, session: Session) -> Message:
        oldest = session.queue.popleft()
        self._unqueued(session, oldest)
        self.journal.drop_delivery(oldest)
        self.counters.dropped_queue_full += 1
        self.denials.dropped(session.peer, "its queue is full, the oldest go", oldest.message.topic)
        return oldest.message

    def _find_no_room(self, session: Session, message: Message) -> None:
        self.counters.dropped_queue_full += 1
        self.denials.dropped(session.peer, "its queue is full, the newest go", message.topic)
        if self.limits.queue_full is QueueFull.DISCONNECT and session.connection is not None:
            session.connection.fall_behind()

    def _unqueued(self, session: Session, outgoing: Outgoing) -> None:
        session.queued_bytes -= outgoing.message.size_bytes
        self.queued_bytes -= outgoing.message.size_bytes

    def drop_slow(self, session: Session, topic: str, count: int = 1) -> None:
        """Count messages of QoS 0 that a session's socket has no room for."""
        self.counters.dropped_slow += count
        self.denials.dropped(session.peer, "it reads too slowly for QoS 0", topic)

    def pump(self, session: Session) -> None:
        """Send what waits, as far as there is room: the queue first, then retained messages."""
        queue = session.queue
        if queue:
            for _ in range(self._transmit(session, queue)):
                self._unqueued(session, queue.popleft())
        if session.replay:
            self._replay(session)

    def _replay(self, session: Session) -> None:
        stream = session.stream
        while stream is not None and session.replay and stream.waiting_bytes < REPLAY_WATER_BYTES:
            topic, granted = next(iter(session.replay.items()))
            found = self.retained.get(topic)
            if found is not None and self.may_receive(session, topic) and self._may_go(session, found.publisher):
                qos = min(found.qos, granted)
                topic_bytes = topic_field(topic)
                if qos:
                    message = Message(topic, topic_bytes, found.payload, qos, retain=True)
                    if session.queue or not self._transmit(session, [Outgoing(message, qos)]):
                        return
                else:
                    stream.write(publish_frame(topic_bytes, found.payload, retain=True))
                    self.counters.messages_out += 1
            del session.replay[topic]
        if session.replaying and not session.replay:
            self._replayed(session)

    def _may_go(self, session: Session, publisher: Peer | None) -> bool:
        is_bound = publisher is not None and self.stays is not None and self.stays(publisher)
        return not (is_bound and session.peer.is_gateway)

    def _replayed(self, session: Session) -> None:
        """Every retained message that was asked for has been sent, or is among those unacknowledged."""
        for topic_filter in session.replaying:
            qos = session.subscriptions.get(topic_filter)
            if qos is not None:
                self.journal.note_subscription(session, topic_filter, qos, is_replaying=False)
        session.replaying.clear()

    def may_receive(self, session: Session, topic: str) -> bool:
        """Ask the policy whether a session may be sent messages of a topic; answers are remembered."""
        allowed = session.may_receive.get(topic)
        if allowed is None:
            if len(session.may_receive) >= MAX_REMEMBERED_DECISIONS:
                session.may_receive.clear()
            allowed = session.rights.receive(topic).allowed
            if len(topic) <= MAX_REMEMBERED_TOPIC_CHARACTERS:
                session.may_receive[topic] = allowed
        return allowed

    def acknowledged(self, session: Session, packet_ids: Sequence[int], qos: int) -> None:
        """PUBACKs (QoS 1) or a PUBCOMP (QoS 2) have come: those deliveries are done (§4.3.2, §4.3.3)."""
        inflight = session.inflight
        for packet_id in packet_ids:
            outgoing = inflight.get(packet_id)
            if outgoing is None or outgoing.qos != qos:
                continue
            del inflight[packet_id]
            session.inflight_bytes -= outgoing.message.size_bytes
            if outgoing.key:
                # In no hurry: a crash before it is on disk only sends the message, or the PUBREL, once more.
                self.journal.drop_delivery(outgoing)
        if session.queue or session.replay:
            self.pump(session)

    def received(self, session: Session, packet_id: int) -> None:
        """PUBREC has come: release the delivery, even one unknown here, so that the client can end it."""
        outgoing = session.inflight.get(packet_id)
        if outgoing is not None:
            if outgoing.qos != 2:
                return
            if not outgoing.is_released:
                outgoing.is_released = True
                if outgoing.key:
                    self.journal.note_delivery(session, outgoing, packet_id)
        self._send_in_state(session, pubrel(packet_id))

    def _send_in_state(self, session: Session, data: bytes) -> None:
        """Send what a persistent session may say only once its present state is on disk."""
        stream = session.stream
        if stream is None:
            return
        if session.key:
            self.journal.send_after(stream, self.journal.recorded, data)
        else:
            stream.write(data)

    def resume(self, session: Session) -> None:
        """Send again what its client has not acknowledged, then what waits (§4.4.0-1)."""
        stream = session.stream
        if stream is None:
            return
        self._withdraw_forbidden(session)
        for packet_id, outgoing in session.inflight.items():
            if outgoing.is_released:
                self._send_in_state(session, pubrel(packet_id))
                continue
            message = outgoing.message
            frame = as_duplicate(message.head(outgoing.qos)) + packet_id.to_bytes(2, "big") + message.payload
            if outgoing.qos == 2:
                self._send_in_state(session, frame)
            else:
                stream.write(frame)
            self.counters.messages_out += 1
        self.pump(session)

    def _withdraw_forbidden(self, session: Session) -> None:
        """Do not send again what its client may no longer receive.

        Only for a client that is just back: on a living connection the acknowledgement may be on its way, and
        would be taken for that of the next message under the same packet identifier.
        """
        for packet_id, outgoing in list(session.inflight.items()):
            if outgoing.is_released or self.may_receive(session, outgoing.message.topic):
                continue
            if outgoing.qos == 1:
                del session.inflight[packet_id]
                session.inflight_bytes -= outgoing.message.size_bytes
                self.journal.drop_delivery(outgoing)
            else:
                # The client may hold the packet identifier, and would pass over the next message under it: PUBREL
                # has it let go, and is answered even where it is unknown (§4.3.3).
                outgoing.is_released = True
                if outgoing.key:
                    self.journal.note_delivery(session, outgoing, packet_id)

    def drop_forbidden(self, session: Session) -> None:
        """Drop what is queued and may no longer be received; of what is unacknowledged, see `resume`."""
        waiting = list(session.queue)
        session.queue.clear()
        for outgoing in waiting:
            if self.may_receive(session, outgoing.message.topic):
                session.queue.append(outgoing)
            else:
                self._unqueued(session, outgoing)
                self.journal.drop_delivery(outgoing)

    def take_up(self, session: Session) -> None:
        """Count what a session from the store has queued, and prepare what it is still to be sent."""
        self.queued_bytes += session.queued_bytes
        for topic_filter in session.replaying:
            self.replay(session, topic_filter, session.subscriptions[topic_filter])

    def replay(self, session: Session, topic_filter: str, qos: int) -> bool:
        """Send, with `pump`, the retained messages that a subscription asks for; return whether there are any."""
        found = self.retained.topics(topic_filter)
        for topic in found:
            session.replay[topic] = max(qos, session.replay.get(topic, 0))
        return bool(found)

    def clear(self, session: Session) -> None:
        """Drop all that a session which is forgotten still holds."""
        self.queued_bytes -= session.queued_bytes
        session.queue.clear()
        session.inflight.clear()
        session.incoming.clear()
        session.replay.clear()
        session.replaying.clear()
        session.queued_bytes = session.inflight_bytes = 0
