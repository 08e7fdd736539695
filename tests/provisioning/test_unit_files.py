"""The station's units for systemd that backups and looks are made by: they start what there is, well protected."""

from __future__ import annotations

import configparser
import shlex
import subprocess
from pathlib import Path

import pytest
from support.patience import PATIENCE_S
from support.programs import needs
from support.repository import ROOT

from birthmark.provisioning.cli import parser

DEPLOY = ROOT / "deploy"
NAMES = ("birthmark-backup", "birthmark-doctor")


def service(name: str) -> dict[str, str]:
    units = configparser.RawConfigParser(strict=False, delimiters="=", comment_prefixes="#")
    units.optionxform = str  # type: ignore[assignment, method-assign]
    units.read_string((DEPLOY / f"{name}.service").read_text(encoding="utf-8").replace("\\\n", " "))
    return dict(units["Service"])


def words(name: str) -> list[str]:
    """What the station's command is started with."""
    started = shlex.split(service(name)["ExecStart"])
    if started[0] == "/bin/sh":
        started = shlex.split(started[2])[1:]
        started = started[: started.index("3<")]
    assert Path(started[0]).name == "birthmark"
    return started[1:]


def test_the_backup_has_a_new_name_each_time_and_a_passphrase_that_nobody_sees() -> None:
    parsed = parser().parse_args(words("birthmark-backup"))
    assert parsed.file.suffix == ".age"
    assert "$(date +%%FT%%H%%M%%S)" in str(parsed.file)
    assert parsed.backup_passphrase_fd == 3
    assert "PASSPHRASE" not in service("birthmark-backup")["Environment"]
    assert str(parsed.file.parent) == service("birthmark-backup")["ReadWritePaths"]


def test_the_look_is_the_doctor_s() -> None:
    parsed = parser().parse_args(words("birthmark-doctor"))
    assert parsed.timeout == 30
    assert parsed.handler.__name__ == "_station"


def test_the_renewal_service_starts_what_there_is_and_is_watched() -> None:
    parsed = parser().parse_args(words("birthmark-renewd"))
    assert (parsed.passphrase_fd, parsed.identity.name) == (3, "renewd.pem")
    started = service("birthmark-renewd")
    assert (started["Type"], started["LoadCredential"]) == ("notify", "ca-passphrase")
    assert int(started["WatchdogSec"]) > 0
    assert "PASSPHRASE" not in started["Environment"]


@pytest.mark.parametrize("name", NAMES)
def test_both_run_as_the_station_and_by_a_timer(name: str) -> None:
    renewd = service("birthmark-renewd")
    for key in ("User", "Group", "StateDirectory", "StateDirectoryMode", "UMask", "LimitCORE", "Environment"):
        assert service(name)[key] == (
            renewd[key] if key != "Environment" else "BIRTHMARK_STATION=/var/lib/birthmark-station"
        )
    assert "Persistent=yes" in (DEPLOY / f"{name}.timer").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
@needs("systemd-analyze", "systemd")
def test_systemd_takes_them_for_well_protected(name: str) -> None:
    unit = DEPLOY / f"{name}.service"
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=30", "--no-pager", str(unit)]
    rated = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert rated.returncode == 0, rated.stdout + rated.stderr


@pytest.mark.parametrize("name", sorted(unit.stem for unit in DEPLOY.glob("*.service")))
def test_each_says_a_thing_once_and_no_service_is_restarted_over_wrong_usage(name: str) -> None:
    lines = (DEPLOY / f"{name}.service").read_text(encoding="utf-8").splitlines()
    said = [line for line in lines if "=" in line and not line.startswith("#")]
    assert [line for line in said if said.count(line) > 1] == []
    if "Restart" in service(name):
        assert service(name)["RestartPreventExitStatus"] == "2"
