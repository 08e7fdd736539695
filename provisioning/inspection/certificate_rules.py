"""The certificate profile as rules, one property each (docs/certificate-profile.md; RFC 5280 section 4).

Pure: the time is given. Which rules apply is decided by what the certificate claims to be (`claim_of`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID, SignatureAlgorithmOID

from birthmark.device.errors import IdentityError
from birthmark.device.identity import BrokerName, DeviceId, Role
from birthmark.provisioning.inspection.model import (
    UNREADABLE,
    Claim,
    Finding,
    Rule,
    error,
    notice,
    shown,
    warning,
)
from birthmark.provisioning.profile import CERT_SERIAL_OCTETS, ISSUING_LIFETIME, ROOT_LIFETIME

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

_CLIENT, _SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
_USAGE_NAMES: Final = {_CLIENT: "clientAuth", _SERVER: "serverAuth"}
_SOON: Final = timedelta(days=30)
_ALGORITHMS: Final = {
    oid: name.lower().replace("_", "-") for name, oid in vars(SignatureAlgorithmOID).items() if name.isupper()
}
_KNOWN_EXTENSIONS: Final = {
    ExtensionOID.BASIC_CONSTRAINTS,
    ExtensionOID.KEY_USAGE,
    ExtensionOID.EXTENDED_KEY_USAGE,
    ExtensionOID.SUBJECT_KEY_IDENTIFIER,
    ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
    ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    ExtensionOID.CRL_DISTRIBUTION_POINTS,
}
_USAGE_BITS: Final = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
)
_REISSUE: Final = "have it issued anew"
NEW_ONE: Final = {
    Claim.DEVICE: "renew it; after its end, where a gateway has a renewal listener (docs/renewal.md)",
    Claim.SERVICE: "birthmark issue-operator NAME --renew",
    Claim.BROKER: "birthmark issue-broker NAME --renew",
    Claim.ISSUING: "birthmark ca rollover start issuing",
    Claim.ROOT: "birthmark ca rollover start root",
}
"""How the holder of a certificate comes by its next one."""
_ATTRIBUTES: Final = {
    Claim.DEVICE: (NameOID.ORGANIZATION_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME, NameOID.COMMON_NAME),
    Claim.SERVICE: (NameOID.ORGANIZATION_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME, NameOID.COMMON_NAME),
    Claim.BROKER: (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME),
    Claim.ISSUING: (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME),
    Claim.ROOT: (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME),
}
_LAYOUT: Final = {
    Claim.DEVICE: "O, OU (the role), CN (the device id)",
    Claim.SERVICE: "O, OU (the role), CN (the service's id)",
    Claim.BROKER: "O, CN (the host)",
    Claim.ISSUING: "O, CN",
    Claim.ROOT: "O, CN",
}

Ext = TypeVar("Ext", bound=x509.ExtensionType)


@dataclass(frozen=True, slots=True)
class InspectedCertificate:
    """A certificate, what it claims to be, and the time."""

    certificate: x509.Certificate
    claim: Claim
    now: datetime

    def extension(self, kind: type[Ext]) -> x509.Extension[Ext] | None:
        """Return an extension; None where there is none, or where the extensions cannot be read at all."""
        return extension_of(self.certificate, kind)

    def names(self, oid: x509.ObjectIdentifier) -> list[str]:
        """Return the values of an attribute of the subject."""
        return [str(attribute.value) for attribute in self.certificate.subject.get_attributes_for_oid(oid)]


def extension_of(certificate: x509.Certificate, kind: type[Ext]) -> x509.Extension[Ext] | None:
    """Return a certificate's extension; None where there is none, or where none can be read."""
    try:
        return certificate.extensions.get_extension_for_class(kind)
    except (x509.ExtensionNotFound, *UNREADABLE):
        return None


