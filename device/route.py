"""Which of its brokers a device connects to next.

Rules:

- They are tried in the order of preference, each once, and then there is a wait (`backoff`). So a gateway that is
  gone costs the others nothing, and one that refuses us does not keep us from one that does not.
- After a connection that had held, it begins again with the first.
- Connected to another than the first, it looks for the first after a while; each time that the first turns out not
  to do, in twice the time, up to six hours. A fleet does not come back at one moment: the times are drawn.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from birthmark.device.errors import UnreachableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from birthmark.device.credentials import BrokerAddress
    from birthmark.device.errors import ConnectionFailedError

LONGEST_RETURN_S: Final = 21_600.0


class Route:
    """The brokers of one client.

    Args:
        addresses: in the order of preference, at least one.
        return_after_s: how soon the first is looked for, from another one.
        uniform: draws a number between two others.
    """

    def __init__(
        self,
        addresses: Sequence[BrokerAddress],
        return_after_s: float,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._addresses = list(dict.fromkeys(addresses))
        self._first_after_s = return_after_s
        self._return_after_s = return_after_s
        self._uniform = uniform
        self._at = 0
        self._errors: list[ConnectionFailedError] = []
        self._returned = False

    @property
    def broker(self) -> BrokerAddress:
        """Where to connect now."""
        return self._addresses[self._at]

    @property
    def first(self) -> BrokerAddress:
        """The one that is preferred."""
        return self._addresses[0]

    def replace_first(self, broker: BrokerAddress) -> None:
        """Prefer another one in the place of the first, and begin with it."""
        self._addresses = list(dict.fromkeys([broker, *self._addresses[1:]]))
        self.restart()

    def restart(self) -> None:
        """Begin again with the first."""
        self._at = 0
        self._errors.clear()

    def failed(self, error: ConnectionFailedError) -> ConnectionFailedError | None:
        """Go on to the next; once all have failed, return the error that stands for them all.

        That is the last of one that may pass, if there is any: what refuses us at one may be cured at another.
        """
        self._errors.append(error)
        self._at = (self._at + 1) % len(self._addresses)
        if self._at:
            return None
        passing = [one for one in self._errors if isinstance(one, UnreachableError)]
        verdict = (passing or self._errors)[-1]
        self.restart()
        return verdict

    def connected(self) -> float | None:
        """Take note of a connection; return in how many seconds to look for the first, if this is another."""
        self._errors.clear()
        if self._at == 0:
            self._return_after_s, self._returned = self._first_after_s, False
            return None
        if self._returned:
            self._return_after_s = min(2 * self._return_after_s, LONGEST_RETURN_S)
            self._returned = False
        return self._uniform(self._return_after_s / 2, self._return_after_s * 3 / 2)

    def look_again_s(self) -> float:
        """Return in how many seconds to look for the first once more: it was not there."""
        return self._uniform(self._return_after_s / 2, self._return_after_s * 3 / 2)

    def go_back(self) -> None:
        """Connect to the first next: it is there again."""
        self.restart()
        self._returned = True
