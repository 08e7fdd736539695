"""A CRL on its way from the station to its gateways, on the record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from birthmark.provisioning.gateways import DEFAULT_TIMEOUT_S, Delivery, Outcome, deliver
from birthmark.provisioning.revocation import StoredCrl, sign_and_store_crl
from birthmark.provisioning.station import ROOT_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from birthmark.device.console import Console
    from birthmark.provisioning.station import Station


def deliver_crl(station: Station, crl: StoredCrl, timeout_s: float) -> list[Delivery]:
    """Bring a CRL to every gateway of the station, and put what became of it in the audit log."""
    gateways = station.settings.gateways
    deliveries = deliver(gateways, crl, anchors_path=station.folder / ROOT_FILE, timeout_s=timeout_s)
    if deliveries:
        with station.registry.transaction() as transaction:
            for delivery in deliveries:
                transaction.record(
                    "deliver",
                    delivery.gateway,
                    number=crl.number,
                    outcome=delivery.outcome.value,
                    cause=delivery.cause or None,
                )
    return deliveries


def warn_of_pending(console: Console, deliveries: Sequence[Delivery]) -> bool:
    """Warn of the gateways that have not got a CRL; return whether every one has."""
    pending = [delivery for delivery in deliveries if delivery.outcome is not Outcome.DONE]
    if pending:
        names = ", ".join(delivery.gateway for delivery in pending)
        console.warn(f"not every gateway has it ({names}): `birthmark crl` tries again")
    return not pending


def bring_new_crl(station: Station, console: Console, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> bool:
    """Sign a CRL with everything that is revoked, bring it to every gateway, and say so.

    Returns:
        Whether every gateway has it.

    Raises:
        AuthorityError: the CA cannot be unlocked, or its clock is wrong.
    """
    crl = sign_and_store_crl(station)
    deliveries = deliver_crl(station, crl, timeout_s)
    record = {
        "event": "crl",
        "crl_number": crl.number,
        "crl_path": str(crl.path),
        "entries": len(crl.cert_serials),
        "gateways": [delivery.record() for delivery in deliveries],
    }
    head = f"revoked certificates are on CRL {crl.number}, {crl.path}"
    console.emit(record, "\n".join([head, *(f"  {delivery.described()}" for delivery in deliveries)]))
    return warn_of_pending(console, deliveries)
