"""The thread of a client: it connects, keeps the connection, and connects again.

Rules:

- After each connect, in this order: SUBSCRIBE for every filter, the presence, what was sent and never
  acknowledged, what was published meanwhile. Whoever sees a device online can send it a command.
- Why a connection failed decides how long to wait (`backoff`).
- A message is acknowledged to the connection it came on, and to no other.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from enum import Enum, auto
from typing import TYPE_CHECKING

from birthmark.device import connection_errors as say
from birthmark.device import presence
from birthmark.device.connection_checks import Check
from birthmark.device.connection_errors import Circumstances
from birthmark.device.errors import RefusedError, UnreachableError
from birthmark.device.events import AttemptFailed, Connected, Disconnected, SubscriptionDenied
from birthmark.device.mqtt import MqttLink
from birthmark.device.outbound import Publications, Subscriptions
from birthmark.device.returning import Returning
from birthmark.device.server_probe import seen_at
from birthmark.device.tls import device_context

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from birthmark.device.backoff import RetryTimer
    from birthmark.device.clock import Clock
    from birthmark.device.credentials import Credentials
    from birthmark.device.dispatch import Dispatcher
    from birthmark.device.errors import ConnectionFailedError
    from birthmark.device.keepalive import Keepalive
    from birthmark.device.mqtt import Ending
    from birthmark.device.received import Message
    from birthmark.device.route import Route
    from birthmark.device.tls import DeviceContext, DeviceSocket

MAX_WAIT_S = 60.0
"""The longest wait for something to happen; the link looks at its keepalive more often than that."""
BEAT_S = 15.0
"""How often the thread shows that it lives while it waits for the next attempt."""
STALE_S = 120.0
"""A thread that has not shown it for so long hangs: no name resolution and no handshake takes longer."""
LEAVE_S = 0.5
"""What a stop spends on writing DISCONNECT, after the time it was given."""


class Departure(Enum):
    """How far a stop has come."""

    NOT_YET = auto()
    GOODBYE_SAID = auto()
    LEFT = auto()


class Worker:
    """Connects and serves, on a thread of its own.

    Args:
        credentials: who we are, and where to connect.
        client_id: the CN, or for a service `CN:suffix`.
        clean_session: whether the broker forgets us between connections.
        has_presence: whether to keep `devices/{id}/status`.
        connect_timeout_s: for TCP, for TLS and for CONNACK each.
        retry: how long to wait between attempts.
        route: which broker to connect to next.
        keepalive: how long a connection may be silent.
        clock: what is known of the time.
        dispatcher: runs callbacks.
        on_message: on the dispatcher's thread; is given each message, and returns whether to acknowledge it.
        settled: on the worker's thread; is told what became of each attempt to connect, with which credentials.

    Raises:
        CredentialError: key and certificate cannot be used.
    """

    def __init__(
        self,
        credentials: Credentials,
        *,
        client_id: str,
        clean_session: bool,
        has_presence: bool,
        connect_timeout_s: float,
        retry: RetryTimer,
        route: Route,
        keepalive: Keepalive,
        clock: Clock,
        dispatcher: Dispatcher,
        on_message: Callable[[Message], bool],
        settled: Callable[[Credentials, ConnectionFailedError | None], object],
    ) -> None:
        self._credentials = credentials
        self._client_id = client_id
        self._has_presence = has_presence
        self._connect_timeout_s = connect_timeout_s
        self._retry = retry
        self._route = route
        self._keepalive = keepalive
        self._returning = Returning(route, timeout_s=connect_timeout_s, found=self.wake)
        self._clock = clock
        self._dispatcher = dispatcher
        self._on_message = on_message
        self._settled = settled
        self._link = MqttLink(
            client_id=client_id,
            clean_session=clean_session,
            context=device_context(credentials, clock),
            connect_timeout_s=connect_timeout_s,
            listener=self,
        )
        self._own = credentials.facts
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        # Guarded by `_changed`: other threads put in, the worker takes out.
        self.publications = Publications(self._changed)
        self.subscriptions = Subscriptions(self._changed)
        self._handled: deque[tuple[int, int]] = deque()
        self._online = False
        self._farewell_by: float | None = None
        self._is_opening = False
        self._has_ended = False
        self._last_error: ConnectionFailedError | None = None
        self._next: tuple[Credentials, DeviceContext] | None = None
        # The worker's own.
        self._alive_at = float("-inf")
        self._connection = 0
        self._session_present = False

    @property
    def is_online(self) -> bool:
        """Whether there is a connection that the broker accepted."""
        return self._online

    @property
    def is_alive(self) -> bool:
        """Whether the thread has shown within `STALE_S` that it lives."""
        return time.monotonic() < self._alive_at + STALE_S

    def wake(self) -> None:
        """Have the thread look at what there is to do."""
        self._link.wake()

    def use(self, credentials: Credentials) -> None:
        """Leave in good order, and connect anew with other credentials of the same identity.

        Raises:
            CredentialError: key and certificate cannot be used; nothing changes.
        """
        context = device_context(credentials, self._clock)
        with self._changed:
            self._next = (credentials, context)
            self._changed.notify_all()
        self.wake()

    def start(self) -> None:
        """Start connecting."""
        self._thread = threading.Thread(target=self._run, name=f"birthmark-{self._client_id}", daemon=True)
        self._thread.start()

    def wait_for_first(self, timeout_s: float) -> None:
        """Wait until connected, at least until the first attempt has ended.

        Raises:
            RefusedError: the broker said no.
            UnreachableError: it was not reached within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._changed.wait_for(lambda: self._online or self._last_error or self._farewell_by is not None)
            while not self._online:
                error, left_s = self._last_error, deadline - time.monotonic()
                if self._farewell_by is not None or error is None:
                    raise UnreachableError("could not connect: the client was stopped")
                if left_s <= 0 or isinstance(error, RefusedError):
                    raise error
                self._changed.wait(left_s)

    def stop(self, timeout_s: float) -> None:
        """Send what waits, say goodbye, disconnect, and end the thread.

        Args:
            timeout_s: how long to wait for acknowledgements; what has none by then is given up.
        """
        with self._changed:
            if self._farewell_by is None:
                self._farewell_by = time.monotonic() + timeout_s
                self._changed.notify_all()
        self.wake()
        if self._thread is None:
            self._end()
            return
        with self._changed:
            # A name resolution or a TCP connect can take long, and nothing can end it: the thread is a daemon, and
            # ends by itself after that.
            self._changed.wait_for(lambda: self._has_ended or self._is_opening, timeout=timeout_s + 2 * LEAVE_S)
        if self._has_ended:
            self._thread.join(LEAVE_S)
        else:
            # OpenSSL's clean-up at the end of the process would take away what a handshake works with.
            atexit.register(self._thread.join, LEAVE_S)

    # What follows runs on the worker's thread.

    def _run(self) -> None:
        try:
            self._link.prepare()
            while self._farewell_by is None:
                error, held_s = self._connect_and_serve()
                if error is not None:
                    self._wait_after(error, held_s)
        finally:
            self._end()

    def _connect_and_serve(self) -> tuple[ConnectionFailedError | None, float]:
        """Return why the connection ended (None: we were stopped) and how long it held."""
        self._alive_at = time.monotonic()
        self._connection += 1
        self._take_next()
        will = presence.last_will(self._credentials.device_id, self._clock.now()) if self._has_presence else None
        try:
            self._set_opening(is_opening=True)
            opened = self._link.open(self._route.broker, keepalive_s=self._keepalive.current_s, will=will)
        except (OSError, UnicodeError) as error:
            return say.explained(error, self._around(error)), 0.0
        finally:
            self._set_opening(is_opening=False)
        answer_by = time.monotonic() + self._connect_timeout_s
        began: float | None = None
        departure = Departure.NOT_YET
        left_at: float | None = None
        while self._link.turn(
            self._next_look_s(began, answer_by), reading=not (self._online and self._dispatcher.is_full)
        ):
            self._alive_at = time.monotonic()
            self._clock.keep()
            if began is None and self._link.ending().connected:
                began = time.monotonic()
                self._come_online(opened)
            if self._online and departure is Departure.NOT_YET:
                self._send_what_waits()
            if self._farewell_by is not None:
                departure = self._depart(departure, self._farewell_by)
            elif self._next is not None or self._returning.is_due or left_at is not None:
                left_at = self._leave(left_at)
            elif began is None and time.monotonic() >= answer_by:
                self._link.cut(refused=True)
                return say.no_connack(self._connect_timeout_s, self._around()), 0.0
        self._go_offline()
        self._returning.ended()
        if self._farewell_by is not None or left_at is not None:
            return None, 0.0
        return self._verdict(self._link.ending()), time.monotonic() - began if began is not None else 0.0

    def _take_next(self) -> None:
        with self._changed:
            following, self._next = self._next, None
        if following is not None:
            self._credentials, context = following
            if self._credentials.broker != self._route.first:
                self._route.replace_first(self._credentials.broker)
            self._own = self._credentials.facts
            self._link.use(context)

    def _leave(self, left_at: float | None) -> float:
        """Say DISCONNECT, and cut the connection if the broker does not close it: we go elsewhere."""
        now = time.monotonic()
        if left_at is None:
            self._link.leave()
            return now
        if now >= left_at + LEAVE_S:
            self._link.cut()
        return left_at

    def _depart(self, departure: Departure, farewell_by: float) -> Departure:
        """Take the next step of a stop, if it is time for it: what waits, goodbye, DISCONNECT, the end."""
        has_time = self._online and time.monotonic() < farewell_by
        if departure is Departure.NOT_YET and not (has_time and not self.publications.is_empty):
            departure = Departure.GOODBYE_SAID
            if self._online and self._has_presence:
                said = presence.goodbye(self._credentials.device_id, self._clock.now())
                self.publications.send_now(said, self._link.publish)
        if departure is Departure.GOODBYE_SAID and not (has_time and not self.publications.is_empty):
            departure = Departure.LEFT
            self._link.leave()
        if departure is Departure.LEFT and time.monotonic() >= farewell_by + LEAVE_S:
            self._link.cut()
        return departure

    def _next_look_s(self, began: float | None, answer_by: float) -> float:
        due = [answer_by] if began is None else []
        if self._next is not None or self._returning.is_due:
            due.append(time.monotonic() + LEAVE_S)
        elif (look_s := self._returning.look_in_s()) is not None:
            due.append(time.monotonic() + look_s)
        if self._farewell_by is not None:
            now = time.monotonic()
            due = [self._farewell_by if now < self._farewell_by else self._farewell_by + LEAVE_S]
        outbox = self.publications.outbox
        if began is not None and outbox is not None and (rate_s := outbox.wait_s()) is not None:
            due.append(time.monotonic() + rate_s)
        return max(0.0, min((at - time.monotonic() for at in due), default=MAX_WAIT_S))

    def _set_opening(self, *, is_opening: bool) -> None:
        with self._changed:
            self._is_opening = is_opening
            self._changed.notify_all()

    def _verdict(self, ending: Ending) -> ConnectionFailedError:
        around = self._around()
        if ending.fell_silent:
            return say.fell_silent(self._keepalive.current_s, around)
        if ending.connected:
            return say.broke_mqtt(around) if ending.broke_mqtt else say.lost(ending.failure, around)
        self._link.cut(refused=True)
        if ending.connack_code:
            return say.refused_by_connack(ending.connack_code, around)
        if ending.answer:
            return say.not_mqtt(around)
        return say.ended_before_connack(ending.failure, around)

    def _around(self, error: Exception | None = None) -> Circumstances:
        timed = error is not None and say.is_about_time(error)
        return Circumstances(
            broker=self._route.broker,
            device_id=self._credentials.device_id,
            own=self._own,
            now=self._clock.system(),
            floor=self._clock.floor,
            server=seen_at(self._route.broker, timeout_s=self._connect_timeout_s) if timed else None,
        )

    def _wait_after(self, error: ConnectionFailedError, held_s: float) -> None:
        verdict: ConnectionFailedError | None = error
        if self._retry.has_held(held_s):
            self._route.restart()
        else:
            verdict = self._route.failed(error)
        wait_s = 0.0 if verdict is None else self._retry.wait_s(verdict, connected_for_s=held_s)
        if held_s:
            self._keepalive.ended(held_s, in_silence=self._link.ending().fell_silent)
            self._dispatcher.tell(Disconnected(error, held_s, wait_s))
        else:
            self._dispatcher.tell(AttemptFailed(error, wait_s))
        with self._changed:
            self._last_error = verdict or self._last_error
            self._changed.notify_all()
        self._settled(self._credentials, error)
        until = time.monotonic() + wait_s
        with self._changed:
            while self._farewell_by is None and self._next is None and (left_s := until - time.monotonic()) > 0:
                self._alive_at = time.monotonic()
                self._changed.wait(min(left_s, BEAT_S))

    def _come_online(self, opened: DeviceSocket) -> None:
        with self._changed:
            self._online = True
            self._changed.notify_all()
        self._settled(self._credentials, None)
        self._returning.connected()
        moment = opened.moment or self._clock.moment()
        self._clock.connected(moment, opened.chain)
        self._dispatcher.tell(
            Connected(
                broker=self._route.broker,
                client_id=self._client_id,
                tls_version=opened.version() or "",
                tls_resumed=bool(opened.session_reused),
                session_present=self._session_present,
                moment=moment,
            )
        )

    def _go_offline(self) -> None:
        with self._changed:
            self._online = False
            self.publications.connection_lost()

    def _send_what_waits(self) -> None:
        with self._changed:
            handled, self._handled = self._handled, deque()
        for connection, packet_id in handled:
            if connection == self._connection:
                self._link.acknowledge(packet_id)
        self.publications.send_unsent(self._link.publish)
        for topic_filter in self.subscriptions.take_dropped():
            self._link.unsubscribe(topic_filter)
        self.subscriptions.ask_for_new(self._link.subscribe)

    def _end(self) -> None:
        self._link.release()
        with self._changed:
            self._online = False
            self._farewell_by = self._farewell_by or time.monotonic()
            self._has_ended = True
            self.publications.close()
            self.subscriptions.close()
            self._changed.notify_all()

    # `mqtt.Listener`: called within `turn`.

    def mqtt_connected(self, *, session_present: bool) -> None:
        """CONNACK 0: subscribe and say that we are here, before paho sends again what was not acknowledged."""
        self._session_present = session_present
        if self.publications.outbox is not None:
            self.publications.outbox.connected()
        self.subscriptions.ask_for_all(self._link.subscribe)
        if self._has_presence:
            self.publications.send_now(
                presence.online(self._credentials.device_id, self._clock.now()), self._link.publish
            )

    def mqtt_message(self, packet_id: int, message: Message) -> None:
        """Hand a message to the dispatcher; it is acknowledged when its callbacks have run."""
        connection = self._connection

        def handle() -> None:
            is_done = True
            try:
                is_done = self._on_message(message)
            finally:
                if message.qos and is_done:
                    with self._changed:
                        self._handled.append((connection, packet_id))
                    self._link.wake()

        self._dispatcher.take(handle)

    def mqtt_published(self, packet_id: int) -> None:
        """Settle a message of ours."""
        self.publications.acknowledged(packet_id)

    def mqtt_subscribed(self, packet_id: int, granted: Sequence[bool]) -> None:
        """Settle a subscription, filter by filter."""
        for topic_filter, acknowledgement in self.subscriptions.answered(packet_id, granted):
            self._dispatcher.tell(SubscriptionDenied(topic_filter))
            acknowledgement.settle(
                RefusedError(
                    f"could not {acknowledgement.what} as {self._client_id}: the broker's policy denies it",
                    f"`birthmark-broker policy explain {self._credentials.device_id} subscribe FILTER` says why",
                    Check.NOT_AUTHORISED,
                )
            )
