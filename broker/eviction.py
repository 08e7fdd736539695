"""What a revocation does to those who are here already.

Their connections are cut (a TCP reset: a client that does not read is out as well), their wills suppressed,
their sessions deleted with queue and subscriptions, and their retained presence (of a gateway's link: its status,
which would say for ever that it is there) is replaced by an empty retained message, which live subscribers get.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from birthmark.device.identity import BrokerName
from birthmark.device.messages import ClosedIdentity
from birthmark.device.topics import gateway_status, status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from birthmark.broker.connection import Connection
    from birthmark.broker.delivery import Exchange
    from birthmark.broker.peer import Peer


@dataclass(slots=True)
class _Tally:
    sessions_closed: int = 0
    elapsed_ms: float = 0.0
    will_suppressed: bool = False
    queued: int = 0
    presence: bool = False


def close_identities(
    exchange: Exchange,
    connections: Iterable[Connection],
    is_revoked: Callable[[Peer], bool],
    started_s: float,
) -> list[ClosedIdentity]:
    """Close everything of the identities that `is_revoked` names; return what was done, one entry each.

    Args:
        exchange: the broker's sessions and retained messages.
        connections: all of them, those before their CONNECT as well.
        is_revoked: asked about each certificate that is known here.
        started_s: `time.monotonic()` when the revocation arrived.
    """
    tallies = _Tallies()
    for connection in connections:
        peer = connection.peer
        if peer is not None and not connection.stream.is_closed and is_revoked(peer):
            _cut(exchange, connection, tallies, peer, started_s)
    for session in exchange.sessions:
        if is_revoked(session.peer):
            tallies.of(session.peer).queued += session.waiting_count
            exchange.forget(session)
    _purge_presence(exchange, is_revoked, tallies)
    return tallies.reports()


class _Tallies:
    def __init__(self) -> None:
        self._by_certificate: dict[tuple[str, int], _Tally] = {}

    def of(self, peer: Peer) -> _Tally:
        return self._by_certificate.setdefault((str(peer.device_id), peer.cert_serial), _Tally())

    def reports(self) -> list[ClosedIdentity]:
        return [
            ClosedIdentity(
                id=device_id,
                cert_serial=f"{cert_serial:x}",
                sessions_closed=entry.sessions_closed,
                elapsed_ms=entry.elapsed_ms,
                will_suppressed=entry.will_suppressed,
                queued_messages_purged=entry.queued,
                retained_presence_purged=entry.presence,
            )
            for (device_id, cert_serial), entry in self._by_certificate.items()
        ]


def _cut(exchange: Exchange, connection: Connection, tallies: _Tallies, peer: Peer, started_s: float) -> None:
    session = connection.session
    if session is None:
        connection.cut(with_will=False)  # before its CONNECT, or after its goodbye: nothing but a socket
        return
    entry = tallies.of(peer)
    entry.queued += session.waiting_count
    entry.will_suppressed |= connection.will is not None
    connection.cut(with_will=False)
    exchange.forget(session)
    entry.sessions_closed += 1
    entry.elapsed_ms = (time.monotonic() - started_s) * 1_000
    exchange.counters.revoked_closed += 1


def _presence(author: Peer) -> str:
    """Return where somebody says that it is there."""
    return gateway_status(BrokerName(str(author.device_id))) if author.is_gateway else status(author.device_id)


def _purge_presence(exchange: Exchange, is_revoked: Callable[[Peer], bool], tallies: _Tallies) -> None:
    for message in exchange.retained:
        author = message.publisher
        if author is None or author.is_upstream or message.topic != _presence(author) or not is_revoked(author):
            continue
        if any(not is_revoked(session.peer) for session in exchange.sessions.of(author)):
            # The device lives on with a newer certificate; its presence is its own.
            continue
        tallies.of(author).presence = True
        exchange.publish(message.topic, b"", message.qos, retain=True, publisher=None)
