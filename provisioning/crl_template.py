"""What a CRL's signature covers, octet by octet (RFC 5280 section 5.1; DER: X.690 section 10).

A CRL is signed anew at every revocation, with everything that it lists, and cryptography's builder makes an object
of each entry: at ten thousand, that takes longer than all the rest. Therefore the entries are written here;
extensions and names are encoded by cryptography, and the tests compare every octet with what its builder makes.

Pure, and without any secret key.
"""

from __future__ import annotations

from datetime import UTC
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from cryptography import x509

from birthmark.provisioning.der import INTEGER, SEQUENCE, integer_octets, time, tlv
from birthmark.provisioning.registry.model import REVOKED_AT_HAND
from birthmark.provisioning.signed_der import ECDSA_WITH_SHA256, extension

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

_VERSION_2: Final = bytes.fromhex("020101")
_EXTENSIONS: Final = 0xA0


def crl_to_be_signed(
    issuer: x509.Certificate,
    *,
    number: int,
    this_update: datetime,
    next_update: datetime,
    entries: Iterable[tuple[int, datetime, x509.ReasonFlags]],
) -> bytes:
    """Return the TBSCertList of a complete CRL.

    Args:
        issuer: the CA's certificate.
        number: the CRL's.
        this_update: in UTC, in whole seconds.
        next_update: the same.
        entries: serial number, time of the revocation (aware) and reason of each certificate.
    """
    key_id = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    listed = b"".join([entry(*each) for each in entries])
    extensions = extension(x509.AuthorityKeyIdentifier(key_id, None, None), critical=False) + extension(
        x509.CRLNumber(number), critical=False
    )
    return tlv(
        SEQUENCE,
        _VERSION_2
        + ECDSA_WITH_SHA256
        + issuer.subject.public_bytes()
        + time(this_update)
        + time(next_update)
        + (tlv(SEQUENCE, listed) if listed else b"")  # an empty list is left out, as it must be
        + tlv(_EXTENSIONS, tlv(SEQUENCE, extensions)),
    )


@lru_cache(REVOKED_AT_HAND)
def entry(cert_serial: int, revoked_at: datetime, reason: x509.ReasonFlags) -> bytes:
    """Return a certificate's entry of a CRL; the arguments are as in `crl_to_be_signed`.

    It is kept for the next time: entries are made ahead, and the next CRL has them again.
    """
    # Not by `tlv`: a serial number has 20 octets at most (RFC 5280 section 5.1.2.6), so every length is one octet.
    serial = integer_octets(cert_serial)
    at = revoked_at if revoked_at.tzinfo is UTC else revoked_at.astimezone(UTC)
    value = b"%c%c%b%b%b" % (INTEGER, len(serial), serial, time(at), _reason(reason))
    return b"%c%c%b" % (SEQUENCE, len(value), value)


@lru_cache
def _reason(reason: x509.ReasonFlags) -> bytes:
    if reason is x509.ReasonFlags.unspecified:  # RFC 5280 section 5.3.1: leave it out instead
        return b""
    return tlv(SEQUENCE, extension(x509.CRLReason(reason), critical=False))
