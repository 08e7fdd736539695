"""Sessions: what the broker remembers of a client, connected or not (MQTT 3.1.1 §3.1.2.4, §4.1).

Rules:

- A session belongs to one client id, and that to one identity; whoever asks for a session by its client id has
  been checked for it before (`connection.py`).
- A clean session ends with its connection; any other waits for its client, `session_expiry_s` at most.
- A session whose client has moved to another gateway of the fleet is away: it keeps what it is owed and its
  subscriptions, and is owed nothing new until its client comes back.
- A session that is kept in the store (`journal.py`) has a `key`; so has each message owed to it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from birthmark.broker.packets import publish_head

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from birthmark.broker.connection import Connection
    from birthmark.broker.peer import Peer
    from birthmark.broker.policy import Rights
    from birthmark.broker.stream import TlsStream

MAX_SESSIONS_PER_SERVICE = 100
"""Sessions `CN:anything` of one service identity."""
MAX_REMEMBERED_DECISIONS = 256
"""Of one session, by topic; then it starts afresh."""

MESSAGE_OVERHEAD_BYTES = 128


class Message:
    """A message on its way, shared by all its recipients."""

    __slots__ = ("_heads", "key", "owed", "payload", "qos", "retain", "size_bytes", "topic", "topic_bytes")

    def __init__(self, topic: str, topic_bytes: bytes, payload: bytes, qos: int, *, retain: bool = False) -> None:
        self.topic = topic
        self.topic_bytes = topic_bytes
        self.payload = payload
        self.qos = qos
        self.retain = retain
        """Whether its recipient is told that it was retained (§3.3.1-8): only right after a SUBSCRIBE."""
        self.size_bytes = len(topic_bytes) + len(payload) + MESSAGE_OVERHEAD_BYTES
        self.key = 0
        """In the store; 0: it is not in it."""
        self.owed = 0
        """To how many persistent sessions it is owed."""
        self._heads: tuple[int, bytes] = (0, b"")

    def head(self, qos: int) -> bytes:
        """The PUBLISH up to its packet identifier, at QoS 1 or 2; encoded once for all who get it at that QoS."""
        known, head = self._heads
        if known != qos:
            head = publish_head(self.topic_bytes, len(self.payload), qos, retain=self.retain)
            self._heads = (qos, head)
        return head


class Outgoing:
    """A message of QoS 1 or 2 that its recipient has not acknowledged yet."""

    __slots__ = ("is_released", "key", "message", "qos")

    def __init__(self, message: Message, qos: int) -> None:
        self.message = message
        self.qos = qos
        self.is_released = False
        """QoS 2: PUBREC has come (§4.3.3)."""
        self.key = 0
        """In the store; 0: it is not in it."""


class Session:
    """One client's session."""

    __slots__ = (
        "clean",
        "client_id",
        "connection",
        "filter_bytes",
        "incoming",
        "inflight",
        "inflight_bytes",
        "is_away",
        "key",
        "last_packet_id",
        "left_at_s",
        "may_publish",
        "may_receive",
        "peer",
        "queue",
        "queued_bytes",
        "replay",
        "replaying",
        "rights",
        "stream",
        "subscriptions",
    )

    def __init__(self, client_id: str, peer: Peer, rights: Rights, *, clean: bool) -> None:
        self.client_id = client_id
        self.peer = peer
        """Whose it is, by the certificate of its last connection."""
        self.rights = rights
        self.clean = clean
        self.is_away = False
        self.key = 0
        """In the store; 0: it is not in it, and ends with the broker if not before."""
        self.connection: Connection | None = None
        self.stream: TlsStream | None = None
        """The connection's stream: what a delivery needs, without a detour."""
        self.subscriptions: dict[str, int] = {}
        self.filter_bytes = 0
        self.inflight: dict[int, Outgoing] = {}
        """By packet identifier, in the order of sending, which is the order of sending again."""
        self.inflight_bytes = 0
        self.queue: deque[Outgoing] = deque()
        """Messages of QoS 1 and 2 that wait for room, or for the client."""
        self.queued_bytes = 0
        self.incoming: set[int] = set()
        """Packet identifiers of QoS 2 that the client has not released yet (§4.3.3)."""
        self.replay: dict[str, int] = {}
        """Topics whose retained message is still to be sent, with the QoS granted."""
        self.replaying: set[str] = set()
        """The filters, of those kept in the store, that asked for them."""
        self.last_packet_id = 0
        self.left_at_s = 0.0
        """When its client went, by the loop's clock."""
        self.may_publish: dict[str, bool | Callable[[str, bytes, Peer], None]] = {}
        """Decisions made: denied, allowed, or taken by the gateway itself."""
        self.may_receive: dict[str, bool] = {}

    def set_rights(self, rights: Rights) -> None:
        """Go by other rights from now on, and forget what the old ones decided."""
        self.rights = rights
        self.may_publish.clear()
        self.may_receive.clear()

    def take_packet_id(self) -> int:
        """Return a packet identifier that is not in use (§2.3.1). There is one: `max_inflight` is below 65,536."""
        packet_id = self.last_packet_id
        while True:
            packet_id = packet_id % 65_535 + 1
            if packet_id not in self.inflight:
                self.last_packet_id = packet_id
                return packet_id

    @property
    def waiting_count(self) -> int:
        """Messages queued for it or not acknowledged by it."""
        return len(self.queue) + len(self.inflight)

    # What amqtt's $SYS plug-in reads of a session.

    @property
    def inflight_in_count(self) -> int:
        """Messages received and not released yet."""
        return len(self.incoming)

    @property
    def inflight_out_count(self) -> int:
        """Messages sent and not acknowledged yet."""
        return len(self.inflight)

    @property
    def retained_messages_count(self) -> int:
        """Messages queued (amqtt's word for it)."""
        return len(self.queue)


class Sessions:
    """All sessions, by client id and by identity."""

    def __init__(self, max_sessions: int) -> None:
        self._max_sessions = max_sessions
        self._by_client_id: dict[str, Session] = {}
        self._by_identity: dict[str, set[Session]] = {}

    def __len__(self) -> int:
        return len(self._by_client_id)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_client_id.values()))

    def get(self, client_id: str) -> Session | None:
        """Return the session of a client id."""
        return self._by_client_id.get(client_id)

    def of(self, peer: Peer) -> set[Session]:
        """Return the sessions of an identity, whichever of its certificates they last saw."""
        return self.of_identity(peer.device_id.folded)

    def of_identity(self, folded: str) -> set[Session]:
        """Return the sessions of an identity by its folded name."""
        return set(self._by_identity.get(folded, ()))

    def has_room(self, peer: Peer) -> bool:
        """Whether another session may be made for an identity."""
        own = len(self._by_identity.get(peer.device_id.folded, ()))
        return len(self._by_client_id) < self._max_sessions and own < MAX_SESSIONS_PER_SERVICE

    def add(self, session: Session) -> None:
        """Keep a session; its client id must be free."""
        self._by_client_id[session.client_id] = session
        self._by_identity.setdefault(session.peer.device_id.folded, set()).add(session)

    def remove(self, session: Session) -> None:
        """Forget a session, if it is the one kept under its client id."""
        if self._by_client_id.get(session.client_id) is not session:
            return
        del self._by_client_id[session.client_id]
        identity = session.peer.device_id.folded
        own = self._by_identity[identity]
        own.discard(session)
        if not own:
            del self._by_identity[identity]
