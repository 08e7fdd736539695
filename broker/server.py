"""The gateway's broker: amqtt's life cycle, configuration, plug-ins and `$SYS` around a data path of our own.

Rules:

- amqtt keeps what it does well: the state machine of start and stop, `BrokerConfig`, the plug-in manager and its
  events. Everything a client's bytes touch is ours: listener, packets, sessions, policy, delivery.
- Each override says which defect of amqtt 0.12.1 it closes (docs/amqtt.md has them by number).
- A stop closes the listeners first, then publishes the wills (a connection that ends without DISCONNECT has its
  will published, MQTT 3.1.1 §3.1.2-8, and retained presence then says the truth), then ends every connection;
  what does not end by itself is cut. Clients, disk, upstreams and plug-ins have a time each, and no more.
- One event loop, no locks: every method is called from the loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
import warnings
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from amqtt.broker import Broker
from amqtt.contexts import BrokerConfig, ListenerConfig, ListenerType
from amqtt.errors import BrokerError
from amqtt.events import BrokerEvents
from amqtt.session import IncomingApplicationMessage

from birthmark.broker.amqtt_views import RetainedView, SessionsView, subscriptions_view
from birthmark.broker.config import Durability, OnDenied
from birthmark.broker.connections import TICK_S, Connections
from birthmark.broker.counters import Counters
from birthmark.broker.delivery import Exchange
from birthmark.broker.denials import Denials
from birthmark.broker.eviction import close_identities
from birthmark.broker.fleet.roamers import Roamers
from birthmark.broker.journal import Journal
from birthmark.broker.listener import Listener, bind
from birthmark.broker.own_certificate import read_own_certificate
from birthmark.broker.packet_reader import TopicNames
from birthmark.broker.peer import upstream_peer
from birthmark.broker.rate import Meters
from birthmark.broker.restore import restore
from birthmark.broker.retained import Retained
from birthmark.broker.store import FILE_NAME, Store
from birthmark.broker.upstream.upstreams import Upstreams
from birthmark.device.durable import private_folder
from birthmark.device.errors import SystemFailureError
from birthmark.device.identity import DeviceId

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Awaitable, Callable, Coroutine, Mapping

    from amqtt.events import Events

    from birthmark.broker.config import BrokerSettings, RenewalListener
    from birthmark.broker.connection import Connection
    from birthmark.broker.packets import Publish
    from birthmark.broker.peer import Peer
    from birthmark.broker.policy import Policy
    from birthmark.broker.session import Session
    from birthmark.device.messages import ClosedIdentity

DEFAULT_PLUGINS: Mapping[str, dict[str, Any]] = {"amqtt.plugins.sys.broker.BrokerSysPlugin": {"sys_interval": 20}}
SETTLE_TIMEOUT_S = 0.3
STORE_TIMEOUT_S = 2.0
"""For a last write at a stop: on a disk in order it takes milliseconds."""
PLUGIN_TIMEOUT_S = 0.2
EXPIRY_TICKS = 240
"""Forgotten sessions are looked for once in this many ticks."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RenewalDoor:
    """The second listener: who is let in there, and by which rules of TLS."""

    settings: RenewalListener
    context: ssl.SSLContext
    """From `tls.renewal_context`."""
    admit: Callable[[bytes], Peer]
    """Judges the leaf certificate (DER); raises `PeerRefusedError`."""


