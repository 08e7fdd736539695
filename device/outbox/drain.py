"""The bounded rate of a backlog: what gathered while there was no connection does not all go out in one moment.

Else a fleet that gets its network back would flood its broker. What is published after that goes as it comes.
"""

from __future__ import annotations


class Drain:
    """When the messages of a backlog may go. It has no clock: seconds that never go back are passed in.

    Args:
        per_s: how many in a second; 0: as fast as the broker takes them.
    """

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._newest = 0
        self._next_s = 0.0

    def begin(self, newest: int, now_s: float) -> None:
        """Take everything up to this message for a backlog."""
        self._newest, self._next_s = newest, now_s

    def lets_go(self, seq: int, now_s: float) -> bool:
        """Return whether a message may go now; it then counts as gone."""
        if seq > self._newest or not self._per_s:
            return True
        if now_s < self._next_s:
            return False
        # Who comes late may catch up by one message, not by all that would have gone meanwhile.
        self._next_s = max(self._next_s, now_s - 1 / self._per_s) + 1 / self._per_s
        return True

    def wait_s(self, seq: int, now_s: float) -> float | None:
        """Return how long a message has to wait; None for one that is not of the backlog."""
        return None if seq > self._newest else max(0.0, self._next_s - now_s)
