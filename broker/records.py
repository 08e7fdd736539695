"""What the durable store holds, as rows, and how a run of changes becomes one transaction.

Rules:

- Six tables, each a map from a key to a row: sessions, subscriptions, messages, deliveries, incoming packet
  identifiers, retained messages. Every change is a row under its key, or its removal. So a run of changes is
  the last word on each key, their order does not matter, and runs are merged by letting the later one win.
- A message is kept once, however many sessions it is owed to; a delivery says to which, in what state.
- Deliveries are numbered in the order in which they were made, and never renumbered: this is the order in which
  a session's are sent, and sent again.
- Nothing here is secret: no key, no password (payloads are the devices' own).

Pure: no I/O, no clock.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from birthmark.broker.peer import Peer
from birthmark.device.errors import IdentityError
from birthmark.device.identity import DeviceId, Role

ROW_BYTES = 256
"""About what a row takes, beside its text and payload, on its way to the disk."""


class SessionRow(NamedTuple):
    """A persistent session (MQTT 3.1.1 §3.1.2.4)."""

    key: int
    client_id: str
    peer: str
    """Whose it is, by the certificate of its last connection: `peer_text`."""
    left_at: float | None
    """When its client went, in seconds since 1970; None while it is connected."""


class SubscriptionRow(NamedTuple):
    """A subscription of a persistent session."""

    session: int
    topic_filter: str
    qos: int
    is_replaying: bool
    """Whether retained messages that it asked for are still to be sent."""


class MessageRow(NamedTuple):
    """A message that somebody is still owed."""

    key: int
    topic: str
    payload: bytes
    qos: int
    retain: bool


class DeliveryRow(NamedTuple):
    """A message owed to a session."""

    key: int
    session: int
    message: int
    qos: int
    packet_id: int
    """0 until it has been sent."""
    is_released: bool
    """QoS 2: PUBREC has come (§4.3.3)."""


class IncomingRow(NamedTuple):
    """A packet identifier of QoS 2 that a client has not released yet (§4.3.3)."""

    session: int
    packet_id: int


class RetainedRow(NamedTuple):
    """A retained message (§3.3.1.3)."""

    topic: str
    payload: bytes
    qos: int
    publisher: str | None
    """`peer_text`; None: the broker itself."""


@dataclass(slots=True)
class Changes:
    """The last word on each key of each table: a row, or None where it is to be removed."""

    sessions: dict[int, SessionRow | None] = field(default_factory=dict)
    subscriptions: dict[tuple[int, str], SubscriptionRow | None] = field(default_factory=dict)
    messages: dict[int, MessageRow | None] = field(default_factory=dict)
    deliveries: dict[int, DeliveryRow | None] = field(default_factory=dict)
    incoming: dict[tuple[int, int], IncomingRow | None] = field(default_factory=dict)
    retained: dict[str, RetainedRow | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(self.tables())

    def tables(self) -> tuple[dict[Any, Any], ...]:
        """The tables, in the order of the fields."""
        return (
            self.sessions,
            self.subscriptions,
            self.messages,
            self.deliveries,
            self.incoming,
            self.retained,
        )

    def add(self, later: Changes) -> None:
        """Take in later changes, which win."""
        for mine, theirs in zip(self.tables(), later.tables(), strict=True):
            mine.update(theirs)


@dataclass(slots=True)
class Stored:
    """All that a store holds: rows by table, deliveries in their order."""

    sessions: list[SessionRow] = field(default_factory=list)
    subscriptions: list[SubscriptionRow] = field(default_factory=list)
    messages: list[MessageRow] = field(default_factory=list)
    deliveries: list[DeliveryRow] = field(default_factory=list)
    incoming: list[IncomingRow] = field(default_factory=list)
    retained: list[RetainedRow] = field(default_factory=list)


def peer_text(peer: Peer) -> str:
    """A peer as text for a row; `peer_from_text` reads it."""
    record = {
        "id": str(peer.device_id),
        "role": str(peer.role),
        "issuer": peer.issuer,
        "cert_serial": f"{peer.cert_serial:x}",
        "not_before": peer.not_before.timestamp(),
        "not_after": peer.not_after.timestamp(),
    }
    return json.dumps(record, separators=(",", ":"))


def peer_from_text(text: str) -> Peer:
    """Read what `peer_text` wrote. Raises `ValueError` if it did not write it."""
    try:
        record = json.loads(text)
        role = Role(record["role"])
        return Peer(
            device_id=DeviceId(record["id"]),
            role=role,
            is_service=role.is_reserved,
            issuer=str(record["issuer"]),
            cert_serial=int(record["cert_serial"], 16),
            not_before=datetime.fromtimestamp(record["not_before"], UTC),
            not_after=datetime.fromtimestamp(record["not_after"], UTC),
        )
    except (ValueError, TypeError, KeyError, OverflowError, OSError, IdentityError) as error:
        raise ValueError(f"not a peer: {type(error).__name__}") from error
