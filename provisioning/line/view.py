"""What the operator sees of a line: a live table on a terminal, plain lines off it, events with `--json`.

Rules:

- A slot is a row: slot, id, step, percent, seconds, retries. PASS is green and FAIL red over the whole row; a word
  and a code say the same to whoever sees no colours.
- The line's statistics stand below: yields, retries, failures by step, boards an hour.
- All of that fits 80 columns; a prompt stands below in full, and at the end each failure with its hint.
- Whatever came from a device or a scanner is escaped before it is shown.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from birthmark.device.escape import escaped
from birthmark.provisioning.enrollment.enrol import Step
from birthmark.provisioning.enrollment.outcomes import Outcome
from birthmark.provisioning.line.slot import Announced, Ended, Noted, Stepped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from birthmark.device.console import Console
    from birthmark.device.errors import BirthmarkError
    from birthmark.provisioning.line.slot import Report

PERCENT: Final = {
    Step.HELLO: 10,
    Step.UNLOCK: 20,
    Step.KEYGEN: 35,
    Step.BEGIN: 40,
    Step.DATA: 70,
    Step.PREPARE: 85,
    Step.COMMIT: 95,
    Step.ATTEST: 100,
}
_COLUMNS: Final = "{:<8} {:<{id_width}}  {:<7} {:>3} {:>8} {:>8}  "
_RESULT_WIDTH: Final = 20
_ID_WIDTHS: Final = (8, 24)
_LINES_BESIDE_SLOTS: Final = 8
"""Heading, three of statistics, one of a CRL, two for the scanner, and the one that the cursor is in."""
_COLOURS: Final = {Outcome.PASS: "7;32", Outcome.FAIL: "7;31", Outcome.STOPPED: "7;33"}
_REDRAW_S: Final = 0.1


@dataclass(slots=True)
class Tally:
    """A line's statistics, as far as this run has come."""

    clock: Callable[[], float] = time.monotonic
    passed: int = 0
    failed: int = 0
    passed_at_first: int = 0
    retries: int = 0
    failures_by_step: Counter[str] = field(default_factory=Counter)
    worst_exit_code: int = 0
    begun_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.begun_s = self.clock()

    def add(self, ended: Ended) -> None:
        """Count the end of an attempt."""
        if ended.attempt.outcome is Outcome.FAIL:
            self.failures_by_step[ended.attempt.step] += 1
        if not ended.is_final:
            self.retries += 1
            return
        if ended.attempt.outcome is Outcome.PASS:
            self.passed += 1
            self.passed_at_first += not ended.retries
        elif ended.attempt.outcome is Outcome.FAIL and ended.error is not None:
            self.failed += 1
            self.worst_exit_code = max(self.worst_exit_code, ended.error.exit_code)

    def record(self) -> dict[str, Any]:
        """Return the statistics as a JSON object."""
        units = self.passed + self.failed
        elapsed_s = self.clock() - self.begun_s
        return {
            "event": "summary",
            "units": units,
            "passed": self.passed,
            "failed": self.failed,
            "first_pass_yield": round(self.passed_at_first / units, 4) if units else None,
            "final_yield": round(self.passed / units, 4) if units else None,
            "retries": self.retries,
            "failures_by_step": dict(self.failures_by_step.most_common()),
            "boards_an_hour": round(self.passed * 3600 / elapsed_s, 1) if self.passed and elapsed_s > 0 else None,
        }

    def described(self) -> list[str]:
        """Return the statistics as lines for people."""
        units = self.passed + self.failed
        first = f"{self.passed_at_first / units:.1%}" if units else "-"
        final = f"{self.passed / units:.1%}" if units else "-"
        rate = self.record()["boards_an_hour"]
        pace = "-" if rate is None else f"{rate:.0f}"
        lines = [
            f"{self.passed} PASS, {self.failed} FAIL; first-pass yield {first}, final yield {final}",
            f"{self.retries} retries; {pace} boards an hour",
        ]
        if self.failures_by_step:
            counts = self.failures_by_step.most_common()
            lines.append("failures by step: " + ", ".join(f"{step} {count}" for step, count in counts))
        return lines


class Display(Protocol):
    """Where reports go."""

    def show(self, report: Report) -> None:
        """Take a report."""

    def tick(self) -> None:
        """Called a few times a second."""

    def close(self) -> None:
        """Show everything for the last time."""


