"""Bringing the CRLs to every gateway, and hearing from each what it did with them.

Rules: what counts as having a CRL is in `delivery`. By path: `path_delivery`; over MQTT at its own broker:
`mqtt_delivery`; through an upstream: `upstream_delivery`. All gateways are served at once; one that does not
answer delays nobody. Ctrl-C ends the waiting, and nothing else: what was signed is signed, and who has not
answered by then is PENDING.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from birthmark.device.errors import BirthmarkError
from birthmark.provisioning.at_once import as_done
from birthmark.provisioning.delivery import INTERRUPTED, Delivery, Latest, Outcome, concluded
from birthmark.provisioning.gateway_contact import contacts
from birthmark.provisioning.mqtt_delivery import by_mqtt
from birthmark.provisioning.path_delivery import by_path
from birthmark.provisioning.upstream_delivery import by_upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from birthmark.provisioning.cas import Cas
    from birthmark.provisioning.crl_store import CrlSet
    from birthmark.provisioning.gateway_contact import Contact
    from birthmark.provisioning.gateway_settings import Gateway, Upstream

DEFAULT_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Errand:
    """A way to some gateways, and what is to be done there."""

    gateways: Sequence[Gateway]
    bring: Callable[[], list[Delivery]]

    def pending(self, cause: str) -> list[Delivery]:
        return [Delivery(gateway.name, Outcome.PENDING, cause) for gateway in self.gateways]


def deliver(
    gateways: Sequence[Gateway],
    crls: CrlSet,
    cas: Cas,
    *,
    successor: Callable[[CrlSet], CrlSet | None],
    anchors_path: Path,
    upstreams: Sequence[Upstream] = (),
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> list[Delivery]:
    """Bring the CRLs to every gateway at once and wait for the receipts, at most `timeout_s` in all.

    Args:
        gateways: where to.
        crls: what.
        cas: the station's CAs.
        successor: returns newer CRLs than those it is given, if there are any (`crl_store.successor`).
        anchors_path: the CA certificates that a gateway's own certificate may lead to (PEM).
        upstreams: that some of the gateways are reached through.
        timeout_s: how long to wait.

    Returns:
        A delivery for each gateway, in their order. What went wrong at one is in there: this does not fail as a
        whole.
    """
    deadline = time.monotonic() + timeout_s
    errands = [
        _at_path(gateway, gateway.crl_path, Latest(crls, cas, successor), deadline)
        for gateway in gateways
        if gateway.crl_path is not None
    ]
    reached = contacts(gateways, upstreams, anchors_path)
    errands += [_at_contact(contact, Latest(crls, cas, successor), deadline) for contact in reached]
    found = {delivery.gateway: delivery for delivery in _run(errands)}
    return [found[gateway.name] for gateway in gateways]


def _run(errands: Sequence[_Errand]) -> list[Delivery]:
    found: dict[int, list[Delivery]] = {}
    try:
        found.update(as_done(_attempt, errands))
    except KeyboardInterrupt:
        for place, errand in enumerate(errands):
            found.setdefault(place, errand.pending(INTERRUPTED))
    return [delivery for deliveries in found.values() for delivery in deliveries]


def _at_path(gateway: Gateway, crl_path: Path, latest: Latest, deadline: float) -> _Errand:
    return _Errand(
        [gateway], lambda: [concluded(gateway.name, latest, by_path(gateway.name, crl_path, latest, deadline))]
    )


def _at_contact(contact: Contact, latest: Latest, deadline: float) -> _Errand:
    if contact.upstream:
        return _Errand(contact.gateways, lambda: by_upstream(contact, latest, deadline))
    (gateway,) = contact.gateways
    return _Errand([gateway], lambda: [concluded(gateway.name, latest, by_mqtt(contact, latest, deadline))])


def _attempt(errand: _Errand) -> list[Delivery]:
    """Bring the CRLs; what goes wrong leaves each of these gateways PENDING."""
    try:
        return errand.bring()
    except BirthmarkError as error:
        return errand.pending(error.message)
    except OSError as error:
        return [
            Delivery(
                gateway.name, Outcome.PENDING, f"could not reach {gateway.reached_by}: {error.strerror or error}"
            )
            for gateway in errand.gateways
        ]
