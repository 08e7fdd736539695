"""The certificate and CRL profile (docs/certificate-profile.md) as code.

Standards: RFC 5280, and draft-ietf-uta-tls13-iot-profile where it says more.

Rules:

- Everything is P-256 with ecdsa-with-SHA256.
- A request gives the public key only: the subject comes from the registry, the extensions from here.
- An end entity is never valid past its issuer, minus one second, and RFC 5280 counts both ends of a validity:
  one of two years ends a second before the second year does.
- Validity is backdated 24 h for boards without a clock, but never to before the issuer's.
- Every subject is distinct; a CA's carries the beginning of its key's identifier.

Pure: time, serial numbers and keys are arguments.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from birthmark.device.errors import AuthorityError, IdentityError
from birthmark.device.escape import quoted
from birthmark.device.identity import BrokerName, DeviceId, Role, device_role
from birthmark.provisioning.client_template import ClientTemplate, validity_der
from birthmark.provisioning.crl_template import crl_to_be_signed
from birthmark.provisioning.p256 import point_of
from birthmark.provisioning.signed_der import signed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

BACKDATED: Final = timedelta(hours=24)
ONE_SECOND: Final = timedelta(seconds=1)
ROOT_LIFETIME: Final = timedelta(days=20 * 365 + 5)
ISSUING_LIFETIME: Final = timedelta(days=10 * 365 + 2)
CRL_BACKDATED: Final = timedelta(hours=1)
CRL_LIFETIME: Final = timedelta(days=30)
ROOT_CRL_LIFETIME: Final = timedelta(days=365)
CERT_SERIAL_OCTETS: Final = range(16, 21)
"""Long enough that nobody guesses the next one, short enough for RFC 5280 section 4.1.2.2."""
_KEY_ID_IN_NAME: Final = 8
_SIGNATURE: Final = ECDSA(SHA256())
_ONLY_P256: Final = "birthmark uses P-256 throughout"
_DNS_NAME: Final = re.compile(r"(?=.{1,253}\Z)(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")


@dataclass(frozen=True, slots=True)
class Issuer:
    """A CA that signs: its certificate and its private key.

    Raises:
        AuthorityError: the two do not belong together.
    """

    certificate: x509.Certificate
    private_key: EllipticCurvePrivateKey

    def __post_init__(self) -> None:
        if self.certificate.public_key() != self.private_key.public_key():
            raise AuthorityError(
                "could not use the CA: its key and its certificate do not belong together",
                hint="restore both from the same backup",
            )


class Revoked(NamedTuple):
    """One entry of a CRL."""

    cert_serial: int
    revoked_at: datetime
    reason: x509.ReasonFlags


def new_cert_serial(random_bytes: Callable[[int], bytes]) -> int:
    """Draw a serial number: 20 octets, positive, 157 of its bits from `random_bytes` (a CSPRNG).

    The first bits are 01, so that it is positive and its length is always 20 octets.
    """
    drawn = int.from_bytes(random_bytes(20), "big")
    return drawn & ((1 << 158) - 1) | 1 << 158


def parse_public_key(public_key_der: bytes) -> EllipticCurvePublicKey:
    """Read a SubjectPublicKeyInfo.

    Raises:
        AuthorityError: it is not a P-256 key.
    """
    try:
        key = load_der_public_key(public_key_der)
    except Exception as error:
        # The parser raises several kinds; whatever it does not take is refused.
        raise AuthorityError("could not certify a key: it cannot be read") from error
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        raise AuthorityError("could not certify a key: it is no P-256 key", hint=_ONLY_P256)
    return key


def public_point(public_key_der: bytes) -> bytes:
    """Return the point (uncompressed) of a SubjectPublicKeyInfo; raises `AuthorityError` if it is no P-256 key."""
    return point_of(public_key_der) or _point(parse_public_key(public_key_der))


def root_certificate(
    private_key: EllipticCurvePrivateKey, *, organization: str, cert_serial: int, now: datetime
) -> x509.Certificate:
    """Make the root's certificate: self-signed, 20 years, signs issuing CAs and its CRL."""
    public_key = private_key.public_key()
    name = _ca_name(organization, "root CA", public_key)
    not_before = _seconds(now - BACKDATED)
    return (
        _builder(name, name, public_key, cert_serial)
        .not_valid_before(not_before)
        .not_valid_after(not_before + ROOT_LIFETIME - ONE_SECOND)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(_subject_key_id(public_key), critical=False)
        .sign(private_key, SHA256())
    )


def issuing_certificate(
    root: Issuer, public_key: EllipticCurvePublicKey, *, organization: str, cert_serial: int, now: datetime
) -> x509.Certificate:
    """Make an issuing CA's certificate: 10 years, signs end entities only (pathLen 0)."""
    name = _ca_name(organization, "issuing CA", public_key)
    return _sign(
        root,
        _builder(name, root.certificate.subject, public_key, cert_serial)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True),
        public_key,
        lifetime=ISSUING_LIFETIME,
        now=now,
    )


