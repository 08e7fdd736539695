"""A process that holds keys leaves no core, whatever the limit was and whoever takes the cores."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.patience import PATIENCE_S

if TYPE_CHECKING:
    from pathlib import Path

FORBID = "from birthmark.device.core_dumps import forbid_core_dumps; forbid_core_dumps();"
UNLIMIT = """\
import resource
_, hard = resource.getrlimit(resource.RLIMIT_CORE)
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
"""


def test_a_crash_leaves_no_core(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", f"{UNLIMIT}\n{FORBID} import os; os.abort()"],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    _, status = os.waitpid(process.pid, 0)
    process.returncode = status  # it has been waited for
    assert os.WIFSIGNALED(status)
    assert not os.WCOREDUMP(status)
    assert list(tmp_path.iterdir()) == []


def test_it_is_not_dumpable_for_those_who_do_not_ask_for_the_limit() -> None:
    script = f"{FORBID} import ctypes; print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"  # PR_GET_DUMPABLE
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert done.stdout == "0\n"


_SERVICE = ["--identity", "none.pem", "--ca", "none.pem", "--broker", "127.0.0.1:1"]


@pytest.mark.parametrize(
    "words",
    [
        ["show", "--state", "none"],
        ["status", "--state", "none"],
        ["export", "--state", "none", "--out", "out"],
        ["watch", "#", *_SERVICE],
        ["send", "sensor-1", "reboot", *_SERVICE],
    ],
    ids=lambda words: words[0],
)
def test_a_command_that_will_read_a_key_is_not_dumpable_before_it_looks_for_it(
    tmp_path: Path, words: list[str]
) -> None:
    script = f"""\
import ctypes, sys
from birthmark.device.__main__ import main
sys.argv[1:] = {words}
try:
    main()
except SystemExit as error:
    print(error.code, ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout.endswith("1 0\n"), done.stdout + done.stderr
