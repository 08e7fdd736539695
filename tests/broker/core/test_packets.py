"""The packet reader: what it takes, and that nothing else gets past it (MQTT 3.1.1)."""

from __future__ import annotations

from unittest.mock import ANY

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import mqtt_client as mqtt

from birthmark.broker import packet_reader, packets
from birthmark.broker.packet_bodies import MalformedPacketError
from birthmark.broker.packet_reader import PacketReader, TopicNames
from birthmark.broker.packets import (
    Connect,
    Disconnect,
    Packet,
    PingReq,
    PubAcks,
    PubComp,
    Publish,
    PublishRun,
    PubRec,
    PubRel,
    Subscribe,
    Unsubscribe,
    UnsupportedConnect,
    Will,
)

LIMIT = 4_096

GOOD: list[tuple[bytes, Packet]] = [
    (mqtt.connect("sensor-1"), Connect("sensor-1", clean=True, keepalive_s=60)),
    (mqtt.connect("", clean=False, keepalive=0), Connect("", clean=False, keepalive_s=0)),
    (
        mqtt.connect("a", will=("w/t", b"gone", 1, True)),
        Connect("a", clean=True, keepalive_s=60, will=Will("w/t", b"gone", 1, retain=True)),
    ),
    (
        mqtt.connect("a", flags=0xC2, tail=mqtt.text("user") + mqtt.text("secret")),
        Connect("a", clean=True, keepalive_s=60, username="user"),
    ),
    (mqtt.connect("a", level=5, tail=b"\x00"), UnsupportedConnect("MQTT", 5)),
    (mqtt.connect("a", level=3, name="MQIsdp"), UnsupportedConnect("MQIsdp", 3)),
    (mqtt.publish("a/b", b"x"), PublishRun("a/b", 0, [b"x"], [], [mqtt.publish("a/b", b"x")])),
    (mqtt.publish("a", b"", retain=True), Publish("a", b"", retain=True)),
    (mqtt.publish("a", b"xyz", qos=1, pid=1), PublishRun("a", 1, [b"xyz"], [1], [])),
    (
        mqtt.publish("ü/€", b"\x00" * 300, qos=2, pid=65_535, dup=True),
        Publish("ü/€", b"\x00" * 300, 2, dup=True, packet_id=65_535),
    ),
    (mqtt.puback(258), PubAcks([258])),
    (mqtt.pubrec(1), PubRec(1)),
    (mqtt.pubrel(1), PubRel(1)),
    (mqtt.pubcomp(65_535), PubComp(65_535)),
    (mqtt.subscribe(3, ("a/+", 0), ("#", 2)), Subscribe(3, (("a/+", 0), ("#", 2)))),
    (mqtt.unsubscribe(4, "a/+", "b"), Unsubscribe(4, ("a/+", "b"))),
    (mqtt.PINGREQ, PingReq()),
    (mqtt.DISCONNECT, Disconnect()),
]
IDS = [type(expected).__name__ for _, expected in GOOD]


def reader() -> PacketReader:
    return PacketReader(LIMIT)


def one_by_one(found: list[Packet]) -> list[object]:
    """The packets, without the runs that they were read in."""
    packets: list[object] = []
    for packet in found:
        if isinstance(packet, PublishRun):
            packets += packet.each()
        elif isinstance(packet, PubAcks):
            packets += [("PUBACK", packet_id) for packet_id in packet.packet_ids]
        else:
            packets.append(packet)
    return packets


@pytest.mark.parametrize(("data", "expected"), GOOD, ids=IDS)
def test_a_packet_is_read_with_every_field(data: bytes, expected: Packet) -> None:
    assert reader().feed(data) == [expected]


@pytest.mark.parametrize(("data", "expected"), GOOD, ids=IDS)
def test_a_packet_cut_at_any_byte_waits_for_the_rest(data: bytes, expected: Packet) -> None:
    for cut in range(1, len(data)):
        cut_reader = reader()
        assert cut_reader.feed(data[:cut]) == []
        assert cut_reader.buffered_bytes == cut
        assert cut_reader.feed(data[cut:]) == [expected]
        assert cut_reader.buffered_bytes == 0


@pytest.mark.parametrize(("data", "expected"), GOOD, ids=IDS)
def test_a_body_shorter_than_its_fields_is_malformed(data: bytes, expected: Packet) -> None:
    """The remaining length is cut, so that each field in turn reaches beyond its packet."""
    header = 2 if len(data) < 130 else 3
    body = data[header:]
    for length in range(len(body)):
        shortened = mqtt.packet(data[0], body[:length])
        try:
            (found,) = reader().feed(shortened)
        except MalformedPacketError:
            continue
        # A shorter payload, fewer filters, or the part of a foreign CONNECT that is read at all.
        assert type(found) is type(expected)
        assert isinstance(found, Publish | PublishRun | Subscribe | Unsubscribe | UnsupportedConnect)


