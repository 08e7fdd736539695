"""kill -9 at every write of every command that writes: nothing half, nothing twice, and again finishes it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.command_scenarios import SCENARIOS, chosen

from birthmark.provisioning.cli import parser

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COMMAND_KILLS = Path(__file__).parents[1] / "support" / "command_kills.py"
WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
ONLY_READ = {
    "list",
    "show",
    "batch report",
    "quarantine list",
    "doctor ports",
    "gateway list",
    "upstream list",
    "policy show",
    "gateways",  # one transaction, which notes who was there
    "audit verify",
    "audit show",
    "ca show",
    "inspect",
    "ca rollover status",
    "ca token list",
    "ca token check",
    "crl status",
}
KILLED_ELSEWHERE = {
    "renewd": "tests/renewal/test_kills.py",
}
"""With a broker at the other end, which is killed too."""
SHARES = 24 if WHOLE else 2
"""How many processes the commands are dealt out to."""


@pytest.mark.proof
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("share", range(SHARES))
def test_a_kill_at_any_step_of_any_command_leaves_nothing_half(
    tmp_path: Path, share: int, proven: Callable[[str], None]
) -> None:
    kills = 0 if WHOLE else 2
    names = list(chosen(kills))[share::SHARES]
    command = [sys.executable, str(COMMAND_KILLS), str(tmp_path), str(kills), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout.splitlines()
    assert [line.rpartition(": ")[0] for line in told] == names
    killed = sum(int(line.rpartition(": ")[2].split()[0]) for line in told)
    proven(f"{killed} kills, before these of the steps of each: {'; '.join(told)}")


def commands(of: argparse.ArgumentParser, name: str = "") -> Iterator[str]:
    inner = [action for action in of._actions if isinstance(action, argparse._SubParsersAction)]
    for action in inner:
        for word, command in action.choices.items():
            yield from commands(command, f"{name} {word}".strip())
    if not inner or of.get_default("handler") is not None:
        yield name


@pytest.mark.parametrize("name", list(commands(parser())))
def test_every_command_is_killed_or_only_reads(name: str) -> None:
    killed = any(each == name or each.startswith((f"{name} ", f"{name},")) for each in SCENARIOS)
    assert killed or name in ONLY_READ or name in KILLED_ELSEWHERE, (
        f"put a scenario for `birthmark {name}` into {COMMAND_KILLS.name}, or say why it needs none"
    )
