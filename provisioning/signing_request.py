"""What the station accepts as a device's certification request (docs/serial-protocol.md sections 3 and 8).

A request (PKCS#10, RFC 2986) gives the station a public key and nothing else. It is taken if the key is on
P-256, the request is signed by that key with ECDSA and SHA-256, and its subject is exactly one CN: the hwid in
lower-case hex at enrollment, the device id at a renewal (docs/renewal.md). It comes from an untrusted device:
whatever the parser says of it is a refusal.
"""

from __future__ import annotations

from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID, SignatureAlgorithmOID

from birthmark.device.errors import EnrollmentRefusedError
from birthmark.device.escape import escaped

MAX_REQUEST_BYTES: Final = 512


class RequestRefusedError(EnrollmentRefusedError):
    """A certification request that nothing is signed for."""

    def __init__(self, cause: str) -> None:
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
    key = request.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise RequestRefusedError("its key is not on P-256")
    if request.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA256:
        raise RequestRefusedError("it is not signed with ECDSA and SHA-256")
    if not request.is_signature_valid:
        raise RequestRefusedError("its self-signature does not verify")
    names = [(attribute.oid, attribute.value) for rdn in request.subject.rdns for attribute in rdn]
    if names != [(NameOID.COMMON_NAME, common_name)]:
        raise RequestRefusedError(f"its subject is not exactly CN = {common_name}")
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
