"""Who is at the other end: a peer's certificate, held against the whole profile after every handshake.

TLS has verified the chain when a session was new. A resumed session skips that (its expiry, a removed trust
anchor), so this check is made at every connect and relies on nothing that OpenSSL said.

Rules (RFC 5280, and docs/certificate-profile.md):

- The issuer is one of the trusted issuing CAs: its subject, its key identifier (AKI = SKI) and its signature.
- The subject has one CN, a `DeviceId`, and one OU, a `Role`; a reserved role makes the peer a service.
- Key and signature: P-256, ecdsa-with-SHA256. Version 3; notBefore <= now <= notAfter, for the issuer as well.
- On the renewal listener a device's certificate may have expired, by a stated grace at most; nothing else is
  different there. A service is not let in there at all.
- basicConstraints CA:FALSE, keyUsage digitalSignature alone, extKeyUsage clientAuth alone: all present.
- A subjectAltName, if any, is one directoryName with that same CN. An unknown critical extension is refused.

Every refusal has a short `reason` (for logs and counters), a message and a hint; one that a wrong clock can
explain says CLOCK and both times.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, SignatureAlgorithmOID

from birthmark.broker.trust import MALFORMED, Issuer, Trust, quoted_name
from birthmark.device.errors import IdentityError, RefusedError
from birthmark.device.escape import quoted
from birthmark.device.identity import GATEWAY_ROLE, DeviceId, Role

__all__ = ["Peer", "PeerRefusedError", "Trust", "check_peer"]

MAX_LEAF_BYTES = 4_096
"""A device certificate has about 550 bytes; TLS itself would take 16 MB."""
MAX_SERIAL_BITS = 160
"""RFC 5280 §4.1.2.2: at most 20 octets, positive."""

UPSTREAM_ROLE = "service-upstream"
UPSTREAM_ISSUER = "$upstream"
"""In place of an issuing CA's key identifier, which is hex."""
_EPOCH = datetime.fromtimestamp(0, UTC)
_LAST = datetime.max.replace(tzinfo=UTC)

_SIGNATURE = ec.ECDSA(SHA256())
# The extensions that are understood here; any other one must not be critical (RFC 5280 §4.2).
_KNOWN = frozenset(
    {
        x509.BasicConstraints.oid,
        x509.KeyUsage.oid,
        x509.ExtendedKeyUsage.oid,
        x509.SubjectKeyIdentifier.oid,
        x509.AuthorityKeyIdentifier.oid,
        x509.SubjectAlternativeName.oid,
    }
)
_REISSUE = "make the device again with `birthmark reflash`"
_STRANGER = "is the issuing CA that signed it in the gateway's clients-ca.pem?"


class PeerRefusedError(RefusedError):
    """A peer's certificate is not let in.

    Args:
        reason: a short code, stable, for counters and tests: `malformed`, `issuer`, `signature`, `algorithm`,
            `key`, `serial`, `name`, `role`, `alt-name`, `ca`, `key-usage`, `ext-key-usage`, `extension`,
            `not-yet-valid`, `expired`, `issuer-validity`.
        message: what is wrong with it, for the gateway's operator.
        hint: what to do about it.
    """

    def __init__(self, reason: str, message: str, hint: str = "") -> None:
        super().__init__(f"could not let a peer in: {message}", hint)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer whose certificate fits the profile and comes from a trusted issuing CA."""

    device_id: DeviceId
    role: Role
    is_service: bool
    """Whether the role is one that only a service may hold."""
    issuer: str
    """The issuing CA's subject key identifier, lower-case hex."""
    cert_serial: int
    not_before: datetime
    not_after: datetime
    for_renewal: bool = False
    """Whether it was let in to renew its certificate, and for nothing else."""

    @property
    def is_upstream(self) -> bool:
        """Whether it is no client but a broker above this one (`upstream_peer`)."""
        return self.issuer == UPSTREAM_ISSUER

    @property
    def is_gateway(self) -> bool:
        """Whether it is another gateway, whose upstream this one is."""
        return self.is_service and self.role.name.lower() == GATEWAY_ROLE


def upstream_peer(name: DeviceId) -> Peer:
    """Return who the publisher is of what comes down an upstream: nobody with a certificate of our CAs."""
    role = Role(UPSTREAM_ROLE)
    return Peer(
        name, role, is_service=True, issuer=UPSTREAM_ISSUER, cert_serial=0, not_before=_EPOCH, not_after=_EPOCH
    )


