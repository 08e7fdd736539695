"""Revoking identities, and the CRLs that say so.

Rules:

- A revocation is durable in the registry before the CRL that carries it is signed. After a kill in between, the
  next CRL, of whatever command, carries it.
- The CRL of every CA that issued something to the identity is brought up to date, and so is any other one that
  needs it.
- Revoking again changes nothing and delivers again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography import x509

from birthmark.device.errors import RegistryError
from birthmark.device.escape import escaped
from birthmark.provisioning import profile
from birthmark.provisioning.cas import read_cas
from birthmark.provisioning.crl_store import put_in_file
from birthmark.provisioning.crls import listing, read_ahead, sign_stale_crls, stale_crls, unlock_all
from birthmark.provisioning.registry.model import CERT_SERIAL_MAX, Kind, Row, State

if TYPE_CHECKING:
    from datetime import datetime

    from birthmark.provisioning.crl_store import CrlSet
    from birthmark.provisioning.registry.interface import Transaction
    from birthmark.provisioning.station import Station

LOST_ROLE: Final = "service-lost"
"""The role of a row that stands for a certificate of which only the serial number is known."""
_FLAGS: Final = x509.ReasonFlags
REASONS: Final = {
    # What people say, and what RFC 5280 section 5.3.1 calls it. A lost or stolen key counts as compromised:
    # whoever has the device may use it. certificateHold is not offered: revocation is for good.
    "unspecified": _FLAGS.unspecified,
    "keyCompromise": _FLAGS.key_compromise,
    "compromised": _FLAGS.key_compromise,
    "lost": _FLAGS.key_compromise,
    "stolen": _FLAGS.key_compromise,
    "affiliationChanged": _FLAGS.affiliation_changed,
    "sold": _FLAGS.affiliation_changed,
    "superseded": _FLAGS.superseded,
    "replaced": _FLAGS.superseded,
    "cessationOfOperation": _FLAGS.cessation_of_operation,
    "retired": _FLAGS.cessation_of_operation,
    "broken": _FLAGS.cessation_of_operation,
    "privilegeWithdrawn": _FLAGS.privilege_withdrawn,
    "withdrawn": _FLAGS.privilege_withdrawn,
}


@dataclass(frozen=True, slots=True)
class Revocation:
    """What `revoke` did."""

    rows: tuple[Row, ...]
    """Every certificate of the identity; all are revoked now."""
    newly: int
    """How many of them were not before."""
    crls: CrlSet
    unlisted: tuple[Row, ...] = ()
    """Those of a CA whose key was given up for lost: they are on no CRL, and gateways let them in."""


def parse_reason(word: str) -> x509.ReasonFlags | None:
    """Return the reason that `word` stands for, without regard to case; None if it stands for none."""
    folded = {name.lower(): flag for name, flag in REASONS.items()}
    return folded.get(word.lower())


def revoke(station: Station, name: str, reason: x509.ReasonFlags, *, word: str = "") -> Revocation:
    """Revoke every certificate that `name` ever had, and bring the CRL up to date.

    A certificate that is revoked already stays as it is. A row of a device that is enrolled keeps its name and
    hwid; any other row becomes VOID with its revocation.

    Args:
        station: the station.
        name: a device, service or broker, without regard to case.
        reason: for the CRL.
        word: what the person called it, for the audit log.

    Raises:
        RegistryError: there is no such identity, or it has no certificate yet; nothing was changed.
        AuthorityError: the CA cannot be unlocked; nothing was changed.
    """
    _revocable(station, name)
    with station.crl_lock():
        rows = _revocable(station, name)
        changing = listing(station.cas, [row for row in rows if not row.is_revoked])
        stale, crls = stale_crls(station, changing)
        if crls is not None and not stale and all(row.is_revoked for row in rows):
            put_in_file(crls)
            return Revocation(tuple(rows), 0, crls)
        # A wrong passphrase must stop this before anything is changed; so must it if none can be listed.
        issuers = {row.issuer for row in rows}
        lost = {ca.key_id for ca in station.cas.issuing if ca.lost_at is not None}
        read_ahead(station)
        unlock_all(station, {*(ca.key_id for ca in stale), *(issuers - lost or issuers)})
        with station.signing() as transaction:
            now = station.clock()  # not before: others may have been waited for
            found = transaction.named(name)
            marked = [row for row in found if mark_revoked(transaction, row, reason, word=word, now=now)]
            changing |= listing(read_cas(transaction), marked)  # there may be another one by now
        # A transaction of its own: whatever stops the CRL, the revocation stands, and the next CRL carries it.
        crls = sign_stale_crls(station, changing)
        with station.registry.view() as view:
            rows = [row for row in view.named(name) if row.is_revoked]
    unlisted = tuple(row for row in rows if row.issuer in lost and row.cert_serial not in crls.cert_serials)
    return Revocation(tuple(rows), len(marked), crls, unlisted)


def revoke_certificate(
    station: Station, cert_serial: int, reason: x509.ReasonFlags, *, word: str = ""
) -> Revocation:
    """Revoke one certificate alone, and bring the CRL up to date; also one that the registry does not know.

    A station that was restored from a backup does not know what was issued after it; a gateway that saw such a
    certificate names its serial number. It becomes a VOID row (`lost_row`), on the CRL of every CA.

    Raises:
        RegistryError: no CA of ours gives such a serial number; nothing was changed.
        AuthorityError: a CA cannot be unlocked; nothing was changed.
    """
    if (cert_serial.bit_length() + 7) // 8 not in profile.CERT_SERIAL_OCTETS or cert_serial >= CERT_SERIAL_MAX:
        raise RegistryError(
            f"could not revoke the certificate {cert_serial:x}: that is no serial number of a station's",
            hint="give it in hex, whole: `birthmark show ID` has it, or `birthmark doctor`",
        )
    with station.crl_lock():
        with station.registry.view() as view:
            known = view.by_cert_serial(cert_serial)
        signing = [ca.key_id for ca in station.cas.signing]
        unlock_all(station, signing if known is None else {*signing, known.issuer})
        with station.signing() as transaction:
            row = transaction.by_cert_serial(cert_serial) or lost_row(transaction, cert_serial)
            is_new = mark_revoked(transaction, row, reason, word=word, now=station.clock())
            changing = listing(read_cas(transaction), [row] if is_new else [])
        crls = sign_stale_crls(station, changing)
        with station.registry.view() as view:
            row = view.row(row.number) or row
    return Revocation((row,), int(is_new), crls)


def lost_row(transaction: Transaction, cert_serial: int, issuer: str = "") -> Row:
    """Add a row for a certificate of which only the serial number is known, so that it can be revoked.

    Args:
        transaction: of the caller.
        cert_serial: the certificate's.
        issuer: the key identifier of the CA that issued it; empty if that is not known, either.
    """
    return transaction.insert(
        kind=Kind.SERVICE,
        name=f"lost-{cert_serial:x}",
        role=LOST_ROLE,
        state=State.RESERVED,
        cert_serial=cert_serial,
        issuer=issuer,
    )


def _revocable(station: Station, name: str) -> list[Row]:
    with station.registry.view() as view:
        rows = view.named(name)
    if not rows:
        raise RegistryError(
            f"could not revoke {escaped(name, 64)}: there is no such identity",
            hint="list them with `birthmark list`",
        )
    certified = [row for row in rows if row.cert_serial is not None]
    if not certified:
        raise RegistryError(
            f"could not revoke {rows[-1].name}: it has no certificate yet ({rows[-1].state})",
            hint="nothing needs to be revoked",
        )
    return certified


def mark_revoked(transaction: Transaction, row: Row, reason: x509.ReasonFlags, *, word: str, now: datetime) -> int:
    """Revoke one row's certificate in a transaction of the caller, who then has a CRL signed.

    Returns:
        1, or 0 if there was nothing to revoke.
    """
    row = transaction.row(row.number) or row  # marking one row may have changed the next
    if row.cert_serial is None or row.is_revoked:
        return 0
    revoked = row.changed(revoked_at=now, revocation_reason=reason.value)
    if row.state is not State.VOID and not (row.kind is Kind.DEVICE and row.state is State.ATTESTED):
        revoked = revoked.changed(state=State.VOID, void_reason=f"revoked: {word or reason.value}")
    transaction.update(revoked)
    transaction.record(
        "revoke",
        row.name,
        row=row.number,
        cert_serial=f"{row.cert_serial:x}",
        reason=reason.value,
        word=word or reason.value,
    )
    return 1
