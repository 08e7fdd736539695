"""MQTT clients lean enough not to be what is measured: raw TLS sockets, epoll, packets encoded beforehand.

Rules:

- A publisher sends slices of one block of packets, encoded once: message n is packet n modulo `CYCLE`, and says
  so in its payload. What is sent ahead is a slice of that block, so a burst costs one `send`.
- A subscriber compares what arrives with that block, byte for byte and in order, a whole chunk at a time: a
  message that is lost, repeated, out of order or damaged ends the run with an error. (From many publishers,
  whose messages mix, it counts each publisher's.)
- All messages of a run have the same length, so acknowledgements of a chunk are made by strides, not one by one.
"""

from __future__ import annotations

import select
import socket
import ssl
from collections import Counter
from typing import TYPE_CHECKING, Final, Self

from bench.fleet_pki import HOST
from birthmark.broker.packets import remaining_length, topic_field

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CYCLE: Final = 4096
"""Packet identifiers in use; more than any window, a multiple of 256."""
CHUNK_BYTES: Final = 65_536
CONNECT_TIMEOUT_S: Final = 20.0
KEEPALIVE_S: Final = 3600


class BenchError(Exception):
    """A broker did not do what MQTT asks of it, or lost something."""


def block(topics: Sequence[str], payload_bytes: int, qos: int, sender: int = 0) -> tuple[bytes, int]:
    """Return `CYCLE` PUBLISH packets of one length, on the topics in turn, and that length.

    A payload begins with the number of its sender (one byte) and that of the message, modulo `CYCLE` (two).
    """
    packets = []
    for number in range(CYCLE):
        variable = topic_field(topics[number % len(topics)])
        if qos:
            variable += (number + 1).to_bytes(2, "big")
        payload = bytes([sender]) + number.to_bytes(2, "big") + b"x" * (payload_bytes - 3)
        packets.append(
            bytes([0x30 | qos << 1]) + remaining_length(len(variable) + len(payload)) + variable + payload
        )
    if len({len(packet) for packet in packets}) != 1:
        raise ValueError("topics of one run have the same length")
    return b"".join(packets), len(packets[0])