@given(st.data())
def test_packets_come_out_the_same_whatever_the_chunks(data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(GOOD), min_size=1, max_size=6))
    stream = b"".join(raw for raw, _ in chosen)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    chunked, found = reader(), []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += chunked.feed(stream[start:stop])
    assert one_by_one(found) == one_by_one([expected for _, expected in chosen])
    assert chunked.buffered_bytes == 0


@given(st.lists(st.binary(max_size=80), max_size=8))
def test_no_bytes_raise_anything_but_malformed(chunks: list[bytes]) -> None:
    fuzzed = reader()
    failed = False
    for chunk in chunks:
        try:
            fuzzed.feed(chunk)
            assert not failed, "it went on after a malformed packet"
        except MalformedPacketError:
            failed = True
        assert fuzzed.buffered_bytes <= LIMIT + 5


@given(st.data())
def test_a_packet_with_one_byte_changed_is_a_packet_or_malformed(data: st.DataObject) -> None:
    raw, _ = data.draw(st.sampled_from(GOOD))
    at = data.draw(st.integers(0, len(raw) - 1))
    changed = raw[:at] + bytes([data.draw(st.integers(0, 255))]) + raw[at + 1 :]
    try:
        for packet in one_by_one(reader().feed(changed)):
            if isinstance(packet, Publish):
                assert packet.topic
                assert not set("+#\0") & set(packet.topic)
                assert (packet.packet_id != 0) == (packet.qos > 0)
    except MalformedPacketError:
        pass


