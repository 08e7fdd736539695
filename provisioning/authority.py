"""The issuing CA at work: what it signs, and when it refuses to.

Rules:

- Nothing is signed that the registry does not hold already: the row in KEYED, with this name, role, public key,
  serial number and issuing CA. So no certificate exists that a revocation would not reach, whenever the station
  is killed.
- Nothing is signed by a CA that is closed or retired: its last CRL would not list it.
- Nothing is signed while the station's clock is before the CA's notBefore or before the last issuance: it is
  wrong, and so would be the validity.
- The root's key is not here: it signs issuing CAs and its own CRL only (`birthmark.provisioning.founding`).
"""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from birthmark.device.errors import AuthorityError
from birthmark.device.identity import BrokerName, DeviceId, Role
from birthmark.provisioning import profile
from birthmark.provisioning.cas import read_cas
from birthmark.provisioning.registry.interface import LAST_ISSUED_AT, moment
from birthmark.provisioning.registry.model import Kind, State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from birthmark.provisioning.profile import Issuer, Revoked
    from birthmark.provisioning.registry.interface import Registry
    from birthmark.provisioning.registry.model import Row
    from birthmark.provisioning.settings import Lifetimes

CLOCK_STEP: Final = timedelta(seconds=2)
"""How far the clock may have gone back since the last issuance: time synchronisation steps by as much."""


def with_certificate(row: Row, certificate_der: bytes, *, anchors: str) -> Row:
    """Return a row in ISSUED, with its certificate and that one's dates.

    Args:
        row: in KEYED.
        certificate_der: what was signed for it.
        anchors: the roots that its holder is known to trust, as a row has them.
    """
    certificate = x509.load_der_x509_certificate(certificate_der)
    return row.certified(
        certificate_der,
        State.ISSUED,
        anchors=anchors,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )


