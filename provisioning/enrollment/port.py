"""The station's serial ports: pyserial behind a thin adapter (docs/serial-protocol.md sections 1 and 9).

Rules:

- A port is held by a lock file before it is opened at all: opening it would reset the board that another station
  is at work on. pyserial's own exclusive mode (a flock on the tty) covers other users and other programs.
- DTR and RTS are set low before `open()`, since many boards reset on DTR; what waits in the input is dropped.
- Whatever pyserial raises (its own exception, OSError, termios.error, or a TypeError when the port goes away in
  the middle of a call) becomes a PortError.
- A line without flow control never blocks: bytes that the other side does not take in time are lost, as on a
  wire, and the link repeats them.
- After an unplug the same physical port is waited for: by its USB path where it has one, else by the name it
  was given, so that a symbolic link with a stable name is followed anew.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import select
import stat
import tempfile
import termios
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import serial
from serial.tools import list_ports

from birthmark.device.durable import exclusive_lock, private_folder
from birthmark.device.errors import PortError, SystemFailureError
from birthmark.device.escape import escaped
from birthmark.provisioning.enrollment.exchange import MAX_READ_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

WRITE_TIMEOUT_S: Final = 1.0
MAX_BAUD: Final = 50_000_000
"""More than any adapter does; the system takes 31 bits."""
_FAILURES: Final = (serial.SerialException, OSError, termios.error, TypeError)
_URL_MARK: Final = "://"
_RFC2217: Final = "rfc2217"
_SCHEMES: Final = (_RFC2217, "socket")
"""URLs that name one port; others of pyserial's choose among several (hwgrep), or write down what passes (spy)."""


def adapters() -> list[Any]:
    """Return pyserial's description of every serial port that is there."""
    return list(list_ports.comports())  # type: ignore[attr-defined, no-untyped-call]


@dataclass(frozen=True, slots=True)
class PortName:
    """A port as the operator named it, and what tells it from its neighbours after an unplug."""

    text: str
    usb_path: str = ""
    """The USB path of its adapter (bus and hub ports); empty where it has none."""

    @classmethod
    def of(cls, text: str) -> Self:
        """Look up what is known of the port named `text`."""
        if _URL_MARK in text:
            return cls(text)
        device = os.path.realpath(text)
        for found in adapters():
            if os.path.realpath(found.device) == device and found.location:
                return cls(text, found.location)
        return cls(text)

    @property
    def is_local(self) -> bool:
        """Whether it is a port of this machine; a private key goes over no other."""
        return _URL_MARK not in self.text

    @property
    def lock_key(self) -> str:
        """What two stations on one physical port have in common."""
        return self.usb_path or (os.path.realpath(self.text) if self.is_local else self.text)

    def find(self) -> str | None:
        """Return the name under which the same physical port can be opened now, or None if it is away."""
        if not self.is_local:
            return self.text
        if self.usb_path:
            here = [found.device for found in adapters() if found.location == self.usb_path]
            return str(here[0]) if here else None
        return self.text if Path(self.text).exists() else None

    @staticmethod
    def others_hint() -> str:
        """Return a hint that names the ports that are there."""
        names = sorted(found.device for found in adapters())
        return (
            f"ports of this machine: {', '.join(names)}" if names else "this machine has no serial port at present"
        )


@contextlib.contextmanager
def held(name: PortName) -> Iterator[None]:
    """Keep other stations of this user off the port for the block, unplugged or not.

    Raises:
        PortError: another station holds it; the port was not touched.
        SystemFailureError: the folder of the locks cannot be used.
    """
    folder = _own_lock_folder()
    lock = folder / f"{hashlib.sha256(name.lock_key.encode()).hexdigest()[:32]}.lock"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(exclusive_lock(lock, wait=False))
        except BlockingIOError:
            raise PortError(
                f"could not use the port {name.text}: another station is at work on it",
                hint="wait until it is done, or choose another port",
            ) from None
        yield


def _own_lock_folder() -> Path:
    folder = _lock_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
            return private_folder(folder)
    except OSError as error:
        raise SystemFailureError(f"could not make the folder {folder}: {error.strerror}") from error
    # In a place where everybody may put something, a link leads where somebody else wants.
    raise SystemFailureError(
        f"could not use the folder {folder}: it is not this user's own", hint="somebody else made it: remove it"
    )


def _lock_folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) if runtime and os.access(runtime, os.W_OK) else Path(tempfile.gettempdir())
    return base / f"birthmark-ports-{os.getuid()}"


