"""Retained messages: the last one of each topic, for those who subscribe later (MQTT 3.1.1 §3.3.1.3).

Rules:

- An empty payload removes (§3.3.1-10, 11).
- Bounded by messages and by bytes, all together and for each identity that published them; what would exceed a
  bound is not retained (and the caller says so), what is there stays.
- Who speaks for many, a gateway below or the brokers above together, has half of the store: the other half is for
  who is here, and for what this broker says of itself.
- A message remembers who published it, so that a revocation can take back the presence of its author.
- `topics` walks a tree of levels, so a subscriber's own few topics are found without looking at all others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from birthmark.broker.peer import Peer

LEVEL_OVERHEAD_BYTES = 256
"""About what each level of a topic needs in the tree."""


class Retained:
    """One retained message."""

    __slots__ = ("payload", "publisher", "qos", "size_bytes", "topic")

    def __init__(self, topic: str, payload: bytes, qos: int, publisher: Peer | None) -> None:
        self.topic = topic
        self.payload = payload
        self.qos = qos
        self.publisher = publisher
        """None: the broker itself."""
        self.size_bytes = len(topic) + len(payload) + LEVEL_OVERHEAD_BYTES * (2 + topic.count("/"))
        """What it counts against the store's bound."""


class _Node:
    __slots__ = ("children", "message")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.message: Retained | None = None


class _Share:
    """What one identity has published of it."""

    __slots__ = ("messages", "size_bytes")

    def __init__(self) -> None:
        self.messages = 0
        self.size_bytes = 0


_ABOVE = "$above"
"""Whose share the messages of all upstreams count against."""


def _identity(message: Retained) -> str | None:
    """Return whose share it counts against; None: nobody's, it is the broker's own."""
    publisher = message.publisher
    if publisher is None:
        return None
    return _ABOVE if publisher.is_upstream else publisher.device_id.folded


class RetainedStore:
    """All retained messages.

    Args:
        max_messages: how many are kept.
        max_bytes: how much they may be together.
        max_messages_each: how many of them one identity may have published; by default, all. Who speaks for many
            may have half of `max_messages`, if that is more.
        max_bytes_each: how much those may be together; by default, everything. The same.
    """

    def __init__(
        self, max_messages: int, max_bytes: int, max_messages_each: int = 0, max_bytes_each: int = 0
    ) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._max_messages_each = max_messages_each or max_messages
        self._max_bytes_each = max_bytes_each or max_bytes
        self._shares: dict[str, _Share] = {}
        self._messages: dict[str, Retained] = {}
        self._root = _Node()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._messages)

    def __iter__(self) -> Iterator[Retained]:
        return iter(list(self._messages.values()))

    @property
    def total_bytes(self) -> int:
        """What all messages count together."""
        return self._bytes

    def get(self, topic: str) -> Retained | None:
        """Return the message of a topic."""
        return self._messages.get(topic)

    def put(self, message: Retained) -> bool:
        """Retain a message in place of its topic's last one; an empty payload removes that.

        Returns:
            Whether it was done; if not, the store is full and unchanged.
        """
        old = self._messages.get(message.topic)
        if not message.payload:
            if old is not None:
                self._remove(old)
            return True
        grown = self._bytes + message.size_bytes - (old.size_bytes if old else 0)
        if grown > self._max_bytes or (old is None and len(self._messages) >= self._max_messages):
            return False
        if not self._has_share(message, old):
            return False
        if old is not None:
            self._account(old, -1)
        self._account(message, 1)
        node = self._root
        for level in message.topic.split("/"):
            node = node.children.setdefault(level, _Node())
        node.message = message
        self._messages[message.topic] = message
        self._bytes = grown
        return True

    def topics(self, topic_filter: str) -> list[str]:
        """Return the topics with a retained message that a valid filter matches, in no order."""
        found: list[str] = []
        levels = topic_filter.split("/")
        nodes = [self._root]
        for depth, level in enumerate(levels):
            if level == "#":
                self._all_below(nodes, found, root=depth == 0)
                return found
            if level == "+":
                nodes = [
                    child
                    for node in nodes
                    for name, child in node.children.items()
                    if depth > 0 or not name.startswith("$")
                ]
            else:
                nodes = [node.children[level] for node in nodes if level in node.children]
            if not nodes:
                return found
        found.extend(node.message.topic for node in nodes if node.message is not None)
        return found

    def _has_share(self, message: Retained, old: Retained | None) -> bool:
        identity = _identity(message)
        if identity is None:
            return True
        share = self._shares.get(identity, _Share())
        messages, size_bytes = share.messages + 1, share.size_bytes + message.size_bytes
        if old is not None and _identity(old) == identity:
            messages, size_bytes = messages - 1, size_bytes - old.size_bytes
        max_messages, max_bytes = self._max_messages_each, self._max_bytes_each
        if message.publisher is not None and (message.publisher.is_upstream or message.publisher.is_gateway):
            max_messages = max(max_messages, self._max_messages // 2)
            max_bytes = max(max_bytes, self._max_bytes // 2)
        return messages <= max_messages and size_bytes <= max_bytes

    def _account(self, message: Retained, sign: int) -> None:
        identity = _identity(message)
        if identity is None:
            return
        share = self._shares.setdefault(identity, _Share())
        share.messages += sign
        share.size_bytes += sign * message.size_bytes
        if not share.messages:
            del self._shares[identity]

    def _all_below(self, nodes: list[_Node], found: list[str], *, root: bool) -> None:
        pending = nodes
        if root:
            pending = [child for name, child in self._root.children.items() if not name.startswith("$")]
        while pending:
            node = pending.pop()
            if node.message is not None:
                found.append(node.message.topic)
            pending.extend(node.children.values())

    def _remove(self, old: Retained) -> None:
        del self._messages[old.topic]
        self._bytes -= old.size_bytes
        self._account(old, -1)
        path = [("", self._root)]
        for level in old.topic.split("/"):
            path.append((level, path[-1][1].children[level]))
        path[-1][1].message = None
        for position in range(len(path) - 1, 0, -1):
            level, node = path[position]
            if node.message is not None or node.children:
                break
            del path[position - 1][1].children[level]
