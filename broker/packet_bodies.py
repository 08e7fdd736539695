"""The bodies of MQTT 3.1.1 packets that come once in a while: all but PUBLISH and PUBACK. Bytes in, a packet out.

Rules (OASIS MQTT 3.1.1; section numbers in the code):

- Every field is read within its packet, and a packet's body must be used up exactly: else `MalformedPacketError`.
- Text is UTF-8 without NUL and without surrogates (§1.5.3); filters are checked as `filters.py` says.
"""

from __future__ import annotations

from birthmark.broker.filters import TopicError, check_filter
from birthmark.broker.packets import (
    Connect,
    Disconnect,
    Packet,
    PingReq,
    PubComp,
    PubRec,
    PubRel,
    Subscribe,
    Unsubscribe,
    UnsupportedConnect,
    Will,
)
from birthmark.device.errors import RemoteProtocolError


class MalformedPacketError(RemoteProtocolError):
    """Bytes that are no MQTT 3.1.1 client packet. The connection they came on ends.

    Args:
        cause: what is wrong, in a few words.
    """

    def __init__(self, cause: str) -> None:
        super().__init__(f"could not read an MQTT packet: {cause}")
        self.cause = cause
        self.before: list[Packet] = []


NO_ID = "packet identifier 0"
_PING_REQ = PingReq()
_DISCONNECT = Disconnect()
_ACKNOWLEDGEMENTS: dict[int, type[PubRec | PubRel | PubComp]] = {
    0x50: PubRec,
    0x62: PubRel,
    0x70: PubComp,
}


def read_body(first: int, body: bytes) -> Packet:
    """Return the packet with this first byte, one that a client may send, and this body.

    Raises:
        MalformedPacketError: there is none.
    """
    if first in (0xC0, 0xE0):
        if body:
            raise MalformedPacketError("a PINGREQ or DISCONNECT with a body")
        return _PING_REQ if first == 0xC0 else _DISCONNECT
    fields = _Body(body)
    if first == 0x10:
        return _connect(fields)
    packet_id = fields.packet_id()
    if first in _ACKNOWLEDGEMENTS:
        fields.finish()
        return _ACKNOWLEDGEMENTS[first](packet_id)
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
            raise MalformedPacketError(NO_ID)
        return packet_id

    def binary(self) -> bytes:
        return self._take(self.word())

    def text(self) -> str:
        return read_text(self.binary())

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


def read_text(raw: bytes) -> str:
    """Decode UTF-8 (§1.5.3). Python's strict decoder refuses surrogates and overlong forms; NUL is left to us."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise MalformedPacketError("text that is not UTF-8") from error
    if "\0" in text:
        raise MalformedPacketError("text with a NUL character")
    return text
