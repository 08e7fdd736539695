"""What the station accepts as a device's certification request (docs/serial-protocol.md sections 3 and 8).

A request (PKCS#10, RFC 2986) gives the station a public key and nothing else. It is taken if the key is on
P-256, the request is signed by that key with ECDSA and SHA-256, and its subject is exactly one CN: the hwid in
lower-case hex at enrollment, the device id at a renewal (docs/renewal.md). It comes from an untrusted device:
whatever the parser says of it is a refusal.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID, SignatureAlgorithmOID

from birthmark.device.errors import EnrollmentRefusedError
from birthmark.device.escape import escaped
from birthmark.provisioning.p256 import KEY_HEAD, POINT_OCTETS, UNCOMPRESSED

MAX_REQUEST_BYTES: Final = 512
_SIGNATURE: Final = ec.ECDSA(SHA256())
_SEQUENCE, _SET, _UTF8_STRING = 0x30, 0x31, 0x0C
_VERSION_1: Final = bytes.fromhex("020100")
_COMMON_NAME: Final = bytes.fromhex("0603550403")
_P256_KEY: Final = KEY_HEAD + UNCOMPRESSED
"""A SubjectPublicKeyInfo up to the coordinates of its point."""
_COORDINATES_OCTETS: Final = POINT_OCTETS - len(UNCOMPRESSED)


class RequestRefusedError(EnrollmentRefusedError):
    """A certification request that nothing is signed for."""

    def __init__(self, cause: str) -> None:
        self.cause = cause
        super().__init__(
            f"could not accept the device's certification request: {cause}",
            hint="nothing was signed; the firmware's enrollment agent is at fault, or the device is hostile",
        )


def requested_key(request_der: bytes, common_name: str) -> bytes:
    """Check a device's request and return its public key: SubjectPublicKeyInfo, DER, uncompressed point.

    Raises:
        RequestRefusedError: a rule of this module is broken.
    """
    if not 1 <= len(request_der) <= MAX_REQUEST_BYTES:
        raise RequestRefusedError(f"{len(request_der)} bytes are not 1 to {MAX_REQUEST_BYTES}")
    try:
        return _checked(request_der, common_name)
    except RequestRefusedError:
        raise
    except Exception as error:  # noqa: BLE001 - hostile DER: whatever the parser trips over is a refusal
        raise RequestRefusedError(f"it cannot be read ({escaped(str(error), limit=80)})") from None


def _checked(request_der: bytes, common_name: str) -> bytes:
    request = x509.load_der_x509_csr(request_der)
    to_be_signed = request.tbs_certrequest_bytes
    key = request.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise RequestRefusedError("its key is not on P-256")
    if request.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA256:
        raise RequestRefusedError("it is not signed with ECDSA and SHA-256")
    # The BIT STRING's count of unused bits is not signed, and the parser lets a wrong one pass.
    if not request_der.endswith(b"\0" + request.signature):
        raise RequestRefusedError("its signature is damaged")
    try:
        key.verify(request.signature, to_be_signed, _SIGNATURE)
    except InvalidSignature:
        raise RequestRefusedError("its self-signature does not verify") from None
    if found := _usual_key(to_be_signed, common_name):
        return found
    names = [(attribute.oid, attribute.value) for rdn in request.subject.rdns for attribute in rdn]
    if names != [(NameOID.COMMON_NAME, common_name)]:
        raise RequestRefusedError(f"its subject is not exactly CN = {common_name}")
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _usual_key(to_be_signed: bytes, common_name: str) -> bytes:
    """Return the key of a request that is encoded as nearly all are; empty for one that needs a closer look.

    That is a CertificationRequestInfo (RFC 2986 section 4.1) that begins with version 1, the CN as UTF8String, and
    an uncompressed point on P-256: the octets are compared, which takes a tenth of the time of reading them.
    """
    name = common_name.encode("ascii", "replace")
    beginning = _before_name(len(name)) + name + _P256_KEY
    header = 2 if to_be_signed[1] < 0x80 else 2 + (to_be_signed[1] & 0x7F)
    if not to_be_signed.startswith(beginning, header):
        return b""
    end = header + len(beginning) + _COORDINATES_OCTETS
    return to_be_signed[end - _COORDINATES_OCTETS - len(_P256_KEY) : end]


@lru_cache(64)
def _before_name(length: int) -> bytes:
    """Return what stands before a CN of so many octets: the version, and the heads of the subject's parts."""
    before = _COMMON_NAME + bytes((_UTF8_STRING, length))
    for tag in (_SEQUENCE, _SET, _SEQUENCE):
        before = bytes((tag, len(before) + length)) + before
    return _VERSION_1 + before
