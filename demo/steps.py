"""The demo's steps, in order: each does one thing with the real commands and returns what it observed.

Rules:

- A step's first docstring line is its title. It returns `Observed`, or raises `StepFailedError`: through a wait in
  vain, through a command's exit code, or through `expect`. It cannot succeed without having seen it.
- Steps talk to processes only: commands, what they say, and the files that they leave behind.
- A later chapter is a later function in `STEPS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from demo import enrolling, refusing, revoking

if TYPE_CHECKING:
    from collections.abc import Callable

    from demo.narrator import Observed
    from demo.play import Play

STEPS: tuple[Callable[[Play], Observed], ...] = (
    enrolling.station,
    enrolling.gateway,
    enrolling.operator,
    enrolling.boards,
    enrolling.flash,
    enrolling.online,
    refusing.foreign_topic,
    refusing.stranger,
    revoking.revoke,
    revoking.no_return,
    revoking.others,
    revoking.audit,
    revoking.goodbye,
)
