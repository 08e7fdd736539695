"""A certificate revocation list as a value: read, verified, and nothing believed that is not understood.

Pure, and safe to run off the event loop. Rules (RFC 5280 §5; docs/certificate-profile.md):

- A file holds one CRL in DER, or one or several in PEM.
- Signed with ecdsa-with-SHA256 by a trusted issuing CA itself, found by its key identifier (AKI) and its name.
- cRLNumber, authorityKeyIdentifier and nextUpdate are there; thisUpdate is not in the future.
- Only a complete CRL says who is *not* revoked: delta CRLs, indirect ones, and those limited to some reasons or
  to CA certificates are refused (§5.2.4, §5.2.5), and so is any unknown critical extension (§5.2, §5.3).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import SignatureAlgorithmOID

from birthmark.broker.trust import MALFORMED, Issuer, Trust, quoted_name
from birthmark.device.errors import CredentialError
from birthmark.device.pem import CRL as CRL_LABEL
from birthmark.device.pem import read_blocks

if TYPE_CHECKING:
    from datetime import datetime

MAX_CRLS = 16
"""In one file: as many as issuing CAs are trusted at most."""

_SIGNATURE = ec.ECDSA(SHA256())
_KNOWN = frozenset({x509.CRLNumber.oid, x509.AuthorityKeyIdentifier.oid, x509.IssuingDistributionPoint.oid})
_DER_TRUE = b"\x01\x01\xff"
_FOREIGN = "only the CA in the gateway's clients-ca.pem can sign its CRLs"
_RENEW = "sign a new one with `birthmark crl` at the station"


class CrlRefusedError(CredentialError):
    """A CRL is not installed.

    Args:
        reason: a short code, stable, for receipts and tests: `unreadable`, `malformed`, `issuer`, `signature`,
            `incomplete`, `extension`, `not-yet-valid`, `older`, `conflict`, `storage`.
        message: what is wrong with it.
        hint: what to do about it.
        issuer: the trusted issuing CA it is about, if that much is known.
    """

    def __init__(self, reason: str, message: str, hint: str = "", *, issuer: str = "") -> None:
        super().__init__(f"could not install a CRL: {message}", hint)
        self.reason = reason
        self.issuer = issuer


@dataclass(frozen=True, slots=True)
class Crl:
    """A complete CRL, verified."""

    issuer: str
    """The issuing CA's subject key identifier, lower-case hex."""
    number: int
    this_update: datetime
    next_update: datetime
    serials: frozenset[int] = field(repr=False)
    """The numbers of the revoked certificates."""
    sha256: str
    """Of the DER, lower-case hex."""
    der: bytes = field(repr=False)


def split_crls(content: bytes) -> list[bytes]:
    """Return each CRL of a file in DER: one DER CRL, or every `X509 CRL` block of a PEM text.

    Raises:
        CrlRefusedError: there is none, or too many, or the PEM is broken.
    """
    if not content.strip():
        raise CrlRefusedError("unreadable", "it is empty", _RENEW)
    if content[0] == 0x30:
        return [content]
    try:
        blocks = [der for label, der in read_blocks(content) if label == CRL_LABEL]
    except CredentialError as error:
        raise CrlRefusedError("unreadable", f"its PEM is broken ({error.message})", _RENEW) from error
    if not blocks:
        raise CrlRefusedError("unreadable", "it holds neither a DER CRL nor a PEM block `X509 CRL`", _RENEW)
    if len(blocks) > MAX_CRLS:
        raise CrlRefusedError("unreadable", f"it holds more than {MAX_CRLS} CRLs", _RENEW)
    return blocks


def read_crl(crl_der: bytes, trust: Trust, now: datetime | None) -> Crl:
    """Read and verify one CRL. 200,000 entries take about half a second: not for an event loop.

    Args:
        crl_der: the CRL.
        trust: the trusted issuing CAs.
        now: the gateway's clock, aware; None for a CRL that was in force before, whatever the clock says.

    Raises:
        CrlRefusedError: anything about it is not as the rules say. Nothing else is raised, whatever the bytes.
    """
    try:
        found = x509.load_der_x509_crl(crl_der)
        extensions = {extension.oid: extension for extension in found.extensions}
        issuer = _issuer(found, extensions, trust)
    except MALFORMED as error:
        raise CrlRefusedError("malformed", "it is no CRL, or a damaged one", _RENEW) from error
    try:
        _check_signature(found, issuer, crl_der)
        _check_complete(extensions, issuer)
        return _crl(found, extensions, issuer, crl_der, now)
    except MALFORMED as error:
        raise CrlRefusedError("malformed", "it is damaged", _RENEW, issuer=issuer.key_id) from error


