"""Which gateway of a fleet an identity is at, without comparing the clocks of two of them.

Every move of an identity from one gateway to another has a number, its visit: a gateway that it comes to takes the
highest one that it has heard of, and one more. It says so with the sighting (`gateway/{name}/seen/{id}`), and the
others go by the numbers alone (a Lamport clock, one for each identity). Pure; nothing is sent or closed here.

Rules:

- Nothing is counted while an identity stays with a gateway, however often it connects there.
- A higher visit than ours: the identity has gone there, for certain.
- The same one: both of us took it, neither having heard of the other (a link was down). Both give it up; the
  identity comes back once, to one of us, with a higher one.
- A lower one: they have not heard of ours. If the identity is here, ours is said again and they give theirs up. If
  not, we give ours up, without certainty.
- Old ones, said again or come late, are lower than what they were followed by. So order and repetition do no harm.
- Services are not counted: they may be at several gateways at once.
- Nobody moves 2**53 times, but somebody may say so. Then each further move is one that both of us took: it costs
  no reconnection, as whoever has the identity hears of it, and gives it up.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

from birthmark.device.messages import MAX_VISIT

MAX_HEARD = 50_000
"""Identities of which another gateway's visit is remembered. The one heard of first makes room, and its next move
costs one reconnection more."""


class Verdict(Enum):
    """What to do about a visit that was heard of."""

    NOTHING = auto()
    GONE = auto()
    """The identity is there now."""
    CONTESTED = auto()
    """It may be there now: if it is here, it has to come back."""
    SAY_AGAIN = auto()
    """It is here, and they should know."""
    CAME_FROM_THERE = auto()
    """They know that it is here: what they said of it before is all said."""


class Visit(NamedTuple):
    """The last visit of an identity to this gateway."""

    number: int
    """0: not counted, or given up without certainty."""
    moved_to: str = ""
    """The gateway where it is instead."""

    @property
    def is_over(self) -> bool:
        """Whether the identity is elsewhere for certain."""
        return self.number > 0 and bool(self.moved_to)


class Visits:
    """The visits of all identities that were seen here, and the highest heard of elsewhere.

    Args:
        gateway: our name.
    """

    def __init__(self, gateway: str) -> None:
        self._gateway = gateway.lower()
        self._own: dict[str, Visit] = {}
        self._heard: dict[str, int] = {}

    def of(self, identity: str) -> Visit:
        """Return the last visit of an identity, by its folded name."""
        return self._own.get(identity, Visit(0))

    def take_up(self, identity: str, visit: Visit) -> None:
        """Begin with what was said before a restart."""
        self._own[identity] = visit

    def forget(self, identity: str) -> None:
        """Forget an identity."""
        self._own.pop(identity, None)

    def arrived(self, identity: str) -> bool:
        """Take note that an identity has connected here; return whether it is a new visit, to be said at once."""
        own = self.of(identity)
        if own.number and not own.moved_to:
            return False
        highest = max(own.number, self._heard.get(identity, 0))
        self._own[identity] = Visit(min(highest + 1, MAX_VISIT))
        return True

    def heard(self, identity: str, gateway: str, visit: Visit, *, is_here: bool) -> Verdict:
        """Take note of what another gateway says of an identity; `is_here`: it is connected to this one."""
        self._remember(identity, visit.number)
        own = self.of(identity)
        if visit.moved_to:
            came_here = visit.moved_to.lower() == self._gateway and is_here and visit.number in (0, own.number)
            return Verdict.CAME_FROM_THERE if came_here else Verdict.NOTHING
        if not visit.number or not own.number or own.moved_to:
            return Verdict.NOTHING
        if visit.number > own.number:
            self._own[identity] = Visit(visit.number, gateway)
            return Verdict.GONE
        if visit.number < own.number and is_here:
            return Verdict.SAY_AGAIN
        self._remember(identity, own.number)
        self._own[identity] = Visit(0, gateway)
        return Verdict.CONTESTED

    def _remember(self, identity: str, number: int) -> None:
        number = max(number, self._heard.pop(identity, 0))
        if number:
            if len(self._heard) >= MAX_HEARD:
                del self._heard[next(iter(self._heard))]
            self._heard[identity] = number
