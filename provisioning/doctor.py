"""Looks at a station's serial ports and at what may come between them and an enrollment.

Rules:

- No port is opened and nothing is sent: everything is read from the system's own files.
- FAIL is what stops an enrollment; WARN what may disturb or slow it; each says what to do.
- What another user's process does shows only as far as the system lets this user look.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from birthmark.device.errors import PortError
from birthmark.device.escape import escaped
from birthmark.provisioning.enrollment.port import PortName, adapters, held

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_GETTYS: Final = frozenset({"agetty", "getty", "mgetty", "mingetty", "fbgetty"})
_BRAILLE_ADAPTERS: Final = frozenset({(0x0403, 0x6001), (0x10C4, 0xEA60), (0x10C4, 0xEA80), (0x1A86, 0x7523)})
"""Adapters that brltty takes for braille displays: FTDI, CP210x and CH340 chips."""
_SLOW_LATENCY_MS: Final = 2
_MAX_FILE_BYTES: Final = 65536


class Health(StrEnum):
    """What a finding means."""

    OK = "ok"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    port: str
    check: str
    health: Health
    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Process:
    """A running process, as far as it can be seen."""

    pid: int
    name: str
    command: str


@dataclass(frozen=True, slots=True)
class Adapter:
    """What the system knows of a port's adapter; zeros where there is none."""

    vid: int = 0
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Machine:
    """What is looked at.

    Args:
        root: where the system's files are; a test has others.
        uid: the user.
        groups: that the user's processes are in.
        listed_groups: that the user is in after the next login.
        adapter_of: says what is known of a port's adapter.
    """

    root: Path
    uid: int
    groups: frozenset[int]
    listed_groups: frozenset[int]
    adapter_of: Callable[[str], Adapter]

    @classmethod
    def here(cls) -> Machine:
        """Return this machine and this user."""
        return cls(
            root=Path("/"),
            uid=os.geteuid(),
            groups=frozenset({*os.getgroups(), os.getegid()}),
            listed_groups=frozenset(_listed_groups()),
            adapter_of=_adapter_of,
        )

    def text(self, path: str) -> str:
        """Return a system file's text; empty if it is not there or not ours to read."""
        try:
            with (self.root / path).open("rb") as file:
                return file.read(_MAX_FILE_BYTES).decode("utf-8", "replace")
        except OSError:
            return ""

    def processes(self) -> list[Process]:
        """Return what runs, by number."""
        found = []
        for folder in (self.root / "proc").glob("[0-9]*"):
            name = self.text(f"proc/{folder.name}/comm").strip()
            if name:
                command = self.text(f"proc/{folder.name}/cmdline").replace("\0", " ").strip()
                found.append(Process(int(folder.name), name, command))
        return sorted(found, key=lambda process: process.pid)


def examine(machine: Machine, ports: Sequence[str]) -> list[Finding]:
    """Look at ports, one after the other.

    Args:
        machine: where.
        ports: names of local ports, such as /dev/ttyUSB0 or a link to it.
    """
    processes = machine.processes()
    return [finding for port in ports for finding in _examine(machine, port, processes)]


def ports_here() -> list[str]:
    """Return the names of the serial adapters that are plugged in."""
    return sorted(str(adapter.device) for adapter in adapters())


def _examine(machine: Machine, port: str, processes: Sequence[Process]) -> Iterator[Finding]:
    device = os.path.realpath(machine.root / str(Path(port).absolute()).lstrip("/"))
    name = Path(device).name
    try:
        status = Path(device).stat()
    except OSError as error:
        yield Finding(port, "port", Health.FAIL, f"it cannot be found: {error.strerror}", PortName.others_hint())
        return
    yield _permission(machine, port, status)
    yield _modem_manager(machine, port, status, processes)
    yield _braille(machine, port, processes)
    yield from _latency(machine, port, name)
    yield _login(port, name, processes)
    yield _console(machine, port, name)
    yield _foreign_lock(machine, port, name, processes)
    yield _user(machine, port, device, processes)
    yield _station(port)


def _permission(machine: Machine, port: str, status: os.stat_result) -> Finding:
    check = "permission"
    if machine.uid == 0 or (status.st_uid == machine.uid and status.st_mode & 0o600 == 0o600):
        return Finding(port, check, Health.OK, "you may read and write it")
    both = stat.S_IRGRP | stat.S_IWGRP
    if status.st_gid in machine.groups and status.st_mode & both == both:
        return Finding(port, check, Health.OK, f"you may, as the group {_group(status.st_gid)}")
    if status.st_mode & 0o006 == 0o006:
        return Finding(port, check, Health.WARN, "everybody may read and write it", "install the rule in deploy/")
    group = _group(status.st_gid)
    if status.st_gid in machine.listed_groups:
        hint = f"log in again: you are in the group {group} since your last login"
    else:
        hint = f"sudo usermod -aG {group} $USER, then log in again"
    return Finding(port, check, Health.FAIL, f"you may not read and write it; the group {group} may", hint)


