"""Revoking identities, and the CRL that says so.

Rules:

- A revocation is durable in the registry before the CRL that carries it is signed. After a kill in between, the
  next CRL, of whatever command, carries it.
- The CRL's number is durable before it is signed, and rises strictly: two CRLs never share one. thisUpdate never
  falls; it is backdated by an hour for gateways whose clock is late.
- A clock that went back stops no revocation. If a CRL was signed at a later time than now, the next one goes by
  the clock as it is, and `clock_trouble` says so: a gateway that installed the later one refuses it, visibly.
- The CRL lists every certificate ever revoked. Entries of expired certificates stay: a gateway whose clock is
  wrong would let them in again.
- Revoking again changes nothing and delivers again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, cast

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from birthmark.device.durable import remove_leftovers, write_durably
from birthmark.device.errors import RegistryError
from birthmark.device.escape import escaped
from birthmark.device.pem import CRL, block
from birthmark.provisioning import profile
from birthmark.provisioning.registry.interface import moment
from birthmark.provisioning.registry.model import Kind, Row, State
from birthmark.provisioning.station import ROOT_CRL_FILE

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from birthmark.provisioning.registry.interface import Transaction
    from birthmark.provisioning.station import Station

CRL_NUMBER: Final = "crl_number"
CRL_THIS_UPDATE: Final = "crl_this_update"
ROOT_CRL_NUMBER: Final = "root_crl_number"
ROOT_CRL_THIS_UPDATE: Final = "root_crl_this_update"
CRL_FILE_MODE: Final = 0o644

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
class StoredCrl:
    """A signed CRL, as it is in its file."""

    number: int
    der: bytes
    path: Path
    this_update: datetime
    next_update: datetime
    cert_serials: frozenset[int]

    @property
    def pem(self) -> bytes:
        """The CRL as PEM, as it is in the file."""
        return block(CRL, self.der)

    @property
    def sha256(self) -> str:
        """Of the DER, in lower-case hex."""
        return hashlib.sha256(self.der).hexdigest()


@dataclass(frozen=True, slots=True)
class _Plan:
    """A CRL that has its number, and is still to be signed."""

    number: int
    this_update: datetime
    next_update: datetime
    revoked: tuple[profile.Revoked, ...]


@dataclass(frozen=True, slots=True)
class Revocation:
    """What `revoke` did."""

    rows: tuple[Row, ...]
    """Every certificate of the identity; all are revoked now."""
    newly: int
    """How many of them were not before."""
    crl: StoredCrl


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
        crl = _fresh_crl(station)
        if crl is not None and all(row.is_revoked for row in rows):
            return Revocation(tuple(rows), 0, crl)
        _ = station.authority  # a wrong passphrase must stop this before anything is changed
        newly = 0
        with station.registry.transaction() as transaction:
            for row in transaction.named(name):
                newly += mark_revoked(transaction, row, reason, word=word, now=station.clock())
        # A transaction of its own: whatever stops the CRL, the revocation stands, and the next CRL carries it.
        with station.registry.transaction() as transaction:
            plan = _plan(transaction, station.clock())
        crl = _sign_and_store(station, plan)
        with station.registry.view() as view:
            rows = [row for row in view.named(name) if row.is_revoked]
    return Revocation(tuple(rows), newly, crl)


def clock_trouble(station: Station) -> str:
    """Say that the clock contradicts the CRLs signed so far; empty if it does not."""
    with station.registry.view() as view:
        last = moment(view, CRL_THIS_UPDATE)
    now = station.clock()
    if last <= now:
        return ""
    return (
        f"this station's clock says {now:%Y-%m-%d %H:%M}, but it signed a CRL dated {last:%Y-%m-%d %H:%M}: "
        "it is wrong now, or was then; a gateway that holds that CRL refuses this one, and says so"
    )


def up_to_date_crl(station: Station) -> StoredCrl:
    """Return the station's CRL; a new one if it is not complete, or past half of its life.

    Raises:
        AuthorityError: a new one is needed, and cannot be signed.
    """
    return _fresh_crl(station) or sign_and_store_crl(station)


def sign_and_store_crl(station: Station) -> StoredCrl:
    """Sign a new CRL with everything that is revoked, and put it in the station's `crl.pem`.

    Raises:
        AuthorityError: the CA cannot be unlocked.
    """
    with station.crl_lock():
        _ = station.authority  # a wrong passphrase must stop this before a number is taken
        with station.registry.transaction() as transaction:
            plan = _plan(transaction, station.clock())
        return _sign_and_store(station, plan)


def sign_root_crl(station: Station, root: profile.Issuer) -> Path:
    """Sign the root's own CRL (empty: no issuing CA was ever revoked) and return its path.

    Only `openssl verify -crl_check_all` and linters look at it.
    """
    with station.crl_lock():
        now = station.clock()
        with station.registry.transaction() as transaction:
            number, this_update = _next(transaction, ROOT_CRL_NUMBER, ROOT_CRL_THIS_UPDATE, now)
            transaction.record("crl", "root-ca", number=number, entries=0)
        crl = profile.revocation_list(
            root, number=number, this_update=this_update, next_update=now + profile.ROOT_CRL_LIFETIME, revoked=()
        )
        path = station.folder / ROOT_CRL_FILE
        _write(path, crl.public_bytes(Encoding.PEM))
        return path


def current_crl(station: Station) -> StoredCrl | None:
    """Return the CRL in the station's `crl.pem`; None if it is not there or damaged (sign a new one)."""
    crl = _read(station.crl_path)
    if crl is None or not crl.is_signature_valid(cast(EllipticCurvePublicKey, station.issuing.public_key())):
        return None
    return _stored(crl, station.crl_path)


