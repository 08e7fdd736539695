"""Programs of Debian's that tests hold us against: without one a test is skipped, and in CI it fails."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))


def found(name: str) -> str | None:
    """Return where a program is, a daemon too; None: it is not installed."""
    return shutil.which(name, path=_PATH)


def lacks(name: str, package: str) -> NoReturn:
    """End a test that cannot be run without something. CI installs it (`.ci/run`), so there the test fails."""
    message = _message(name, package)
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def program(name: str, package: str = "") -> str:
    """Return where a program is, or end the test."""
    return found(name) or lacks(name, package or name)


def needs(name: str, package: str = "") -> pytest.MarkDecorator:
    """Mark a test that starts a program by its name; without it, it fails in CI by itself."""
    missing = found(name) is None and not os.environ.get("CI")
    return pytest.mark.skipif(missing, reason=_message(name, package or name))


def _message(name: str, package: str) -> str:
    return f"{name} is not installed: apt install {package}"
