"""A board's serial port that does not exist: a pseudo-terminal with a name that stays.

Rules:

- A fresh pty echoes and edits lines until somebody makes it raw; it is raw before anybody learns its name.
- The board keeps a slave descriptor of its own: without one, the master reads an error whenever no station has
  the port open, and the settings are lost with the last one that closes it.
- The kernel numbers ptys anew each time, so a symbolic link with a stable name points at the one in use.
"""

from __future__ import annotations

import os
import tty
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType


class Terminal:
    """An open pty; a context manager that closes it and removes its link.

    Args:
        link_path: where the stable name is made; whatever link an earlier run left there is replaced.

    Raises:
        OSError: the machine has no pty left, or the link could not be made; nothing stays open.
    """

    def __init__(self, link_path: Path) -> None:
        self.link_path = link_path
        self.board_fd, self._slave_fd = os.openpty()
        """The board's end, non-blocking: what the station writes is read here."""
        try:
            os.set_blocking(self.board_fd, False)
            tty.setraw(self._slave_fd)
            self.path = Path(os.ttyname(self._slave_fd))
            link_path.unlink(missing_ok=True)
            link_path.symlink_to(self.path)
        except OSError:
            os.close(self.board_fd)
            os.close(self._slave_fd)
            raise

    def close(self) -> None:
        """Hang up, and give the pty back."""
        self.hang_up()
        self.forget()

    def hang_up(self) -> None:
        """Take port and link away: whoever has it open reads an error from now on. Its number stays taken."""
        if self.board_fd >= 0:
            self.link_path.unlink(missing_ok=True)
            os.close(self.board_fd)
            self.board_fd = -1

    def forget(self) -> None:
        """Let the kernel give the number of a port that hung up to another one."""
        os.close(self._slave_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
