"""Loading code without the collector of cycles, which would look through it again and again.

What a module brings stays until the process ends, and is most of what a short command ever holds. A quarter of
such a command's processor time would go into looking for garbage there, while it loads and once more at its end.
"""

from __future__ import annotations

import gc
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def loading() -> Iterator[None]:
    """Import in the block. If something was, what there is at its end is not looked through from then on."""
    was_enabled, loaded = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > loaded:
            gc.freeze()
        if was_enabled:
            gc.enable()
