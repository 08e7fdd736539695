"""The broker, as the gateway around it sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from birthmark.broker.counters import Counters
    from birthmark.broker.fleet.roamers import Roamers
    from birthmark.broker.peer import Peer
    from birthmark.broker.policy import Policy
    from birthmark.broker.upstream.upstreams import Upstreams
    from birthmark.device.messages import ClosedIdentity


class Server(Protocol):
    """What the gateway asks of the broker; `server.GatewayBroker` is one."""

    counters: Counters
    on_client: Callable[[Peer, str], None] | None
    """Told of each client that is let in, with its address."""
    upstreams: Upstreams
    roamers: Roamers

    @property
    def connected_count(self) -> int:
        """Sessions with a connection."""

    def publish(self, topic: str, payload: bytes, qos: int = 0, *, retain: bool = False) -> None:
        """Publish a message of the broker's own."""

    def own_retained(self, topic_filter: str) -> list[bytes]:
        """Return the payloads that the broker itself has retained on some topics."""

    def on_gateway_message(self, topic_filter: str, callback: Callable[[str, bytes, Peer], None]) -> None:
        """Have messages on the topics of a filter given to `callback`, and to nobody else."""

    def set_policy(self, policy: Policy) -> int:
        """Go by another policy; return how many subscriptions it ended."""

    def set_tls_context(self, context: ssl.SSLContext, renewal: ssl.SSLContext | None = None) -> None:
        """Use other credentials from the next connection on."""

    def close_identities(
        self, is_revoked: Callable[[Peer], bool], *, started_s: float | None = None
    ) -> list[ClosedIdentity]:
        """Close everything of the identities that `is_revoked` names."""

    async def settle(self) -> bool:
        """Wait, for a bounded time, until all that has happened is on disk; return whether it is."""

    def end_connections(self, of: Callable[[Peer], bool], why: str) -> int:
        """End the connections of some peers in good order; return how many."""
