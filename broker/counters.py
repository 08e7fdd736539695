"""What the broker counts. Plain numbers that only grow, read by whoever wants them."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counters:
    """Since the broker started."""

    connections: int = 0
    """TCP connections accepted."""
    handshakes_failed: int = 0
    handshakes_evicted: int = 0
    """Made room for newer ones."""
    peers_refused: int = 0
    """Certificates that passed TLS and not the broker: revoked, expired, outside the profile."""
    clients_connected: int = 0
    clients_refused: int = 0
    """CONNECTs answered with a refusal."""
    take_overs: int = 0
    moved_away: int = 0
    """Connections ended because their client connected to another gateway of the fleet."""
    malformed: int = 0
    """Connections ended for bytes that are no MQTT 3.1.1."""
    keepalives_missed: int = 0
    expired: int = 0
    """Connections ended because their certificate expired."""
    slow_cut_off: int = 0
    """Connections ended because their client did not read."""
    rate_limited: int = 0
    """Times that a client was not read from for a while, because it sent faster than it may."""
    address_refused: int = 0
    """Connections closed because their address had too many."""
    messages_in: int = 0
    messages_out: int = 0
    publishes_denied: int = 0
    subscribes_denied: int = 0
    wills_denied: int = 0
    dropped_slow: int = 0
    """QoS 0 messages that a slow client did not get."""
    dropped_queue_full: int = 0
    """QoS 1 and 2 messages that gave way, or found no room, in a full queue."""
    fell_behind: int = 0
    """Connections ended because their session's queue was full."""
    commits: int = 0
    """Groups of changes put on disk."""
    store_failures: int = 0
    """Groups that could not be; each is tried again."""
    unstored_closed: int = 0
    """Connections ended because what they asked to be kept could not be stored."""
    publishers_paused: int = 0
    """Times that a client was not read from because the disk had fallen behind."""
    not_retained: int = 0
    """Messages that the full store of retained messages did not take."""
    defects: int = 0
    """Connections ended by an exception that nobody planned; please report it."""
    revoked_closed: int = 0
    """Sessions closed by a revocation."""
    unchecked_closed: int = 0
    """Connections ended because the CRL of their CA had become too old to go by."""
    alarms: int = 0
    """Alarms that have begun: about the CRLs in force, and the gateway's own certificate."""

    upstream_forwarded: int = 0
    """Messages that an upstream has acknowledged."""
    upstream_received: int = 0
    """Messages that came down from an upstream."""
    upstream_dropped: int = 0
    """Messages that should have gone up and did not: the spool was full, or QoS 0 found no link."""
    upstream_refused: int = 0
    """Of those, messages over which an upstream ended every connection."""
    upstream_too_long: int = 0
    """Messages from an upstream that were longer than `max_packet_bytes`, and passed over."""
    upstream_echoes: int = 0
    """Messages from an upstream that were our own, or not asked for."""
    upstream_lost: int = 0
    """Connections to an upstream that ended."""
    publishers_held: int = 0
    """Times that a client was not read from because the spool of an upstream was nearly full."""

    def as_dict(self) -> dict[str, int]:
        """All of them by name."""
        return asdict(self)
