"""A client's bytes into MQTT 3.1.1 control packets: bytes in, packets out, no I/O.

Rules (OASIS MQTT 3.1.1; section numbers in the code):

- `PacketReader.feed` takes bytes in any chunks. The first byte that no valid client packet can have there ends
  the reader with `MalformedPacketError`: nothing is skipped, guessed or carried on with. Packets that were
  whole before that byte are in the error's `before`.
- Every field is read within its packet's remaining length, which is at most four bytes long and at most
  `max_packet_bytes`; a packet's body must be used up exactly (`packet_bodies.py`).
- A topic name is UTF-8 without NUL and without surrogates (§1.5.3), and holds no wildcard (§3.3.2-2).
- Nothing is buffered beyond one packet.

PUBLISHes on one topic and PUBACKs, nearly all that a busy broker sees, come out as runs: where the next packet
begins like the last one, nothing but its end, its identifier and its payload is looked at.
"""

from __future__ import annotations

from typing import ClassVar

from birthmark.broker.packet_bodies import NO_ID, MalformedPacketError, read_body, read_text
from birthmark.broker.packets import Packet, PubAcks, Publish, PublishRun

KNOWN_TOPICS = 16_384
MAX_KNOWN_TOPIC_BYTES = 512


_new = tuple.__new__
"""Makes a named tuple at half the price of its own constructor, all fields given."""

# Every first byte that a client may send (§2.2.2): DUP with QoS 0 and QoS 3 are not among the PUBLISHes.
_FIRST_BYTES = frozenset(
    {0x10, 0x40, 0x50, 0x62, 0x70, 0x82, 0xA2, 0xC0, 0xE0}
    | {0x30, 0x31, 0x32, 0x33, 0x34, 0x35, 0x3A, 0x3B, 0x3C, 0x3D}
)


class TopicNames:
    """Topic names checked before, so that a busy topic's bytes are decoded and checked once.

    At most `KNOWN_TOPICS` of at most `MAX_KNOWN_TOPIC_BYTES`; when full it starts afresh.
    """

    __slots__ = ("known",)

    def __init__(self) -> None:
        self.known: dict[bytes, str] = {}

    def learn(self, raw: bytes) -> str:
        """Decode and check a topic name; raises `MalformedPacketError`."""
        topic = read_text(raw)
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

    def _read(self, data: bytes, packets: list[Packet]) -> int:  # noqa: C901 - a call less for each packet
        """Append the whole packets of `data`; return where the unfinished one begins."""
        first_bytes = self.first_bytes
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
                went_on = self._too_long(data, at, body, length, packets)
                if went_on == at:
                    return at
                at = went_on
                continue
            stop = body + length
            if stop > end:
                self._needed = stop - at
                return at
            if first & 0xF0 == 0x30:
                stop = self._publishes(data, at, body, stop, packets)
            elif first == 0x40:
                stop = _pubacks(data, body, stop, packets)
            else:
                packets.append(self._rare(first, data[body:stop]))
            at = stop
        return at

    def _too_long(self, data: bytes, at: int, body: int, length: int, packets: list[Packet]) -> int:
        """Go on behind the packet at `at`, which is too long; return `at` if more of it is needed for that."""
        del data, at, body, packets
        raise MalformedPacketError(f"a packet of {length} bytes, more than {self._max_packet_bytes}")

    def _rare(self, first: int, body: bytes) -> Packet:
        """Read a packet that is neither a PUBLISH nor a PUBACK."""
        return read_body(first, body)

    def _publishes(self, data: bytes, at: int, body: int, stop: int, packets: list[Packet]) -> int:
        """Append the PUBLISH at `at`, and what follows it in a run; return where the last of them ends."""
        first = data[at]
        qos = first >> 1 & 3
        topic_end = body + 2
        if topic_end <= stop:
            topic_end += data[body] << 8 | data[body + 1]
        payload = topic_end + 2 if qos else topic_end
        if payload > stop:
            raise MalformedPacketError("a PUBLISH that is too short")
        packet_id = 0
        if qos and not (packet_id := data[payload - 2] << 8 | data[payload - 1]):
            raise MalformedPacketError(NO_ID)
        raw = data[body + 2 : topic_end]
        topic = self._topics.known.get(raw) or self._topics.learn(raw)
        if first & 0x05 or not data[body - 1]:  # QoS 2, to be retained, or its length in more bytes than it needs
            packets.append(Publish(topic, data[payload:stop], qos, first & 1 == 1, first & 8 == 8, packet_id))
            return stop
        run = packets[-1] if packets else None
        if type(run) is PublishRun and run.topic == topic and run.qos == qos:
            run.payloads.append(data[payload:stop])
            if qos:
                run.packet_ids.append(packet_id)
        else:
            run = _new(PublishRun, (topic, qos, [data[payload:stop]], [packet_id] if qos else [], []))
            packets.append(run)
        end = stop
        if stop < len(data) and data.startswith(data[at:topic_end], stop):
            end = _stretch(data, at, stop, topic_end, payload, run)
        if not qos:
            run.frames.append(data[at:end])
        return end

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


def _stretch(data: bytes, first: int, at: int, topic_end: int, payload: int, run: PublishRun) -> int:  # noqa: PLR0917
    """Add to a run the PUBLISHes from `at` on that begin like that at `first`: its first byte, length and topic.

    `topic_end` and `payload` are that one's. Return where the last of them ends.
    """
    length, skipped, head = at - first, payload - first, data[first:topic_end]
    payloads, packet_ids, has_id = run.payloads, run.packet_ids, run.qos
    last = len(data) - length
    while at <= last and data.startswith(head, at):
        if has_id:
            packet_id = data[at + skipped - 2] << 8 | data[at + skipped - 1]
            if packet_id == 0:
                raise MalformedPacketError(NO_ID)
            packet_ids.append(packet_id)
        payloads.append(data[at + skipped : at + length])
        at += length
    return at


def _pubacks(data: bytes, body: int, stop: int, packets: list[Packet]) -> int:
    """Append the PUBACK whose body is given, and all that follow it; return where the last of them ends."""
    if stop - body != 2:
        raise MalformedPacketError("an acknowledgement that is not two bytes long")
    packet_ids: list[int] = []
    end = len(data)
    while True:
        packet_id = data[body] << 8 | data[body + 1]
        if packet_id == 0:
            raise MalformedPacketError(NO_ID)
        if not packet_ids:
            packets.append(_new(PubAcks, (packet_ids,)))
        packet_ids.append(packet_id)
        body += 4
        if body + 2 > end or not data.startswith(b"\x40\x02", body - 2):
            return body - 2
