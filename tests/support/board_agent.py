"""The device's own agent: in virtual time, on a pty in a thread, or as the real command."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Self

from birthmark.device.agent import tty
from birthmark.device.agent.enrollment import Board, Surroundings
from birthmark.device.agent.machine import Agent
from birthmark.device.agent.slots import Slots
from birthmark.device.agent.stop import Stop

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class AgentBoard:
    """The agent without a line; `reboot` starts it anew on the same records."""

    def __init__(self, folder: Path, hwid: bytes, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._board = Board(hwid, "bench", "1.0.0")
        self._surroundings = Surroundings(clock, secrets.token_bytes)
        self.reboot()

    def reboot(self) -> None:
        self.slots = Slots(self._folder)
        self.agent = Agent(self.slots, self._board, self._surroundings)

    def receive(self, data: bytes) -> bytes:
        return b"".join(self.agent.receive(data))


class AgentThread:
    """The agent serving a pty in a thread of this process, for the block."""

    def __init__(self, folder: Path, hwid: bytes, path: str) -> None:
        self._agent = AgentBoard(folder, hwid).agent
        self._path = path

    def __enter__(self) -> Self:
        self._stop = Stop()
        self._descriptor = tty.open_port(self._path)
        self._thread = threading.Thread(target=tty.serve, args=(self._descriptor, self._agent, self._stop))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        os.close(self._descriptor)
        self._stop.close()


class AgentProcess:
    """`birthmark-device agent` as a real process, killed and started at will."""

    def __init__(self, folder: Path, path: str) -> None:
        self._arguments = ["agent", "--tty", path, "--state", str(folder), "--hwid", "random", "--json"]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, and return once it answers."""
        command = [sys.executable, "-m", "birthmark.device", *self._arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        first = json.loads(self._process.stdout.readline())
        assert first["event"] == "started"

    def kill(self) -> None:
        """End it without a word, as a power cut does."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