class SerialPort:
    """An opened port.

    Args:
        name: which one.
        baud: its speed; 8N1, no flow control.

    Raises:
        PortError: it is missing, busy, not permitted, or no serial port; nothing stays open.
    """

    def __init__(self, name: PortName, baud: int) -> None:
        self.name = name
        found = name.find()
        if found is None:
            raise PortError(f"could not open the port {name.text}: there is none", hint=name.others_hint())
        if not 0 < baud <= MAX_BAUD:
            raise PortError(
                f"could not open the port {name.text}: {baud} baud is no speed of a port",
                hint="try --baud 115200",
            )
        scheme = "" if name.is_local else name.text.partition(_URL_MARK)[0].lower()
        if scheme and scheme not in _SCHEMES:
            raise PortError(
                f"could not open the port {escaped(name.text)}: it is no URL of a port on a network",
                hint="use rfc2217://HOST:PORT or socket://HOST:PORT",
            )
        try:
            self._port = serial.serial_for_url(found, baud, do_not_open=True)  # type: ignore[no-untyped-call]
            self._port.timeout = 0
            if scheme != _RFC2217:  # it has none but the one of its socket, 5 s
                self._port.write_timeout = WRITE_TIMEOUT_S
            self._port.exclusive = True if name.is_local else None
            # Before open(), or the board resets. A pty has neither line, and takes it only before open() too.
            self._port.dtr = False
            self._port.rts = False
            self._port.open()
        except (*_FAILURES, ValueError) as error:
            raise _open_error(name, error) from error
        try:
            self._port.reset_input_buffer()
        except _FAILURES as error:
            self.close()
            raise _open_error(name, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, data: bytes) -> None:
        """Put bytes on the line; what it does not take within WRITE_TIMEOUT_S is lost.

        Raises:
            PortError: the port has gone.
        """
        try:
            self._port.write(data)
        except serial.SerialTimeoutException:
            return
        except _FAILURES as error:
            raise self._gone(error) from error

    def read(self, timeout_s: float) -> bytes:
        """Wait up to `timeout_s` for bytes and return what is there, at most MAX_READ_BYTES.

        Raises:
            PortError: the port has gone.
        """
        try:
            if self.name.is_local:
                poll = select.poll()
                poll.register(self._port.fileno(), select.POLLIN)
                if not poll.poll(math.ceil(max(timeout_s, 0.0) * 1000)):
                    return b""
                # Ready with nothing to read means that the other end has gone: reading one byte says so.
                return bytes(self._port.read(max(1, min(self._port.in_waiting, MAX_READ_BYTES))))
            self._port.timeout = max(timeout_s, 0.0)
            first = bytes(self._port.read(1))
            return first + bytes(self._port.read(min(self._port.in_waiting, MAX_READ_BYTES - 1))) if first else b""
        except (*_FAILURES, ValueError) as error:
            raise self._gone(error) from error

    def close(self) -> None:
        """Let go of the port; whatever goes wrong with one that has gone does not matter."""
        with contextlib.suppress(*_FAILURES):
            self._port.close()

    def _gone(self, error: Exception) -> PortError:
        return PortError(
            f"could not use the port {self.name.text}: it has gone ({_cause(error)})",
            hint="plug the device in again, then run the same command again: it resumes where it stopped",
        )


def _open_error(name: PortName, error: Exception) -> PortError:
    number = _errno(error)
    if number == errno.EACCES:
        return PortError(
            f"could not open the port {name.text}: permission denied",
            hint="add yourself to the group that owns it (often dialout), then log in again",
        )
    if number == errno.EAGAIN:
        return PortError(
            f"could not open the port {name.text}: another program has it",
            hint="close that program; ModemManager probes new ports, and can be told not to",
        )
    if number in (errno.ENOTTY, errno.EINVAL, errno.EISDIR):
        return PortError(f"could not open the port {name.text}: it is no serial port", hint=name.others_hint())
    return PortError(f"could not open the port {name.text}: {_cause(error)}", hint=name.others_hint())


def _errno(error: BaseException) -> int | None:
    """Return the system's error number; pyserial keeps it in its own errors, or in what they came from."""
    for one in (error, error.__context__):
        if isinstance(one, OSError) and one.errno is not None:
            return one.errno
        if isinstance(one, termios.error) and one.args and isinstance(one.args[0], int):
            return one.args[0]
    return None


def _cause(error: Exception) -> str:
    number = _errno(error)
    return os.strerror(number) if number is not None else escaped(str(error) or type(error).__name__)