def claim_of(certificate: x509.Certificate) -> Claim:
    """Return which profile a certificate claims to be of: what would be believed of it, right or wrong."""
    basic = extension_of(certificate, x509.BasicConstraints)
    usage = extension_of(certificate, x509.KeyUsage)
    if (basic is not None and basic.value.ca) or (usage is not None and usage.value.key_cert_sign):
        return Claim.ROOT if _is_self_issued(certificate) else Claim.ISSUING
    purposes = extension_of(certificate, x509.ExtendedKeyUsage)
    if purposes is not None and _CLIENT not in purposes.value and _SERVER in purposes.value:
        return Claim.BROKER
    try:
        units = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
        is_service = any(Role(str(unit.value)).is_reserved for unit in units)
    except (IdentityError, *UNREADABLE):
        is_service = False
    return Claim.SERVICE if is_service else Claim.DEVICE


def _is_self_issued(certificate: x509.Certificate) -> bool:
    try:
        return certificate.subject == certificate.issuer
    except UNREADABLE:
        return False


def _extensions(it: InspectedCertificate) -> Iterator[Finding]:
    """Say which extensions have no place; raises what the library does if they cannot be read."""
    for extension in it.certificate.extensions:
        if extension.oid not in _KNOWN_EXTENSIONS:
            name = shown(extension.oid.dotted_string)
            if extension.critical:
                why = "a validator has to refuse a critical extension that it does not know"
                yield error("extensions", f"there is a critical extension {name}", why, _REISSUE)
            else:
                why = "the profile has none such: nobody here looks at it"
                yield notice("extensions", f"there is an extension {name}", why, "ask who put it there")


def _version(it: InspectedCertificate) -> Iterator[Finding]:
    if it.certificate.version is not x509.Version.v3:
        yield error("version", "it is of version 1", "only version 3 has extensions", _REISSUE)


def _signature_algorithm(it: InspectedCertificate) -> Iterator[Finding]:
    yield from check_signature_algorithm(it.certificate.signature_algorithm_oid)


def check_signature_algorithm(oid: x509.ObjectIdentifier) -> Iterator[Finding]:
    """Find a signature algorithm other than the profile's."""
    if oid != SignatureAlgorithmOID.ECDSA_WITH_SHA256:
        yield error(
            "signature-algorithm",
            f"it is signed with {_ALGORITHMS.get(oid) or shown(oid.dotted_string)}",
            "everything here is signed with ecdsa-with-SHA256; a small device knows nothing else",
            _REISSUE,
        )


def _key(it: InspectedCertificate) -> Iterator[Finding]:
    yield from check_key(it.certificate.public_key())


def check_key(key: object) -> Iterator[Finding]:
    """Find a key that is not on P-256."""
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return
    yield error("key", "its key is no P-256 key", "birthmark uses P-256 throughout", "make a P-256 key pair")


def _cert_serial(it: InspectedCertificate) -> Iterator[Finding]:
    number = it.certificate.serial_number
    if number <= 0:
        why = "RFC 5280 section 4.1.2.2 wants a positive one"
        yield error("serial-number", "its serial number is not positive", why, _REISSUE)
        return
    octets = (number.bit_length() + 8) // 8
    if octets > CERT_SERIAL_OCTETS[-1]:
        why = "RFC 5280 section 4.1.2.2 allows 20 octets"
        yield error("serial-number", f"its serial number has {octets} octets", why, _REISSUE)
    elif octets < CERT_SERIAL_OCTETS[0]:
        why = "a short one can be guessed before it is used; the station draws 20 octets at random"
        count = "1 octet" if octets == 1 else f"{octets} octets"
        yield warning("serial-number", f"its serial number has {count} only", why, _REISSUE)


def _subject(it: InspectedCertificate) -> Iterator[Finding]:
    found = tuple(attribute.oid for attribute in it.certificate.subject)
    if found != _ATTRIBUTES[it.claim]:
        count = len(it.names(NameOID.COMMON_NAME))
        cause = f"it has {count} CNs" if count != 1 else "its parts are others, or in another order"
        severity = error if count != 1 else warning
        why = "the CN is the identity: there must be one, and nothing beside it to be taken for it"
        yield severity("subject", f"its subject is not {_LAYOUT[it.claim]}: {cause}", why, _REISSUE)


