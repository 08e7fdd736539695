"""A client of the gateway: the library form of a device, and of a service.

    from birthmark.device import Client

    client = Client.from_folder("/var/lib/birthmark")

    @client.command("reboot")
    def reboot(command):
        return {"rebooting": True}          # goes back to whoever asked

    @client.every(30, telemetry="temperature")
    def temperature():
        return {"celsius": 21.5}

    with client:
        client.publish(client.telemetry("started"), {"version": "1.4"}, wait=10)

Rules:

- It connects again by itself, for ever, until it is stopped; subscriptions and unacknowledged messages come along.
- Every method may be called from any thread. Callbacks run on one thread of their own, in order; one that raises
  is reported and costs nothing else.
- A device keeps its presence (`presence`) and its MQTT session; a service has neither, unless it asks.
"""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypedDict, Unpack

from birthmark.device import topics
from birthmark.device.backoff import RetryTimer
from birthmark.device.clock import Clock
from birthmark.device.credentials import Credentials
from birthmark.device.dispatch import Dispatcher
from birthmark.device.errors import ConfigurationError, IdentityError, LocalProtocolError, UnreachableError
from birthmark.device.escape import escaped
from birthmark.device.events import AttemptFailed, Connected, Event, HandlerFailed
from birthmark.device.handlers import Handlers
from birthmark.device.identity import DeviceId
from birthmark.device.keepalive import Keepalive
from birthmark.device.outbox.settings import FILE as OUTBOX_FILE
from birthmark.device.publication import Acknowledgement, Outgoing, Payload, as_bytes, check_size
from birthmark.device.route import Route
from birthmark.device.settings import MAX_PACKET_BYTES, RETURN_AFTER_S, DeviceSettings
from birthmark.device.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from birthmark.device.asking import Reply
    from birthmark.device.commands import CommandHandler, Commands
    from birthmark.device.credentials import BrokerAddress
    from birthmark.device.errors import ConnectionFailedError
    from birthmark.device.handlers import MessageHandler
    from birthmark.device.outbox.outbox import Outbox, OutboxState
    from birthmark.device.outbox.settings import OutboxSettings
    from birthmark.device.periodic import Periodic, Reading
    from birthmark.device.received import Message
    from birthmark.device.record import Recorder
    from birthmark.device.renewal.renewer import Renewer
    from birthmark.device.renewal.schedule import Pace


CONNECT_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
CLOSE_OUTBOX_S = 5.0
"""For the disk, after the time that a stop was given."""


class ClientOptions(TypedDict, total=False):
    """The options of `Client`, for those who pass them on."""

    presence: bool | None
    clean_session: bool | None
    client_suffix: str
    observe: Callable[[Event], object] | None
    connect_timeout_s: float
    retry: RetryTimer | None
    now: Callable[[], datetime]
    clock: Clock | None
    trusts_gateway_clock: bool
    takes_all: bool
    renewal: bool | None
    renewal_port: int | None
    renewal_pace: Pace | None
    outbox: OutboxSettings | None
    further_addresses: Sequence[BrokerAddress]
    return_after_s: float
    keepalive_s: tuple[int, int] | None
    max_packet_bytes: int | None


