"""Messages from those who publish to those who subscribed, by the policy (MQTT 3.1.1 §3.3, §3.8, §4.3 to §4.6).

Rules:

- Every publish, subscription, will, retained message and delivery is decided by the policy. Decisions are
  remembered (in the session, in the routes) and forgotten when the policy changes.
- A message is delivered at the lower of its QoS and the QoS granted, once to each session however many of its
  filters match; to a session of old with RETAIN 0 (§3.3.1-9).
- QoS 0 goes to connected clients only, and is dropped for one whose socket has `max_queued_bytes` waiting.
- QoS 1 and 2: at most `max_inflight` (and `max_queued_bytes`) unacknowledged at a client; what is more waits in
  the session's queue, in order, connected or not. What gives way in a full queue is `queue_full`'s to say. What is
  unacknowledged is sent again, with DUP and in the first order, when the client is back (§4.4.0-1), and
  never before (§4.4 forbids nothing else, and a retransmission on a living TCP connection helps nobody).
- What persistent sessions and the store of retained messages must keep over a crash is noted in the journal, and
  what promises it to a client waits for the disk: here PUBLISH and PUBREL of QoS 2 to a persistent session, since
  after a crash the same packet identifier must still mean the same message (§4.3.3, §4.4).
- Retained messages for a new subscription are read from the store as the socket takes them, not copied.
- The publisher's own messages come back to it if it subscribed to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from birthmark.broker.config import QueueFull
from birthmark.broker.packets import (
    SUBACK_FAILURE,
    Publish,
    as_duplicate,
    publish_head,
    pubrel,
    topic_field,
)
from birthmark.broker.retained import Retained, RetainedStore
from birthmark.broker.router import Router
from birthmark.broker.session import MAX_REMEMBERED_DECISIONS, Message, Outgoing, Session, Sessions

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.broker.config import Limits
    from birthmark.broker.counters import Counters
    from birthmark.broker.denials import Denials
    from birthmark.broker.journal import Journal
    from birthmark.broker.packets import Will
    from birthmark.broker.peer import Peer
    from birthmark.broker.policy import Policy

MAX_FILTER_LEVELS = 64
"""Each level of a filter is a node of the tree."""
MAX_FILTER_BYTES_PER_SUBSCRIPTION = 256
"""On average: a session's filters together have this times `max_subscriptions`."""
MAX_REMEMBERED_TOPIC_CHARACTERS = 512
REPLAY_WATER_BYTES = 65_536
"""Retained messages are added to a socket that has less than this waiting."""


