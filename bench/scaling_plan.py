"""From what was measured to a plan for a fleet: how many gateways, what they hold, what CRLs and renewals weigh.

Rules:

- Pure arithmetic: what is known of one gateway and one station, times a fleet. What it leaves out stands in
  docs/scaling.md.
- A gateway is one process on one core. It is planned to be busy half of the time, and to let all of its devices in
  again within `back_within_s` of a restart, whichever of the two asks for more gateways.
- The CRL has what was revoked, and what a renewal has replaced, until `keep_days` after its end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

DAY_S: Final = 86_400
YEAR_DAYS: Final = 365.0
RENEWED_AT: Final = 2 / 3
"""Of its life a certificate has then had (docs/renewal.md)."""
RETIREMENTS_A_DAY: Final = 24
"""What a renewal has replaced is revoked at a full hour (`birthmark.provisioning.retirement`)."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """What is assumed of a fleet."""

    devices: int
    lifetime_days: float = 730.0
    """Of a certificate."""
    messages_per_day: float = 1_440.0
    """That a device publishes with QoS 1, each for one subscriber."""
    revoked_per_year: float = 0.01
    """The share of devices that are lost, stolen or broken."""
    back_within_s: float = 300.0
    """How soon all are to be connected again after their gateway restarted."""
    busy: float = 0.5
    """How much of its core a gateway may need for messages."""
    keep_days: float = 90.0
    """How long after its end a revoked certificate stays on the CRL."""
    lists_replaced: bool = True
    """Whether what a renewal has replaced is revoked before its end (`retire_after_hours`)."""
    waiting: int = 20
    """Messages that wait for a device that is away, where 5 % are."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What such a fleet needs."""

    messages_s: float
    message_cores: float
    return_cores: float
    gateways: int
    sessions_bytes: float
    """On one gateway: connected devices, those away, and what waits for them."""
    waiting_disk_bytes: float
    renewals_day: float
    renewal_cpu_day_s: float
    renewal_bytes_day: float
    crl_entries: float
    crl_bytes: float
    crls_day: float
    crl_bytes_day: float
    """To one gateway."""
    crl_sign_s: float
    """CPU of the station for one CRL."""
    crl_sign_day_s: float
    crl_install_s: float
    """CPU of a gateway for one CRL."""
    registry_bytes: float
    issue_s: float
    """CPU of the station to issue for all of them once."""


def plan(measured: Mapping[str, float], fleet: Fleet) -> Plan:
    """Return what `fleet` needs, by what was measured (`bench.scaling`)."""
    messages_s = fleet.devices * fleet.messages_per_day / DAY_S
    message_cores = messages_s * measured["spread_us"] / 1e6 / fleet.busy
    return_cores = fleet.devices * measured["visit_full_us"] / 1e6 / fleet.back_within_s
    gateways = max(1, -int(-max(message_cores, return_cores) // 1))
    here = fleet.devices / gateways
    away = 0.05 * here
    renewals_day = fleet.devices / (fleet.lifetime_days * RENEWED_AT)
    entries = crl_entries(fleet)
    crl_bytes = entries * measured["crl_entry_bytes"]
    crls_day = crls_a_day(fleet)
    sign_s = entries * measured["crl_entry_us"] / 1e6
    return Plan(
        messages_s=messages_s,
        message_cores=message_cores,
        return_cores=return_cores,
        gateways=gateways,
        sessions_bytes=(here - away) * measured["connected_bytes"]
        + away * (measured["offline_bytes"] + fleet.waiting * measured["waiting_bytes"]),
        waiting_disk_bytes=away
        * (measured["offline_disk_bytes"] + fleet.waiting * measured["waiting_disk_bytes"]),
        renewals_day=renewals_day,
        renewal_cpu_day_s=renewals_day * measured["renewal_us"] / 1e6,
        renewal_bytes_day=renewals_day * measured["renewal_bytes"],
        crl_entries=entries,
        crl_bytes=crl_bytes,
        crls_day=crls_day,
        crl_bytes_day=crls_day * crl_bytes,
        crl_sign_s=sign_s,
        crl_sign_day_s=sign_s * crls_day,
        crl_install_s=entries * measured["crl_large_us"] / measured["crl_large_entries"] / 1e6,
        registry_bytes=fleet.devices * measured["row_bytes"] * rows_per_device(fleet),
        issue_s=fleet.devices * measured["made_us"] / 1e6,
    )


def crl_entries(fleet: Fleet) -> float:
    """Return how many certificates are on the CRL when as many leave it as come."""
    rest_days = fleet.lifetime_days * (1 - RENEWED_AT) + fleet.keep_days
    replaced = fleet.devices / (fleet.lifetime_days * RENEWED_AT) * rest_days if fleet.lists_replaced else 0.0
    # One that is lost has had half of the time between two renewals, on an average.
    lost_days = fleet.lifetime_days * (1 - RENEWED_AT / 2) + fleet.keep_days
    return replaced + fleet.devices * fleet.revoked_per_year / YEAR_DAYS * lost_days


def crls_a_day(fleet: Fleet) -> float:
    """Return how many CRLs are signed a day: one for a revocation, and whenever what a renewal replaced is due."""
    an_hour = fleet.devices / (fleet.lifetime_days * RENEWED_AT) / RETIREMENTS_A_DAY
    with_some = 1 - math.exp(-an_hour) if fleet.lists_replaced else 0.0  # of the hours; renewals come at random
    return RETIREMENTS_A_DAY * with_some + fleet.devices * fleet.revoked_per_year / YEAR_DAYS


def rows_per_device(fleet: Fleet) -> float:
    """Return how many rows a device has after five years: a renewal is a row of its own, and none is removed."""
    return 1 + 5 * YEAR_DAYS / (fleet.lifetime_days * RENEWED_AT)
