"""The device's own P-256 key: made, taken, stored, and asking for a certificate (docs/serial-protocol.md 3, 4)."""

from __future__ import annotations

from typing import Final, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from birthmark.device.errors import CredentialError

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey

P256_ORDER: Final = 0xFFFFFFFF_00000000_FFFFFFFF_FFFFFFFF_BCE6FAAD_A7179E84_F3B9CAC2_FC632551
"""n of secp256r1 (SEC 2 section 2.4.2): a private scalar is in 1..n-1."""


def make_key() -> PrivateKey:
    """Make a key with the generator of the cryptography library, which the kernel seeds."""
    return ec.generate_private_key(ec.SECP256R1())


def key_of_scalar(scalar: bytes) -> PrivateKey | None:
    """The key with this private scalar, big-endian; None if it is out of range."""
    number = int.from_bytes(scalar, "big")
    return ec.derive_private_key(number, ec.SECP256R1()) if 1 <= number < P256_ORDER else None


def scalar_of_key(key: PrivateKey) -> bytes:
    """The private scalar of a key, 32 bytes, big-endian."""
    return key.private_numbers().private_value.to_bytes(32, "big")


def key_to_der(key: PrivateKey) -> bytes:
    """The key as PKCS#8 DER, unencrypted."""
    return key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def key_from_der(der: bytes) -> PrivateKey:
    """Read PKCS#8 DER.

    Raises:
        CredentialError: it is no P-256 key. The message does not quote it.
    """
    try:
        key = serialization.load_der_private_key(der, None)
    except (ValueError, TypeError):
        raise CredentialError("could not read a stored key: it is no PKCS#8 key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CredentialError("could not use a stored key: it is not on P-256")
    return key


def signing_request(key: PrivateKey, common_name: str) -> bytes:
    """A PKCS#10 request, DER: one CN, no extensions, signed by the key itself."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)