class ClientSigner:
    """Signs client certificates: of the devices, or of the services, that one CA certifies at one moment.

    What they share is made once: to sign one takes little more than its signature.

    Args:
        issuer: the CA.
        organization: the subject's O.
        lifetime: how long they are valid, if the CA is.
        now: the current time, aware.
        check_role: raises `IdentityError` for a role that they may not hold: `device_role`, `check_service_role`.

    Raises:
        AuthorityError: they would end before they are of use.
    """

    def __init__(
        self,
        issuer: Issuer,
        *,
        organization: str,
        lifetime: timedelta,
        now: datetime,
        check_role: Callable[[str], object] = device_role,
    ) -> None:
        self._issuer = issuer
        self._organization = organization
        self._check_role = check_role
        self._validity = validity_der(*_validity(issuer, lifetime, now))
        self._templates: dict[str, ClientTemplate] = {}

    def sign(self, identity: DeviceId, role: str, point: bytes, *, cert_serial: int) -> bytes:
        """Return the certificate (DER) of a client.

        Args:
            identity: the CN.
            role: the OU.
            point: that of the public key, uncompressed (`public_point`).
            cert_serial: recorded already.

        Raises:
            IdentityError: the client may not hold the role.
            AuthorityError: the serial number is none.
        """
        _check_cert_serial(cert_serial)
        to_be_signed = (self._templates.get(role) or self._template(role)).to_be_signed(
            identity.text, point, cert_serial=cert_serial, validity=self._validity
        )
        return signed(to_be_signed, self._issuer.private_key.sign(to_be_signed, _SIGNATURE))

    def _template(self, role: str) -> ClientTemplate:
        template = _client_template(self._issuer.certificate, self._organization, role, self._check_role)
        self._templates[role] = template
        return template


def device_certificate(
    issuer: Issuer,
    *,
    organization: str,
    device_id: DeviceId,
    role: Role,
    public_key: EllipticCurvePublicKey,
    cert_serial: int,
    lifetime: timedelta,
    now: datetime,
) -> x509.Certificate:
    """Make a device's certificate: TLS client only, one CN (the device id), the role in OU.

    Raises:
        IdentityError: the role is reserved for services.
    """
    signer = ClientSigner(issuer, organization=organization, lifetime=lifetime, now=now)
    der = signer.sign(device_id, role.name, _point(public_key), cert_serial=cert_serial)
    return x509.load_der_x509_certificate(der)


def service_certificate(
    issuer: Issuer,
    *,
    organization: str,
    service_id: DeviceId,
    role: Role,
    public_key: EllipticCurvePublicKey,
    cert_serial: int,
    lifetime: timedelta,
    now: datetime,
) -> x509.Certificate:
    """Make a service's certificate: the device's profile with a reserved role.

    Raises:
        IdentityError: the role is not reserved for services.
    """
    signer = ClientSigner(
        issuer, organization=organization, lifetime=lifetime, now=now, check_role=check_service_role
    )
    der = signer.sign(service_id, role.name, _point(public_key), cert_serial=cert_serial)
    return x509.load_der_x509_certificate(der)


def broker_certificate(
    issuer: Issuer,
    *,
    organization: str,
    hosts: Sequence[str],
    public_key: EllipticCurvePublicKey,
    cert_serial: int,
    lifetime: timedelta,
    now: datetime,
) -> x509.Certificate:
    """Make a broker's certificate: TLS server only, its names and addresses in SAN, the first one as CN.

    Raises:
        IdentityError: there is no host, or one is neither a DNS name nor an address.
    """
    if not hosts:
        raise IdentityError("could not name the broker: no host was given")
    names = x509.SubjectAlternativeName([general_name(host) for host in hosts])
    subject = _name(organization, common_name=str(BrokerName(hosts[0])))
    return _sign(
        issuer,
        _builder(subject, issuer.certificate.subject, public_key, cert_serial)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(names, critical=False),
        public_key,
        lifetime=lifetime,
        now=now,
    )


def revocation_list(
    issuer: Issuer, *, number: int, this_update: datetime, next_update: datetime, revoked: Sequence[Revoked]
) -> x509.CertificateRevocationList:
    """Make a complete CRL of `issuer`. `number` and `this_update` rise strictly from CRL to CRL."""
    return x509.load_der_x509_crl(
        revocation_list_der(
            issuer, number=number, this_update=this_update, next_update=next_update, revoked=revoked
        )
    )


