"""Messages from those who publish to those who subscribed, by the policy (MQTT 3.1.1 §3.3, §3.8, §4.3 to §4.6).

Rules:

- Every publish, subscription, will, retained message and delivery is decided by the policy. Decisions are
  remembered (in the session, in the routes) and forgotten when the policy changes.
- A message is delivered at the lower of its QoS and the QoS granted, once to each session however many of its
  filters match; to a session of old with RETAIN 0 (§3.3.1-9).
- QoS 0 goes to connected clients only, and is dropped for one whose socket has `max_queued_bytes` waiting.
- What becomes of QoS 1 and 2 at each session is `outbound.py`'s business.
- What persistent sessions and the store of retained messages must keep over a crash is noted in the journal.
- The publisher's own messages come back to it if it subscribed to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from birthmark.broker.claim import rights_of
from birthmark.broker.filters import matches
from birthmark.broker.outbound import MAX_REMEMBERED_TOPIC_CHARACTERS, Outbound
from birthmark.broker.packets import SUBACK_FAILURE, Publish, publish_frame
from birthmark.broker.policy import Decision
from birthmark.broker.retained import Retained, RetainedStore
from birthmark.broker.router import Router
from birthmark.broker.session import MAX_REMEMBERED_DECISIONS, Message, Session, Sessions
from birthmark.device.topics import is_of_gateway, is_said_by_gateway

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.broker.config import Limits
    from birthmark.broker.counters import Counters
    from birthmark.broker.denials import Denials
    from birthmark.broker.journal import Journal
    from birthmark.broker.packets import PublishRun, Will
    from birthmark.broker.peer import Peer
    from birthmark.broker.policy import Policy
    from birthmark.broker.upstream.upstreams import Upstreams

MAX_FILTER_LEVELS = 64
"""Each level of a filter is a node of the tree."""
MAX_FILTER_BYTES_PER_SUBSCRIPTION = 256
"""On average: a session's filters together have this times `max_subscriptions`."""


