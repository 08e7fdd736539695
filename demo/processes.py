"""The demo's processes: started, listened to, waited for, and none left behind.

Rules:

- Every process is the leader of a session of its own: a Ctrl-C in the terminal reaches the demo alone, which
  then stops them in an order it knows.
- Every wait has a deadline, ends at once when the process waited for has died, and ends when the demo is told
  to stop. The signal handler only sets a flag, so no interruption can fall between a start and its entry here.
- What a process says is kept with the time it was heard, and written to a log file as it comes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SLICE_S = 0.05  # how often a wait looks whether the demo was told to stop
_STOP_TIMEOUT_S = 5.0  # from SIGTERM to SIGKILL
COMMANDS = Path(sys.executable).parent


class StepFailedError(Exception):
    """Something did not happen that the demo says happens."""


class InterruptedDemoError(Exception):
    """The demo was told to stop, by Ctrl-C or SIGTERM."""


@dataclass(frozen=True, slots=True)
class Heard:
    """One line that a process said, and when it was heard."""

    at_s: float
    """By `time.monotonic()`."""
    record: dict[str, Any]
    """The JSON object; `{"text": ...}` if the line is none."""
    is_error: bool
    """Whether it came on standard error."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a finished command said."""

    exit_code: int
    records: tuple[dict[str, Any], ...]
    errors: str
    elapsed_s: float