def revocation_list_der(
    issuer: Issuer, *, number: int, this_update: datetime, next_update: datetime, revoked: Iterable[Revoked]
) -> bytes:
    """Make a CRL as `revocation_list` does, for whoever wants the octets (DER) alone."""
    to_be_signed = crl_to_be_signed(
        issuer.certificate,
        number=number,
        this_update=_seconds(this_update),
        next_update=_seconds(next_update),
        entries=revoked,
    )
    return signed(to_be_signed, issuer.private_key.sign(to_be_signed, _SIGNATURE))


def general_name(host: str) -> x509.GeneralName:
    """Return a host as a SAN entry: an address if it is one, else a DNS name (no wildcards).

    Raises:
        IdentityError: it is neither.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _DNS_NAME.fullmatch(host):
        raise IdentityError(
            f"could not use {quoted(host, 64)} as a broker's host: it is neither a DNS name nor an address",
            hint="give names such as gateway-1.example.com and addresses such as 192.0.2.7 or 2001:db8::7",
        )
    return x509.DNSName(host)


def check_service_role(role: str) -> None:
    """Check that a service may hold `role`; raises `IdentityError` if it is a device's."""
    if not Role(role).is_reserved:
        raise IdentityError(
            f"could not give a service the role {role}: it is a device's",
            hint="a service's role is `operator`, or begins with `service-`",
        )


def key_id(certificate: x509.Certificate) -> bytes:
    """Return a certificate's subject key identifier."""
    return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest


@lru_cache(maxsize=64)
def _client_template(
    ca: x509.Certificate, organization: str, role: str, check_role: Callable[[str], object]
) -> ClientTemplate:
    check_role(role)
    # subjectAltName, subjectKeyIdentifier and authorityKeyIdentifier follow: the template has them.
    return ClientTemplate(
        ca,
        organization=organization,
        role=role,
        same_for_all=(
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_key_usage(ca=False), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False),
        ),
    )


def _point(public_key: EllipticCurvePublicKey) -> bytes:
    if not isinstance(public_key.curve, SECP256R1):
        raise AuthorityError("could not certify a key: it is no P-256 key", hint=_ONLY_P256)
    return public_key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def _sign(
    issuer: Issuer,
    builder: x509.CertificateBuilder,
    public_key: EllipticCurvePublicKey,
    *,
    lifetime: timedelta,
    now: datetime,
) -> x509.Certificate:
    not_before, not_after = _validity(issuer, lifetime, now)
    return (
        builder.not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(_subject_key_id(public_key), critical=False)
        .add_extension(_authority_key_id(issuer), critical=False)
        .sign(issuer.private_key, SHA256())
    )


def _validity(issuer: Issuer, lifetime: timedelta, now: datetime) -> tuple[datetime, datetime]:
    ca = issuer.certificate
    not_before = max(_seconds(now - BACKDATED), ca.not_valid_before_utc)
    not_after = min(not_before + lifetime, ca.not_valid_after_utc) - ONE_SECOND
    if not_after <= now:
        if ca.not_valid_after_utc - ONE_SECOND <= now:
            raise AuthorityError(
                f"could not issue: the CA that issues ended on {ca.not_valid_after_utc:%Y-%m-%d}",
                hint="see `birthmark ca show`; replace it: `birthmark ca rollover start issuing`",
            )
        raise AuthorityError(
            f"could not issue: the certificate would have ended on {not_after:%Y-%m-%d}",
            hint=f"give a longer lifetime: it begins {BACKDATED.total_seconds() / 3600:.0f} h before it is issued",
        )
    return not_before, not_after


def _check_cert_serial(cert_serial: int) -> None:
    if (cert_serial.bit_length() + 8) // 8 not in CERT_SERIAL_OCTETS or cert_serial <= 0:
        raise AuthorityError("could not issue: the serial number is not a positive one of 16 to 20 octets")


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: EllipticCurvePublicKey, cert_serial: int
) -> x509.CertificateBuilder:
    _check_cert_serial(cert_serial)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(cert_serial)
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _subject_key_id(public_key: EllipticCurvePublicKey) -> x509.SubjectKeyIdentifier:
    return x509.SubjectKeyIdentifier.from_public_key(public_key)


def _authority_key_id(issuer: Issuer) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier(key_id(issuer.certificate), None, None)


def _ca_name(organization: str, what: str, public_key: EllipticCurvePublicKey) -> x509.Name:
    short_id = _subject_key_id(public_key).digest.hex()[:_KEY_ID_IN_NAME]
    return _name(organization, common_name=f"birthmark {what} {short_id}")


def _name(organization: str, *, common_name: str) -> x509.Name:
    return x509.Name(
        [_attribute(NameOID.ORGANIZATION_NAME, organization), _attribute(NameOID.COMMON_NAME, common_name)]
    )


def _attribute(oid: ObjectIdentifier, value: str) -> x509.NameAttribute[str]:
    return x509.NameAttribute(oid, value)


def _seconds(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(microsecond=0)
