"""What becomes of the sessions of devices that roam: let go of, sent away, spoken for again.

A roamer is an identity that has one session, under its own name, by a valid certificate: no service (it may be at
several gateways at once), and nobody on the renewal listener.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from birthmark.device.topics import status

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.broker.delivery import Exchange
    from birthmark.broker.peer import Peer
    from birthmark.broker.session import Session
    from birthmark.device.identity import DeviceId


class Roamers:
    """The devices of a broker, as a fleet sees them. Identities are folded names.

    Args:
        exchange: the broker's.
        unforwarded: as whom to publish what is to go up no upstream.
    """

    def __init__(self, exchange: Exchange, unforwarded: Peer) -> None:
        self._exchange = exchange
        self._unforwarded = unforwarded

    def is_here(self, identity: str) -> bool:
        """Whether an identity is connected."""
        session = self._session(identity)
        return session is not None and session.connection is not None

    def let_go(self, device_id: DeviceId, gateway: str, *, is_certain: bool) -> bool:
        """End a device's connection without its will, and if it is elsewhere for certain, all that speaks for it.

        Returns:
            Whether it was connected.
        """
        session = self._session(device_id.folded)
        connection = session.connection if session is not None else None
        if connection is not None:
            connection.moved(gateway)
        if is_certain:
            self._send_away(device_id.folded)
            known = self._exchange.retained.get(status(device_id))
            if known is not None and _is_of(known.publisher, device_id.folded):
                self._exchange.publish(known.topic, b"", known.qos, retain=True, publisher=self._unforwarded)
        return connection is not None

    def send_away(self, is_elsewhere: Callable[[str], bool]) -> None:
        """Send away the sessions of everybody who is elsewhere."""
        for session in self._exchange.sessions:
            if is_elsewhere(session.peer.device_id.folded):
                self._send_away(session.peer.device_id.folded)

    def say_presence_again(self, identity: str) -> None:
        """Publish the retained presence of a device once more, if it is here."""
        session = self._session(identity)
        if session is None or session.connection is None:
            return
        known = self._exchange.retained.get(status(session.peer.device_id))
        if known is not None and _is_of(known.publisher, identity):
            self._exchange.publish(known.topic, known.payload, known.qos, retain=True, publisher=known.publisher)

    def _session(self, identity: str) -> Session | None:
        for session in self._exchange.sessions.of_identity(identity):
            if not session.peer.is_service and not session.peer.for_renewal:
                return session
        return None

    def _send_away(self, identity: str) -> None:
        session = self._session(identity)
        if session is not None and session.connection is None and not session.is_away:
            self._exchange.send_away(session)


def _is_of(publisher: Peer | None, identity: str) -> bool:
    """Whether an identity has published it itself; an upstream may have any name, a device's too."""
    return publisher is not None and not publisher.is_upstream and publisher.device_id.folded == identity
