"""What comes in: messages and commands as a callback gets them."""

from __future__ import annotations

import json
from typing import Any

from birthmark.device.errors import RemoteProtocolError
from birthmark.device.escape import escaped
from birthmark.device.frozen import Frozen


class Message(Frozen):
    """One message from the broker. Topic and payload are somebody else's text: escape them before showing them."""

    topic: str
    payload: bytes
    qos: int
    retained: bool
    """Whether it was waiting there before we subscribed."""

    def text(self) -> str:
        """Return the payload as text; raises `RemoteProtocolError` if it is not UTF-8."""
        try:
            return self.payload.decode()
        except UnicodeDecodeError as error:
            raise RemoteProtocolError(f"could not read a message on {escaped(self.topic)}: not UTF-8") from error

    def json(self) -> Any:
        """Return the payload as JSON; raises `RemoteProtocolError` if it is none."""
        try:
            return json.loads(self.payload)
        except (ValueError, RecursionError) as error:
            raise RemoteProtocolError(f"could not read a message on {escaped(self.topic)}: not JSON") from error


class Command(Message):
    """A message on `devices/{id}/commands/{name}`."""

    name: str
    request_id: str | None = None
    """What its reply is found by; None: a plain command, that nobody waits for."""
    expires: float | None = None
    """When nobody waits for the reply any more, in seconds since 1970 by the asker's clock; None: never."""
