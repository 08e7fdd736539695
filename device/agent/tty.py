"""The agent on a tty or pty: raw mode, non-blocking, and back again after a hangup.

Rules:

- 8N1, raw, no flow control (docs/serial-protocol.md section 1); a baud rate means nothing on a pty.
- Work that a BUSY announced runs in a thread, while this one says BUSY every second.
- A peer that does not read costs its answers, never the agent: a write gives up after `WRITE_LIMIT_S`.
- The port may go and come back (a USB gadget replugged, the other end of a pty restarted): `run` opens it again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import termios
import tty
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Final, Protocol

from birthmark.device.errors import PortError, UsageError
from birthmark.device.link.timers import BUSY_EVERY_S, DEFAULT_BAUD

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from birthmark.device.agent.stop import Stop

READ_BYTES: Final = 4096
WRITE_LIMIT_S: Final = 2.0
REOPEN_EVERY_S: Final = 0.25

_GONE = frozenset({errno.EIO, errno.ENXIO, errno.ENODEV, errno.EBADF, errno.EPIPE, errno.ECONNRESET})
_HANGUP = select.POLLHUP | select.POLLERR | select.POLLNVAL


class Answering(Protocol):
    """What is served on a port: `machine.Agent`, or whatever a simulator puts in its place."""

    def receive(self, data: bytes) -> Generator[bytes, None, None]:
        """Take bytes from the line and yield what to send."""

    def busy(self) -> bytes:
        """The BUSY for the work under way; empty where there is none."""


class PortLostError(PortError):
    """The port went away while it was in use: unplugged, or hung up by the other end."""


def open_port(path: str, baud: int = DEFAULT_BAUD) -> int:
    """Open a tty in raw mode at `baud` and return its descriptor.

    Raises:
        UsageError: the system knows no such baud rate.
        PortError: the tty is missing, not permitted, or no tty.
    """
    speed: int | None = getattr(termios, f"B{baud}", None)
    if speed is None or baud <= 0:
        raise UsageError(f"could not use {baud} baud: no such rate", hint="try --baud 115200")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _port_error(path, error.strerror or str(error)) from error
    try:
        _make_raw(descriptor, speed)
    except (termios.error, OSError) as error:
        os.close(descriptor)
        raise _port_error(path, "it is no terminal, or it is gone") from error
    return descriptor


def run(
    path: str,
    agent: Answering,
    stop: Stop,
    *,
    baud: int = DEFAULT_BAUD,
    notice: Callable[[str], None] | None = None,
) -> None:
    """Serve the tty at `path` until `stop`, opening it again whenever it goes away.

    Args:
        path: of the tty.
        agent: answers what arrives.
        stop: ends it.
        baud: the rate of the line.
        notice: told `port_open` and `port_lost`.

    Raises:
        UsageError: the system knows no such baud rate.
        PortError: the tty could not be opened the first time.
    """
    tell = notice or (lambda _event: None)
    descriptor: int | None = open_port(path, baud)
    while descriptor is not None:
        tell("port_open")
        try:
            serve(descriptor, agent, stop)
        except PortLostError:
            tell("port_lost")
        finally:
            os.close(descriptor)
        descriptor = _reopen(path, baud, stop)


def serve(fd: int, agent: Answering, stop: Stop) -> None:
    """Answer what arrives at a non-blocking descriptor until `stop`. The descriptor stays open.

    Raises:
        PortLostError: the other end is gone.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(stop.fileno(), select.POLLIN)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="agent-work") as worker:
        while not stop.is_set:
            events = dict(poll.poll())
            if stop.is_set:
                return
            if events.get(fd, 0) & select.POLLIN:
                with contextlib.closing(agent.receive(_read(fd))) as answers:
                    _answer(fd, agent, answers, stop, worker)
            elif events.get(fd, 0) & _HANGUP:
                raise PortLostError("could not read from the port: the other end is gone")


def _answer(fd: int, agent: Answering, answers: Iterator[bytes], stop: Stop, worker: ThreadPoolExecutor) -> None:
    """Send every answer, with a BUSY for every second that one takes."""
    while True:
        if agent.busy():
            work = worker.submit(next, answers, None)
            try:
                while wait([work], timeout=BUSY_EVERY_S).not_done:
                    _write(fd, agent.busy(), stop)
            finally:
                wait([work])  # the port may be gone: what runs cannot be closed, and may not be left half done
            answer = work.result()
        else:
            answer = next(answers, None)
        if answer is None:
            return
        _write(fd, answer, stop)


def _read(fd: int) -> bytes:
    try:
        data = os.read(fd, READ_BYTES)
    except BlockingIOError:
        return b""
    except OSError as error:
        raise _lost("read from", error) from error
    if not data:
        raise PortLostError("could not read from the port: the other end is gone")
    return data


def _write(fd: int, data: bytes, stop: Stop) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.register(stop.fileno(), select.POLLIN)
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            # Nobody reads at the other end. The station repeats what it still wants to know.
            events = dict(poll.poll(WRITE_LIMIT_S * 1000))
            if fd not in events:
                return
        except OSError as error:
            raise _lost("write to", error) from error


def _lost(what: str, error: OSError) -> OSError | PortLostError:
    if error.errno not in _GONE:
        return error
    return PortLostError(f"could not {what} the port: {error.strerror}")


def _reopen(path: str, baud: int, stop: Stop) -> int | None:
    poll = select.poll()
    poll.register(stop.fileno(), select.POLLIN)
    while not poll.poll(REOPEN_EVERY_S * 1000):
        with contextlib.suppress(PortError):
            return open_port(path, baud)
    return None


def _make_raw(fd: int, speed: int) -> None:
    tty.setraw(fd, termios.TCSANOW)
    iflag, oflag, cflag, lflag, _, _, characters = termios.tcgetattr(fd)
    cflag &= ~(termios.CSTOPB | termios.PARENB | termios.CRTSCTS)
    cflag |= termios.CS8 | termios.CREAD | termios.CLOCAL
    iflag &= ~(termios.IXON | termios.IXOFF | termios.IXANY)
    termios.tcsetattr(fd, termios.TCSANOW, [iflag, oflag, cflag, lflag, speed, speed, characters])


def _port_error(path: str, cause: str) -> PortError:
    return PortError(
        f"could not open the port {path}: {cause}",
        hint="give the tty that the station's cable ends in, for example /dev/ttyGS0",
    )
