"""One client's connection, from its TLS handshake to its end (MQTT 3.1.1 §3.1, §3.14, §4.8).

Rules, in the order in which they bind:

- After every handshake, full or resumed, the certificate is judged (`admit`) before one byte is read. Who is
  refused gets CONNACK 5, the one thing that a device can understand, and nothing else.
- CONNECT comes first and once, within `connect_timeout_s`.
- The client id is the certificate's CN; empty with a clean session it is taken as the CN; a service may also
  use `CN:anything`. Anything else is CONNACK 2, before any session is looked at.
- A last will that the policy does not allow refuses the connection (CONNACK 5).
- A session has one connection: a new one takes over, and the old one is closed, with its will (§3.1.4-2).
- The will is published whenever the connection ends without DISCONNECT (§3.1.2-8), but for a revoked client.
- A client that sends faster than its rates is not read from until it has made good (`rate.py`).
- A connection lives no longer than its certificate, nor 1.5 keepalives without a packet (§3.1.2-24).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from birthmark.broker import packets as mqtt
from birthmark.broker.claim import bound_client_id, claim_session, rights_of
from birthmark.broker.connection_log import ConnectionLog
from birthmark.broker.journal import HIGH_WATER_BYTES
from birthmark.broker.packet_bodies import MalformedPacketError
from birthmark.broker.packet_reader import PacketReader
from birthmark.broker.packets import Publish, PublishRun
from birthmark.broker.peer import PeerRefusedError, later
from birthmark.broker.store import StoreError
from birthmark.device.escape import escaped, quoted

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    from birthmark.broker.config import Limits
    from birthmark.broker.counters import Counters
    from birthmark.broker.delivery import Exchange
    from birthmark.broker.journal import Journal
    from birthmark.broker.packet_reader import TopicNames
    from birthmark.broker.packets import Connect, Packet, Subscribe, Unsubscribe, Will
    from birthmark.broker.peer import Peer
    from birthmark.broker.rate import Meter, Meters
    from birthmark.broker.session import Session
    from birthmark.broker.stream import TlsStream

HARD_BUFFER_FACTOR = 2
"""Beyond this times `max_queued_bytes` (and one packet) waiting, a client is cut off at once."""


class Gateway(Protocol):
    """What a connection needs of the broker."""

    exchange: Exchange
    limits: Limits
    counters: Counters
    topics: TopicNames
    meters: Meters
    disconnects_denied: bool
    """Whether a denied PUBLISH ends its connection."""

    def expired_by(self, peer: Peer) -> timedelta:
        """Return how long after its end the certificate of a peer is let in, on the listener that it came by."""

    def now_s(self) -> float:
        """The loop's clock."""

    def wall_s(self) -> float:
        """Seconds since 1970."""

    def later(self, delay_s: float, callback: Callable[[], object]) -> object:
        """Have something called by the loop."""

    def secured(self, connection: Connection) -> None:
        """A handshake is done, well or badly."""

    def gone(self, connection: Connection) -> None:
        """A connection is over."""

    def client_connected(self, session: Session) -> None:
        """For plug-ins."""

    def client_disconnected(self, session: Session) -> None:
        """For plug-ins."""

    def subscribed(self, session: Session, topic_filter: str, qos: int) -> None:
        """For plug-ins."""

    def unsubscribed(self, session: Session, topic_filter: str) -> None:
        """For plug-ins."""

    on_message: Callable[[Session, Publish], None] | None
    """For plug-ins; None where none listens."""


