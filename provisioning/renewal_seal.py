"""The station's signature under what it tells a device about one of its certificates (docs/renewal.md).

Rules: the CA that issued the certificate signs, also one that is being replaced: its certificate is what the
device has at hand. Nothing is signed for a request that no key of the device's has signed.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from birthmark.device.identity import DeviceId
from birthmark.device.renewal.proofs import answer_transcript

if TYPE_CHECKING:
    from birthmark.device.renewal.messages import RenewalAnswer
    from birthmark.provisioning.authority import Authority
    from birthmark.provisioning.registry.model import Row
    from birthmark.provisioning.station import Station


class Seals:
    """Signs answers; each CA is unlocked once.

    Args:
        station: whose CAs.
        authorities: those that are unlocked already.
    """

    def __init__(self, station: Station, *authorities: Authority) -> None:
        self._station = station
        self._authorities = {authority.key_id: authority for authority in authorities}

    def sealed(self, answer: RenewalAnswer, row: Row) -> RenewalAnswer:
        """Return the answer, signed for the device that has the certificate of `row`.

        Raises:
            AuthorityError: the key of the CA that issued it cannot be used.
            RegistryError: that CA is not known.
        """
        signed = answer_transcript(
            DeviceId(row.name),
            outcome=answer.outcome,
            nonce=answer.nonce,
            leaf_sha256=hashlib.sha256(row.certificate_der or b"").digest(),
        )
        if row.issuer not in self._authorities:
            self._authorities[row.issuer] = self._station.authority_of(row.issuer)
        return answer.changed(signature=self._authorities[row.issuer].sign_transcript(signed))