class Exchange:
    """Routes and retains.

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
        self.outbound = Outbound(limits, counters, denials, journal, self.retained)
        self.router: Router[Session] = Router(_may_receive)
        self.uplinks: Upstreams | None = None
        """Where messages go up; None where there is no upstream."""
        self.gateway = ""
        """Whose name it is in which no other gateway may speak; while there is none, nobody may in any."""
        self._hooks: dict[str, Callable[[str, bytes, Peer], None]] = {}
        self._max_waiting_bytes = limits.max_queued_bytes

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
        session.set_rights(rights_of(self.policy, session.peer))
        decisions = [(f, session.rights.subscribe(f)) for f in session.subscriptions]
        lost = [(topic_filter, decision) for topic_filter, decision in decisions if not decision.allowed]
        for topic_filter, decision in lost:
            self._drop_subscription(session, topic_filter)
            self.denials.denied(session.peer, "subscription", topic_filter, decision.rule)
        self.outbound.drop_forbidden(session)
        return len(lost)

    def take_up(self, session: Session) -> None:
        """Route to a session that comes from the store, as far as the policy allows it now."""
        for topic_filter, qos in session.subscriptions.items():
            self.router.subscribe(session, topic_filter, qos)
        self.outbound.take_up(session)
        self.renew_rights(session)

    def take_for_gateway(self, topic_filter: str, callback: Callable[[str, bytes, Peer], None]) -> None:
        """Have what clients may publish on the topics of a filter given to the gateway alone."""
        self._hooks[topic_filter] = callback
        for session in self.sessions:
            session.may_publish.clear()

    # --- publishing --------------------------------------------------------------------------------------

    def must_store(self, session: Session, topic: str, qos: int, *, retain: bool) -> bool:
        """Whether a client's message may be acknowledged only with something about it on disk."""
        if retain or (qos == 2 and session.key):
            return True
        if self.uplinks is not None and self.uplinks.takes(topic, session.peer):
            return True
        return any(granted and target.key for target, granted in self.router.route(topic).targets)

    def accept_run(self, session: Session, run: PublishRun) -> bool:
        """Take a client's messages and send them on; return whether the policy allowed them."""
        topic, qos, payloads, _, frames = run
        verdict = session.may_publish.get(topic)
        if verdict is None:
            verdict = self._decide_publish(session, topic)
        if verdict is True:
            self._deliver(topic, payloads, qos, frames, session.peer)
        elif verdict is False:
            self.counters.publishes_denied += len(payloads)
        else:
            for payload in payloads:
                if session.connection is None:
                    break  # what the gateway took from it has ended it
                self.counters.messages_in += 1
                verdict(topic, payload, session.peer)
        return verdict is not False

    def accept(self, session: Session, packet: Publish) -> bool:
        """Take a client's message, which may be to be retained, and send it on; as `accept_run`."""
        verdict = session.may_publish.get(packet.topic)
        if verdict is None:
            verdict = self._decide_publish(session, packet.topic)
        if verdict is True and packet.retain and session.peer.for_renewal:
            verdict = False  # a request to renew is for now: nothing of it stays here
        if verdict is True:
            self.publish(packet.topic, packet.payload, packet.qos, retain=packet.retain, publisher=session.peer)
        elif verdict is False:
            self.counters.publishes_denied += 1
        else:
            self.counters.messages_in += 1
            verdict(packet.topic, packet.payload, session.peer)
        return verdict is not False

    def fire_will(self, session: Session, will: Will) -> None:
        """Publish a client's last will, if the policy (which may have changed) still allows it."""
        decision = session.rights.publish(will.topic)
        if not decision.allowed:
            self.counters.wills_denied += 1
            self.denials.denied(session.peer, "will", will.topic, decision.rule)
            return
        self.accept(session, Publish(will.topic, will.payload, will.qos, retain=will.retain))

    def publish(self, topic: str, payload: bytes, qos: int, *, retain: bool, publisher: Peer | None) -> None:
        """Retain and deliver a message that is allowed; `publisher` is None for the broker's own."""
        if retain:
            self.retain(Retained(topic, payload, qos, publisher))
        self._deliver(topic, [payload], qos, [], publisher, retain=retain)

    def _deliver(
        self,
        topic: str,
        payloads: list[bytes],
        qos: int,
        frames: list[bytes],
        publisher: Peer | None,
        *,
        retain: bool = False,
    ) -> None:
        """Send messages of one topic to whom it goes; `frames` are their PUBLISHes of QoS 0, if there are any."""
        count = len(payloads)
        self.counters.messages_in += count
        route = self.router.route(topic)
        targets = route.targets
        messages: list[Message] = []
        if self.uplinks is not None:
            messages = self.uplinks.forward(topic, payloads, qos, retain=retain, publisher=publisher)
            targets = self.uplinks.within(targets, publisher)
        if not targets:
            return
        joined = b""
        max_waiting_bytes = self._max_waiting_bytes
        sent = 0
        for session, granted in targets:
            if granted and qos:
                if not messages:
                    messages = [Message(topic, route.topic_bytes, payload, qos) for payload in payloads]
                self.outbound.send(session, messages, min(granted, qos))
                continue
            stream = session.stream
            if stream is None:
                continue
            if stream.waiting_bytes > max_waiting_bytes:
                self.outbound.drop_slow(session, topic, count)
                continue
            if not joined:
                joined = b"".join(frames or [publish_frame(route.topic_bytes, payload) for payload in payloads])
            stream.write(joined)
            sent += count
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
        is_ours = not self.gateway or is_of_gateway(topic, self.gateway)
        if decision.allowed and is_ours and is_said_by_gateway(topic):
            decision = Decision(allowed=False, rule="what this gateway says of itself is the broker's alone")
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

    def give_to_gateway(self, topic: str, payload: bytes, publisher: Peer) -> bool:
        """Give a message to the gateway itself, if it is one of those that it takes; return whether it is."""
        hook = self._hook(topic)
        if hook is None:
            return False
        self.counters.messages_in += 1
        hook(topic, payload, publisher)
        return True

    def _hook(self, topic: str) -> Callable[[str, bytes, Peer], None] | None:
        for taken, callback in self._hooks.items():
            if matches(taken, topic):
                return callback
        return None

    # --- subscribing -------------------------------------------------------------------------------------

    def subscribe(self, session: Session, filters: tuple[tuple[str, int], ...]) -> bytes:
        """Subscribe, as far as allowed; return the SUBACK's codes. Retained messages follow with `pump`.

        Of one packet as many filters are looked at as a session may have: one of a mebibyte holds a quarter of a
        million, and all others would wait for what is decided and looked up for each.
        """
        codes, limit = bytearray(), self.limits.max_subscriptions
        if len(filters) > limit:
            self._refuse_subscription(session, filters[limit][0], len(filters) - limit)
        for topic_filter, qos in filters[:limit]:
            if not self._may_subscribe(session, topic_filter):
                codes.append(SUBACK_FAILURE)
                continue
            if topic_filter not in session.subscriptions:
                session.filter_bytes += len(topic_filter)
            session.subscriptions[topic_filter] = qos
            self.router.subscribe(session, topic_filter, qos)
            is_replaying = self.outbound.replay(session, topic_filter, qos) and qos > 0
            if session.key:
                self.journal.note_subscription(session, topic_filter, qos, is_replaying=is_replaying)
                if is_replaying:
                    session.replaying.add(topic_filter)
            codes.append(qos)
        return bytes(codes).ljust(len(filters), bytes((SUBACK_FAILURE,)))

    def unsubscribe(self, session: Session, filters: tuple[str, ...]) -> None:
        """Unsubscribe (§3.10.4)."""
        for topic_filter in filters:
            if topic_filter in session.subscriptions:
                self._drop_subscription(session, topic_filter)

    def send_away(self, session: Session) -> None:
        """Owe a session nothing new: its client is elsewhere, and gets there what is said from now on."""
        session.is_away = True
        for topic_filter in session.subscriptions:
            self.router.unsubscribe(session, topic_filter)

    def come_back(self, session: Session) -> None:
        """Go on with a session that was sent away."""
        session.is_away = False
        for topic_filter, qos in session.subscriptions.items():
            self.router.subscribe(session, topic_filter, qos)

    def forget(self, session: Session) -> None:
        """End a session, with all that it holds."""
        if session.key:
            self.journal.drop_session(session)
        for topic_filter in list(session.subscriptions):
            self._drop_subscription(session, topic_filter)
        self.outbound.clear(session)
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
            self._refuse_subscription(session, topic_filter)
            return False
        return True

    def _refuse_subscription(self, session: Session, topic_filter: str, count: int = 1) -> None:
        """Count and log what is beyond the limits of a session, by one of the filters."""
        self.counters.subscribes_denied += count
        limit = self.limits.max_subscriptions
        rule = f"a session has at most {limit} filters, and each at most {MAX_FILTER_LEVELS} levels"
        self.denials.denied(session.peer, "subscribe", topic_filter, rule)

    def _drop_subscription(self, session: Session, topic_filter: str) -> None:
        del session.subscriptions[topic_filter]
        session.filter_bytes -= len(topic_filter)
        if session.key:
            session.replaying.discard(topic_filter)
            self.journal.drop_subscription(session, topic_filter)
        self.router.unsubscribe(session, topic_filter)


def _may_receive(session: Session, topic: str) -> bool:
    return session.rights.receive(topic).allowed
