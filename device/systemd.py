"""What systemd is told (sd_notify(3), sd_watchdog_enabled(3)), in a few lines instead of a library.

Rules: without systemd nothing happens; that it cannot be told stops nothing. The watchdog is fed twice in its
interval by the loop that does the work: a service whose loop hangs is restarted, one that is merely busy is not.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TextIO

_log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Tell systemd a state, such as `READY=1`, if it wants to know."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(0)  # a systemd that does not read must not hold up a service
            sock.connect(address)
            sock.sendall(state.encode(errors="backslashreplace"))
    except OSError as error:
        _log.warning("could not tell systemd %s: %s", state, error.strerror)


def watchdog_interval_s() -> float | None:
    """How often at least systemd wants to hear from this process; None if it does not."""
    text, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not (text.isascii() and text.isdigit() and int(text)) or (pid and pid != str(os.getpid())):
        return None
    return int(text) / 1_000_000


def is_journal(stream: TextIO) -> bool:
    """Whether a stream goes to systemd's journal (systemd.exec(5)).

    It gives each line its time, and reads a `<4>` before it as the line's priority (sd-daemon(3)).
    """
    try:
        told = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{told.st_dev}:{told.st_ino}"


async def feed_watchdog(interval_s: float) -> None:
    """Tell systemd for ever that an event loop turns."""
    import asyncio  # noqa: PLC0415 - a device has no event loop, and need not load one

    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_s / 2)
