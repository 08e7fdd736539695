"""A device's presence: retained on `devices/{id}/status`, kept true by a last will.

Online is said after every connect, goodbye before a clean stop. When the connection is cut instead, the broker
says `lost` for the device. A service has no presence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from birthmark.device import topics
from birthmark.device.frozen import Frozen
from birthmark.device.json_fields import Fields, dump
from birthmark.device.publication import Outgoing

if TYPE_CHECKING:
    from datetime import datetime

    from birthmark.device.identity import DeviceId

GOODBYE = "goodbye"
LOST = "lost"


class Presence(Frozen):
    """Whether a device is there; its last will says `online=False`. Read and written as in `device.messages`."""

    online: bool
    since: float
    """When this became true, by the device's clock."""
    reason: str = ""
    """Why it is offline: `goodbye` for a clean stop, `lost` for a last will."""

    def to_bytes(self) -> bytes:
        """Return the message's payload."""
        return dump({"online": self.online, "since": self.since, "reason": self.reason})

    @classmethod
    def from_bytes(cls, payload: bytes) -> Presence:
        """Read a payload; raises `RemoteProtocolError` if it is no presence."""
        fields = Fields("presence", payload)
        return cls(
            online=fields.boolean("online"),
            since=fields.number("since"),
            reason=fields.text("reason", default=""),
        )


def online(device_id: DeviceId, now: datetime) -> Outgoing:
    """Return what a device says when it is connected."""
    return _said(device_id, Presence(online=True, since=now.timestamp()))


def goodbye(device_id: DeviceId, now: datetime) -> Outgoing:
    """Return what a device says before it leaves on purpose."""
    return _said(device_id, Presence(online=False, since=now.timestamp(), reason=GOODBYE))


def last_will(device_id: DeviceId, now: datetime) -> Outgoing:
    """Return what the broker is to say when the device is lost; `since` is when the connection began."""
    return _said(device_id, Presence(online=False, since=now.timestamp(), reason=LOST))


def _said(device_id: DeviceId, presence: Presence) -> Outgoing:
    return Outgoing(topics.status(device_id), presence.to_bytes(), qos=1, retain=True)
