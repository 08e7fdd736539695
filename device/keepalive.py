"""How long a connection may be silent before it is asked whether it is still there (MQTT 3.1.1 §3.1.2.10).

A modem's network forgets a connection that was silent for too long, and does not say so; how long that is nobody
knows. A ping more often than needed costs traffic and a battery.

Rules:

- It begins with what was enrolled, and stays between a shortest and a longest time.
- A connection that was lost in silence halves it: the network forgot it sooner than that.
- One that held for an hour and was not lost in silence lengthens it by a quarter; but not to what was too long
  before, until one has held for a day.
- MQTT says it at CONNECT, so that it changes with the next connection. Nothing is kept over a restart.
"""

from __future__ import annotations

from typing import Final

HELD_S: Final = 3600.0
HELD_LONG_S: Final = 86_400.0
SHORTEST_S: Final = 10
"""By default, or the enrolled one if that is shorter."""


class Keepalive:
    """The keepalive of one client.

    Args:
        enrolled_s: what it begins with.
        bounds_s: the shortest and the longest; by default from a quarter of the enrolled one to that.
    """

    def __init__(self, enrolled_s: int, bounds_s: tuple[int, int] | None = None) -> None:
        default = (min(enrolled_s, max(SHORTEST_S, enrolled_s // 4)), enrolled_s)
        self._shortest_s, self._longest_s = bounds_s or default
        self._too_long_s = self._longest_s + 1
        self.current_s = min(max(enrolled_s, self._shortest_s), self._longest_s)

    def ended(self, held_s: float, *, in_silence: bool) -> None:
        """Take note of how a connection ended."""
        if in_silence:
            self._too_long_s = self.current_s
            self.current_s = max(self._shortest_s, self.current_s // 2)
            return
        if held_s >= HELD_LONG_S:
            self._too_long_s = self._longest_s + 1
        if held_s >= HELD_S:
            longer_s = min(self.current_s + max(1, self.current_s // 4), self._longest_s)
            self.current_s = max(self.current_s, min(longer_s, self._too_long_s - 1))
