"""For every test: a property is about results, not about the speed of a machine; port locks are one worker's, and
what a test does to the log of its process is its own."""

from __future__ import annotations

import functools
import logging
import os
import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from support.postgres import running
from support.proof_report import PROVEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.postgres import Server

settings.register_profile("birthmark", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("birthmark")


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let what the tests start be interrupted: a shell's background job ignores SIGINT, and so do its children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """Leave the log of the process as it was: a test may run a command in it, which sets its own up."""
    loggers = {logger: logger.level for logger in (logging.getLogger(), logging.getLogger("birthmark"))}
    handlers = {logger: list(logger.handlers) for logger in loggers}
    yield
    for logger, level in loggers.items():
        logger.setLevel(level)
        logger.handlers[:] = handlers[logger]


@pytest.fixture
def proven(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Say what a proof counted: for the page that `make proof` leaves, and for whoever runs it with `-s`."""
    return functools.partial(record_property, PROVEN)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With `-s`, say what proofs counted."""
    if terminalreporter.config.getoption("capture") != "no":
        return
    for report in terminalreporter.getreports("passed"):
        for key, value in report.user_properties:
            if key == PROVEN and report.when == "call":
                terminalreporter.write_line(f"proven: {value}")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL of this worker's own, on which nothing is durable."""
    with running() as server:
        yield server


@pytest.fixture(scope="session", autouse=True)
def runtime_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the locks of ports apart from those of other workers.

    The number of a pty that is gone is given to the next one at once, whichever worker asks for it, while a
    station of the first may still hold its lock, as it should.
    """
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("runtime"))
    yield
    if before is None:
        del os.environ["XDG_RUNTIME_DIR"]
    else:
        os.environ["XDG_RUNTIME_DIR"] = before
