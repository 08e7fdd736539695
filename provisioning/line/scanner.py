"""What a person types or scans, line by line, from the standard input.

Rules:

- Octets are taken one by one: what comes after a line belongs to whoever scans next.
- Under a live table the terminal must not echo: its line feed would move the table by a line, and the next drawing
  would wipe what was typed. It gives each key at once then, and the table shows what has been typed so far.
- Ctrl-C stays a signal; the terminal gets its own settings back when the block ends.
"""

from __future__ import annotations

import os
import select
import termios
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from birthmark.provisioning.enrollment.session import StoppedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MAX_LINE_OCTETS: Final = 256
_LOOK_EVERY_MS: Final = 100
_ERASE: Final = (b"\x7f", b"\x08")
_KILL: Final = b"\x15"
_END: Final = b"\x04"
_LOCAL_FLAGS: Final = 3


class Scanner:
    """Lines from a descriptor.

    Args:
        descriptor: where they come from.
        stopped: whether a person stopped the line; asked a few times a second.
    """

    def __init__(self, descriptor: int, stopped: Callable[[], bool]) -> None:
        self.show: Callable[[str], None] | None = None
        """Is given what has been typed so far, while keys come one by one (`key_by_key`)."""
        self._descriptor = descriptor
        self._stopped = stopped

    @contextmanager
    def key_by_key(self, show: Callable[[str], None]) -> Iterator[None]:
        """Keep the terminal from echoing, for the block; without effect if the input is no terminal."""
        if not os.isatty(self._descriptor):
            yield
            return
        kept = termios.tcgetattr(self._descriptor)
        keys = termios.tcgetattr(self._descriptor)
        keys[_LOCAL_FLAGS] &= ~(termios.ICANON | termios.ECHO)
        self.show = show
        try:
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, keys)
            yield
        finally:
            self.show = None
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, kept)

    def line(self) -> str | None:
        """Return the next line; None at the end of the input.

        Raises:
            StoppedError: a person stopped it.
        """
        received = b""
        while not received.endswith(b"\n"):
            octet = self._octet()
            if self.show is not None:
                if octet == _END:
                    octet = b""
                elif octet in _ERASE or octet == _KILL:
                    received = b"" if octet == _KILL else received[:-1]
                    self.show(received.decode("utf-8", "replace"))
                    continue
            if not octet:
                break
            if len(received) < _MAX_LINE_OCTETS or octet == b"\n":
                received += octet
            if self.show is not None:
                self.show("" if octet == b"\n" else received.decode("utf-8", "replace"))
        return received.decode("utf-8", "replace") if received else None

    def _octet(self) -> bytes:
        """Return the next octet; nothing at the end of the input."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        while not poll.poll(_LOOK_EVERY_MS):
            if self._stopped():
                raise StoppedError
        if self._stopped():
            raise StoppedError
        return os.read(self._descriptor, 1)
