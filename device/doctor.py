"""The way to a broker, step by step: what each step found, until one fails (`birthmark-device doctor`).

Rules:

- Each step is made with what the client makes it with, and a failure is said in the client's words
  (`connection_errors`).
- Nothing is changed, on the device or at the gateway: no presence, no last will, no lasting subscription; the
  session is the device's own, and what waits in it goes on waiting.
- A client that is connected with this identity would be thrown out by a second one. What it says of its connection
  takes the place of a CONNECT of ours.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from birthmark.device import connection_errors as say
from birthmark.device import topics
from birthmark.device.certificate_facts import certificate_facts
from birthmark.device.client import Client
from birthmark.device.dialling import dial
from birthmark.device.errors import BirthmarkError
from birthmark.device.escape import escaped
from birthmark.device.messages import NONCE_BYTES, TimeRequest
from birthmark.device.server_probe import probed
from birthmark.device.tls import device_context, is_alert

if TYPE_CHECKING:
    from collections.abc import Iterator

    from birthmark.device.certificate_facts import CertificateFacts
    from birthmark.device.clock import Clock
    from birthmark.device.connection_errors import Circumstances
    from birthmark.device.credentials import Credentials
    from birthmark.device.record import Record
    from birthmark.device.server_probe import Seen
    from birthmark.device.tls import DeviceSocket

VERDICT_WITHIN_S: Final = 1.0
"""With TLS 1.3 a broker's word on our certificate comes after the handshake, if it has one."""
_TIME: Final = "%Y-%m-%d %H:%M UTC"


@dataclass(frozen=True, slots=True)
class Step:
    """One step, and what became of it."""

    name: str
    said: str
    """What was found; of a failure, its message."""
    failure: BirthmarkError | None = None
    is_skipped: bool = False

    @property
    def outcome(self) -> str:
        """`ok`, `failed` or `skipped`."""
        return "failed" if self.failure else "skipped" if self.is_skipped else "ok"


def walk(credentials: Credentials, clock: Clock, connected: Record | None, *, timeout_s: float) -> Iterator[Step]:
    """Walk the path to the broker of `credentials`, and yield each step; a failure is the last.

    Args:
        credentials: the device's own, with the broker to connect to.
        clock: what is known of the time.
        connected: what a client says of itself that is connected with them; None if there is none.
        timeout_s: for each step that waits.
    """
    doctor = _Doctor(credentials, clock, timeout_s)
    steps = [doctor.clock, doctor.own_certificate, doctor.name, doctor.tcp, doctor.tls]
    try:
        for step in (*steps, doctor.anchors, doctor.server):
            yield from step()
        yield from doctor.as_client() if connected is None else doctor.beside(connected)
    except _FailedStepError as failed:
        yield Step(failed.name, failed.error.message, failed.error)


def _dates(facts: CertificateFacts) -> str:
    return f"from {facts.not_before:{_TIME}} to {facts.not_after:{_TIME}}"


class _FailedStepError(Exception):
    def __init__(self, name: str, error: BirthmarkError) -> None:
        super().__init__(name)
        self.name = name
        self.error = error


