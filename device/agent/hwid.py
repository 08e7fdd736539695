"""The hardware id, 4 to 32 bytes: what the station knows a board by (docs/serial-protocol.md section 7).

It comes from the hardware where there is one to read: the SoC's serial number that the firmware puts into the
device tree (every Raspberry Pi has one), else the burnt-in address of the board's only wired network interface.
Otherwise it is random, made once, and kept with the records: see `Slots.kept_hwid`.

Not used: `/etc/machine-id`, which is copied with every image; addresses of virtual, wireless, removable or
locally administered interfaces, which are not the board's own for life; and serial numbers that are no number.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

RANDOM_HWID_BYTES: Final = 16

_DEVICE_TREE = ("proc/device-tree/serial-number", "sys/firmware/devicetree/base/serial-number")
_NETWORK = "sys/class/net"
_ETHERNET = "1"  # ARPHRD_ETHER
_BURNT_IN = "0"  # NET_ADDR_PERM
_LOCALLY_ADMINISTERED = 0x02
_OWN_BUSES = frozenset({"pci", "platform"})
_HYPERVISOR_PREFIXES = (bytes.fromhex("000c29"), bytes.fromhex("005056"), bytes.fromhex("080027"))


def hardware_id(root: Path = Path("/")) -> bytes | None:
    """The id that the hardware itself carries, or None. `root` is where `/proc` and `/sys` are found."""
    return _soc_serial_number(root) or _only_wired_address(root)


def _soc_serial_number(root: Path) -> bytes | None:
    for name in _DEVICE_TREE:
        text = _read(root / name).rstrip("\0")
        # A placeholder such as 0000000000000000 is on every board of its kind.
        if re.fullmatch(r"(?:[0-9A-Fa-f]{2}){4,32}", text) and len(set(text)) > 1:
            return bytes.fromhex(text)
    return None


def _only_wired_address(root: Path) -> bytes | None:
    try:
        interfaces = sorted((root / _NETWORK).iterdir())
    except OSError:
        return None
    addresses = [address for interface in interfaces if (address := _burnt_in_address(interface))]
    return addresses[0] if len(addresses) == 1 else None


def _burnt_in_address(interface: Path) -> bytes | None:
    bus = interface / "device" / "subsystem"  # a virtual interface has no device
    if not bus.exists() or bus.resolve().name not in _OWN_BUSES:
        return None
    if (interface / "wireless").exists() or (interface / "phy80211").exists():
        return None
    if _read(interface / "type") != _ETHERNET or _read(interface / "addr_assign_type") != _BURNT_IN:
        return None
    try:
        address = bytes.fromhex(_read(interface / "address").replace(":", ""))
    except ValueError:
        return None
    if len(address) != 6 or not any(address) or address[0] & _LOCALLY_ADMINISTERED:
        return None
    return None if address.startswith(_HYPERVISOR_PREFIXES) else address


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
