"""What a client says to a broker, and what it hears, as bytes: the other half of `broker/packets.py` (MQTT 3.1.1).

`ServerPacketReader` reads what a broker sends as strictly as `PacketReader` reads what a client does, with two
exceptions, since a broker would send the same again over every new connection: a PUBLISH whose topic is none is
read, with an empty one (RabbitMQ sends such: `*` becomes `+`); and one that is too long is passed over, unheld.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from birthmark.broker.packet_bodies import NO_ID, MalformedPacketError
from birthmark.broker.packet_reader import PacketReader, TopicNames
from birthmark.broker.packets import (
    ConnAck,
    Packet,
    PingResp,
    SubAck,
    TooLong,
    UnsubAck,
    remaining_length,
    topic_field,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from birthmark.broker.packets import Will

PINGREQ = b"\xc0\x00"
DISCONNECT = b"\xe0\x00"
_PING_RESP = PingResp()


def connect(client_id: str, keepalive_s: int, will: Will | None) -> bytes:
    """CONNECT (§3.1) for a session that is kept."""
    flags = 0
    payload = topic_field(client_id)
    if will is not None:
        flags = 0x04 | will.qos << 3 | will.retain << 5
        payload += topic_field(will.topic) + len(will.payload).to_bytes(2, "big") + will.payload
    body = b"\x00\x04MQTT\x04" + bytes((flags,)) + keepalive_s.to_bytes(2, "big") + payload
    return b"\x10" + remaining_length(len(body)) + body


def subscribe(packet_id: int, filters: Iterable[str], qos: int) -> bytes:
    """SUBSCRIBE (§3.8)."""
    body = packet_id.to_bytes(2, "big") + b"".join(topic_field(found) + bytes((qos,)) for found in filters)
    return b"\x82" + remaining_length(len(body)) + body


def unsubscribe(packet_id: int, filters: Iterable[str]) -> bytes:
    """UNSUBSCRIBE (§3.10)."""
    body = packet_id.to_bytes(2, "big") + b"".join(topic_field(found) for found in filters)
    return b"\xa2" + remaining_length(len(body)) + body


class TopicNamesAbove(TopicNames):
    """Topic names of what upstreams send."""

    def learn(self, raw: bytes) -> str:
        """Decode and check a topic name; return an empty one for what is none."""
        try:
            return super().learn(raw)
        except MalformedPacketError:
            return ""


class ServerPacketReader(PacketReader):
    """Reads one broker's bytes."""

    __slots__ = ("_passing_over",)

    def __init__(self, max_packet_bytes: int, topics: TopicNamesAbove) -> None:
        super().__init__(max_packet_bytes, topics)
        self._passing_over = 0
        """How many bytes of a PUBLISH that is too long are still to come."""

    def feed(self, data: bytes) -> list[Packet]:
        """As `PacketReader.feed`."""
        if self._passing_over:
            passed = min(self._passing_over, len(data))
            self._passing_over -= passed
            data = data[passed:]
        return super().feed(data)

    first_bytes: ClassVar[frozenset[int]] = frozenset(
        {0x20, 0x40, 0x50, 0x62, 0x70, 0x90, 0xB0, 0xD0}
        | {0x30, 0x31, 0x32, 0x33, 0x34, 0x35, 0x3A, 0x3B, 0x3C, 0x3D}
    )

    def _too_long(self, data: bytes, at: int, body: int, length: int, packets: list[Packet]) -> int:
        first, end = data[at], len(data)
        if first & 0xF0 != 0x30:
            return super()._too_long(data, at, body, length, packets)
        topic_end = body + 2
        if topic_end <= end:
            topic_end += data[body] << 8 | data[body + 1]
        payload = topic_end + 2 if first & 0x06 else topic_end
        if payload > body + length:
            raise MalformedPacketError("a PUBLISH that is too short")
        if payload > end:
            self._needed = payload - at
            return at
        packet_id = data[payload - 2] << 8 | data[payload - 1] if first & 0x06 else 0
        if first & 0x06 and not packet_id:
            raise MalformedPacketError(NO_ID)
        packets.append(TooLong(self._topics.learn(data[body + 2 : topic_end]), first >> 1 & 3, packet_id, length))
        stop = min(body + length, end)
        self._passing_over = body + length - stop
        return stop

    def _rare(self, first: int, body: bytes) -> Packet:
        if first == 0xD0 and not body:
            return _PING_RESP
        if first == 0x20 and len(body) == 2 and body[0] <= 1 and not (body[0] and body[1]):
            return ConnAck(bool(body[0]), body[1])
        if first in (0x90, 0xB0) and len(body) >= 2:
            packet_id = int.from_bytes(body[:2], "big")
            if first == 0xB0 and len(body) == 2 and packet_id:
                return UnsubAck(packet_id)
            if first == 0x90 and len(body) > 2 and packet_id and all(code in (0, 1, 2, 0x80) for code in body[2:]):
                return SubAck(packet_id, body[2:])
        raise MalformedPacketError(f"a packet {first:#04x} that is not what a broker sends")
