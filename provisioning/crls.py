"""The CRLs of a station's CAs: what they list, and how they are signed and kept.

Rules:

- Each issuing CA has a CRL of its own, with numbers and times of its own, which lists what that CA issued. All of
  them are in one file, so that a gateway gets them together; one that nothing changed for is left as it is.
- A CRL's number is durable before it is signed, and rises strictly: two CRLs of a CA never share one. thisUpdate
  never falls; it is backdated by an hour for gateways whose clock is late.
- A CA whose key was given up for lost keeps its last CRL; the others go on.
- A clock that went back stops no revocation. If a CRL was signed at a later time than now, the next one
  goes by the clock as it is, and `clock_trouble` says so: a gateway that has the later one refuses it, visibly.
- A CRL lists every revoked certificate until `[crl] keep_expired_days` after its end: so long a gateway whose
  clock is late, or one that still renews what has expired, would let it in. It goes no sooner than it has been on
  a CRL issued after its end (RFC 5280 section 3.3).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final, cast

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from birthmark.device.durable import remove_leftovers, write_durably
from birthmark.device.errors import BirthmarkError
from birthmark.device.pem import CRL, block, read_blocks
from birthmark.provisioning import profile
from birthmark.provisioning.cas import SHORT, Ca, CaKind, read_cas
from birthmark.provisioning.registry.interface import moment
from birthmark.provisioning.station import ROOT_CRL_FILE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime
    from pathlib import Path

    from birthmark.provisioning.registry.interface import Transaction, View
    from birthmark.provisioning.registry.model import RevokedCertificate
    from birthmark.provisioning.station import Station

CRL_FILE_MODE: Final = 0o644


@dataclass(frozen=True, slots=True)
class StoredCrl:
    """A signed CRL of one CA."""

    issuer: str
    """The CA's subject key identifier, lower-case hex."""
    number: int
    der: bytes
    this_update: datetime
    next_update: datetime
    cert_serials: frozenset[int]

    @property
    def pem(self) -> bytes:
        """The CRL as PEM."""
        return block(CRL, self.der)

    @property
    def sha256(self) -> str:
        """Of the DER, in lower-case hex."""
        return hashlib.sha256(self.der).hexdigest()


