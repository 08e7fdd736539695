"""All connections of the broker, bounded, and watched for what is overdue.

Rules:

- Beyond `max_connections`, and `max_connections_per_address`, a newcomer is closed at once. Of handshakes under
  way there are at most `MAX_HANDSHAKES`, and the oldest makes room: somebody who opens sockets and says nothing
  keeps nobody out.
- One look at every connection a tick, instead of a timer each: at 10,000 connections a few milliseconds a second.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import TYPE_CHECKING

from birthmark.broker.connection import Connection
from birthmark.broker.listener import place_of
from birthmark.broker.stream import Flusher, TlsStream

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

    from birthmark.broker.connection import Gateway
    from birthmark.broker.peer import Peer

TICK_S = 0.25
MAX_HANDSHAKES = 1_024

_log = logging.getLogger(__name__)


class Connections:
    """Takes accepted sockets and keeps their connections.

    Args:
        loop: the running loop.
        gateway: the broker they belong to.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, gateway: Gateway) -> None:
        self._loop = loop
        self._gateway = gateway
        self._flusher = Flusher(loop)
        self._all: set[Connection] = set()
        self._shaking: dict[Connection, None] = {}
        self._by_place: Counter[str] = Counter()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._all))

    def take(self, sock: ssl.SSLSocket, address: str, admit: Callable[[bytes], Peer]) -> None:
        """Begin with an accepted socket, or close it where there is no room; `admit` judges its certificate."""
        gateway = self._gateway
        gateway.counters.connections += 1
        if len(self._shaking) >= MAX_HANDSHAKES:
            self._evict()
        if len(self._all) >= gateway.limits.max_connections:
            sock.close()
            if gateway.exchange.denials.due("max_connections"):
                _log.warning("closed the connection from %s: limits.max_connections is reached", address)
            return
        place = place_of(address)
        if self._by_place[place] >= gateway.limits.max_connections_per_address:
            gateway.counters.address_refused += 1
            sock.close()
            if gateway.exchange.denials.due(f"max_connections_per_address {place}"):
                _log.warning("closed a connection from %s: limits.max_connections_per_address is reached", place)
            return
        self._by_place[place] += 1
        connection = Connection(gateway, address, admit)
        connection.stream = TlsStream(self._loop, sock, self._flusher, address, connection)
        self._all.add(connection)
        self._shaking[connection] = None
        self._empty.clear()
        connection.stream.start()

    def secured(self, connection: Connection) -> None:
        """A handshake is over."""
        self._shaking.pop(connection, None)

    def gone(self, connection: Connection) -> None:
        """A connection is over."""
        self._shaking.pop(connection, None)
        if connection in self._all:
            self._all.remove(connection)
            place = place_of(connection.address)
            self._by_place[place] -= 1
            if not self._by_place[place]:
                del self._by_place[place]
        if not self._all:
            self._empty.set()

    def check(self, now_s: float, wall_s: float) -> None:
        """End what is overdue; `now_s` is the loop's clock, `wall_s` seconds since 1970."""
        for connection in list(self._all):
            try:
                connection.check(now_s, wall_s)
            except Exception:  # noqa: BLE001 - a defect in one check must not stop the watch over all others
                _log.exception("a defect in a check of the connection from %s", connection.address)
                self._gateway.counters.defects += 1

    async def close_all(self, timeout_s: float) -> None:
        """Publish every will, then end every connection in good order; cut what is left after `timeout_s`."""
        for connection in list(self._all):
            connection.publish_will()
        for connection in list(self._all):
            connection.end(with_will=False)
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            for connection in list(self._all):
                connection.cut(with_will=False)

    def _evict(self) -> None:
        oldest = next(iter(self._shaking))
        del self._shaking[oldest]
        self._gateway.counters.handshakes_evicted += 1
        oldest.cut(with_will=False)
