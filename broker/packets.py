"""MQTT 3.1.1 control packets as values, and the encodings of those that the broker sends.

Values hold what `packet_reader.py` has checked; encoders trust their caller. A PUBLISH is encoded once for all its
recipients: only the two bytes of the packet identifier differ (OASIS MQTT 3.1.1; section numbers in the code).
"""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MAX_REMAINING_LENGTH = 268_435_455
"""What four bytes of remaining length can say (§2.2.3)."""


class Will(NamedTuple):
    """A last will, as in CONNECT (§3.1.2.5)."""

    topic: str
    payload: bytes
    qos: int
    retain: bool


class Connect(NamedTuple):
    """CONNECT (§3.1). The password is read past and not kept: a certificate is who the client is."""

    client_id: str
    clean: bool
    keepalive_s: int
    will: Will | None = None
    username: str | None = None


class UnsupportedConnect(NamedTuple):
    """A CONNECT of another protocol version, to be answered with CONNACK 1 (§3.1.2.2)."""

    name: str
    level: int


class Publish(NamedTuple):
    """PUBLISH (§3.3). `packet_id` is 0 with QoS 0."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    dup: bool = False
    packet_id: int = 0


class PublishRun(NamedTuple):
    """PUBLISHes of QoS 0 or 1 on one topic, none with RETAIN, that came one right after another: at least one.

    Nearly all that a busy broker sees: what the policy and the router say of a topic, they say once for a run.
    """

    topic: str
    qos: int
    payloads: list[bytes]
    packet_ids: list[int]
    """With QoS 1, one for each payload."""
    frames: list[bytes]
    """With QoS 0, the packets as they go on to others, in as many pieces as it takes."""

    def each(self) -> Iterator[Publish]:
        """The packets one by one."""
        for payload, packet_id in zip(self.payloads, self.packet_ids or repeat(0), strict=False):
            yield Publish(self.topic, payload, self.qos, packet_id=packet_id)


class PubAcks(NamedTuple):
    """PUBACKs (§3.4) that came one right after another: at least one."""

    packet_ids: list[int]


class PubRec(NamedTuple):
    """PUBREC (§3.5)."""

    packet_id: int


class PubRel(NamedTuple):
    """PUBREL (§3.6)."""

    packet_id: int


class PubComp(NamedTuple):
    """PUBCOMP (§3.7)."""

    packet_id: int


class Subscribe(NamedTuple):
    """SUBSCRIBE (§3.8): filters with the QoS asked for."""

    packet_id: int
    filters: tuple[tuple[str, int], ...]


class Unsubscribe(NamedTuple):
    """UNSUBSCRIBE (§3.10)."""

    packet_id: int
    filters: tuple[str, ...]


class PingReq(NamedTuple):
    """PINGREQ (§3.12)."""


class Disconnect(NamedTuple):
    """DISCONNECT (§3.14)."""


class TooLong(NamedTuple):
    """A PUBLISH from an upstream that is longer than what is taken: all of it but its payload."""

    topic: str
    qos: int
    packet_id: int
    length: int
    """Its remaining length, in bytes."""


class ConnAck(NamedTuple):
    """CONNACK (§3.2), from an upstream."""

    session_present: bool
    code: int


class SubAck(NamedTuple):
    """SUBACK (§3.9), from an upstream."""

    packet_id: int
    codes: bytes


class UnsubAck(NamedTuple):
    """UNSUBACK (§3.11), from an upstream."""

    packet_id: int


class PingResp(NamedTuple):
    """PINGRESP (§3.13), from an upstream."""


Packet: TypeAlias = (
    Connect
    | UnsupportedConnect
    | Publish
    | PublishRun
    | PubAcks
    | PubRec
    | PubRel
    | PubComp
    | Subscribe
    | Unsubscribe
    | PingReq
    | Disconnect
    | TooLong
    | ConnAck
    | SubAck
    | UnsubAck
    | PingResp
)

# --- what the broker sends -----------------------------------------------------------------------------------

PINGRESP = b"\xd0\x00"
CONNACK_ACCEPTED, CONNACK_VERSION, CONNACK_CLIENT_ID, CONNACK_UNAVAILABLE, CONNACK_NOT_AUTHORIZED = 0, 1, 2, 3, 5
"""CONNACK return codes (§3.2.2.3)."""
SUBACK_FAILURE = 0x80
_SHORT_LENGTHS = tuple(bytes([n]) for n in range(128))


def remaining_length(count: int) -> bytes:
    """Encode a remaining length (§2.2.3), 0 to `MAX_REMAINING_LENGTH`."""
    if count < 128:
        return _SHORT_LENGTHS[count]
    encoded = bytearray()
    while count > 127:
        encoded.append(count & 0x7F | 0x80)
        count >>= 7
    encoded.append(count)
    return bytes(encoded)


def topic_field(topic: str) -> bytes:
    """A topic as it stands in a PUBLISH: two bytes of length, and UTF-8."""
    raw = topic.encode()
    return len(raw).to_bytes(2, "big") + raw


def publish_head(topic_bytes: bytes, payload_length: int, qos: int, *, retain: bool) -> bytes:
    """Everything of a PUBLISH up to its packet identifier (QoS above 0) or payload (QoS 0).

    `topic_bytes` is a `topic_field`. The same head serves every recipient of a message.
    """
    length = len(topic_bytes) + payload_length + (2 if qos else 0)
    return bytes((0x30 | qos << 1 | retain,)) + remaining_length(length) + topic_bytes


def publish_frame(topic_bytes: bytes, payload: bytes, *, retain: bool = False) -> bytes:
    """A whole PUBLISH of QoS 0."""
    return publish_head(topic_bytes, len(payload), 0, retain=retain) + payload


def as_duplicate(head: bytes) -> bytes:
    """The same head with DUP set, for a redelivery (§3.3.1.1)."""
    return bytes((head[0] | 8,)) + head[1:]


def connack(code: int, *, session_present: bool = False) -> bytes:
    """CONNACK (§3.2)."""
    return bytes((0x20, 2, session_present, code))


def puback(packet_id: int) -> bytes:
    """PUBACK (§3.4)."""
    return b"\x40\x02" + packet_id.to_bytes(2, "big")


def pubacks(packet_ids: Iterable[int]) -> bytes:
    """As many PUBACKs."""
    return b"".join([b"\x40\x02" + packet_id.to_bytes(2, "big") for packet_id in packet_ids])


def pubrec(packet_id: int) -> bytes:
    """PUBREC (§3.5)."""
    return b"\x50\x02" + packet_id.to_bytes(2, "big")


def pubrel(packet_id: int) -> bytes:
    """PUBREL (§3.6)."""
    return b"\x62\x02" + packet_id.to_bytes(2, "big")


def pubcomp(packet_id: int) -> bytes:
    """PUBCOMP (§3.7)."""
    return b"\x70\x02" + packet_id.to_bytes(2, "big")


def suback(packet_id: int, codes: bytes) -> bytes:
    """SUBACK (§3.9): one code a filter, in the order of the SUBSCRIBE."""
    return b"\x90" + remaining_length(2 + len(codes)) + packet_id.to_bytes(2, "big") + codes


def unsuback(packet_id: int) -> bytes:
    """UNSUBACK (§3.11)."""
    return b"\xb0\x02" + packet_id.to_bytes(2, "big")
