"""Which issuing CAs the gateways trust: the file brought to those that the station reaches by a path.

Rules: the file is written before the CRLs are delivered; a receipt for a CA's CRL is what shows that the CA is
trusted. A gateway that has no `clients_ca_path` gets its file from a person (`birthmark ca export issuing`).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from birthmark.device.durable import write_durably
from birthmark.provisioning.crl_delivery import deliver_crl
from birthmark.provisioning.crls import up_to_date_crl
from birthmark.provisioning.delivery import INTERRUPTED
from birthmark.provisioning.station import PUBLIC_FILE_MODE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from birthmark.provisioning.crl_store import CrlSet
    from birthmark.provisioning.delivery import Delivery
    from birthmark.provisioning.station import Station


def bring_trust(station: Station, *, timeout_s: float) -> tuple[CrlSet, list[Delivery], list[str]]:
    """Bring the trusted issuing CAs, then every CRL, to the gateways.

    Returns:
        The CRLs, what became of them, and what was wrong with files of issuing CAs.

    Raises:
        AuthorityError: a CRL is to be signed and the CA cannot be unlocked.
    """
    deadline = time.monotonic() + timeout_s
    station.publish_certificates()
    crls = up_to_date_crl(station)
    troubles = _write_files(station)
    deliveries = deliver_crl(station, crls, timeout_s)
    while True:
        # A gateway may have looked at the CRLs before it looked at the CAs: the next receipt shows the latter.
        early = {one.gateway for one in deliveries if one.distrusted}
        again = [one for one in station.settings.gateways if one.name in early and one.clients_ca_path is not None]
        left_s = deadline - time.monotonic()
        if not again or left_s <= 0 or troubles or was_interrupted(deliveries):
            return crls, deliveries, troubles
        newer = {one.gateway: one for one in deliver_crl(station, crls, left_s, gateways=again)}
        deliveries = [newer.get(one.gateway, one) for one in deliveries]


def was_interrupted(deliveries: Iterable[Delivery]) -> bool:
    """Whether somebody ended the waiting for one of them."""
    return any(one.cause == INTERRUPTED for one in deliveries)


def _write_files(station: Station) -> list[str]:
    content = b"".join(ca.pem for ca in station.cas.issuing)
    troubles = []
    for gateway in station.settings.gateways:
        path = gateway.clients_ca_path
        if path is None:
            continue
        try:
            if not path.exists() or path.read_bytes() != content:
                write_durably(path, content, mode=PUBLIC_FILE_MODE)
        except OSError as error:
            troubles.append(f"{gateway.name}: could not write {path}: {error.strerror}")
    return troubles
