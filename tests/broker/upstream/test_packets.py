"""The client's half of MQTT 3.1.1: what we say is what our own broker reads, what we hear is read strictly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from birthmark.broker import packets as mqtt
from birthmark.broker.packet_bodies import MalformedPacketError
from birthmark.broker.packet_reader import PacketReader
from birthmark.broker.upstream import packets as up
from birthmark.broker.upstream.packets import ServerPacketReader, TopicNamesAbove

LIMIT = 1_000_000
NAMES = st.text("abc/é", min_size=1, max_size=20)
WILLS = st.none() | st.builds(mqtt.Will, NAMES, st.binary(max_size=300), st.integers(0, 2), st.booleans())


def reader() -> ServerPacketReader:
    return ServerPacketReader(LIMIT, TopicNamesAbove())


@given(st.text("abc:-é", min_size=1, max_size=128), st.integers(0, 65_535), WILLS)
def test_a_connect_is_read_as_it_was_meant(client_id: str, keepalive_s: int, will: mqtt.Will | None) -> None:
    (found,) = PacketReader(LIMIT).feed(up.connect(client_id, keepalive_s, will))
    assert found == mqtt.Connect(client_id, clean=False, keepalive_s=keepalive_s, will=will)


@given(st.integers(1, 65_535), st.lists(NAMES, min_size=1, max_size=40), st.integers(0, 2))
def test_subscriptions_are_read_as_they_were_meant(packet_id: int, filters: list[str], qos: int) -> None:
    said = up.subscribe(packet_id, filters, qos) + up.unsubscribe(packet_id, filters) + up.PINGREQ + up.DISCONNECT
    assert PacketReader(LIMIT).feed(said) == [
        mqtt.Subscribe(packet_id, tuple((name, qos) for name in filters)),
        mqtt.Unsubscribe(packet_id, tuple(filters)),
        mqtt.PingReq(),
        mqtt.Disconnect(),
    ]


@given(st.data())
def test_what_a_broker_says_is_read_in_any_chunks(data: st.DataObject) -> None:
    said = b"".join(
        (
            mqtt.connack(0, session_present=True),
            mqtt.suback(7, b"\x00\x01\x80"),
            mqtt.unsuback(8),
            mqtt.PINGRESP,
            mqtt.puback(9),
            mqtt.publish_head(mqtt.topic_field("a/b"), 3, 0, retain=True) + b"xyz",
            mqtt.publish_head(mqtt.topic_field("a/b"), 3, 1, retain=False) + b"\x00\x05xyz",
            mqtt.publish_head(mqtt.topic_field("a/+"), 1, 1, retain=False) + b"\x00\x06x",
        )
    )
    cuts = sorted(data.draw(st.sets(st.integers(1, len(said) - 1), max_size=8)))
    one = reader()
    found: list[mqtt.Packet] = []
    for start, stop in zip([0, *cuts], [*cuts, len(said)], strict=True):
        for packet in one.feed(said[start:stop]):
            found += packet.each() if isinstance(packet, mqtt.PublishRun) else [packet]
    assert found == [
        mqtt.ConnAck(session_present=True, code=0),
        mqtt.SubAck(7, b"\x00\x01\x80"),
        mqtt.UnsubAck(8),
        mqtt.PingResp(),
        mqtt.PubAcks([9]),
        mqtt.Publish("a/b", b"xyz", retain=True),
        mqtt.Publish("a/b", b"xyz", qos=1, packet_id=5),
        mqtt.Publish("", b"x", qos=1, packet_id=6),
    ]


@given(st.data(), st.integers(1, 400), st.sampled_from([0, 1, 2]))
def test_a_message_that_is_too_long_is_passed_over_in_any_chunks(
    data: st.DataObject, excess: int, qos: int
) -> None:
    one = ServerPacketReader(100, TopicNamesAbove())
    head = mqtt.publish_head(mqtt.topic_field("a/b"), 100 + excess, qos, retain=False)
    said = mqtt.PINGRESP + head + (b"\x00\x05" if qos else b"") + bytes(100 + excess) + mqtt.puback(9)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(said) - 1), max_size=8)))
    found: list[mqtt.Packet] = []
    for start, stop in zip([0, *cuts], [*cuts, len(said)], strict=True):
        found += one.feed(said[start:stop])
        assert one.buffered_bytes <= 100
    length = 5 + (2 if qos else 0) + 100 + excess
    assert found == [mqtt.PingResp(), mqtt.TooLong("a/b", qos, 5 if qos else 0, length), mqtt.PubAcks([9])]


@pytest.mark.parametrize(
    "said",
    [
        b"\x31\x80\x08\x04\x00" + b"a" * 1_024,  # a topic that is longer than its packet
        b"\x32\x80\x08\x00\x01a\x00\x00",  # packet identifier 0
        b"\x90\x80\x08\x00\x01",  # a SUBACK that is too long
    ],
)
def test_what_is_too_long_and_no_message_ends_the_reader(said: bytes) -> None:
    with pytest.raises(MalformedPacketError):
        ServerPacketReader(100, TopicNamesAbove()).feed(said)


@pytest.mark.parametrize(
    "said",
    [
        b"\x20\x02\x02\x00",  # reserved bits of CONNACK
        b"\x20\x02\x01\x05",  # a session that is there for one who is refused
        b"\x20\x03\x00\x00\x00",
        b"\x90\x02\x00\x01",  # no code
        b"\x90\x03\x00\x01\x03",  # QoS 3
        b"\x90\x03\x00\x00\x00",  # packet identifier 0
        b"\xb0\x03\x00\x01\x00",
        b"\xd0\x01\x00",
        b"\x10\x00",  # what only a client says
        b"\x82\x00",
        b"\xc0\x00",
        b"\xe0\x00",
        b"\x36\x00",
        b"\x40\x02\x00\x00",
        b"\x30\xff\xff\xff\xff",
    ],
)
def test_what_no_broker_says_ends_the_reader(said: bytes) -> None:
    with pytest.raises(MalformedPacketError):
        reader().feed(said)


@given(st.binary(max_size=200))
def test_any_bytes_are_packets_or_malformed(said: bytes) -> None:
    one = reader()
    try:
        one.feed(said)
    except MalformedPacketError:
        return
    assert one.buffered_bytes <= len(said)
