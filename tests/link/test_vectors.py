"""Every section of the golden vectors, both ways where both ways exist."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from support.agent_vectors import section, value_of, vectors

from birthmark.device.errors import RemoteProtocolError
from birthmark.device.link import cbor, cobs, messages, transcript
from birthmark.device.link.bundle import Bundle, BundleRefusedError, check_bundle
from birthmark.device.link.frame import Deframer, Frame

Entry = dict[str, Any]


def test_no_section_is_left_out() -> None:
    tested = {
        "keys", "cobs", "cobs_accept", "cobs_bad", "frames", "streams", "cbor_good", "cbor_bad", "message_bad",
        "transcripts", "bundle", "bundle_good", "bundle_bad",
    }  # fmt: skip
    assert vectors().keys() - tested == {"format", "version", "note"}


@pytest.mark.parametrize("name", vectors()["keys"])
def test_keys(name: str) -> None:
    entry = vectors()["keys"][name]
    assert _public_point(_private_key(entry["scalar"]).public_key()).hex() == entry["public"]


@pytest.mark.parametrize("entry", section("cobs"))
def test_cobs(entry: Entry) -> None:
    raw, encoded = bytes.fromhex(entry["raw"]), bytes.fromhex(entry["encoded"])
    assert cobs.encode(raw) == encoded
    assert cobs.decode(encoded) == raw


@pytest.mark.parametrize("entry", section("cobs_accept"))
def test_cobs_accept(entry: Entry) -> None:
    raw, encoded = bytes.fromhex(entry["raw"]), bytes.fromhex(entry["encoded"])
    assert cobs.decode(encoded) == raw
    assert cobs.encode(raw) != encoded


@pytest.mark.parametrize("entry", section("cobs_bad"))
def test_cobs_bad(entry: Entry) -> None:
    with pytest.raises(cobs.FramingError):
        cobs.decode(bytes.fromhex(entry["encoded"]))


@pytest.mark.parametrize("entry", section("frames"))
def test_frames_are_encoded_and_decoded(entry: Entry) -> None:
    encoded = bytes.fromhex(entry["encoded"])
    frame = Frame(type=entry["type"], seq=entry["seq"], sid=entry["sid"], payload=bytes.fromhex(entry["payload"]))
    assert frame.to_bytes() == encoded
    deframer = Deframer()
    assert deframer.feed(encoded) == [frame]
    assert (deframer.bad, deframer.oversize, deframer.noise) == (0, 0, b"")


@pytest.mark.parametrize("entry", section("frames"))
def test_frames_hold_typed_messages(entry: Entry) -> None:
    payload = bytes.fromhex(entry["payload"])
    message = _decode(entry, payload)
    assert message.TYPE.name == entry["message"]
    if entry["name"] == "hello: unknown keys are ignored":
        known = {key: value for key, value in value_of(entry["fields"]).items() if key <= 13}
        assert cbor.decode(message.to_payload()) == known
        return
    assert message.to_payload() == payload
    if entry["fields"] is not None:
        assert cbor.decode(payload) == value_of(entry["fields"])
        assert cbor.encode(value_of(entry["fields"])) == payload


def test_a_message_has_the_fields_of_its_vector() -> None:
    entry = next(entry for entry in vectors()["frames"] if entry["name"] == "hello: locked, re-provisioning open")
    fields = value_of(entry["fields"])
    message = messages.decode_answer(entry["type"], bytes.fromhex(entry["payload"]))
    assert message == messages.HelloAnswer(
        hwid=fields[1],
        model=fields[2],
        firmware=fields[3],
        state=messages.DeviceState.LOCKED,
        active_txn=fields[5],
        active_bundle_sha256=fields[6],
        max_frame_bytes=fields[7],
        max_bundle_bytes=fields[8],
        boot_id=fields[9],
        nonce=fields[10],
        open_txn=fields[11],
        prepared_bundle_sha256=fields[12],
        key_modes=messages.KeyMode.BOTH,
    )


def _check_stream(entry: Entry, pieces: list[bytes]) -> None:
    deframer = Deframer()
    frames = [frame for piece in pieces for frame in deframer.feed(piece)]
    assert frames == [
        Frame(
            type=frame["type"],
            seq=frame["seq"],
            sid=frame["sid"],
            payload=bytes.fromhex(frame["payload"]),
            version=frame["version"],
        )
        for frame in entry["frames"]
    ]
    assert (deframer.bad, deframer.oversize) == (entry["bad"], entry["oversize"])


@pytest.mark.parametrize("entry", section("streams"))
def test_streams_whole_and_byte_by_byte(entry: Entry) -> None:
    data = bytes.fromhex(entry["input"])
    _check_stream(entry, [data])
    _check_stream(entry, [data[i : i + 1] for i in range(len(data))])


@given(st.sampled_from(vectors()["streams"]), st.data())
def test_streams_however_they_are_cut(entry: Entry, draw: st.DataObject) -> None:
    data = bytes.fromhex(entry["input"])
    cuts = sorted(draw.draw(st.sets(st.integers(0, len(data)), max_size=12)))
    _check_stream(entry, [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)])


@pytest.mark.parametrize("entry", section("cbor_good"))
def test_cbor_good(entry: Entry) -> None:
    encoded = bytes.fromhex(entry["encoded"])
    assert cbor.decode(encoded) == value_of(entry["value"])
    assert cbor.encode(value_of(entry["value"])) == encoded


@pytest.mark.parametrize("entry", section("cbor_bad"))
def test_cbor_bad(entry: Entry) -> None:
    with pytest.raises(cbor.CborError):
        cbor.decode(bytes.fromhex(entry["encoded"]))


@pytest.mark.parametrize("entry", section("message_bad"))
def test_message_bad(entry: Entry) -> None:
    payload = bytes.fromhex(entry["payload"])
    cbor.decode(payload)  # it is the schema that refuses, not the encoding
    with pytest.raises(messages.MessageError):
        _decode(entry, payload)


@pytest.mark.parametrize("entry", section("cbor_bad"))
@pytest.mark.parametrize("type_", [*range(1, 10), *range(0x81, 0x8A), 0xFF])
def test_bad_cbor_is_a_bad_message_of_every_type(entry: Entry, type_: int) -> None:
    payload = bytes.fromhex(entry["encoded"])
    if type_ == 4 and len(payload) > 4:
        return  # the payload of DATA is raw
    decode = messages.decode_answer if type_ & 0x80 else messages.decode_request
    with pytest.raises(messages.MessageError):
        decode(type_, payload)


@pytest.mark.parametrize("entry", section("transcripts"))
def test_transcripts(entry: Entry) -> None:
    signed = transcript.transcript(entry["label"], *(bytes.fromhex(part["hex"]) for part in entry["parts"]))
    assert signed.hex() == entry["transcript"]
    assert hashlib.sha256(signed).hexdigest() == entry["sha256"]
    assert entry["label"] in set(transcript.Label)
    public_key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), bytes.fromhex(entry["public"]))
    assert transcript.verify(public_key, bytes.fromhex(entry["signature"]), signed)
    own = transcript.sign(_private_key(entry["scalar"]), signed)
    assert transcript.verify(public_key, own, signed)
    assert not transcript.verify(public_key, own, signed + b"\0")
    assert not transcript.verify(public_key, b"junk", signed)


def test_bundle() -> None:
    entry = vectors()["bundle"]
    encoded = bytes.fromhex(entry["encoded"])
    assert hashlib.sha256(encoded).hexdigest() == entry["sha256"]
    assert cbor.decode(encoded) == value_of(entry["fields"])
    bundle = Bundle.from_bytes(encoded)
    assert bundle.to_bytes() == encoded
    assert hashlib.sha256(bundle.leaf_der).hexdigest() == entry["leaf_sha256"]
    assert bundle.leaf_der.hex() == entry["certificates"]["leaf"]
    assert bundle.issuing_der == (bytes.fromhex(entry["certificates"]["issuing"]),)
    assert bundle.anchors_der == (bytes.fromhex(entry["certificates"]["root"]),)
    check_bundle(bundle, _private_key(entry["scalar"]).public_key())


def test_the_request_of_the_bundle() -> None:
    entry = vectors()["bundle"]
    request = x509.load_der_x509_csr(bytes.fromhex(entry["csr"]))
    assert request.is_signature_valid
    assert request.subject.rfc4514_string() == f"CN={entry['hwid']}"
    assert request.public_key() == _private_key(entry["scalar"]).public_key()


@pytest.mark.parametrize("entry", section("bundle_good"))
def test_bundle_good(entry: Entry) -> None:
    bundle = Bundle.from_bytes(bytes.fromhex(entry["encoded"]))
    assert bundle.to_bytes().hex() == entry["encoded"]
    check_bundle(bundle, _private_key(vectors()["bundle"]["scalar"]).public_key())


@pytest.mark.parametrize("entry", section("bundle_bad"))
def test_bundle_bad(entry: Entry) -> None:
    public_key = _private_key(vectors()["bundle"]["scalar"]).public_key()
    with pytest.raises(BundleRefusedError) as refusal:
        check_bundle(Bundle.from_bytes(bytes.fromhex(entry["encoded"])), public_key)
    assert refusal.value.code == entry["code"]


def _decode(entry: Entry, payload: bytes) -> Any:
    if entry["from"] == "station":
        return messages.decode_request(entry["type"], payload)
    # The second answer of UNLOCK has one key; the malformed vector is one of the first.
    proof = entry["type"] == 0x89 and payload[:1] == b"\xa1"
    return messages.decode_answer(entry["type"], payload, phase=2 if proof else 1)


def _private_key(scalar: str) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int(scalar, 16), ec.SECP256R1())


def _public_point(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)


def test_every_refusal_is_the_other_sides_fault() -> None:
    for kind in (cobs.FramingError, cbor.CborError, messages.MessageError):
        assert issubclass(kind, RemoteProtocolError)
