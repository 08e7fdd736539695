"""Faults as an operator writes them, a whole fixture of them, and the boards that have them."""

from __future__ import annotations

import json
import os
import secrets
import select
import tomllib
from pathlib import Path

import pytest
from support.fault_bench import SimBoard

from birthmark.device.console import run
from birthmark.device.errors import ConfigurationError
from birthmark.device.link.messages import MessageType
from birthmark.firmware_sim import cli
from birthmark.firmware_sim.faults import KINDS, Faults, parse
from birthmark.firmware_sim.fixture import faults_of_slots, write_fixture
from birthmark.firmware_sim.impostors import IMPOSTORS
from birthmark.firmware_sim.lies import LIES
from birthmark.firmware_sim.line import Interruption, LineFaults

ROOT = Path(__file__).parents[2]


def test_nothing_is_wrong_by_default() -> None:
    assert parse([]) == Faults()
    assert Faults().on_the_line.is_perfect


def test_several_faults_add_up() -> None:
    faults = parse(["baud=9600", "loss=1e-3", "stall=1.5@300", "unplug=2", "hostile=prove-key@attest"])
    assert faults.line == LineFaults(
        baud=9600, loss=0.001, stall=Interruption(1.5, 300), unplug=Interruption(2.0, 0)
    )
    assert (faults.lie, faults.lie_at) == (LIES["prove-key"], MessageType.ATTEST)
    assert parse(["loss=0.5", "loss=0.1"]).line.loss == 0.1


@pytest.mark.parametrize("name", IMPOSTORS)
def test_an_impostor_brings_its_chatter(name: str) -> None:
    faults = parse([f"instead={name}", "baud=9600"])
    assert faults.on_the_line == LineFaults(baud=9600, chatter=IMPOSTORS[name].chatter)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "magic",
        "loss",
        "loss=",
        "loss=often",
        "loss=2",
        "loss=nan",
        "baud=-1",
        "baud=1e5",
        "log=0",
        "log=inf",
        "stall=1@x",
        "stall=@5",
        "reboot=lunch",
        "power-cut=0",
        "disk-full=x",
        "foreign=1",
        "key=0",
        "key=xyz",
        "key=" + "ff" * 33,
        "hostile=kind",
        "hostile=nak@never",
        "instead=\x1b[2J",
    ],
)
def test_what_is_no_fault(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse([text])
    assert (caught.value.message + caught.value.hint).isprintable()


def test_the_faults_of_a_fixture() -> None:
    slots = faults_of_slots(["baud=9600", "2:instead=echo", "3:baud=50"], 3)
    assert [faults.line.baud for faults in slots] == [9600, 9600, 50]
    assert [faults.impostor is not None for faults in slots] == [False, True, False]
    for text in ("4:foreign", "0:foreign"):
        with pytest.raises(ConfigurationError, match="there is no slot"):
            faults_of_slots([text], 3)


def test_the_file_of_a_fixture(tmp_path: Path) -> None:
    path = write_fixture(tmp_path / "with space" / "fixture", faults_of_slots(["3:baud=9600"], 16))
    slots = tomllib.loads(path.read_text())["slot"]
    assert [slot["name"] for slot in slots] == [str(number) for number in range(1, 17)]
    assert slots[2]["port"] == str(path.parent / "board-3" / "tty")
    assert [slot.get("baud") for slot in slots] == [None, None, 9600, *[None] * 13]
    with pytest.raises(ConfigurationError, match="characters that quote"):
        write_fixture(tmp_path / "it's", [Faults()])


def test_every_fault_is_listed_and_documented(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "simulator.md").read_text()
    assert run(cli.parser(), ["faults", "--json"]) == 0
    listed = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert {one["fault"] for one in listed} == set(KINDS)
    for one in listed:
        assert f"`{one['write']}`" in page or f"`{one['write'].removeprefix('hostile=')}`" in page, one
    for name in IMPOSTORS:
        assert f"`{name}`" in page


def test_a_wrong_fault_starts_no_board(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "boards"
    assert run(cli.parser(), ["board", "--state", str(state), "--fault", "loss=often"]) == 2
    assert "write loss=P" in capsys.readouterr().err
    assert run(cli.parser(), ["fixture", "--state", str(state), "--slots", "2", "--faults", "3:foreign"]) == 2
    assert not state.exists()


def test_the_port_comes_back_under_another_number(tmp_path: Path) -> None:
    with SimBoard(tmp_path / "board", "instead=echo", "unplug=0.05@8") as board:
        before = os.path.realpath(board.port)
        station = os.open(board.port, os.O_RDWR | os.O_NOCTTY)
        os.write(station, b"12345678 and more")
        board.wait_for("unplugged")
        assert _read(station, 100) is None, "it hung up"
        os.close(station)
        board.wait_for("replugged")
        assert os.path.realpath(board.port) != before
        station = os.open(board.port, os.O_RDWR | os.O_NOCTTY)
        os.write(station, b"again")
        assert _read(station, 5) == b"again"
        os.close(station)


def test_a_copy_of_a_board(tmp_path: Path) -> None:
    with SimBoard(tmp_path / "original", "foreign"):
        pass
    original = {path.name: path.read_bytes() for path in (tmp_path / "original").iterdir()}
    for kind in ("clone", "twin"):
        with SimBoard(tmp_path / kind, f"{kind}={tmp_path / 'original'}"):
            pass
        copy = {path.name: path.read_bytes() for path in (tmp_path / kind).iterdir()}
        assert copy["active"] == original["active"]
        assert (copy["hwid"] == original["hwid"]) is (kind == "twin")


def test_every_byte_passes_a_line_with_a_clock(tmp_path: Path) -> None:
    sent = secrets.token_bytes(3000)
    with SimBoard(tmp_path / "board", "instead=echo", "baud=921600", "latency=2") as board:
        station = os.open(board.port, os.O_RDWR | os.O_NOCTTY)
        os.write(station, sent)
        assert _read(station, len(sent)) == sent
        os.close(station)


def _read(descriptor: int, length: int) -> bytes | None:
    """So many bytes, or what came in ten seconds; None after a hangup."""
    data = b""
    while len(data) < length and select.select([descriptor], [], [], 10)[0]:
        try:
            came = os.read(descriptor, length - len(data))
        except OSError:
            return None
        if not came:
            return None
        data += came
    return data
