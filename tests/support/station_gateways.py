"""Gateways that are not there, for a station's deliveries: one at a path, one that speaks MQTT 3.1.1 over TLS."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Literal, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from support.patience import PATIENCE_S

from birthmark.device.durable import write_durably
from birthmark.device.messages import ClosedIdentity, Receipt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Outcome = Literal["installed", "current", "refused"]

CLOSED = ClosedIdentity(
    id="sensor-17",
    cert_serial="1f",
    sessions_closed=1,
    elapsed_ms=3.04,
    will_suppressed=True,
    queued_messages_purged=2,
    retained_presence_purged=True,
)


def receipt_for(
    crl_der: bytes,
    *,
    gateway: str = "gateway-1",
    outcome: Outcome = "installed",
    closed: tuple[ClosedIdentity, ...] = (),
) -> Receipt:
    """Return the receipt that a broker would give for this CRL."""
    crl = x509.load_der_x509_crl(crl_der)
    return Receipt(
        gateway=gateway,
        outcome=outcome,
        issuer="00",
        crl_number=crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number,
        crl_sha256=hashlib.sha256(crl_der).hexdigest(),
        revoked_count=len(crl),
        installed_at=time.time(),
        elapsed_ms=4.2,
        closed=closed,
        reason="the clock is late\x1b[0m" if outcome == "refused" else "",
    )


class PathGateway:
    """Watches a CRL file and writes a receipt beside it, as a broker does."""

    def __init__(self, crl_path: Path, answer: Callable[[bytes], bytes]) -> None:
        self._crl_path = crl_path
        self._answer = answer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._seen = self._inode()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=PATIENCE_S)

    def _inode(self) -> int:
        return self._crl_path.stat().st_ino if self._crl_path.exists() else 0

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            if self._inode() not in (0, self._seen):
                self._seen = self._inode()
                crl = x509.load_pem_x509_crl(self._crl_path.read_bytes())
                receipt_path = self._crl_path.with_name(self._crl_path.name + ".receipt")
                write_durably(receipt_path, self._answer(crl.public_bytes(Encoding.DER)), mode=0o644)


class MqttGateway:
    """Takes one client at a time over mutual TLS, and answers each CRL with what `answer` gives.

    Args:
        credentials_path: key and chain of the gateway.
        clients_ca_path: the CA of its clients.
        answer: from the CRL (DER) to the payloads of the receipts.
        connack: what CONNECT is answered with.
        suback: what SUBSCRIBE is answered with.
        retained: the receipt that it has given last.
    """

    def __init__(
        self,
        credentials_path: Path,
        clients_ca_path: Path,
        answer: Callable[[bytes], list[bytes]],
        *,
        connack: int = 0,
        suback: int = 1,
        retained: bytes = b"",
    ) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(credentials_path)
        self._context.load_verify_locations(clients_ca_path)
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        self._answer = answer
        self._connack, self._suback, self._retained = connack, suback, retained
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self.topics: list[str] = []
        self.client_ids: list[str] = []

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=PATIENCE_S)
        self._listener.close()

    def _serve(self) -> None:
        while not self._stop.is_set():
            try:
                accepted, _ = self._listener.accept()
            except TimeoutError:
                continue
            accepted.settimeout(PATIENCE_S)
            with (
                contextlib.suppress(OSError, EOFError),
                accepted,
                self._context.wrap_socket(accepted, server_side=True) as connection,
            ):
                self._talk(connection)

    def _talk(self, connection: ssl.SSLSocket) -> None:
        while True:
            kind, body = _packet(connection)
            if kind >> 4 == 1:  # CONNECT: the client id follows the ten octets of the variable header
                self.client_ids.append(_text(body[10:]))
                connection.sendall(bytes([0x20, 2, 0, self._connack]))
            elif kind >> 4 == 8:  # SUBSCRIBE
                self.topics.append(_text(body[2:]))
                connection.sendall(bytes([0x90, 3]) + body[:2] + bytes([self._suback]))
                if self._retained:
                    connection.sendall(_publish(self.topics[-1], self._retained, retained=True))
            elif kind >> 4 == 3:  # PUBLISH with QoS 1
                topic = _text(body)
                self.topics.append(topic)
                rest = body[2 + len(topic) :]
                connection.sendall(bytes([0x40, 2]) + rest[:2])
                name = topic.split("/")[1]
                for payload in self._answer(rest[2:]):
                    connection.sendall(_publish(f"gateway/{name}/receipts", payload))
            elif kind >> 4 == 14:  # DISCONNECT
                return


def _publish(topic: str, payload: bytes, *, retained: bool = False) -> bytes:
    body = len(topic).to_bytes(2, "big") + topic.encode() + payload
    length, head = len(body), bytearray([0x30 | retained])
    while True:
        length, digit = divmod(length, 128)
        head.append(digit | (0x80 if length else 0))
        if not length:
            return bytes(head) + body


def _packet(connection: ssl.SSLSocket) -> tuple[int, bytes]:
    kind, length, shift = _exactly(connection, 1)[0], 0, 0
    while True:
        digit = _exactly(connection, 1)[0]
        length |= (digit & 0x7F) << shift
        shift += 7
        if not digit & 0x80:
            return kind, _exactly(connection, length)


def _exactly(connection: ssl.SSLSocket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        chunk = connection.recv(count - len(received))
        if not chunk:
            raise EOFError
        received += chunk
    return received


def _text(body: bytes) -> str:
    return body[2 : 2 + int.from_bytes(body[:2], "big")].decode()
