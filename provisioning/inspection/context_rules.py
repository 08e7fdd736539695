"""What only an issuer or a station can say of a certificate or a CRL: is it theirs, recorded, revoked?

Pure: issuers, registry rows and CRLs are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from birthmark.provisioning.inspection.certificate_rules import NEW_ONE, claim_of, extension_of, is_signed_by
from birthmark.provisioning.inspection.model import UNREADABLE, Claim, Finding, error, shown, warning

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from birthmark.provisioning.cas import Cas
    from birthmark.provisioning.registry.interface import View

_WHOSE: Final = "ask where it comes from; trust nothing that it says"
_UNRECORDED: Final = (
    "nothing is signed here that is not recorded: the CA's key was used elsewhere, or a backup is old"
)


@dataclass(frozen=True, slots=True)
class Issuers:
    """The CAs to hold a signature against.

    Args:
        certificates: their certificates.
        whose: how they are called in a finding.
    """

    certificates: Sequence[x509.Certificate]
    whose: str

    def findings(self, what: x509.Certificate | x509.CertificateRevocationList) -> Iterator[Finding]:
        """Say whether one of them signed it."""
        issuer = self._issuer_of(what)
        if issuer is None:
            yield error("issuer", f"it was issued by none of {self.whose}", "it is somebody else's", _WHOSE)
        elif not is_signed_by(what, issuer):
            why = "it was changed after it was signed, or signed by another key under the CA's name"
            yield error("signature", "its signature is not its issuer's", why, _WHOSE)
        else:
            yield from _allowed(what, issuer)

    def _issuer_of(self, what: x509.Certificate | x509.CertificateRevocationList) -> x509.Certificate | None:
        try:
            wanted = what.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        except (x509.ExtensionNotFound, *UNREADABLE):
            wanted = None
        for one in self.certificates:
            own = extension_of(one, x509.SubjectKeyIdentifier)
            if one.subject == what.issuer and (wanted is None or own is None or own.value.digest == wanted):
                return one
        return None


def _allowed(
    what: x509.Certificate | x509.CertificateRevocationList, issuer: x509.Certificate
) -> Iterator[Finding]:
    """Say whether its issuer may sign such a thing (RFC 5280 section 4.2.1.9)."""
    constraints = extension_of(issuer, x509.BasicConstraints)
    if constraints is None or not constraints.value.ca:
        yield error("issuer", "what signed it is no CA", "any end entity could make identities so", _WHOSE)
    elif isinstance(what, x509.Certificate) and what != issuer:
        if constraints.value.path_length == 0 and claim_of(what).is_ca:
            why = "its issuer signs end entities only (pathLen 0): validators refuse whatever this CA issues"
            yield error("path-length", "it is a CA below an issuing CA", why, _WHOSE)
        if what.not_valid_after_utc > issuer.not_valid_after_utc:
            why = "validators stop at the first certificate of a chain that has ended"
            yield warning("validity", "it is to end later than its issuer", why, "have it issued anew")


def recorded(certificate: x509.Certificate, view: View, cas: Cas) -> Iterator[Finding]:
    """Say what the registry knows of a certificate that one of the station's CAs has signed."""
    if claim_of(certificate).is_ca:
        own = next((ca for ca in cas if ca.certificate == certificate), None)
        if own is None:
            yield error("recorded", "it is none of this station's CAs", _UNRECORDED, "see docs/recovery.md")
        elif not own.is_standing:
            why = "the station retired it: no gateway and no device trusts it any more"
            yield warning("retired", "this CA is retired", why, "issue anew under the CA in charge")
        return
    row = view.by_cert_serial(certificate.serial_number)
    if row is None:
        yield error(
            "recorded", "its serial number is not recorded at this station", _UNRECORDED, "see docs/recovery.md"
        )
        return
    if row.public_key_der is not None and _public_key(certificate) != row.public_key_der:
        why = "a serial number stands for one certificate"
        text = f"its serial number is recorded for another key, of {row.kind} {shown(row.name)}"
        yield error("recorded", text, why, "see docs/recovery.md")
    if row.is_revoked:
        since = f" on {row.revoked_at:%Y-%m-%d %H:%M} UTC" if row.revoked_at else ""
        text = f"it was revoked{since}: {shown(row.revocation_reason)}"
        claim = claim_of(certificate)
        again = "make the unit again" if claim is Claim.DEVICE else NEW_ONE[claim]
        yield error("revoked", text, "nobody should take it any more", f"{again}, if it is to go on")
    elif row.replaced_by is not None:
        why = "it is good for a while only"
        yield warning("revoked", f"it was replaced by row {row.replaced_by}", why, "use the newer certificate")


def _public_key(certificate: x509.Certificate) -> bytes:
    try:
        return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except UNREADABLE:
        return b""