def _modem_manager(machine: Machine, port: str, status: os.stat_result, processes: Sequence[Process]) -> Finding:
    check = "ModemManager"
    if not any(process.name == "ModemManager" for process in processes):
        return Finding(port, check, Health.OK, "it does not run")
    node = f"run/udev/data/c{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    properties = machine.text(node).splitlines()
    if "E:ID_MM_DEVICE_IGNORE=1" in properties or "E:ID_MM_PORT_IGNORE=1" in properties:
        return Finding(port, check, Health.OK, "it runs, and leaves this port alone")
    return Finding(
        port,
        check,
        Health.WARN,
        "it runs, and sends AT commands to ports that are plugged in",
        "install deploy/60-birthmark-station.rules, or: sudo systemctl mask --now ModemManager",
    )


def _braille(machine: Machine, port: str, processes: Sequence[Process]) -> Finding:
    check = "brltty"
    if not any(process.name.startswith("brltty") for process in processes):
        return Finding(port, check, Health.OK, "it does not run")
    adapter = machine.adapter_of(port)
    if (adapter.vid, adapter.pid) in _BRAILLE_ADAPTERS:
        text = "it runs, and takes this kind of adapter for a braille display"
        return Finding(port, check, Health.FAIL, text, "sudo systemctl mask --now brltty brltty-udev")
    return Finding(port, check, Health.OK, "it runs, and does not know this kind of adapter")


def _latency(machine: Machine, port: str, name: str) -> Iterator[Finding]:
    text = machine.text(f"sys/bus/usb-serial/devices/{name}/latency_timer").strip()
    if not text.isdecimal():
        return  # no FTDI chip
    if int(text) <= _SLOW_LATENCY_MS:
        yield Finding(port, "latency timer", Health.OK, f"{text} ms")
        return
    hint = f"echo 1 | sudo tee /sys/bus/usb-serial/devices/{name}/latency_timer, or install the rule in deploy/"
    yield Finding(port, "latency timer", Health.WARN, f"every answer waits up to {text} ms in the adapter", hint)


def _login(port: str, name: str, processes: Sequence[Process]) -> Finding:
    for process in processes:
        if process.name in _GETTYS and name in process.command.replace("/", " ").split():
            hint = f"sudo systemctl mask --now serial-getty@{name}"
            return Finding(port, "getty", Health.FAIL, f"{process.name} waits for a login on it", hint)
    return Finding(port, "getty", Health.OK, "nobody waits for a login on it")


def _console(machine: Machine, port: str, name: str) -> Finding:
    if name in machine.text("sys/class/tty/console/active").split():
        text = "the kernel's console is on it: its messages come between frames"
        return Finding(port, "console", Health.WARN, text, f"take console={name} off the kernel's command line")
    return Finding(port, "console", Health.OK, "the kernel's console is not on it")


def _foreign_lock(machine: Machine, port: str, name: str, processes: Sequence[Process]) -> Finding:
    check = "lock file"
    for folder in ("run/lock", "var/lock"):
        text = machine.text(f"{folder}/LCK..{name}").strip()
        if not text:
            continue
        path = f"/{folder}/LCK..{name}"
        pid = int(text.split()[0]) if text.split()[0].isdecimal() else 0
        owner = next((process for process in processes if process.pid == pid), None)
        if owner is None:
            hint = f"it is stale and does not stop birthmark: sudo rm {path}"
            return Finding(port, check, Health.WARN, f"{path} is left over from a program that has ended", hint)
        text = f"{escaped(owner.name, 32)} (process {pid}) holds it: {path}"
        return Finding(port, check, Health.FAIL, text, "close that program")
    return Finding(port, check, Health.OK, "no other program has left one")


def _user(machine: Machine, port: str, device: str, processes: Sequence[Process]) -> Finding:
    for process in processes:
        if process.pid == os.getpid():
            continue
        if device in _opened_by(machine, process):
            text = f"{escaped(process.name, 32)} (process {process.pid}) has it open"
            return Finding(port, "in use", Health.FAIL, text, "close that program")
    return Finding(port, "in use", Health.OK, "no process that you may look at has it open")


def _opened_by(machine: Machine, process: Process) -> set[str]:
    """Return what a process has open; nothing of one that has gone, or is somebody else's."""
    opened = set()
    with suppress(OSError):
        for descriptor in (machine.root / "proc" / str(process.pid) / "fd").iterdir():
            with suppress(OSError):
                opened.add(str(descriptor.readlink()))
    return opened


def _station(port: str) -> Finding:
    try:
        with held(PortName.of(port)):
            return Finding(port, "station", Health.OK, "no other station is at work on it")
    except PortError as error:
        return Finding(port, "station", Health.FAIL, error.message, error.hint)


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _listed_groups() -> list[int]:
    try:
        user = pwd.getpwuid(os.geteuid())
        return os.getgrouplist(user.pw_name, user.pw_gid)
    except (KeyError, OSError):
        return []


def _adapter_of(port: str) -> Adapter:
    device = os.path.realpath(port)
    for found in adapters():
        if os.path.realpath(found.device) == device:
            return Adapter(found.vid or 0, found.pid or 0)
    return Adapter()
