"""The CRLs of a station's CAs: what they list, and how they are signed and kept.

Rules:

- Each issuing CA has a CRL of its own, with numbers and times of its own, which lists what that CA issued. All of
  them are in one file, so that a gateway gets them together; one that nothing changed for is left as it is.
  Where they are kept, and which one is the newest: `crl_store`.
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

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from cryptography import x509

from birthmark.provisioning import profile
from birthmark.provisioning.cas import Ca, CaKind, read_cas
from birthmark.provisioning.crl_store import (
    CrlSet,
    StoredCrl,
    crl_number_counter,
    is_in_file,
    keep_signed,
    last_number,
    newest_crls,
    put_in_file,
    read_crl_file,
    stored_crl,
    whole,
    write_crl_file,
)
from birthmark.provisioning.crl_template import entry
from birthmark.provisioning.key_derivation import is_under_way
from birthmark.provisioning.registry.interface import moment
from birthmark.provisioning.registry.model import REVOKED_AT_HAND
from birthmark.provisioning.station import ROOT_CRL_FILE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from datetime import datetime
    from pathlib import Path

    from birthmark.provisioning.cas import Cas
    from birthmark.provisioning.registry.interface import Transaction, View
    from birthmark.provisioning.registry.model import RevokedCertificate, Row
    from birthmark.provisioning.station import Station


_REASONS: Final = {flag.value: flag for flag in x509.ReasonFlags}


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
    if crls is not None and not stale and is_in_file(crls):
        return crls
    with station.crl_lock():
        return sign_stale_crls(station)


def sign_and_store_crl(station: Station) -> CrlSet:
    """Sign new CRLs with everything that is revoked, and put them in the station's `crl.pem`.

    Raises:
        AuthorityError: a CA cannot be unlocked.
    """
    with station.crl_lock():
        read_ahead(station)
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
        new = stored_crl(crl)
        kept = [old for old in read_crl_file(path, cas.roots) if old.issuer != ca.key_id]
        write_crl_file(path, b"".join(each.pem for each in (new, *kept) if each is not None))
        return path


def stale_crls(station: Station, changing: Collection[str] = ()) -> tuple[list[Ca], CrlSet | None]:
    """Return the CAs that need a new CRL, and what is there.

    A CA needs one that has none, or whose CRL is not the last one, not complete, or past half of its life.

    Args:
        station: whose CAs.
        changing: the key identifiers of CAs that need one whatever there is (`listing`): with most entries, what
            takes longest is to look at what there is. None is returned of it then.
    """
    with station.registry.view() as view:
        issuing = read_cas(view).issuing
        asked = [ca for ca in issuing if ca.key_id not in changing]
        found = newest_crls(station, view, asked)
        last = {ca.key_id: last_number(view, ca) for ca in asked}
        listed = _listed(station, view, asked)
    now = station.clock()

    def is_fresh(ca: Ca) -> bool:
        if ca.lost_at is not None:
            return True  # nobody can sign another one
        crl = found.get(ca.key_id)
        if crl is None or crl.number < last[ca.key_id]:
            return False
        if ca.closed_at is not None and crl.next_update < ca.certificate.not_valid_after_utc:
            return False
        return crl.next_update - now >= profile.CRL_LIFETIME / 2 and (
            all(row.cert_serial in crl.cert_serials for row in listed[ca.key_id])
        )

    stale = [ca for ca in issuing if ca.key_id in changing or not is_fresh(ca)]
    return stale, None if changing else whole(station, issuing, found)


def listing(cas: Cas, rows: Iterable[Row]) -> frozenset[str]:
    """Return the key identifiers of the CAs whose next CRL lists these rows' certificates, being revoked now.

    Not those that sign none any more.
    """
    issuers, signing = {row.issuer for row in rows}, frozenset(ca.key_id for ca in cas.signing)
    return signing & issuers if issuers <= {ca.key_id for ca in cas} else signing


@dataclass(frozen=True, slots=True)
class KeptCrl:
    """What there is of the CRL of a CA that is trusted."""

    ca: Ca
    crl: StoredCrl | None
    """The newest one that is kept."""
    last_number: int
    """The last number that was given out."""
    missing: int = 0
    """How many revoked certificates it lacks."""


def kept_crls(station: Station, view: View) -> list[KeptCrl]:
    """Return what is kept of each trusted CA's CRL, without signing anything."""
    cas = read_cas(view)
    issuing = newest_crls(station, view, cas.issuing)
    roots = {crl.issuer: crl for crl in read_crl_file(station.folder / ROOT_CRL_FILE, cas.roots)}
    listed = _listed(station, view, cas.issuing)
    kept = []
    for ca in cas.issuing:
        crl = issuing.get(ca.key_id)
        on_it = frozenset[int]() if crl is None else crl.cert_serials
        missing = sum(row.cert_serial not in on_it for row in listed[ca.key_id])
        kept.append(KeptCrl(ca, crl, last_number(view, ca), missing))
    return kept + [KeptCrl(ca, roots.get(ca.key_id), last_number(view, ca)) for ca in cas.roots]


def _listed(station: Station, view: View, issuing: Iterable[Ca]) -> dict[str, list[RevokedCertificate]]:
    """Return what each of these CAs' next CRL lists: what is revoked, but for what expired long ago.

    What some other software recorded without a CA is on all of them.
    """
    issuing = tuple(issuing)
    if not issuing:
        return {}
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


def crl_this_update_counter(key_id: str) -> str:
    """Return the name of the registry's counter of a CA's last thisUpdate, in seconds since 1970."""
    return f"crl_this_update {key_id}"


def read_ahead(station: Station) -> None:
    """Read what is revoked, and make the CRL's entries of it, while a key is being derived.

    What is signed is read in the transaction that takes the CRL's number; most of it is at hand then.
    """
    if not is_under_way():
        return
    with station.registry.view() as view:
        if view.count(revoked=True) <= REVOKED_AT_HAND:
            for row in view.revocations():
                entry(*_revocation_of(row))


def unlock_all(station: Station, key_ids: Iterable[str]) -> None:
    """Unlock those of the trusted issuing CAs; raises `AuthorityError` if one cannot be, or its token is away."""
    standing = {ca.key_id for ca in station.cas.issuing}
    for key_id in sorted(standing.intersection(key_ids)):
        station.check_key(key_id)


def sign_stale_crls(station: Station, changing: Collection[str] = ()) -> CrlSet:
    """Sign those CRLs that need it (`stale_crls`). The caller holds the CRL lock."""
    stale, crls = stale_crls(station, changing)
    if stale or crls is None:
        return _sign(station, stale)
    put_in_file(crls)
    return crls


def _sign(station: Station, cas: Iterable[Ca]) -> CrlSet:
    """Sign these CAs' CRLs, and keep them beside the others'. The caller holds the CRL lock."""
    wanted = [ca.key_id for ca in cas]
    unlock_all(station, wanted)  # a wrong passphrase must stop this before a number is taken
    with station.signing() as transaction:
        issuing = read_cas(transaction).issuing
        chosen = [ca for ca in issuing if ca.key_id in wanted]
        plans = _plan(station, transaction, chosen)
    return keep_signed(station, {plan.issuer: _signed(station, plan) for plan in plans})


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
    return profile.Revoked(row.cert_serial, row.revoked_at, _REASONS[row.revocation_reason])


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
