"""Putting a new CA in charge, and retiring the one whose place it took: the phases after `starting`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from cryptography import x509

from birthmark.device.errors import AuthorityError
from birthmark.provisioning.cas import Ca, CaKind, Cas, put_ca, read_cas
from birthmark.provisioning.crl_store import crl_number_counter
from birthmark.provisioning.gateway_receipts import standing_of
from birthmark.provisioning.registry.model import Kind
from birthmark.provisioning.revocation import mark_revoked
from birthmark.provisioning.rollover.census import Census, take_census

if TYPE_CHECKING:
    from collections.abc import Sequence

    from birthmark.provisioning.registry.interface import Transaction, View
    from birthmark.provisioning.registry.model import Row
    from birthmark.provisioning.station import Station

_NAMED: Final = 5
"""How many of those in the way are named."""


class RolloverRefusedError(AuthorityError):
    """A phase would cut somebody off, or its turn has not come."""

    exit_code = 3


def activate(station: Station, *, force: bool = False) -> Ca:
    """Have devices and services get their certificates from the new CA; brokers too, if its root is the old one.

    Raises:
        RolloverRefusedError: a gateway is not known to trust it, or there is no new one.
    """
    with station.rollover_lock(), station.registry.transaction() as transaction:
        cas = read_cas(transaction)
        new = new_issuing(cas)
        if new is None:
            raise refused("activate a new CA", "none was started", "see `birthmark ca rollover status`")
        if not force:
            _check_gateways(station, transaction, new)
        now = station.clock()
        same_root = new.root == cas.for_clients.root
        for ca in cas:
            if ca.clients or (same_root and ca.brokers):
                put_ca(transaction, replace(ca, clients=False, brokers=ca.brokers and not same_root))
        new = replace(new, clients=True, brokers=same_root, activated_at=now)
        put_ca(transaction, new)
        record(transaction, "ca-activate", new, forced=force or None)
        return new


def activate_for_brokers(station: Station, *, force: bool = False) -> Ca:
    """Have brokers get their certificates from the CA that issues for devices, if they do not already.

    Raises:
        RolloverRefusedError: a device or a service is not known to trust its root.
    """
    with station.rollover_lock(), station.registry.transaction() as transaction:
        cas = read_cas(transaction)
        current = cas.for_clients
        if current.brokers:
            return current
        if not force:
            lacking = take_census(station, transaction).distrusting(current.root)
            if lacking:
                raise refused(
                    f"let {current.short} issue for brokers",
                    f"{len(lacking)} do not hold its root yet: {_names(lacking)}",
                    "have devices renew, and services issued anew: `birthmark ca rollover status`",
                )
        put_ca(transaction, replace(cas.for_brokers, brokers=False))
        current = replace(current, brokers=True)
        put_ca(transaction, current)
        record(transaction, "ca-activate-brokers", current, forced=force or None)
        return current


def close_old(station: Station, kind: CaKind, *, force: bool = False) -> tuple[Ca, ...]:
    """Close the CAs that are to be retired: whatever they issued is revoked, for their last CRL.

    Returns:
        The issuing CAs that are closed, and for a root that root; none if they are retired already.

    Raises:
        RolloverRefusedError: somebody still uses what one of them issued, or trusts no other root.
    """
    with station.rollover_lock(), station.registry.transaction() as transaction:
        cas = read_cas(transaction)
        old = to_retire(cas, kind)
        if not old:
            if any(ca.kind is kind and not ca.is_standing for ca in cas):
                return ()  # a run of before may have been killed on its way to the gateways
            raise refused(f"retire the old {kind} CA", "there is none", "see `birthmark ca rollover status`")
        census = take_census(station, transaction)
        if not force:
            _check_unused(cas, old, kind, census)
        now = station.clock()
        closed = []
        for open_ca in old:
            ca = open_ca
            if ca.closed_at is None:
                count = 0
                for row in [*census.used(ca.key_id), *census.still_valid.get(ca.key_id, ())]:
                    flag = x509.ReasonFlags.superseded
                    count += mark_revoked(transaction, row, flag, word="its CA is retired", now=now)
                ca = replace(ca, closed_at=now)
                put_ca(transaction, ca)
                record(transaction, "ca-close", ca, revoked=count, forced=force or None)
            closed.append(ca)
        return tuple(closed)


def retire_closed(station: Station, closed: Sequence[Ca], *, force: bool = False) -> tuple[Ca, ...]:
    """Trust the closed CAs no more.

    Raises:
        RolloverRefusedError: a gateway has not confirmed the last CRL of one of them.
    """
    with station.rollover_lock(), station.registry.transaction() as transaction:
        lagging = sorted({name for ca in closed for name in _without_last_crl(station, transaction, ca)})
        if lagging and not force:
            raise refused(
                "retire the old CA",
                f"its last CRL is not confirmed by {', '.join(lagging)}",
                "bring these gateways back and run this again; --force leaves them behind",
            )
        retired = []
        for closed_ca in closed:
            ca = replace(closed_ca, retired_at=station.clock())
            put_ca(transaction, ca)
            record(transaction, "ca-retire", ca, forced=force or None)
            retired.append(ca)
        return tuple(retired)


def new_issuing(cas: Cas) -> Ca | None:
    """Return the issuing CA that was started and issues nothing yet."""
    return next((ca for ca in cas.issuing if ca.activated_at is None), None)


def to_retire(cas: Cas, kind: CaKind) -> tuple[Ca, ...]:
    """Return what retiring the old issuing CA, or the old root, is about; empty while it is not its turn."""
    current = cas.for_clients
    old = [ca for ca in cas.issuing if ca.activated_at is not None and not ca.clients and not ca.brokers]
    if kind is CaKind.ISSUING:
        return tuple(ca for ca in old if ca.root == current.root)
    roots = [ca for ca in cas.roots if ca.key_id not in {current.root, cas.for_brokers.root}]
    new = new_issuing(cas)
    roots = [ca for ca in roots if new is None or ca.key_id != new.root]
    return (*(ca for ca in old if any(ca.root == root.key_id for root in roots)), *roots)


def gateways_without(station: Station, view: View, ca: Ca) -> list[str]:
    """Return the station's gateways that are not known to trust an issuing CA."""
    names = [gateway.name for gateway in station.settings.gateways]
    return [name for name in names if ca.key_id not in standing_of(view, name).confirmed]


