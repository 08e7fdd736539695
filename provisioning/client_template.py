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
from cryptography.x509.oid import NameOID

from birthmark.provisioning.der import (
    INTEGER,
    OCTET_STRING,
    SEQUENCE,
    SET,
    UTF8_STRING,
    content,
    head,
    integer_octets,
    time,
    tlv,
)
from birthmark.provisioning.p256 import KEY_HEAD, POINT_OCTETS
from birthmark.provisioning.signed_der import ECDSA_WITH_SHA256, extension

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime
    from typing import TypeAlias

    _Part: TypeAlias = bytes | int
    """Octets that are known, or how many are filled in."""

_EXTENSIONS, _DIRECTORY_NAME = 0xA3, 0xA4
_VERSION_3: Final = bytes.fromhex("a003020102")
_KEY_ID_OCTETS: Final = 20
_COMMON_NAME: Final = bytes.fromhex("0603550403")
_SUBJECT_ALT_NAME: Final = bytes.fromhex("0603551d11")
_SUBJECT_KEY_ID: Final = bytes.fromhex("0603551d0e")


class ClientTemplate:
    """What the client certificates of one issuer, organization and role share.

    Args:
        issuer: the CA's certificate.
        organization: the subject's O.
        role: its OU.
        same_for_all: extensions that are the same in every certificate, which go first; whether each is critical.
    """

    __slots__ = ("_after_serial", "_first_extensions", "_frames", "_last_extension", "_organization_and_role")

    def __init__(
        self,
        issuer: x509.Certificate,
        *,
        organization: str,
        role: str,
        same_for_all: Sequence[tuple[x509.ExtensionType, bool]],
    ) -> None:
        self._after_serial = ECDSA_WITH_SHA256 + issuer.subject.public_bytes()
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            ]
        )
        self._organization_and_role = content(subject.public_bytes())
        self._first_extensions = b"".join(extension(value, critical=critical) for value, critical in same_for_all)
        key_id = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
        self._frames: dict[tuple[int, ...], tuple[bytes, ...]] = {}
        """What is constant, by the lengths of what is not (serial number, validity, name), so there are few."""
        self._last_extension = extension(x509.AuthorityKeyIdentifier(key_id, None, None), critical=False)

    def to_be_signed(
        self,
        common_name: str,
        point: bytes,
        *,
        cert_serial: int,
        validity: bytes,
    ) -> bytes:
        """Return the TBSCertificate of one client.

        Args:
            common_name: a device id's text: 1 to 63 ASCII characters.
            point: the public key's, uncompressed (`p256`).
            cert_serial: positive.
            validity: as `validity_der` makes it.
        """
        name = common_name.encode("ascii")
        serial = integer_octets(cert_serial)
        # RFC 5280 section 4.2.1.2, method (1): SHA-1 of the point. It names the key, and protects nothing.
        key_id = sha1(point, usedforsecurity=False).digest()
        a, b, c, d, e, f, g = self._around(len(serial), len(validity), len(name))
        return b"".join((a, serial, b, validity, c, name, d, point, e, name, f, key_id, g))

    def _around(self, *lengths: int) -> tuple[bytes, ...]:
        """Return what stands before, between and after a certificate's own octets of these lengths."""
        known = self._frames.get(lengths)
        if known is None:
            known = self._frames[lengths] = _constant(self._parts(*lengths))
        return known

    def _parts(self, serial: int, validity: int, name: int) -> tuple[_Part, ...]:
        own_name = _around(SET, *_around(SEQUENCE, _COMMON_NAME, *_around(UTF8_STRING, name)))
        # A client certificate needs no SAN to name its holder, but pyca's verifier wants one, and linters refuse
        # URNs of our own: the CN again, as a directory name, satisfies both.
        also_known_as = _around(SEQUENCE, *_around(_DIRECTORY_NAME, *_around(SEQUENCE, *own_name)))
        key_id = _around(OCTET_STRING, _KEY_ID_OCTETS)
        extensions = (
            self._first_extensions,
            *_around(SEQUENCE, _SUBJECT_ALT_NAME, *_around(OCTET_STRING, *also_known_as)),
            *_around(SEQUENCE, _SUBJECT_KEY_ID, *_around(OCTET_STRING, *key_id)),
            self._last_extension,
        )
        return _around(
            SEQUENCE,
            _VERSION_3,
            *_around(INTEGER, serial),
            self._after_serial,
            validity,
            *_around(SEQUENCE, self._organization_and_role, *own_name),
            KEY_HEAD,
            POINT_OCTETS,
            *_around(_EXTENSIONS, *_around(SEQUENCE, *extensions)),
        )


def _around(tag: int, *parts: _Part) -> tuple[_Part, ...]:
    """Return the parts of a DER value with this tag around those."""
    return head(tag, sum(part if isinstance(part, int) else len(part) for part in parts)), *parts


def _constant(parts: Iterable[_Part]) -> tuple[bytes, ...]:
    """Return the octets before, between and after the parts that are filled in."""
    found = [b""]
    for part in parts:
        if isinstance(part, int):
            found.append(b"")
        else:
            found[-1] += part
    return tuple(found)


@lru_cache(maxsize=16)
def validity_der(not_before: datetime, not_after: datetime) -> bytes:
    """Return a Validity from two times in UTC, in whole seconds; the same for all that are signed at once."""
    return tlv(SEQUENCE, time(not_before) + time(not_after))