def check_peer(leaf_der: bytes, trust: Trust, now: datetime, *, expired_by: timedelta | None = None) -> Peer:
    """Return who the peer is, by its certificate; about 0.2 ms.

    Whether it is revoked is another question (`Revocations.check`), asked right after this one.

    Args:
        leaf_der: the peer's certificate, as `SSLSocket.getpeercert(binary_form=True)` gives it.
        trust: the trusted issuing CAs.
        now: the gateway's clock, aware.
        expired_by: on the renewal listener, how long after its end a certificate is still let in.

    Raises:
        PeerRefusedError: anything about the certificate is not as the profile says. Nothing else is raised,
            whatever the bytes.
    """
    return let_in(read_peer(leaf_der, trust), trust, now, expired_by=expired_by)


def read_peer(leaf_der: bytes, trust: Trust) -> Peer:
    """Return whose certificate it is, by all of `check_peer` that does not change with time.

    Raises:
        PeerRefusedError: as `check_peer`.
    """
    if len(leaf_der) > MAX_LEAF_BYTES:
        raise PeerRefusedError("malformed", f"its certificate has more than {MAX_LEAF_BYTES} bytes", _REISSUE)
    try:
        with warnings.catch_warnings():
            # `cryptography` warns about odd names and numbers; they are refused here.
            warnings.simplefilter("ignore")
            return _read(leaf_der, trust)
    except MALFORMED as error:
        raise PeerRefusedError("malformed", "its certificate is malformed", _REISSUE) from error


def let_in(peer: Peer, trust: Trust, now: datetime, *, expired_by: timedelta | None = None) -> Peer:
    """Return the peer, if it may come in at this moment: the rest of `check_peer`.

    Args:
        peer: from `read_peer`, by this same `trust`.
        trust: the trusted issuing CAs.
        now: the gateway's clock, aware.
        expired_by: as for `check_peer`.

    Raises:
        PeerRefusedError: it is not its time, or a service asks for what is for devices alone.
    """
    if expired_by is None:
        _check_clock(peer, trust[peer.issuer], now, timedelta())
        return peer
    if peer.is_service:
        message = f"{peer.device_id} is a service: only devices renew over the network"
        raise PeerRefusedError("role", message, "birthmark issue-operator NAME --renew")
    _check_clock(peer, trust[peer.issuer], now, expired_by)
    return replace(peer, for_renewal=True)


def _read(leaf_der: bytes, trust: Trust) -> Peer:
    certificate = x509.load_der_x509_certificate(leaf_der)
    if certificate.version is not x509.Version.v3:
        raise PeerRefusedError("malformed", "its certificate is not of version 3", _REISSUE)
    extensions = {extension.oid: extension for extension in certificate.extensions}
    issuer = _issuer(certificate, extensions, trust)
    device_id, role = _names(certificate)
    _check_signature(certificate, issuer, device_id, leaf_der)
    public_key = certificate.public_key()
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(public_key.curve, ec.SECP256R1):
        raise PeerRefusedError("key", f"the key of {device_id} is not on P-256", _REISSUE)
    cert_serial = certificate.serial_number
    if not 0 < cert_serial < 1 << MAX_SERIAL_BITS:
        raise PeerRefusedError("serial", f"the certificate number of {device_id} is out of range", _REISSUE)
    _check_extensions(extensions, device_id)
    return Peer(
        device_id=device_id,
        role=role,
        is_service=role.is_reserved,
        issuer=issuer.key_id,
        cert_serial=cert_serial,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )


_Extensions = dict[x509.ObjectIdentifier, x509.Extension[x509.ExtensionType]]


def _issuer(certificate: x509.Certificate, extensions: _Extensions, trust: Trust) -> Issuer:
    found = extensions.get(x509.AuthorityKeyIdentifier.oid)
    key_id = found.value.key_identifier if found and isinstance(found.value, x509.AuthorityKeyIdentifier) else None
    if key_id is None:
        raise PeerRefusedError("issuer", "its certificate does not say by which key it was signed (AKI)", _REISSUE)
    issuer = trust.get(key_id)
    if issuer is None:
        shown = quoted_name(certificate.issuer)
        raise PeerRefusedError("issuer", f"its certificate comes from an unknown CA, {shown}", _STRANGER)
    if certificate.issuer.public_bytes() != issuer.subject_der:
        shown = quoted_name(certificate.issuer)
        raise PeerRefusedError("issuer", f"its certificate names {shown} with another CA's key", _STRANGER)
    return issuer


def _names(certificate: x509.Certificate) -> tuple[DeviceId, Role]:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1:
        raise PeerRefusedError("name", f"its certificate has {len(names)} CNs instead of one", _REISSUE)
    try:
        device_id = DeviceId(_text(names[0].value))
    except IdentityError as error:
        shown = quoted(names[0].value, 80)
        raise PeerRefusedError("name", f"its CN {shown} is outside the grammar", error.hint) from error
    roles = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    if len(roles) != 1:
        message = f"the certificate of {device_id} has {len(roles)} roles (OU) instead of one"
        raise PeerRefusedError("role", message, _REISSUE)
    try:
        return device_id, Role(_text(roles[0].value))
    except IdentityError as error:
        shown = quoted(roles[0].value, 80)
        raise PeerRefusedError(
            "role", f"the role {shown} of {device_id} is outside the grammar", _REISSUE
        ) from error


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else ""