def _identity(it: InspectedCertificate) -> Iterator[Finding]:
    for name in it.names(NameOID.COMMON_NAME):
        try:
            BrokerName(name) if it.claim is Claim.BROKER else DeviceId(name)
        except IdentityError:
            kind = "a broker's name" if it.claim is Claim.BROKER else "a device id"
            why = "a CN outside the grammar is refused at every connection; some would reach into topics"
            yield error("identity", f"its CN '{shown(name)}' is not {kind}", why, _REISSUE)


def _role(it: InspectedCertificate) -> Iterator[Finding]:
    for name in it.names(NameOID.ORGANIZATIONAL_UNIT_NAME):
        try:
            Role(name)
        except IdentityError:
            why = "the gateway's policy goes by the role in OU"
            yield error("role", f"its OU '{shown(name)}' is no role", why, _REISSUE)


def _issuer_name(it: InspectedCertificate) -> Iterator[Finding]:
    if not list(it.certificate.issuer):
        yield error("issuer-name", "it names no issuer", "RFC 5280 section 4.1.2.4 wants one", _REISSUE)
    elif it.claim is not Claim.ROOT and _is_self_issued(it.certificate):
        why = "an end entity that is its own issuer was signed by no CA"
        yield error("issuer-name", "its subject is its issuer", why, _REISSUE)


def _validity(it: InspectedCertificate) -> Iterator[Finding]:
    begins, ends = it.certificate.not_valid_before_utc, it.certificate.not_valid_after_utc
    if ends <= begins:
        yield error("validity", "it ends before it begins", "so it is never valid", _REISSUE)
    elif ends < it.now:
        yield warning(
            "validity",
            f"it ended on {ends:%Y-%m-%d %H:%M} UTC",
            "nobody takes it any more",
            NEW_ONE[it.claim],
        )
    elif it.now < begins:
        why = "either it is meant for later, or a clock is wrong: this one, or the station's"
        yield warning("validity", f"it begins on {begins:%Y-%m-%d %H:%M} UTC", why, "check the clocks")
    elif ends - it.now < min(_SOON, (ends - begins) / 3):
        why = "the last part of its life has begun"
        yield notice("validity", f"it ends on {ends:%Y-%m-%d %H:%M} UTC", why, NEW_ONE[it.claim])
    longest = ROOT_LIFETIME if it.claim is Claim.ROOT else ISSUING_LIFETIME
    if ends - begins > longest:
        why = f"the profile has {longest.days // 365} years at most: what is stolen stays good for as long"
        yield warning("validity", f"it is valid for {(ends - begins).days / 365.25:.0f} years", why, _REISSUE)


def _basic_constraints(it: InspectedCertificate) -> Iterator[Finding]:
    found = it.extension(x509.BasicConstraints)
    if found is None:
        why = "without it, validators disagree on whether this is a CA"
        yield error("basic-constraints", "it has no basicConstraints", why, _REISSUE)
        return
    if not found.critical:
        why = "RFC 5280 section 4.2.1.9 wants it critical in a CA; the profile in all"
        yield warning("basic-constraints", "its basicConstraints are not critical", why, _REISSUE)
    if found.value.ca is not it.claim.is_ca:
        why = "basicConstraints and keyUsage contradict each other"
        yield error("basic-constraints", "it may sign certificates, but says CA:FALSE", why, _REISSUE)
    elif it.claim is Claim.ISSUING and found.value.path_length != 0:
        why = "an issuing CA signs end entities only: pathLen 0 keeps a stolen key from making CAs"
        yield warning("basic-constraints", "its pathLen is not 0", why, _REISSUE)


