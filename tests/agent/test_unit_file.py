"""The agent's unit for systemd: it starts what there is, on the client's folder, and hides no hardware."""

from __future__ import annotations

import configparser
import subprocess
from pathlib import Path

import pytest
from support.patience import PATIENCE_S
from support.programs import needs
from support.repository import ROOT

from birthmark.device import cli

UNIT = ROOT / "deploy" / "birthmark-agent.service"


def unit(path: Path) -> dict[str, dict[str, str]]:
    parser = configparser.RawConfigParser(strict=False, delimiters="=", comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(path)
    return {name: dict(parser[name]) for name in parser.sections()}


def test_it_starts_the_agent() -> None:
    program, *arguments = unit(UNIT)["Service"]["ExecStart"].split()
    assert Path(program).name == "birthmark-device"
    parsed = cli.parser().parse_args(arguments)
    assert (parsed.tty, parsed.state) == ("/dev/ttyGS0", Path("/var/lib/birthmark"))


def test_agent_and_client_share_user_and_folder() -> None:
    agent, client = unit(UNIT)["Service"], unit(ROOT / "deploy" / "birthmark-device.service")["Service"]
    for key in ("User", "Group", "StateDirectory", "StateDirectoryMode", "UMask"):
        assert agent[key] == client[key]
    assert agent["StateDirectoryMode"] == "0700"


def test_the_port_and_the_hardware_stay_in_sight() -> None:
    service = unit(UNIT)["Service"]
    assert service["DeviceAllow"] == "char-ttyGS rw"
    # Each of these would hide /dev/ttyGS0, /proc/device-tree or /sys/class/net from it.
    assert not {"PrivateDevices", "ProcSubset", "PrivateNetwork"} & set(service)
    assert service["LimitCORE"] == "0"


@needs("systemd-analyze", "systemd")
@pytest.mark.parametrize(
    "unit_path", [UNIT, UNIT.with_name("birthmark-device.service")], ids=lambda path: path.stem
)
def test_systemd_takes_it_for_well_protected(unit_path: Path) -> None:
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=30", "--no-pager", unit_path],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert rated.returncode == 0, rated.stdout + rated.stderr
