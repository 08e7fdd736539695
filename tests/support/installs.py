"""Installing the tracked files, as a stranger's pip would, without touching the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from typing import TYPE_CHECKING

import pytest
from support.repository import ROOT, tracked

if TYPE_CHECKING:
    from pathlib import Path

NO_INDEX = ("No matching distribution found", "Could not fetch URL", "NewConnectionError", "ConnectTimeout")


def copy_of_tracked_files(folder: Path) -> Path:
    """Copy the tracked files, so that a build neither takes in the checkout's `build/` nor leaves one there."""
    for path in tracked():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, target, follow_symlinks=False)
    return folder


def run(*command: object, cwd: Path, timeout_s: float = 900) -> subprocess.CompletedProcess[str]:
    """Run a command without this environment's own Python settings, and return what it said."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "COV_"))
    }
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )


def bare_environment(folder: Path, requirement: str, source: Path) -> Path:
    """Make a virtual environment with nothing but one requirement of `source`; return its `bin` folder.

    Without a package index the test is skipped, but never in CI.
    """
    venv.create(folder, with_pip=True, symlinks=True)
    binaries = folder / "bin"
    constraints = source / "constraints.txt"
    pip = [binaries / "python", "-m", "pip", "install", "--quiet", "--no-input", "-c", constraints, requirement]
    answer = run(*pip, cwd=source)
    if answer.returncode != 0:
        if "CI" not in os.environ and any(sign in answer.stderr for sign in NO_INDEX):
            pytest.skip("no package index can be reached from here")
        pytest.fail(f"could not install {requirement}: {answer.stderr}")
    return binaries


def build_wheel(source: Path, target: Path) -> Path:
    """Build the wheel of `source` with this environment's setuptools; return its path."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, source]
    answer = run(*command, cwd=source)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (wheel,) = target.glob("*.whl")
    return wheel
