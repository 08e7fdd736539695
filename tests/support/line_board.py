"""Boards for a line: the device's own agent on a pty each, powered on and off, wiped and replaced at will."""

from __future__ import annotations

import os
import shutil
import threading
from typing import TYPE_CHECKING, Self

from support.board_agent import AgentBoard

from birthmark.device.agent import tty
from birthmark.device.agent.stop import Stop
from birthmark.device.link.bundle import Bundle
from birthmark.device.pem import read_blocks
from birthmark.firmware_sim.terminal import Terminal

if TYPE_CHECKING:
    from pathlib import Path


class LineBoard:
    """One board; `port` leads to its pty, for as long as it is powered on."""

    def __init__(self, folder: Path, link: Path | None = None) -> None:
        self.folder = folder
        self._link = link or folder.with_suffix(".tty")
        self.port = str(self._link)
        self.hwid = os.urandom(8)
        self._terminal: Terminal | None = None

    def __enter__(self) -> Self:
        self.power_on()
        return self

    def __exit__(self, *_: object) -> None:
        self.power_off()

    def power_on(self) -> None:
        self._terminal = Terminal(self._link)
        self._stop = Stop()
        agent = AgentBoard(self.folder, self.hwid).agent
        self._thread = threading.Thread(target=tty.serve, args=(self._terminal.board_fd, agent, self._stop))
        self._thread.start()

    def power_off(self) -> None:
        """Take it off its port; what it stored stays."""
        terminal, self._terminal = self._terminal, None
        if terminal is not None:
            self._stop.set()
            self._thread.join()
            self._stop.close()
            terminal.close()

    def wipe(self) -> None:
        """Lose everything but the hardware id."""
        self.power_off()
        shutil.rmtree(self.folder)
        self.power_on()

    @property
    def bundle(self) -> Bundle:
        """What it holds as its identity."""
        blocks = dict(reversed(read_blocks((self.folder / "active").read_bytes())))
        return Bundle.from_bytes(blocks["BIRTHMARK BUNDLE"])

    @property
    def is_made(self) -> bool:
        return (self.folder / "active").exists()
