"""To wait for what no event tells of: a file, another process's state, a number in another thread."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from support.patience import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable


def eventually(
    condition: Callable[[], object], what: str = "it never came to be", *, every_s: float = 0.01
) -> None:
    """Wait until a condition is true; `what` is said if it never is."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(every_s)


async def until(condition: Callable[[], object]) -> None:
    """Wait, and let the event loop go on, until a condition is true."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - the condition belongs to no event
            await asyncio.sleep(0.005)
