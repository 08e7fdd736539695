"""A command that asks for a reply: how the two find each other, and how long the question is good for.

MQTT 3.1.1 has no place for a correlation id (MQTT 5 has properties), and a payload is the caller's alone; so both
are levels of the topic, after the command's name:

    devices/{id}/commands/reboot/?id=Zk3vQw&expires=1795766400.25     the request
    devices/{id}/replies/reboot/?id=Zk3vQw/done                       the reply, and what became of it

Rules:

- An id is 1 to 64 of `A-Z a-z 0-9 _ -`, new for each request.
- `expires` is in seconds since 1970, by the asker's clock. From then on nobody waits for a reply, and the device
  does not begin; what waited at the broker while the device was away for a week is not done a week late.
- A command without that level is a plain one: it has no id, never expires, and is answered on
  `devices/{id}/replies/{name}`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from birthmark.device.errors import RemoteProtocolError
from birthmark.device.escape import quoted

DONE = "done"
LATE = "late"
"""Done, but past the deadline."""
FAILED = "failed"
EXPIRED = "expired"
"""Not begun: by the device's clock it was too late, or is so far ahead that the clocks cannot agree."""
UNKNOWN = "unknown"
"""The device has no such command."""
INTERRUPTED = "interrupted"
"""It was begun before, and the device stopped before it was over; it is not begun again."""
BUSY = "busy"
"""Not begun: the device cannot note any more that it began."""

OUTCOMES = frozenset({DONE, LATE, FAILED, EXPIRED, UNKNOWN, INTERRUPTED, BUSY})

_LEVEL = re.compile(r"\?id=([A-Za-z0-9_-]{1,64})&expires=([0-9]{1,11}(?:\.[0-9]{1,3})?)")


class Request(NamedTuple):
    """One request of a command."""

    id: str
    expires: float
    """In seconds since 1970."""

    @property
    def level(self) -> str:
        """The last level of its topic."""
        return f"?id={self.id}&expires={self.expires:.3f}"


def split(name: str) -> tuple[str, Request | None]:
    """Return the command's name, and the request if it asks for a reply, from what follows `commands/`.

    Raises:
        RemoteProtocolError: it looks like a request, and is none.
    """
    command, slash, level = name.rpartition("/")
    if not (slash and level.startswith("?")):
        return name, None
    found = _LEVEL.fullmatch(level)
    if not found or not command:
        raise RemoteProtocolError(f"could not read the request {quoted(level, 120)}: it is no id with a deadline")
    return command, Request(found[1], float(found[2]))


def reply_name(command: str, request_id: str, outcome: str) -> str:
    """Return what follows `replies/` in the topic of a reply; as `outcome`, `+` is the filter for any."""
    return f"{command}/?id={request_id}/{outcome}"


def outcome_of(topic: str) -> str:
    """Return the outcome that a reply's topic tells.

    Raises:
        RemoteProtocolError: it tells none that is known.
    """
    outcome = topic.rpartition("/")[2]
    if outcome not in OUTCOMES:
        raise RemoteProtocolError(f"could not read a reply: its outcome {quoted(outcome, 40)} is not known")
    return outcome
