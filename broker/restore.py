"""The broker's state as the store has it, put back together at the start, before anybody is let in.

Rules:

- Rights are not kept: each session's are asked of the policy in force, and subscriptions and queued messages that
  it no longer allows are dropped, on disk too.
- A session that has been unacknowledged messages at its client sends them again, under the same packet identifiers
  and in the same order (MQTT 3.1.1 §4.4.0-1).
- The time that a client has been gone goes on by the wall clock; whoever was connected when the broker died has
  been gone since now. A clock that cannot be right dates nothing, and makes nobody older.
- Retained messages beyond limits that have been lowered are dropped, and said so.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from birthmark.broker.packets import topic_field
from birthmark.broker.records import peer_from_text
from birthmark.broker.retained import Retained
from birthmark.broker.session import Message, Outgoing, Session
from birthmark.device.errors import SystemFailureError

if TYPE_CHECKING:
    from birthmark.broker.delivery import Exchange
    from birthmark.broker.records import Stored

_log = logging.getLogger(__name__)


def restore(exchange: Exchange, stored: Stored, *, now_s: float, wall_s: float | None) -> list[Session]:
    """Fill an empty exchange, whose journal has been started with the same rows.

    Returns:
        The spools: sessions of upstreams, which are not the exchange's.

    Args:
        exchange: to be filled.
        stored: all rows.
        now_s: the loop's clock.
        wall_s: seconds since 1970; None if nobody knows.

    Raises:
        SystemFailureError: the rows do not belong together.
    """
    try:
        _restore_retained(exchange, stored)
        sessions = _restore_sessions(exchange, stored, now_s, wall_s)
        _restore_deliveries(stored, sessions)
    except (KeyError, ValueError) as error:
        raise SystemFailureError(
            f"could not take up the stored sessions: the store is damaged ({type(error).__name__}: {error})",
            hint="restore sessions.db in the data folder from a backup; or move it away, and start without it",
        ) from error
    spools = []
    for session in sessions.values():
        if session.peer.is_upstream:
            spools.append(session)
        else:
            exchange.sessions.add(session)
            exchange.take_up(session)
    return spools


def _restore_retained(exchange: Exchange, stored: Stored) -> None:
    dropped = 0
    for row in stored.retained:
        publisher = None if row.publisher is None else peer_from_text(row.publisher)
        if not exchange.retained.put(Retained(row.topic, row.payload, row.qos, publisher)):
            exchange.journal.note_retained(Retained(row.topic, b"", 0, None))
            dropped += 1
    if dropped:
        _log.warning("dropped %s stored retained messages: limits.max_retained_* have been lowered", dropped)


def _restore_sessions(
    exchange: Exchange, stored: Stored, now_s: float, wall_s: float | None
) -> dict[int, Session]:
    sessions: dict[int, Session] = {}
    for row in stored.sessions:
        peer = peer_from_text(row.peer)
        session = Session(row.client_id, peer, exchange.policy.rights(peer.device_id, peer.role), clean=False)
        session.key = row.key
        session.left_at_s = now_s
        if wall_s is not None:
            if row.left_at is None:
                exchange.journal.note_session(session, left_at=wall_s)
            else:
                # A clock that has gone back since then makes nobody older.
                session.left_at_s -= max(0.0, wall_s - row.left_at)
        sessions[row.key] = session
    for subscription in stored.subscriptions:
        session = sessions[subscription.session]
        session.subscriptions[subscription.topic_filter] = subscription.qos
        session.filter_bytes += len(subscription.topic_filter)
        if subscription.is_replaying:
            session.replaying.add(subscription.topic_filter)
    for incoming in stored.incoming:
        sessions[incoming.session].incoming.add(incoming.packet_id)
    return sessions


def _restore_deliveries(stored: Stored, sessions: dict[int, Session]) -> None:
    messages: dict[int, Message] = {}
    for row in stored.messages:
        message = Message(row.topic, topic_field(row.topic), row.payload, row.qos, retain=row.retain)
        message.key = row.key
        messages[row.key] = message
    for delivery in stored.deliveries:
        session, message = sessions[delivery.session], messages[delivery.message]
        message.owed += 1
        outgoing = Outgoing(message, delivery.qos)
        outgoing.key, outgoing.is_released = delivery.key, delivery.is_released
        if delivery.packet_id:
            session.inflight[delivery.packet_id] = outgoing
            session.inflight_bytes += message.size_bytes
        else:
            session.queue.append(outgoing)
            session.queued_bytes += message.size_bytes
