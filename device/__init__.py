"""The device part: what a device is, and what every other part must agree on with it.

The ground floor of birthmark. It owns the identity grammar, the topic scheme, the messages on those
topics, the serial wire format and the credential store, and imports no other part.

Nothing third-party is imported here: `Client` and its friends are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from birthmark.device.client import Client
    from birthmark.device.commands import CommandFailedError
    from birthmark.device.credentials import Credentials
    from birthmark.device.errors import BirthmarkError
    from birthmark.device.identity import DeviceId
    from birthmark.device.outbox.settings import OutboxSettings

__all__ = ["BirthmarkError", "Client", "CommandFailedError", "Credentials", "DeviceId", "OutboxSettings"]

_HOMES = {
    "BirthmarkError": "birthmark.device.errors",
    "Client": "birthmark.device.client",
    "CommandFailedError": "birthmark.device.commands",
    "Credentials": "birthmark.device.credentials",
    "DeviceId": "birthmark.device.identity",
    "OutboxSettings": "birthmark.device.outbox.settings",
}


def __getattr__(name: str) -> object:
    """Load a public name when it is first used, so that importing this package stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