def _without_last_crl(station: Station, view: View, ca: Ca) -> list[str]:
    if ca.kind is CaKind.ROOT or ca.closed_at is None:
        return []
    lagging = []
    for gateway in station.settings.gateways:
        confirmed = standing_of(view, gateway.name).confirmed.get(ca.key_id)
        if confirmed is not None and confirmed.number < view.counter(crl_number_counter(ca.key_id)):
            lagging.append(gateway.name)
    return lagging


def _check_gateways(station: Station, view: View, new: Ca) -> None:
    if not station.settings.gateways:
        raise refused(
            f"activate {new.short}",
            "no gateway is configured, so none is known to trust it",
            "bring clients-ca.pem and crl.pem to each gateway, then give --force; or see `birthmark gateway add`",
        )
    lacking = gateways_without(station, view, new)
    if lacking:
        raise refused(
            f"activate {new.short}",
            f"{_text(lacking)} would turn away what it issues",
            "bring `birthmark ca export issuing` there as clients-ca.pem, then run `ca rollover start` again",
        )


def _check_unused(cas: Cas, old: Sequence[Ca], kind: CaKind, census: Census) -> None:
    for ca in old:
        users = census.used(ca.key_id)
        if users:
            counts = [_counted(len(of_kind), one) for one in Kind if (of_kind := census.used(ca.key_id, one))]
            raise refused(
                f"retire {ca.short}",
                f"{', '.join(counts)} still {'goes' if len(users) == 1 else 'go'} by it: {_names(users)}",
                "have devices renew, issue services and brokers anew with --renew, revoke what is lost;"
                " `birthmark ca rollover status --json` names them all",
            )
    lacking = census.distrusting(cas.for_clients.root) if kind is CaKind.ROOT else []
    if lacking:
        raise refused(
            "retire the old root",
            f"{len(lacking)} do not hold the new one: {_names(lacking)}",
            "have devices renew, and services issued anew with --renew",
        )


def record(transaction: Transaction, action: str, ca: Ca, **details: str | int | bool | None) -> None:
    """Put what became of a CA in the audit log."""
    transaction.record(
        action,
        f"{ca.kind}-ca",
        key_id=ca.key_id,
        root=ca.root,
        cert_serial=f"{ca.certificate.serial_number:x}",
        **details,
    )


def refused(what: str, cause: str, hint: str) -> RolloverRefusedError:
    """Return the error of a phase whose turn it is not."""
    return RolloverRefusedError(f"could not {what}: {cause}", hint=hint)


def _counted(count: int, kind: Kind) -> str:
    return f"{count} {kind}" if count == 1 else f"{count} {kind}s"


def _names(rows: Sequence[Row]) -> str:
    return _text(sorted({row.name for row in rows}))


def _text(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
