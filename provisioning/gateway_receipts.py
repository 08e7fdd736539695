"""What each gateway is known to have: the last CRL of each issuing CA that it confirmed, and when.

Rules:

- Only a gateway's own receipt counts. A gateway that has confirmed a CRL of a CA trusts that CA.
- What it confirmed stays known while it cannot be reached; that it no longer trusts a CA is known once it says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.errors import RegistryError
from birthmark.provisioning.delivery import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from birthmark.provisioning.crls import CrlSet, StoredCrl
    from birthmark.provisioning.delivery import Delivery
    from birthmark.provisioning.registry.interface import Transaction, View

TOPIC: Final = "gateway"
"""Where the registry notes them; the key is the gateway's name in lower case."""


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

    def has(self, crls: Iterable[StoredCrl]) -> bool:
        """Whether it has confirmed each of these CRLs."""
        known = {key_id: confirmed.sha256 for key_id, confirmed in self.confirmed.items()}
        return all(known.get(crl.issuer) == crl.sha256 for crl in crls)


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
        since = note.get("trouble_since")
        return Standing(confirmed, str(note["trouble"]), datetime.fromisoformat(since) if since else None)
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
        # A retired CA is nobody's business any more.
        confirmed = {crl.issuer: confirmed[crl.issuer] for crl in crls.crls if crl.issuer in confirmed}
        _put(transaction, delivery.gateway, Standing(confirmed, trouble, since))


def forget_gateway(transaction: Transaction, gateway: str) -> None:
    """Forget what is known of a gateway."""
    transaction.put_note(TOPIC, gateway.lower(), None)


def _put(transaction: Transaction, gateway: str, standing: Standing) -> None:
    note: dict[str, Any] = {
        "trouble": standing.trouble,
        "confirmed": {
            key_id: {"number": one.number, "sha256": one.sha256, "at": one.at.astimezone(UTC).isoformat()}
            for key_id, one in standing.confirmed.items()
        },
    }
    if standing.trouble_since is not None:
        note["trouble_since"] = standing.trouble_since.astimezone(UTC).isoformat()
    transaction.put_note(TOPIC, gateway.lower(), note)
