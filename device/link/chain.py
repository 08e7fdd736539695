"""Whether a bundle's certificates fit each other and the device's key (docs/serial-protocol.md section 5).

These are the link's own rules, checked in this order; the certificate profile of the CA asks for more.

1. All certificates parse.
2. The leaf's key is the pending key.
3. The leaf's only CN is the configured device id, and its validity contains the issuance time.
4. The leaf is no CA; all issuing certificates and anchors are.
5. Each of leaf, issuing[0], issuing[1] ... is directly issued by the next.
6. If there is no issuing certificate, and anchors carry the leaf's issuer's name, one of them issued it. If none
   carries it, the issuer is not checked: brokers may trust another root.
"""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from birthmark.device.link.bundle import BundleRefusedError
from birthmark.device.link.vocabulary import ErrorCode

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

    from birthmark.device.link.bundle import Bundle


def check_certificates(bundle: Bundle, public_key: PublicKeyTypes) -> None:
    """Check a bundle's certificates for the device key `public_key`; raises `BundleRefusedError`."""
    try:
        _check(bundle, public_key)
    except BundleRefusedError:
        raise
    except Exception as error:  # noqa: BLE001
        # The parser raises many kinds of error on hostile DER, some of them lazily; each one is a refusal.
        raise _refused(f"a certificate does not parse ({type(error).__name__})") from None


def is_ca(certificate: x509.Certificate) -> bool:
    """Whether a certificate says that it is a CA's; raises what the parser raises."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _check(bundle: Bundle, public_key: PublicKeyTypes) -> None:
    leaf, issuing, anchors = _parse_all(bundle)
    if _spki(leaf.public_key()) != _spki(public_key):
        raise BundleRefusedError(ErrorCode.KEY, "the certificate is for another key")
    names = [attribute.value for attribute in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [bundle.config.device_id.text]:
        raise _refused("the certificate's one CN is not the configured device id")
    issued_at = datetime.fromtimestamp(bundle.issued_at, UTC)
    if not leaf.not_valid_before_utc <= issued_at <= leaf.not_valid_after_utc:
        raise _refused("it was issued outside the certificate's validity")
    if is_ca(leaf):
        raise _refused("the device's certificate is a CA's")
    if not all(is_ca(certificate) for certificate in (*issuing, *anchors)):
        raise _refused("an issuing certificate or an anchor is not a CA's")
    if not all(_issued(certificate, issuer) for certificate, issuer in pairwise((leaf, *issuing))):
        raise _refused("a certificate is not issued by the one after it")
    namesakes = [anchor for anchor in anchors if anchor.subject == leaf.issuer]
    if not issuing and namesakes and not any(_issued(leaf, anchor) for anchor in namesakes):
        raise _refused("no anchor of its issuer's name issued the certificate")


def _parse_all(
    bundle: Bundle,
) -> tuple[x509.Certificate, tuple[x509.Certificate, ...], tuple[x509.Certificate, ...]]:
    leaf, *others = (
        x509.load_der_x509_certificate(der) for der in (bundle.leaf_der, *bundle.issuing_der, *bundle.anchors_der)
    )
    count = len(bundle.issuing_der)
    return leaf, tuple(others[:count]), tuple(others[count:])


def _spki(public_key: PublicKeyTypes) -> bytes:
    return public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except Exception:  # noqa: BLE001 - other names, a bad signature, an odd key: it did not issue this one
        return False
    return True


def _refused(reason: str) -> BundleRefusedError:
    return BundleRefusedError(ErrorCode.BUNDLE, reason)
