"""The CRLs on their way from the station to its gateways, on the record."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from birthmark.provisioning.cas import SHORT
from birthmark.provisioning.crl_store import CrlSet, current_crl, successor
from birthmark.provisioning.crls import sign_and_store_crl, up_to_date_crl
from birthmark.provisioning.delivery import Delivery, Outcome
from birthmark.provisioning.gateway_receipts import note_deliveries, standing_of
from birthmark.provisioning.gateways import DEFAULT_TIMEOUT_S, deliver

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from datetime import datetime

    from birthmark.device.console import Console
    from birthmark.provisioning.gateway_settings import Gateway
    from birthmark.provisioning.policy_delivery import PolicyDelivery
    from birthmark.provisioning.station import Station


@dataclass(frozen=True, slots=True)
class Brought:
    """CRLs, and what became of them at every gateway."""

    crls: CrlSet
    deliveries: tuple[Delivery, ...]

    def record(self) -> dict[str, Any]:
        """Return this as a JSON object."""
        return {
            "event": "crl",
            "crl_number": self.crls.current.number,
            "crl_path": str(self.crls.path),
            "entries": len(self.crls.cert_serials),
            "crls": self.crls.records(),
            "gateways": [delivery.record() for delivery in self.deliveries],
        }

    def described(self) -> str:
        """Return this as lines for people."""
        head = f"revoked certificates are on {self.crls.shown()}, {self.crls.path}"
        return "\n".join([head, *(f"  {delivery.described()}" for delivery in self.deliveries)])


def deliver_crl(
    station: Station,
    crls: CrlSet,
    timeout_s: float,
    *,
    gateways: Sequence[Gateway] | None = None,
    again: bool = False,
) -> list[Delivery]:
    """Bring the CRLs to every gateway of the station (or to these), and put what became of them on record.

    With `again`, what is wrong at a gateway still is not put on record another time.
    """
    gateways = station.settings.gateways if gateways is None else gateways
    station.publish_certificates()
    begun = station.clock()
    deliveries = deliver(
        gateways,
        crls,
        station.cas,
        successor=partial(successor, station),
        anchors_path=station.root_path,
        upstreams=station.settings.upstreams,
        timeout_s=timeout_s,
    )
    told = [delivery for delivery in deliveries if not (again and _is_known(station, delivery))]
    if told:
        numbers = " ".join(f"{crl.issuer[:SHORT]}:{crl.number}" for crl in crls.crls)
        with station.registry.transaction() as transaction:
            note_deliveries(transaction, told, crls, station.clock())
            for delivery in told:
                transaction.record(
                    "deliver",
                    delivery.gateway,
                    number=crls.current.number,
                    crls=numbers if len(crls.crls) > 1 else None,
                    outcome=delivery.outcome.value,
                    cause=delivery.cause or None,
                )
    return _with_since(station, deliveries, begun)


def _with_since(station: Station, deliveries: Sequence[Delivery], now: datetime) -> list[Delivery]:
    """Say of each that is not done since when that is so, if not since `now`."""
    with station.registry.view() as view:
        troubled = [standing_of(view, delivery.gateway).trouble_since for delivery in deliveries]
    return [
        replace(delivery, since=since) if since is not None and since < now else delivery
        for delivery, since in zip(deliveries, troubled, strict=True)
    ]


def _is_known(station: Station, delivery: Delivery) -> bool:
    with station.registry.view() as view:
        standing = standing_of(view, delivery.gateway)
    is_confirmed = all(receipt.crl_sha256 == standing.sha256(receipt.issuer) for receipt in delivery.receipts)
    return standing.trouble == delivery.cause and is_confirmed


def warn_of_pending(console: Console, deliveries: Sequence[Delivery]) -> bool:
    """Warn of the gateways that have not got a CRL; return whether every one has."""
    pending = [delivery for delivery in deliveries if delivery.outcome is not Outcome.DONE]
    if pending:
        names = ", ".join(delivery.gateway for delivery in pending)
        console.warn(f"not every gateway has it ({names}): `birthmark crl` tries again")
    warn_of_missed(console, deliveries, "birthmark crl")
    return not pending


def warn_of_missed(console: Console, deliveries: Iterable[Delivery | PolicyDelivery], again: str) -> None:
    """Warn of the servers of upstreams that were not brought what gateways may look for there."""
    for missed in dict.fromkeys(missed for delivery in deliveries for missed in delivery.missed):
        console.warn(f"{missed}: who comes to it may hear something older; `{again}` tries again")


def bring_missing(station: Station, console: Console, revoked: Mapping[int, str]) -> bool:
    """Do as `bring_new_crl` unless every one of these is on the station's CRLs.

    Args:
        station: whose CRLs they are to be on.
        console: where it is said.
        revoked: serial numbers of revoked certificates, and the key identifier of the CA that issued each.

    Returns:
        Whether there was nothing to do, or every gateway has the new CRLs.

    Raises:
        AuthorityError: a CA cannot be unlocked.
    """
    if not revoked:
        return True
    crls = current_crl(station)
    listed = frozenset[int]() if crls is None else crls.cert_serials
    can_list = {"", *(ca.key_id for ca in station.cas.issuing if ca.lost_at is None)}
    if all(serial in listed for serial, issuer in revoked.items() if issuer in can_list):
        return True
    return bring_new_crl(station, console)


def bring_new_crl(station: Station, console: Console) -> bool:
    """Sign a CRL with everything that is revoked, bring it to every gateway, and say so.

    Returns:
        Whether every gateway has it.

    Raises:
        AuthorityError: the CA cannot be unlocked, or its clock is wrong.
    """
    brought = brought_by(station, sign_and_store_crl(station), DEFAULT_TIMEOUT_S)
    console.emit(brought.record(), brought.described())
    return warn_of_pending(console, brought.deliveries)


def bring_unlisted(station: Station, revoked: Collection[int]) -> Brought | None:
    """Do as `bring_new_crl` if one of these is on no CRL, and the registry says that it should be; say nothing.

    Args:
        station: whose CRLs they are to be on.
        revoked: serial numbers.

    Returns:
        What was brought; None if there was nothing to bring.

    Raises:
        AuthorityError: a CA cannot be unlocked.
    """
    before = current_crl(station)
    if before is not None and before.cert_serials.issuperset(revoked):
        return None
    crls = up_to_date_crl(station)
    if before is not None and crls.pem == before.pem:
        return None
    return brought_by(station, crls, DEFAULT_TIMEOUT_S)


def brought_by(station: Station, crls: CrlSet, timeout_s: float) -> Brought:
    """Bring the CRLs to every gateway, as `deliver_crl` does."""
    return Brought(crls, tuple(deliver_crl(station, crls, timeout_s)))
