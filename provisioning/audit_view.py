"""Parts of the audit log, as people and other programs want them: chosen, shown, exported as JSONL or CSV.

Rules: one entry at a time, however long the log is. JSONL has the log's own lines, byte for byte, so that a
whole export can be checked as the log can. In CSV a text that a spreadsheet would take for a formula gets a `'`
before it.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

from birthmark.provisioning.audit import lines_of, parsed, written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

FORMATS: Final = ("jsonl", "csv")
_COLUMNS: Final = ("seq", "at", "actor", "action", "subject", "details", "previous", "hash")
_SPAN: Final = re.compile(r"([1-9][0-9]{0,8})([smhdw])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, slots=True)
class Choice:
    """Which entries; what is not given does not matter."""

    since: datetime | None = None
    until: datetime | None = None
    subject: str = ""
    """A name or a pattern with `*` and `?`, without regard to case."""
    action: str = ""
    """The same."""
    actor: str = ""
    """The same."""

    def takes(self, entry: Mapping[str, Any]) -> bool:
        """Whether an entry is among them; one whose time cannot be read is not, if a time was asked for."""
        wanted = ((self.subject, "subject"), (self.action, "action"), (self.actor, "actor"))
        if not all(not pattern or fnmatchcase(entry[key].lower(), pattern.lower()) for pattern, key in wanted):
            return False
        if self.since is None and self.until is None:
            return True
        try:
            at = datetime.fromisoformat(entry["at"])
        except ValueError:
            return False
        if at.tzinfo is None:
            return False
        return (self.since is None or at >= self.since) and (self.until is None or at < self.until)

    def facts(self) -> dict[str, str | None]:
        """Return it as the details of an audit entry."""
        return {
            "since": self.since.isoformat() if self.since else None,
            "until": self.until.isoformat() if self.until else None,
            "of_subject": self.subject or None,
            "of_action": self.action or None,
            "of_actor": self.actor or None,
        }


def moment(text: str, now: datetime) -> datetime:
    """Read a time: `2026-11-27`, `2026-11-27T08:30:00Z` (UTC if it names no zone), or `3d`, so long before `now`.

    Raises:
        ValueError: it is none.
    """
    span = _SPAN.fullmatch(text)
    try:
        if span:
            return now - timedelta(**{_UNITS[span[2]]: int(span[1])})
        at = datetime.fromisoformat(text)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{text[:80]!r} is no time: give 2026-11-27, 2026-11-27T08:30:00Z or 3d") from error
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def chosen(path: Path, choice: Choice, *, left_out: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    """Yield the entries of a log that were chosen, in their order.

    Args:
        path: the log.
        choice: which.
        left_out: is told the number of each line that is no entry.

    Raises:
        RegistryError: the log cannot be read.
    """
    for number, raw in lines_of(path):
        entry = parsed(raw)
        if entry is None:
            left_out(number)
        elif choice.takes(entry):
            yield entry


def exported(entries: Iterable[Mapping[str, Any]], form: str) -> Iterator[str]:
    """Yield the lines of an export, with their ends, in one of FORMATS."""
    if form == "jsonl":
        for entry in entries:
            yield written(entry) + "\n"
        return
    yield _row(_COLUMNS)
    for entry in entries:
        details = written(entry["details"])
        yield _row(details if column == "details" else entry[column] for column in _COLUMNS)


def _row(cells: Iterable[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(
        f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell for cell in cells
    )
    return line.getvalue()
