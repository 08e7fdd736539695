"""The signatures of a renewal, made and checked (docs/renewal.md; the form: docs/serial-protocol.md section 6).

    RENEWAL   the current key over: device id, nonce, leaf SHA-256, request SHA-256, the anchors' SHA-256s in a row
    CONFIRM   the new key over: device id, nonce, new leaf SHA-256, the anchors' SHA-256s in a row
    ANCHORS   a CA of the device over: device id, nonce, the new anchors' SHA-256s in a row
    ANSWER    the CA that issued a leaf over: device id, outcome, nonce (none for `renew-now`), that leaf's SHA-256

Loads `cryptography`: a client imports this when it renews, and not before.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from birthmark.device.link.transcript import Label, transcript, verify

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    from birthmark.device.identity import DeviceId
    from birthmark.device.renewal.messages import RenewalRequest


def request_transcript(
    device_id: DeviceId, *, nonce: bytes, leaf_sha256: bytes, csr_der: bytes, anchors_sha256: Sequence[bytes]
) -> bytes:
    """Return what the current key signs to ask for a certificate of the request's key."""
    csr_sha256 = hashlib.sha256(csr_der).digest()
    return transcript(Label.RENEWAL, _id(device_id), nonce, leaf_sha256, csr_sha256, b"".join(anchors_sha256))


def confirm_transcript(
    device_id: DeviceId, *, nonce: bytes, leaf_sha256: bytes, anchors_sha256: Sequence[bytes]
) -> bytes:
    """Return what the new key signs to say that its certificate works."""
    return transcript(Label.CONFIRM, _id(device_id), nonce, leaf_sha256, b"".join(anchors_sha256))


def anchors_transcript(device_id: DeviceId, *, nonce: bytes, anchors_der: Sequence[bytes]) -> bytes:
    """Return what a CA signs to give one device, in answer to one request, new trust anchors."""
    digests = b"".join(hashlib.sha256(each).digest() for each in anchors_der)
    return transcript(Label.ANCHORS, _id(device_id), nonce, digests)


def answer_transcript(device_id: DeviceId, *, outcome: str, nonce: bytes, leaf_sha256: bytes) -> bytes:
    """Return what a CA signs to say something about one of its certificates to the device that has it."""
    return transcript(Label.ANSWER, _id(device_id), outcome.encode("ascii"), nonce, leaf_sha256)


def is_proven(request: RenewalRequest, device_id: DeviceId, public_key: EllipticCurvePublicKey) -> bool:
    """Whether `public_key` signed the request, of either kind, for `device_id`."""
    if request.kind == "renew":
        signed = request_transcript(
            device_id,
            nonce=request.nonce,
            leaf_sha256=request.leaf_sha256,
            csr_der=request.csr_der,
            anchors_sha256=request.anchors_sha256,
        )
    else:
        signed = confirm_transcript(
            device_id,
            nonce=request.nonce,
            leaf_sha256=request.leaf_sha256,
            anchors_sha256=request.anchors_sha256,
        )
    return verify(public_key, request.signature, signed)


def _id(device_id: DeviceId) -> bytes:
    return device_id.text.encode("ascii")