class _Doctor:
    def __init__(self, credentials: Credentials, clock: Clock, timeout_s: float) -> None:
        self._credentials = credentials
        self._clock = clock
        self._timeout_s = timeout_s
        self._broker = credentials.broker
        self._seen: Seen | None = None

    def clock(self) -> Iterator[Step]:
        moment, system = self._clock.moment(), self._clock.system()
        said = f"{system:{_TIME}}"
        if moment.or_later:
            said += f", which is wrong: {moment.at:{_TIME}} has passed, and certificates are checked by that"
        yield Step("clock", said)

    def own_certificate(self) -> Iterator[Step]:
        facts, moment = self._credentials.facts, self._clock.moment()
        said = f"{self._credentials.device_id}, valid {_dates(facts)}"
        wrong = facts.out_of_time_at(moment.at)
        # The broker has the last word on it; what it says comes further down.
        yield Step("own certificate", f"{said}: it is {wrong}" if wrong else said)

    def name(self) -> Iterator[Step]:
        with self._step("name"):
            found = socket.getaddrinfo(self._broker.host, self._broker.port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        yield Step("name", f"{self._broker.host} is {', '.join(addresses)}")

    def tcp(self) -> Iterator[Step]:
        with self._step("TCP"), self._connect() as plain:
            local, remote = plain.getsockname()[0], plain.getpeername()[0]
        yield Step("TCP", f"{remote} port {self._broker.port} answers; the way there is from {local}")

    def tls(self) -> Iterator[Step]:
        with self._step("TLS"):
            try:
                seen = probed(self._broker, timeout_s=self._timeout_s)
            except ssl.SSLError as error:
                if not is_alert(error):
                    raise
                # With TLS 1.2 a broker ends the handshake with one that shows no certificate.
                yield Step("TLS", "it speaks TLS, and shows nothing to one without a certificate")
                return
        self._seen = seen
        said = f"{seen.tls_version}, {seen.cipher}"
        if seen.facts is not None:
            names = escaped(", ".join(seen.facts.common_names)) or "no name"
            said += f"; its certificate says {names}, valid {_dates(seen.facts)}"
        yield Step("TLS", said)

    def anchors(self) -> Iterator[Step]:
        """Hold the broker's certificate against each anchor alone."""
        for number, anchor_der in enumerate(self._credentials.anchors_der, 1):
            anchor = certificate_facts(anchor_der)
            name = f"anchor {number} ({escaped(', '.join(anchor.common_names))})"
            try:
                with self._handshake(self._credentials.changed(anchors_der=(anchor_der,))):
                    pass
            except (OSError, BirthmarkError) as error:
                explained = self._explained(error)
                yield Step(name, explained.message, is_skipped=True)
            else:
                yield Step(name, "the broker's certificate leads to it")

    def server(self) -> Iterator[Step]:
        with self._step("server certificate"), self._handshake(self._credentials) as connection:
            ends = min(facts.not_after for facts in connection.chain)
        yield Step("server certificate", f"trusted, and for {self._broker.host}; good until {ends:{_TIME}}")

    def beside(self, connected: Record) -> Iterator[Step]:
        """Wait for an alert about our certificate, and leave CONNECT to the client that is there."""
        with self._step("handshake"), self._handshake(self._credentials) as connection:
            connection.settimeout(VERDICT_WITHIN_S)
            with contextlib.suppress(TimeoutError):
                if not connection.recv(1):
                    raise say.ended_before_connack(None, self._around())
        yield Step("handshake", "the broker has no alert for our certificate")
        said = f"left to the client that runs: it is connected to {connected.broker}"
        yield Step("CONNECT", said, is_skipped=True)

    def as_client(self) -> Iterator[Step]:
        """Connect as the client does, and try what the policy lets it do."""
        client = Client(
            self._credentials,
            presence=False,
            clean_session=False,
            takes_all=False,
            renewal=False,
            clock=self._clock,
            connect_timeout_s=self._timeout_s,
        )
        with self._step("CONNECT"):
            client.connect()
        try:
            yield Step("CONNECT", f"the broker let us in as {client.device_id}")
            yield from self._policy(client)
        finally:
            client.stop()

    def _policy(self, client: Client) -> Iterator[Step]:
        commands = topics.command(client.device_id, "birthmark-doctor")
        with self._step("subscribe"):
            client.subscribe(commands, lambda _: None, wait=self._timeout_s)
        client.unsubscribe(commands)
        yield Step("subscribe", "the policy lets us listen to our commands")
        answer, heard = topics.time_answer(client.device_id), threading.Event()
        request = topics.time_request(client.device_id)
        try:
            client.subscribe(answer, lambda _: heard.set(), wait=self._timeout_s)
            client.publish(request, TimeRequest(bytes(NONCE_BYTES)).to_bytes(), wait=self._timeout_s)
            is_answered = heard.wait(self._timeout_s)
        except BirthmarkError as error:
            error_said = error.message
            is_answered = False
        else:
            error_said = "nothing came back"
        client.unsubscribe(answer)
        if is_answered:
            yield Step("publish", f"the policy lets us publish: {request} was answered")
        else:
            hint = f"`birthmark-broker policy explain {client.device_id} publish TOPIC` on the gateway says why"
            yield Step("publish", f"not seen to work: {request}: {error_said} ({hint})", is_skipped=True)

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, UnicodeError, BirthmarkError) as error:
            raise _FailedStepError(name, self._explained(error)) from error

    def _explained(self, error: Exception) -> BirthmarkError:
        return error if isinstance(error, BirthmarkError) else say.explained(error, self._around())

    def _around(self) -> Circumstances:
        return say.Circumstances(
            broker=self._broker,
            device_id=self._credentials.device_id,
            own=self._credentials.facts,
            now=self._clock.system(),
            floor=self._clock.floor,
            server=self._seen.facts if self._seen else None,
        )

    def _connect(self) -> socket.socket:
        return dial(self._broker.host, self._broker.port, timeout_s=self._timeout_s)

    def _handshake(self, credentials: Credentials) -> DeviceSocket:
        context, plain = device_context(credentials, self._clock), self._connect()
        try:
            return context.wrap_socket(plain, server_hostname=self._broker.host)
        except BaseException:
            plain.close()
            raise
