"""A raw MQTT 3.1.1 client over TLS for tests: it says exactly the bytes it is told, and reads packets strictly.

Written apart from the broker's codec on purpose: one mistake in both would hide itself.

    client = RawClient.connect(port, credentials=pem_path, roots=root_path)
    client.send(connect("sensor-1"))
    assert client.read() == Packet(0x20, b"\\x00\\x00")
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

from support.patience import PATIENCE_S

if TYPE_CHECKING:
    from pathlib import Path


class Packet(NamedTuple):
    """A packet from the broker: its first byte, and its body."""

    first: int
    body: bytes


class Delivery(NamedTuple):
    """A PUBLISH from the broker."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    dup: bool = False
    packet_id: int = 0


class ConnectionEndedError(Exception):
    """The broker has ended the connection."""


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack(">H", len(raw)) + raw


def packet(first: int, body: bytes = b"") -> bytes:
    length, count = b"", len(body)
    while True:
        count, digit = divmod(count, 128)
        length += bytes([digit | 0x80 if count else digit])
        if not count:
            return bytes([first]) + length + body


def connect(
    client_id: str | bytes,
    *,
    clean: bool = True,
    keepalive: int = 60,
    will: tuple[str, bytes, int, bool] | None = None,
    name: str = "MQTT",
    level: int = 4,
    flags: int | None = None,
    tail: bytes = b"",
) -> bytes:
    """CONNECT; `will` is topic, payload, QoS, retain. `flags` replaces the right ones."""
    bits = 2 if clean else 0
    payload = text(client_id)
    if will is not None:
        bits |= 4 | will[2] << 3 | will[3] << 5
        payload += text(will[0]) + text(will[1])
    bits = bits if flags is None else flags
    return packet(0x10, text(name) + bytes([level, bits]) + struct.pack(">H", keepalive) + payload + tail)


def publish(
    topic: str, payload: bytes = b"", *, qos: int = 0, retain: bool = False, dup: bool = False, pid: int = 0
) -> bytes:
    body = text(topic) + (struct.pack(">H", pid) if qos else b"") + payload
    return packet(0x30 | dup << 3 | qos << 1 | retain, body)


def subscribe(pid: int, *filters: tuple[str, int]) -> bytes:
    return packet(0x82, struct.pack(">H", pid) + b"".join(text(f) + bytes([qos]) for f, qos in filters))


def unsubscribe(pid: int, *filters: str) -> bytes:
    return packet(0xA2, struct.pack(">H", pid) + b"".join(text(f) for f in filters))


def puback(pid: int) -> bytes:
    return packet(0x40, struct.pack(">H", pid))


def pubrec(pid: int) -> bytes:
    return packet(0x50, struct.pack(">H", pid))


def pubrel(pid: int) -> bytes:
    return packet(0x62, struct.pack(">H", pid))


def pubcomp(pid: int) -> bytes:
    return packet(0x70, struct.pack(">H", pid))


PINGREQ, PINGRESP, DISCONNECT = packet(0xC0), Packet(0xD0, b""), packet(0xE0)


def suback(pid: int, *codes: int) -> Packet:
    return Packet(0x90, struct.pack(">H", pid) + bytes(codes))


def connack(code: int, *, present: bool = False) -> Packet:
    return Packet(0x20, bytes([present, code]))


def client_context(
    credentials: Path | None, roots: Path, *, version: ssl.TLSVersion | None = None
) -> ssl.SSLContext:
    """A client's context: its own PEM file (or none), and the root that it trusts."""
    context = ssl.create_default_context(cafile=roots)
    if credentials is not None:
        context.load_cert_chain(credentials)
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


@dataclass
class RawClient:
    """A TLS (or plain) socket, and what has been read from it."""

    sock: socket.socket
    buffer: bytes = b""

    @classmethod
    def connect(
        cls,
        port: int,
        context: ssl.SSLContext,
        *,
        session: ssl.SSLSession | None = None,
        host: str = "127.0.0.1",
        receive_bytes: int = 0,
    ) -> RawClient:
        plain = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        plain.settimeout(PATIENCE_S)
        if receive_bytes:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        try:
            plain.connect((host, port))
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return cls(context.wrap_socket(plain, server_hostname=host, session=session))
        except BaseException:
            plain.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tls(self) -> ssl.SSLSocket:
        assert isinstance(self.sock, ssl.SSLSocket)
        return self.sock

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def read(self, timeout_s: float = PATIENCE_S) -> Packet:
        """Read one packet; raises ConnectionEndedError, or TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while True:
            if (found := self._whole()) is not None:
                return found
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self.sock.recv(65_536)
            except TimeoutError:
                raise
            except (ssl.SSLError, OSError) as error:
                raise ConnectionEndedError(str(error)) from error
            if not data:
                raise ConnectionEndedError("closed")
            self.buffer += data

    def _whole(self) -> Packet | None:
        length = shift = 0
        for position in range(1, min(5, len(self.buffer))):
            byte = self.buffer[position]
            length |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                start = position + 1
                if len(self.buffer) < start + length:
                    return None
                found = Packet(self.buffer[0], self.buffer[start : start + length])
                self.buffer = self.buffer[start + length :]
                return found
        assert len(self.buffer) < 5, "a remaining length of more than four bytes"
        return None

    def read_delivery(self) -> Delivery:
        return delivery(self.read())

    def handshake(self, hello: bytes, *, code: int = 0, present: bool = False) -> RawClient:
        """Say a CONNECT and check its CONNACK."""
        self.send(hello)
        assert self.read() == connack(code, present=present)
        return self

    def subscribed(self, *filters: tuple[str, int], pid: int = 1) -> RawClient:
        """Subscribe, and check that it was granted as asked."""
        self.send(subscribe(pid, *filters))
        assert self.read() == suback(pid, *(qos for _, qos in filters))
        return self

    def ping(self) -> None:
        """Prove that everything said before has been dealt with, and that nothing else was sent."""
        self.send(PINGREQ)
        assert self.read() == PINGRESP

    def read_end(self) -> list[Packet]:
        """Read until the broker ends the connection; return the packets before that."""
        packets = []
        deadline = time.monotonic() + PATIENCE_S
        try:
            while True:
                packets.append(self.read(deadline - time.monotonic()))
        except ConnectionEndedError:
            return packets

    def close(self) -> None:
        self.sock.close()


def delivery(found: Packet) -> Delivery:
    """Take a PUBLISH apart, strictly."""
    assert found.first >> 4 == 3, found
    qos = found.first >> 1 & 3
    assert qos < 3
    (length,) = struct.unpack_from(">H", found.body)
    topic = found.body[2 : 2 + length].decode()
    rest = found.body[2 + length :]
    packet_id = 0
    if qos:
        (packet_id,) = struct.unpack_from(">H", rest)
        assert packet_id
        rest = rest[2:]
    return Delivery(topic, rest, qos, bool(found.first & 1), bool(found.first & 8), packet_id)
