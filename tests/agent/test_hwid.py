"""Where a hardware id is read from, and what is no hardware id."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from birthmark.device.agent.hwid import hardware_id

if TYPE_CHECKING:
    from pathlib import Path

MAC = "dc:a6:32:01:02:03"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _interface(
    root: Path,
    name: str,
    address: str = MAC,
    *,
    bus: str | None = "platform",
    kind: str = "1",
    assigned: str = "0",
    wireless: bool = False,
) -> None:
    folder = root / "sys/class/net" / name
    _write(folder / "address", address + "\n")
    _write(folder / "type", kind + "\n")
    _write(folder / "addr_assign_type", assigned + "\n")
    if wireless:
        (folder / "wireless").mkdir()
    if bus is not None:
        (root / "sys/bus" / bus).mkdir(parents=True, exist_ok=True)
        (folder / "device").mkdir()
        (folder / "device" / "subsystem").symlink_to(root / "sys/bus" / bus)


@pytest.mark.parametrize("name", ["proc/device-tree/serial-number", "sys/firmware/devicetree/base/serial-number"])
def test_the_soc_has_a_number(tmp_path: Path, name: str) -> None:
    _write(tmp_path / name, "10000000a1b2c3d4\0")
    _interface(tmp_path, "eth0")
    assert hardware_id(tmp_path) == bytes.fromhex("10000000a1b2c3d4")


@pytest.mark.parametrize("text", ["", "\0", "0" * 16 + "\0", "f" * 16, "unknown", "abc", "ab" * 33, "To be set"])
def test_a_placeholder_is_no_number(tmp_path: Path, text: str) -> None:
    _write(tmp_path / "proc/device-tree/serial-number", text)
    assert hardware_id(tmp_path) is None


def test_the_one_wired_interface(tmp_path: Path) -> None:
    _interface(tmp_path, "eth0")
    _interface(tmp_path, "lo", "00:00:00:00:00:00", bus=None, kind="772")
    _interface(tmp_path, "wlan0", "dc:a6:32:01:02:04", wireless=True)
    _interface(tmp_path, "docker0", "02:42:00:00:00:01", bus=None)
    assert hardware_id(tmp_path) == bytes.fromhex("dca632010203")


def test_two_wired_interfaces_are_none(tmp_path: Path) -> None:
    _interface(tmp_path, "eth0")
    _interface(tmp_path, "eth1", "dc:a6:32:01:02:04")
    assert hardware_id(tmp_path) is None


@pytest.mark.parametrize(
    "options",
    [
        {"bus": None},
        {"bus": "virtio"},
        {"bus": "usb"},
        {"kind": "772"},
        {"assigned": "1"},
        {"assigned": "3"},
        {"wireless": True},
        {"address": "52:54:00:12:34:56"},
        {"address": "08:00:27:12:34:56", "bus": "pci"},
        {"address": "00:00:00:00:00:00"},
        {"address": ""},
        {"address": "dc:a6:32:01:02"},
        {"address": "not an address"},
    ],
)
def test_an_address_that_is_not_the_boards_own(tmp_path: Path, options: dict[str, object]) -> None:
    _interface(tmp_path, "eth0", **options)  # type: ignore[arg-type]
    assert hardware_id(tmp_path) is None


def test_no_hardware_to_read(tmp_path: Path) -> None:
    assert hardware_id(tmp_path) is None
