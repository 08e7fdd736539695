"""Any bytes in: only our own errors out, bounded memory, and the same result however a stream is cut."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any, get_args

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.agent_vectors import vectors

from birthmark.device.errors import LocalProtocolError
from birthmark.device.link import cbor, cobs, messages
from birthmark.device.link.bundle import Bundle, BundleRefusedError
from birthmark.device.link.frame import MAX_ENCODED, MAX_NOISE, MAX_PAYLOAD, Deframer, Frame

frames = st.builds(
    Frame,
    type=st.integers(0, 255),
    seq=st.integers(0, 0xFFFF),
    sid=st.integers(0, 0xFFFF_FFFF),
    payload=st.binary(max_size=400),
    version=st.integers(0, 255),
)
leaves: st.SearchStrategy[Any] = (
    st.integers(0, cbor.MAX_UINT) | st.binary(max_size=40) | st.text(max_size=20) | st.booleans()
)
keys = st.integers(0, 255)
depth_2 = leaves | st.lists(leaves, max_size=30) | st.dictionaries(keys, leaves, max_size=4)
depth_3 = depth_2 | st.lists(depth_2, max_size=3) | st.dictionaries(keys, depth_2, max_size=3)
values = depth_3 | st.lists(depth_3, max_size=3) | st.dictionaries(keys, depth_3, max_size=30)
_ENCODED = [bytes.fromhex(e["encoded"]) for name in ("cbor_good", "cbor_bad") for e in vectors()[name]] + [
    bytes.fromhex(e["payload"]) for e in vectors()["frames"]
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A sound encoding with one byte changed, cut out or put in."""
    data = bytearray(draw(st.sampled_from(_ENCODED)))
    at = draw(st.integers(0, len(data)))
    end = at + draw(st.integers(0, 2))
    data[at:end] = draw(st.binary(max_size=2))
    return bytes(data)


@given(st.binary(max_size=1200) | st.lists(st.sampled_from([b"\0", b"a" * 253, b"b"]), max_size=9).map(b"".join))
def test_cobs_round_trip(raw: bytes) -> None:
    encoded = cobs.encode(raw)
    assert 0 not in encoded
    assert len(encoded) <= len(raw) + 1 + len(raw) // 254
    assert cobs.decode(encoded) == raw


@given(st.binary(max_size=600))
def test_cobs_refuses_or_decodes(encoded: bytes) -> None:
    try:
        raw = cobs.decode(encoded)
    except cobs.FramingError:
        return
    assert len(raw) < len(encoded)
    assert len(cobs.encode(raw)) in (len(encoded), len(encoded) - 1)


@pytest.mark.parametrize("filler", [b"\0", b"\1", b"\xff", b"\0\1"])
def test_the_longest_payload_fits_whatever_it_holds(filler: bytes) -> None:
    payload = (filler * MAX_PAYLOAD)[:MAX_PAYLOAD]
    encoded = Frame(type=4, seq=0x0101, sid=0x01010101, payload=payload, version=1).to_bytes()
    assert len(encoded) <= MAX_ENCODED + 2
    assert Deframer().feed(encoded)[0].payload == payload
    with pytest.raises(LocalProtocolError):
        Frame(type=4, seq=1, sid=1, payload=payload + b"x").to_bytes()


@given(st.lists(frames | st.binary(max_size=60), max_size=8), st.data())
def test_the_deframer_does_not_see_the_cuts(parts: list[Frame | bytes], draw: st.DataObject) -> None:
    data = b"".join(part if isinstance(part, bytes) else part.to_bytes() for part in parts)
    cuts = sorted(draw.draw(st.sets(st.integers(0, len(data)), max_size=20)))
    whole, cut = Deframer(), Deframer()
    expected = whole.feed(data)
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    assert [frame for piece in pieces for frame in cut.feed(piece)] == expected
    assert (cut.bad, cut.oversize, cut.noise, cut.received) == (
        whole.bad,
        whole.oversize,
        whole.noise,
        whole.received,
    )
    # Each of these frames stands between delimiters of its own, so no noise around it may cost it.
    assert [frame for frame in parts if isinstance(frame, Frame)] == [f for f in expected if f in parts]


@given(st.binary(max_size=3000))
def test_noise_is_what_was_no_frame(text: bytes) -> None:
    deframer = Deframer()
    found = deframer.feed(text + Frame(type=1, seq=1, sid=1, payload=b"").to_bytes())
    assert len(found) >= 1
    if len(found) == 1:
        assert deframer.noise == text.replace(b"\0", b"")


def test_a_prompt_without_a_delimiter_is_noise_already() -> None:
    deframer = Deframer()
    deframer.feed(b"\x00raspberrypi login: ")
    assert deframer.noise.endswith(b"login: ")
    assert deframer.bad == 0


