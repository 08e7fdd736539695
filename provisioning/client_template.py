"""What a client certificate's signature covers, octet by octet (RFC 5280 section 4.1; DER: X.690 section 10).

A station signs certificates by the ten thousand, and cryptography's builder spends more time on the objects that
it is given than the signature itself takes. Therefore:

- What all certificates of one issuer, organization and role share is encoded by cryptography, once. Only what is a
  certificate's own is written here: serial number, dates, CN (twice), key and key identifier.
- The tests compare every octet with what cryptography's builder makes of the same.

Pure, and without any secret key.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha1
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

_INTEGER, _BIT_STRING, _OCTET_STRING, _UTF8, _SEQUENCE, _SET = 0x02, 0x03, 0x04, 0x0C, 0x30, 0x31
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18
_EXTENSIONS, _DIRECTORY_NAME = 0xA3, 0xA4
_FIRST_GENERALIZED_YEAR: Final = 2050
"""From here on a date is a GeneralizedTime (RFC 5280 section 4.1.2.5)."""
_VERSION_3: Final = bytes.fromhex("a003020102")
_ECDSA_WITH_SHA256: Final = bytes.fromhex("300a06082a8648ce3d040302")
_P256_KEY: Final = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200")
"""A SubjectPublicKeyInfo up to the 65 octets of its point."""
_COMMON_NAME: Final = bytes.fromhex("0603550403")
_SUBJECT_ALT_NAME: Final = bytes.fromhex("0603551d11")
_SUBJECT_KEY_ID: Final = bytes.fromhex("0603551d0e")
_CERTIFICATE_EXTENSION_ARC: Final = bytes.fromhex("0603551d")
_TRUE: Final = bytes.fromhex("0101ff")


class ClientTemplate:
    """What the client certificates of one issuer, organization and role share.

    Args:
        issuer: the CA's certificate.
        organization: the subject's O.
        role: its OU.
        same_for_all: extensions that are the same in every certificate, which go first; whether each is critical.
    """

    __slots__ = ("_after_serial", "_first_extensions", "_last_extension", "_organization_and_role")

    def __init__(
        self,
        issuer: x509.Certificate,
        *,
        organization: str,
        role: str,
        same_for_all: Sequence[tuple[x509.ExtensionType, bool]],
    ) -> None:
        self._after_serial = _ECDSA_WITH_SHA256 + issuer.subject.public_bytes()
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            ]
        )
        self._organization_and_role = _content(subject.public_bytes())
        self._first_extensions = b"".join(_extension(value, critical=critical) for value, critical in same_for_all)
        key_id = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
        self._last_extension = _extension(x509.AuthorityKeyIdentifier(key_id, None, None), critical=False)

    def to_be_signed(
        self,
        common_name: str,
        public_key: EllipticCurvePublicKey,
        *,
        cert_serial: int,
        not_before: datetime,
        not_after: datetime,
    ) -> bytes:
        """Return the TBSCertificate of one client.

        Args:
            common_name: a device id's text: 1 to 63 ASCII characters.
            public_key: of P-256.
            cert_serial: positive.
            not_before: in UTC, in whole seconds.
            not_after: the same.
        """
        point = public_key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        own_name = _tlv(_SET, _tlv(_SEQUENCE, _COMMON_NAME + _tlv(_UTF8, common_name.encode("ascii"))))
        # A client certificate needs no SAN to name its holder, but pyca's verifier wants one, and linters refuse
        # URNs of our own: the CN again, as a directory name, satisfies both.
        also_known_as = _tlv(_SEQUENCE, _tlv(_DIRECTORY_NAME, _tlv(_SEQUENCE, own_name)))
        # RFC 5280 section 4.2.1.2, method (1): SHA-1 of the point. It names the key, and protects nothing.
        key_id = _tlv(_OCTET_STRING, sha1(point, usedforsecurity=False).digest())
        extensions = (
            self._first_extensions
            + _tlv(_SEQUENCE, _SUBJECT_ALT_NAME + _tlv(_OCTET_STRING, also_known_as))
            + _tlv(_SEQUENCE, _SUBJECT_KEY_ID + _tlv(_OCTET_STRING, key_id))
            + self._last_extension
        )
        return _tlv(
            _SEQUENCE,
            _VERSION_3
            + _tlv(_INTEGER, cert_serial.to_bytes(cert_serial.bit_length() // 8 + 1, "big"))
            + self._after_serial
            + _validity(not_before, not_after)
            + _tlv(_SEQUENCE, self._organization_and_role + own_name)
            + _P256_KEY
            + point
            + _tlv(_EXTENSIONS, _tlv(_SEQUENCE, extensions)),
        )


def signed(to_be_signed: bytes, signature: bytes) -> bytes:
    """Put a TBSCertificate and its ECDSA signature with SHA-256 (DER) together; return the certificate (DER)."""
    return _tlv(_SEQUENCE, to_be_signed + _ECDSA_WITH_SHA256 + _tlv(_BIT_STRING, b"\0" + signature))


def _tlv(tag: int, value: bytes) -> bytes:
    length = len(value)
    if length < 0x80:
        return bytes((tag, length)) + value
    octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(octets))) + octets + value


@lru_cache(maxsize=16)
def _validity(not_before: datetime, not_after: datetime) -> bytes:
    # The same for all that are signed in one second.
    return _tlv(_SEQUENCE, _time(not_before) + _time(not_after))


def _time(moment: datetime) -> bytes:
    if moment.year < _FIRST_GENERALIZED_YEAR:
        return _tlv(_UTC_TIME, f"{moment:%y%m%d%H%M%SZ}".encode())
    return _tlv(_GENERALIZED_TIME, f"{moment:%Y%m%d%H%M%SZ}".encode())


def _content(der: bytes) -> bytes:
    """Return what is in a DER value, without its tag and length."""
    return der[2 if der[1] < 0x80 else 2 + (der[1] & 0x7F) :]


def _extension(value: x509.ExtensionType, *, critical: bool) -> bytes:
    arc = int(value.oid.dotted_string.removeprefix("2.5.29."))
    oid = _CERTIFICATE_EXTENSION_ARC + bytes((arc,))
    return _tlv(_SEQUENCE, oid + (_TRUE if critical else b"") + _tlv(_OCTET_STRING, value.public_bytes()))
