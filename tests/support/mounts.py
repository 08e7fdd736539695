"""File systems that a test mounts for itself, where it may."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from support.patience import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def mount(*words: str) -> subprocess.CompletedProcess[str]:
    """Run `mount`."""
    return subprocess.run(["mount", *words], capture_output=True, text=True, check=False, timeout=PATIENCE_S)


@contextmanager
def mounted(*words: str, at: Path) -> Iterator[Path]:
    """Mount something at a new folder for the block; the test is skipped where nobody may."""
    at.mkdir()
    done = mount(*words, str(at))
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", at], check=True, timeout=PATIENCE_S)
