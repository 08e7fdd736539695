"""The profile of CRLs and of requests as rules (docs/certificate-profile.md; RFC 5280 section 5, RFC 2986).

Pure: the time is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.x509.oid import CRLEntryExtensionOID, ExtensionOID, NameOID

from birthmark.device.errors import IdentityError
from birthmark.device.identity import DeviceId
from birthmark.provisioning.inspection.certificate_rules import check_key, check_signature_algorithm
from birthmark.provisioning.inspection.model import Finding, Rule, error, notice, shown, warning
from birthmark.provisioning.profile import ROOT_CRL_LIFETIME

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

_CLOCKS: Final = timedelta(minutes=5)
"""How far apart two clocks may be before a time in the future is worth a word."""
_LONGEST: Final = ROOT_CRL_LIFETIME + timedelta(days=1)
"""A root's, with some room for being backdated."""
_MAX_NUMBER_BITS: Final = 159
_KNOWN_EXTENSIONS: Final = {
    ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
    ExtensionOID.CRL_NUMBER,
    ExtensionOID.ISSUING_DISTRIBUTION_POINT,
}
_SIGN_ANEW: Final = "sign a new one: `birthmark crl`"
_ASK: Final = "ask whoever runs the CA"
_MAKE_ANEW: Final = "make a new request with the key that it is for"


@dataclass(frozen=True, slots=True)
class InspectedCrl:
    """A CRL and the time."""

    crl: x509.CertificateRevocationList
    now: datetime


def _signature_algorithm(it: InspectedCrl) -> Iterator[Finding]:
    yield from check_signature_algorithm(it.crl.signature_algorithm_oid)


def _extensions(it: InspectedCrl) -> Iterator[Finding]:
    for extension in it.crl.extensions:
        name = shown(extension.oid.dotted_string)
        if extension.oid == ExtensionOID.DELTA_CRL_INDICATOR:
            why = "it lists changes only: taken for a whole CRL, it would let the revoked in"
            yield error("extensions", "it is a delta CRL", why, "give the complete CRL")
        elif extension.oid not in _KNOWN_EXTENSIONS and extension.critical:
            why = "a gateway refuses a CRL with a critical extension that it does not know"
            yield error("extensions", f"it has a critical extension {name}", why, _ASK)


def _authority_key_id(it: InspectedCrl) -> Iterator[Finding]:
    try:
        found = it.crl.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except x509.ExtensionNotFound:
        found = None
    if found is None:
        why = "with several CAs nobody knows whose it is"
        yield error("authority-key-identifier", "it does not say by which key it was signed", why, _SIGN_ANEW)


def _number(it: InspectedCrl) -> Iterator[Finding]:
    try:
        found = it.crl.extensions.get_extension_for_class(x509.CRLNumber)
    except x509.ExtensionNotFound:
        why = "a gateway cannot tell it from an older one, and refuses it"
        yield error("crl-number", "it has no cRLNumber", why, _SIGN_ANEW)
        return
    if found.value.crl_number.bit_length() > _MAX_NUMBER_BITS or found.value.crl_number < 0:
        why = "RFC 5280 section 5.2.3 allows 20 octets"
        yield error("crl-number", "its cRLNumber is out of range", why, _ASK)
    if found.critical:
        why = "RFC 5280 section 5.2.3 forbids that"
        yield warning("crl-number", "its cRLNumber is critical", why, _SIGN_ANEW)


def _times(it: InspectedCrl) -> Iterator[Finding]:
    begins, ends = it.crl.last_update_utc, it.crl.next_update_utc
    if ends is None:
        why = "RFC 5280 section 5.1.2.5 wants one: without it, it could be kept for ever"
        yield error("next-update", "it has no nextUpdate", why, _SIGN_ANEW)
    elif ends <= begins:
        yield error("next-update", "it ends before it begins", "so it is never in force", _SIGN_ANEW)
    elif ends < it.now:
        why = "a gateway raises an alarm, and in the end lets nobody in (docs/operations.md)"
        yield warning("next-update", f"it ended on {ends:%Y-%m-%d %H:%M} UTC", why, _SIGN_ANEW)
    elif it.now - begins > (ends - begins) / 2:
        why = "past half of its life a new one is due"
        yield notice("next-update", f"it ends on {ends:%Y-%m-%d %H:%M} UTC", why, _SIGN_ANEW)
    if ends is not None and ends - begins > _LONGEST:
        why = "only a retired CA's last one is: nobody is alarmed when newer ones of another do not arrive"
        yield notice("next-update", f"it is good until {ends:%Y-%m-%d}", why, _ASK)
    if begins > it.now + _CLOCKS:
        why = "either this clock is wrong, or the station's was: gateways refuse it until then"
        yield warning("this-update", f"it begins on {begins:%Y-%m-%d %H:%M} UTC", why, "check the clocks")


