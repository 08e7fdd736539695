"""What each gateway is known to have: the last CRL of each issuing CA that it confirmed, and when.

Rules:

- Only a gateway's own receipt counts. A gateway that has confirmed a CRL of a CA trusts that CA.
- Beside that is noted when it was last there: whoever looks at it leaves word, once a minute at most.
- What it confirmed stays known while it cannot be reached; that it no longer trusts a CA is known once it says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.errors import RegistryError
from birthmark.device.fleet_policy import MAX_VERSION
from birthmark.provisioning.delivery import Outcome
from birthmark.provisioning.gateway_look import Look

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from birthmark.provisioning.crl_store import CrlSet, StoredCrl
    from birthmark.provisioning.delivery import Delivery
    from birthmark.provisioning.gateway_settings import Gateway
    from birthmark.provisioning.registry.interface import Transaction, View
    from birthmark.provisioning.station import Station

TOPIC: Final = "gateway"
"""Where the registry notes them; the key is the gateway's name in lower case."""
HEARD_EVERY: Final = timedelta(minutes=1)
"""How often it is noted at most that a gateway is there."""


@dataclass(frozen=True, slots=True)
class Confirmed:
    """A CRL that a gateway has in force."""

    number: int
    sha256: str
    """Of the DER, in lower-case hex."""
    at: datetime
    """When the station heard of it."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of one gateway."""

    confirmed: dict[str, Confirmed]
    """By issuing CA's key identifier."""
    trouble: str = ""
    """Why the last delivery did not succeed; empty if it did."""
    trouble_since: datetime | None = None
    heard_at: datetime | None = None
    """When it was last known to be there, within `HEARD_EVERY`; None: never."""
    policy_version: int = 0
    """Of the fleet's policy that it went by when it last said so."""

    def has(self, crls: Iterable[StoredCrl]) -> bool:
        """Whether it has confirmed each of these CRLs."""
        return all(self.sha256(crl.issuer) == crl.sha256 for crl in crls)

    def sha256(self, issuer: str) -> str:
        """Return which CRL of an issuing CA it has confirmed; empty: none."""
        confirmed = self.confirmed.get(issuer)
        return "" if confirmed is None else confirmed.sha256


def standing_of(view: View, gateway: str) -> Standing:
    """Return what is known of a gateway.

    Raises:
        RegistryError: what the registry notes of it is damaged.
    """
    note = view.notes(TOPIC).get(gateway.lower())
    if note is None:
        return Standing({})
    try:
        confirmed = {
            key_id: Confirmed(int(one["number"]), str(one["sha256"]), datetime.fromisoformat(one["at"]))
            for key_id, one in note["confirmed"].items()
        }
        return Standing(
            confirmed,
            str(note["trouble"]),
            _moment(note.get("trouble_since")),
            _moment(note.get("heard_at")),
            int(note.get("policy_version", 0)),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RegistryError(
            f"could not read the registry: what it notes of the gateway {gateway} is damaged",
            hint="restore it from a backup, together with the audit log",
        ) from error


def note_deliveries(transaction: Transaction, deliveries: Sequence[Delivery], crls: CrlSet, now: datetime) -> None:
    """Note what a delivery of these CRLs showed of each gateway."""
    for delivery in deliveries:
        before = standing_of(transaction, delivery.gateway)
        confirmed = dict(before.confirmed)
        for receipt in delivery.receipts:
            confirmed[receipt.issuer] = Confirmed(receipt.crl_number, receipt.crl_sha256, now)
        for key_id in delivery.distrusted:
            confirmed.pop(key_id, None)
        if delivery.outcome is Outcome.DONE:
            trouble, since = "", None
        else:
            trouble, since = delivery.cause, before.trouble_since or now
        heard_at = now if any(one.outcome == "installed" for one in delivery.receipts) else before.heard_at
        # A retired CA is nobody's business any more.
        confirmed = {crl.issuer: confirmed[crl.issuer] for crl in crls.crls if crl.issuer in confirmed}
        changed = replace(before, confirmed=confirmed, trouble=trouble, trouble_since=since, heard_at=heard_at)
        _put(transaction, delivery.gateway, changed)


def note_policy_version(transaction: Transaction, gateway: str, version: int) -> None:
    """Note that a gateway has said that it goes by a version of the fleet's policy."""
    _put(transaction, gateway, replace(standing_of(transaction, gateway), policy_version=version))


def note_heard(station: Station, looks: Iterable[Look]) -> None:
    """Note that those which say that they are online are there, and by which policy; durable when this returns.

    Raises:
        RegistryError: the registry cannot be used.
    """
    now = station.clock()
    online = {
        look.name: min(look.status.policy_version, MAX_VERSION)
        for look in looks
        if look.status is not None and look.status.online
    }

    def is_due(view: View, name: str) -> bool:
        known = standing_of(view, name)
        is_late = known.heard_at is None or not now - HEARD_EVERY <= known.heard_at <= now
        return is_late or known.policy_version != online[name]

    with station.registry.view() as view:
        if not any(is_due(view, name) for name in online):
            return
    with station.registry.transaction() as transaction:
        for name, version in online.items():
            if is_due(transaction, name):
                known = standing_of(transaction, name)
                _put(transaction, name, replace(known, heard_at=now, policy_version=version))


def look_by_receipts(gateway: Gateway, standing: Standing) -> Look:
    """Return what is known of a gateway that is not asked: what its receipts said last."""
    numbers = tuple(sorted((key_id, one.number) for key_id, one in standing.confirmed.items()))
    cause = standing.trouble or ("" if numbers else "it never gave a receipt for a CRL")
    return Look(gateway.name, gateway.reached_by, cause, numbers)


def completed(look: Look, standing: Standing) -> Look:
    """Return a look at a gateway with the CRLs and the policy that it has confirmed, if it is not there to speak.

    The last will that speaks for it then is as old as its link.
    """
    if look.status is not None and look.status.online:
        return look
    numbers = dict(look.crl_numbers)
    for key_id, confirmed in standing.confirmed.items():
        numbers[key_id] = max(numbers.get(key_id, 0), confirmed.number)
    status = look.status
    if status is not None:
        status = replace(status, policy_version=max(status.policy_version, standing.policy_version))
    return replace(look, crl_numbers=tuple(sorted(numbers.items())), status=status)


def forget_gateway(transaction: Transaction, gateway: str) -> None:
    """Forget what is known of a gateway."""
    transaction.put_note(TOPIC, gateway.lower(), None)


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _put(transaction: Transaction, gateway: str, standing: Standing) -> None:
    note: dict[str, Any] = {
        "trouble": standing.trouble,
        "confirmed": {
            key_id: {"number": one.number, "sha256": one.sha256, "at": one.at.astimezone(UTC).isoformat()}
            for key_id, one in standing.confirmed.items()
        },
    }
    if standing.policy_version:
        note["policy_version"] = standing.policy_version
    for name, moment in (("trouble_since", standing.trouble_since), ("heard_at", standing.heard_at)):
        if moment is not None:
            note[name] = moment.astimezone(UTC).isoformat()
    transaction.put_note(TOPIC, gateway.lower(), note)
