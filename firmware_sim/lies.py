"""Every way in which a hostile board may lie, by name (docs/serial-protocol.md sections 11 and 12)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from birthmark.device.agent import keys
from birthmark.device.link import cbor
from birthmark.device.link.frame import Frame
from birthmark.device.link.messages import DeviceState, ErrorCode, MessageType
from birthmark.device.link.transcript import Label, sign, transcript
from birthmark.firmware_sim.hostile import Lie, Talk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HELLO, KEYGEN, DATA = MessageType.HELLO, MessageType.KEYGEN, MessageType.DATA
PREPARE, COMMIT, ATTEST = MessageType.PREPARE, MessageType.COMMIT, MessageType.ATTEST

_AGAIN_S: Final = 0.1
_AGAIN: Final = 100
_DRIBBLE_S: Final = 0.2
_OVERSIZE_BYTES: Final = 3000
_ESCAPES: Final = "\x1b[2J\x1b]0;owned\x07"
_BAD_CBOR: Final = {
    "nested": (b"\x81" * 200 + b"\x00", "arrays in arrays, without end"),
    "huge": (b"\xbb\xff\xff\xff\xff\xff\xff\xff\xff", "a map that announces 2^64-1 entries"),
    "duplicate": (b"\xa2\x01\x00\x01\x00", "the same key twice"),
    "tag": (b"\xa1\x01\xc2\x41\x00", "a tag"),
    "float": (b"\xa1\x01\xfb" + bytes(8), "a float"),
    "trailing": (b"\xa1\x01\x00\x00", "bytes after the end"),
    "type": (b"\xa1\x01\x63abc", "text where bytes belong"),
    "long": (b"\xa1\x18\x01\x00", "a longer head than needed"),
    "endless": (b"\xbf\x01\x00\xff", "a map of indefinite length"),
}


def _for_ever(make: Callable[[Talk], bytes]) -> Callable[[Talk], Iterator[bytes]]:
    def tell(talk: Talk) -> Iterator[bytes]:
        for _ in range(_AGAIN):
            yield make(talk)
            if not talk.pause(_AGAIN_S):
                return

    return tell


def _once(make: Callable[[Talk], bytes]) -> Callable[[Talk], Iterator[bytes]]:
    def tell(talk: Talk) -> Iterator[bytes]:
        yield make(talk)

    return tell


def _fields(change: Callable[[Talk], dict[int, Any]]) -> Callable[[Talk], Iterator[bytes]]:
    return _once(lambda talk: talk.with_fields(change(talk)))


def _payload(payload: bytes) -> Callable[[Talk], Iterator[bytes]]:
    return _once(lambda talk: talk.frame(payload))


def _renumbered(**changes: int) -> Callable[[Talk], Iterator[bytes]]:
    def make(talk: Talk) -> bytes:
        answer = talk.answer
        if answer is None:
            return b""
        of = {"type": answer.type, "seq": answer.seq, "sid": answer.sid, "version": answer.version}
        of |= {name: of[name] ^ mask for name, mask in changes.items()}
        return Frame(payload=answer.payload, **of).to_bytes()

    return _once(make)


def _wrong_crc(talk: Talk) -> bytes:
    whole = talk.frame(talk.answer.payload if talk.answer else b"")
    return whole[:-2] + bytes([whole[-2] ^ 0x55 or 0xAA, 0])


def _dribbled(talk: Talk) -> Iterator[bytes]:
    for byte in talk.frame(talk.answer.payload if talk.answer else b""):
        yield bytes([byte])
        if not talk.pause(_DRIBBLE_S):
            return


def _silent(_talk: Talk) -> Iterator[bytes]:
    return iter(())


def _request(key: Any, name: str) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signed = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return signed.public_bytes(Encoding.DER)


def _broken_request(talk: Talk) -> dict[int, Any]:
    der = bytearray(talk.fields[1])
    der[-1] ^= 1
    return {1: bytes(der)}


def _rsa_request(talk: Talk) -> dict[int, Any]:
    # A short key, so that the request fits its field: it is refused for what it is, not for its length.
    return {1: _request(rsa.generate_private_key(65537, 1024), talk.hwid.hex())}  # noqa: S505 - a lie


def _signed(talk: Talk, key: keys.PrivateKey, nonce: bytes) -> dict[int, Any]:
    """Return a proof as the honest one, but by this key over this nonce."""
    slot = talk.slots.prepared() if talk.request.type == PREPARE else talk.slots.active()
    if slot is None:
        return {}
    label = Label.PREPARE if talk.request.type == PREPARE else Label.ATTEST
    parts = (nonce, talk.hwid, slot.txn, slot.leaf_sha256, slot.bundle_sha256)
    return {1: sign(key, transcript(label, *parts))}


def _other_key(talk: Talk) -> dict[int, Any]:
    return _signed(talk, keys.make_key(), talk.asked[2 if talk.request.type == PREPARE else 1])


def _old_nonce(talk: Talk) -> dict[int, Any]:
    slot = talk.slots.prepared() if talk.request.type == PREPARE else talk.slots.active()
    return {} if slot is None else _signed(talk, keys.key_from_der(slot.key_der), bytes(16))


_JUNK: Final = b"\x30" + bytes(40)
_LIES: dict[str, Lie] = {
    "busy": Lie("says BUSY and nothing else", HELLO, _for_ever(lambda t: t.frame(b"", kind=0xFD)), is_deaf=True),
    "nak": Lie(
        "says NAK and nothing else",
        HELLO,
        _for_ever(lambda _: Frame(MessageType.NAK, 0, 0, b"").to_bytes()),
        is_deaf=True,
    ),
    "silent": Lie("says nothing", HELLO, _silent, is_deaf=True),
    "wrong-sid": Lie("answers another session", HELLO, _renumbered(sid=1)),
    "wrong-seq": Lie("answers another request", HELLO, _renumbered(seq=0x4000)),
    "wrong-version": Lie("speaks another version", HELLO, _renumbered(version=2)),
    "wrong-crc": Lie("sends frames with a wrong checksum", HELLO, _once(_wrong_crc)),
    "oversize": Lie("sends a frame without an end", HELLO, _once(lambda _: b"\0" + b"\x01" * _OVERSIZE_BYTES)),
    "dribble": Lie("answers a byte every 200 ms", HELLO, _dribbled),
    "refuse": Lie(
        "says STATE for ever",
        PREPARE,
        _once(lambda t: t.frame(cbor.encode({0: int(ErrorCode.STATE), 1: t.request.type}), kind=0xFF)),
        is_deaf=True,
    ),
    "hello-nonce": Lie("answers another nonce", HELLO, _fields(lambda _: {10: bytes(16)})),
    "hello-state": Lie("is locked by nothing", HELLO, _fields(lambda _: {4: int(DeviceState.LOCKED)})),
    "hello-lock": Lie(
        "is locked by a transaction that nobody knows",
        HELLO,
        _fields(lambda _: {4: int(DeviceState.LOCKED), 5: b"?" * 16, 6: b"?" * 32}),
    ),
    "hello-escape": Lie("has a terminal's escapes in its name", HELLO, _fields(lambda _: {2: _ESCAPES})),
    "hello-hwid": Lie("has a hardware id of 200 bytes", HELLO, _fields(lambda _: {1: b"x" * 200})),
    "csr-rsa": Lie("asks for an RSA key", KEYGEN, _fields(_rsa_request)),
    "csr-p384": Lie(
        "asks for a key on P-384",
        KEYGEN,
        _fields(lambda t: {1: _request(ec.generate_private_key(ec.SECP384R1()), t.hwid.hex())}),
    ),
    "csr-signature": Lie("does not sign its request", KEYGEN, _fields(_broken_request)),
    "csr-name": Lie(
        "asks for another name", KEYGEN, _fields(lambda _: {1: _request(keys.make_key(), "operator")})
    ),
    "csr-oversize": Lie("sends a request of 600 bytes", KEYGEN, _fields(lambda _: {1: b"\x30" * 600})),
    "csr-garbage": Lie("sends garbage for a request", KEYGEN, _fields(lambda _: {1: _JUNK})),
    "offset-past": Lie("wants an offset past the end", DATA, _fields(lambda _: {1: 100_000})),
    "offset-back": Lie("wants the beginning again and again", DATA, _fields(lambda _: {1: 0, 2: 0})),
    "prove-key": Lie("signs with another key", PREPARE, _fields(_other_key)),
    "prove-nonce": Lie("signs another nonce", PREPARE, _fields(_old_nonce)),
    "prove-leaf": Lie("has another certificate", PREPARE, _fields(lambda _: {2: bytes(32)})),
    "prove-bundle": Lie(
        "has another bundle", PREPARE, _fields(lambda t: {3 if t.request.type == PREPARE else 4: bytes(32)})
    ),
    "prove-txn": Lie("attests another transaction", ATTEST, _fields(lambda _: {3: bytes(16)})),
    "prove-junk": Lie("sends junk for a signature", PREPARE, _fields(lambda _: {1: _JUNK})),
    "commit-nothing": Lie(
        "says that it committed, and did not", COMMIT, _payload(cbor.encode({1: 2})), is_deaf=True
    ),
}
LIES: Final = _LIES | {
    f"cbor-{name}": Lie(f"answers with {meaning}", HELLO, _payload(payload), is_deaf=True)
    for name, (payload, meaning) in _BAD_CBOR.items()
}