def _key_usage(it: InspectedCertificate) -> Iterator[Finding]:
    found = it.extension(x509.KeyUsage)
    if found is None:
        yield error("key-usage", "it has no keyUsage", "its key would be good for anything", _REISSUE)
        return
    if not found.critical:
        why = "RFC 5280 section 4.2.1.3 wants it critical"
        yield warning("key-usage", "its keyUsage is not critical", why, _REISSUE)
    wanted = {"key_cert_sign", "crl_sign"} if it.claim.is_ca else {"digital_signature"}
    bits = {name for name in _USAGE_BITS if getattr(found.value, name)}
    if bits != wanted:
        has = ", ".join(sorted(bits)) or "nothing"
        why = f"the profile has {' and '.join(sorted(wanted))}, and nothing else"
        severity = error if not wanted <= bits or "key_cert_sign" in bits - wanted else warning
        yield severity("key-usage", f"its keyUsage is {has}", why, _REISSUE)


def _extended_key_usage(it: InspectedCertificate) -> Iterator[Finding]:
    found = it.extension(x509.ExtendedKeyUsage)
    if it.claim.is_ca:
        if found is not None:
            why = "the profile has none: validators differ on what it means in a CA"
            yield warning("extended-key-usage", "it has an extKeyUsage", why, _REISSUE)
        return
    if found is None:
        why = "it would be good for a client and for a server: a stolen device could play the gateway"
        yield error("extended-key-usage", "it has no extKeyUsage", why, _REISSUE)
        return
    wanted = _SERVER if it.claim is Claim.BROKER else _CLIENT
    if set(found.value) != {wanted}:
        has = ", ".join(_USAGE_NAMES.get(oid, shown(oid.dotted_string)) for oid in found.value)
        why = f"a {it.claim} has {_USAGE_NAMES[wanted]} only: more would let it play another part"
        yield error("extended-key-usage", f"its extKeyUsage is {has}", why, _REISSUE)


def _subject_key_id(it: InspectedCertificate) -> Iterator[Finding]:
    found = it.extension(x509.SubjectKeyIdentifier)
    if found is None:
        severity = error if it.claim.is_ca else warning
        why = "CRLs and certificates name a CA by it" if it.claim.is_ca else "linters want it in every certificate"
        yield severity("subject-key-identifier", "it has no subjectKeyIdentifier", why, _REISSUE)
    elif found.critical:
        why = "RFC 5280 section 4.2.1.2 forbids that"
        yield warning("subject-key-identifier", "its subjectKeyIdentifier is critical", why, _REISSUE)


def _authority_key_id(it: InspectedCertificate) -> Iterator[Finding]:
    found = it.extension(x509.AuthorityKeyIdentifier)
    if found is None or found.value.key_identifier is None:
        if it.claim is not Claim.ROOT:
            why = "strict validators refuse it (VERIFY_X509_STRICT, the default of Python 3.13)"
            yield error("authority-key-identifier", "it does not say by which key it was signed", why, _REISSUE)
    elif found.critical:
        why = "RFC 5280 section 4.2.1.1 forbids that"
        yield warning("authority-key-identifier", "its authorityKeyIdentifier is critical", why, _REISSUE)


def _alternative_names(it: InspectedCertificate) -> Iterator[Finding]:
    found = it.extension(x509.SubjectAlternativeName)
    if it.claim.is_ca:
        if found is not None:
            why = "the profile has none in a CA"
            yield warning("subject-alt-name", "it has a subjectAltName", why, _REISSUE)
        return
    if found is None:
        why = (
            "clients look for the host in it, and nowhere else" if it.claim is Claim.BROKER else "some ask for it"
        )
        severity = error if it.claim is Claim.BROKER else warning
        yield severity("subject-alt-name", "it has no subjectAltName", why, _REISSUE)
    elif it.claim is Claim.BROKER:
        yield from _hosts(it, list(found.value))
    else:
        yield from _directory_name(it, list(found.value))


