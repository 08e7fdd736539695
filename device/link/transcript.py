"""What is signed on the link (docs/serial-protocol.md section 6), in a renewal (docs/renewal.md) and for a fleet.

ECDSA over P-256 with SHA-256, DER, over a transcript: the ASCII label and then each part, every one preceded by
its length as u16 big-endian. The label keeps a signature of one kind from passing for another kind, or for one
of TLS; the lengths keep two lists of parts from having one transcript.
"""

from __future__ import annotations

from enum import StrEnum

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from birthmark.device.errors import LocalProtocolError

_MAX_PART = 0xFFFF


class Label(StrEnum):
    """The first part of a transcript: what the signature says."""

    PREPARE = "BIRTHMARK-PREPARE-1"
    """Parts: station nonce, hwid, txn, leaf SHA-256, bundle SHA-256; signed by the pending key."""
    ATTEST = "BIRTHMARK-ATTEST-1"
    """Parts: station nonce, hwid, txn, leaf SHA-256, bundle SHA-256; signed by the active key."""
    UNLOCK = "BIRTHMARK-UNLOCK-1"
    """Parts: device nonce, hwid, old txn, new txn; signed by a CA of the device."""
    RENEWAL = "BIRTHMARK-RENEWAL-1"
    """Parts: device id, nonce, leaf SHA-256, request SHA-256, anchors' SHA-256; signed by the current key."""
    CONFIRM = "BIRTHMARK-CONFIRM-1"
    """Parts: device id, nonce, new leaf SHA-256, anchors' SHA-256; signed by the new key."""
    ANCHORS = "BIRTHMARK-ANCHORS-1"
    """Parts: device id, nonce of the request, new anchors' SHA-256; signed by a CA of the device."""
    ANSWER = "BIRTHMARK-ANSWER-1"
    """Parts: device id, outcome, nonce, leaf SHA-256; signed by the CA that issued that leaf."""
    AUDIT = "BIRTHMARK-AUDIT-1"
    """Parts: a checkpoint of the station's audit log, as JSON (docs/audit.md); signed by an issuing CA."""
    POLICY = "BIRTHMARK-POLICY-1"
    """Parts: version and issue time, u64 big-endian each, the policy's SHA-256; signed by an issuing CA."""


def transcript(label: str, *parts: bytes) -> bytes:
    """Return the bytes to sign: label and parts, each with its length before it.

    Raises:
        LocalProtocolError: a part is longer than 65535 bytes.
    """
    pieces = (label.encode("ascii"), *parts)
    if any(len(piece) > _MAX_PART for piece in pieces):
        raise LocalProtocolError(f"could not make a transcript: a part is longer than {_MAX_PART} bytes")
    return b"".join(len(piece).to_bytes(2, "big") + piece for piece in pieces)


def sign(private_key: ec.EllipticCurvePrivateKey, signed: bytes) -> bytes:
    """Return the DER signature of `private_key` over the transcript `signed`."""
    return private_key.sign(signed, ec.ECDSA(hashes.SHA256()))


def verify(public_key: ec.EllipticCurvePublicKey, signature: bytes, signed: bytes) -> bool:
    """Whether `signature` is one of `public_key` over the transcript `signed`."""
    try:
        public_key.verify(signature, signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True
