"""`make demo`, as a machine and as an impatient person use it."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.patience import PATIENCE_S
from support.repository import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MARK = "BIRTHMARK_TEST_MARK"
STEPS = [
    "station",
    "gateway",
    "operator",
    "boards",
    "flash",
    "online",
    "foreign_topic",
    "stranger",
    "revoke",
    "no_return",
    "others",
    "audit",
    "goodbye",
]


class Demo:
    """A running demo, whose processes all carry a mark of their own in their environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = secrets.token_hex(8)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "demo.run"],
            cwd=ROOT,
            env={**os.environ, "DEMO": "json", "TMPDIR": str(folder), MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def records(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield json.loads(line)

    def end(self, *, timeout_s: float = 90) -> tuple[str, str]:
        """What it still said, on stdout and on stderr."""
        output, errors = self.process.communicate(timeout=timeout_s)
        return output, errors

    def processes(self) -> list[str]:
        """The command lines of what is left running of it."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                # What forbids core dumps shows its environment to root alone, and its command line to anybody.
                if str(self.folder) in line or wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(line)
            except OSError:
                continue  # gone in the meantime, or another user's
        return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "t"
    made.mkdir()
    return made


def test_every_step_is_observed_and_nothing_is_left(folder: Path) -> None:
    demo = Demo(folder)
    records = list(demo.records())
    _, errors = demo.end()
    assert (demo.process.returncode, errors) == (0, ""), records[-1]
    steps = [record for record in records if record["event"] == "step"]
    assert [record["step"] for record in steps] == STEPS
    assert all(record["observed"] for record in steps)
    assert records[-1]["event"] == "end"
    assert records[-1]["steps"] == len(STEPS)
    assert demo.processes() == []
    assert list(folder.iterdir()) == []


def interrupted(folder: Path, step: str, number: signal.Signals, after_s: float) -> None:
    """Interrupt a demo when `step` was told, so somewhere in the next one; nothing may be left of it."""
    print(f"{number.name} {after_s:.3f} s after {step}")
    demo = Demo(folder)
    for record in demo.records():
        if record.get("step") == step:
            break
    time.sleep(after_s)  # somewhere in the next step: the moment is what is tested, not waited for
    demo.process.send_signal(number)
    demo.process.send_signal(number)  # impatient: a second one must not break the cleaning up
    output, errors = demo.end()
    assert (demo.process.returncode, errors) == (130, ""), output
    assert json.loads(output.splitlines()[-1]) == {"event": "interrupted"}
    assert demo.processes() == []
    assert list(folder.iterdir()) == []


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_an_interruption_at_any_point_leaves_nothing_running(folder: Path, proven: Callable[[str], None]) -> None:
    whole = os.environ.get("BIRTHMARK_PROOF") == "whole"
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    steps = STEPS[:-1] if whole else [chance.choice(STEPS[:-1])]
    for step in steps:
        number = chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        interrupted(folder, step, number, chance.random() * 0.3)
    proven(f"interrupted after {len(steps)} of its steps: no process and no file left")


def test_a_step_that_does_not_happen_is_a_failure(folder: Path) -> None:
    # Every Python process reads this first: the broker dies at its start, all others are as ever.
    (folder / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if any(word.endswith('birthmark-broker') for word in sys.orig_argv) and 'run' in sys.orig_argv:\n"
        "    print('error: sabotaged', file=sys.stderr, flush=True)\n"
        "    os._exit(7)\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "DEMO": "text", "TMPDIR": str(folder), "PYTHONPATH": str(folder)}
    answer = subprocess.run(
        [sys.executable, "-m", "demo.run"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert answer.returncode == 1
    assert "NOT OBSERVED\n    broker ended with exit code 7 before ready" in answer.stdout
    assert "error: sabotaged" in answer.stdout
    (left,) = folder.glob("birthmark-demo-*")
    assert f"the logs of every process stay in {left / 'logs'}" in answer.stdout
    assert (left / "logs" / "broker.err").read_text(encoding="utf-8") == "error: sabotaged\n"