def successor(crl: StoredCrl) -> StoredCrl | None:
    """Return the CRL that is in the file of `crl` by now, if another command has signed a newer one."""
    found = _read(crl.path)
    stored = None if found is None else _stored(found, crl.path)
    return stored if stored is not None and stored.number > crl.number else None


def _read(path: Path) -> x509.CertificateRevocationList | None:
    try:
        return x509.load_pem_x509_crl(path.read_bytes())
    except (OSError, ValueError):
        return None


def _stored(crl: x509.CertificateRevocationList, path: Path) -> StoredCrl | None:
    try:
        number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return None
    next_update = crl.next_update_utc
    if next_update is None:
        return None
    return StoredCrl(
        number=number,
        der=crl.public_bytes(Encoding.DER),
        path=path,
        this_update=crl.last_update_utc,
        next_update=next_update,
        cert_serials=frozenset(entry.serial_number for entry in crl),
    )


def _fresh_crl(station: Station) -> StoredCrl | None:
    """Return the current CRL if it lists everything that is revoked and has more than half of its life left."""
    crl = current_crl(station)
    if crl is None or crl.next_update - station.clock() < profile.CRL_LIFETIME / 2:
        return None
    with station.registry.view() as view:
        complete = all(row.cert_serial in crl.cert_serials for row in view.revoked())
    return crl if complete else None


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
    revoked = replace(row, revoked_at=now, revocation_reason=reason.value)
    if row.state is not State.VOID and not (row.kind is Kind.DEVICE and row.state is State.ATTESTED):
        revoked = replace(revoked, state=State.VOID, void_reason=f"revoked: {word or reason.value}")
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


def _plan(transaction: Transaction, now: datetime) -> _Plan:
    """Take the next number and time, durable with the transaction, and everything that is revoked."""
    number, this_update = _next(transaction, CRL_NUMBER, CRL_THIS_UPDATE, now)
    revoked = [profile.Revoked(*_revocation_of(row)) for row in transaction.revoked()]
    transaction.record("crl", "issuing-ca", number=number, entries=len(revoked))
    return _Plan(number, this_update, now + profile.CRL_LIFETIME, tuple(revoked))


def _revocation_of(row: Row) -> tuple[int, datetime, x509.ReasonFlags]:
    if row.cert_serial is None or row.revoked_at is None:
        raise RegistryError(f"could not list row {row.number} on the CRL: it is not revoked")
    return row.cert_serial, row.revoked_at, x509.ReasonFlags(row.revocation_reason)


def _next(transaction: Transaction, number_name: str, time_name: str, now: datetime) -> tuple[int, datetime]:
    number = transaction.counter(number_name) + 1
    last = moment(transaction, time_name)
    this_update = (now - profile.CRL_BACKDATED).replace(microsecond=0)
    if last <= now:
        this_update = max(this_update, min(last + profile.ONE_SECOND, now.replace(microsecond=0)))
        transaction.set_counter(time_name, int(this_update.timestamp()))
    transaction.set_counter(number_name, number)
    return number, this_update


def _sign_and_store(station: Station, plan: _Plan) -> StoredCrl:
    der = station.authority.sign_crl(
        number=plan.number, this_update=plan.this_update, next_update=plan.next_update, revoked=plan.revoked
    )
    crl = StoredCrl(
        number=plan.number,
        der=der,
        path=station.crl_path,
        this_update=plan.this_update,
        next_update=plan.next_update,
        cert_serials=frozenset(item.cert_serial for item in plan.revoked),
    )
    _write(station.crl_path, crl.pem)
    return crl


def _write(path: Path, crl_pem: bytes) -> None:
    """Write a CRL of the station's. The caller holds its CRL lock."""
    remove_leftovers(path.parent, path.name)
    write_durably(path, crl_pem, mode=CRL_FILE_MODE)
