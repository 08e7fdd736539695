"""The event loop that a gateway runs on: uvloop where it is installed (Linux, macOS), asyncio's own elsewhere.

Nothing else knows the difference: the gateway uses readiness callbacks, timers and signal handlers, which both
have. `BIRTHMARK_EVENT_LOOP=asyncio` goes without uvloop, to tell whether it is to blame for something.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

VARIABLE: Final = "BIRTHMARK_EVENT_LOOP"


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run `main` to its end on a new event loop."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(main)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the event loop; None for asyncio's default."""
    if os.environ.get(VARIABLE) == "asyncio":
        return None
    try:
        import uvloop  # noqa: PLC0415 - not everywhere
    except ImportError:
        return None
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return new_event_loop
