"""What waits to go up an upstream: a persistent session of the broker's own, in its store like any other's.

Rules:

- A message for the upstream is in the store before its publisher's PUBACK, and until the upstream has
  acknowledged it: what holds for a persistent session (`outbound.py`, `journal.py`) holds for the spool, the code
  being the same.
- QoS 2 goes at 1, and so does what is retained, which is a state and must not be missed. The rest of QoS 0 goes
  at 0 while the link is up, and is not spooled.
- A message that ends the connection whenever it is sent would keep all others back for ever (RabbitMQ has no other
  way to refuse one). After connections in vain the spool is *careful*: what is unacknowledged goes one by one. The
  one over which a connection ends again and again is set aside: dropped, counted, named (`upstream.py` judges).
- It is bounded by messages and bytes (`spool_messages`, `spool_bytes`). With "hold" publishers are stopped from
  `HOLD_AT` of it on, until it has fallen to `GO_ON_AT`; what they have sent by then finds room. What comes from
  nobody who could be stopped (wills, the gateway's own) is dropped when it is really full, as with "drop_newest".
- A retained message that was dropped for want of room leaves a wrong state above. Its topic is owed: once all that
  waits has gone, what is retained on it by then goes up, or an empty message if that is nothing. What is owed is
  bounded as the store of retained messages is; after a restart all that is retained under its filter goes up.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from birthmark.broker.config import QueueFull
from birthmark.broker.outbound import REPLAY_WATER_BYTES, Outbound
from birthmark.broker.packets import as_duplicate, publish_frame, topic_field
from birthmark.broker.peer import upstream_peer
from birthmark.broker.policy import Rights
from birthmark.broker.retained import LEVEL_OVERHEAD_BYTES
from birthmark.broker.session import Message, Session
from birthmark.broker.upstream.settings import SpoolFull

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from birthmark.broker.delivery import Exchange
    from birthmark.broker.peer import Peer
    from birthmark.broker.session import Outgoing
    from birthmark.broker.upstream.settings import UpstreamSettings

CLIENT_ID_PREFIX = "$upstream/"
"""No client has an id with a dollar or a slash in it."""
WINDOW_BYTES = 4_194_304
"""On their way to the upstream, unacknowledged: so much, and one message."""
_DOWN = "$down/"
"""Before a filter that is subscribed to at the upstream; the session's own filters never begin with a dollar."""
OVERHEAD_BYTES = 1_024
"""More than a message counts beside its payload, unless its topic is very long."""
HOLD_AT = 0.875
GO_ON_AT = 0.75


def _owed_size(topic: str) -> int:
    """What an owed topic counts: less than a message that is retained on it."""
    return len(topic) + LEVEL_OVERHEAD_BYTES


