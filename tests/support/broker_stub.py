"""A broker that does what a test tells it to, over real TLS: it lets in, refuses, falls silent, drops.

    with BrokerStub(pki) as broker:
        ...connect a client to broker.port...
        packet = broker.wait_for(PUBLISH)
        broker.deliver("devices/sensor-1/commands/reboot", b"")

It checks nothing that a test does not ask for; what a broker must do is proven with the real one.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from support.patience import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.pki import Authority, Issued, Pki

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK = 1, 2, 3, 4, 8, 9
UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT = 10, 11, 12, 13, 14


@dataclass(frozen=True)
class Packet:
    """One packet from a client."""

    kind: int
    flags: int
    body: bytes
    connection: int

    @property
    def topic(self) -> str:
        """Of a PUBLISH."""
        return self.body[2 : 2 + int.from_bytes(self.body[:2])].decode()

    @property
    def qos(self) -> int:
        return self.flags >> 1 & 3

    @property
    def retain(self) -> bool:
        return bool(self.flags & 1)

    @property
    def payload(self) -> bytes:
        """Of a PUBLISH."""
        start = 2 + int.from_bytes(self.body[:2]) + (2 if self.qos else 0)
        return self.body[start:]

    @property
    def packet_id(self) -> bytes:
        if self.kind == PUBLISH:
            start = 2 + int.from_bytes(self.body[:2])
            return self.body[start : start + 2]
        return self.body[:2]

    @property
    def filters(self) -> list[str]:
        """Of a SUBSCRIBE."""
        found, at = [], 2
        while at < len(self.body):
            length = int.from_bytes(self.body[at : at + 2])
            found.append(self.body[at + 2 : at + 2 + length].decode())
            at += 3 + length
        return found


@dataclass
class BrokerStub:
    """See above; every field may be changed while it runs."""

    pki: Pki
    server: Issued | None = None
    clients_ca: Authority | None = None
    crl_pem: bytes = b""
    highest_tls: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
    connack: int | None = 0
    """None: no answer to CONNECT."""
    answer: bytes | None = None
    """Sent instead of any CONNACK."""
    closes_before_connack: bool = False
    suback: int = 1
    acknowledges: bool = True
    answers_pings: bool = True
    port: int = 0
    packets: list[Packet] = field(default_factory=list)
    resumed: list[bool] = field(default_factory=list)
    """For each connection that finished its handshake."""

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._open: list[ssl.SSLSocket] = []
        self._shaking: list[ssl.SSLSocket] = []
        self._writing = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._context = self._make_context()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        self._stopping = False

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._changed:
            self._stopping = True
            self._open += self._shaking  # nobody is to wait for a client that will not go on
        self.drop()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def drop(self) -> None:
        """Cut every connection."""
        with self._changed:
            cut, self._open = self._open, []
        for connection in cut:
            with contextlib.suppress(OSError):
                # The thread that reads from it closes it.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def deliver(
        self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False, packet_id: int = 1
    ) -> None:
        """Send a PUBLISH to every client that is there."""
        name = topic.encode()
        body = struct.pack(">H", len(name)) + name + (struct.pack(">H", packet_id) if qos else b"") + payload
        with self._changed:
            receivers = [connection for connection in self._open if connection.fileno() >= 0]
        data = _encoded(PUBLISH, body, flags=qos << 1 | retain)
        for connection in receivers:
            with self._writing:
                connection.sendall(data)

    def send_raw(self, data: bytes) -> None:
        """Send bytes to every client, whatever they are."""
        with self._changed:
            receivers = list(self._open)
        for connection in receivers:
            with self._writing, contextlib.suppress(OSError):
                connection.sendall(data)

    def wait_for(self, kind: int, matching: Callable[[Packet], bool] = lambda _: True, count: int = 1) -> Packet:
        """Return the count-th packet of this kind, once it is here."""
        deadline = time.monotonic() + PATIENCE_S
        with self._changed:
            while True:
                found = [packet for packet in self.packets if packet.kind == kind and matching(packet)]
                if len(found) >= count:
                    return found[count - 1]
                left_s = deadline - time.monotonic()
                assert left_s > 0, f"no packet {kind} came; these did: {self.packets}"
                self._changed.wait(left_s)

    def _make_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.maximum_version = self.highest_tls
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
        with tempfile.TemporaryDirectory() as folder:
            server = self.server or self.pki.issuing.server("localhost", "127.0.0.1")
            context.load_cert_chain(server.write(Path(folder, "server.pem")))
            context.load_verify_locations(cadata=(self.clients_ca or self.pki.issuing).pem.decode())
            if self.crl_pem:
                crl_path = Path(folder, "crl.pem")
                crl_path.write_bytes(self.crl_pem)
                context.load_verify_locations(cafile=crl_path)
                context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        return context

    def _start(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopping:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            self._start(lambda plain=plain: self._serve(plain))  # type: ignore[misc]

    def _serve(self, plain: socket.socket) -> None:
        plain.settimeout(PATIENCE_S)
        try:
            connection = self._context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        except OSError:
            plain.close()
            return
        with connection, contextlib.suppress(OSError, EOFError):
            with self._changed:
                self._shaking.append(connection)
                if self._stopping:
                    return
            connection.do_handshake()
            with self._changed:
                if self._stopping:
                    return
                self._shaking.remove(connection)
                number = len(self.resumed)
                self.resumed.append(bool(connection.session_reused))
                self._open.append(connection)
            if self.closes_before_connack:
                return
            while True:
                kind_and_flags = _exactly(connection, 1)[0]
                body = _exactly(connection, _length(connection))
                packet = Packet(kind_and_flags >> 4, kind_and_flags & 15, body, number)
                with self._changed:
                    answer, goes_on = self._reaction(packet)  # as when it came, whatever who waits for it sets
                    self.packets.append(packet)
                    self._changed.notify_all()
                with self._writing:
                    connection.sendall(answer)
                if not goes_on:
                    return

    def _reaction(self, packet: Packet) -> tuple[bytes, bool]:
        """What a packet is answered with, and whether the connection goes on."""
        match packet.kind:
            case 1 if self.answer is not None:
                return self.answer, False
            case 1 if self.connack is not None:
                return _encoded(CONNACK, bytes((0, self.connack))), self.connack == 0
            case 3 if packet.qos and self.acknowledges:
                return _encoded(PUBACK, packet.packet_id), True
            case 8:
                codes = bytes([self.suback] * len(packet.filters))
                return _encoded(SUBACK, packet.packet_id + codes), True
            case 10:
                return _encoded(UNSUBACK, packet.packet_id), True
            case 12 if self.answers_pings:
                return _encoded(PINGRESP, b""), True
        return b"", packet.kind != 14


def _encoded(kind: int, body: bytes, *, flags: int = 0) -> bytes:
    length, encoded = len(body), bytearray((kind << 4 | flags,))
    while True:
        length, low = divmod(length, 128)
        encoded.append(low | (128 if length else 0))
        if not length:
            return bytes(encoded) + body


def _exactly(connection: ssl.SSLSocket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _length(connection: ssl.SSLSocket) -> int:
    length = shift = 0
    while True:
        byte = _exactly(connection, 1)[0]
        length |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return length
