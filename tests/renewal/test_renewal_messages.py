"""The messages of a renewal: round trips, and only our own error for anything else."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from birthmark.device.errors import RemoteProtocolError
from birthmark.device.renewal.messages import AnchorUpdate, RenewalAnswer, RenewalRequest

RENEW = RenewalRequest("renew", b"n" * 16, b"l" * 32, (b"a" * 32, b"b" * 32), b"signature", b"csr")
CONFIRM = RenewalRequest("confirm", b"n" * 16, b"l" * 32, (), b"signature")
ISSUED = RenewalAnswer(
    "issued", b"n" * 16, b"leaf", (b"issuing",), AnchorUpdate((b"root", b"next"), b"issuing", b"signature")
)
REFUSED = RenewalAnswer("refused", b"n" * 16, reason="revoked", retry=True, retry_after_s=60)
Message = RenewalRequest | RenewalAnswer
MESSAGES: list[Message] = [
    RENEW,
    CONFIRM,
    ISSUED,
    REFUSED,
    RenewalAnswer("confirmed", b"n" * 16),
    RenewalAnswer("renew-now", retry_after_s=30),
]


def name(message: Message) -> str:
    return message.kind if isinstance(message, RenewalRequest) else message.outcome


@pytest.mark.parametrize("message", MESSAGES, ids=name)
def test_round_trip_whatever_a_newer_writer_adds(message: Message) -> None:
    fields: dict[str, Any] = json.loads(message.to_bytes())
    assert type(message).from_bytes(message.to_bytes()) == message
    assert type(message).from_bytes(json.dumps({**fields, "later": [1]}).encode()) == message


@pytest.mark.parametrize("message", MESSAGES, ids=name)
def test_a_wrong_type_is_refused_key_by_key(message: Message) -> None:
    fields: dict[str, Any] = json.loads(message.to_bytes())
    for key in fields:
        with pytest.raises(RemoteProtocolError):
            type(message).from_bytes(json.dumps({**fields, key: -1.5}).encode())


@pytest.mark.parametrize(
    ("message", "key", "wrong"),
    [
        (RENEW, "nonce", "00"),
        (RENEW, "nonce", "AA" * 16),
        (RENEW, "nonce", "aa " * 16),
        (RENEW, "leaf_sha256", ""),
        (RENEW, "anchors_sha256", ["aa" * 32] * 5),
        (RENEW, "csr", "a"),
        (RENEW, "csr", "QUJD" * 200),
        (RENEW, "csr", "QU\nJD"),
        (RENEW, "kind", "confirm"),
        (CONFIRM, "csr", "QUJD"),
        (CONFIRM, "kind", "renew"),
        (CONFIRM, "kind", "\x1b[31m"),
        (ISSUED, "leaf", ""),
        (ISSUED, "chain", ["QUJD"] * 4),
        (ISSUED, "anchors", {"anchors": [], "signer": "QUJD", "signature": "QUJD"}),
        (ISSUED, "outcome", "confirmed"),
        (REFUSED, "outcome", "issued"),
        (REFUSED, "retry_after_s", -1),
    ],
)
def test_what_is_out_of_bounds_is_refused(message: Message, key: str, wrong: object) -> None:
    fields: dict[str, Any] = json.loads(message.to_bytes())
    with pytest.raises(RemoteProtocolError) as caught:
        type(message).from_bytes(json.dumps({**fields, key: wrong}).encode())
    assert "\x1b" not in caught.value.message


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(
    lambda value: json.dumps(value).encode()
)


@pytest.mark.parametrize("kind", [RenewalRequest, RenewalAnswer])
@given(st.binary(max_size=200) | JSON)
def test_any_bytes_give_only_our_error(kind: type[Message], payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        kind.from_bytes(payload)


@pytest.mark.parametrize("kind", [RenewalRequest, RenewalAnswer])
@pytest.mark.parametrize(
    "payload",
    [
        b"[" * 500_000,
        b'{"kind":' * 100_000,
        b'{"anchors":' * 100_000 + b"{}" + b"}" * 100_000,
        b'{"retry_after_s":' + b"9" * 500_000 + b"}",
        b'{"outcome":"refused","retry":true,"reason":"\\ud800","retry_after_s":1e999}',
        b'{"kind":"\\ud800"}',
    ],
    ids=["deep lists", "deep objects", "deep anchors", "a long number", "infinity", "half a character"],
)
def test_what_is_deep_or_long_is_refused_like_the_rest(kind: type[Message], payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        kind.from_bytes(payload)