@dataclass(frozen=True, slots=True)
class CrlSet:
    """The CRLs of the issuing CAs that are trusted, as they are in their file; at least one."""

    path: Path
    crls: tuple[StoredCrl, ...]
    """That of the CA which issues for devices now comes first."""

    @property
    def current(self) -> StoredCrl:
        """That of the CA which issues for devices now."""
        return self.crls[0]

    @property
    def pem(self) -> bytes:
        """What is in the file."""
        return b"".join(crl.pem for crl in self.crls)

    @property
    def cert_serials(self) -> frozenset[int]:
        """What is on any of them."""
        return frozenset().union(*(crl.cert_serials for crl in self.crls))

    @property
    def next_update(self) -> datetime:
        """When the first of them ends."""
        return min(crl.next_update for crl in self.crls)

    def shown(self) -> str:
        """Return their numbers, for people: `CRL 7`, or with the CAs' identifiers if there are several."""
        if len(self.crls) == 1:
            return f"CRL {self.current.number}"
        return " and ".join(f"CRL {crl.number} of {crl.issuer[:SHORT]}" for crl in self.crls)

    def records(self) -> list[dict[str, object]]:
        """Return a JSON object for each."""
        return [
            {
                "issuer": crl.issuer,
                "number": crl.number,
                "entries": len(crl.cert_serials),
                "next_update": crl.next_update.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
            for crl in self.crls
        ]


@dataclass(frozen=True, slots=True)
class _Plan:
    """A CRL that has its number, and is still to be signed."""

    issuer: str
    number: int
    this_update: datetime
    next_update: datetime
    revoked: tuple[profile.Revoked, ...]


def clock_trouble(station: Station) -> str:
    """Say that the clock contradicts the CRLs signed so far; empty if it does not."""
    with station.registry.view() as view:
        last = max(moment(view, crl_this_update_counter(ca.key_id)) for ca in read_cas(view).issuing)
    now = station.clock()
    if last <= now:
        return ""
    return (
        f"this station's clock says {now:%Y-%m-%d %H:%M}, but it signed a CRL dated {last:%Y-%m-%d %H:%M}: "
        "it is wrong now, or was then; a gateway that holds that CRL refuses this one, and says so"
    )


def up_to_date_crl(station: Station) -> CrlSet:
    """Return the station's CRLs; new ones for those that are not complete, or past half of their life.

    Raises:
        AuthorityError: a new one is needed, and cannot be signed.
    """
    stale, crls = stale_crls(station)
    if crls is not None and not stale:
        return crls
    with station.crl_lock():
        return sign_stale_crls(station)


def sign_and_store_crl(station: Station) -> CrlSet:
    """Sign new CRLs with everything that is revoked, and put them in the station's `crl.pem`.

    Raises:
        AuthorityError: a CA cannot be unlocked.
    """
    with station.crl_lock():
        return _sign(station, station.cas.signing)


def sign_root_crl(station: Station, root: profile.Issuer) -> Path:
    """Sign a root's own CRL, which lists the issuing CAs under it that were retired, and return its path.

    Only `openssl verify -crl_check_all` and linters look at it.
    """
    with station.crl_lock():
        now = station.clock()
        with station.registry.transaction() as transaction:
            cas = read_cas(transaction)
            ca = cas.get(profile.key_id(root.certificate).hex())
            number, this_update = _next(transaction, ca, now)
            retired = [
                profile.Revoked(one.certificate.serial_number, one.retired_at, x509.ReasonFlags.superseded)
                for one in cas
                if one.kind is CaKind.ISSUING and one.root == ca.key_id and one.retired_at is not None
            ]
            transaction.record("crl", "root-ca", number=number, entries=len(retired), issuer=ca.key_id)
        crl = profile.revocation_list(
            root,
            number=number,
            this_update=this_update,
            next_update=now + profile.ROOT_CRL_LIFETIME,
            revoked=retired,
        )
        path = station.folder / ROOT_CRL_FILE
        new = _stored(crl)
        kept = [old for old in _read(path, cas.roots) if old.issuer != ca.key_id]
        _write(path, b"".join(each.pem for each in (new, *kept) if each is not None))
        return path


def current_crl(station: Station) -> CrlSet | None:
    """Return the CRLs in the station's `crl.pem`; None if one of them is missing or damaged (sign new ones).

    That of a CA that has issued nothing yet may be missing.
    """
    issuing = station.cas.issuing
    return _whole(station, issuing, {crl.issuer: crl for crl in _read(station.crl_path, issuing)})


def _whole(station: Station, issuing: Iterable[Ca], found: Mapping[str, StoredCrl]) -> CrlSet | None:
    if any(ca.key_id not in found and ca.activated_at is not None for ca in issuing):
        return None
    return CrlSet(station.crl_path, tuple(found[ca.key_id] for ca in issuing if ca.key_id in found))


def successor(station_cas: Iterable[Ca], crls: CrlSet) -> CrlSet | None:
    """Return the CRLs that are in the file of `crls` by now, if another command has signed a newer one."""
    before = {crl.issuer: crl.number for crl in crls.crls}
    found = tuple(_read(crls.path, station_cas))
    newer = any(crl.number > before.get(crl.issuer, 0) for crl in found)
    return CrlSet(crls.path, found) if newer else None


def _read(path: Path, cas: Iterable[Ca]) -> list[StoredCrl]:
    """Return the CRLs in a file, of those CAs, that are whole and signed by them."""
    cas = tuple(cas)
    try:
        blocks = [der for label, der in read_blocks(path.read_bytes()) if label == CRL]
    except (OSError, BirthmarkError):
        return []
    found = (signed_crl(der, cas) for der in blocks)
    return [crl for crl in found if crl is not None]


def signed_crl(der: bytes, cas: Iterable[Ca]) -> StoredCrl | None:
    """Return a CRL that one of these CAs signed; None if it is none."""
    try:
        crl = x509.load_der_x509_crl(der)
        stored = _stored(crl)
        ca = None if stored is None else next((each for each in cas if each.key_id == stored.issuer), None)
        if ca is None or not crl.is_signature_valid(cast(EllipticCurvePublicKey, ca.certificate.public_key())):
            return None
    except ValueError:
        return None
    return stored


def _stored(crl: x509.CertificateRevocationList) -> StoredCrl | None:
    try:
        number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        issuer = crl.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return None
    next_update = crl.next_update_utc
    if next_update is None or issuer is None:
        return None
    return StoredCrl(
        issuer=issuer.hex(),
        number=number,
        der=crl.public_bytes(Encoding.DER),
        this_update=crl.last_update_utc,
        next_update=next_update,
        cert_serials=frozenset(entry.serial_number for entry in crl),
    )


def stale_crls(station: Station) -> tuple[list[Ca], CrlSet | None]:
    """Return the CAs that need a new CRL (none, not complete, or past half of its life), and what is there."""
    with station.registry.view() as view:
        issuing = read_cas(view).issuing
        found = {crl.issuer: crl for crl in _read(station.crl_path, issuing)}
        listed = _listed(station, view, issuing)
    now = station.clock()

    def is_fresh(ca: Ca) -> bool:
        if ca.lost_at is not None:
            return True  # nobody can sign another one
        crl = found.get(ca.key_id)
        if crl is None or (ca.closed_at is not None and crl.next_update < ca.certificate.not_valid_after_utc):
            return False
        return crl.next_update - now >= profile.CRL_LIFETIME / 2 and (
            all(row.cert_serial in crl.cert_serials for row in listed[ca.key_id])
        )

    stale = [ca for ca in issuing if not is_fresh(ca)]
    return stale, _whole(station, issuing, found)


def kept_crls(station: Station, view: View) -> list[tuple[Ca, StoredCrl | None, int]]:
    """Return each CA that is trusted with its CRL as it is kept, and how many revoked certificates that lacks."""
    cas = read_cas(view)
    issuing = {crl.issuer: crl for crl in _read(station.crl_path, cas.issuing)}
    roots = {crl.issuer: crl for crl in _read(station.folder / ROOT_CRL_FILE, cas.roots)}
    listed = _listed(station, view, cas.issuing)
    kept: list[tuple[Ca, StoredCrl | None, int]] = []
    for ca in cas.issuing:
        crl = issuing.get(ca.key_id)
        on_it = frozenset[int]() if crl is None else crl.cert_serials
        kept.append((ca, crl, sum(row.cert_serial not in on_it for row in listed[ca.key_id])))
    return kept + [(ca, roots.get(ca.key_id), 0) for ca in cas.roots]


def _listed(station: Station, view: View, issuing: Iterable[Ca]) -> dict[str, list[RevokedCertificate]]:
    """Return what each of these CAs' next CRL lists: what is revoked, but for what expired long ago.

    What some other software recorded without a CA is on all of them.
    """
    now = station.clock()
    margin = timedelta(days=station.settings.keep_expired_days)
    lists: dict[str, list[RevokedCertificate]] = {ca.key_id: [] for ca in issuing}
    last = {ca.key_id: moment(view, crl_this_update_counter(ca.key_id)) for ca in issuing}
    known = {ca.key_id for ca in read_cas(view)}
    for row in view.revocations():
        for key_id in [row.issuer] if row.issuer in known else lists:
            if key_id in lists and not _is_over(row, last[key_id], now, margin):
                lists[key_id].append(row)
    return lists


def _is_over(row: RevokedCertificate, told: datetime, now: datetime, margin: timedelta) -> bool:
    """Whether a revoked certificate may leave the CRL, the last one of which was dated `told`."""
    if row.not_after is None or not row.not_after + margin < now:
        return False
    return max(row.not_after, row.revoked_at) < told <= now


def crl_number_counter(key_id: str) -> str:
    """Return the name of the registry's counter of a CA's CRL numbers: the number of the last one."""
    return f"crl_number {key_id}"


def crl_this_update_counter(key_id: str) -> str:
    """Return the name of the registry's counter of a CA's last thisUpdate, in seconds since 1970."""
    return f"crl_this_update {key_id}"


def unlock_all(station: Station, key_ids: Iterable[str]) -> None:
    """Unlock those of the trusted issuing CAs; raises `AuthorityError` if one cannot be, or its token is away."""
    standing = {ca.key_id for ca in station.cas.issuing}
    for key_id in sorted(standing.intersection(key_ids)):
        station.check_key(key_id)


def sign_stale_crls(station: Station) -> CrlSet:
    """Sign those CRLs that need it (`stale_crls`). The caller holds the CRL lock."""
    stale, crls = stale_crls(station)
    if not stale and crls is not None:
        return crls
    return _sign(station, stale)


def _sign(station: Station, cas: Iterable[Ca]) -> CrlSet:
    """Sign these CAs' CRLs, and put them in the file beside the others'. The caller holds the CRL lock."""
    wanted = [ca.key_id for ca in cas]
    unlock_all(station, wanted)  # a wrong passphrase must stop this before a number is taken
    with station.signing() as transaction:
        issuing = read_cas(transaction).issuing
        chosen = [ca for ca in issuing if ca.key_id in wanted]
        plans = _plan(station, transaction, chosen)
    signed = {plan.issuer: _signed(station, plan) for plan in plans}
    kept = {crl.issuer: crl for crl in _read(station.crl_path, issuing)}
    found = {**kept, **signed}
    crls = CrlSet(station.crl_path, tuple(found[ca.key_id] for ca in issuing if ca.key_id in found))
    _write(station.crl_path, crls.pem)
    return crls


def _plan(station: Station, transaction: Transaction, cas: list[Ca]) -> list[_Plan]:
    """Take the next numbers and times, durable with the transaction, and everything that is revoked."""
    now = station.clock()
    lists = _listed(station, transaction, cas)
    plans = []
    for ca in cas:
        number, this_update = _next(transaction, ca, now)
        revoked = tuple(_revocation_of(row) for row in lists[ca.key_id])
        transaction.record("crl", "issuing-ca", number=number, entries=len(revoked), issuer=ca.key_id)
        # The last CRL of a CA says all that will ever be said of it.
        next_update = ca.certificate.not_valid_after_utc if ca.closed_at else now + profile.CRL_LIFETIME
        plans.append(_Plan(ca.key_id, number, this_update, next_update, revoked))
    return plans


def _revocation_of(row: RevokedCertificate) -> profile.Revoked:
    return profile.Revoked(row.cert_serial, row.revoked_at, x509.ReasonFlags(row.revocation_reason))


def _next(transaction: Transaction, ca: Ca, now: datetime) -> tuple[int, datetime]:
    number_name, time_name = crl_number_counter(ca.key_id), crl_this_update_counter(ca.key_id)
    number = transaction.counter(number_name) + 1
    last = moment(transaction, time_name)
    this_update = (now - profile.CRL_BACKDATED).replace(microsecond=0)
    if last <= now:
        this_update = max(this_update, min(last + profile.ONE_SECOND, now.replace(microsecond=0)))
        transaction.set_counter(time_name, int(this_update.timestamp()))
    transaction.set_counter(number_name, number)
    return number, this_update


def _signed(station: Station, plan: _Plan) -> StoredCrl:
    der = station.authority_of(plan.issuer).sign_crl(
        number=plan.number, this_update=plan.this_update, next_update=plan.next_update, revoked=plan.revoked
    )
    return StoredCrl(
        issuer=plan.issuer,
        number=plan.number,
        der=der,
        this_update=plan.this_update,
        next_update=plan.next_update,
        cert_serials=frozenset(item.cert_serial for item in plan.revoked),
    )


def _write(path: Path, crl_pem: bytes) -> None:
    """Write a CRL of the station's. The caller holds its CRL lock."""
    remove_leftovers(path.parent, path.name)
    write_durably(path, crl_pem, mode=CRL_FILE_MODE)
