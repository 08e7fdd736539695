"""Which port is meant: by its name, by its place, or by its adapter; never a guess, and never a byte to find out.

Rules:

- `/dev/ttyUSB0`, a pty, a pyserial URL: that very port.
- `by-path:NAME`: the adapter in that place, as `/dev/serial/by-path` names it: a slot of a fixture.
- `usb:VID:PID` or `usb:VID:PID:SERIAL`: the adapter of that kind. If several fit, none is taken.
- Two slots of a fixture never share a port.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.errors import ConfigurationError, PortError
from birthmark.device.escape import escaped, quoted
from birthmark.device.link.timers import DEFAULT_BAUD
from birthmark.provisioning.enrollment.port import PortName, adapters

if TYPE_CHECKING:
    from collections.abc import Sequence

BY_PATH_FOLDER: Final = Path("/dev/serial/by-path")
MAX_SLOTS: Final = 64
_USB: Final = re.compile(r"usb:([0-9a-fA-F]{4}):([0-9a-fA-F]{4})(?::(.+))?")
_BY_PATH: Final = re.compile(r"by-path:([A-Za-z0-9:._+-]+)")
_SLOT_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,15}")
_BAUDS: Final = range(50, 4_000_001)


@dataclass(frozen=True, slots=True)
class SlotPort:
    """A place for a board, and the port that is there."""

    slot: str
    port: str
    """As the operator wrote it: what a command line that goes on says again."""
    name: PortName
    baud: int = DEFAULT_BAUD


def choose(text: str) -> PortName:
    """Return the port that `text` means.

    Raises:
        PortError: no port fits, or several do; none of them was touched.
    """
    if text.startswith("usb:"):
        return _by_adapter(text)
    if text.startswith("by-path:"):
        found = _BY_PATH.fullmatch(text)
        if found is None:
            raise PortError(
                f"could not use {quoted(text)} as a port: that is no name of a place",
                hint=f"the names are those in {BY_PATH_FOLDER}",
            )
        return PortName.of(str(BY_PATH_FOLDER / found[1]))
    return PortName.of(text)


def slots_of(ports: Sequence[str], baud: int) -> list[SlotPort]:
    """Return slots 1, 2, ... for ports named one by one.

    Raises:
        PortError: as `choose` does, or two of them are the same.
    """
    return _distinct([SlotPort(str(n), text, choose(text), baud) for n, text in enumerate(ports, 1)])


def read_fixture(path: Path, baud: int) -> list[SlotPort]:
    """Read a fixture: a `[[slot]]` table for each slot, with `name`, `port` and, if it is another, `baud`.

    Raises:
        ConfigurationError: the file cannot be read, or has something in it that cannot be used.
        PortError: as `choose` does, or two of them are the same.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"could not read the fixture {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"could not read the fixture {path}: {escaped(str(error))}", hint="it must be TOML"
        ) from error
    slots = tables.pop("slot", [])
    if tables or not isinstance(slots, list) or not 1 <= len(slots) <= MAX_SLOTS:
        raise ConfigurationError(
            f"could not read the fixture {path}: it is not made of 1 to {MAX_SLOTS} tables [[slot]]",
            hint="each has a name and a port: see docs/line.md",
        )
    try:
        read = [_slot(table, number, baud) for number, table in enumerate(slots, 1)]
    except ConfigurationError as error:
        raise ConfigurationError(f"could not read the fixture {path}: {error.message}", hint=error.hint) from error
    names = [slot.slot.lower() for slot in read]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"could not read the fixture {path}: two slots have one name")
    return _distinct(read)


def _slot(table: Any, number: int, baud: int) -> SlotPort:
    if not isinstance(table, dict) or not table.keys() <= {"name", "port", "baud"}:
        raise ConfigurationError(
            f"slot {number} has a key that is unknown", hint="the keys are name, port and baud"
        )
    name, port, speed = table.get("name", str(number)), table.get("port"), table.get("baud", baud)
    if not isinstance(name, str) or not _SLOT_NAME.fullmatch(name):
        raise ConfigurationError(
            f"slot {number} has a name that cannot be used", hint="1 to 16 letters, digits, '.', '-' and '_'"
        )
    if not isinstance(port, str) or not port.isprintable() or not port:
        raise ConfigurationError(f"slot {name} has no port, or one that cannot be shown")
    if isinstance(speed, bool) or not isinstance(speed, int) or speed not in _BAUDS:
        raise ConfigurationError(f"the baud of slot {name} is out of range", hint="50 to 4000000")
    return SlotPort(name, port, choose(port), speed)


def _by_adapter(text: str) -> PortName:
    wanted = _USB.fullmatch(text)
    if wanted is None:
        raise PortError(
            f"could not use {quoted(text)} as a port: it is not usb:VID:PID[:SERIAL]",
            hint="for example: usb:0403:6001, or usb:0403:6001:A50285BI",
        )
    vid, pid, number = int(wanted[1], 16), int(wanted[2], 16), wanted[3]
    found = [
        adapter
        for adapter in adapters()
        if (adapter.vid, adapter.pid) == (vid, pid) and number in (None, adapter.serial_number)
    ]
    if not found:
        raise PortError(f"could not find the port {escaped(text)}: there is none", hint=PortName.others_hint())
    if len(found) > 1:
        names = ", ".join(sorted(str(adapter.device) for adapter in found))
        raise PortError(
            f"could not choose the port {escaped(text)}: several fit ({names})",
            hint=f"add the adapter's serial number, or name its place: see {BY_PATH_FOLDER}",
        )
    return PortName.of(str(found[0].device))


def _distinct(slots: list[SlotPort]) -> list[SlotPort]:
    seen: dict[str, SlotPort] = {}
    for slot in slots:
        key = os.path.realpath(slot.name.text) if slot.name.is_local else slot.name.text
        other = seen.setdefault(key, slot)
        if other is not slot:
            raise PortError(
                f"could not use the ports {escaped(other.port)} and {escaped(slot.port)}: they are one port",
                hint="give each slot a port of its own",
            )
    return slots
