"""Whatever happens, the store says what memory says: random histories of sessions, restored and compared.

Each step is one that a client, the policy or a revocation can cause. After any of them a broker started from what
was noted must know the same sessions, in the same state and order, and the same retained messages.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from birthmark.broker.claim import claim_session
from birthmark.broker.config import Durability, Limits, QueueFull
from birthmark.broker.counters import Counters
from birthmark.broker.delivery import Exchange
from birthmark.broker.denials import Denials
from birthmark.broker.eviction import close_identities
from birthmark.broker.journal import Journal
from birthmark.broker.peer import Peer
from birthmark.broker.policy_file import parse_policy
from birthmark.broker.records import Changes, Stored
from birthmark.broker.restore import restore
from birthmark.device.identity import DeviceId, Role

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.broker.session import Outgoing, Session

WHEN = datetime(2026, 1, 1, tzinfo=UTC)
TOPICS = ("a", "a/b", "c", "devices/s-1/status")
WIDE = parse_policy(
    b'[roles.device]\npublish = ["#"]\nsubscribe = ["#"]\n[[assignments]]\nou = "device"\nrole = "device"\n',
    "wide",
)
NARROW = parse_policy(
    b'[roles.device]\npublish = ["#"]\nsubscribe = ["a/#"]\n[[assignments]]\nou = "device"\nrole = "device"\n', "n"
)
PEERS = {
    name: Peer(
        DeviceId(name),
        Role("device"),
        is_service=False,
        issuer="a",
        cert_serial=1,
        not_before=WHEN,
        not_after=WHEN,
    )
    for name in ("s-1", "s-2", "s-3")
}

NAMES = st.sampled_from(sorted(PEERS))
QOS = st.sampled_from((2, 1, 0))
PUBLISH = st.tuples(
    st.just("publish"), NAMES, st.sampled_from(TOPICS), QOS, st.booleans(), st.binary(min_size=1, max_size=3)
)
STEPS = st.one_of(
    # What makes work comes more often than what ends it.
    PUBLISH,
    PUBLISH,
    PUBLISH,
    st.tuples(st.just("connect"), NAMES, st.booleans()),
    st.tuples(st.just("leave"), NAMES),
    st.tuples(st.just("subscribe"), NAMES, st.sampled_from(("a", "a/#", "#", "+")), QOS),
    st.tuples(st.just("unsubscribe"), NAMES, st.sampled_from(("a", "a/#", "#", "+"))),
    st.tuples(st.just("publish"), NAMES, st.sampled_from(TOPICS), st.just(1), st.just(value=True), st.just(b"")),
    st.tuples(st.just("acknowledge"), NAMES, st.integers(0, 1)),
    st.tuples(st.just("received"), NAMES, st.integers(0, 1)),
    st.tuples(st.just("policy"), st.sampled_from((WIDE, NARROW))),
    st.tuples(st.just("revoke"), NAMES),
    st.tuples(st.just("forget"), NAMES),
)


class Stream:
    """A socket that takes everything, and a connection that can be taken over."""

    waiting_bytes = 0

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave

    def write(self, data: bytes) -> None:
        assert data

    def hold(self, number: int, data: bytes) -> None:
        assert number
        assert data

    def taken_over(self, address: str) -> None:
        del address
        self._leave()


class World:
    """An exchange whose journal is read at once, instead of by a thread."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.rows = Changes()
        self.exchange, self.journal = self.start(Stored(), WIDE)

    def start(self, stored: Stored, policy: Any) -> tuple[Exchange, Journal]:
        counters = Counters()
        journal = Journal(asyncio.new_event_loop(), Durability.ACKNOWLEDGED, counters)
        journal._loop.close()
        journal._schedule = lambda: None  # type: ignore[method-assign]
        journal.is_open = True
        journal._last_session = max((row.key for row in stored.sessions), default=0)
        exchange = Exchange(policy, self.limits, counters, Denials(lambda: 0.0), journal)
        restore(exchange, stored, now_s=0.0, wall_s=0.0)
        return exchange, journal

    def write(self) -> None:
        """What the writer does: take the group, and make it the last word."""
        self.rows.add(self.journal._changes)
        self.journal._changes = Changes()
        self.journal._last_stored_message = self.journal._last_message
        self.journal._last_stored_delivery = self.journal._last_delivery

    def stored(self) -> Stored:
        tables = [[row for row in table.values() if row is not None] for table in self.rows.tables()]
        stored = Stored(*tables)
        stored.deliveries.sort()
        return stored

    def step(self, what: str, *arguments: Any) -> None:
        getattr(self, what)(*arguments)

    # --- what can happen ---------------------------------------------------------------------------------

    def connect(self, name: str, clean: bool) -> None:
        session, _ = claim_session(self.exchange, name, PEERS[name], clean=clean, address="")
        assert session is not None
        stream: Any = Stream(lambda: self.leave(name))
        session.stream = session.connection = stream
        self.exchange.outbound.resume(session)

    def leave(self, name: str) -> None:
        session = self.exchange.sessions.get(name)
        if session is None or session.stream is None:
            return
        session.stream = session.connection = None
        if session.clean:
            self.exchange.forget(session)
        else:
            self.journal.note_session(session, left_at=1.0)

    def subscribe(self, name: str, topic_filter: str, qos: int) -> None:
        if (session := self._connected(name)) is not None:
            self.exchange.subscribe(session, ((topic_filter, qos),))
            self.exchange.outbound.pump(session)

    def unsubscribe(self, name: str, topic_filter: str) -> None:
        if (session := self._connected(name)) is not None:
            self.exchange.unsubscribe(session, (topic_filter,))

    def publish(self, name: str, topic: str, qos: int, retain: bool, payload: bytes) -> None:
        self.exchange.publish(topic, payload, qos, retain=retain, publisher=PEERS[name])

    def acknowledge(self, name: str, index: int) -> None:
        session = self._connected(name)
        if session is not None and index < len(session.inflight):
            packet_id = list(session.inflight)[index]
            self.exchange.outbound.acknowledged(session, [packet_id], session.inflight[packet_id].qos)

    def received(self, name: str, index: int) -> None:
        session = self._connected(name)
        if session is not None and index < len(session.inflight):
            self.exchange.outbound.received(session, list(session.inflight)[index])

    def policy(self, policy: Any) -> None:
        self.exchange.set_policy(policy)

    def revoke(self, name: str) -> None:
        self.leave(name)
        close_identities(self.exchange, [], lambda peer: str(peer.device_id) == name, 0.0)

    def forget(self, name: str) -> None:
        session = self.exchange.sessions.get(name)
        if session is not None and session.stream is None:
            self.exchange.forget(session)

    def _connected(self, name: str) -> Session | None:
        session = self.exchange.sessions.get(name)
        return session if session is not None and session.stream is not None else None