_Extensions = dict[x509.ObjectIdentifier, x509.Extension[x509.ExtensionType]]


def _issuer(found: x509.CertificateRevocationList, extensions: _Extensions, trust: Trust) -> Issuer:
    authority = extensions.get(x509.AuthorityKeyIdentifier.oid)
    value = authority.value if authority else None
    key_id = value.key_identifier if isinstance(value, x509.AuthorityKeyIdentifier) else None
    if key_id is None:
        raise CrlRefusedError("issuer", "it does not say by which key it was signed (AKI)", _RENEW)
    issuer = trust.get(key_id)
    if issuer is None or found.issuer.public_bytes() != issuer.subject_der:
        shown = quoted_name(found.issuer)
        raise CrlRefusedError("issuer", f"it comes from {shown}, which is no trusted issuing CA", _FOREIGN)
    return issuer


def _check_signature(found: x509.CertificateRevocationList, issuer: Issuer, crl_der: bytes) -> None:
    if found.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA256:
        message = "it is not signed with ecdsa-with-SHA256"
        raise CrlRefusedError("signature", message, _FOREIGN, issuer=issuer.key_id)
    # The BIT STRING's count of unused bits is not signed, and the parser lets a wrong one pass.
    if not crl_der.endswith(b"\0" + found.signature):
        raise CrlRefusedError("malformed", "its signature is damaged", _RENEW, issuer=issuer.key_id)
    try:
        issuer.public_key.verify(found.signature, found.tbs_certlist_bytes, _SIGNATURE)
    except InvalidSignature as error:
        message = f"it is not signed by '{issuer.name}', which it names"
        raise CrlRefusedError("signature", message, _FOREIGN, issuer=issuer.key_id) from error


def _check_complete(extensions: _Extensions, issuer: Issuer) -> None:
    if x509.DeltaCRLIndicator.oid in extensions:
        raise CrlRefusedError("incomplete", "it is a delta CRL", _RENEW, issuer=issuer.key_id)
    for oid, extension in extensions.items():
        if extension.critical and oid not in _KNOWN:
            message = f"it has an unknown critical extension, {oid.dotted_string}"
            raise CrlRefusedError("extension", message, _RENEW, issuer=issuer.key_id)
    point = extensions.get(x509.IssuingDistributionPoint.oid)
    if point is None:
        return
    scope = point.value
    if not isinstance(scope, x509.IssuingDistributionPoint) or (
        scope.indirect_crl
        or scope.only_some_reasons
        or scope.only_contains_ca_certs
        or scope.only_contains_attribute_certs
    ):
        message = "its scope is limited (issuingDistributionPoint), so it does not say who is not revoked"
        raise CrlRefusedError("incomplete", message, _RENEW, issuer=issuer.key_id)


def _crl(
    found: x509.CertificateRevocationList,
    extensions: _Extensions,
    issuer: Issuer,
    crl_der: bytes,
    now: datetime | None,
) -> Crl:
    numbered = extensions.get(x509.CRLNumber.oid)
    if numbered is None or not isinstance(numbered.value, x509.CRLNumber) or numbered.value.crl_number < 0:
        raise CrlRefusedError("malformed", "it has no number (cRLNumber)", _RENEW, issuer=issuer.key_id)
    this_update, next_update = found.last_update_utc, found.next_update_utc
    if next_update is None or next_update < this_update:
        message = "it does not say when the next one is due (nextUpdate)"
        raise CrlRefusedError("malformed", message, _RENEW, issuer=issuer.key_id)
    if now is not None and this_update > now:
        message = f"CLOCK: it is valid from {_at(this_update)}; here it is {_at(now)}"
        hint = "compare the clocks of this gateway and of the station"
        raise CrlRefusedError("not-yet-valid", message, hint, issuer=issuer.key_id)
    # Looking at the extensions of each of 200,000 entries takes twice as long as all the rest, so that is left out
    # where no extension anywhere is marked critical.
    if _DER_TRUE in found.tbs_certlist_bytes:
        for entry in found:
            for extension in entry.extensions:
                if extension.critical:
                    message = f"an entry has a critical extension, {extension.oid.dotted_string}"
                    raise CrlRefusedError("extension", message, _RENEW, issuer=issuer.key_id)
    return Crl(
        issuer=issuer.key_id,
        number=numbered.value.crl_number,
        this_update=this_update,
        next_update=next_update,
        serials=frozenset(entry.serial_number for entry in found),
        sha256=hashlib.sha256(crl_der).hexdigest(),
        der=crl_der,
    )


def _at(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
