"""The cable between a board and the pty that a station opens: the line's machine on real descriptors.

Rules:

- The board is served on one end of a socket pair, the station has the pty; a thread of the cable's carries bytes
  from one to the other as `line.Line` says, by the real clock.
- A line that is perfect has no thread and no socket: the board is served on the pty itself.
- An unplug closes the pty and takes its link away. The port comes back as another pty, under another number,
  behind the same link.
- What the station does not read in time is lost, as in a UART.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Final, Self

from birthmark.device.agent.stop import Stop
from birthmark.firmware_sim.line import Line
from birthmark.firmware_sim.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random
    from types import TracebackType

    from birthmark.firmware_sim.line import LineFaults

READ_BYTES: Final = 4096


class Cable:
    """A pty with a board's end; a context manager.

    Args:
        link_path: the stable name of the station's end.
        faults: what is wrong with the line.
        random: of the faults.
        notice: told `unplugged` and `replugged`, from the cable's own thread.

    Raises:
        OSError: the machine has no pty left, or the link could not be made; nothing stays open.
    """

    def __init__(
        self, link_path: Path, faults: LineFaults, random: Random, notice: Callable[[str], None] | None = None
    ) -> None:
        self._terminal = Terminal(link_path)
        self._notice = notice or (lambda _event: None)
        self._thread: threading.Thread | None = None
        self.board_fd = self._terminal.board_fd
        """The board's end, non-blocking."""
        if faults.is_perfect:
            return
        self._line = Line(faults, random)
        self._stop = Stop()
        self._board, self._inner = socket.socketpair()
        for end in (self._board, self._inner):
            end.settimeout(0)
        self.board_fd = self._board.fileno()
        self._thread = threading.Thread(target=self._carry, name="cable")
        self._thread.start()

    @property
    def path(self) -> Path:
        """The station's end, under the number that it has at present."""
        return self._terminal.path

    @property
    def link_path(self) -> Path:
        """The station's end, under its stable name."""
        return self._terminal.link_path

    def drain(self) -> None:
        """Lose what has arrived at the board: it had no power."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.board_fd, READ_BYTES):
                pass

    def close(self) -> None:
        """Take both ends away."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._stop.close()
            self._board.close()
            self._inner.close()
        self._terminal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _carry(self) -> None:
        while not self._stop.is_set:
            readable = self._wait()
            now_s = time.monotonic()
            if self._terminal.board_fd in readable:
                self._line.station_says(_read(self._terminal.board_fd), now_s)
            if self._inner.fileno() in readable:
                self._line.board_says(_read(self._inner.fileno()), now_s)
            delivery = self._line.take(now_s)
            _write(self._inner.fileno(), delivery.to_board)
            _write(self._terminal.board_fd, delivery.to_station)
            if delivery.unplug_s is not None:
                self._unplug(delivery.unplug_s)

    def _wait(self) -> set[int]:
        poll = select.poll()
        for descriptor in (self._terminal.board_fd, self._inner.fileno(), self._stop.fileno()):
            poll.register(descriptor, select.POLLIN)
        wait_s = self._line.next_s() - time.monotonic()
        events = poll.poll(None if wait_s == math.inf else max(0, math.ceil(wait_s * 1000)))
        return {descriptor for descriptor, event in events if event & select.POLLIN}

    def _unplug(self, lasts_s: float) -> None:
        self._terminal.hang_up()
        self._notice("unplugged")
        poll = select.poll()
        poll.register(self._stop.fileno(), select.POLLIN)
        poll.poll(lasts_s * 1000)
        # The old number is not free before the new port has its own: adapters come back under another name.
        gone, self._terminal = self._terminal, Terminal(self._terminal.link_path)
        gone.forget()
        with contextlib.suppress(BlockingIOError):
            while self._inner.recv(READ_BYTES):
                pass
        self._line.replug()
        self._notice("replugged")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, READ_BYTES)
    except BlockingIOError:
        return b""


def _write(descriptor: int, data: bytes) -> None:
    if data:
        with contextlib.suppress(BlockingIOError):
            os.write(descriptor, data)
