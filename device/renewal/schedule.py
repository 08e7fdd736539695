"""When a device renews, and how long it waits when that does not succeed at once.

Rules:

- At two thirds of the certificate's life, and a bit later: a part of a 24th of it that hangs on the device and its
  certificate. A fleet that was flashed in one shift does not renew in one minute, and a restart changes nothing.
- A request that is not answered is made again with the same key: after a minute, then later and later, up to six
  hours.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from birthmark.device.backoff import Backoff
from birthmark.device.frozen import Frozen

if TYPE_CHECKING:
    from datetime import datetime

    from birthmark.device.certificate_facts import CertificateFacts

SPREAD: Final = 1 / 24
"""The part of a life over which a fleet's renewals are spread."""


class Pace(Frozen):
    """How long a renewal waits for what."""

    answered_within_s: float = 60.0
    """After this a request or a confirmation counts as lost."""
    repeat: Backoff = Backoff(first_s=60.0, longest_s=6 * 3600.0)
    """Between attempts at a renewal, at trying a new certificate, and at confirming it."""
    refused_wait_s: float = 24 * 3600.0
    """After a refusal for which the station says that asking again does not help: a person may change that."""


def due_at(facts: CertificateFacts, leaf_der: bytes) -> datetime:
    """Return when the certificate is to be renewed."""
    drawn = int.from_bytes(hashlib.sha256(leaf_der).digest()[:8], "big") / 2**64
    life = facts.not_after - facts.not_before
    return facts.not_before + life * (2 / 3 + SPREAD * drawn)
