"""A client's bytes into MQTT 3.1.1 control packets: bytes in, packets out, no I/O.

Rules (OASIS MQTT 3.1.1; section numbers in the code):

- `PacketReader.feed` takes bytes in any chunks. The first byte that no valid client packet can have there ends
  the reader with `MalformedPacketError`: nothing is skipped, guessed or carried on with. Packets that were
  whole before that byte are in the error's `before`.
- Every field is read within its packet's remaining length, which is at most four bytes long and at most
  `max_packet_bytes`; a packet's body must be used up exactly.
- Text is UTF-8 without NUL and without surrogates (§1.5.3). A topic name holds no wildcard (§3.3.2-2).
- Nothing is buffered beyond one packet.

PUBLISH and PUBACK, nearly all that a busy broker sees, are read on a short path of their own.
"""

from __future__ import annotations

from typing import ClassVar

from birthmark.broker.filters import TopicError, check_filter
from birthmark.broker.packets import (
    Connect,
    Disconnect,
    Packet,
    PingReq,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    Subscribe,
    Unsubscribe,
    UnsupportedConnect,
    Will,
)
from birthmark.device.errors import RemoteProtocolError

KNOWN_TOPICS = 16_384
MAX_KNOWN_TOPIC_BYTES = 512


class MalformedPacketError(RemoteProtocolError):
    """Bytes that are no MQTT 3.1.1 client packet. The connection they came on ends.

    Args:
        cause: what is wrong, in a few words.
    """

    def __init__(self, cause: str) -> None:
        super().__init__(f"could not read an MQTT packet: {cause}")
        self.cause = cause
        self.before: list[Packet] = []


_new = tuple.__new__
"""Makes a packet at half the price of its class's own constructor, all fields given."""
_PING_REQ = PingReq()
_DISCONNECT = Disconnect()

# Every first byte that a client may send (§2.2.2): DUP with QoS 0 and QoS 3 are not among the PUBLISHes.
_FIRST_BYTES = frozenset(
    {0x10, 0x40, 0x50, 0x62, 0x70, 0x82, 0xA2, 0xC0, 0xE0}
    | {0x30, 0x31, 0x32, 0x33, 0x34, 0x35, 0x3A, 0x3B, 0x3C, 0x3D}
)
_ACKNOWLEDGEMENTS: dict[int, type[PubAck | PubRec | PubRel | PubComp]] = {
    0x40: PubAck,
    0x50: PubRec,
    0x62: PubRel,
    0x70: PubComp,
}


class TopicNames:
    """Topic names checked before, so that a busy topic's bytes are decoded and checked once.

    At most `KNOWN_TOPICS` of at most `MAX_KNOWN_TOPIC_BYTES`; when full it starts afresh.
    """

    __slots__ = ("known",)

    def __init__(self) -> None:
        self.known: dict[bytes, str] = {}

    def learn(self, raw: bytes) -> str:
        """Decode and check a topic name; raises `MalformedPacketError`."""
        topic = _text(raw)
        if not topic:
            raise MalformedPacketError("an empty topic name")
        if "+" in topic or "#" in topic:
            raise MalformedPacketError("a wildcard in a topic name")
        if len(raw) <= MAX_KNOWN_TOPIC_BYTES:
            if len(self.known) >= KNOWN_TOPICS:
                self.known.clear()
            self.known[raw] = topic
        return topic