def _hosts(it: InspectedCertificate, names: list[x509.GeneralName]) -> Iterator[Finding]:
    hosts = {str(name.value).lower() for name in names if isinstance(name, x509.DNSName | x509.IPAddress)}
    if any(not isinstance(name, x509.DNSName | x509.IPAddress) for name in names):
        why = "a broker is reached by DNS names and addresses"
        yield warning("subject-alt-name", "its subjectAltName has something else than hosts", why, _REISSUE)
    if any("*" in host for host in hosts):
        why = "whoever has its key could play any gateway of that domain"
        yield error("subject-alt-name", "its subjectAltName has a wildcard", why, _REISSUE)
    for name in it.names(NameOID.COMMON_NAME):
        if name.lower() not in hosts:
            why = "clients look for the host in subjectAltName, and nowhere else"
            yield error("subject-alt-name", f"its CN '{shown(name)}' is not in its subjectAltName", why, _REISSUE)


def _directory_name(it: InspectedCertificate, names: list[x509.GeneralName]) -> Iterator[Finding]:
    subjects = [name.value for name in names if isinstance(name, x509.DirectoryName)]
    cns = [[attribute.value for attribute in subject] for subject in subjects]
    if len(names) != 1 or cns != [it.names(NameOID.COMMON_NAME)]:
        why = "another name here is another identity to whoever reads it from there"
        text = "its subjectAltName is not the one name that its CN is"
        yield error("subject-alt-name", text, why, _REISSUE)


def is_signed_by(what: x509.Certificate | x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    """Whether the signature is by an issuer's key; who may sign, and with what, is for other rules."""
    try:
        key = issuer.public_key()
        if isinstance(what.signature_hash_algorithm, SHA1) and isinstance(key, EllipticCurvePublicKey):
            # The library takes no SHA-1; but a rule of its own finds that, and it is not a forgery for it.
            signed = what.tbs_certificate_bytes if isinstance(what, x509.Certificate) else what.tbs_certlist_bytes
            key.verify(what.signature, signed, ECDSA(SHA1()))  # noqa: S303 - to be told apart
        elif isinstance(what, x509.CertificateRevocationList):
            return what.is_signature_valid(cast(EllipticCurvePublicKey, key))
        else:
            what.verify_directly_issued_by(issuer)
    except UNREADABLE:
        return False
    return True


def _self_signature(it: InspectedCertificate) -> Iterator[Finding]:
    if not is_signed_by(it.certificate, it.certificate):
        why = "a root is what one trusts; this one was changed after it was signed, or never signed itself"
        yield error(
            "signature", "its own key does not verify its signature", why, "take it from its station again"
        )


EVERY: Final = (
    Rule("extensions", _extensions),
    Rule("version", _version),
    Rule("signature-algorithm", _signature_algorithm),
    Rule("key", _key),
    Rule("serial-number", _cert_serial),
    Rule("subject", _subject),
    Rule("issuer-name", _issuer_name),
    Rule("validity", _validity),
    Rule("basic-constraints", _basic_constraints),
    Rule("key-usage", _key_usage),
    Rule("extended-key-usage", _extended_key_usage),
    Rule("subject-key-identifier", _subject_key_id),
    Rule("authority-key-identifier", _authority_key_id),
    Rule("subject-alt-name", _alternative_names),
)
IDENTITY: Final = Rule("identity", _identity)
ROLE: Final = Rule("role", _role)
SELF_SIGNATURE: Final = Rule("signature", _self_signature)


def rules_for(claim: Claim) -> tuple[Rule, ...]:
    """Return the rules for certificates that claim this."""
    if claim is Claim.ROOT:
        return (*EVERY, SELF_SIGNATURE)
    if claim.is_ca:
        return EVERY
    return (*EVERY, IDENTITY, ROLE) if claim.is_client else (*EVERY, IDENTITY)


def common_name(certificate: x509.Certificate) -> str:
    """Return a certificate's first CN, fit to be shown; empty where there is none."""
    try:
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return shown(str(cast(Any, names[0]).value)) if names else ""
    except UNREADABLE:
        return ""
