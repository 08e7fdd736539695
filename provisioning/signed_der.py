"""What certificates and CRLs have in common, octet by octet: extensions, a signature (RFC 5280)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from birthmark.provisioning.der import BIT_STRING, OCTET_STRING, SEQUENCE, tlv

if TYPE_CHECKING:
    from cryptography import x509

ECDSA_WITH_SHA256: Final = bytes.fromhex("300a06082a8648ce3d040302")
_EXTENSION_ARC: Final = bytes.fromhex("0603551d")
_TRUE: Final = bytes.fromhex("0101ff")


def signed(to_be_signed: bytes, signature: bytes) -> bytes:
    """Put what was signed and its ECDSA signature with SHA-256 together; return the certificate or CRL (DER)."""
    return tlv(SEQUENCE, to_be_signed + ECDSA_WITH_SHA256 + tlv(BIT_STRING, b"\0" + signature))


def extension(value: x509.ExtensionType, *, critical: bool) -> bytes:
    """Return an extension of a certificate, a CRL or a CRL's entry: one of those that RFC 5280 names, id-ce."""
    arc = int(value.oid.dotted_string.removeprefix("2.5.29."))
    oid = _EXTENSION_ARC + bytes((arc,))
    return tlv(SEQUENCE, oid + (_TRUE if critical else b"") + tlv(OCTET_STRING, value.public_bytes()))
