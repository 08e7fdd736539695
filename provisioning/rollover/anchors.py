"""What devices are told to trust in a renewal, while a root is being replaced.

Rules:

- A device gets all roots that are trusted now, in the place of those that it has, whenever the two differ.
- The CA that vouches for them is an issuing CA of ours under a root that the device holds; without one, nothing is
  sent, and the device keeps what it has.
- What a device confirms with its new certificate is remembered in its row: roots are retired by that.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from birthmark.provisioning.cas import CaKind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from birthmark.provisioning.cas import Ca
    from birthmark.provisioning.registry.interface import Transaction
    from birthmark.provisioning.registry.model import Row
    from birthmark.provisioning.station import Station


@dataclass(frozen=True, slots=True)
class PendingAnchors:
    """New trust anchors for a device, and the CA that vouches for them: one that the device trusts already."""

    anchors_der: tuple[bytes, ...]
    """All that the device is to have from now on."""
    signer_der: bytes
    """The CA's certificate."""
    sign: Callable[[bytes], bytes]
    """Returns its signature over a transcript."""


class AnchorSource(Protocol):
    """What a renewal asks about trust anchors, while a root is being replaced."""

    def pending_anchors(self, row: Row, held_sha256: Sequence[bytes]) -> PendingAnchors | None:
        """Return what the device of `row`, which goes by the anchors with these digests, is to go by instead."""

    def confirmed_anchors(self, transaction: Transaction, row: Row, held_sha256: Sequence[bytes]) -> Row:
        """Remember which anchors its device goes by, in the transaction that made `row` ATTESTED; return it."""


class NoAnchors:
    """No root is being replaced."""

    def pending_anchors(self, row: Row, held_sha256: Sequence[bytes]) -> PendingAnchors | None:
        """Return nothing."""
        del row, held_sha256
        return None

    def confirmed_anchors(self, transaction: Transaction, row: Row, held_sha256: Sequence[bytes]) -> Row:
        """Return the row as it is."""
        del transaction, held_sha256
        return row


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
        signer = next((ca for ca in cas.signing if ca.root in trusted), None)
        if signer is None:
            return None
        anchors = tuple(root.certificate_der for root in cas.roots)
        authority = self._station.authority_of(signer.key_id)
        return PendingAnchors(anchors, signer.certificate_der, authority.sign_transcript)

    def confirmed_anchors(self, transaction: Transaction, row: Row, held_sha256: Sequence[bytes]) -> Row:
        """Remember which of our roots the device holds, in the transaction that made `row` ATTESTED."""
        held = set(held_sha256)
        roots = [ca.key_id for ca in self._station.cas if ca.kind is CaKind.ROOT and _sha256(ca) in held]
        return transaction.update(row.changed(anchors=" ".join(roots)))


def _sha256(ca: Ca) -> bytes:
    return hashlib.sha256(ca.certificate_der).digest()
