"""Certificates that were held against the profile before: the same octets need not be read and verified again.

A device that comes back shows the certificate that it showed last time. What was found then is true of the same
octets for as long as the same issuing CAs are trusted, and what changes with time is looked at every time.

Rules:

- One `KnownPeers` goes with one `Trust`: other issuing CAs, another, empty one.
- Only what passed is remembered, by the SHA-256 of the whole certificate; whoever has no certificate of a trusted
  CA leaves nothing behind. At most `MAX_KNOWN`: the one first seen makes room.
- Dates, and what the CRL says (`Revocations.check`), are never remembered.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

from birthmark.broker.peer import Peer, let_in, read_peer

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from birthmark.broker.trust import Trust

MAX_KNOWN = 20_000
"""As many as may be connected by default; about 1 KB each."""


class KnownPeers:
    """Does what `check_peer` does, with a memory."""

    def __init__(self, trust: Trust) -> None:
        self._trust = trust
        self._known: dict[bytes, Peer] = {}

    def __len__(self) -> int:
        return len(self._known)

    def check(self, leaf_der: bytes, now: datetime, *, expired_by: timedelta | None = None) -> Peer:
        """Return who the peer is; arguments and `PeerRefusedError` as for `check_peer`."""
        digest = sha256(leaf_der).digest()
        peer = self._known.get(digest)
        if peer is None:
            peer = read_peer(leaf_der, self._trust)
            if len(self._known) >= MAX_KNOWN:
                del self._known[next(iter(self._known))]
            self._known[digest] = peer
        return let_in(peer, self._trust, now, expired_by=expired_by)
