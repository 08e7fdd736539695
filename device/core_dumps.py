"""Keys stay out of core files: a process that will hold one forbids them first.

A limit of 0 stops the kernel from writing a core file, but not from piping the core to a program, which is what
systemd-coredump and apport are (core(5)); for that a process must not be dumpable at all. Then no other process of
the same user can attach to it or read its memory either (ptrace(2)).
"""

from __future__ import annotations

import contextlib
import ctypes
import resource

_PR_SET_DUMPABLE = 4  # linux/prctl.h


def forbid_core_dumps() -> None:
    """Keep what is in the memory of this process out of core files and away from other processes of this user."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, AttributeError):  # no prctl where this is not Linux
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
