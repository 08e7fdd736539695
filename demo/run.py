"""`make demo`: the whole mission on one machine, every step observed.

Run as `python -m demo.run` from the repository. Exit codes: 0 every step was observed to happen, 1 one was not
(its logs stay), 130 interrupted. Whatever happens, no process is left. `DEMO=json` prints JSON lines.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from demo.narrator import Narrator
from demo.play import Play
from demo.processes import InterruptedDemoError, Stage, StepFailedError
from demo.steps import STEPS

if TYPE_CHECKING:
    from types import FrameType

INTERRUPTED = 130
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Play every step; return the exit code."""
    as_json = os.environ.get("DEMO") == "json"
    folder = Path(tempfile.mkdtemp(prefix="birthmark-demo-"))
    # A passphrase of this run only, in the processes' environment: a station's own belongs in neither.
    stage = Stage(folder, {"BIRTHMARK_PASSPHRASE": secrets.token_urlsafe(24), "BIRTHMARK_STATION": "station"})

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        stage.interrupt()

    for number in _STOPPING:
        signal.signal(number, interrupt)

    exit_code = 1
    try:
        exit_code = play(stage, Narrator(as_json=as_json))
    except BrokenPipeError:
        # Whoever listened has gone (`make demo | head`): the play is over, and that is nobody's fault.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        exit_code = INTERRUPTED
    finally:
        stage.stop()
        if exit_code != 1:
            shutil.rmtree(folder)
    return exit_code


def play(stage: Stage, narrator: Narrator) -> int:
    """Play the steps in order; the first that is not observed is the last."""
    narrator.begin(str(stage.folder))
    started_s = time.monotonic()
    current = Play(stage)
    for step in STEPS:
        title = (step.__doc__ or "").splitlines()[0].rstrip(".")
        step_started_s = time.monotonic()
        try:
            observed = step(current)
        except StepFailedError as error:
            narrator.failed(step.__name__, title, str(error), str(stage.logs))
            return 1
        except InterruptedDemoError:
            stage.stop()
            narrator.interrupted()
            return INTERRUPTED
        narrator.step(step.__name__, title, observed, time.monotonic() - step_started_s)
    stage.stop()
    narrator.end(time.monotonic() - started_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
