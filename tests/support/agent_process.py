"""A real `birthmark-device agent` process on a real pty."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import tty
from pathlib import Path
from typing import Any, Self

from support.patience import PATIENCE_S
from support.reference_station import FdLine, ReferenceStation


class Pty:
    """A pty in raw mode. The slave stays open here, so that the master survives an agent's death."""

    def __init__(self) -> None:
        self.master, self._slave = os.openpty()
        tty.setraw(self._slave)  # a fresh pty echoes
        self.path = os.ttyname(self._slave)

    def hang_up(self) -> None:
        """Close both ends: the agent sees its tty go."""
        os.close(self.master)
        os.close(self._slave)
        self.master = self._slave = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.master >= 0:
            self.hang_up()


class AgentProcess:
    """One run of the command; what it prints is read as it comes."""

    def __init__(self, tty_path: str | Path, state: Path, *options: str) -> None:
        command = [
            sys.executable,
            "-m",
            "birthmark.device",
            "agent",
            "--tty",
            str(tty_path),
            "--state",
            str(state),
        ]
        self._process = subprocess.Popen(
            [*command, "--hwid", "random", "--json", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._unread = bytearray()
        self.events: list[dict[str, Any]] = []

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next record with this event; fails if the process ends or is silent for too long."""
        ends = time.monotonic() + PATIENCE_S
        stdout = self._process.stdout
        assert stdout is not None
        while True:
            while b"\n" in self._unread:
                line, _, rest = self._unread.partition(b"\n")
                self._unread = bytearray(rest)
                record: dict[str, Any] = json.loads(line)
                self.events.append(record)
                if record["event"] == event:
                    return record
            ready, _, _ = select.select([stdout], [], [], max(0.0, ends - time.monotonic()))
            assert ready, f"no {event} in {PATIENCE_S} s"
            came = os.read(stdout.fileno(), 4096)
            assert came, f"the agent ended before {event}: {self._stderr()}"
            self._unread += came

    @property
    def core_limit(self) -> str:
        """How long a core file the process may leave, by the kernel's word: `soft hard`."""
        limits = Path(f"/proc/{self._process.pid}/limits").read_text()
        line = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
        return " ".join(line.split()[4:6])

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait(PATIENCE_S)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self._process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """The exit code, once it has ended."""
        return self._process.wait(PATIENCE_S)

    def error(self) -> dict[str, Any]:
        """What it printed on stderr when it failed."""
        self.wait()
        record: dict[str, Any] = json.loads(self._stderr())
        return record

    def _stderr(self) -> str:
        assert self._process.stderr is not None
        return self._process.stderr.read().decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait(PATIENCE_S)
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()


def station_on(pty: Pty) -> ReferenceStation:
    """A station on a freshly opened port: what came before is discarded."""
    line = FdLine(pty.master)
    while line.receive(0):
        pass
    return ReferenceStation(line)
