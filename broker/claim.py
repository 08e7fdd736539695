"""Whose session a CONNECT may have, and taking it (MQTT 3.1.1 §3.1.2.4, §3.1.3.1, §3.1.4).

Rules:

- The client id is the certificate's CN, exactly; empty with a clean session it is taken as the CN; a service may
  also use `CN:anything`. `bound_client_id` is asked first, and nobody else's session is ever looked up.
- On the renewal listener the session is another one, always clean, under a name that no client id can be: a
  certificate that has expired neither takes over the session of one that is valid nor finds anything in it.
- A session has one connection: `claim_session` has the old one closed, in good order and with its will, before
  the new one gets anything. A clean session starts afresh.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from birthmark.broker.session import Session

if TYPE_CHECKING:
    from birthmark.broker.delivery import Exchange
    from birthmark.broker.packets import Connect
    from birthmark.broker.peer import Peer
    from birthmark.broker.policy import Policy, Rights


RENEWAL_SUFFIX = "/renewal"
"""No identity has a slash in its name, and no client id but a service's has anything after the name."""


def rights_of(policy: Policy, peer: Peer) -> Rights:
    """Return what a peer may do by its certificate and by the listener that let it in."""
    return policy.rights(peer.device_id, peer.role, for_renewal=peer.for_renewal)


def bound_client_id(packet: Connect, peer: Peer) -> str | None:
    """Return the client id that this peer has by this CONNECT; None: it asks for one that is not its own."""
    own = str(peer.device_id)
    if peer.for_renewal:
        return f"{own}{RENEWAL_SUFFIX}" if packet.client_id in ("", own) else None
    if packet.client_id == own or (not packet.client_id and packet.clean):
        return own
    if peer.is_service and packet.client_id.startswith(f"{own}:"):
        return packet.client_id
    return None


def claim_session(
    exchange: Exchange, client_id: str, peer: Peer, *, clean: bool, address: str
) -> tuple[Session | None, bool]:
    """Return the session to go on with (None: there are too many), and whether it was there before.

    `client_id` comes from `bound_client_id`. `address` is where the new connection is from, for the log.
    """
    clean = clean or peer.for_renewal
    old = exchange.sessions.get(client_id)
    if old is not None and old.connection is not None:
        exchange.counters.take_overs += 1
        old.connection.taken_over(address)
        old = exchange.sessions.get(client_id)
    if old is not None and clean:
        exchange.forget(old)
        old = None
    if old is not None:
        has_changed = old.peer.role != peer.role or old.peer.device_id != peer.device_id
        old.peer = peer
        if has_changed:
            # A new certificate may carry another role: what the old one was granted is asked again.
            exchange.renew_rights(old)
            exchange.router.forget_routes()
        if old.is_away:
            exchange.come_back(old)
        if old.key:
            exchange.journal.note_session(old)
        return old, True
    if not exchange.sessions.has_room(peer):
        return None, False
    session = Session(client_id, peer, rights_of(exchange.policy, peer), clean=clean)
    exchange.sessions.add(session)
    if not clean:
        exchange.journal.open_session(session)
    return session, False
