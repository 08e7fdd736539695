"""All upstreams of a gateway: what goes up where, and who is stopped while there is no room.

Rules:

- Split horizon: what came down an upstream goes up none, and what another gateway publishes here only where
  `transit` says so (`spool.py`); nor does what came down go on to other gateways but where `transit` says so. So a
  message goes up once and down once at most, and in no circles, however gateways are linked to each other; with
  `transit`, as long as the links are a tree.
- A client is stopped only over a topic that goes up an upstream with spool_full = "hold" that has no room; it is
  read from again when there is.
- The spool of an upstream that is in the settings no more is kept for as long as a client's session would be.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, NamedTuple

from birthmark.broker.packets import topic_field
from birthmark.broker.stream import Flusher
from birthmark.broker.upstream.packets import TopicNamesAbove
from birthmark.broker.upstream.spool import CLIENT_ID_PREFIX
from birthmark.broker.upstream.upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import datetime

    from birthmark.broker.alarms import Alarm
    from birthmark.broker.delivery import Exchange
    from birthmark.broker.peer import Peer
    from birthmark.broker.session import Message, Session
    from birthmark.broker.stream import TlsStream
    from birthmark.broker.upstream.settings import UpstreamSettings
    from birthmark.broker.upstream.spool import Spool
    from birthmark.device.identity import DeviceId

    Targets = tuple[tuple[Session, int], ...]

MAX_ROUTES = 32_768
MAX_ROUTE_TOPIC_CHARACTERS = 1_024
FORGET_CLOSED_EVERY = 1_024
"""Clients stopped: then those that have gone meanwhile are forgotten."""

_log = logging.getLogger(__name__)


class _Way(NamedTuple):
    """Where a topic goes up."""

    spool: Spool
    topic: str
    topic_bytes: bytes


class Upstreams:
    """The upstreams.

    Args:
        settings: of each.
        exchange: the broker's.

    Raises:
        ConfigurationError: the credentials of one cannot be used.
    """

    def __init__(self, settings: Iterable[UpstreamSettings], exchange: Exchange) -> None:
        loop = asyncio.get_running_loop()
        flusher, topics = Flusher(loop), TopicNamesAbove()
        self._exchange = exchange
        self.filling: set[Spool] = set()
        """The spools that have no room for long."""
        self._all: dict[str, Upstream] = {}
        for found in settings:
            upstream = self._all[found.name.folded] = Upstream(found, exchange, topics, flusher, self.filling)
            upstream.spool.on_room = self._let_go
            upstream.on_change = self._has_changed
        self._ways: dict[str, tuple[_Way, ...]] = {}
        self._orphans: list[Session] = []
        self._held: dict[TlsStream, None] = {}
        self.on_status: Callable[[], None] = lambda: None
        """Called when the state of a link has changed."""
        if self._all:
            exchange.uplinks = self
            exchange.outbound.stays = self.stays

    def __iter__(self) -> Iterator[Upstream]:
        return iter(self._all.values())

    def __len__(self) -> int:
        return len(self._all)

    # --- life --------------------------------------------------------------------------------------------

    def take_up(self, spools: Iterable[Session]) -> None:
        """Go on with the spools that the store has kept; where it has none, it keeps them from now on."""
        for session in spools:
            upstream = self._all.get(session.client_id.removeprefix(CLIENT_ID_PREFIX))
            if upstream is not None:
                upstream.spool.adopt(session)
                self._exchange.journal.note_session(session)  # it is here: were it gone, then only since now
                continue
            self._orphans.append(session)
            if session.waiting_count:
                _log.warning(
                    "%s messages wait for the upstream %s, which is not in broker.toml any more; they are kept for"
                    " limits.session_expiry_s, in case that it comes back",
                    session.waiting_count,
                    session.peer.device_id,
                )
        for upstream in self:
            if not upstream.spool.session.key:
                self._exchange.journal.open_session(upstream.spool.session)

    def start(self) -> None:
        """Connect, and stay connected."""
        for upstream in self:
            upstream.start()

    async def close(self, grace_s: float) -> None:
        """End every link; see `Upstream.close`."""
        await asyncio.gather(*(upstream.close(grace_s) for upstream in self))

    def forget_orphans(self, oldest_s: float) -> None:
        """Forget the spools of upstreams that have been out of the settings since before `oldest_s`."""
        for session in self._orphans:
            if session.left_at_s < oldest_s:
                name = session.peer.device_id
                _log.warning("forgot %s messages for the upstream %s", session.waiting_count, name)
                self._exchange.journal.drop_session(session)
        self._orphans = [session for session in self._orphans if session.left_at_s >= oldest_s]

    def reload(self, name: DeviceId) -> None:
        """Take up an upstream's credentials anew, and connect with them. Raises `ConfigurationError`."""
        self._all[name.folded].reload()

    def say(self, publish: Callable[..., None]) -> None:
        """Publish what is counted of each, on `$SYS/broker/upstream/NAME/...`, retained."""
        for upstream in self:
            for what, number in upstream.figures().items():
                publish(f"$SYS/broker/upstream/{upstream.name}/{what}", b"%d" % number, retain=True)

    def alarms(self, now: datetime) -> list[Alarm]:
        """Return what about them needs a person."""
        return [alarm for upstream in self for alarm in upstream.alarms(now)]

    # --- what goes up ------------------------------------------------------------------------------------

    def forward(
        self, topic: str, payloads: list[bytes], qos: int, *, retain: bool, publisher: Peer | None
    ) -> list[Message]:
        """Send messages of one topic up wherever they are to go.

        Returns:
            One for each, if sessions here can share them: what is kept for both is kept once.
        """
        shared: list[Message] = []
        for spool, remote, remote_bytes in self._find(topic):
            if spool.takes_from(publisher):
                messages = spool.take(remote, remote_bytes, payloads, qos, retain=retain)
                if remote == topic and not retain and len(messages) == len(payloads):
                    shared = messages
        return shared

    def takes(self, topic: str, publisher: Peer) -> bool:
        """Whether a message of somebody would go up."""
        return any(True for _ in self._spools(topic, publisher))

    def within(self, targets: Targets, publisher: Peer | None) -> Targets:
        """Return to which of a route's sessions a message goes: to other gateways only where `stays` lets it."""
        if publisher is None or not self.stays(publisher):
            return targets
        return tuple(target for target in targets if not target[0].peer.is_gateway)

    def stays(self, publisher: Peer) -> bool:
        """Whether what somebody publishes goes to no gateway below: what comes down, but in a tree."""
        if not publisher.is_upstream:
            return False
        upstream = self._all.get(publisher.device_id.folded)
        return upstream is None or not upstream.settings.transit

    def _spools(self, topic: str, publisher: Peer) -> Iterator[Spool]:
        """The spools that a message of somebody goes to."""
        return (way.spool for way in self._find(topic) if way.spool.takes_from(publisher))

    def _find(self, topic: str) -> tuple[_Way, ...]:
        known = self._ways.get(topic)
        if known is not None:
            return known
        found = []
        for upstream in self:
            remote = upstream.settings.mapping.to_remote(topic)
            if remote is not None:
                found.append(_Way(upstream.spool, remote, topic_field(remote)))
            elif upstream.settings.mapping.is_too_long(topic):
                self._exchange.denials.dropped(upstream.spool.peer, "more than max_topic_bytes", topic)
        ways = tuple(found)
        if len(topic) <= MAX_ROUTE_TOPIC_CHARACTERS:
            if len(self._ways) >= MAX_ROUTES:
                self._ways.clear()
            self._ways[topic] = ways
        return ways

    # --- while there is no room --------------------------------------------------------------------------

    def has_room_for(self, topic: str, payloads: list[bytes], publisher: Peer) -> bool:
        """Whether messages can be taken together: nobody has to be stopped amid them."""
        return all(spool.has_room_for(payloads) for spool in self._spools(topic, publisher))

    def has_no_room(self, topic: str, publisher: Peer) -> bool:
        """Whether a message may not be taken, since it could only be dropped where nothing is to be."""
        return any(spool.holds and spool.is_full for spool in self._spools(topic, publisher))

    def hold(self, stream: TlsStream, topic: str, publisher: Peer) -> None:
        """Read no more from a client that has published something for a spool which is nearly full."""
        if stream in self._held:
            return
        if any(spool.holds and spool.is_filling for spool in self._spools(topic, publisher)):
            if len(self._held) % FORGET_CLOSED_EVERY == FORGET_CLOSED_EVERY - 1:
                self._held = {held: None for held in self._held if not held.is_closed}
            self._exchange.counters.publishers_held += 1
            self._held[stream] = None
            stream.pause()

    def _let_go(self) -> None:
        """Read again from those who were stopped, unless another spool is still full."""
        if not any(spool.holds for spool in self.filling):
            held, self._held = self._held, {}
            for stream in held:
                stream.resume()

    def _has_changed(self) -> None:
        self.on_status()