class Client:
    """One identity's connection to its broker.

    Args:
        credentials: who it is, and where the broker is.
        presence: whether to keep `devices/{id}/status`; by default a device does and a service does not.
        clean_session: whether the broker forgets subscriptions and queued messages between connections; by default
            it keeps a device's and forgets a service's.
        client_suffix: for a service that opens several sessions: the client id is then `CN:suffix`.
        observe: is given every `events.Event`, on the callbacks' thread.
        connect_timeout_s: for TCP, for the TLS handshake and for the broker's answer, each.
        retry: how long to wait between attempts.
        now: the system's clock.
        clock: what is known of the time; by default of a device what its state folder holds (docs/clock.md).
        trusts_gateway_clock: whether to ask the gateway for the time, and go by it if it is later.
        takes_all: whether messages of QoS 1 that no handler takes are acknowledged, and gone; otherwise they wait
            at the broker for the next client of this session.
        renewal: whether to renew the certificate by itself when it is time (docs/renewal.md); by default a device
            with a state folder does.
        renewal_port: where the gateway renews what has expired; by default the port after its own.
        renewal_pace: how long a renewal waits for what.
        max_packet_bytes: what the gateway takes; by default a device's 1 MiB, and a service's any.
        outbox: keep messages of QoS 1 on disk until the broker has them (docs/outbox.md); without, in memory.
        further_addresses: brokers to try, in this order, when the one in the credentials fails.
        return_after_s: how soon, connected to one of those, the one in the credentials is looked for.
        keepalive_s: between which times the keepalive adapts to the network; by default from a quarter of what was
            enrolled to that.

    Raises:
        CredentialError: key and certificate cannot be used.
        IdentityError: a suffix on a device's client id.
        ConfigurationError: the renewal port is none, or there is no place for an outbox.
    """

    def __init__(
        self,
        credentials: Credentials,
        *,
        presence: bool | None = None,
        clean_session: bool | None = None,
        client_suffix: str = "",
        observe: Callable[[Event], object] | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        retry: RetryTimer | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Clock | None = None,
        trusts_gateway_clock: bool = False,
        takes_all: bool = True,
        renewal: bool | None = None,
        renewal_port: int | None = None,
        renewal_pace: Pace | None = None,
        outbox: OutboxSettings | None = None,
        further_addresses: Sequence[BrokerAddress] = (),
        return_after_s: float = RETURN_AFTER_S,
        keepalive_s: tuple[int, int] | None = None,
        max_packet_bytes: int | None = None,
    ) -> None:
        is_service = credentials.role.is_reserved
        has_presence = not is_service if presence is None else presence
        if client_suffix and not is_service:
            raise IdentityError(
                f"could not connect as {credentials.device_id}:{escaped(client_suffix)}: a device has one session",
                hint="only a service may open several",
            )
        self._credentials = credentials
        self._observe = observe
        self._takes_all = takes_all
        self._max_packet_bytes = max_packet_bytes or (None if is_service else MAX_PACKET_BYTES)
        self._handlers = Handlers(self._failed)
        self._commands: Commands | None = None
        self._periodic: Periodic | None = None
        self._started = False
        self._connect_timeout_s = connect_timeout_s
        self._clock = clock or Clock.of(credentials, system=now)
        self._dispatcher = Dispatcher(self._observed, self._wake)
        self._renewer: Renewer | None = None
        if credentials.is_slot if renewal is None else renewal:
            self._renewer = self._make_renewer(renewal_port, renewal_pace)
            credentials = self._renewer.prepare(credentials)
        self._worker = Worker(
            credentials,
            client_id=f"{credentials.device_id}:{client_suffix}" if client_suffix else str(credentials.device_id),
            clean_session=is_service if clean_session is None else clean_session,
            has_presence=has_presence,
            connect_timeout_s=connect_timeout_s,
            retry=retry or RetryTimer(),
            route=Route([credentials.broker, *further_addresses], return_after_s),
            keepalive=Keepalive(credentials.keepalive_s, keepalive_s),
            clock=self._clock,
            dispatcher=self._dispatcher,
            on_message=self._received,
            settled=self._renewer.settled if self._renewer else _nobody,
        )
        self._outbox = None if outbox is None else self._make_outbox(outbox)
        self._worker.publications.outbox = self._outbox
        if self._renewer is not None:
            self.subscribe(topics.renewal_answer(credentials.device_id), self._renewal_answered)
        self._recorder = self._make_recorder() if self._credentials.is_slot and has_presence else None
        self._time_asking: TimeAsking | None = None
        if trusts_gateway_clock:
            from birthmark.device.time_asking import TimeAsking  # noqa: PLC0415 - loaded as the renewal is

            self._time_asking = asking = TimeAsking(
                self._clock,
                publish=lambda payload: self.publish(topics.time_request(self.device_id), payload, qos=0),
                own=lambda: self._credentials.facts,
            )
            self.subscribe(topics.time_answer(credentials.device_id), asking.answered, qos=0)

    @classmethod
    def from_credentials(cls, credentials: Credentials, **options: Unpack[ClientOptions]) -> Self:
        """Return a client for `credentials`."""
        return cls(credentials, **options)

    @classmethod
    def from_folder(
        cls, state_dir: Path | str, *, broker: BrokerAddress | None = None, **options: Unpack[ClientOptions]
    ) -> Self:
        """Return a client for the enrolled device whose state is in `state_dir`, as its `device.toml` says.

        Raises:
            CredentialError: there are no credentials, or they cannot be used.
            ConfigurationError: `device.toml` makes no sense.
        """
        settings = DeviceSettings.from_folder(Path(state_dir))
        options.setdefault("outbox", settings.outbox)
        options.setdefault("max_packet_bytes", settings.max_packet_bytes)
        options.setdefault("trusts_gateway_clock", settings.trusts_gateway_clock)
        options.setdefault("keepalive_s", settings.keepalive_s)
        if broker is None:  # whoever names one means that one
            options.setdefault("further_addresses", settings.further_addresses)
            options.setdefault("return_after_s", settings.return_after_s)
        return cls(Credentials.from_folder(state_dir, broker=broker), **options)

    @property
    def device_id(self) -> DeviceId:
        """Who we are."""
        return self._credentials.device_id

    @property
    def credentials(self) -> Credentials:
        """What we prove it with."""
        return self._credentials

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection that the broker accepted, as far as we know."""
        return self._worker.is_online

    @property
    def is_alive(self) -> bool:
        """Whether the thread that connects and serves has shown of late that it does not hang: for a watchdog.

        Asked in a callback, it speaks for the thread of the callbacks, too.
        """
        return self._worker.is_alive

    def telemetry(self, name: str) -> str:
        """Return the topic for one kind of our readings."""
        return topics.telemetry(self.device_id, name)

    def start(self) -> None:
        """Start connecting, and return at once; failures go to the observer, and it tries for ever.

        Raises:
            LocalProtocolError: it was started before.
        """
        if self._started:
            raise LocalProtocolError("could not start a client: it was started before", "make a new one")
        self._started = True
        self._dispatcher.start()
        if self._recorder is not None:
            self._dispatcher.do(self._recorder.started)
        if self._outbox is not None:
            self._outbox.start()
        if self._renewer is not None:
            self._renewer.start()
        self._worker.start()
        if self._periodic is not None:
            self._periodic.start()

    def connect(self, timeout_s: float = 0.0) -> None:
        """Start, and wait until connected.

        Args:
            timeout_s: for how long to keep trying to reach the broker; 0: one attempt.

        Raises:
            RefusedError: the broker said no, or we did not trust it.
            UnreachableError: it was not reached in time. In both cases the client is stopped.
        """
        self.start()
        try:
            self._worker.wait_for_first(timeout_s)
        except BaseException:
            self.stop(timeout_s=0.0)
            raise

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Send what waits, say goodbye, disconnect, and end both threads. A second call does nothing.

        Args:
            timeout_s: how long to wait for acknowledgements; what has none by then is given up.
        """
        if self._periodic is not None:
            self._periodic.stop()
        if self._renewer is not None:
            self._renewer.stop(timeout_s)
        self._worker.stop(timeout_s)
        if self._outbox is not None:
            self._outbox.close(max(timeout_s, CLOSE_OUTBOX_S))
        self._dispatcher.stop(timeout_s)
        if self._recorder is not None and self._started:
            self._recorder.stopped()

    def __enter__(self) -> Self:
        """Connect, with one attempt; see `connect`."""
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()

    def publish(
        self,
        topic: str,
        payload: Payload = b"",
        *,
        qos: int = 1,
        retain: bool = False,
        wait: float | None = None,
        keep: bool = True,
        defer: bool = False,
    ) -> Acknowledgement:
        """Publish, now or as soon as there is a connection.

        With an outbox, a message of QoS 1 is on the disk when this returns: it survives the process and the power,
        and goes out after all that were published before it.

        Args:
            topic: where.
            payload: bytes, text, or a mapping that becomes a JSON object.
            qos: 1: sent until acknowledged, without an outbox as long as this process lives; 0: sent once.
            retain: whether the broker keeps it for later subscribers.
            wait: seconds to wait for the broker's acknowledgement; None: do not wait.
            keep: False: past the outbox, from memory; for what is worth nothing later.
            defer: True: return before it is on the disk; the acknowledgement's `wait_stored` says when it is.

        Returns:
            The acknowledgement to come.

        Raises:
            LocalProtocolError: MQTT has no such topic, payload or quality of service; or it is larger than what
                the gateway takes: sent again and again, it would end every connection.
            UnreachableError: not acknowledged in time (it stays queued), or too many messages wait already.
            SystemFailureError: the outbox's disk does not take it.
        """
        if self._outbox is None or not keep or qos != 1:
            octets = as_bytes(payload)
            check_size(topic, octets, self._max_packet_bytes)
            acknowledgement = self._worker.publications.add(Outgoing(topic, octets, qos, retain))
            self._worker.wake()
        else:
            acknowledgement = self._outbox.put(topic, payload, retain=retain)
            if not defer:
                self._outbox.wait_stored(acknowledgement)
        if wait is not None:
            acknowledgement.wait(wait)
        return acknowledgement

    def subscribe(
        self, topic_filter: str, handler: MessageHandler, *, qos: int = 1, wait: float | None = None
    ) -> Acknowledgement:
        """Call `handler` for every message on a topic that the filter matches, across reconnects.

        Several handlers may share a filter; all whose filter matches are called.

        Args:
            topic_filter: in MQTT's syntax.
            handler: is given each message, on the callbacks' thread.
            qos: the best quality of service to ask for, 0 or 1.
            wait: seconds to wait for the broker's answer; None: do not wait (a denial goes to the observer).

        Raises:
            LocalProtocolError: MQTT has no such filter or quality of service.
            RefusedError: the broker's policy denies it (with `wait`).
            UnreachableError: there was no answer in time (with `wait`).
        """
        if qos not in (0, 1):
            raise LocalProtocolError(
                f"could not subscribe to {escaped(topic_filter)}: the quality of service is 0 or 1"
            )
        self._handlers.add(topic_filter, handler)
        acknowledgement = self._worker.subscriptions.add(topic_filter, qos)
        self._worker.wake()
        if wait is not None:
            acknowledgement.wait(wait)
        return acknowledgement

    def wait_for_callbacks(self, timeout_s: float) -> None:
        """Wait until the callbacks of everything that has come so far have run. Not from a callback.

        A broker sends what is retained before it answers the next SUBSCRIBE: with that answer, and after this, all
        of it has been seen.

        Raises:
            UnreachableError: they took longer than `timeout_s`.
        """
        ran = threading.Event()
        self._dispatcher.do(ran.set)
        if not ran.wait(timeout_s):
            raise UnreachableError(f"could not run every callback within {timeout_s:g} s")

    def unsubscribe(self, topic_filter: str) -> None:
        """Take every handler of this filter away, and tell the broker."""
        self._handlers.remove(topic_filter)
        self._worker.subscriptions.remove(topic_filter)
        self._worker.wake()

    def on(self, topic_filter: str, *, qos: int = 1) -> Callable[[MessageHandler], MessageHandler]:
        """Decorate a handler for a filter; see `subscribe`."""

        def register(handler: MessageHandler) -> MessageHandler:
            self.subscribe(topic_filter, handler, qos=qos)
            return handler

        return register

    def command(self, name: str = "#") -> Callable[[CommandHandler], CommandHandler]:
        """Decorate the handler of one command to this device (`#`: of every command that has no other).

        What it returns goes back to whoever asked (`request`); of a plain command, if it is not None. A request is
        begun at most once, and not after its deadline; see `commands`.

        Raises:
            LocalProtocolError: when it decorates: a command cannot have that name.
        """

        def register(handler: CommandHandler) -> CommandHandler:
            commands = self._commands or self._new_commands()
            commands.add(name, handler)
            if self._commands is None:
                self._commands = commands
                self.subscribe(topics.commands(self.device_id), commands.take)
            return handler

        return register

    def every(
        self, interval_s: float, *, telemetry: str | None = None, delay_s: float = 0.0
    ) -> Callable[[Reading], Reading]:
        """Decorate what is to be done every `interval_s` seconds while the client runs, connected or not.

        Args:
            interval_s: from 0.001 to a year.
            telemetry: publish what it returns, if not None, as this kind of our readings.
            delay_s: when the first time comes, up to a year. Many devices that get their power back at once should
                not all speak at once: `delay_s=random.uniform(0, interval_s)`.

        Raises:
            LocalProtocolError: when it decorates: there is no such interval, delay or topic.
        """
        topic = None if telemetry is None else Outgoing(self.telemetry(telemetry), b"").topic

        def register(reading: Reading) -> Reading:
            if self._periodic is None:
                self._periodic = self._new_periodic()
            self._periodic.add(interval_s, reading, topic=topic, delay_s=delay_s)
            return reading

        return register

    def request(
        self, device_id: DeviceId | str, command: str, payload: Payload = b"", *, timeout_s: float
    ) -> Reply:
        """Have a device carry out a command, and wait for its reply; for operators.

        Args:
            device_id: the device.
            command: the command's name.
            payload: what goes with it.
            timeout_s: how long to wait. A device that gets the command later than that does not begin.

        Raises:
            CommandFailedError: the device answered that it was not done, or not in time.
            RefusedError: the policy does not let us listen for the reply.
            UnreachableError: no reply within `timeout_s`; the device does not begin after that.
            LocalProtocolError: no such command, payload or time; or called from a callback, on whose thread the
                reply would come.
        """
        from birthmark.device.asking import ask  # noqa: PLC0415 - a device does not need it

        if self._dispatcher.is_current_thread:
            raise LocalProtocolError(
                "could not wait for a reply in a callback: replies come on the same thread",
                hint="call request() on a thread of your own",
            )
        return ask(
            self, DeviceId(str(device_id)), command, as_bytes(payload), timeout_s=timeout_s, now=self._clock.now
        )

    def use(self, credentials: Credentials) -> None:
        """Leave in good order, and connect anew with other credentials of the same identity.

        Subscriptions, and what waits to be acknowledged, come along.

        Raises:
            CredentialError: key and certificate cannot be used; nothing changes.
            IdentityError: they are another identity's.
        """
        if credentials.device_id != self.device_id:
            raise IdentityError(f"could not go on as {credentials.device_id}: this client is {self.device_id}")
        self._worker.use(credentials)
        self._keep(credentials)

    def renew(self) -> None:
        """Renew the certificate as soon as there is a connection, whenever it is due; returns at once.

        What becomes of it goes to the observer (`events.RenewalChanged`).

        Raises:
            LocalProtocolError: this client does not renew.
        """
        if self._renewer is None:
            raise LocalProtocolError(
                "could not renew: this client has no state folder to renew in",
                "only an enrolled device renews by itself; a service: birthmark issue-operator NAME --renew",
            )
        self._renewer.renew_now()

    def _make_renewer(self, port: int | None, pace: Pace | None) -> Renewer:
        # Imported here: whoever does not renew, such as a service, does not load it.
        from birthmark.device.renewal.connection import RenewalConnection  # noqa: PLC0415
        from birthmark.device.renewal.renewer import Renewer  # noqa: PLC0415
        from birthmark.device.renewal.store import RenewalStore  # noqa: PLC0415

        if port is not None:
            self._credentials.broker.changed(port=port)  # refused now, and not when the certificate has expired
        store = RenewalStore(self._credentials.pem_path.parent, broker=self._credentials.broker)
        connection = RenewalConnection(
            self.device_id,
            port,
            use=self.use,
            keep=self._keep,
            publish=self._publish_now,
            tell=self._dispatcher.tell,
            open_apart=self._open_apart,
        )
        return Renewer(store, connection, clock=self._clock, pace=pace)

    def _make_recorder(self) -> Recorder:
        from birthmark.device.record import Recorder  # noqa: PLC0415 - loaded as the renewal is

        return Recorder(self._credentials.pem_path.parent, self._clock, outbox=self._outbox_state)

    def _renewal_answered(self, message: Message) -> None:
        if self._renewer is not None and not message.retained:  # what is retained there answers nobody
            self._renewer.answered(message.payload)

    def _keep(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def _publish_now(self, topic: str, payload: bytes) -> Acknowledgement:
        """Publish what somebody waits for now: behind a week's readings it would come too late."""
        return self.publish(topic, payload, keep=False)

    def _outbox_state(self) -> OutboxState | None:
        return None if self._outbox is None else self._outbox.state()

    def _make_outbox(self, settings: OutboxSettings) -> Outbox:
        from birthmark.device.outbox.outbox import Outbox  # noqa: PLC0415 - SQLite, only for who has an outbox

        if settings.path is None and not self._credentials.is_slot:
            raise ConfigurationError(
                f"could not keep an outbox for {self.device_id}: it has no state folder",
                hint="name a file: OutboxSettings(path=...)",
            )
        return Outbox(
            settings,
            settings.path or self._credentials.pem_path.parent / OUTBOX_FILE,
            str(self.device_id),
            max_packet_bytes=self._max_packet_bytes,
            tell=self._dispatcher.tell,
            wake=self._worker.wake,
            send_from_memory=self._send_from_memory,
            now_s=lambda: self._clock.now().timestamp(),
        )

    def _send_from_memory(self, outgoing: Outgoing, acknowledgement: Acknowledgement) -> None:
        try:
            self._worker.publications.add(outgoing, acknowledgement)
        except UnreachableError as error:
            acknowledgement.settle(error)
        self._worker.wake()

    def _open_apart(self, credentials: Credentials) -> Client:
        return Client(
            credentials,
            presence=False,
            clean_session=True,
            renewal=False,
            connect_timeout_s=self._connect_timeout_s,
            clock=self._clock,
        )

    def _new_commands(self) -> Commands:
        from birthmark.device.commands import Commands  # noqa: PLC0415 - only for who takes commands

        credentials = self._credentials
        return Commands(
            self.device_id,
            publish=self._publish_now,
            failed=self._failed,
            now=self._clock.now,
            folder=credentials.pem_path.parent if credentials.is_slot else None,
        )

    def _new_periodic(self) -> Periodic:
        from birthmark.device.periodic import Periodic  # noqa: PLC0415 - only for who has something to repeat

        periodic = Periodic(self._dispatcher.do, self.publish, self._failed)
        if self._started:
            periodic.start()
        return periodic

    def _received(self, message: Message) -> bool:
        """Call who wants a message; return whether it is done with."""
        return self._handlers.call(message) or self._takes_all

    def _failed(self, topic: str, error: Exception) -> None:
        self._observed(HandlerFailed(topic, error))

    def _wake(self) -> None:
        self._worker.wake()

    def _observed(self, event: Event) -> None:
        if isinstance(event, AttemptFailed) and self._renewer is not None:
            event = event.changed(renews=self._renewer.asks_apart_after(event.error))
        if self._recorder is not None:
            self._recorder.take(event)
        if self._time_asking is not None and isinstance(event, Connected):
            self._time_asking.connected()
        if self._observe is not None:
            self._observe(event)


def _nobody(credentials: Credentials, error: ConnectionFailedError | None) -> None:
    del credentials, error