class Exchange:
    """Routes, queues and retains.

    Args:
        policy: who may do what.
        limits: of sessions and stores.
        counters: counts.
        denials: says what was refused or dropped.
        journal: is told what must survive.
    """

    def __init__(
        self, policy: Policy, limits: Limits, counters: Counters, denials: Denials, journal: Journal
    ) -> None:
        self.policy = policy
        self.limits = limits
        self.counters = counters
        self.denials = denials
        self.journal = journal
        self.sessions = Sessions(limits.max_sessions)
        self.retained = RetainedStore(
            limits.max_retained_messages,
            limits.max_retained_bytes,
            limits.max_retained_messages_per_client,
            limits.max_retained_bytes_per_client,
        )
        self.queued_bytes = 0
        """What waits in all queues together."""
        self.router: Router[Session] = Router(_may_receive)
        self._hooks: dict[str, Callable[[str, bytes, Peer], None]] = {}
        self._max_waiting_bytes = limits.max_queued_bytes
        self._max_inflight = limits.max_inflight

    # --- the policy --------------------------------------------------------------------------------------

    def set_policy(self, policy: Policy) -> int:
        """Go by another policy from now on.

        Subscriptions that it does not allow are dropped, and so is what is queued and may no longer be received.

        Returns:
            How many subscriptions were dropped.
        """
        self.policy = policy
        dropped = 0
        for session in self.sessions:
            dropped += self.renew_rights(session)
        self.router.forget_routes()
        return dropped

    def renew_rights(self, session: Session) -> int:
        """Ask the policy anew about a session; return how many of its subscriptions were dropped."""
        session.set_rights(self.policy.rights(session.peer.device_id, session.peer.role))
        decisions = [(f, session.rights.subscribe(f)) for f in session.subscriptions]
        lost = [(topic_filter, decision) for topic_filter, decision in decisions if not decision.allowed]
        for topic_filter, decision in lost:
            self._drop_subscription(session, topic_filter)
            self.denials.denied(session.peer, "subscription", topic_filter, decision.rule)
        waiting = list(session.queue)
        session.queue.clear()
        for outgoing in waiting:
            if self._may_receive(session, outgoing.message.topic):
                session.queue.append(outgoing)
            else:
                self._unqueued(session, outgoing)
                self.journal.drop_delivery(outgoing)
        return len(lost)

    def take_up(self, session: Session) -> None:
        """Route to a session that comes from the store, as far as the policy allows it now."""
        for topic_filter, qos in session.subscriptions.items():
            self.router.subscribe(session, topic_filter, qos)
        for topic_filter in session.replaying:
            qos = session.subscriptions[topic_filter]
            for topic in self.retained.topics(topic_filter):
                session.replay[topic] = max(qos, session.replay.get(topic, 0))
        self.queued_bytes += session.queued_bytes
        self.renew_rights(session)

    def take_for_gateway(self, topic: str, callback: Callable[[str, bytes, Peer], None]) -> None:
        """Have what clients may publish on a topic (or below it, if it ends in `/`) given to the gateway alone."""
        self._hooks[topic] = callback
        for session in self.sessions:
            session.may_publish.clear()

    # --- publishing --------------------------------------------------------------------------------------

    def must_store(self, session: Session, packet: Publish) -> bool:
        """Whether a client's message may be acknowledged only with something about it on disk."""
        if packet.retain or (packet.qos == 2 and session.key):
            return True
        return any(granted and target.key for target, granted in self.router.route(packet.topic).targets)

    def accept(self, session: Session, packet: Publish) -> bool:
        """Take a client's message and send it on; return whether the policy allowed it."""
        verdict = session.may_publish.get(packet.topic)
        if verdict is None:
            verdict = self._decide_publish(session, packet.topic)
        if verdict is True:
            self.publish(packet.topic, packet.payload, packet.qos, retain=packet.retain, publisher=session.peer)
            return True
        if verdict is False:
            self.counters.publishes_denied += 1
            return False
        self.counters.messages_in += 1
        verdict(packet.topic, packet.payload, session.peer)
        return True

    def fire_will(self, session: Session, will: Will) -> None:
        """Publish a client's last will, if the policy (which may have changed) still allows it."""
        decision = session.rights.publish(will.topic)
        if not decision.allowed:
            self.counters.wills_denied += 1
            self.denials.denied(session.peer, "will", will.topic, decision.rule)
            return
        self.accept(session, Publish(will.topic, will.payload, will.qos, retain=will.retain))

    def publish(self, topic: str, payload: bytes, qos: int, *, retain: bool, publisher: Peer | None) -> None:
        """Retain and deliver a message that is allowed. `publisher` is None for the broker's own."""
        self.counters.messages_in += 1
        if retain:
            self.retain(Retained(topic, payload, qos, publisher))
        route = self.router.route(topic)
        if not route.targets:
            return
        frame: bytes | None = None
        message: Message | None = None
        max_waiting_bytes = self._max_waiting_bytes
        sent = 0
        for session, granted in route.targets:
            if granted == 0 or qos == 0:
                stream = session.stream
                if stream is None:
                    continue
                if stream.waiting_bytes > max_waiting_bytes:
                    self._drop_slow(session, topic)
                    continue
                if frame is None:
                    frame = publish_head(route.topic_bytes, len(payload), 0, retain=False) + payload
                stream.write(frame)
                sent += 1
            else:
                if message is None:
                    message = Message(topic, route.topic_bytes, payload, qos)
                self._send(session, message, min(granted, qos))
        self.counters.messages_out += sent

    def retain(self, message: Retained) -> None:
        """Retain a message in place of its topic's last one, as far as there is room."""
        if self.retained.put(message):
            self.journal.note_retained(message)
        else:
            self.counters.not_retained += 1
            self.denials.not_retained(message.topic)

    def _decide_publish(self, session: Session, topic: str) -> bool | Callable[[str, bytes, Peer], None]:
        decision = session.rights.publish(topic)
        verdict: bool | Callable[[str, bytes, Peer], None] = decision.allowed
        if decision.allowed:
            verdict = self._hook(topic) or True
        else:
            self.denials.denied(session.peer, "publish", topic, decision.rule)
        if len(topic) <= MAX_REMEMBERED_TOPIC_CHARACTERS:
            if len(session.may_publish) >= MAX_REMEMBERED_DECISIONS:
                session.may_publish.clear()
            session.may_publish[topic] = verdict
        return verdict

    def _hook(self, topic: str) -> Callable[[str, bytes, Peer], None] | None:
        for taken, callback in self._hooks.items():
            if topic == taken or (taken.endswith("/") and topic.startswith(taken)):
                return callback
        return None

    # --- delivering --------------------------------------------------------------------------------------

    def _send(self, session: Session, message: Message, qos: int) -> None:
        """Deliver at QoS 1 or 2: at once if there is room and nothing older waits."""
        outgoing = Outgoing(message, qos)
        if session.queue or not self._has_room(session):
            self._enqueue(session, outgoing)
        else:
            self._transmit(session, outgoing)

    def _has_room(self, session: Session) -> bool:
        stream = session.stream
        return (
            stream is not None
            and len(session.inflight) < self._max_inflight
            and session.inflight_bytes <= self._max_waiting_bytes
            and stream.waiting_bytes <= self._max_waiting_bytes
        )

    def _transmit(self, session: Session, outgoing: Outgoing) -> None:
        stream = session.stream
        if stream is None:
            return
        message, qos = outgoing.message, outgoing.qos
        packet_id = session.take_packet_id()
        session.inflight[packet_id] = outgoing
        session.inflight_bytes += message.size_bytes
        payload = message.payload
        head = publish_head(message.topic_bytes, len(payload), qos, retain=message.retain)
        frame = head + packet_id.to_bytes(2, "big") + payload
        if session.key:
            self.journal.note_delivery(session, outgoing, packet_id)
            if qos == 2:
                self.journal.send_after(stream, self.journal.recorded, frame)
            else:
                stream.write(frame)
        else:
            stream.write(frame)
        self.counters.messages_out += 1

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
            oldest = queue.popleft()
            self._unqueued(session, oldest)
            self.journal.drop_delivery(oldest)
            self.counters.dropped_queue_full += 1
            self.denials.dropped(session.peer, "its queue is full, the oldest go", oldest.message.topic)

    def _is_full(self, session: Session, messages: int, size_bytes: int) -> bool:
        """Whether a session's queue would be over a limit with so much more."""
        limits = self.limits
        return (
            len(session.queue) + messages > limits.max_queued_messages
            or session.queued_bytes + size_bytes > self._max_waiting_bytes
            or self.queued_bytes + size_bytes > limits.max_queued_bytes_total
        )

    def _find_no_room(self, session: Session, message: Message) -> None:
        self.counters.dropped_queue_full += 1
        self.denials.dropped(session.peer, "its queue is full, the newest go", message.topic)
        if self.limits.queue_full is QueueFull.DISCONNECT and session.connection is not None:
            session.connection.fall_behind()

    def _unqueued(self, session: Session, outgoing: Outgoing) -> None:
        session.queued_bytes -= outgoing.message.size_bytes
        self.queued_bytes -= outgoing.message.size_bytes

    def _drop_slow(self, session: Session, topic: str) -> None:
        self.counters.dropped_slow += 1
        self.denials.dropped(session.peer, "it reads too slowly for QoS 0", topic)

    def pump(self, session: Session) -> None:
        """Send what waits, as far as there is room: the queue first, then retained messages."""
        queue = session.queue
        while queue and self._has_room(session):
            outgoing = queue.popleft()
            self._unqueued(session, outgoing)
            self._transmit(session, outgoing)
        if session.replay:
            self._replay(session)

    def _replay(self, session: Session) -> None:
        stream = session.stream
        while stream is not None and session.replay and stream.waiting_bytes < REPLAY_WATER_BYTES:
            topic, granted = next(iter(session.replay.items()))
            found = self.retained.get(topic)
            if found is not None and self._may_receive(session, topic):
                qos = min(found.qos, granted)
                if qos and not (not session.queue and self._has_room(session)):
                    return
                topic_bytes = topic_field(topic)
                if qos:
                    message = Message(topic, topic_bytes, found.payload, qos, retain=True)
                    self._transmit(session, Outgoing(message, qos))
                else:
                    stream.write(publish_head(topic_bytes, len(found.payload), 0, retain=True) + found.payload)
                    self.counters.messages_out += 1
            del session.replay[topic]
        if session.replaying and not session.replay:
            self._replayed(session)

    def _replayed(self, session: Session) -> None:
        """Every retained message that was asked for has been sent, or is among those unacknowledged."""
        for topic_filter in session.replaying:
            qos = session.subscriptions.get(topic_filter)
            if qos is not None:
                self.journal.note_subscription(session, topic_filter, qos, is_replaying=False)
        session.replaying.clear()

    def _may_receive(self, session: Session, topic: str) -> bool:
        allowed = session.may_receive.get(topic)
        if allowed is None:
            if len(session.may_receive) >= MAX_REMEMBERED_DECISIONS:
                session.may_receive.clear()
            allowed = session.rights.receive(topic).allowed
            if len(topic) <= MAX_REMEMBERED_TOPIC_CHARACTERS:
                session.may_receive[topic] = allowed
        return allowed

    def acknowledged(self, session: Session, packet_id: int, qos: int) -> None:
        """PUBACK (QoS 1) or PUBCOMP (QoS 2) has come: the delivery is done (§4.3.2, §4.3.3)."""
        outgoing = session.inflight.get(packet_id)
        if outgoing is None or outgoing.qos != qos:
            return
        del session.inflight[packet_id]
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
        for packet_id, outgoing in session.inflight.items():
            if outgoing.is_released:
                self._send_in_state(session, pubrel(packet_id))
                continue
            message = outgoing.message
            head = publish_head(message.topic_bytes, len(message.payload), outgoing.qos, retain=message.retain)
            frame = as_duplicate(head) + packet_id.to_bytes(2, "big") + message.payload
            if outgoing.qos == 2:
                self._send_in_state(session, frame)
            else:
                stream.write(frame)
            self.counters.messages_out += 1
        self.pump(session)

    # --- subscribing -------------------------------------------------------------------------------------

    def subscribe(self, session: Session, filters: tuple[tuple[str, int], ...]) -> bytes:
        """Subscribe, as far as allowed; return the SUBACK's codes. Retained messages follow with `pump`."""
        codes = bytearray()
        for topic_filter, qos in filters:
            if not self._may_subscribe(session, topic_filter):
                codes.append(SUBACK_FAILURE)
                continue
            if topic_filter not in session.subscriptions:
                session.filter_bytes += len(topic_filter)
            session.subscriptions[topic_filter] = qos
            self.router.subscribe(session, topic_filter, qos)
            found = self.retained.topics(topic_filter)
            for topic in found:
                session.replay[topic] = max(qos, session.replay.get(topic, 0))
            if session.key:
                self.journal.note_subscription(session, topic_filter, qos, is_replaying=bool(found and qos))
                if found and qos:
                    session.replaying.add(topic_filter)
            codes.append(qos)
        return bytes(codes)

    def unsubscribe(self, session: Session, filters: tuple[str, ...]) -> None:
        """Unsubscribe (§3.10.4)."""
        for topic_filter in filters:
            if topic_filter in session.subscriptions:
                self._drop_subscription(session, topic_filter)

    def forget(self, session: Session) -> None:
        """End a session, with all that it holds."""
        if session.key:
            self.journal.drop_session(session)
        for topic_filter in list(session.subscriptions):
            self._drop_subscription(session, topic_filter)
        self.queued_bytes -= session.queued_bytes
        session.queue.clear()
        session.inflight.clear()
        session.incoming.clear()
        session.replay.clear()
        session.replaying.clear()
        session.queued_bytes = session.inflight_bytes = 0
        self.sessions.remove(session)

    def _may_subscribe(self, session: Session, topic_filter: str) -> bool:
        decision = session.rights.subscribe(topic_filter)
        if not decision.allowed:
            self.counters.subscribes_denied += 1
            self.denials.denied(session.peer, "subscribe", topic_filter, decision.rule)
            return False
        is_new = topic_filter not in session.subscriptions
        limit = self.limits.max_subscriptions
        if (
            topic_filter.count("/") >= MAX_FILTER_LEVELS
            or (is_new and len(session.subscriptions) >= limit)
            or (is_new and session.filter_bytes + len(topic_filter) > limit * MAX_FILTER_BYTES_PER_SUBSCRIPTION)
        ):
            self.counters.subscribes_denied += 1
            rule = f"a session has at most {limit} filters, and each at most {MAX_FILTER_LEVELS} levels"
            self.denials.denied(session.peer, "subscribe", topic_filter, rule)
            return False
        return True

    def _drop_subscription(self, session: Session, topic_filter: str) -> None:
        del session.subscriptions[topic_filter]
        session.filter_bytes -= len(topic_filter)
        if session.key:
            session.replaying.discard(topic_filter)
            self.journal.drop_subscription(session, topic_filter)
        self.router.unsubscribe(session, topic_filter)


def _may_receive(session: Session, topic: str) -> bool:
    return session.rights.receive(topic).allowed
