"""Which topics go up an upstream and which come down, under what name, and that nothing goes in circles.

Pure. Rules:

- A topic has a name here and one at the upstream: the same, or with this gateway's prefix before it.
- What comes down on a name under which we send is our own, come back (MQTT 3.1.1 has no "no local"): an echo, and
  dropped.
- So that nothing of somebody else's is ever taken for an echo, a filter of what goes up and one of what comes down
  overlap nowhere but in a namespace that is this gateway's alone: its prefix, and `gateway/{its name}/`.
"""

from __future__ import annotations

from typing import NamedTuple

from birthmark.broker.filters import MAX_TOPIC_BYTES, matches, overlaps
from birthmark.device.topics import is_of_gateway, is_said_by_gateway


class Passage(NamedTuple):
    """Topics that pass: a filter by its names here, and what stands before them at the upstream."""

    local: str
    prefix: str = ""

    @property
    def remote(self) -> str:
        """The filter by its names at the upstream."""
        return self.prefix + self.local


class Mapping:
    """The topics of one upstream.

    Args:
        gateway: this gateway's name.
        up: what goes up.
        down: what comes down.
        max_topic_bytes: of a name at the upstream; what has a longer one stays here.
    """

    def __init__(
        self,
        gateway: str,
        up: tuple[Passage, ...],
        down: tuple[Passage, ...],
        max_topic_bytes: int = MAX_TOPIC_BYTES,
    ) -> None:
        self._max_topic_bytes = max_topic_bytes
        self.up = up
        self.down = down
        self._gateway = gateway

    def to_remote(self, topic: str) -> str | None:
        """Return the name under which a topic of ours goes up; None: it does not."""
        for passage in self.up:
            if matches(passage.local, topic):
                remote = passage.prefix + topic
                return remote if len(remote.encode()) <= self._max_topic_bytes else None
        return None

    def sent_as(self, remote: str) -> tuple[str, str] | None:
        """Return which topic of ours goes up under a name, and by which filter; None: none does."""
        for passage in self.up:
            topic = remote.removeprefix(passage.prefix)
            if topic and matches(passage.local, topic) and self.to_remote(topic) == remote:
                return topic, passage.local
        return None

    def is_too_long(self, topic: str) -> bool:
        """Whether a topic of ours would go up, but for the length of its name there."""
        return self.to_remote(topic) is None and any(matches(passage.local, topic) for passage in self.up)

    def to_local(self, remote: str) -> str | None:
        """Return the name here of a topic that comes down; None: it was not asked for, or is an echo."""
        for passage in self.down:
            if remote.startswith(passage.prefix) and matches(passage.remote, remote):
                topic = remote[len(passage.prefix) :]
                if not topic or topic.startswith("$") or self._is_ours(topic) or self.to_remote(topic) == remote:
                    return None
                return topic
        return None

    def subscriptions(self) -> tuple[str, ...]:
        """Return the filters to subscribe to at the upstream, each once."""
        return tuple(dict.fromkeys(passage.remote for passage in self.down))

    def loop(self) -> tuple[Passage, Passage] | None:
        """Return something that goes up and something that comes down of which others' topics are both."""
        for up in self.up:
            if up.prefix or is_of_gateway(up.local, self._gateway):
                continue
            for down in self.down:
                if overlaps(up.remote, down.remote):
                    return up, down
        return None

    def _is_ours(self, topic: str) -> bool:
        """Whether this gateway alone says it: nobody above may speak in its name."""
        return is_of_gateway(topic, self._gateway) and is_said_by_gateway(topic)
