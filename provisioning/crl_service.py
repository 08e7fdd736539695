"""The CRL service: keeps every CRL fresh, and every gateway up to date (docs/operations.md).

Rules:

- What is due is revoked (certificates that a renewal has replaced); a CRL that lacks a revocation, or is past half
  of its life, or older than the interval that was asked for, is signed anew.
- A gateway that has not confirmed the CRLs is tried again, after a second first, then later and later, up to a
  minute; new CRLs are brought to everybody at once. One that is away delays others for a time-out at most.
- Every five minutes the gateways that are reached by MQTT are asked which policy they go by; a new one is put on
  record.
- Nothing is remembered but in the registry and the CRL file: it may be killed at any moment, and others may revoke
  and sign beside it. What another command did is seen within `LOOK_S`.
- A trouble of the station (registry, CA, settings) is told, and tried again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from birthmark.device.backoff import Backoff
from birthmark.device.errors import BirthmarkError
from birthmark.provisioning.crl_delivery import deliver_crl
from birthmark.provisioning.crls import sign_and_store_crl, up_to_date_crl
from birthmark.provisioning.delivery import Outcome
from birthmark.provisioning.gateway_look import DEFAULT_TIMEOUT_S, look_at
from birthmark.provisioning.gateway_policies import note_policies
from birthmark.provisioning.gateway_receipts import note_heard, standing_of
from birthmark.provisioning.retirement import retire_due
from birthmark.provisioning.settings import read_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import timedelta

    from birthmark.provisioning.crl_store import CrlSet
    from birthmark.provisioning.gateway_settings import Gateway
    from birthmark.provisioning.station import Station

LOOK_S: Final = 5.0
"""How often the registry is looked at."""
LOOK_AT_GATEWAYS_S: Final = 300.0
"""How often the gateways are asked for their policies."""
TROUBLE_S: Final = 30.0
RETRY: Final = Backoff(first_s=1.0, longest_s=60.0)


@dataclass(slots=True)
class _Attempts:
    """How a gateway is tried: for which CRLs, how often, and when again."""

    crls: frozenset[str]
    count: int = 0
    not_before_s: float = 0.0
    is_done: bool = False
    """Whether it has them, and a server of its upstream has not yet."""


class CrlService:
    """One turn after the other; the caller waits in between.

    Args:
        station: unlocked at the first CRL.
        say: prints one line: a name, a text for people, and facts.
        every: sign anew when a CRL is older than this, beside half of its life.
        timeout_s: how long one delivery waits for receipts.
        retry: between attempts at a gateway.
    """

    def __init__(
        self,
        station: Station,
        *,
        say: Callable[..., None],
        every: timedelta | None = None,
        timeout_s: float = 10.0,
        retry: Backoff = RETRY,
    ) -> None:
        self._station = station
        self._say = say
        self._every = every
        self._timeout_s = timeout_s
        self._retry = retry
        self._attempts: dict[str, _Attempts] = {}
        self._told: tuple[str, ...] = ()
        self._look_at_s = 0.0

    def turn(self) -> float:
        """Do what is due now.

        Returns:
            After how many seconds the next turn is due.
        """
        try:
            self._station.settings = read_settings(self._station.settings_path)
            retired = retire_due(self._station)
            if retired:
                self._say("retired", f"{retired} replaced certificates are revoked", certificates=retired)
            crls = self._fresh()
            self._tell(crls)
            wait_s = self._bring(crls)
            self._look()
        except (BirthmarkError, OSError) as error:
            message = error.message if isinstance(error, BirthmarkError) else f"{error.strerror or error}"
            hint = error.hint if isinstance(error, BirthmarkError) else ""
            self._say("trouble", f"{message}\n          {hint}", reason=message, hint=hint)
            return TROUBLE_S
        return wait_s

    def _look(self) -> None:
        """See which policy each gateway goes by, now and then; one that is away is seen another time."""
        if time.monotonic() < self._look_at_s:
            return
        self._look_at_s = time.monotonic() + LOOK_AT_GATEWAYS_S
        looks = look_at(
            self._station.settings.gateways,
            anchors_path=self._station.root_path,
            timeout_s=min(self._timeout_s, DEFAULT_TIMEOUT_S),
            upstreams=self._station.settings.upstreams,
            sightings=False,
        )
        note_heard(self._station, looks)
        for name in note_policies(self._station, looks):
            self._say("policy", f"{name} goes by a policy that it did not before", gateway=name)

    def _fresh(self) -> CrlSet:
        crls = up_to_date_crl(self._station)
        signed_at = min(crl.this_update for crl in crls.crls)
        if self._every is not None and self._station.clock() - signed_at > self._every:
            return sign_and_store_crl(self._station)
        return crls

    def _tell(self, crls: CrlSet) -> None:
        told = tuple(crl.sha256 for crl in crls.crls)
        if told != self._told:
            self._told = told
            self._say("crl", f"{crls.shown()} in force until {crls.next_update:%Y-%m-%d}", crls=crls.records())

    def _bring(self, crls: CrlSet) -> float:
        lacking = self._lacking(crls)
        now_s = time.monotonic()
        due = [gateway for gateway in lacking if self._attempt(gateway, crls).not_before_s <= now_s]
        if due:
            for delivery in deliver_crl(self._station, crls, self._timeout_s, gateways=due, again=True):
                attempts = self._attempts[delivery.gateway]
                attempts.count += 1
                attempts.not_before_s = time.monotonic() + self._retry.ceiling_s(attempts.count - 1)
                is_done = delivery.outcome is Outcome.DONE
                if attempts.count == 1 or is_done > attempts.is_done:
                    described = "; ".join((delivery.described(), *delivery.missed))
                    self._say("delivery", described, **delivery.record())
                attempts.is_done = is_done
                if is_done and not delivery.missed:
                    self._attempts.pop(delivery.gateway)
        waits = [
            self._attempts[gateway.name].not_before_s for gateway in lacking if gateway.name in self._attempts
        ]
        return max(0.05, min([LOOK_S, *(wait_s - time.monotonic() for wait_s in waits)]))

    def _lacking(self, crls: CrlSet) -> Sequence[Gateway]:
        cas = self._station.cas
        needed = [crl for crl in crls.crls if cas.get(crl.issuer).activated_at is not None]
        with self._station.registry.view() as view:
            standings = {gateway: standing_of(view, gateway.name) for gateway in self._station.settings.gateways}
        return [
            gateway
            for gateway, standing in standings.items()
            if standing.trouble or not standing.has(needed) or gateway.name in self._attempts
        ]

    def _attempt(self, gateway: Gateway, crls: CrlSet) -> _Attempts:
        wanted = frozenset(crl.sha256 for crl in crls.crls)
        attempts = self._attempts.get(gateway.name)
        if attempts is None or attempts.crls != wanted:
            attempts = self._attempts[gateway.name] = _Attempts(wanted)
        return attempts
