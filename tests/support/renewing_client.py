"""A client that does not wait long, and an observer that knows the states of its renewal."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from support.patience import PATIENCE_S
from support.waiting import eventually
from support.watching import Watching

from birthmark.device.backoff import Backoff, RetryTimer
from birthmark.device.client import Client
from birthmark.device.events import RenewalChanged
from birthmark.device.renewal.schedule import Pace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SOON = Backoff(0.05, 0.2)
QUICK = Pace(answered_within_s=2.0, repeat=SOON, refused_wait_s=0.5)


class Renewing(Watching):
    """An observer that knows the states of a renewal."""

    @property
    def states(self) -> list[str]:
        return [event.state for event in self.events if isinstance(event, RenewalChanged)]

    def wait_for_state(self, state: str, count: int = 1) -> None:
        eventually(lambda: self.states.count(state) >= count, f"{state}; these happened: {self.events}")


def client(state: Path, watching: Watching, **options: Any) -> Client:
    retry = RetryTimer(unreachable=SOON, refused=SOON)
    return Client.from_folder(state, observe=watching, **{"retry": retry, "renewal_pace": QUICK, **options})


@contextlib.contextmanager
def client_started(state: Path, watching: Watching, **options: Any) -> Iterator[Client]:
    """A client that may be refused at first."""
    started = client(state, watching, **options)
    started.start()
    try:
        yield started
    finally:
        started.stop()


def device_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `birthmark-device`."""
    return subprocess.run(
        [sys.executable, "-m", "birthmark.device", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
