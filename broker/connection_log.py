"""What the log says of a connection: who, from where, and why it came or went.

Whatever a client said is escaped here. What a stranger can cause at will (failed handshakes, refusals) is said
once in a while for each reason and address, or network of 64 bits: all of that is one stranger's with IPv6. Of the
comings and goings of one identity so many are said in a minute (`log_budget.py`). Nobody fills a gateway's disk.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from birthmark.broker.listener import place_of
from birthmark.broker.tls import handshake_failure
from birthmark.device.escape import escaped

if TYPE_CHECKING:
    from birthmark.broker.denials import Denials
    from birthmark.broker.peer import Peer, PeerRefusedError

_log = logging.getLogger(__name__)


class ConnectionLog:
    """The log of one connection.

    Args:
        address: the client's.
        denials: remembers what has been said already.
    """

    __slots__ = ("_denials", "address")

    def __init__(self, address: str, denials: Denials) -> None:
        self.address = address
        self._denials = denials

    def handshake_failed(self, error: Exception) -> None:
        """Say which check failed, for whom, and what to do."""
        reason, hint = handshake_failure(error)
        if self._is_due(f"handshake {reason}"):
            _log.warning(
                "handshake with %s failed: %s%s",
                self.address,
                reason,
                _hint(hint),
                extra={"fields": {"event": "handshake_failed", "address": self.address, "reason": reason}},
            )

    def peer_refused(self, error: PeerRefusedError) -> None:
        """Say why a certificate that TLS took is not let in."""
        if self._is_due(f"peer {error.message}"):
            _log.warning(
                "refused the client at %s: %s%s",
                self.address,
                error.message,
                _hint(error.hint),
                extra={"fields": {"event": "peer_refused", "address": self.address, "reason": error.reason}},
            )

    def refused(self, peer: Peer | None, cause: str) -> None:
        """Say why a CONNECT was refused; `cause` is escaped already."""
        who = str(peer.device_id) if peer else "a client"
        if self._is_due(f"refusal {who} {cause}") and self._denials.budget.grants(who, "refusals"):
            _log.warning(
                "refused %s at %s: %s",
                who,
                self.address,
                cause,
                extra={"fields": {"event": "refused", "id": who, "address": self.address, "reason": cause}},
            )

    def connected(self, peer: Peer, client_id: str, tls: dict[str, object]) -> None:
        """Say who is here; `tls` is the stream's description."""
        if not self._denials.budget.grants(str(peer.device_id), "connections"):
            return
        shown = escaped(client_id)
        fields = {"event": "connected", "id": str(peer.device_id), "client_id": shown, "address": self.address}
        _log.info("%s connected from %s", shown, self.address, extra={"fields": fields | tls})

    def closed(self, client_id: str, why: str) -> None:
        """Say who has gone, and why."""
        shown = escaped(client_id)
        if not self._denials.budget.grants(shown.partition(":")[0], "connections"):
            return
        _log.info(
            "closed the connection of %s at %s: %s",
            shown,
            self.address,
            why,
            extra={"fields": {"event": "closed", "client_id": shown, "address": self.address, "reason": why}},
        )

    def timed_out(self, missing: str) -> None:
        """Say that a connection did not get as far as CONNECT in time."""
        if self._is_due(missing):
            _log.info("closed the connection from %s: %s in time", self.address, missing)

    def defect(self) -> None:
        """Say, within an exception's handler, that a defect of ours ended the connection."""
        if self._denials.budget.grants(place_of(self.address), "defects"):
            _log.exception("a defect ended the connection from %s", self.address)

    def _is_due(self, what: str) -> bool:
        return self._denials.due(f"{place_of(self.address)} {what}")


def _hint(hint: str) -> str:
    return f" ({hint})" if hint else ""
