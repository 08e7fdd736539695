"""`birthmark-sim board` as a process, whose events a test reads."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from support.patience import PATIENCE_S

if TYPE_CHECKING:
    from types import TracebackType

COMMAND = Path(sys.executable).with_name("birthmark-sim")


class Simulator:
    """A running `birthmark-sim board --json`."""

    def __init__(self, state: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [COMMAND, "board", "--state", state, "--json", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def next(self, event: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            record: dict[str, Any] = json.loads(line)
            if record["event"] == event:
                return record
        raise AssertionError(f"it ended before {event!r}: {self.process.communicate()[1]}")

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        errors = self.process.communicate(timeout=PATIENCE_S)[1]
        return self.process.returncode, errors

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()
