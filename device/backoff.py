"""How long to wait before trying again.

Rules:

- The ceiling grows exponentially and is capped; the wait is drawn evenly between a tenth of the ceiling and the
  ceiling, so that a fleet which lost its gateway at one moment does not come back at one moment.
- An identity that was refused waits longer than one that reached nobody: asking again soon cannot help it, and
  costs the gateway a handshake each time.
- Only a connection that held for a while starts the count anew. One that is accepted and dropped at once (two
  devices with one identity, a broker that falls over) counts as a failure like any other.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from birthmark.device.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.device.errors import ConnectionFailedError

SHORTEST_FRACTION = 0.1


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits that grow: the n-th (from 0) is at most `first_s * factor ** n`, never more than `longest_s`."""

    first_s: float
    longest_s: float
    factor: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.first_s <= self.longest_s or self.factor < 1:
            raise ValueError("a wait is positive and grows")

    def ceiling_s(self, attempt: int) -> float:
        """Return the longest wait after `attempt` earlier failures."""
        ceiling = self.first_s
        for _ in range(attempt):
            ceiling *= self.factor
            if ceiling >= self.longest_s:
                return self.longest_s
        return ceiling

    def wait_s(self, attempt: int, uniform: Callable[[float, float], float]) -> float:
        """Draw the wait after `attempt` earlier failures with `uniform(low, high)`."""
        ceiling = self.ceiling_s(attempt)
        return uniform(ceiling * SHORTEST_FRACTION, ceiling)


UNREACHABLE = Backoff(first_s=1.0, longest_s=60.0)
REFUSED = Backoff(first_s=5.0, longest_s=900.0)
STABLE_AFTER_S = 10.0


class RetryTimer:
    """The waits of one client.

    Args:
        uniform: draws a number between two others.
        unreachable: waits while nobody answers.
        refused: waits after a refusal.
        stable_after_s: how long a connection must have held to start the count anew.
    """

    def __init__(
        self,
        uniform: Callable[[float, float], float] = random.uniform,
        *,
        unreachable: Backoff = UNREACHABLE,
        refused: Backoff = REFUSED,
        stable_after_s: float = STABLE_AFTER_S,
    ) -> None:
        self._uniform = uniform
        self._unreachable = unreachable
        self._refused = refused
        self._stable_after_s = stable_after_s
        self._refusals = 0
        self._losses = 0

    def wait_s(self, error: ConnectionFailedError, *, connected_for_s: float = 0.0) -> float:
        """Return how long to wait after `error`; the connection it ended held `connected_for_s` (0: none did)."""
        if connected_for_s > 0:
            self._refusals = 0
        if connected_for_s >= self._stable_after_s:
            self._losses = 0
        if isinstance(error, RefusedError):
            wait_s = self._refused.wait_s(self._refusals, self._uniform)
            self._refusals += 1
        else:
            wait_s = self._unreachable.wait_s(self._losses, self._uniform)
            self._losses += 1
        return wait_s
