"""How long to wait before trying again.

Rules:

- The ceiling grows exponentially and is capped; the wait is drawn evenly between a tenth of the ceiling and the
  ceiling, so that a fleet which lost its gateway at one moment does not come back at one moment.
- An identity that was refused waits longer than one that reached nobody, up to hours: asking again soon cannot
  help it, and costs the gateway a handshake each time.
- Whoever loses a connection that had held waits for up to five seconds at first: with a thousand devices, a
  gateway that was restarted has to make about two hundred handshakes in a second, not a thousand.
- Only a connection that held for a while starts the count anew. One that is accepted and dropped at once (two
  devices with one identity, a broker that falls over) counts as a failure like any other.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from birthmark.device.connection_checks import Check
from birthmark.device.errors import RefusedError
from birthmark.device.frozen import Frozen

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.device.errors import ConnectionFailedError

SHORTEST_FRACTION = 0.1


class Backoff(Frozen):
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


UNREACHABLE = Backoff(first_s=1.0, longest_s=120.0)
LOST = Backoff(first_s=5.0, longest_s=120.0)
"""After a connection that had held: the gateway may have gone, and then every device lost it at this moment."""
DOUBTFUL = Backoff(first_s=5.0, longest_s=900.0)
"""It was a refusal, but not of our identity for certain: a portal of the network answers in the broker's place,
the broker's certificate has expired, the connection was closed before a word."""
REFUSED = Backoff(first_s=5.0, longest_s=14_400.0, factor=4.0)
"""The broker said no to this identity: 5 s, 20 s, ... 1.4 h, 4 h."""
STABLE_AFTER_S = 10.0

OF_THE_IDENTITY = frozenset(
    {Check.REVOKED, Check.UNKNOWN_CA, Check.CERTIFICATE, Check.CLIENT_ID, Check.NOT_AUTHORISED, Check.MQTT_VERSION}
)
"""The checks that a broker makes of us, and that only a person can make us pass."""


class RetryTimer:
    """The waits of one client.

    Args:
        uniform: draws a number between two others.
        unreachable: waits while nobody answers; by default longer ones after a connection was lost.
        refused: waits after a refusal; by default by what was refused.
        stable_after_s: how long a connection must have held to start the count anew.
    """

    def __init__(
        self,
        uniform: Callable[[float, float], float] = random.uniform,
        *,
        unreachable: Backoff | None = None,
        refused: Backoff | None = None,
        stable_after_s: float = STABLE_AFTER_S,
    ) -> None:
        self._uniform = uniform
        self._unreachable = unreachable or UNREACHABLE
        self._lost = unreachable or LOST
        self._doubtful = refused or DOUBTFUL
        self._refused = refused or REFUSED
        self._stable_after_s = stable_after_s
        self._refusals = 0
        self._losses = 0

    def has_held(self, connected_for_s: float) -> bool:
        """Whether a connection held for long enough to count as one."""
        return connected_for_s >= self._stable_after_s

    def start_anew(self) -> None:
        """Wait as after the first failure: what the earlier ones were over is gone."""
        self._refusals = self._losses = 0

    def wait_s(self, error: ConnectionFailedError, *, connected_for_s: float = 0.0) -> float:
        """Return how long to wait after `error`; the connection it ended held `connected_for_s` (0: none did)."""
        if connected_for_s > 0:
            self._refusals = 0
        if self.has_held(connected_for_s):
            self._losses = 0
            self._unreachable = self._lost
        if isinstance(error, RefusedError):
            waits = self._refused if error.check in OF_THE_IDENTITY else self._doubtful
            wait_s = waits.wait_s(self._refusals, self._uniform)
            self._refusals += 1
        else:
            wait_s = self._unreachable.wait_s(self._losses, self._uniform)
            self._losses += 1
        return wait_s
