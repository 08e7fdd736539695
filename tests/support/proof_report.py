"""What a run has proven, as a page of Markdown: a plugin for pytest that `make proof` loads.

Rules:

- What a test proves is its name, in words; what it counted, in a sentence with figures, it says by the fixture
  `proven`.
- The runs of one test (its parameters) are one row. What failed or was skipped stands above everything else,
  with the reason.
- Times are those of the tests, with what was set up for them; run side by side they add up to more than the whole.
- The page is written once, at the end, also of a run that was interrupted: it says so.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

import pytest

from bench.report import machine

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PROVEN: Final = "proven"
"""The property in which the fixture of this name puts what a test counted."""
HEAD: Final = ("| what | file | runs | time | what it counted |", "|---|---|--:|--:|---|")
MAX_REASON: Final = 300


@dataclass(slots=True)
class Run:
    """One run of a test: with one set of its parameters.

    Args:
        parameters: as pytest shows them; empty if it has none.
    """

    parameters: str
    outcome: str = "passed"
    reason: str = ""
    spent_s: float = 0.0
    proven: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Proof:
    """One test, with all its runs."""

    path: PurePosixPath
    name: str
    runs: dict[str, Run] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What it proves."""
        return self.name.removeprefix("test_").replace("_", " ").capitalize()

    @property
    def spent_s(self) -> float:
        return sum(run.spent_s for run in self.runs.values())

    def counted(self) -> Iterator[str]:
        """What it counted; what several runs say alike is said once."""
        said: defaultdict[str, list[str]] = defaultdict(list)
        for run in self.runs.values():
            for sentence in run.proven:
                said[sentence].append(run.parameters)
        for sentence, whose in said.items():
            yield sentence if len(whose) == len(self.runs) else f"`{', '.join(whose)}`: {sentence}"


class ProofReport:
    """Listens to a run, and writes its page."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self._root = root
        self._proofs: dict[tuple[str, str], Proof] = {}
        self._began = datetime.now(UTC)
        self._began_s = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        path, _, name = report.nodeid.partition("::")
        name, _, parameters = name.partition("[")
        proof = self._proofs.setdefault((path, name), Proof(PurePosixPath(path), name))
        run = proof.runs.setdefault(report.nodeid, Run(parameters.removesuffix("]")))
        if report.outcome != "passed" and run.outcome != "failed":
            run.outcome, run.reason = report.outcome, _reason(report)
        if isinstance(report, pytest.SubtestReport):  # its time is in that of its test
            return
        run.spent_s += report.duration
        if report.when != "teardown":  # by then, everything that a test says is in its report
            return
        run.proven += [str(value) for key, value in report.user_properties if key == PROVEN]

    def pytest_sessionfinish(self, exitstatus: int | pytest.ExitCode) -> None:
        self.path.write_text(self.page(is_whole=exitstatus in (0, 1)), encoding="utf-8")

    def page(self, *, is_whole: bool) -> str:
        """Return the page."""
        where = machine()
        proofs = sorted(self._proofs.values(), key=lambda proof: (str(proof.path), proof.name))
        runs = [run for proof in proofs for run in proof.runs.values()]
        numbers = {
            outcome: sum(run.outcome == outcome for run in runs) for outcome in ("passed", "failed", "skipped")
        }
        counts = "whole" if os.environ.get("BIRTHMARK_PROOF") == "whole" else "at a quick count"
        lines = [
            "# What was proven",
            "",
            f"The long proofs, {counts}: {len(proofs)} in {len(runs)} runs, "
            + ", ".join(f"{number} {outcome}" for outcome, number in numbers.items())
            + ("." if is_whole else "; the run was interrupted."),
            "",
            f"- {self._began:%Y-%m-%d %H:%M} UTC, {_spent(time.monotonic() - self._began_s)}",
            f"- commit {_commit(self._root)}",
            (
                f"- {where['cpus']} x {where['cpu']}, {where['memory_gib']} GiB, {where['system']}, "
                f"Python {where['python']}, {where['openssl']}"
            ),
            "",
            *_failures(proofs),
        ]
        folders: defaultdict[PurePosixPath, list[Proof]] = defaultdict(list)
        for proof in proofs:
            folders[proof.path.parent].append(proof)
        for folder, its_proofs in folders.items():
            lines += [f"## `{folder}/`", "", *HEAD, *(_row(proof) for proof in its_proofs), ""]
        return "\n".join(lines)


def _failures(proofs: Iterable[Proof]) -> list[str]:
    shown = [
        f"- **{run.outcome}**: `{name}`: {_cell(run.reason)}"
        for proof in proofs
        for name, run in proof.runs.items()
        if run.outcome != "passed"
    ]
    return ["## Not proven", "", *shown, ""] if shown else []


def _row(proof: Proof) -> str:
    not_passed = [run.outcome for run in proof.runs.values() if run.outcome != "passed"]
    title = f"**{', '.join(sorted(set(not_passed)))}**: {proof.title}" if not_passed else proof.title
    counted = "<br>".join(_cell(sentence) for sentence in proof.counted())
    return f"| {_cell(title)} | `{proof.path.name}` | {len(proof.runs)} | {_spent(proof.spent_s)} | {counted} |"


def _reason(report: pytest.TestReport) -> str:
    """Return why a test failed or was skipped, in a line."""
    if isinstance(report.longrepr, tuple):
        said = report.longrepr[2]
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        said = crash.message if crash is not None else report.longreprtext
    first, *_ = said.strip().splitlines() or [""]
    which = f"{report.context.msg}: " if isinstance(report, pytest.SubtestReport) and report.context.msg else ""
    return which + first.removeprefix("Skipped: ")[:MAX_REASON]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _spent(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _commit(root: Path) -> str:
    """Return which commit is tested, and whether files differ from it."""
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty= with changes"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--proof-report", type=Path, metavar="FILE", help="write what was proven there, as Markdown")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Listen where the reports of all workers arrive, and nowhere else."""
    path = config.getoption("--proof-report")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ProofReport(config.invocation_params.dir / path, config.rootpath))