class Lines:
    """A line for each report, or an object with `--json`."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def show(self, report: Report) -> None:
        """Print it."""
        match report:
            case Stepped():
                text = f"{report.slot:<8} {report.device_id or report.hwid.hex():<24}  {report.step.value}"
            case Noted():
                text = f"{report.slot:<8} {report.kind}: {escaped(report.text)}"
            case Ended():
                text = self._ended(report)
            case Announced():
                text = report.text
        self._console.emit(record_of(report), text)

    def tick(self) -> None:
        """Nothing moves here."""

    def close(self) -> None:
        """Everything is printed already."""

    def _ended(self, ended: Ended) -> str:
        attempt = ended.attempt
        words = [f"{ended.slot:<8} {_name(ended):<24}  {attempt.outcome.value}"]
        if attempt.outcome is Outcome.PASS and ended.row is not None:
            words.append(f"certificate {ended.row.cert_serial:x}")
        elif ended.error is not None and attempt.outcome is Outcome.FAIL:
            words.append(f"{attempt.code} at {attempt.step}: {ended.error.message}")
            if not ended.is_final:
                words.append("(trying again)")
            elif ended.error.hint:
                words.append(f"({ended.error.hint})")
        words.append(f"{attempt.elapsed_ms / 1000:.2f} s")
        return "  ".join(words)


class LiveTable:
    """A table on a terminal that is drawn over itself.

    Args:
        slots: their names, in the order of the rows.
        tally: shown below.
        width: of the terminal.
        is_coloured: whether rows are painted.
        write: puts text on the terminal.
    """

    def __init__(
        self, slots: Sequence[str], tally: Tally, *, width: int, is_coloured: bool, write: Callable[[str], None]
    ) -> None:
        self._rows = {slot: _Row(slot) for slot in slots}
        self._tally = tally
        self._width = width
        self._is_coloured = is_coloured
        self._write = write
        self._drawn = 0
        self._next_s = 0.0
        self._prompt: Noted | None = None
        self._typed = ""
        self._announced: list[str] = []
        """The last word that was of no slot; in full at the end."""
        self._failures: dict[str, BirthmarkError] = {}
        narrowest, widest = _ID_WIDTHS
        others = len(_COLUMNS.format(*[""] * 6, id_width=0)) + _RESULT_WIDTH
        self._id_width = max(narrowest, min(widest, width - 1 - others))

    def typed(self, text: str) -> None:
        """Show what a person has typed so far; may be called from any thread."""
        self._typed = text

    def show(self, report: Report) -> None:
        """Take a report; it is on the terminal with the next drawing."""
        if isinstance(report, Announced):
            self._announced = report.text.splitlines()
            return
        if isinstance(report, Noted) and report.kind in ("id", "confirm"):
            self._prompt = report
        elif self._prompt is not None and report.slot == self._prompt.slot:
            self._prompt = None
        if isinstance(report, Ended):
            self._failures.pop(report.slot, None)
            if report.is_final and report.attempt.outcome is Outcome.FAIL and report.error is not None:
                self._failures[report.slot] = report.error
        self._rows[report.slot].take(report, self._tally.clock())

    def tick(self) -> None:
        """Draw, at most ten times a second."""
        now_s = self._tally.clock()
        if now_s >= self._next_s:
            self._next_s = now_s + _REDRAW_S
            self._draw(now_s)

    def close(self) -> None:
        """Draw for the last time, and say what each failure was."""
        self._prompt = None
        self._draw(self._tally.clock())
        for line in self._announced[1:]:
            self._write(f"{line}\n")
        for slot, error in self._failures.items():
            hint = f" ({error.hint})" if error.hint else ""
            self._write(f"{slot}: {error.message}{hint}\n")

    def lines(self, now_s: float) -> list[str]:
        """Return the table's lines, painted, none longer than the terminal is wide."""
        heading = _COLUMNS.format("SLOT", "ID", "STEP", "%", "SECONDS", "RETRIES", id_width=self._id_width)
        rows = [self._painted(row, row.text(now_s, self._id_width)) for row in self._rows.values()]
        below = [*self._tally.described(), *self._announced[:1]]
        if self._prompt is not None:
            below += [f"slot {self._prompt.slot}: {escaped(self._prompt.text)}", f"> {escaped(self._typed)}"]
        return [heading[: self._width - 1].rstrip(), *rows, *(line[: self._width - 1] for line in below)]

    def _painted(self, row: _Row, text: str) -> str:
        text = text[: self._width - 1].ljust(self._width - 1)
        colour = _COLOURS.get(row.outcome) if row.outcome is not None else None
        return f"\033[{colour}m{text}\033[0m" if colour and self._is_coloured else text.rstrip()

    def _draw(self, now_s: float) -> None:
        lines = self.lines(now_s)
        up = f"\033[{self._drawn}F" if self._drawn else ""
        self._write(up + "".join(f"{line}\033[K\n" for line in lines) + "\033[J")
        self._drawn = len(lines)