class PacketReader:
    """Reads one client's bytes.

    Args:
        max_packet_bytes: the largest remaining length taken.
        topics: names known from other clients; shared by every reader of a broker.
    """

    __slots__ = ("_failed", "_max_packet_bytes", "_needed", "_partial", "_topics")

    first_bytes: ClassVar[frozenset[int]] = _FIRST_BYTES

    def __init__(self, max_packet_bytes: int, topics: TopicNames | None = None) -> None:
        self._max_packet_bytes = max_packet_bytes
        self._topics = topics or TopicNames()
        self._partial = bytearray()
        self._needed = 0
        self._failed: str | None = None

    @property
    def buffered_bytes(self) -> int:
        """How much of an unfinished packet is held."""
        return len(self._partial)

    def feed(self, data: bytes) -> list[Packet]:
        """Take bytes; return the packets that are now whole.

        Raises:
            MalformedPacketError: no client packet has such bytes. Every later call raises it too.
        """
        if self._failed is not None:
            raise MalformedPacketError(self._failed)
        if self._partial:
            self._partial += data
            if len(self._partial) < self._needed:
                return []
            data = bytes(self._partial)
            self._partial.clear()
        packets: list[Packet] = []
        try:
            rest = self._read(data, packets)
        except MalformedPacketError as error:
            self._failed = error.cause
            error.before = packets
            raise
        if rest < len(data):
            self._partial += data[rest:] if rest else data
        return packets

    # One long loop on purpose: this runs once a message, and a call costs as much as the rest of a step.
    def _read(self, data: bytes, packets: list[Packet]) -> int:  # noqa: C901, PLR0912
        """Append the whole packets of `data`; return where the unfinished one begins."""
        known, first_bytes = self._topics.known, self.first_bytes
        at, end = 0, len(data)
        while at < end:
            first = data[at]
            if first not in first_bytes:
                raise MalformedPacketError(f"the first byte {first:#04x}")
            if at + 1 == end:
                self._needed = 2
                return at
            length = data[at + 1]
            body = at + 2
            if length & 0x80:
                length, body = self._long_length(data, at + 1)
                if body == 0:
                    self._needed = end - at + 1
                    return at
            if length > self._max_packet_bytes:
                raise MalformedPacketError(f"a packet of {length} bytes, more than {self._max_packet_bytes}")
            stop = body + length
            if stop > end:
                self._needed = stop - at
                return at
            if first & 0xF0 == 0x30:
                if length < 2:
                    raise MalformedPacketError("a PUBLISH that is too short")
                topic_end = body + 2 + (data[body] << 8 | data[body + 1])
                payload = topic_end
                packet_id = 0
                if first & 0x06:
                    payload += 2
                    if payload <= stop:
                        packet_id = data[topic_end] << 8 | data[topic_end + 1]
                        if packet_id == 0:
                            raise MalformedPacketError("packet identifier 0")
                if payload > stop:
                    raise MalformedPacketError("a PUBLISH that is too short")
                raw = data[body + 2 : topic_end]
                topic = known.get(raw) or self._topics.learn(raw)
                if first == 0x30 and data[body - 1]:  # the remaining length in its shortest form, as we write it
                    packets.append(_new(Publish, (topic, data[payload:stop], 0, False, False, 0, data[at:stop])))
                else:
                    packets.append(
                        _new(
                            Publish,
                            (
                                topic,
                                data[payload:stop],
                                first >> 1 & 3,
                                first & 1 == 1,
                                first & 8 == 8,
                                packet_id,
                                b"",
                            ),
                        )
                    )
            elif first in _ACKNOWLEDGEMENTS:
                if length != 2:
                    raise MalformedPacketError("an acknowledgement that is not two bytes long")
                packet_id = data[body] << 8 | data[body + 1]
                if packet_id == 0:
                    raise MalformedPacketError("packet identifier 0")
                packets.append(_new(_ACKNOWLEDGEMENTS[first], (packet_id,)))
            else:
                packets.append(self._rare(first, data[body:stop]))
            at = stop
        return at

    def _rare(self, first: int, body: bytes) -> Packet:
        """Read a packet that is neither a PUBLISH nor an acknowledgement of one."""
        return _rare(first, body)

    def _long_length(self, data: bytes, at: int) -> tuple[int, int]:
        """Decode a remaining length of two to four bytes (§2.2.3).

        Returns:
            The length, and where the body begins (0: the length itself is not whole yet).
        """
        length = 0
        for position in range(4):
            if at + position == len(data):
                return 0, 0
            byte = data[at + position]
            length |= (byte & 0x7F) << 7 * position
            if not byte & 0x80:
                return length, at + position + 1
        raise MalformedPacketError("a remaining length of more than four bytes")


