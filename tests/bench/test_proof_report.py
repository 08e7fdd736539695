"""The page that `make proof` leaves, of a run that is made up, and side by side as that one is."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.repository import ROOT

if TYPE_CHECKING:
    from pathlib import Path

RUN = """
import pytest

@pytest.mark.parametrize("way", ["SIGKILL", "SIGINT"])
def test_it_is_killed(way, record_property):
    record_property("proven", "3 kills")
    record_property("proven", f"2 of them by | {way}")

def test_it_counts_nothing():
    pass

def test_it_breaks():
    assert 1 == 2, "one is not two"

@pytest.fixture
def never_ended():
    yield
    raise OSError("still there")

def test_its_end_breaks(never_ended):
    pass

def test_without(subtests):
    pytest.skip("mosquitto is not installed")

def test_all_below_one(subtests):
    for number in range(2):
        with subtests.test(f"the number {number}"):
            assert number == 0
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("run")
    (folder / "faults").mkdir()
    (folder / "faults" / "test_made_up.py").write_text(RUN)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-c", str(ROOT / "pyproject.toml")]
    where = ["--rootdir", str(folder), "-p", "support.proof_report", "--proof-report", str(folder / "proof.md")]
    done = subprocess.run([*command, *where, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return (folder / "proof.md").read_text()


def test_whoever_runs_a_proof_by_hand_is_told_what_it_counted() -> None:
    command = [sys.executable, "-m", "pytest", "-s", "-q", "-p", "no:xdist", "tests/provisioning/test_crl_size.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "proven: " in done.stdout
    assert "MB" in done.stdout.partition("proven: ")[2].splitlines()[0]


def row(page: str, title: str) -> list[str]:
    (found,) = [line for line in page.splitlines() if line.startswith("|") and title in line]
    return [cell.strip() for cell in found.replace("\\|", "/").split("|")[1:-1]]


def test_what_was_run_is_counted(page: str) -> None:
    assert "6 in 7 runs, 3 passed, 3 failed, 1 skipped." in page
    assert "at a quick count" in page
    assert "## `faults/`" in page


def test_the_runs_of_one_test_are_one_row(page: str) -> None:
    what, file, runs, _, counted = row(page, "It is killed")
    assert (what, file, runs) == ("It is killed", "`test_made_up.py`", "2")
    assert counted == "3 kills<br>`SIGKILL`: 2 of them by / SIGKILL<br>`SIGINT`: 2 of them by / SIGINT"


def test_one_that_counts_nothing_is_there_too(page: str) -> None:
    assert row(page, "It counts nothing")[4] == ""


@pytest.mark.parametrize(
    ("title", "outcome", "reason"),
    [
        ("It breaks", "failed", "AssertionError: one is not two"),
        ("Its end breaks", "failed", "OSError: still there"),
        ("Without", "skipped", "mosquitto is not installed"),
        ("All below one", "failed", "the number 1: "),
    ],
)
def test_what_did_not_pass_is_shown_with_its_reason(page: str, title: str, outcome: str, reason: str) -> None:
    assert row(page, title)[0] == f"**{outcome}**: {title}"
    failures = page.partition("## Not proven")[2].partition("\n## ")[0]
    name = f"test_made_up.py::test_{title.lower().replace(' ', '_')}`"
    (said,) = [line for line in failures.splitlines() if name in line]
    assert reason in said
    assert said.startswith(f"- **{outcome}**: ")