class Spool(Outbound):
    """Sends to one upstream.

    Args:
        settings: the upstream's.
        exchange: the broker's.
        filling: all spools that have no room for long; this one puts itself in, and takes itself out.

    Attributes:
        on_room: called when it has room again.
    """

    def __init__(self, settings: UpstreamSettings, exchange: Exchange, filling: set[Spool]) -> None:
        limits = replace(
            exchange.limits,
            max_inflight=settings.max_inflight,
            max_queued_messages=settings.spool_messages,
            max_queued_bytes=settings.spool_bytes,
            max_queued_bytes_total=settings.spool_bytes,
            queue_full=QueueFull.DROP_OLDEST
            if settings.spool_full is SpoolFull.DROP_OLDEST
            else QueueFull.DROP_NEWEST,
        )
        super().__init__(limits, exchange.counters, exchange.denials, exchange.journal, exchange.retained)
        self._max_waiting_bytes = WINDOW_BYTES
        self._mapping = settings.mapping
        self._transit = settings.transit
        self._max_payload_bytes = settings.max_payload_bytes
        self.holds = settings.spool_full is SpoolFull.HOLD
        """Whether publishers are stopped rather than anything dropped."""
        peer = upstream_peer(settings.name)
        client_id = f"{CLIENT_ID_PREFIX}{settings.name.folded}"
        self.session = Session(client_id, peer, Rights(peer.device_id, None, "an upstream"), clean=False)
        self._filling = filling
        self.on_room: Callable[[], None] = lambda: None
        self._emptied: asyncio.Future[None] | None = None
        self._owed: set[str] = set()
        """Topics, of those in `session.replay`, of which something retained was dropped."""
        self._owed_bytes = 0
        self._max_owed_bytes = limits.max_retained_bytes + limits.max_queued_bytes
        self.is_careful = False
        """One message at a time, and none of QoS 0."""
        self.forwarded = 0
        """Messages that the upstream has acknowledged."""
        self.dropped = 0
        """Messages that did not go up: no room in the spool, or of QoS 0 and no link."""

    @property
    def peer(self) -> Peer:
        """Who the upstream is, as a publisher."""
        return self.session.peer

    def adopt(self, session: Session) -> None:
        """Go on with what the store has kept."""
        session.rights = self.session.rights
        self.session = session
        self.queued_bytes = session.queued_bytes
        for topic_filter in session.replaying:
            self.replay(session, topic_filter, 1)
        self._look_for_room()

    async def emptied(self) -> None:
        """Wait until the upstream has acknowledged everything."""
        if self.session.waiting_count:
            self._emptied = asyncio.get_running_loop().create_future()
            await self._emptied

    # --- what goes in ------------------------------------------------------------------------------------

    def takes_from(self, publisher: Peer | None) -> bool:
        """Whether what somebody publishes goes up: not what came down, nor another gateway's but in a tree."""
        if publisher is None or not publisher.is_service:
            return True
        return not publisher.is_upstream and (self._transit or not publisher.is_gateway)

    def take(
        self, topic: str, topic_bytes: bytes, payloads: list[bytes], qos: int, *, retain: bool
    ) -> list[Message]:
        """Take messages under their name at the upstream; return those that are kept."""
        if max(map(len, payloads)) > self._max_payload_bytes:
            payloads = self._short_enough(topic, payloads)
        if qos or retain:
            messages = [Message(topic, topic_bytes, payload, qos or 1, retain=retain) for payload in payloads]
            self.send(self.session, messages, 1)
            return messages
        self._send_once(topic, [publish_frame(topic_bytes, payload) for payload in payloads])
        return []

    def _short_enough(self, topic: str, payloads: list[bytes]) -> list[bytes]:
        found = [payload for payload in payloads if len(payload) <= self._max_payload_bytes]
        self._count_dropped(len(payloads) - len(found))
        self.denials.dropped(self.peer, "more than max_payload_bytes", topic)
        return found

    def _send_once(self, topic: str, frames: list[bytes]) -> None:
        """Send PUBLISHes of QoS 0 now, or never."""
        stream = self.session.stream
        if stream is None or self.is_careful:
            self._count_dropped(len(frames))
        elif stream.waiting_bytes > self._max_waiting_bytes:
            self._count_dropped(len(frames))
            self.drop_slow(self.session, topic, len(frames))
        else:
            stream.write(b"".join(frames))
            self.counters.messages_out += len(frames)

    def may_receive(self, session: Session, topic: str) -> bool:
        """Everything here was chosen by `broker.toml`."""
        del session, topic
        return True

    @property
    def is_full(self) -> bool:
        """Whether nothing more finds room."""
        return self._is_beyond(1.0)

    @property
    def is_filling(self) -> bool:
        """Whether it has been nearly full, and has not much room again."""
        return self in self._filling

    def has_room_for(self, payloads: list[bytes]) -> bool:
        """Whether it takes so much without having to stop anybody."""
        limits, session, count = self.limits, self.session, len(payloads)
        return not self.holds or (
            len(session.queue) + count < limits.max_queued_messages * HOLD_AT
            and session.queued_bytes + sum(map(len, payloads)) + count * OVERHEAD_BYTES
            < limits.max_queued_bytes * HOLD_AT
        )

    def _is_beyond(self, fraction: float) -> bool:
        limits, session = self.limits, self.session
        return (
            len(session.queue) >= limits.max_queued_messages * fraction
            or session.queued_bytes >= limits.max_queued_bytes * fraction
        )

    def _look_for_room(self) -> None:
        if self not in self._filling:
            if self._is_beyond(HOLD_AT):
                self._filling.add(self)
        elif not self._is_beyond(GO_ON_AT):
            self._filling.discard(self)
            self.on_room()

    def _count_dropped(self, count: int = 1) -> None:
        self.dropped += count
        self.counters.upstream_dropped += count

    def _enqueue(self, session: Session, outgoing: Outgoing) -> None:
        super()._enqueue(session, outgoing)
        self._look_for_room()

    def _find_no_room(self, session: Session, message: Message) -> None:
        super()._find_no_room(session, message)
        self._has_given_way(message)

    def _drop_oldest(self, session: Session) -> Message:
        message = super()._drop_oldest(session)
        self._has_given_way(message)
        return message

    def _has_given_way(self, message: Message) -> None:
        self._count_dropped()
        if message.retain:
            self._owe(message.topic)

    # --- states that are owed ------------------------------------------------------------------------------

    def _owe(self, remote: str) -> None:
        """Have the state of a topic, by its name at the upstream, sent when there is room."""
        session, known = self.session, self._mapping.sent_as(remote)
        if known is None:
            return  # it was let in under settings that are no more
        topic, topic_filter = known
        session.replay.setdefault(topic, 1)
        if topic not in self._owed:
            self._owed.add(topic)
            self._owed_bytes += _owed_size(topic)
            if self._owed_bytes > self._max_owed_bytes:
                self._owe_no_more_than_is_retained()
        if session.key and topic_filter in session.subscriptions and topic_filter not in session.replaying:
            session.replaying.add(topic_filter)
            self._note(topic_filter, is_replaying=True)

    def _owe_no_more_than_is_retained(self) -> None:
        """Give up topics on which nothing is retained: of the others there are only so many."""
        for topic in [topic for topic in self._owed if self.retained.get(topic) is None]:
            self._settle(topic)
            self.denials.dropped(self.peer, "too many states are owed, those cleared here stay there", topic)

    def _settle(self, topic: str) -> bool:
        """Send the state of a topic no more; return whether it was owed."""
        self.session.replay.pop(topic, None)
        if topic not in self._owed:
            return False
        self._owed.remove(topic)
        self._owed_bytes -= _owed_size(topic)
        return True

    def _settle_what_waits(self) -> None:
        """What waits is newer than what was dropped: its topics are right when it has gone."""
        for outgoing in self.session.queue if self._owed else ():
            known = self._mapping.sent_as(outgoing.message.topic) if outgoing.message.retain else None
            if known is not None and known[0] in self._owed:
                self._settle(known[0])

    # --- what goes out -----------------------------------------------------------------------------------

    def be_careful(self, *, careful: bool) -> None:
        """Send one message at a time, or as many as there is room for."""
        self.is_careful = careful
        self._max_inflight = 0 if careful else self.limits.max_inflight

    def resume(self, session: Session) -> None:
        """Send again what has not been acknowledged; if we are careful, the first of it alone."""
        if self.is_careful:
            self._send_next(session)
        else:
            super().resume(session)

    def _send_next(self, session: Session) -> None:
        stream = session.stream
        for packet_id, outgoing in session.inflight.items():
            if stream is not None:
                message = outgoing.message
                stream.write(as_duplicate(message.head(1)) + packet_id.to_bytes(2, "big") + message.payload)
                self.counters.messages_out += 1
            return
        self.be_careful(careful=False)
        self.pump(session)

    def set_aside(self) -> Message | None:
        """Drop the first of what is unacknowledged; return it."""
        session = self.session
        for packet_id, outgoing in session.inflight.items():
            del session.inflight[packet_id]
            session.inflight_bytes -= outgoing.message.size_bytes
            self.journal.drop_delivery(outgoing)
            self._count_dropped()
            return outgoing.message
        return None

    def pump(self, session: Session) -> None:
        """Send what waits, as far as there is room."""
        super().pump(session)
        if self._filling:
            self._look_for_room()

    def acknowledged(self, session: Session, packet_ids: Sequence[int], qos: int) -> None:
        """PUBACKs have come from the upstream."""
        count = len(session.inflight.keys() & packet_ids)
        self.forwarded += count
        self.counters.upstream_forwarded += count
        super().acknowledged(session, packet_ids, qos)
        if self.is_careful:
            self._send_next(session)
        if self._emptied is not None and not self._emptied.done() and not session.waiting_count:
            self._emptied.set_result(None)

    def begin(self, *, is_known: bool) -> None:
        """Prepare for an upstream that has let us in; `is_known`: it has kept our session.

        What goes up are the session's subscriptions here. As with any subscription, the retained messages of a new
        one follow it, once; if the upstream has forgotten us, of all.
        """
        session, wanted = self.session, dict.fromkeys(passage.local for passage in self._mapping.up)
        for topic_filter in [found for found in session.subscriptions if not found.startswith("$")]:
            if topic_filter not in wanted:
                self._forget(topic_filter)
        for topic_filter in wanted:
            if not is_known or topic_filter not in session.subscriptions:
                is_replaying = self.replay(session, topic_filter, 1)
                self._note(topic_filter, is_replaying=is_replaying)
                if is_replaying and session.key:
                    session.replaying.add(topic_filter)
        if self.limits.queue_full is QueueFull.DROP_OLDEST:
            self._settle_what_waits()
        if session.replaying and not session.replay:
            self._replayed(session)

    def _replay(self, session: Session) -> None:
        """Send retained messages as they are at this moment, as far as there is room, behind all that waits."""
        replay = session.replay
        while replay and session.stream is not None and session.stream.waiting_bytes < REPLAY_WATER_BYTES:
            if session.queue or not self._has_room(session):
                return
            topic = next(iter(replay))
            is_owed = self._settle(topic)
            found, remote = self.retained.get(topic), self._mapping.to_remote(topic)
            if remote is None or (found is None and not is_owed):
                continue
            if found is None or self.takes_from(found.publisher):
                self.take(remote, topic_field(remote), [found.payload if found else b""], 1, retain=True)
        if session.replaying and not replay:
            self._replayed(session)

    # --- what the upstream grants us -----------------------------------------------------------------------

    @property
    def granted(self) -> list[str]:
        """The filters that we have subscribed to at the upstream, as far as its session is still the same."""
        return [found.removeprefix(_DOWN) for found in self.session.subscriptions if found.startswith(_DOWN)]

    def note_granted(self, topic_filter: str) -> None:
        """The upstream has granted a subscription."""
        self._note(_DOWN + topic_filter, is_replaying=False)

    def forget_granted(self, topic_filter: str) -> None:
        """A subscription at the upstream is no more."""
        if _DOWN + topic_filter in self.session.subscriptions:
            self._forget(_DOWN + topic_filter)

    def _note(self, topic_filter: str, *, is_replaying: bool) -> None:
        session = self.session
        session.subscriptions[topic_filter] = 1
        if session.key:
            self.journal.note_subscription(session, topic_filter, 1, is_replaying=is_replaying)

    def _forget(self, topic_filter: str) -> None:
        session = self.session
        del session.subscriptions[topic_filter]
        session.replaying.discard(topic_filter)
        if session.key:
            self.journal.drop_subscription(session, topic_filter)