def _entries(it: InspectedCrl) -> Iterator[Finding]:
    seen: set[int] = set()
    twice = later = unknown = unspecified = removed = 0
    for entry in it.crl:
        twice += entry.serial_number in seen
        seen.add(entry.serial_number)
        later += entry.revocation_date_utc > it.now + _CLOCKS
        for extension in entry.extensions:
            if isinstance(extension.value, x509.CRLReason):
                unspecified += extension.value.reason is x509.ReasonFlags.unspecified
                removed += extension.value.reason is x509.ReasonFlags.remove_from_crl
            elif extension.critical and extension.oid != CRLEntryExtensionOID.INVALIDITY_DATE:
                unknown += 1
    if twice:
        why = "one of them may say something else than the other"
        yield error("entries", f"{twice} certificates are on it twice", why, _SIGN_ANEW)
    if removed:
        why = "removeFromCRL belongs into delta CRLs alone (RFC 5280 section 5.3.1)"
        yield error("entries", f"{removed} entries say removeFromCRL", why, _ASK)
    if unknown:
        why = "whoever does not know it must take the CRL for unusable (RFC 5280 section 5.3)"
        yield error("entries", f"{unknown} critical extensions in its entries are unknown", why, _ASK)
    if later:
        why = "either this clock is wrong, or the station's was"
        yield warning("entries", f"{later} entries are dated in the future", why, "check the clocks")
    if unspecified:
        why = "RFC 5280 section 5.3.1 wants the reason left out instead"
        yield warning("entries", f"{unspecified} entries give the reason `unspecified`", why, _SIGN_ANEW)


CRL_RULES: Final = (
    Rule("extensions", _extensions),
    Rule("signature-algorithm", _signature_algorithm),
    Rule("authority-key-identifier", _authority_key_id),
    Rule("crl-number", _number),
    Rule("next-update", _times),
    Rule("entries", _entries),
)


@dataclass(frozen=True, slots=True)
class InspectedRequest:
    """A certificate signing request (PKCS#10)."""

    request: x509.CertificateSigningRequest


def _possession(it: InspectedRequest) -> Iterator[Finding]:
    if not it.request.is_signature_valid:
        why = "it does not prove that whoever made it has the key"
        yield error("signature", "its own key does not verify its signature", why, _MAKE_ANEW)


def _request_key(it: InspectedRequest) -> Iterator[Finding]:
    yield from check_key(it.request.public_key())


def _request_algorithm(it: InspectedRequest) -> Iterator[Finding]:
    yield from check_signature_algorithm(it.request.signature_algorithm_oid)


def _request_name(it: InspectedRequest) -> Iterator[Finding]:
    names = [str(name.value) for name in it.request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(names) != 1:
        why = "the registry decides on the name, and compares it with the one CN of the request"
        yield warning("identity", f"it has {len(names)} CNs", why, "make a new request with one CN, the id")
        return
    try:
        DeviceId(names[0])
    except IdentityError:
        why = "1 to 63 letters, digits and hyphens, with no hyphen at either end"
        yield warning("identity", f"its CN '{shown(names[0])}' is no device id", why, "choose another name")


def _requested_extensions(it: InspectedRequest) -> Iterator[Finding]:
    count = len(it.request.extensions)
    if count:
        why = "the station takes the public key from a request; extensions come from the profile"
        yield notice("extensions", f"it asks for {count} extensions", why, "leave them out")


REQUEST_RULES: Final = (
    Rule("signature", _possession),
    Rule("signature-algorithm", _request_algorithm),
    Rule("key", _request_key),
    Rule("identity", _request_name),
    Rule("extensions", _requested_extensions),
)
