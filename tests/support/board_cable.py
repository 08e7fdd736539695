"""A null-modem cable made of two ptys and a thread: a station on one end, a device's agent on the other.

It can lose bytes, hang, record what passes, and fall out of the station's end and come back.
"""

from __future__ import annotations

import contextlib
import os
import pty
import select
import threading
import tty
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class _End:
    """One pty, raw, its slave held open so that nobody's close hangs it up."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        tty.setraw(self.slave)
        os.set_blocking(self.master, False)
        self.path = os.ttyname(self.slave)

    def close(self) -> None:
        for descriptor in (self.slave, self.master):
            with contextlib.suppress(OSError):
                os.close(descriptor)


@dataclass
class Cable:
    """Both ends, joined for the block. `link` is a symbolic link that always leads to the station's end."""

    link: Path
    to_device: Callable[[bytes], bytes] = bytes
    to_station: Callable[[bytes], bytes] = bytes
    passed_to_device: bytearray = field(default_factory=bytearray)
    passed_to_station: bytearray = field(default_factory=bytearray)

    def __enter__(self) -> Self:
        self._stop_read, self._stop_write = os.pipe()
        self._device = _End()
        self._station = _End()
        self._link()
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._halt()
        self._station.close()
        self._device.close()
        os.close(self._stop_read)
        os.close(self._stop_write)

    @property
    def station_path(self) -> str:
        """The station's end, as it is called at present."""
        return self._station.path

    @property
    def device_path(self) -> str:
        return self._device.path

    def unplug(self) -> None:
        """Take the station's end away: its pty hangs up and its name is gone."""
        self._halt()
        self.link.unlink()
        self._station.close()

    def replug(self) -> None:
        """Bring the station's end back, as a new pty under the old link."""
        self._station = _End()
        self._link()
        self._start()

    def say_to_station(self, data: bytes, *, after_bytes: int) -> None:
        """Let the device's end say something once it was sent so many bytes."""
        said: list[bool] = []

        def listen(heard: bytes) -> bytes:
            if not said and len(self.passed_to_device) >= after_bytes:
                said.append(True)
                _write(self._station.master, data)
            return heard

        self.to_device = listen

    def _link(self) -> None:
        self.link.unlink(missing_ok=True)
        self.link.symlink_to(self._station.path)

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def _halt(self) -> None:
        if self._thread.is_alive():
            os.write(self._stop_write, b"x")
            self._thread.join()
            os.read(self._stop_read, 1)

    def _carry(self) -> None:
        station, device = self._station.master, self._device.master
        while True:
            ready, _, _ = select.select([station, device, self._stop_read], [], [])
            if self._stop_read in ready:
                return
            if station in ready:
                data = os.read(station, 4096)
                self.passed_to_device += data
                _write(device, self.to_device(data))
            if device in ready:
                data = os.read(device, 4096)
                self.passed_to_station += data
                _write(station, self.to_station(data))


def _write(descriptor: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            # Nobody reads at that end: a wire without flow control loses what does not fit.
            _, ready, _ = select.select([], [descriptor], [], 0.5)
            if not ready:
                return