class Wire:
    """A client's connection: blocking until it is set up, then not.

    Args:
        context: its TLS context.
        port: where the broker listens.
        client_id: its CN.
        clean: the flag of its CONNECT.

    Raises:
        BenchError: the broker refused.
        OSError: the connection failed.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        port: int,
        client_id: str,
        *,
        clean: bool = True,
    ) -> None:
        self.client_id = client_id
        raw = socket.create_connection((HOST, port), timeout=CONNECT_TIMEOUT_S)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = context.wrap_socket(raw, server_hostname=HOST)
        variable = b"\0\4MQTT\4" + bytes([2 * clean]) + KEEPALIVE_S.to_bytes(2, "big") + topic_field(client_id)
        self.sock.sendall(b"\x10" + remaining_length(len(variable)) + variable)
        answer = self._exactly(4)
        if answer[:2] != b"\x20\2" or answer[3]:
            raise BenchError(f"{client_id} was refused: {answer.hex()}")

    @classmethod
    def above(cls, sock: ssl.SSLSocket) -> Self:
        """Be the broker at the other end of a connection that a gateway has made to the one above it."""
        self = cls.__new__(cls)
        self.client_id, self.sock = "the gateway", sock
        first, length = self._exactly(2)
        if first != 0x10 or length > 127:
            raise BenchError("no CONNECT, or a long one")
        self._exactly(length)
        sock.sendall(b"\x20\2\0\0")
        return self

    def subscribe(self, filters: Sequence[str], qos: int) -> None:
        """Subscribe, and wait for the SUBACK; only before `go`."""
        variable = b"\0\1" + b"".join(topic_field(one) + bytes([qos]) for one in filters)
        self.sock.sendall(b"\x82" + remaining_length(len(variable)) + variable)
        answer = self._exactly(2)
        length = answer[1] & 0x7F
        if answer[1] > 127:
            length += self._exactly(1)[0] << 7
        codes = self._exactly(length)[2:]
        if answer[0] != 0x90 or codes != bytes([qos]) * len(filters):
            raise BenchError(f"{self.client_id} may not subscribe: {codes[:8].hex()}")

    def take(self, octets: int) -> None:
        """Receive so many octets, and look at none of them; only before `go`."""
        while octets:
            received = len(self.sock.recv(min(octets, CHUNK_BYTES)))
            if not received:
                raise BenchError(f"{self.client_id} was disconnected")
            octets -= received

    def close(self) -> None:
        """Say goodbye."""
        try:
            self.sock.settimeout(1)
            self.sock.sendall(b"\xe0\0")
        except OSError:
            pass
        self.sock.close()

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            if not more:
                raise BenchError(f"{self.client_id} was disconnected")
            data += more
        return data


def accepted(folder: Path, port: int) -> Wire:
    """Listen as the broker above a gateway until it connects; with the certificates in `folder` (`FleetPki`).

    Raises:
        OSError: it did not.
        BenchError: it speaks no MQTT.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    context.load_verify_locations(folder / "root.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server((HOST, port)) as listening:
        listening.settimeout(CONNECT_TIMEOUT_S)
        raw, _ = listening.accept()
    raw.settimeout(CONNECT_TIMEOUT_S)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Wire.above(context.wrap_socket(raw, server_side=True))


class Loop:
    """Calls what is ready. One instance drives every client of a run."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._by_fd: dict[int, End] = {}

    def add(self, end: End) -> None:
        """Serve one end from now on."""
        end.wire.sock.settimeout(0)
        self._by_fd[end.wire.sock.fileno()] = end
        self._epoll.register(end.wire.sock.fileno(), select.EPOLLIN)

    def wants(self, end: End, *, to_write: bool) -> None:
        """Watch for room to write, or no longer."""
        self._epoll.modify(end.wire.sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if to_write else 0))

    def turn(self, timeout_s: float) -> None:
        """Serve what is ready."""
        for fd, ready in self._epoll.poll(timeout_s):
            end = self._by_fd[fd]
            if ready & select.EPOLLOUT:
                end.flush()
            if ready & ~select.EPOLLOUT:
                end.read()

    def close(self) -> None:
        """Say goodbye to all."""
        for end in self._by_fd.values():
            end.wire.close()
        self._epoll.close()


class End:
    """One client at work."""

    def __init__(self, wire: Wire, loop: Loop) -> None:
        self.wire = wire
        self._loop = loop
        self._waiting = memoryview(b"")
        self._buffer = memoryview(bytearray(CHUNK_BYTES))
        self._kept = 0
        loop.add(self)

    def send(self, data: bytes | memoryview) -> None:
        """Send, now or as soon as there is room."""
        if self._waiting:
            self._waiting = memoryview(bytes(self._waiting) + bytes(data))
        else:
            self._waiting = memoryview(data)
            self.flush()

    @property
    def is_blocked(self) -> bool:
        """Whether the socket takes nothing more for now."""
        return bool(self._waiting)

    def flush(self) -> None:
        """Send what waits."""
        was_waiting = bool(self._waiting)
        while self._waiting:
            try:
                self._waiting = self._waiting[self.wire.sock.send(self._waiting) :]
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                self._loop.wants(self, to_write=True)
                return
        if was_waiting:
            self._loop.wants(self, to_write=False)

    def read(self) -> None:
        """Take what has come."""
        while True:
            try:
                count = self.wire.sock.recv_into(self._buffer[self._kept :])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            if not count:
                raise BenchError(f"{self.wire.client_id} was disconnected")
            end = self._kept + count
            used = self.take(self._buffer[:end])
            self._kept = end - used
            if self._kept and used:
                self._buffer[: self._kept] = bytes(self._buffer[used:end])

    def take(self, data: memoryview) -> int:
        """Deal with whole packets; return how many bytes they were."""
        raise NotImplementedError


class Publisher(End):
    """Sends messages of its block.

    Attributes:
        sent: messages sent.
        acknowledged: PUBACKs that have come.
    """

    def __init__(
        self, wire: Wire, loop: Loop, topics: Sequence[str], payload_bytes: int, qos: int, *, sender: int
    ) -> None:
        self._block, self._length = block(topics, payload_bytes, qos, sender)
        self._view = memoryview(self._block)
        self.qos = qos
        self.sent = 0
        self.acknowledged = 0
        super().__init__(wire, loop)

    def publish(self, count: int) -> int:
        """Send the next `count` messages (fewer at the end of the block); return how many."""
        at = self.sent % CYCLE
        count = min(count, CYCLE - at)
        self.sent += count
        self.send(self._view[at * self._length : (at + count) * self._length])
        return count

    def take(self, data: memoryview) -> int:
        """Count PUBACKs."""
        whole = len(data) // 4
        if bytes(data[0 : 4 * whole : 4]) != b"\x40" * whole:
            raise BenchError("something else came than PUBACK")
        self.acknowledged += whole
        return 4 * whole


class Subscriber(End):
    """Receives, checks, acknowledges and counts messages.

    Args:
        wire: its connection.
        loop: what drives it.
        expected: the block that its one publisher sends; None with several publishers: their messages mix.
        length: of a message as it arrives.
        id_at: where its packet identifier stands; 0 at QoS 0.
    """

    def __init__(self, wire: Wire, loop: Loop, expected: bytes | None, *, length: int, id_at: int) -> None:
        self._expected = memoryview(expected * 2 if expected else b"")
        self._length, self._id_at = length, id_at
        self.received = 0
        self.by_sender: Counter[int] = Counter()
        super().__init__(wire, loop)

    def take(self, data: memoryview) -> int:
        """Check whole messages, acknowledge them, count them."""
        length = self._length
        whole = len(data) // length
        taken = data[: whole * length]
        id_at = self._id_at
        if id_at:
            acks = bytearray(b"\x40\x02\0\0" * whole)
            acks[2::4] = taken[id_at::length]
            acks[3::4] = taken[id_at + 1 :: length]
            taken = memoryview(bytearray(taken))
            at = self.received % CYCLE * length if self._expected else 0
            source = self._expected[at : at + len(taken)] if self._expected else None
            if source is not None:
                taken[id_at::length] = bytes(source[id_at::length])
                taken[id_at + 1 :: length] = bytes(source[id_at + 1 :: length])
            self.send(bytes(acks))
        if self._expected:
            at = self.received % CYCLE * length
            if taken != self._expected[at : at + len(taken)]:
                raise BenchError(f"{self.wire.client_id}: message {self.received} or one soon after it is wrong")
        else:
            self.by_sender.update(bytes(taken[self._sender_at :: length]))
        self.received += whole
        return whole * length

    _sender_at = 0

    def count_senders_at(self, offset: int) -> None:
        """Say where in a message its sender's number stands."""
        self._sender_at = offset


class Above(Subscriber):
    """The broker above a gateway: takes what it sends up, which may ask for a sign of life first."""

    def take(self, data: memoryview) -> int:
        """As any subscriber."""
        asked = 0
        while not self.received and bytes(data[asked : asked + 2]) == b"\xc0\0":
            self.send(b"\xd0\0")
            asked += 2
        return asked + super().take(data[asked:])