@dataclass(slots=True)
class _Row:
    """One slot's row."""

    slot: str
    name: str = "-"
    step: str = "-"
    percent: int = 0
    begun_s: float | None = None
    ended_s: float | None = None
    retries: int = 0
    note: str = ""
    outcome: Outcome | None = None

    def take(self, report: Report, now_s: float) -> None:
        match report:
            case Stepped():
                if self.outcome is not None:
                    self.outcome, self.retries = None, 0
                self.name = report.device_id or report.hwid.hex()[:24]
                self.step, self.percent, self.note = report.step.value, PERCENT[report.step], ""
                self.begun_s, self.ended_s = now_s - report.elapsed_s, None
            case Noted():
                self.note = escaped(report.text)
                if report.kind == "waiting" and self.outcome is None:
                    self.step = "waiting"
            case Ended():
                self._end(report, now_s)

    def _end(self, ended: Ended, now_s: float) -> None:
        attempt = ended.attempt
        self.name = _name(ended)
        self.retries = ended.retries + (not ended.is_final)
        if not ended.is_final:
            self.note = f"{attempt.code} at {attempt.step}, trying again"
            return
        self.outcome = attempt.outcome
        if attempt.outcome is Outcome.FAIL:
            self.step = attempt.step
        self.note = " ".join(dict.fromkeys(word for word in (attempt.outcome.value, attempt.code) if word))
        self.begun_s, self.ended_s = now_s - attempt.elapsed_ms / 1000, now_s

    def text(self, now_s: float, id_width: int) -> str:
        seconds = "" if self.begun_s is None else f"{(self.ended_s or now_s) - self.begun_s:.1f}"
        name = self.name if len(self.name) <= id_width else f"{self.name[: id_width - 2]}.."
        columns = (self.slot, name, self.step, self.percent, seconds, self.retries)
        return _COLUMNS.format(*columns, id_width=id_width) + self.note


def display_for(console: Console, slots: Sequence[str], tally: Tally) -> Display:
    """Return the table where there is room for one on a terminal; lines otherwise."""
    size = shutil.get_terminal_size()
    if console.as_json or not sys.stdout.isatty() or size.lines < len(slots) + _LINES_BESIDE_SLOTS:
        return Lines(console)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    return LiveTable(slots, tally, width=size.columns, is_coloured="NO_COLOR" not in os.environ, write=write)


def record_of(report: Report) -> dict[str, Any]:
    """Return a report as a JSON object."""
    match report:
        case Stepped():
            return {
                "event": "step",
                "slot": report.slot,
                "id": report.device_id or None,
                "hwid": report.hwid.hex(),
                "step": report.step.value,
                "percent": PERCENT[report.step],
                "elapsed_ms": round(report.elapsed_s * 1000, 1),
            }
        case Noted():
            event = "scan" if report.kind in ("id", "confirm") else report.kind
            return {"event": event, "slot": report.slot, "for": report.kind, "text": escaped(report.text)}
        case Ended():
            return _ended_record(report)
        case Announced():
            return report.record


def _ended_record(ended: Ended) -> dict[str, Any]:
    attempt, row, error = ended.attempt, ended.row, ended.error
    made = attempt.outcome is Outcome.PASS and row is not None
    return {
        "event": "result",
        "slot": ended.slot,
        "result": attempt.outcome.value,
        "final": ended.is_final,
        "id": attempt.device_id or None,
        "hwid": attempt.hwid.hex() or None,
        "state": row.state.value if row is not None else None,
        "cert_serial": f"{row.cert_serial:x}" if made and row is not None else None,
        "step": attempt.step or None,
        "code": attempt.code or None,
        "error": error.message if error is not None else None,
        "hint": error.hint if error is not None else None,
        "exit_code": error.exit_code if error is not None else 0,
        "retries": ended.retries,
        "elapsed_ms": round(attempt.elapsed_ms, 1),
    }


def _name(ended: Ended) -> str:
    """Return what to call the unit: an id under which nothing was reserved may be another slot's by now."""
    device_id, hwid = ended.attempt.device_id, ended.attempt.hwid.hex()[:24]
    return (device_id or hwid or "-") if ended.row is not None else (hwid or device_id or "-")