class Child:
    """A running process and what it has said so far; made by `Stage.start`."""

    def __init__(
        self, name: str, process: subprocess.Popen[bytes], logs: Path, interrupted: threading.Event
    ) -> None:
        self.name = name
        self.started_s = time.monotonic()
        self._process = process
        self._interrupted = interrupted
        self._heard: list[Heard] = []
        self._changed = threading.Condition()
        self.log_path = logs / f"{name}.log"
        self._readers = [
            threading.Thread(target=self._read, args=(stream, path), kwargs={"is_error": is_error}, daemon=True)
            for stream, path, is_error in (
                (process.stdout, self.log_path, False),
                (process.stderr, self.log_path.with_suffix(".err"), True),
            )
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        """The process's id, which is its process group's too."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def heard(self) -> list[Heard]:
        """Return what it has said so far."""
        with self._changed:
            return list(self._heard)

    def errors(self) -> str:
        """Return what it has written to standard error so far."""
        return "\n".join(
            heard.record.get("text") or json.dumps(heard.record) for heard in self.heard() if heard.is_error
        )

    def wait_for(
        self, what: str, wanted: Callable[[dict[str, Any]], bool], *, timeout_s: float, since_s: float = 0.0
    ) -> Heard:
        """Return the first record heard after `since_s` that is wanted.

        Raises:
            StepFailedError: it did not come in time, or the process ended without it.
            InterruptedDemoError: the demo was told to stop.
        """
        found: list[Heard] = []

        def look() -> bool:
            ended = self.exit_code is not None and not any(reader.is_alive() for reader in self._readers)
            found.extend(h for h in self.heard() if h.at_s >= since_s and wanted(h.record))
            if not found and ended:
                raise StepFailedError(
                    f"{self.name} ended with exit code {self.exit_code} before {what}: {self._last()}"
                )
            return bool(found)

        self.until(look, f"{self.name}: {what}", timeout_s=timeout_s)
        return found[0]

    def tell(self, line: str) -> None:
        """Write one line to its standard input (the process was started with `listening=True`)."""
        if self._process.stdin is None:
            raise StepFailedError(f"{self.name} was not started to listen")
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()

    def finish(self, *, timeout_s: float) -> Answer:
        """Wait until it ends and everything it said is read."""

        def look() -> bool:
            return self.exit_code is not None and not any(reader.is_alive() for reader in self._readers)

        self.until(look, f"the end of {self.name}", timeout_s=timeout_s)
        elapsed_s = time.monotonic() - self.started_s
        records = tuple(heard.record for heard in self.heard() if not heard.is_error)
        return Answer(self._process.returncode, records, self.errors(), elapsed_s)

    def until(self, look: Callable[[], bool], what: str, *, timeout_s: float) -> None:
        """Wait until `look()` holds; it is looked at whenever the process says something."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while not look():
                if self._interrupted.is_set():
                    raise InterruptedDemoError
                if time.monotonic() > deadline_s:
                    raise StepFailedError(f"waited {timeout_s:.0f} s in vain for {what}: {self._last()}")
                self._changed.wait(_SLICE_S)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process's whole group, if any of it is left."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    def reap(self) -> None:
        """Kill whatever of its group is left, and forget it."""
        self.signal(signal.SIGKILL)
        self._process.wait()
        for reader in self._readers:
            reader.join(timeout=1)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def _read(self, stream: IO[bytes], log_path: Path, *, is_error: bool) -> None:
        with log_path.open("wb", buffering=0) as log:
            for line in stream:
                log.write(line)
                heard = Heard(time.monotonic(), _record(line), is_error)
                with self._changed:
                    self._heard.append(heard)
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _last(self) -> str:
        lines = self.errors().strip().splitlines()[-3:]
        if not lines:
            lines = [json.dumps(heard.record) for heard in self._heard[-3:]]
        return " / ".join(lines) or "it said nothing"


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    return record if isinstance(record, dict) else {"text": line.decode(errors="replace").rstrip("\n")}


class Stage:
    """Where the demo plays: a folder, an environment, and every process that was started.

    Args:
        folder: the demo's own; `logs/` and `tmp/` are made in it.
        environment: variables added to the demo's own for every process.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.logs.mkdir(mode=0o700)
        temporary = folder / "tmp"
        temporary.mkdir(mode=0o700)
        own = {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "TMPDIR": str(temporary)}
        self._environment = {**os.environ, **environment, **own}
        self._children: list[Child] = []
        self._interrupted = threading.Event()

    def interrupt(self) -> None:
        """Let every wait end with `InterruptedDemoError`; safe in a signal handler."""
        self._interrupted.set()

    def start(self, name: str, line: str, *more: str | Path, listening: bool = False) -> Child:
        """Start a process in the stage's folder.

        Args:
            name: of its logs.
            line: the command as one would type it; the first word is one of this environment's own commands.
            more: words that may hold spaces, such as paths.
            listening: whether `Child.tell` will be used.

        Raises:
            InterruptedDemoError: the demo was told to stop; nothing was started.
        """
        if self._interrupted.is_set():
            raise InterruptedDemoError
        words = line.split()
        process = subprocess.Popen(
            [COMMANDS / words[0], *words[1:], *more],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.PIPE if listening else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        child = Child(self._unused(name), process, self.logs, self._interrupted)
        self._children.append(child)
        return child

    def run(self, name: str, line: str, *, expected: int = 0, timeout_s: float = 30) -> Answer:
        """Run a command to its end; see `start`.

        Raises:
            StepFailedError: it took too long, or ended with another exit code than expected.
            InterruptedDemoError: the demo was told to stop.
        """
        answer = self.start(name, line).finish(timeout_s=timeout_s)
        if answer.exit_code != expected:
            said = answer.errors.strip() or json.dumps(answer.records)
            raise StepFailedError(f"{name} ended with exit code {answer.exit_code}, not {expected}: {said}")
        return answer

    def stop(self) -> None:
        """Stop every process that is left, kindly and then not; nothing of any of them runs afterwards."""
        running = [child for child in reversed(self._children) if child.exit_code is None]
        for child in running:
            child.signal(signal.SIGTERM)
        deadline_s = time.monotonic() + _STOP_TIMEOUT_S
        while any(child.exit_code is None for child in running) and time.monotonic() < deadline_s:
            time.sleep(_SLICE_S)
        for child in self._children:
            child.reap()
        self._children.clear()

    def _unused(self, name: str) -> str:
        taken = {child.name for child in self._children}
        return next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if n not in taken)
