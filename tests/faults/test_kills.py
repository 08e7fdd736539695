"""Station and board killed at any moment, by SIGKILL and SIGINT, and both at the same instant, at COMMIT too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.fault_kills import WAYS

if TYPE_CHECKING:
    from collections.abc import Callable

WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
SEEDS = range(4) if WHOLE else range(1)
KILLS = 125 if WHOLE else 8
"""For each seed; most of the time goes by in waiting for somebody who is dead."""


@pytest.mark.proof
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", SEEDS)
def test_killed_at_random_moments(tmp_path: Path, seed: int, proven: Callable[[str], None]) -> None:
    command = [sys.executable, "-m", "support.fault_kills", str(tmp_path), str(KILLS), str(seed)]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    ways = ", ".join(f"{way} {count}" for way, count in sorted(told["ways"].items()))
    proven(
        f"{told['kills']} kills over {told['units']} units ({ways}); each ATTESTED in the end, none half between"
    )
    assert told["kills"] >= KILLS
    if WHOLE:
        assert set(told["ways"]) == set(WAYS)
        assert min(told["ways"].values()) >= KILLS / 20