def seen(outgoing: Outgoing) -> tuple[Any, ...]:
    message = outgoing.message
    return message.topic, message.payload, message.retain, outgoing.qos, outgoing.is_released, message.owed


def knowledge(exchange: Exchange) -> dict[str, Any]:
    """What a broker knows of persistent sessions and retained messages."""
    known: dict[str, Any] = {
        session.client_id: {
            "subscriptions": session.subscriptions,
            "filter_bytes": session.filter_bytes,
            "inflight": [(packet_id, *seen(outgoing)) for packet_id, outgoing in session.inflight.items()],
            "inflight_bytes": session.inflight_bytes,
            "queue": [seen(outgoing) for outgoing in session.queue],
            "queued_bytes": session.queued_bytes,
            "replaying": session.replaying,
        }
        for session in exchange.sessions
        if not session.clean
    }
    known["retained"] = {(r.topic, r.payload, r.qos, r.publisher) for r in exchange.retained}
    known["routes"] = {
        topic: {(s.client_id, qos) for s, qos in exchange.router.route(topic).targets if not s.clean}
        for topic in TOPICS
    }
    return known


@given(
    st.lists(st.tuples(STEPS, st.booleans()), min_size=12, max_size=60),
    st.sampled_from((QueueFull.DROP_OLDEST, QueueFull.DROP_NEWEST)),
)
@settings(max_examples=150, deadline=None)
def test_what_was_noted_is_what_is_known(
    history: list[tuple[tuple[Any, ...], bool]], queue_full: QueueFull
) -> None:
    world = World(Limits(max_inflight=2, max_queued_messages=3, queue_full=queue_full))
    for name in ("s-1", "s-2"):
        world.connect(name, clean=False)
        world.subscribe(name, "#", 2)
    for step, is_written in history:
        world.step(*step)
        if is_written:
            world.write()
    world.write()
    stored = world.stored()
    restored, _ = world.start(stored, world.exchange.policy)
    assert knowledge(restored) == knowledge(world.exchange)
    # Nothing on disk is owed to nobody.
    assert {row.key for row in stored.messages} == {row.message for row in stored.deliveries}
    known = {row.key for row in stored.sessions}
    assert {delivery.session for delivery in stored.deliveries} <= known
    assert {subscription.session for subscription in stored.subscriptions} <= known
