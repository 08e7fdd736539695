"""Which policy each gateway goes by, as it says itself; a change of it is put on record.

Rules:

- A gateway's policy is changed at the gateway, and the station hears of it in the gateway's status: who changed
  it, and what in it, is for its own log and `birthmark-broker policy diff` to say. The entry has the SHA-256
  of the file before and after, and the gateway in whose name that was told.
- The first policy that is seen of a gateway is on record as well. One and the same is so once, whoever sees it.
- Only a gateway that is there can tell: the last will that speaks for one that is away is as old as its link.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from birthmark.provisioning.gateway_look import Look
    from birthmark.provisioning.registry.interface import Transaction, View
    from birthmark.provisioning.station import Station

TOPIC: Final = "gateway-policy"
"""Where the registry notes them; the key is the gateway's name in lower case."""
_SHA256: Final = re.compile("[0-9a-f]{64}")


def note_policies(station: Station, looks: Sequence[Look]) -> list[str]:
    """Put on record what has changed, durable when this returns; return the names of those gateways.

    Raises:
        RegistryError: the registry cannot be used.
    """
    told = [(look, look.status.policy_sha256) for look in looks if look.status is not None and look.status.online]
    told = [(look, sha256) for look, sha256 in told if _SHA256.fullmatch(sha256)]
    with station.registry.view() as view:
        if all(_known(view, look.name) == sha256 for look, sha256 in told):
            return []
    changed = []
    with station.registry.transaction() as transaction:
        for look, sha256 in told:
            before = _known(transaction, look.name)
            if before == sha256:
                continue  # somebody else saw it meanwhile
            transaction.put_note(TOPIC, look.name.lower(), {"sha256": sha256})
            transaction.record(
                "policy",
                look.name,
                sha256=sha256,
                previous=before or None,
                by=f"gateway {look.name}",
                via=look.reached_by,
            )
            changed.append(look.name)
    return changed


def forget_policy(transaction: Transaction, gateway: str) -> None:
    """Forget what is known of a gateway's policy."""
    transaction.put_note(TOPIC, gateway.lower(), None)


def _known(view: View, gateway: str) -> str:
    return str(view.notes(TOPIC).get(gateway.lower(), {}).get("sha256", ""))
