"""Which port is meant, and which id comes next: never a guess, and what cannot be used is said."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.station import enrolled_row, keyed_row

from birthmark.device.errors import BirthmarkError, ConfigurationError, PortError
from birthmark.device.identity import DeviceId, Role
from birthmark.provisioning.enrollment import port
from birthmark.provisioning.line import port_choice
from birthmark.provisioning.line.unit_ids import Known, Listed, NoIdError, from_template, read_list
from birthmark.provisioning.registry.model import KeyMode

if TYPE_CHECKING:
    from pathlib import Path

    from birthmark.provisioning.station import Station

HWID = bytes(8)


@dataclass
class Adapter:
    """What is said of a USB serial adapter."""

    device: str
    vid: int
    pid: int
    serial_number: str
    location: str = ""


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> list[Adapter]:
    plugged: list[Adapter] = []
    for module in (port, port_choice):
        monkeypatch.setattr(module, "adapters", lambda: plugged)
    return plugged


def test_an_adapter_is_chosen_only_if_it_is_the_only_one(adapters: list[Adapter]) -> None:
    with pytest.raises(PortError, match="there is none"):
        port_choice.choose("usb:0403:6001")
    adapters.append(Adapter("/dev/ttyUSB4", 0x0403, 0x6001, "A1", "1-1.2"))
    adapters.append(Adapter("/dev/ttyUSB5", 0x10C4, 0xEA60, "A1", "1-1.3"))
    found = port_choice.choose("usb:0403:6001")
    assert (found.text, found.usb_path) == ("/dev/ttyUSB4", "1-1.2")
    adapters.append(Adapter("/dev/ttyUSB6", 0x0403, 0x6001, "B2", "1-1.4"))
    with pytest.raises(PortError, match=r"several fit \(/dev/ttyUSB4, /dev/ttyUSB6\)"):
        port_choice.choose("usb:0403:6001")
    assert port_choice.choose("usb:0403:6001:B2").text == "/dev/ttyUSB6"
    with pytest.raises(PortError, match="is not usb:VID:PID"):
        port_choice.choose("usb:403")


def test_a_place_is_a_name_in_the_folder_of_places(adapters: list[Adapter]) -> None:
    assert adapters == []
    found = port_choice.choose("by-path:pci-0000:00:14.0-usb-0:1.2:1.0-port0")
    assert found.text == "/dev/serial/by-path/pci-0000:00:14.0-usb-0:1.2:1.0-port0"
    with pytest.raises(PortError, match="no name of a place"):
        port_choice.choose("by-path:../../tty")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "not made of 1 to 64 tables"),
        ("slot = 3", "not made of 1 to 64 tables"),
        ("[[slot]]\nport='/a'\n[other]", "not made of 1 to 64 tables"),
        ("[[slot]]\nname='A'", "slot A has no port"),
        ('[[slot]]\nname="A"\nport="\\u0000"', "slot A has no port, or one that cannot be shown"),
        ("[[slot]]\nport=" + "1" * 5000, "5000 digits"),
        ("[[slot]]\nport='/a'\nspeed=1", "slot 1 has a key that is unknown"),
        ("[[slot]]\nport='/a'\nbaud=true", "the baud of slot 1 is out of range"),
        ("[[slot]]\nport='/a'\nbaud=1", "the baud of slot 1 is out of range"),
        ("[[slot]]\nport='/a'\nname='\\u001b'", "no TOML"),
        ("[[slot]]\nport='/a'\nname='a b'", "slot 1 has a name that cannot be used"),
        ("[[slot]]\nport='/a'\nname='A'\n[[slot]]\nport='/b'\nname='a'", "two slots have one name"),
        ("[[slot]]\nport='usb:1'", "it is not usb:VID:PID"),
        ("[[slot", "could not read the fixture"),
        (None, "No such file"),
    ],
)
def test_a_fixture_that_cannot_be_used(tmp_path: Path, text: str | None, cause: str) -> None:
    path = tmp_path / "fixture.toml"
    if text is not None:
        path.write_text(text)
    expected = re.escape(cause) if cause != "no TOML" else "name that cannot be used"
    with pytest.raises(BirthmarkError, match=expected):
        port_choice.read_fixture(path, 115_200)


def test_a_fixture_has_speeds_of_its_own_and_no_port_twice(tmp_path: Path) -> None:
    path = tmp_path / "fixture.toml"
    path.write_text("[[slot]]\nport = '/dev/ttyS9'\n[[slot]]\nname = 'B'\nport = 'socket://h:1'\nbaud = 9600\n")
    slots = port_choice.read_fixture(path, 115_200)
    assert [(slot.slot, slot.name.text, slot.baud) for slot in slots] == [
        ("1", "/dev/ttyS9", 115_200),
        ("B", "socket://h:1", 9600),
    ]
    (tmp_path / "link").symlink_to(os.devnull)
    with pytest.raises(PortError, match="they are one port"):
        port_choice.slots_of([os.devnull, str(tmp_path / "link")], 115_200)


def test_a_template_goes_on_after_every_id_that_ever_was(station: Station) -> None:
    enrolled_row(station, "sensor-00002")
    wishes = from_template("sensor-{n:05}", station.registry, Role("meter"))
    assert [str(next(wishes).device_id) for _ in range(3)] == ["sensor-00001", "sensor-00003", "sensor-00004"]
    later = from_template("{n}-x", station.registry, None, start=41)
    assert next(later).device_id == DeviceId("41-x")


@pytest.mark.parametrize("template", ["sensor", "{n}{n}", "{m}", "a/{n}", "-{n}", "{n:x}", "{}", "{n:99}"])
def test_a_template_that_cannot_be_used(station: Station, template: str) -> None:
    with pytest.raises(BirthmarkError):
        next(from_template(template, station.registry, None))


@given(st.text(max_size=40))
def test_any_template_makes_ids_or_is_refused(text: str) -> None:
    class Empty:
        def view(self) -> Empty:
            return self

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def rows(self) -> list[object]:
            return []

    try:
        wish = next(from_template(text, Empty(), None))  # type: ignore[arg-type]
    except BirthmarkError:
        return
    assert wish.device_id.text.isascii()


def test_an_id_goes_to_one_board_and_back_if_nothing_was_reserved(station: Station, tmp_path: Path) -> None:
    keyed_row(station, "b")
    path = tmp_path / "ids.csv"
    path.write_text("\ufeffid,lot\na,7\nB,8\nc,\n")
    ids = Listed(read_list(path, Role("meter")), station.registry, KeyMode.STATION)
    first = ids.wish("1", HWID, None)
    assert (first.device_id, first.role, first.key_mode, first.label) == (
        DeviceId("a"),
        Role("meter"),
        KeyMode.STATION,
        "lot: 7",
    )
    second = ids.wish("2", HWID, None)
    assert second.device_id == DeviceId("c")
    ids.give_back(first, taken=False)
    ids.give_back(second, taken=True)
    assert ids.wish("1", HWID, None).device_id == DeviceId("a")
    with pytest.raises(NoIdError, match="none is left"):
        ids.wish("2", HWID, None)
    with pytest.raises(NoIdError, match="nothing under way"):
        Known().wish("1", HWID, None)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "no column `id`"),
        ("name\nx\n", "no column `id`"),
        ("id,id\nx,y\n", "names that cannot be used"),
        ("id,a\nx\n", "line 2 has another number of columns"),
        ("id\nx,y\n", "line 2 has another number of columns"),
        ("id\na/b\n", "line 2: could not use 'a/b' as a device id"),
        ("id,role\nx,operator\n", "line 2: .*reserved"),
        ("id\nx\ny\nX\n", "line 4 repeats the id X"),
        ("id,lot\nx,a\x1b[2J\n", "line 2 has a value that is not printable"),
        (f"id,lot\nx,{'y' * 201}\n", "too long for a label"),
        ('id\n"x\n', "could not read the list"),
    ],
)
def test_a_list_that_cannot_be_used(tmp_path: Path, text: str, cause: str) -> None:
    path = tmp_path / "ids.csv"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=cause):
        read_list(path, None)