class Connection:
    """A stream with a client at its other end."""

    __slots__ = (
        "_admit",
        "_deadline_s",
        "_exchange",
        "_gateway",
        "_is_active",
        "_is_done",
        "_keepalive_s",
        "_log",
        "_meter",
        "_reader",
        "_stalled_since_s",
        "address",
        "expires_at_s",
        "peer",
        "session",
        "stream",
        "will",
    )

    def __init__(self, gateway: Gateway, address: str, admit: Callable[[bytes], Peer]) -> None:
        self._gateway = gateway
        self._admit = admit
        self._exchange = gateway.exchange
        self._reader = PacketReader(gateway.limits.max_packet_bytes, gateway.topics)
        self._deadline_s = gateway.now_s() + gateway.limits.handshake_timeout_s
        self._keepalive_s = 0.0
        self._is_active = False
        self._is_done = False
        self._stalled_since_s: float | None = None
        self._meter: Meter | None = None
        self.address = address
        self._log = ConnectionLog(address, gateway.exchange.denials)
        self.stream: TlsStream
        self.peer: Peer | None = None
        self.expires_at_s = 0.0
        """The end of the certificate's validity, in seconds since 1970."""
        self.session: Session | None = None
        self.will: Will | None = None

    # --- the stream's side -------------------------------------------------------------------------------

    def on_handshake_failed(self, error: Exception) -> None:
        """Say which check failed, for whom, and what to do."""
        self._is_done = True
        self._gateway.counters.handshakes_failed += 1
        self._gateway.secured(self)
        self._log.handshake_failed(error)

    def on_secured(self, stream: TlsStream) -> None:
        """Judge the certificate, of a resumed session like that of a new one."""
        self._gateway.secured(self)
        try:
            peer = self._admit(stream.peer_leaf_der() or b"")
        except PeerRefusedError as error:
            self._gateway.counters.peers_refused += 1
            self._log.peer_refused(error)
            self._refuse(mqtt.CONNACK_NOT_AUTHORIZED)
            return
        self.peer = peer
        self._meter = self._gateway.meters.of(peer.device_id.folded, self._gateway.now_s())
        self.expires_at_s = later(peer.not_after, self._gateway.expired_by(peer)).timestamp()
        self._deadline_s = self._gateway.now_s() + self._gateway.limits.connect_timeout_s

    def on_data(self, data: bytes) -> None:
        """Read packets, and act on them one by one until one ends the connection."""
        self._is_active = True
        violation = ""
        try:
            try:
                packets = self._reader.feed(data)
            except MalformedPacketError as error:
                packets, violation = error.before, error.cause
            if self._meter is not None:
                self._weigh(self._meter, packets, len(data))
            self._handle(packets)
            if violation and not self._is_done:
                self._gateway.counters.malformed += 1
                self._violated(violation)
        except Exception:  # noqa: BLE001 - said and counted, never passed over
            # A defect of ours: this client must not go on in a state that nobody planned; all others do.
            self._log.defect()
            self._gateway.counters.defects += 1
            self.cut(with_will=True)

    def _weigh(self, meter: Meter, packets: list[Packet], size_bytes: int) -> None:
        """Read no more for as long as the client has sent too fast. What is here already is dealt with."""
        publishes = sum(
            len(packet.payloads) if isinstance(packet, PublishRun) else isinstance(packet, Publish)
            for packet in packets
        )
        delay_s = meter.take(publishes, size_bytes, self._gateway.now_s())
        if delay_s and self.peer is not None:
            self._gateway.counters.rate_limited += 1
            self._exchange.denials.slowed(self.peer, delay_s)
            self.stream.pause()
            self._gateway.later(delay_s, self.stream.resume)

    def on_drained(self) -> None:
        """The socket has taken everything: there may be room for more."""
        session = self.session
        if session is not None and (session.queue or session.replay):
            self._exchange.outbound.pump(session)

    def on_closed(self, error: Exception | None) -> None:
        """The stream is gone."""
        if self.session is not None:
            self._say_closed(_cause(error))
        self.leave(with_will=True)
        self._is_done = True
        self._gateway.gone(self)

    # --- packets -----------------------------------------------------------------------------------------

    def _handle(self, packets: list[Packet]) -> None:
        session = self.session
        for packet in packets:
            if self._is_done:
                return
            if session is not None:
                _HANDLERS[type(packet)](self, session, packet)
            elif isinstance(packet, mqtt.Connect):
                self._connect(packet)
                session = self.session
            elif isinstance(packet, mqtt.UnsupportedConnect):
                self._log_refusal(f"it speaks {escaped(packet.name)} level {packet.level}, not MQTT 3.1.1")
                self._refuse(mqtt.CONNACK_VERSION)
            else:
                self._violated("a packet before CONNECT")

    def _publish_run(self, session: Session, run: PublishRun) -> None:
        """Messages on one topic, not to be retained, of QoS 0 or 1."""
        gateway, exchange, qos = self._gateway, self._exchange, run.qos
        uplinks = exchange.uplinks
        if qos and uplinks and not uplinks.has_room_for(run.topic, run.payloads, session.peer):
            # One of them will be the first to find no place in a spool.
            for packet in run.each():
                if not self._is_done:
                    self._publish(session, packet)
            return
        if gateway.on_message is not None:
            for packet in run.each():
                gateway.on_message(session, packet)
        journal = exchange.journal
        if qos and journal.is_failing and self._is_unkept(session, run.topic, 1, retain=False):
            return
        recorded = journal.recorded
        if not exchange.accept_run(session, run) and gateway.disconnects_denied:
            self._end_denied()
        elif qos:
            acknowledgements = mqtt.pubacks(run.packet_ids)
            if journal.recorded == recorded:
                self.stream.write(acknowledgements)
                return
            journal.send_after(self.stream, journal.recorded, acknowledgements)
            self._slow_down(recorded)

    def _publish(self, session: Session, packet: Publish) -> None:
        """A message to be retained, of QoS 2, or to go up."""
        gateway, qos, uplinks = self._gateway, packet.qos, self._exchange.uplinks
        if gateway.on_message is not None:
            gateway.on_message(session, packet)
        journal = self._exchange.journal
        may_not_fit = journal.is_failing or (uplinks is not None and uplinks.filling)
        if qos and may_not_fit and self._is_unkept(session, packet.topic, qos, retain=packet.retain):
            return
        recorded = journal.recorded
        allowed, number = self._take(session, packet)
        if not allowed and gateway.disconnects_denied:
            self._end_denied()
        elif qos:
            encode = mqtt.puback if qos == 1 else mqtt.pubrec
            self._acknowledge(encode(packet.packet_id), number)
        self._slow_down(recorded)
        if uplinks is not None and uplinks.filling:
            uplinks.hold(self.stream, packet.topic, session.peer)

    def _take(self, session: Session, packet: Publish) -> tuple[bool, int]:
        """Send a message on; return whether it may be, and the change that its acknowledgement waits for."""
        journal = self._exchange.journal
        recorded = journal.recorded
        if packet.qos == 2:
            if packet.packet_id in session.incoming:
                # §4.3.3: a packet identifier not released yet is the same message again, perhaps not on disk yet.
                return True, recorded
            session.incoming.add(packet.packet_id)
            if session.key:
                journal.note_incoming(session, packet.packet_id)
        return self._exchange.accept(session, packet), _since(recorded, journal)

    def _is_unkept(self, session: Session, topic: str, qos: int, *, retain: bool) -> bool:
        """Whether a message must not be acknowledged, since what should keep it cannot: the connection ends."""
        exchange, uplinks = self._exchange, self._exchange.uplinks
        if exchange.journal.is_failing and exchange.must_store(session, topic, qos, retain=retain):
            self._gateway.counters.unstored_closed += 1
            cause = "the store takes nothing: a message that it must keep cannot be taken"
        elif uplinks is not None and uplinks.has_no_room(topic, session.peer):
            cause = "the spool of an upstream is full: a message for it cannot be taken"
        else:
            return False
        self._say_closed(cause)
        self.cut(with_will=True)
        return True

    def _slow_down(self, recorded: int) -> None:
        """Read no more for now if something was noted since then, and too much waits for the disk."""
        journal = self._exchange.journal
        if journal.pending_bytes > HIGH_WATER_BYTES and journal.recorded != recorded:
            journal.slow_down(self.stream)

    def _end_denied(self) -> None:
        self._say_closed("the policy denied a PUBLISH")
        self.end(with_will=True)

    def _acknowledge(self, acknowledgement: bytes, number: int) -> None:
        """Say that what a client gave is in our hands now: at once, or when that change is on disk."""
        if number:
            self._exchange.journal.send_after(self.stream, number, acknowledgement)
        else:
            self.stream.write(acknowledgement)

    def _subscribe(self, session: Session, packet: Subscribe) -> None:
        codes = self._exchange.subscribe(session, packet.filters)
        self._acknowledge(mqtt.suback(packet.packet_id, codes), self._number(session))
        self._exchange.outbound.pump(session)
        for (topic_filter, qos), code in zip(packet.filters, codes, strict=True):
            if code != mqtt.SUBACK_FAILURE:
                self._gateway.subscribed(session, topic_filter, qos)

    def _unsubscribe(self, session: Session, packet: Unsubscribe) -> None:
        self._exchange.unsubscribe(session, packet.filters)
        self._acknowledge(mqtt.unsuback(packet.packet_id), self._number(session))
        for topic_filter in packet.filters:
            self._gateway.unsubscribed(session, topic_filter)

    def _pubacks(self, session: Session, packet: mqtt.PubAcks) -> None:
        self._exchange.outbound.acknowledged(session, packet.packet_ids, 1)

    def _pubrec(self, session: Session, packet: mqtt.PubRec) -> None:
        self._exchange.outbound.received(session, packet.packet_id)

    def _pubrel(self, session: Session, packet: mqtt.PubRel) -> None:
        session.incoming.discard(packet.packet_id)
        if session.key:
            # On disk first: the client may use the same identifier for its next message.
            self._exchange.journal.drop_incoming(session, packet.packet_id)
        self._acknowledge(mqtt.pubcomp(packet.packet_id), self._number(session))

    def _number(self, session: Session) -> int:
        """The change that the present state of a session waits for; 0 if it is not kept."""
        return self._exchange.journal.recorded if session.key else 0

    def _pubcomp(self, session: Session, packet: mqtt.PubComp) -> None:
        self._exchange.outbound.acknowledged(session, (packet.packet_id,), 2)

    def _ping(self, _session: Session, _packet: mqtt.PingReq) -> None:
        self.stream.write(mqtt.PINGRESP)

    def _disconnect(self, _session: Session, _packet: mqtt.Disconnect) -> None:
        self._say_closed("it said goodbye")
        self.end(with_will=False)

    def _second_connect(self, _session: Session, _packet: object) -> None:
        self._violated("a second CONNECT")

    # --- CONNECT -----------------------------------------------------------------------------------------

    def _connect(self, packet: Connect) -> None:
        peer = self.peer
        if peer is None:  # pragma: no cover - nothing is read before `admit`
            return
        client_id = bound_client_id(packet, peer)
        if client_id is None:
            self._log_refusal(f"it asked for the client id {quoted(packet.client_id)}, not its own")
            self._refuse(mqtt.CONNACK_CLIENT_ID)
            return
        if packet.will is not None:
            decision = rights_of(self._exchange.policy, peer).will(packet.will.topic)
            if not decision.allowed:
                self._gateway.counters.wills_denied += 1
                self._exchange.denials.denied(peer, "will", packet.will.topic, decision.rule)
                self._refuse(mqtt.CONNACK_NOT_AUTHORIZED)
                return
        session, is_present = claim_session(
            self._exchange, client_id, peer, clean=packet.clean, address=self.address
        )
        if session is None:
            self._log_refusal("there are too many sessions (limits.max_sessions)")
            self._refuse(mqtt.CONNACK_UNAVAILABLE)
            return
        self._attach(session, packet)
        # To say that there is no session is to promise that a former one is gone (§3.1.2-6).
        number = 0 if is_present else self._exchange.journal.wiped(client_id)
        self._acknowledge(mqtt.connack(mqtt.CONNACK_ACCEPTED, session_present=is_present), number)
        self._exchange.outbound.resume(session)
        self._gateway.counters.clients_connected += 1
        self._gateway.client_connected(session)
        self._log.connected(peer, client_id, self.stream.describe())

    def _attach(self, session: Session, packet: Connect) -> None:
        longest_s = self._gateway.limits.max_keepalive_s
        self._keepalive_s = min(packet.keepalive_s or longest_s, longest_s) * 1.5
        self._deadline_s = self._gateway.now_s() + self._keepalive_s
        self._is_active = False
        self.will = packet.will
        self.session = session
        session.connection = self
        session.stream = self.stream

    # --- the end -----------------------------------------------------------------------------------------

    def leave(self, *, with_will: bool) -> None:
        """Let go of the session, once: publish the will if wanted, and end a clean session."""
        session, will = self.session, self.will
        self.session = self.will = None
        if session is None or session.connection is not self:
            return
        session.connection = session.stream = None
        session.left_at_s = self._gateway.now_s()
        if session.clean:
            self._exchange.forget(session)
        elif session.key:
            self._exchange.journal.note_session(session, left_at=self._gateway.wall_s())
        if will is not None and with_will:
            self._exchange.fire_will(session, will)
        self._gateway.client_disconnected(session)

    def publish_will(self) -> None:
        """Publish the will ahead of an end that is certain (the broker stops), while others still listen."""
        session, will = self.session, self.will
        self.will = None
        if session is not None and will is not None:
            self._exchange.fire_will(session, will)

    def end(self, *, with_will: bool) -> None:
        """End the connection in good order."""
        self._is_done = True
        self.leave(with_will=with_will)
        self.stream.close()

    def cut(self, *, with_will: bool) -> None:
        """End the connection now, whether the client reads or not."""
        self._is_done = True
        self.leave(with_will=with_will)
        self.stream.abort()

    def end_because(self, why: str) -> None:
        """End the connection in good order: what let it in holds no longer. Its session is kept if it is to be."""
        self._say_closed(why)
        self.end(with_will=True)

    def fall_behind(self) -> None:
        """End the connection, soon: its session's queue is full. For a caller amid a delivery."""
        self._gateway.later(0, self._fell_behind)

    def _fell_behind(self) -> None:
        if not self._is_done:
            self._gateway.counters.fell_behind += 1
            self.end_because("it did not keep up: its queue is full (limits.queue_full)")

    def taken_over(self, by_address: str) -> None:
        """Give the session up to a newer connection of the same client (§3.1.4-2)."""
        self._say_closed(f"a new connection from {by_address} took over")
        self.end(with_will=True)

    def moved(self, gateway: str) -> None:
        """End the connection now: the client is at another gateway of the fleet, which speaks for its presence."""
        self._gateway.counters.moved_away += 1
        self._say_closed(f"it is at the gateway {gateway} now")
        self.cut(with_will=False)

    def check(self, now_s: float, wall_s: float) -> None:
        """End what is overdue: a handshake, a CONNECT, a keepalive, a certificate, a socket that takes nothing."""
        if self._is_done:
            return
        if self.peer is not None and wall_s > self.expires_at_s:
            self._gateway.counters.expired += 1
            self._say_closed("its certificate has expired")
            self.end(with_will=True)
            return
        waiting_bytes = self.stream.waiting_bytes
        if waiting_bytes:
            if self.stream.progressed or self.stream.is_holding or self._stalled_since_s is None:
                self._stalled_since_s = now_s
            limits = self._gateway.limits
            hard_bytes = HARD_BUFFER_FACTOR * limits.max_queued_bytes + limits.max_packet_bytes
            if waiting_bytes > hard_bytes or now_s - self._stalled_since_s > limits.stall_timeout_s:
                self._gateway.counters.slow_cut_off += 1
                self._say_closed(f"it does not read: {waiting_bytes} bytes wait")
                self.cut(with_will=True)
                return
            self.stream.progressed = False
        else:
            self._stalled_since_s = None
        if self.session is not None and (self._is_active or self.stream.is_paused):
            self._is_active = False
            self._deadline_s = now_s + self._keepalive_s
        elif now_s >= self._deadline_s:
            self._overdue()

    def _overdue(self) -> None:
        if self.session is not None:
            self._gateway.counters.keepalives_missed += 1
            self._say_closed("it was silent for 1.5 keepalives")
            self.end(with_will=True)
            return
        what = "no CONNECT" if self.peer is not None else "no TLS handshake"
        self._log.timed_out(what)
        self.cut(with_will=False)

    def _refuse(self, code: int) -> None:
        self._gateway.counters.clients_refused += 1
        self._is_done = True
        self.stream.write(mqtt.connack(code))
        self.stream.close()

    def _violated(self, cause: str) -> None:
        """A protocol violation ends the connection, without an answer (§4.8.0-1)."""
        self._say_closed(f"it broke the protocol: {cause}")
        self.end(with_will=True)

    def _log_refusal(self, cause: str) -> None:
        self._log.refused(self.peer, cause)

    def _say_closed(self, why: str) -> None:
        self._log.closed(self.session.client_id if self.session else str(self.peer and self.peer.device_id), why)


def _since(recorded: int, journal: Journal) -> int:
    """The last change noted after `recorded`; 0 if there is none."""
    return journal.recorded if journal.recorded != recorded else 0


def _cause(error: Exception | None) -> str:
    if isinstance(error, StoreError):
        return "what was promised to it could not be stored"
    return "the connection was lost" if error else "it closed without DISCONNECT"


_HANDLERS: dict[type, Callable[[Connection, Session, Any], None]] = {
    mqtt.PublishRun: Connection._publish_run,
    mqtt.Publish: Connection._publish,
    mqtt.Subscribe: Connection._subscribe,
    mqtt.Unsubscribe: Connection._unsubscribe,
    mqtt.PubAcks: Connection._pubacks,
    mqtt.PubRec: Connection._pubrec,
    mqtt.PubRel: Connection._pubrel,
    mqtt.PubComp: Connection._pubcomp,
    mqtt.PingReq: Connection._ping,
    mqtt.Disconnect: Connection._disconnect,
    mqtt.Connect: Connection._second_connect,
    mqtt.UnsupportedConnect: Connection._second_connect,
}