class GatewayBroker(Broker):
    """A broker that lets in who `admit` lets in, and lets each do what the policy allows.

    Args:
        settings: where to listen, limits, what a denied PUBLISH costs.
        tls_context: from `tls.server_context`.
        admit: judges the leaf certificate (DER) after every handshake; raises `PeerRefusedError`.
        policy: who may do what.
        renewal: the second listener, where what has expired is renewed; None where there is none.
        plugins: amqtt plug-ins by dotted path, with their options; by default `$SYS` alone.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        tls_context: ssl.SSLContext,
        admit: Callable[[bytes], Peer],
        policy: Policy,
        *,
        renewal: RenewalDoor | None = None,
        plugins: Mapping[str, dict[str, Any]] = DEFAULT_PLUGINS,
    ) -> None:
        self.settings = settings
        self.limits = settings.limits
        self.counters = Counters()
        self.topics = TopicNames()
        self.disconnects_denied = settings.on_denied is OnDenied.DISCONNECT
        loop = asyncio.get_running_loop()
        self.now_s = loop.time
        self.wall_s = time.time
        self.later = loop.call_later
        self.meters = Meters(settings.limits.max_messages_per_s, settings.limits.max_bytes_per_s)
        self._journal = Journal(loop, settings.durability, self.counters)
        self.exchange = Exchange(policy, settings.limits, self.counters, Denials(loop.time), self._journal)
        self.exchange.gateway = str(settings.name)
        self.upstreams = Upstreams(settings.upstreams, self.exchange)
        self.roamers = Roamers(self.exchange, upstream_peer(DeviceId("fleet")))
        self.on_message: Callable[[Session, Publish], None] | None = None
        self.on_client: Callable[[Peer, str], None] | None = None
        self.before_listening: Callable[[], Awaitable[None]] | None = None
        """Called at the start, when the store is taken up and nobody is let in yet."""
        self._tls_context = tls_context
        self._admit = admit
        self._renewal = renewal
        self._sockets: list[socket.socket] = []
        self._renewal_sockets: list[socket.socket] = []
        self._listener: Listener | None = None
        self._renewal_listener: Listener | None = None
        self._connections = Connections(loop, self)
        self._fired: set[asyncio.Task[None]] = set()
        self._listening: dict[Events, list[Callable[..., Coroutine[Any, Any, None]]]] = {}
        bound = ListenerConfig(type=ListenerType.EXTERNAL, bind=f"{settings.listen_host}:{settings.listen_port}")
        # Plug-ins are named explicitly: amqtt's default admits anonymous clients.
        config = BrokerConfig(listeners={"default": bound}, plugins=dict(plugins))
        with warnings.catch_warnings():
            # psutil will be an extra of a later amqtt; this one is pinned.
            warnings.filterwarnings("ignore", message=".*psutil", category=DeprecationWarning)
            super().__init__(config, loop)
        if self._listeners(BrokerEvents.MESSAGE_RECEIVED):
            self.on_message = self._fire_message

    # --- for the gateway ---------------------------------------------------------------------------------

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where it listens, once started."""
        return self._listener.addresses if self._listener else []

    @property
    def renewal_addresses(self) -> list[tuple[str, int]]:
        """Where it listens for those who renew what has expired, once started."""
        return self._renewal_listener.addresses if self._renewal_listener else []

    @property
    def connected_count(self) -> int:
        """Sessions with a connection."""
        return sum(1 for session in self.exchange.sessions if session.connection is not None)

    def publish(self, topic: str, payload: bytes, qos: int = 0, *, retain: bool = False) -> None:
        """Publish a message of the broker's own; `$...` is allowed to it."""
        self.exchange.publish(topic, payload, qos, retain=retain, publisher=None)

    def own_retained(self, topic_filter: str) -> list[bytes]:
        """Return the payloads that the broker itself has retained on some topics."""
        found = (self.exchange.retained.get(topic) for topic in self.exchange.retained.topics(topic_filter))
        return [message.payload for message in found if message is not None and message.publisher is None]

    def on_gateway_message(self, topic_filter: str, callback: Callable[[str, bytes, Peer], None]) -> None:
        """Have messages on the topics of a filter given to `callback`, and to nobody else.

        The policy decides first. With QoS 1 the acknowledgement follows when the callback has returned.
        """
        self.exchange.take_for_gateway(topic_filter, callback)

    def set_policy(self, policy: Policy) -> int:
        """Go by another policy, for what is connected and subscribed as well; return the subscriptions dropped."""
        return self.exchange.set_policy(policy)

    def set_tls_context(self, context: ssl.SSLContext, renewal: ssl.SSLContext | None = None) -> None:
        """Use other credentials or anchors from the next connection on."""
        self._tls_context = context
        if self._listener:
            self._listener.set_context(context)
        if self._renewal and renewal is not None:
            self._renewal = replace(self._renewal, context=renewal)
            if self._renewal_listener:
                self._renewal_listener.set_context(renewal)

    def close_identities(
        self, is_revoked: Callable[[Peer], bool], *, started_s: float | None = None
    ) -> list[ClosedIdentity]:
        """Close everything of revoked identities (`eviction.py`).

        `started_s` is `time.monotonic()` when the revocation arrived; by default, now.
        """
        began_s = time.monotonic() if started_s is None else started_s
        return close_identities(self.exchange, self._connections, is_revoked, began_s)

    def end_connections(self, of: Callable[[Peer], bool], why: str) -> int:
        """End the connections of some peers in good order; return how many.

        Not as a revocation does: nothing is known against these, so wills are published and sessions kept.
        """
        ended = 0
        for connection in self._connections:
            if connection.peer is not None and connection.stream.is_open and of(connection.peer):
                connection.end_because(why)
                ended += 1
        return ended

    # --- life cycle --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up the stored sessions and retained messages, then listen.

        Raises:
            SystemFailureError: an occupied port (before anything else has happened), a store that cannot be used.
            ConfigurationError: a store of a newer version, or of something else.
        """
        self._sockets = bind(self.settings.listen_host, self.settings.listen_port)
        try:
            if self._renewal is not None:
                self._renewal_sockets = bind(self._renewal.settings.host, self._renewal.settings.port)
            if self.settings.durability is not Durability.NONE:
                self._open_store()
            self.upstreams.start()
            if self.before_listening is not None:
                await self.before_listening()
            await super().start()
        except BaseException:
            await self.upstreams.close(0)
            for sock in (*self._sockets, *self._renewal_sockets):
                sock.close()
            await self._journal.close(STORE_TIMEOUT_S)
            raise

    def _open_store(self) -> None:
        folder = self.settings.data_folder
        try:
            private_folder(folder)
        except OSError as error:
            raise SystemFailureError(f"could not make the folder {folder}: {error.strerror}") from error
        store = Store.open(folder / FILE_NAME)
        try:
            stored = store.load()
        except BaseException:
            store.close()
            raise
        self._journal.start(store, stored)
        self.upstreams.take_up(restore(self.exchange, stored, now_s=self.now_s(), wall_s=self._plausible_wall_s()))
        self.forget_expired_sessions()

    def _plausible_wall_s(self) -> float | None:
        """Return seconds since 1970; None by a clock for which the gateway's own certificate is not valid.

        A gateway without a battery for its clock starts in 1970: what it dated then would be long over once the
        clock is set, and queued messages lost.
        """
        wall_s, own = self.wall_s(), read_own_certificate(self.settings.credentials_path)
        return wall_s if own is None or own.is_current(datetime.fromtimestamp(wall_s, UTC)) else None

    async def settle(self) -> bool:
        """Wait, for `STORE_TIMEOUT_S` at most, until all that has happened is on disk; return whether it is."""
        return await self._journal.settle(STORE_TIMEOUT_S)

    async def _start_listeners(self) -> None:
        """Closes S16 and part of S15: our own TLS, its handshakes bounded in time and number, clients required."""
        loop, take = asyncio.get_running_loop(), self._connections.take
        self._listener = Listener(loop, self._sockets, self._tls_context, partial(take, admit=self._admit))
        self._listener.start()
        if self._renewal is not None:
            admit, context = self._renewal.admit, self._renewal.context
            self._renewal_listener = Listener(loop, self._renewal_sockets, context, partial(take, admit=admit))
            self._renewal_listener.start()

    async def shutdown(self) -> None:
        """Closes S8 and S17: a stop that ends, under load too, listeners first, every connection accounted for."""
        await self._fire_and_wait(BrokerEvents.PRE_SHUTDOWN)
        self.transitions.shutdown()
        for listener in (self._listener, self._renewal_listener):
            if listener:
                listener.close()
        for task in (self._session_monitor_task, self._broadcast_task):
            if task is not None:
                task.cancel()
        await self._journal.settle(SETTLE_TIMEOUT_S)  # who waits for an acknowledgement gets it before the end
        await self._connections.close_all(self.limits.shutdown_timeout_s)
        await self.upstreams.close(SETTLE_TIMEOUT_S)
        await self._journal.close(STORE_TIMEOUT_S)
        await self._fire_and_wait(BrokerEvents.POST_SHUTDOWN)
        for fired in self._fired:
            fired.cancel()
        try:
            await asyncio.wait_for(self.plugins_manager.close(), PLUGIN_TIMEOUT_S)
        except TimeoutError:
            _log.warning("a plug-in did not close in time")
        self.transitions.stopping_success()

    async def _session_monitor(self) -> None:
        """Closes S3, S15 and S16: ends what is overdue, and forgets sessions that nobody comes back to."""
        ticks = 0
        while True:
            await asyncio.sleep(TICK_S)
            self._connections.check(self.now_s(), time.time())
            ticks += 1
            if ticks % EXPIRY_TICKS == 0:
                self.forget_expired_sessions()

    def forget_expired_sessions(self) -> None:
        """Forget the sessions whose clients have been gone for `session_expiry_s`."""
        oldest_s = self.now_s() - self.limits.session_expiry_s
        for session in self.exchange.sessions:
            if session.connection is None and session.left_at_s < oldest_s:
                self.exchange.forget(session)
        self.upstreams.forget_orphans(oldest_s)

    # --- amqtt's own paths, closed or led into ours ------------------------------------------------------

    async def _broadcast_loop(self) -> None:
        """Closes S10 and S15: no queue of broadcasts without an end; a publish is delivered where it is read."""

    async def internal_message_broadcast(self, topic: str, data: bytes, qos: int | None = None) -> None:
        """Closes S4: what plug-ins publish ($SYS) goes the way of all else, each delivery decided."""
        self.publish(topic, bytes(data), qos or 0)

    async def retain_message(
        self, source_session: Any, topic_name: str | None, data: bytes | bytearray | None, qos: int | None = None
    ) -> None:
        """Closes S15: retained messages of plug-ins go into the bounded store."""
        del source_session
        if topic_name:
            self.exchange.retain(Retained(topic_name, bytes(data or b""), qos or 0, None))

    async def _client_connected(self, listener_name: str, reader: Any, writer: Any) -> None:
        """Closes S1, S2, S3, S6, S7: amqtt's own sessions, bound to no certificate, take no connection at all."""
        del reader, writer
        raise BrokerError(
            f"could not take a connection on {listener_name!r}: only the gateway's listener takes them"
        )

    async def add_subscription(self, subscription: tuple[str, int], session: Any) -> int:
        """Closes S4: nobody subscribes on behalf of a client; the policy is asked about each SUBSCRIBE."""
        del subscription, session
        raise BrokerError("could not add a subscription: a session belongs to the certificate it was made with")

    def create_offline_session(self, client_id: str) -> Any:
        """Closes S1: no session without a certificate."""
        del client_id
        raise BrokerError("could not make a session: it belongs to the certificate it was made with")

    @property
    def sessions(self) -> Any:
        """A view of our sessions, for plug-ins."""
        return SessionsView(self.exchange)

    @property
    def subscriptions(self) -> Any:
        """A copy of our subscriptions, for plug-ins (S18: made when asked, not at every SUBSCRIBE)."""
        return subscriptions_view(self.exchange)

    @property
    def retained_messages(self) -> Any:
        """A view of our retained messages, for plug-ins."""
        return RetainedView(self.exchange)

    # --- what connections tell ---------------------------------------------------------------------------

    def expired_by(self, peer: Peer) -> timedelta:
        """Return how long after its end the certificate of a peer is let in, on the listener that it came by."""
        return self._renewal.settings.grace if peer.for_renewal and self._renewal else timedelta()

    def secured(self, connection: Connection) -> None:
        """A handshake is over."""
        self._connections.secured(connection)

    def gone(self, connection: Connection) -> None:
        """A connection is over."""
        self._connections.gone(connection)

    def client_connected(self, session: Session) -> None:
        """Tell the gateway and plug-ins."""
        # Who renews what has expired is not seen: a copy of an old key must not blur where the one in use was.
        if self.on_client is not None and session.connection is not None and not session.peer.for_renewal:
            self.on_client(session.peer, session.connection.address)
        self._fire(BrokerEvents.CLIENT_CONNECTED, client_id=session.client_id, client_session=session)

    def client_disconnected(self, session: Session) -> None:
        """Tell plug-ins."""
        self._fire(BrokerEvents.CLIENT_DISCONNECTED, client_id=session.client_id, client_session=session)

    def subscribed(self, session: Session, topic_filter: str, qos: int) -> None:
        """Tell plug-ins."""
        self._fire(BrokerEvents.CLIENT_SUBSCRIBED, client_id=session.client_id, topic=topic_filter, qos=qos)

    def unsubscribed(self, session: Session, topic_filter: str) -> None:
        """Tell plug-ins."""
        self._fire(BrokerEvents.CLIENT_UNSUBSCRIBED, client_id=session.client_id, topic=topic_filter)

    def _fire_message(self, session: Session, packet: Publish) -> None:
        message = IncomingApplicationMessage(
            packet.packet_id or None, packet.topic, packet.qos, packet.payload, packet.retain
        )
        self._fire(BrokerEvents.MESSAGE_RECEIVED, client_id=session.client_id, message=message)

    def _listeners(self, event: Events) -> list[Callable[..., Coroutine[Any, Any, None]]]:
        """Return what the plug-ins have for an event; they are loaded once, at the start."""
        found = self._listening.get(event)
        if found is None:
            name = f"on_{event}"
            found = [getattr(plugin, name) for plugin in self.plugins_manager.plugins if hasattr(plugin, name)]
            self._listening[event] = found
        return found

    def _fire(self, event: Events, **details: Any) -> None:
        # Each plug-in gets a task of its own, as from amqtt's manager, whose task to make them we leave out.
        loop = asyncio.get_running_loop()
        for callback in self._listeners(event):
            task = loop.create_task(callback(**details))
            self._fired.add(task)
            task.add_done_callback(self._fired.discard)

    async def _fire_and_wait(self, event: Events) -> None:
        try:
            await asyncio.wait_for(self.plugins_manager.fire_event(event, wait=True), PLUGIN_TIMEOUT_S)
        except TimeoutError:
            _log.warning("a plug-in took too long over %s", event.value)