MALFORMED = {
    "type 0": b"\x00\x00",
    "type 15": b"\xf0\x00",
    "CONNACK from a client": b"\x20\x02\x00\x00",
    "SUBACK from a client": b"\x90\x03\x00\x01\x00",
    "PINGRESP from a client": b"\xd0\x00",
    "PUBACK with flags": b"\x41\x02\x00\x01",
    "PUBREL without its flags": b"\x60\x02\x00\x01",
    "SUBSCRIBE without its flags": b"\x80" + mqtt.subscribe(1, ("a", 0))[1:],
    "PINGREQ with a body": b"\xc0\x01\x00",
    "DISCONNECT with a body": b"\xe0\x01\x00",
    "a remaining length of five bytes": b"\x30\xff\xff\xff\xff\x01",
    "a packet above the limit": b"\x30" + b"\x81\x20",
    "PUBLISH QoS 3": b"\x36\x05\x00\x01a\x00\x01",
    "PUBLISH with DUP and QoS 0": b"\x38\x03\x00\x01a",
    "PUBLISH to an empty topic": mqtt.publish("", b"x"),
    "PUBLISH to +": mqtt.publish("a/+", b"x"),
    "PUBLISH to #": mqtt.publish("#", b"x"),
    "PUBLISH with NUL in its topic": mqtt.publish("a\0b", b"x"),
    "PUBLISH with a topic longer than itself": b"\x30\x03\x00\x09a",
    "PUBLISH QoS 1 with identifier 0": mqtt.packet(0x32, mqtt.text("a") + b"\x00\x00"),
    "PUBLISH QoS 1 without identifier": mqtt.packet(0x32, mqtt.text("a")),
    "PUBLISH with bad UTF-8": mqtt.packet(0x30, mqtt.text(b"\xff\xfe")),
    "PUBLISH with a surrogate": mqtt.packet(0x30, mqtt.text(b"\xed\xa0\x80")),
    "PUBLISH with an overlong slash": mqtt.packet(0x30, mqtt.text(b"\xc0\xaf")),
    "PUBACK with identifier 0": mqtt.puback(0),
    "PUBACK of three bytes": b"\x40\x03\x00\x01\x00",
    "SUBSCRIBE with no topic": mqtt.subscribe(1),
    "SUBSCRIBE with QoS 3": mqtt.subscribe(1, ("a", 3)),
    "SUBSCRIBE with reserved bits in its QoS": mqtt.subscribe(1, ("a", 0x41)),
    "SUBSCRIBE with identifier 0": mqtt.subscribe(0, ("a", 0)),
    "SUBSCRIBE to an empty filter": mqtt.subscribe(1, ("", 0)),
    "SUBSCRIBE to a#": mqtt.subscribe(1, ("a#", 0)),
    "SUBSCRIBE to #/a": mqtt.subscribe(1, ("#/a", 0)),
    "SUBSCRIBE to a+/b": mqtt.subscribe(1, ("a+/b", 0)),
    "SUBSCRIBE with half a filter": mqtt.packet(0x82, b"\x00\x01\x00\x05ab"),
    "UNSUBSCRIBE with no topic": mqtt.unsubscribe(1),
    "CONNECT of another protocol": mqtt.connect("a", name="HTTP"),
    "CONNECT with its reserved flag": mqtt.connect("a", flags=0x03),
    "CONNECT with a will QoS and no will": mqtt.connect("a", flags=0x0A),
    "CONNECT with will retain and no will": mqtt.connect("a", flags=0x22),
    "CONNECT with will QoS 3": mqtt.connect("a", flags=0x1E, tail=mqtt.text("w") + mqtt.text("")),
    "CONNECT with a password and no user": mqtt.connect("a", flags=0x42, tail=mqtt.text("p")),
    "CONNECT with a flag and nothing for it": mqtt.connect("a", flags=0x82),
    "CONNECT with bytes left over": mqtt.connect("a", tail=b"x"),
    "CONNECT with a will on a wildcard": mqtt.connect("a", will=("a/#", b"", 0, False)),
    "CONNECT with a will on nothing": mqtt.connect("a", will=("", b"", 0, False)),
    "CONNECT with NUL in its client id": mqtt.connect("a\0"),
    "CONNECT without a client id": mqtt.packet(0x10, mqtt.text("MQTT") + b"\x04\x02\x00\x3c"),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_bytes_end_the_reader(data: bytes) -> None:
    ended = reader()
    with pytest.raises(MalformedPacketError) as caught:
        ended.feed(mqtt.PINGREQ + data + mqtt.PINGREQ)
    assert caught.value.before == [PingReq()], "what was whole before it counts; nothing after it does"
    with pytest.raises(MalformedPacketError):
        ended.feed(mqtt.PINGREQ)


def test_a_first_byte_that_no_client_sends_is_not_waited_for() -> None:
    with pytest.raises(MalformedPacketError):
        reader().feed(b"\xf0")


def test_a_packet_too_long_is_refused_by_its_length_alone() -> None:
    exact = mqtt.publish("a", bytes(LIMIT - 3))
    assert len(reader().feed(exact)) == 1
    with pytest.raises(MalformedPacketError, match="more than"):
        reader().feed(mqtt.publish("a", bytes(LIMIT - 2))[:3])


def test_known_topics_are_bounded() -> None:
    topics = TopicNames()
    for number in range(packet_reader.KNOWN_TOPICS + 10):
        topics.learn(b"%d" % number)
    topics.learn(b"x" * 60_000)
    assert len(topics.known) <= packet_reader.KNOWN_TOPICS
    assert all(len(raw) <= packet_reader.MAX_KNOWN_TOPIC_BYTES for raw in topics.known)


@given(st.integers(0, packets.MAX_REMAINING_LENGTH))
def test_a_remaining_length_is_encoded_as_section_2_2_3_says(count: int) -> None:
    assert b"\x30" + packets.remaining_length(count) == mqtt.packet(0x30)[:1] + _by_the_book(count)


def _by_the_book(count: int) -> bytes:
    """The pseudo-code of §2.2.3."""
    out = bytearray()
    while True:
        byte, count = count % 128, count // 128
        out.append(byte | 128 if count else byte)
        if not count:
            return bytes(out)


@given(
    st.text(st.characters(exclude_characters="+#\0", exclude_categories=["Cs"]), min_size=1, max_size=40),
    st.binary(max_size=300),
    st.sampled_from([0, 1, 2]),
    st.booleans(),
    st.integers(1, 65_535),
)
def test_what_the_broker_sends_is_what_an_independent_client_reads(
    topic: str, payload: bytes, qos: int, retain: bool, packet_id: int
) -> None:
    head = packets.publish_head(packets.topic_field(topic), len(payload), qos, retain=retain)
    tail = (packet_id.to_bytes(2, "big") if qos else b"") + payload
    assert head + tail == mqtt.publish(topic, payload, qos=qos, retain=retain, pid=packet_id)
    if qos:
        again = packets.as_duplicate(head) + tail
        assert again == mqtt.publish(topic, payload, qos=qos, retain=retain, pid=packet_id, dup=True)


def test_the_short_packets_of_the_broker() -> None:
    assert packets.connack(5) == b"\x20\x02\x00\x05"
    assert packets.connack(0, session_present=True) == b"\x20\x02\x01\x00"
    assert packets.puback(1) == mqtt.puback(1)
    assert packets.pubrec(1) == mqtt.pubrec(1)
    assert packets.pubrel(1) == mqtt.pubrel(1)
    assert packets.pubcomp(1) == mqtt.pubcomp(1)
    assert packets.suback(1, b"\x00\x80") == b"\x90\x04\x00\x01\x00\x80"
    assert packets.unsuback(1) == b"\xb0\x02\x00\x01"


@pytest.mark.parametrize("length", [5, 127, 128, 300, LIMIT - 10])
def test_a_message_that_goes_on_as_it_came_is_what_the_broker_would_write(length: int) -> None:
    data = mqtt.publish("a/b", b"p" * length)
    (run,) = reader().feed(data)
    assert isinstance(run, PublishRun)
    assert run.frames == [data]
    assert packets.publish_frame(packets.topic_field("a/b"), b"p" * length) == data


def test_a_padded_length_does_not_go_on_to_others() -> None:
    (packet,) = reader().feed(b"\x30\x86\x00\x00\x03a/bx")
    assert packet == Publish("a/b", b"x")


def test_messages_on_one_topic_are_a_run_whatever_their_length() -> None:
    data = [mqtt.publish("a/b", b"x" * length) for length in (3, 3, 3, 0, 200, 3)]
    other = mqtt.publish("a/c", b"xxx")
    assert reader().feed(b"".join([*data, other, data[0]])) == [
        PublishRun("a/b", 0, [b"xxx", b"xxx", b"xxx", b"", b"x" * 200, b"xxx"], [], ANY),
        PublishRun("a/c", 0, [b"xxx"], [], [other]),
        PublishRun("a/b", 0, [b"xxx"], [], [data[0]]),
    ]
    run = reader().feed(b"".join(data))[0]
    assert isinstance(run, PublishRun)
    assert b"".join(run.frames) == b"".join(data)


def test_a_run_has_each_message_of_qos_1_with_its_own_identifier() -> None:
    data = mqtt.publish("a", b"1", qos=1, pid=7) + mqtt.publish("a", b"2", qos=1, pid=8)
    again = mqtt.publish("a", b"3", qos=1, pid=9, dup=True)
    kept = mqtt.publish("a", b"4", qos=1, pid=10, retain=True)
    assert reader().feed(data + again + kept + mqtt.publish("a", b"5")) == [
        PublishRun("a", 1, [b"1", b"2", b"3"], [7, 8, 9], []),
        Publish("a", b"4", 1, retain=True, packet_id=10),
        PublishRun("a", 0, [b"5"], [], [mqtt.publish("a", b"5")]),
    ]


def test_a_run_ends_where_the_qos_changes() -> None:
    confirmed, plain = mqtt.publish("a", b"1", qos=1, pid=7), mqtt.publish("a", b"2")
    assert reader().feed(confirmed + plain + confirmed) == [
        PublishRun("a", 1, [b"1"], [7], []),
        PublishRun("a", 0, [b"2"], [], [plain]),
        PublishRun("a", 1, [b"1"], [7], []),
    ]


@pytest.mark.parametrize("one", [mqtt.publish("a", b"xyz"), mqtt.publish("a", b"x", qos=1, pid=3), mqtt.puback(4)])
def test_a_run_cut_at_any_byte_goes_on_with_the_rest(one: bytes) -> None:
    data = one * 4
    for cut in range(1, len(data)):
        cut_reader = reader()
        before = one_by_one(cut_reader.feed(data[:cut]))
        assert len(before) == cut // len(one)
        assert before + one_by_one(cut_reader.feed(data[cut:])) == one_by_one(reader().feed(data))


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_what_was_whole_before_a_bad_packet_in_a_run_counts(bad: int) -> None:
    identifiers = [0 if number == bad else number + 1 for number in range(3)]
    before = list(range(1, bad + 1))
    for data, expected in (
        (b"".join(mqtt.publish("a", b"x", qos=1, pid=one) for one in identifiers), [("a", one) for one in before]),
        (b"".join(mqtt.puback(one) for one in identifiers), [("PUBACK", one) for one in before]),
    ):
        with pytest.raises(MalformedPacketError, match="identifier 0") as caught:
            reader().feed(data)
        found = one_by_one(caught.value.before)
        assert [(one.topic, one.packet_id) if isinstance(one, Publish) else one for one in found] == expected


def test_acknowledgements_are_a_run() -> None:
    data = b"".join(mqtt.puback(one) for one in (1, 300, 2))
    assert reader().feed(data + mqtt.pubrec(3) + mqtt.puback(4)) == [PubAcks([1, 300, 2]), PubRec(3), PubAcks([4])]


def test_an_acknowledgement_may_have_a_padded_length() -> None:
    data = b"\x40\x82\x00\x00\x05" + mqtt.puback(6) + b"\x40\x82\x00\x00\x07"
    assert reader().feed(data) == [PubAcks([5, 6]), PubAcks([7])]
