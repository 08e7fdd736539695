"""Power cuts and full disks, for real: a process that dies at its n-th system call, a limit set by the kernel.

Nothing is replaced or patched. A profile function sees every call of a builtin function before and after it
happens, and ends the process on the spot; the kernel itself refuses to write past RLIMIT_FSIZE.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CUT = 77
"""The exit code of a process whose power was cut."""

_WATCHED = frozenset(
    {"open", "fchmod", "write", "flush", "fsync", "rename", "replace", "unlink", "mkdir", "chmod"}
)
_CHILD_LIMIT_S = 30
_MODULES = frozenset({"posix", "io", "_io", None})


def _is_storage_call(function: Any) -> bool:
    return getattr(function, "__name__", "") in _WATCHED and getattr(function, "__module__", None) in _MODULES


def run_with_power_cut(work: Callable[[], object], cut_at: int) -> bool:
    """Run `work` in a child process that dies at the given point; whether it died before it was done.

    Points are counted over everything that touches the storage, each just before its call. What lies between two
    calls touches no storage, so before the next one is as good as after the last one.
    """
    with warnings.catch_warnings():
        # The test runner may have threads; the child uses none of what they hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_CHILD_LIMIT_S)
        try:
            seen = 0

            def profile(_frame: Any, event: str, function: Any) -> None:
                nonlocal seen
                if event == "c_call" and _is_storage_call(function):
                    seen += 1
                    if seen == cut_at:
                        os._exit(CUT)

            threading.setprofile(profile)
            sys.setprofile(profile)
            work()
            sys.setprofile(None)
            status = 0
        finally:
            os._exit(status)
    _, waited = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(waited)
    assert code in (0, CUT), f"the child failed with {code}"
    return code == CUT


def storage_calls(work: Callable[[], object]) -> list[str]:
    """The calls that touch the storage, by name, in their order, while `work` runs."""
    calls: list[str] = []

    def profile(_frame: Any, event: str, function: Any) -> None:
        if event == "c_return" and _is_storage_call(function):
            calls.append(function.__name__)

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file grow for the block: every write of data fails in the kernel."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
