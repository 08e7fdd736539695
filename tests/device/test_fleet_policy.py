"""The signed policy of a fleet: a golden one, what its signature covers, its bounds, and any other bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from birthmark.device.errors import LocalProtocolError, RemoteProtocolError
from birthmark.device.fleet_policy import (
    MAX_POLICY_BYTES,
    MAX_SIGNED_POLICY_BYTES,
    MAX_VERSION,
    PolicyReceipt,
    SignedPolicy,
    policy_transcript,
)

# Made once, with a key that is gone: other writers and readers must agree with these.
TEXT = '# größer\n[roles.device]\npublish = ["devices/{id}/telemetry/#"]\n'.encode()
TRANSCRIPT = bytes.fromhex(
    "001242495254484d41524b2d504f4c4943592d31"
    "00080000000000000007"
    "0008000000006ae6a360"
    "0020ffb1ab3a73a42c266fe179083cb0e37bc1b239105f4252eadf6199cc0dcdcf48"
)
GOLDEN = (
    b'{"version":7,"issued_at":1793500000,"issuer":"ab12",'
    b'"signature":"MEUCIADnrBX9V12azbapoxWeSI2QiVrNPx1hMcVtFitdq7zYAiEA3iHK18G1CLPuxrHBt/XdnKN3QSKi6lgQR8vv2GfEV84=",'
    b'"policy":"# gr\\u00f6\\u00dfer\\n[roles.device]\\npublish = [\\"devices/{id}/telemetry/#\\"]\\n"}'
)
SIGNER = ec.EllipticCurvePublicKey.from_encoded_point(
    ec.SECP256R1(), bytes.fromhex("037a37adcc3faa2b74efb8c25f6e5b487c30e2f6a0b21256f1fc314837ec2e3d46")
)
POLICY = SignedPolicy.from_bytes(GOLDEN)
RECEIPT = PolicyReceipt("gw-1", "refused", 6, "ab", 1.5, 2.5, 3, "older: version 5 is lower than 6")
Message = SignedPolicy | PolicyReceipt


def test_the_golden_policy_reads_verifies_and_is_written_as_it_was() -> None:
    assert (POLICY.version, POLICY.issued_at, POLICY.issuer, POLICY.text) == (7, 1_793_500_000, "ab12", TEXT)
    assert policy_transcript(7, 1_793_500_000, TEXT) == TRANSCRIPT
    assert POLICY.is_signed_by(SIGNER)
    assert POLICY.to_bytes() == GOLDEN


@pytest.mark.parametrize("changed", [{"version": 8}, {"issued_at": 1_793_500_001}, {"text": TEXT + b"\n"}])
def test_the_signature_covers_version_time_and_text(changed: dict[str, Any]) -> None:
    assert not replace(POLICY, **changed).is_signed_by(SIGNER)


def test_another_key_has_not_signed_it() -> None:
    assert not POLICY.is_signed_by(ec.generate_private_key(ec.SECP256R1()).public_key())


def test_a_signature_over_the_bare_text_is_none_over_a_policy() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    bare = replace(POLICY, signature=key.sign(TEXT, ec.ECDSA(hashes.SHA256())))
    assert not bare.is_signed_by(key.public_key())


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        ({"version": 0}, "version"),
        ({"version": MAX_VERSION + 1}, "version"),
        ({"issued_at": -1}, "issue time"),
        ({"issued_at": 253_402_300_800}, "issue time"),
        ({"issuer": ""}, "key identifier"),
        ({"issuer": "AB"}, "key identifier"),
        ({"issuer": "a" * 65}, "key identifier"),
        ({"issuer": "\x1b[31m"}, "key identifier"),
        ({"text": b""}, "bytes"),
        ({"text": b"#" * (MAX_POLICY_BYTES + 1)}, "bytes"),
        ({"text": b"\xff"}, "UTF-8"),
        ({"signature": b""}, "signature"),
        ({"signature": b"0" * 81}, "signature"),
    ],
)
def test_nothing_out_of_bounds_is_made(changed: dict[str, Any], cause: str) -> None:
    with pytest.raises(LocalProtocolError, match=cause) as caught:
        replace(POLICY, **changed)
    assert "\x1b" not in caught.value.message


def test_the_longest_policy_of_the_widest_characters_fits_a_packet() -> None:
    longest = replace(POLICY, text="é".encode() * (MAX_POLICY_BYTES // 2))
    assert len(longest.to_bytes()) <= MAX_SIGNED_POLICY_BYTES
    assert SignedPolicy.from_bytes(longest.to_bytes()) == longest


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": 0},
        {"version": "7"},
        {"version": True},
        {"version": 10**400},
        {"issued_at": 1.5},
        {"issuer": "\x1b[31m"},
        {"signature": "not base64!"},
        {"signature": "AA" * 200},
        {"policy": "\ud800"},
        {"policy": ""},
        {"policy": None},
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError, match="could not read a signed policy") as caught:
        SignedPolicy.from_bytes(json.dumps({**json.loads(GOLDEN), **wrong}).encode())
    assert "\x1b" not in caught.value.message


def test_too_many_bytes_are_refused_unread() -> None:
    with pytest.raises(RemoteProtocolError, match="more than"):
        SignedPolicy.from_bytes(GOLDEN + b" " * MAX_SIGNED_POLICY_BYTES)


@pytest.mark.parametrize("message", [POLICY, RECEIPT], ids=lambda message: type(message).__name__)
def test_round_trip_with_a_key_of_a_newer_writer(message: Message) -> None:
    fields = json.loads(message.to_bytes())
    assert type(message).from_bytes(json.dumps({**fields, "later": [1]}).encode()) == message


def test_a_receipt_of_an_unknown_outcome_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="outcome"):
        PolicyReceipt.from_bytes(json.dumps({**json.loads(RECEIPT.to_bytes()), "outcome": "fine"}).encode())


@pytest.mark.parametrize("kind", [SignedPolicy, PolicyReceipt])
@given(
    payload=st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*json.loads(GOLDEN), *json.loads(RECEIPT.to_bytes())]), inner, max_size=9
            )
        ),
        max_leaves=9,
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_bytes_are_a_message_or_our_own_error(kind: type[Message], payload: bytes) -> None:
    try:
        read = kind.from_bytes(payload)
    except RemoteProtocolError:
        return
    assert kind.from_bytes(read.to_bytes()) == read