def _check_signature(certificate: x509.Certificate, issuer: Issuer, device_id: DeviceId, leaf_der: bytes) -> None:
    if certificate.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA256:
        message = f"the certificate of {device_id} is not signed with ecdsa-with-SHA256"
        raise PeerRefusedError("algorithm", message, _REISSUE)
    # The BIT STRING's count of unused bits is not signed, and the parser lets a wrong one pass.
    if not leaf_der.endswith(b"\0" + certificate.signature):
        message = f"the signature of the certificate of {device_id} is damaged"
        raise PeerRefusedError("malformed", message, _REISSUE)
    try:
        issuer.public_key.verify(certificate.signature, certificate.tbs_certificate_bytes, _SIGNATURE)
    except InvalidSignature as error:
        message = f"the certificate of {device_id} is not signed by '{issuer.name}', which it names"
        raise PeerRefusedError("signature", message, _STRANGER) from error


def _check_extensions(extensions: _Extensions, device_id: DeviceId) -> None:
    for oid, extension in extensions.items():
        if extension.critical and oid not in _KNOWN:
            message = f"the certificate of {device_id} has an unknown critical extension, {oid.dotted_string}"
            raise PeerRefusedError("extension", message, _REISSUE)
    constraints = extensions.get(x509.BasicConstraints.oid)
    if constraints is None or constraints.value != x509.BasicConstraints(ca=False, path_length=None):
        raise PeerRefusedError("ca", f"the certificate of {device_id} does not say CA:FALSE", _REISSUE)
    usage = extensions.get(x509.KeyUsage.oid)
    if usage is None or usage.value != _DIGITAL_SIGNATURE:
        message = f"the keyUsage of {device_id} is not digitalSignature alone"
        raise PeerRefusedError("key-usage", message, _REISSUE)
    purposes = extensions.get(x509.ExtendedKeyUsage.oid)
    if purposes is None or purposes.value != _CLIENT_AUTH:
        message = f"the extKeyUsage of {device_id} is not clientAuth alone"
        raise PeerRefusedError("ext-key-usage", message, "a broker's certificate is not a client's; " + _REISSUE)
    alternative = extensions.get(x509.SubjectAlternativeName.oid)
    if alternative is not None and not _names_only(alternative.value, device_id):
        message = f"the subjectAltName of {device_id} is not its CN alone"
        raise PeerRefusedError("alt-name", message, _REISSUE)


def _names_only(alternative: x509.ExtensionType, device_id: DeviceId) -> bool:
    if not isinstance(alternative, x509.SubjectAlternativeName):
        return False
    names = list(alternative)
    if len(names) != 1 or not isinstance(names[0], x509.DirectoryName):
        return False
    attributes = list(names[0].value)
    return [(a.oid, a.value) for a in attributes] == [(NameOID.COMMON_NAME, str(device_id))]


def _check_clock(peer: Peer, issuer: Issuer, now: datetime, expired_by: timedelta) -> None:
    since, until = peer.not_before, peer.not_after
    if now < since:
        message = f"CLOCK: the certificate of {peer.device_id} is valid from {_at(since)}; here it is {_at(now)}"
        raise PeerRefusedError("not-yet-valid", message, "compare the clocks of this gateway and of the station")
    if now > later(until, expired_by):
        message = f"CLOCK: the certificate of {peer.device_id} was valid until {_at(until)}; here it is {_at(now)}"
        if expired_by:
            message += f", more than {expired_by.days} days later, which is as long as it can be renewed"
        raise PeerRefusedError("expired", message, f"if this gateway's clock is right, {_REISSUE}")
    if not issuer.not_before <= now <= issuer.not_after:
        message = (
            f"CLOCK: the issuing CA '{issuer.name}' of {peer.device_id} is valid from {_at(issuer.not_before)} "
            f"until {_at(issuer.not_after)}; here it is {_at(now)}"
        )
        raise PeerRefusedError("issuer-validity", message, "check this gateway's clock, then roll the CA over")


def later(moment: datetime, by: timedelta) -> datetime:
    """Return a moment so much later, or the last there is: what has no end ends in 9999 (RFC 5280 §4.1.2.5)."""
    try:
        return moment + by
    except OverflowError:
        return _LAST


def _at(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


_CLIENT_AUTH = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
_DIGITAL_SIGNATURE = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
