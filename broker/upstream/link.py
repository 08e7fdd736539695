"""One connection to an upstream, from its TLS handshake to its end: the gateway as an MQTT 3.1.1 client.

Rules:

- CONNECT asks for the session that we had (clean session 0). What is on its way up is resumed as for any
  persistent session (§4.4): unacknowledged messages first, with DUP, in their order. An upstream that has
  forgotten our session gets them all the same, and our retained messages once more.
- Subscriptions are made anew each time: the filters may have changed, and what is retained there comes again.
- A QoS 1 message from the upstream is acknowledged when it is on disk for whom it is owed to here; if the disk
  takes nothing, the connection ends without it. Nobody above is let past what the settings ask for (`mapping.py`).
- A message that comes as retained is retained here, and published only if it is news. Later ones on its topic come
  without the flag (§3.3.1-9) and keep it up to date.
- A spool that is careful (`spool.py`) sends nothing before a PINGREQ has been answered: the connection works then.
  Another PINGREQ follows its first message: what is answered behind it has not ended the connection.
- Half of a keepalive without a word is answered with a PINGREQ, one and a half with the end.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from birthmark.broker import packets as mqtt
from birthmark.broker.journal import HIGH_WATER_BYTES
from birthmark.broker.packet_bodies import MalformedPacketError
from birthmark.broker.store import StoreError
from birthmark.broker.upstream import packets as up
from birthmark.broker.upstream.packets import ServerPacketReader
from birthmark.device import connection_errors as errors
from birthmark.device.connection_checks import Check
from birthmark.device.connection_errors import Circumstances
from birthmark.device.errors import UnreachableError
from birthmark.device.escape import escaped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from birthmark.broker.delivery import Exchange
    from birthmark.broker.packets import Packet, Will
    from birthmark.broker.stream import TlsStream
    from birthmark.broker.upstream.credentials import UpstreamCredentials
    from birthmark.broker.upstream.packets import TopicNamesAbove
    from birthmark.broker.upstream.settings import UpstreamSettings
    from birthmark.broker.upstream.spool import Spool
    from birthmark.device.credentials import BrokerAddress
    from birthmark.device.errors import ConnectionFailedError

MAX_KNOWN_TOPICS = 16_384
MAX_KNOWN_TOPIC_CHARACTERS = 512
SILENT_TICKS = 3
"""Halves of a keepalive in which nothing was heard."""

_log = logging.getLogger(__name__)


class Above(Protocol):
    """What a link needs of its upstream."""

    settings: UpstreamSettings
    spool: Spool
    credentials: UpstreamCredentials

    def will(self) -> Will | None:
        """What the upstream publishes when it loses us."""

    def wanted(self) -> tuple[str, ...]:
        """Return the filters to subscribe to."""

    def take_for_fleet(self, topic: str, payload: bytes, *, retain: bool) -> bool:
        """Take a message that is for the gateway itself; return whether it is."""

    def let_in(self, link: Link, *, is_known: bool) -> None:
        """CONNECT was accepted."""

    def has_settled(self) -> None:
        """The subscriptions stand, and what was retained for them has come."""


class Link:
    """A stream with an upstream at its other end. Its owner starts it, and waits for `accepted` and `ended`.

    Args:
        above: the upstream.
        server: which of its servers.
        exchange: where what comes down is published.
        topics: names known from other links.
    """

    def __init__(self, above: Above, server: BrokerAddress, exchange: Exchange, topics: TopicNamesAbove) -> None:
        self._above = above
        self._server = server
        self._exchange = exchange
        self._loop = loop = asyncio.get_running_loop()
        self._reader = ServerPacketReader(exchange.limits.max_packet_bytes, topics)
        self._failure: ConnectionFailedError | None = None
        self._is_accepted = False
        self._subscribing: dict[int, Sequence[str]] = {}
        self._local_names: dict[str, str | None] = {}
        self._has_heard = False
        self._silent_ticks = 0
        self._tick: asyncio.TimerHandle | None = None
        self._settling: bool | None = None
        """While settling: whether something retained has come since the last PINGREQ."""
        self._is_probing = False
        self.stream: TlsStream
        self.accepted: asyncio.Future[None] = loop.create_future()
        """Done when CONNECT is answered with yes, or the connection is over."""
        self.ended: asyncio.Future[ConnectionFailedError] = loop.create_future()
        """Why the connection is over."""
        self.has_settled = False
        """Whether the subscriptions stand, and a PINGREQ after them was answered."""
        self.has_survived = False
        """Whether a PINGREQ was answered behind the message that a careful spool sent first."""
        self.was_closed = False
        """Whether it ended, and not by our doing."""
        self.refused: tuple[str, ...] = ()
        """Filters that the upstream does not let us subscribe to."""

    @property
    def around(self) -> Circumstances:
        """What is known around it, to explain an error by."""
        credentials = self._above.credentials
        return Circumstances(
            broker=self._server, device_id=credentials.identity, own=credentials.facts, now=datetime.now(UTC)
        )

    # --- the stream's side -------------------------------------------------------------------------------

    def on_handshake_failed(self, error: Exception) -> None:
        """Say which check failed. The stream closes by itself, once the upstream could read our alert."""
        self._failure = errors.explained(error, self.around)
        self._tell_end(self._failure)

    def on_secured(self, stream: TlsStream) -> None:
        """Introduce ourselves."""
        settings = self._above.settings
        client_id = settings.client_id or self._above.credentials.common_name
        stream.write(up.connect(client_id, settings.keepalive_s, self._above.will()))

    def on_data(self, data: bytes) -> None:
        """Read packets, and act on them."""
        self._has_heard, violation = True, ""
        try:
            try:
                packets = self._reader.feed(data)
            except MalformedPacketError as error:
                packets, violation = error.before, error.cause
            self._handle(packets)
            if violation:
                self._violated(violation)
        except Exception:  # noqa: BLE001 - said and counted, never passed over
            _log.exception("a defect ended the connection to the upstream %s", self._above.settings.name)
            self._exchange.counters.defects += 1
            self._fail(errors.broke_mqtt(self.around))

    def on_drained(self) -> None:
        """The socket has taken everything: there may be room for more."""
        spool = self._above.spool
        if self._is_accepted and (spool.session.queue or spool.session.replay):
            spool.pump(spool.session)

    def on_closed(self, error: Exception | None) -> None:
        """The stream is gone."""
        if self._tick is not None:
            self._tick.cancel()
        session = self._above.spool.session
        if session.stream is self.stream:
            session.stream = None
        if self._failure is None:
            self.was_closed = True
            self._failure = self._explained(error)
        self._tell_end(self._failure)

    def _tell_end(self, error: ConnectionFailedError) -> None:
        if not self.accepted.done():
            self.accepted.set_result(None)
        if not self.ended.done():
            self.ended.set_result(error)

    def _explained(self, error: Exception | None) -> ConnectionFailedError:
        if isinstance(error, StoreError):
            return self._unstored()
        cause = error if isinstance(error, OSError) else None
        if self._is_accepted:
            return errors.lost(cause, self.around)
        return errors.ended_before_connack(cause, self.around)

    # --- packets -----------------------------------------------------------------------------------------

    def _handle(self, packets: list[Packet]) -> None:
        for packet in packets:
            if self._failure is not None:
                return
            handler = _HANDLERS.get(type(packet))
            if handler is None or self._is_accepted is (type(packet) is mqtt.ConnAck):
                self._violated(f"{type(packet).__name__} at this point")
                return
            handler(self, packet)

    def _connack(self, packet: mqtt.ConnAck) -> None:
        if packet.code:
            self._fail(errors.refused_by_connack(packet.code, self.around))
            return
        self._is_accepted = True
        spool = self._above.spool
        session = spool.session
        self._above.let_in(self, is_known=packet.session_present)
        self.subscribe(is_known=packet.session_present)
        spool.begin(is_known=packet.session_present)
        session.stream = self.stream
        if not spool.is_careful:
            spool.resume(session)
        self._later()
        self.accepted.set_result(None)

    def subscribe(self, *, is_known: bool = True) -> None:
        """Ask for what comes down, and, of a session that is known, for nothing else any more."""
        spool, wanted = self._above.spool, self._above.wanted()
        gone = [topic_filter for topic_filter in spool.granted if topic_filter not in wanted or not is_known]
        for topic_filter in gone:
            spool.forget_granted(topic_filter)
        if gone and is_known:
            self.stream.write(up.unsubscribe(spool.session.take_packet_id(), gone))
        if wanted:
            packet_id = spool.session.take_packet_id()
            self._subscribing[packet_id] = wanted
            self.stream.write(up.subscribe(packet_id, wanted, 1))
        elif spool.is_careful:
            self._settling = False
            self.stream.write(up.PINGREQ)
        else:
            self._settle()

    def _suback(self, packet: mqtt.SubAck) -> None:
        asked = self._subscribing.pop(packet.packet_id, ())
        if len(asked) != len(packet.codes):
            self._violated("a SUBACK to nothing that was asked")
            return
        spool, name = self._above.spool, self._above.settings.name
        self.refused = tuple(topic_filter for topic_filter in self.refused if topic_filter not in asked)
        for topic_filter, code in zip(asked, packet.codes, strict=True):
            if code == mqtt.SUBACK_FAILURE:
                if topic_filter not in self.refused:
                    self.refused = (*self.refused, topic_filter)
                spool.forget_granted(topic_filter)
                _log.error("the upstream %s does not let us subscribe to %s", name, escaped(topic_filter))
            else:
                spool.note_granted(topic_filter)
                if not code:
                    _log.warning("the upstream %s grants %s at QoS 0 only", name, escaped(topic_filter))
        self._settling = False
        self.stream.write(up.PINGREQ)

    def _unsuback(self, packet: mqtt.UnsubAck) -> None:
        """Nothing waits for it: what comes unasked is dropped."""

    def _pingresp(self, _packet: mqtt.PingResp) -> None:
        """What was retained has come when a whole round trip brought nothing more of it."""
        if self._settling:
            self._settling = False
            self.stream.write(up.PINGREQ)
        elif self._settling is False:
            self._settle()
        elif self._is_probing:
            self.has_survived = True

    def _settle(self) -> None:
        self._settling = None
        self.has_settled = True
        if self._above.spool.is_careful:
            self._above.spool.resume(self._above.spool.session)
            self._is_probing = True
            self.stream.write(up.PINGREQ)
        self._above.has_settled()

    def _pubacks(self, packet: mqtt.PubAcks) -> None:
        spool = self._above.spool
        spool.acknowledged(spool.session, packet.packet_ids, 1)

    # --- what comes down ---------------------------------------------------------------------------------

    def _publish_run(self, run: mqtt.PublishRun) -> None:
        for packet in run.each():
            if self._failure is None:
                self._publish(packet)

    def _publish(self, packet: mqtt.Publish) -> None:
        if packet.qos == 2:
            self._violated("a PUBLISH of QoS 2, which was not asked for")
            return
        if packet.retain and self._settling is not None:
            self._settling = True
        journal, counters = self._exchange.journal, self._exchange.counters
        topic = self._local_name(packet.topic)
        recorded = journal.recorded
        if topic is None:
            counters.upstream_echoes += 1
        elif packet.qos and journal.is_failing and self._must_store(topic, packet):
            counters.unstored_closed += 1
            self._fail(self._unstored())
            return
        else:
            counters.upstream_received += 1
            self._deliver(topic, packet)
        has_changed = journal.recorded != recorded
        if packet.qos:
            journal.send_after(self.stream, journal.recorded if has_changed else 0, mqtt.puback(packet.packet_id))
        if has_changed and journal.pending_bytes > HIGH_WATER_BYTES:
            journal.slow_down(self.stream)

    def _pass_over(self, packet: mqtt.TooLong) -> None:
        """Acknowledge a message that is too long, and be rid of it: it would come again over every connection."""
        if packet.qos == 2:
            self._violated("a PUBLISH of QoS 2, which was not asked for")
            return
        exchange, name = self._exchange, self._above.settings.name
        exchange.counters.upstream_too_long += 1
        if exchange.denials.due(f"too long {name}"):
            _log.error(
                "passed over a message from the upstream %s on %s: %s bytes are more than limits.max_packet_bytes",
                name,
                escaped(packet.topic),
                packet.length,
                extra={"fields": {"event": "upstream_too_long", "upstream": str(name)}},
            )
        if packet.qos:
            exchange.journal.send_after(self.stream, 0, mqtt.puback(packet.packet_id))

    def _deliver(self, topic: str, packet: mqtt.Publish) -> None:
        above, exchange, payload = self._above, self._exchange, packet.payload
        if above.take_for_fleet(topic, payload, retain=packet.retain):
            return
        peer = above.spool.peer
        known = exchange.retained.get(topic)
        if packet.retain and known is not None and known.payload == payload:
            return
        is_kept = packet.retain or (known is not None and known.publisher == peer)
        if not exchange.give_to_gateway(topic, payload, peer):
            exchange.publish(topic, payload, packet.qos, retain=is_kept, publisher=peer)

    def _must_store(self, topic: str, packet: mqtt.Publish) -> bool:
        return self._exchange.must_store(self._above.spool.session, topic, packet.qos, retain=packet.retain)

    def _local_name(self, remote: str) -> str | None:
        """`Mapping.to_local`, with a memory."""
        if not remote and self._exchange.denials.due(f"nameless {self._above.settings.name}"):
            name = self._above.settings.name
            _log.warning("the upstream %s has sent a message on a topic that MQTT does not allow: dropped", name)
        try:
            return self._local_names[remote]
        except KeyError:
            found = self._above.settings.mapping.to_local(remote)
            if len(remote) <= MAX_KNOWN_TOPIC_CHARACTERS:
                if len(self._local_names) >= MAX_KNOWN_TOPICS:
                    self._local_names.clear()
                self._local_names[remote] = found
            return found

    # --- the end -----------------------------------------------------------------------------------------

    def _later(self) -> None:
        self._tick = self._loop.call_later(self._above.settings.keepalive_s / 2, self._check)

    def _check(self) -> None:
        if self._has_heard or self.stream.is_paused:
            self._silent_ticks = 0
        else:
            self._silent_ticks += 1
        self._has_heard = False
        if self._silent_ticks >= SILENT_TICKS:
            self._fail(errors.fell_silent(round(self._above.settings.keepalive_s * 1.5), self.around))
            return
        self.stream.write(up.PINGREQ)
        self._later()

    def close(self) -> None:
        """End the connection in good order: the upstream does not publish our will."""
        self.stream.write(up.DISCONNECT)
        self._failure = self._failure or errors.lost(None, self.around)
        self.stream.close()

    def overdue(self, waited_s: float) -> None:
        """End a connection that did not come about in time."""
        is_secured = self.stream.is_open
        if is_secured:
            self._fail(errors.no_connack(waited_s, self.around))
        else:
            self._fail(errors.explained(TimeoutError("the handshake timed out"), self.around))

    def cut(self) -> None:
        """End the connection now; the upstream publishes our will."""
        self._fail(errors.lost(None, self.around))

    def _unstored(self) -> UnreachableError:
        return UnreachableError(
            f"could not stay connected to {self._server}: what it sends cannot be stored",
            "make room on the disk of the data folder; until then nothing is acknowledged",
            Check.CLOSED,
        )

    def _violated(self, cause: str) -> None:
        error = errors.broke_mqtt(self.around) if self._is_accepted else errors.not_mqtt(self.around)
        self._fail(type(error)(f"{error.message} ({escaped(cause)})", error.hint, error.check))

    def _fail(self, error: ConnectionFailedError) -> None:
        """End the connection, for a reason that we know."""
        if self._failure is None:
            self._failure = error
            self.stream.abort()


_HANDLERS: dict[type, Callable[[Link, Any], None]] = {
    mqtt.ConnAck: Link._connack,
    mqtt.SubAck: Link._suback,
    mqtt.UnsubAck: Link._unsuback,
    mqtt.PingResp: Link._pingresp,
    mqtt.PubAcks: Link._pubacks,
    mqtt.PublishRun: Link._publish_run,
    mqtt.Publish: Link._publish,
    mqtt.TooLong: Link._pass_over,
}
