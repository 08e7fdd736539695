"""What devices are told to trust in a renewal, while a root is being replaced.

Rules:

- A device gets all roots that are trusted now, in the place of those that it has, whenever the two differ.
- The CA that vouches for them is an issuing CA of ours under a root that the device holds; without one, nothing is
  sent, and the device keeps what it has.
- What a device confirms with its new certificate is remembered in its row: roots are retired by that.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from birthmark.provisioning.cas import CaKind
from birthmark.provisioning.renewal import PendingAnchors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from birthmark.provisioning.cas import Ca
    from birthmark.provisioning.registry.interface import Transaction
    from birthmark.provisioning.registry.model import Row
    from birthmark.provisioning.station import Station


class StationAnchors:
    """The trust anchors of a station's devices (`renewal.AnchorSource`)."""

    def __init__(self, station: Station) -> None:
        self._station = station

    def pending_anchors(self, row: Row, held_sha256: Sequence[bytes]) -> PendingAnchors | None:
        """Return what the device is to go by instead of what it holds; None if that is right."""
        del row
        cas = self._station.cas
        held = set(held_sha256)
        if {_sha256(root) for root in cas.roots} == held:
            return None
        trusted = {root.key_id for root in cas if root.kind is CaKind.ROOT and _sha256(root) in held}
        signer = next((ca for ca in cas.issuing if ca.root in trusted), None)
        if signer is None:
            return None
        anchors = tuple(root.certificate_der for root in cas.roots)
        authority = self._station.authority_of(signer.key_id)
        return PendingAnchors(anchors, signer.certificate_der, authority.sign_transcript)

    def confirmed_anchors(self, transaction: Transaction, row: Row, held_sha256: Sequence[bytes]) -> Row:
        """Remember which of our roots the device holds, in the transaction that made `row` ATTESTED."""
        held = set(held_sha256)
        roots = [ca.key_id for ca in self._station.cas if ca.kind is CaKind.ROOT and _sha256(ca) in held]
        return transaction.update(replace(row, anchors=" ".join(roots)))


def _sha256(ca: Ca) -> bytes:
    return hashlib.sha256(ca.certificate_der).digest()
