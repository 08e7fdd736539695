"""`birthmark-device` as a process, its JSON lines as records."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from support.patience import PATIENCE_S
from support.programs import needs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

needs_faketime = needs("faketime")
COMMAND = [sys.executable, "-W", "error", "-m", "birthmark.device"]


def run(*arguments: str | Path, timeout_s: float = PATIENCE_S, at: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command to its end; with `at`, its clock begins there (libfaketime)."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, "COLUMNS": "200", **clock_beginning(at)},
    )


def clock_beginning(at: str) -> dict[str, str]:
    """Return the environment in which a process's clock begins at a time of its own (libfaketime); none for ""."""
    if not at:
        return {}
    # Without its wrapper: that passes no signals on, and fails where a process of its number left a semaphore.
    ahead_s = datetime.fromisoformat(at).replace(tzinfo=UTC).timestamp() - time.time()
    return {"LD_PRELOAD": "/usr/$LIB/faketime/libfaketimeMT.so.1", "FAKETIME": f"{math.ceil(ahead_s):+d}"}


class DeviceCommand:
    """A command that goes on until it is told to stop; give it `--json`.

    Args:
        arguments: of `birthmark-device`.
        at: where its clock begins (libfaketime); "": with the system's.
    """

    def __init__(self, *arguments: str | Path, at: str = "") -> None:
        self._at = at
        self._arguments = [*COMMAND, *map(str, arguments)]
        self.records: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self.process: subprocess.Popen[str]

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, **clock_beginning(self._at)},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self._reader.join(PATIENCE_S)
        self.process.wait(PATIENCE_S)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()

    def wait_for(
        self, event: str, matching: Callable[[dict[str, Any]], bool] = lambda _: True, count: int = 1
    ) -> dict[str, Any]:
        """Return the count-th record of this event, once it was printed."""
        deadline = time.monotonic() + PATIENCE_S
        with self._changed:
            while True:
                found = [record for record in self.records if record["event"] == event and matching(record)]
                if len(found) >= count:
                    return found[count - 1]
                left_s = deadline - time.monotonic()
                assert left_s > 0, f"no {event}; these were printed: {self.records}"
                self._changed.wait(left_s)

    def end(self, number: int) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code

    def errors(self) -> str:
        """What it said on stderr, after its end."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.records.append(json.loads(line))
                self._changed.notify_all()