def test_a_megabyte_of_anything_leaves_memory_flat() -> None:
    generator = random.Random(1)
    floods = {
        "random": generator.randbytes(1 << 20),
        "text": b"[ 12.345678] a log line\r\n" * 40_000,
        "zeros": bytes(1 << 20),
        "ones": b"\1" * (1 << 20),
    }
    tracemalloc.start()
    try:
        for flood in floods.values():
            deframer = Deframer()
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            for start in range(0, len(flood), 4096):
                deframer.feed(flood[start : start + 4096])
                assert len(deframer._run) <= MAX_ENCODED
                assert len(deframer.noise) <= MAX_NOISE
            assert tracemalloc.get_traced_memory()[1] - before < 64 * 1024
    finally:
        tracemalloc.stop()


@given(values)
def test_cbor_round_trip_and_agreement_with_a_general_library(value: Any) -> None:
    encoded = cbor.encode(value)
    assert cbor.decode(encoded) == value
    assert cbor2.dumps(value, canonical=True) == encoded
    assert cbor2.loads(encoded) == value


@given(st.binary(max_size=80) | damaged())
def test_cbor_refuses_or_is_canonical(data: bytes) -> None:
    try:
        value = cbor.decode(data)
    except cbor.CborError:
        return
    assert cbor.encode(value) == data
    assert cbor2.loads(data) == value


@pytest.mark.parametrize("head", ["5b", "7b", "9b", "bb", "5a", "7a", "9a", "ba"])
@pytest.mark.parametrize("prefix", ["", "a101", "81"])
def test_cbor_believes_no_announced_length(prefix: str, head: str) -> None:
    width = 8 if head.endswith("b") else 4
    attack = bytes.fromhex(prefix + head) + b"\xff" * width + b"\0" * 100
    tracemalloc.start()
    try:
        with pytest.raises(cbor.CborError):
            cbor.decode(attack)
        assert tracemalloc.get_traced_memory()[1] < 64 * 1024
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("nested", [b"\x81", b"\xa1\x01"])
def test_cbor_ends_deep_nesting_at_once(nested: bytes) -> None:
    with pytest.raises(cbor.CborError):
        cbor.decode(nested * 100_000 + b"\0")


@pytest.mark.parametrize("value", [-1, 2**64, {256: 0}, {-1: 0}, [[[[[]]]]]])
def test_cbor_writes_nothing_that_it_would_refuse(value: Any) -> None:
    with pytest.raises(LocalProtocolError):
        cbor.encode(value)


@given(st.integers(0, 255), st.binary(max_size=120) | damaged())
def test_requests_are_refused_or_sound(type_: int, payload: bytes) -> None:
    try:
        request = messages.decode_request(type_, payload)
    except messages.MessageError:
        return
    assert isinstance(request, get_args(messages.Request))
    assert request.to_payload() == payload


@given(st.integers(0, 255), st.binary(max_size=120) | damaged(), st.sampled_from([1, 2]))
def test_answers_are_refused_or_sound(type_: int, payload: bytes, phase: Any) -> None:
    try:
        answer = messages.decode_answer(type_, payload, phase=phase)
    except messages.MessageError:
        return
    assert isinstance(answer, get_args(messages.Answer))
    if not isinstance(answer, messages.HelloAnswer):
        assert answer.to_payload() == payload


@given(st.data())
def test_bundles_are_refused_or_sound(draw: st.DataObject) -> None:
    data = bytearray.fromhex(vectors()["bundle"]["encoded"])
    at = draw.draw(st.integers(0, len(data)))
    data[at : at + draw.draw(st.integers(0, 2))] = draw.draw(st.binary(max_size=2))
    try:
        bundle = Bundle.from_bytes(bytes(data))
    except BundleRefusedError:
        return
    assert bundle.to_bytes() == bytes(data)


def test_secrets_stay_out_of_reprs() -> None:
    scalar = bytes(range(32))
    request = messages.KeygenRequest(bytes(16), scalar)
    frame = Frame(type=2, seq=1, sid=1, payload=request.to_payload())
    for shown in (repr(request), repr(frame), repr([request, frame])):
        assert repr(scalar)[2:-1] not in shown
        assert scalar.hex() not in shown


def test_a_bad_message_cannot_be_made() -> None:
    with pytest.raises(LocalProtocolError):
        messages.HelloRequest(bytes(15))
    with pytest.raises(LocalProtocolError):
        messages.HelloRequest(bytes(16), 2, 1)
    with pytest.raises(LocalProtocolError):
        messages.BeginRequest(bytes(16), 2**32, bytes(32))
    with pytest.raises(LocalProtocolError):
        messages.Data(0, b"")
    with pytest.raises(LocalProtocolError):
        Frame(type=256, seq=1, sid=1, payload=b"")
