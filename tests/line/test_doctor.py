"""`birthmark doctor ports`: what is wrong with a port is named, and the port is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.patience import PATIENCE_S
from support.repository import ROOT

from birthmark.provisioning.doctor import Adapter, Finding, Health, Machine, examine
from birthmark.provisioning.enrollment.port import PortName, held

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.line_board import LineBoard
    from support.station import Command

FTDI = Adapter(0x0403, 0x6001)
PORT = "/dev/ttyUSB0"


class FakeMachine:
    """A machine's files under a folder; the port is a plain file there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.put("dev/ttyUSB0", "")
        self.port.chmod(0o600)
        self.uid = os.geteuid()
        self.groups = frozenset({os.getegid()})
        self.listed: frozenset[int] = frozenset()
        self.adapter = FTDI

    @property
    def port(self) -> Path:
        return self.root / "dev" / "ttyUSB0"

    def put(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def process(self, pid: int, name: str, *command: str) -> None:
        self.put(f"proc/{pid}/comm", f"{name}\n")
        self.put(f"proc/{pid}/cmdline", "\0".join((name, *command)) + "\0")

    def found(self) -> dict[str, Finding]:
        machine = Machine(self.root, self.uid, self.groups, self.listed, lambda _: self.adapter)
        return {finding.check: finding for finding in examine(machine, [PORT])}

    def health(self, check: str) -> Health:
        return self.found()[check].health


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def test_a_sound_port_has_nothing_wrong_with_it(machine: FakeMachine) -> None:
    machine.process(7, "sh")
    found = machine.found()
    assert {finding.health for finding in found.values()} == {Health.OK}
    assert "latency timer" not in found, "only where there is one"


def test_no_such_port(machine: FakeMachine) -> None:
    machine.port.unlink()
    found = machine.found()
    assert [(f.check, f.health) for f in found.values()] == [("port", Health.FAIL)]


def test_permission(machine: FakeMachine) -> None:
    owner = machine.port.stat()
    machine.uid = owner.st_uid + 1000
    machine.groups = frozenset()
    machine.port.chmod(0o660)
    assert "usermod -aG" in machine.found()["permission"].hint
    assert machine.health("permission") is Health.FAIL
    machine.listed = frozenset({owner.st_gid})
    assert "log in again" in machine.found()["permission"].hint
    machine.groups = frozenset({owner.st_gid})
    assert machine.health("permission") is Health.OK
    machine.port.chmod(0o640)
    assert machine.health("permission") is Health.FAIL
    machine.port.chmod(0o666)
    machine.groups = frozenset()
    assert machine.health("permission") is Health.WARN


def test_modem_manager_unless_it_was_told_not_to(machine: FakeMachine) -> None:
    machine.process(7, "ModemManager")
    assert machine.health("ModemManager") is Health.WARN
    node = machine.port.stat().st_rdev
    machine.put(f"run/udev/data/c{os.major(node)}:{os.minor(node)}", "I:12\nE:ID_MM_PORT_IGNORE=1\n")
    assert machine.health("ModemManager") is Health.OK


def test_a_braille_display_that_is_none(machine: FakeMachine) -> None:
    machine.process(7, "brltty")
    assert machine.health("brltty") is Health.FAIL
    machine.adapter = Adapter(0x1234, 0x5678)
    assert machine.health("brltty") is Health.OK


def test_a_slow_adapter(machine: FakeMachine) -> None:
    timer = "sys/bus/usb-serial/devices/ttyUSB0/latency_timer"
    machine.put(timer, "16\n")
    assert machine.health("latency timer") is Health.WARN
    assert "16 ms" in machine.found()["latency timer"].text
    machine.put(timer, "1\n")
    assert machine.health("latency timer") is Health.OK


def test_a_login_on_the_port(machine: FakeMachine) -> None:
    machine.process(7, "agetty", "-o", "-p -- \\u", "ttyUSB1", "vt220")
    assert machine.health("getty") is Health.OK
    machine.process(8, "agetty", "--keep-baud", "/dev/ttyUSB0", "vt220")
    assert machine.health("getty") is Health.FAIL
    assert "serial-getty@ttyUSB0" in machine.found()["getty"].hint


def test_the_kernel_talks_on_the_port(machine: FakeMachine) -> None:
    machine.put("sys/class/tty/console/active", "tty0 ttyUSB0\n")
    assert machine.health("console") is Health.WARN


def test_locks_of_other_programs(machine: FakeMachine) -> None:
    machine.put("run/lock/LCK..ttyUSB0", "      4711 minicom ann\n")
    assert machine.health("lock file") is Health.WARN
    assert "stale" in machine.found()["lock file"].hint
    machine.process(4711, "minicom\x1b[2J")
    found = machine.found()["lock file"]
    assert (found.health, found.text.isprintable()) == (Health.FAIL, True)


def test_a_program_that_has_it_open(machine: FakeMachine) -> None:
    machine.process(7, "screen")
    (machine.root / "proc/7/fd").mkdir()
    (machine.root / "proc/7/fd/5").symlink_to(machine.port)
    assert machine.health("in use") is Health.FAIL
    assert "screen (process 7)" in machine.found()["in use"].text


def test_the_command_looks_at_real_ports_and_leaves_them_alone(
    birthmark: Command, boards: Callable[[int], list[LineBoard]]
) -> None:
    (board,) = boards(1)
    # The board's own end is in this process: only another one has the port open in the sense of the check.
    with held(PortName.of(board.port)):
        done = run_doctor("--port", board.port, "--json")
    assert '"check":"station","health":"FAIL"' in done.stdout
    assert done.returncode == 5
    done = run_doctor("--port", os.path.relpath(board.port))
    assert "permission: you may read and write it" in done.stdout
    assert "no other station is at work on it" in done.stdout
    assert birthmark("flash", "--port", board.port, "--id", "x", "--broker", "h:1").exit_code == 0


def run_doctor(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "birthmark.provisioning", "doctor", "ports", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_a_port_of_another_machine_is_looked_at_over_there() -> None:
    done = run_doctor("--port", "socket://h:1")
    assert done.returncode == 1
    assert "could not look at socket://h:1" in done.stderr


def test_the_rule_keeps_others_off_and_the_timer_short() -> None:
    rule = (ROOT / "deploy" / "60-birthmark-station.rules").read_text(encoding="utf-8")
    for wanted in ('ENV{ID_MM_DEVICE_IGNORE}="1"', 'ENV{ID_MM_PORT_IGNORE}="1"', 'GROUP="dialout"'):
        assert wanted in rule
    assert 'ATTR{latency_timer}="1"' in rule
