"""Devices that move from one gateway of a fleet to another: the old session makes way, presence stays right.

Gateways hear each other's sightings (`gateway/{name}/seen/{id}`), live or retained, in whatever order; `visits.py`
says what one means. What is done about it here (docs/adr/0027-roaming.md):

- An identity that is elsewhere for certain: its connection is cut without its will (the other gateway speaks for
  its presence now), and its retained presence is taken away here, and here alone. Its session is kept, and away:
  what it is owed it gets when it comes back, what is said meanwhile it gets where it is.
- One that may be elsewhere: its connection is cut without its will. If it was here, it comes back.
- One that another gateway has just let go, and that is here: its retained presence is sent up once more. What the
  other one sent up of it before, its last will perhaps, is older.
- Sessions of services, and connections on the renewal listener, are nobody's move.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from birthmark.broker.fleet.visits import Verdict, Visit
from birthmark.device.errors import IdentityError, RemoteProtocolError
from birthmark.device.messages import Sighting
from birthmark.device.topics import sighting_of

if TYPE_CHECKING:
    from birthmark.broker.fleet.roamers import Roamers
    from birthmark.broker.fleet.visits import Visits
    from birthmark.broker.sightings import Sightings
    from birthmark.device.identity import BrokerName

MAX_TOLD_AT_ONCE: Final = 250
"""Presences sent up again in one round; a second is a round."""

_log = logging.getLogger(__name__)


class Roaming:
    """Acts on what other gateways have seen.

    Args:
        gateway: our name.
        visits: which identity is at which gateway.
        sightings: what we have seen, and say.
        roamers: the devices of the broker.
    """

    def __init__(self, gateway: BrokerName, visits: Visits, sightings: Sightings, roamers: Roamers) -> None:
        self._gateway = str(gateway).lower()
        self._visits = visits
        self._sightings = sightings
        self._roamers = roamers
        self._presences: dict[str, None] = {}

    def begin(self) -> None:
        """Send away the stored sessions of those who had moved before a restart."""
        self._roamers.send_away(lambda identity: self._visits.of(identity).is_over)

    def heard(self, topic: str, payload: bytes) -> None:
        """Act on a sighting of another gateway. Never raises; what is none is passed over."""
        try:
            gateway, device_id = sighting_of(topic)
            told = Sighting.from_bytes(payload) if payload else None
        except (IdentityError, RemoteProtocolError):
            return
        if told is None or told.id.lower() != device_id.folded or str(gateway).lower() == self._gateway:
            return
        identity, visit = device_id.folded, Visit(told.visit, told.moved_to)
        is_here = self._roamers.is_here(identity)
        verdict = self._visits.heard(identity, str(gateway), visit, is_here=is_here)
        if verdict is Verdict.CAME_FROM_THERE:
            self._presences[identity] = None
        elif verdict is not Verdict.NOTHING:
            self._sightings.say_again(identity)
        if verdict is Verdict.GONE or verdict is Verdict.CONTESTED:
            is_certain = verdict is Verdict.GONE
            if self._roamers.let_go(device_id, str(gateway), is_certain=is_certain):
                _log.info("%s is at the gateway %s now: its connection here is closed", device_id, gateway)

    def tell(self) -> None:
        """Send up again the presences that are due."""
        for identity in list(self._presences)[:MAX_TOLD_AT_ONCE]:
            del self._presences[identity]
            self._roamers.say_presence_again(identity)
