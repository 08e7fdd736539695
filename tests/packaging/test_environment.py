"""`tools/environment`: what `make` says when the machine lacks something."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.patience import PATIENCE_S
from support.repository import ROOT

if TYPE_CHECKING:
    from pathlib import Path


def environment(python: Path | str, venv: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", ROOT / "tools" / "environment", python, venv],
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * PATIENCE_S,  # it may make one, pip and all
    )


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("python", ["no-such-python", "/dev/null"])
def test_no_python(tmp_path: Path, python: str) -> None:
    answer = environment(python, tmp_path / "venv")
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"error: could not run {python}\nhint: ")
    assert list(tmp_path.iterdir()) == []


def test_a_shim_of_a_version_that_is_not_there(tmp_path: Path) -> None:
    shim = script(tmp_path / "python3.12", "echo 'command not found' >&2; exit 127")
    answer = environment(shim, tmp_path / "venv")
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: could not run ")


def test_an_old_python(tmp_path: Path) -> None:
    old = script(
        tmp_path / "python3",
        'case "$*" in *version_info*) exit 1;; -V) echo Python 3.9.2;; esac',
    )
    answer = environment(old, tmp_path / "venv")
    assert answer.returncode == 1
    assert "is Python 3.9.2, and birthmark needs 3.11 or newer" in answer.stderr
    assert "hint: " in answer.stderr
    assert not (tmp_path / "venv").exists()


def test_no_venv_module(tmp_path: Path) -> None:
    python = script(tmp_path / "python3", 'case "$*" in *venv*) exit 1;; -V) echo Python 3.11.2;; esac')
    answer = environment(python, tmp_path / "venv")
    assert answer.returncode == 1
    assert "hint: Debian and Ubuntu ship this part of Python apart: apt install python3-venv" in answer.stderr


def test_a_working_environment_is_left_alone_and_a_broken_one_made_anew(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    script(venv / "bin" / "python", "exit 1")
    (venv / "leftover").touch()
    assert environment(sys.executable, venv).returncode == 0
    assert not (venv / "leftover").exists()

    (venv / "mine").touch()
    again = environment(sys.executable, venv)
    assert (again.returncode, again.stderr) == (0, "")
    assert (venv / "mine").exists()