class Authority:
    """An unlocked issuing CA.

    Args:
        issuer: its certificate and key.
        anchors: the roots that devices are to trust, the one that it leads to first.
        organization: the O of every subject.
        lifetimes: how long certificates are valid.
        registry: where every serial number must be recorded before it is used.
    """

    def __init__(
        self,
        issuer: Issuer,
        anchors: Sequence[x509.Certificate],
        *,
        organization: str,
        lifetimes: Lifetimes,
        registry: Registry,
    ) -> None:
        self._issuer = issuer
        self._organization = organization
        self._lifetimes = lifetimes
        self._registry = registry
        self.issuing_der = issuer.certificate.public_bytes(Encoding.DER)
        self.anchors_der = tuple(anchor.public_bytes(Encoding.DER) for anchor in anchors)
        self.anchor_ids = " ".join(profile.key_id(anchor).hex() for anchor in anchors)
        """The anchors' key identifiers, as a row of the registry remembers them."""
        self.key_id = profile.key_id(issuer.certificate).hex()
        """The issuing CA's subject key identifier, in lower-case hex."""

    def __repr__(self) -> str:
        return f"Authority({self.key_id})"

    def new_cert_serial(self) -> int:
        """Draw a serial number, to be recorded in the registry before anything is signed with it."""
        return profile.new_cert_serial(secrets.token_bytes)

    def issue_device(self, row: Row, *, now: datetime) -> bytes:
        """Sign the certificate of a device's row and return it (DER).

        Raises:
            IdentityError: the role is reserved for services.
            ConfigurationError: the lifetime in the settings is none; nothing was signed.
            AuthorityError: the key is no P-256 key, the clock is wrong, or the registry does not hold the row
                like this, in KEYED; nothing was signed.
            ValueError: the row has no key to certify.
        """
        public_key_der, cert_serial = self._recorded(Kind.DEVICE, row, now=now)
        point = profile.public_point(public_key_der)
        return self._device_signer(now).sign(DeviceId(row.name), row.role, point, cert_serial=cert_serial)

    def issue_devices(self, rows: Sequence[Row], *, now: datetime) -> list[bytes]:
        """Sign the certificates of many devices and return them (DER), in the order of their rows.

        The registry is asked once for all. Errors as in `issue_device`: nothing of the group was signed then,
        unless a name or a key is at fault that the registry should never have taken.
        """
        self._check_all(rows, now=now)
        sign, point = self._device_signer(now).sign, profile.public_point
        return [
            sign(DeviceId(row.name), row.role, point(row.public_key_der or b""), cert_serial=row.cert_serial or 0)
            for row in rows
        ]

    def _device_signer(self, now: datetime) -> profile.ClientSigner:
        lifetime = self._lifetimes.of(Kind.DEVICE)
        return profile.ClientSigner(self._issuer, organization=self._organization, lifetime=lifetime, now=now)

    def issue_service(self, row: Row, *, now: datetime) -> bytes:
        """Sign the certificate of a service's row and return it (DER); errors as in `issue_device`."""
        public_key_der, cert_serial = self._recorded(Kind.SERVICE, row, now=now)
        certificate = profile.service_certificate(
            self._issuer,
            organization=self._organization,
            service_id=DeviceId(row.name),
            role=Role(row.role),
            public_key=profile.parse_public_key(public_key_der),
            cert_serial=cert_serial,
            lifetime=self._lifetimes.of(Kind.SERVICE),
            now=now,
        )
        return certificate.public_bytes(Encoding.DER)

    def issue_broker(self, row: Row, hosts: Sequence[str], *, now: datetime) -> bytes:
        """Sign the certificate of a broker's row and return it (DER); errors as in `issue_device`.

        The first host is the broker's name.
        """
        named = row.changed(name=str(BrokerName(hosts[0])))
        public_key_der, cert_serial = self._recorded(Kind.BROKER, named, now=now)
        certificate = profile.broker_certificate(
            self._issuer,
            organization=self._organization,
            hosts=hosts,
            public_key=profile.parse_public_key(public_key_der),
            cert_serial=cert_serial,
            lifetime=self._lifetimes.of(Kind.BROKER),
            now=now,
        )
        return certificate.public_bytes(Encoding.DER)

    def sign_crl(
        self, *, number: int, this_update: datetime, next_update: datetime, revoked: Sequence[Revoked]
    ) -> bytes:
        """Sign a complete CRL and return it (DER). `number` and `this_update` are durable already."""
        return profile.revocation_list_der(
            self._issuer, number=number, this_update=this_update, next_update=next_update, revoked=revoked
        )

    def sign_transcript(self, transcript: bytes) -> bytes:
        """Sign a transcript (docs/serial-protocol.md section 6, docs/renewal.md); return the signature (DER)."""
        return self._issuer.private_key.sign(transcript, ECDSA(SHA256()))

    def _recorded(self, kind: Kind, row: Row, *, now: datetime) -> tuple[bytes, int]:
        """Return the key and the serial number to certify, if what the certificate will say is on record."""
        if row.public_key_der is None or row.cert_serial is None:
            raise ValueError(f"row {row.number} in {row.state} has no key to certify")
        with self._registry.view() as view:
            recorded = view.by_cert_serial(row.cert_serial)
            last_issued_at = moment(view, LAST_ISSUED_AT)
            closed = any(ca.key_id == self.key_id and ca.closed_at is not None for ca in read_cas(view))
        wanted = (kind, row.name, row.role, row.public_key_der)
        if recorded is None or (recorded.kind, recorded.name, recorded.role, recorded.public_key_der) != wanted:
            raise AuthorityError(
                f"could not issue a certificate for {kind} {row.name}: its serial number is not recorded for it",
                hint="this is a defect of the station's software: please report it",
            )
        self._check_row(recorded, closed=closed)
        self._check_clock(now, last_issued_at)
        return row.public_key_der, row.cert_serial

    def _check_all(self, rows: Sequence[Row], *, now: datetime) -> None:
        with self._registry.view() as view:
            differing = view.differing(rows)
            last_issued_at = moment(view, LAST_ISSUED_AT)
            closed = any(ca.key_id == self.key_id and ca.closed_at is not None for ca in read_cas(view))
        for row in rows:
            if row.number in differing or row.kind is not Kind.DEVICE:
                raise AuthorityError(
                    f"could not issue a certificate for {row.kind} {row.name}: it is not recorded as a device's",
                    hint="somebody else has changed it meanwhile: start these devices again",
                )
            self._check_row(row, closed=closed)
        self._check_clock(now, last_issued_at)

    def _check_row(self, row: Row, *, closed: bool) -> None:
        if row.state is not State.KEYED or row.is_revoked:
            state = "revoked" if row.is_revoked else row.state
            raise AuthorityError(
                f"could not issue a certificate for {row.kind} {row.name}: row {row.number} is {state}, not KEYED",
                hint="somebody else has changed it meanwhile: start this unit again",
            )
        if row.issuer != self.key_id or closed:
            raise AuthorityError(
                f"could not issue a certificate for {row.kind} {row.name}: its row is not the issuing CA's",
                hint="the CA was replaced meanwhile: start this again",
            )

    def _check_clock(self, now: datetime, last_issued_at: datetime) -> None:
        begins_at = self._issuer.certificate.not_valid_before_utc
        if now < begins_at:
            cause = (
                f"the station's clock says {now:%Y-%m-%d %H:%M}, and the CA begins on {begins_at:%Y-%m-%d %H:%M}"
            )
        elif now < last_issued_at - CLOCK_STEP:
            last = f"{last_issued_at:%Y-%m-%d %H:%M:%S}"
            cause = f"the station's clock says {now:%Y-%m-%d %H:%M:%S}, before the last issuance ({last})"
        else:
            return
        hint = "set the station's clock right, then try again; if it is right and was ahead then: docs/recovery.md"
        raise AuthorityError(f"could not issue: {cause}", hint=hint)
