"""Who still needs which CA: what is counted before one is put in charge or retired.

Rules:

- A certificate is in use while nobody has taken its place: not revoked, not VOID, not replaced by one that is
  ATTESTED, and not longer expired than a renewal allows. One whose successor is ATTESTED is only still valid.
- What a holder trusts is what it was flashed with, or has confirmed in a renewal. Of whom nothing is known, it
  counts as not trusting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from birthmark.provisioning.registry.model import Kind, Row, State

if TYPE_CHECKING:
    from birthmark.provisioning.registry.interface import View
    from birthmark.provisioning.station import Station


@dataclass(slots=True)
class Census:
    """The certificates of a station that somebody uses."""

    in_use: dict[str, list[Row]] = field(default_factory=dict)
    """By issuing CA's key identifier."""
    still_valid: dict[str, list[Row]] = field(default_factory=dict)
    """Those that have been replaced, and are not revoked yet; likewise."""

    def used(self, key_id: str, kind: Kind | None = None) -> list[Row]:
        """Return the certificates in use that a CA issued, of one kind or all."""
        return [row for row in self.in_use.get(key_id, ()) if kind in (None, row.kind)]

    def holders(self) -> list[Row]:
        """Return everybody who checks brokers: devices and services with a certificate in use."""
        return [row for rows in self.in_use.values() for row in rows if row.kind is not Kind.BROKER]

    def distrusting(self, root: str) -> list[Row]:
        """Return those of the holders who are not known to trust a root."""
        return [row for row in self.holders() if root not in row.anchors.split(" ")]


def take_census(station: Station, view: View) -> Census:
    """Count. One pass over the rows whose certificates are not revoked: a fleet that renews has few of all."""
    grace = timedelta(days=station.settings.renewal.grace_days)
    now = station.clock()
    rows = {row.number: row for row in view.rows(revoked=False)}
    successors = {row.replaced_by for row in rows.values() if row.replaced_by is not None}
    revoked = view.numbered(successors - rows.keys())
    census = Census()
    for row in rows.values():
        if row.cert_serial is None or row.state is State.VOID:
            continue
        following = row.replaced_by
        successor = None if following is None else rows.get(following) or revoked.get(following)
        replaced = successor is not None and successor.state is State.ATTESTED
        if row.not_after is not None and now > row.not_after + grace:
            continue
        into = census.still_valid if replaced else census.in_use
        into.setdefault(row.issuer, []).append(row)
    return census