def _rare(first: int, body: bytes) -> Packet:
    if first in (0xC0, 0xE0):
        if body:
            raise MalformedPacketError("a PINGREQ or DISCONNECT with a body")
        return _PING_REQ if first == 0xC0 else _DISCONNECT
    fields = _Body(body)
    if first == 0x10:
        return _connect(fields)
    packet_id = fields.packet_id()
    if first == 0x82:
        return Subscribe(packet_id, _subscriptions(fields))
    return Unsubscribe(packet_id, _unsubscriptions(fields))


def _connect(fields: _Body) -> Connect | UnsupportedConnect:
    """CONNECT, §3.1.2 and §3.1.3, in the order of its bytes."""
    name = fields.text()
    if name not in ("MQTT", "MQIsdp"):
        raise MalformedPacketError("a CONNECT of another protocol")
    level = fields.byte()
    if name != "MQTT" or level != 4:
        return UnsupportedConnect(name, level)
    flags = fields.byte()
    has_username, has_password, will_retain = flags & 0x80, flags & 0x40, flags & 0x20
    will_qos, has_will, clean = flags >> 3 & 3, flags & 0x04, flags & 0x02
    if flags & 1:
        raise MalformedPacketError("a CONNECT with its reserved flag set")
    if will_qos == 3 or (not has_will and (will_qos or will_retain)):
        raise MalformedPacketError("a CONNECT with impossible will flags")
    if has_password and not has_username:
        raise MalformedPacketError("a CONNECT with a password and no user name")
    keepalive_s = fields.word()
    client_id = fields.text()
    will = None
    if has_will:
        topic = fields.text()
        if not topic or "+" in topic or "#" in topic:
            raise MalformedPacketError("a will on no valid topic")
        will = Will(topic, fields.binary(), will_qos, bool(will_retain))
    username = fields.text() if has_username else None
    if has_password:
        fields.binary()
    fields.finish()
    return Connect(client_id, bool(clean), keepalive_s, will, username)


def _subscriptions(fields: _Body) -> tuple[tuple[str, int], ...]:
    filters: list[tuple[str, int]] = []
    while not fields.at_end or not filters:
        topic_filter = fields.filter()
        qos = fields.byte()
        if qos > 2:
            raise MalformedPacketError("a SUBSCRIBE with a QoS above 2")
        filters.append((topic_filter, qos))
    return tuple(filters)


def _unsubscriptions(fields: _Body) -> tuple[str, ...]:
    filters: list[str] = []
    while not fields.at_end or not filters:
        filters.append(fields.filter())
    return tuple(filters)


class _Body:
    """A packet's body, read field by field and never past its end."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def at_end(self) -> bool:
        return self._at == len(self._data)

    def byte(self) -> int:
        return self._take(1)[0]

    def word(self) -> int:
        return int.from_bytes(self._take(2), "big")

    def packet_id(self) -> int:
        packet_id = self.word()
        if packet_id == 0:
            raise MalformedPacketError("packet identifier 0")
        return packet_id

    def binary(self) -> bytes:
        return self._take(self.word())

    def text(self) -> str:
        return _text(self.binary())

    def filter(self) -> str:
        topic_filter = self.text()
        try:
            check_filter(topic_filter)
        except TopicError as error:
            raise MalformedPacketError("an invalid topic filter") from error
        return topic_filter

    def finish(self) -> None:
        if not self.at_end:
            raise MalformedPacketError("bytes left over in a packet")

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise MalformedPacketError("a field that reaches beyond its packet")
        self._at += count
        return taken


def _text(raw: bytes) -> str:
    """Decode UTF-8 (§1.5.3). Python's strict decoder refuses surrogates and overlong forms; NUL is left to us."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise MalformedPacketError("text that is not UTF-8") from error
    if "\0" in text:
        raise MalformedPacketError("text with a NUL character")
    return text
