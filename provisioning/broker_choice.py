"""Where a new device is told that its broker is: as a command says it, else as the station's settings do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from birthmark.device.errors import UsageError
from birthmark.device.escape import quoted
from birthmark.device.options import taken_from_options
from birthmark.provisioning.enrollment.bundles import BrokerAddress
from birthmark.provisioning.settings import BrokerDefaults

if TYPE_CHECKING:
    from birthmark.device.console import Console


def broker_address(text: str | None, default: BrokerDefaults) -> BrokerAddress:
    """Read `HOST:PORT`; without a text it is the default.

    Raises:
        UsageError: it is no such thing.
    """
    if text is None:
        return BrokerAddress(default.host, default.port, default.keepalive_s)
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or len(port) > 5:
        raise UsageError(
            f"could not use {quoted(text)} as a broker's address: it is not HOST:PORT",
            hint="for example: --broker gateway-1.example.com:8883, or --broker [fd00::1]:8883",
        )
    with taken_from_options():
        checked = BrokerDefaults(host.removeprefix("[").removesuffix("]"), int(port), default.keepalive_s)
    return BrokerAddress(checked.host, checked.port, checked.keepalive_s)


def warn_of_loopback(console: Console, text: str | None, broker: BrokerAddress) -> None:
    """Warn if nobody said where the broker is: a device would look for it on itself."""
    if text is not None or broker.host != BrokerDefaults().host:
        return
    warning = (
        f"the device will look for its broker at {broker.host}:{broker.port}, on itself;"
        " to say where it is, give --broker HOST:PORT, or set [broker] in station.toml"
    )
    if console.as_json:
        console.emit({"event": "warning", "text": warning}, "")
    else:
        console.warn(warning)
