"""Whether the audit log is what was written (docs/audit.md).

Rules:

- The log is read line by line, against its own chain and the head that the registry remembers. Only one that fails
  is held in memory, and looked at as a whole (`birthmark.provisioning.audit_places`).
- Others may write to it meanwhile; nobody is kept from that.
- Marks are heads that were carried away in checkpoints. They find what nothing at the station can: a log rewritten
  whole, and the registry with it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from birthmark.device.escape import escaped
from birthmark.provisioning.audit import RESTORED, Head, lines_of, parsed
from birthmark.provisioning.audit_places import Analysis, Problem, line_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_TRIES: Final = 5
_TAIL_BYTES: Final = 1 << 18
"""Some 600 entries."""


class _Registry(Protocol):
    @property
    def audit_path(self) -> Path: ...

    def audit_head(self) -> Head: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found."""

    entries: int
    head: Head
    problems: tuple[Problem, ...] = field(default=())
    restored: tuple[str, ...] = field(default=())
    """Where lines were missing at the log's end, and were put back: a kill, or a cut."""


def check(registry: _Registry, marks: Sequence[Head] = ()) -> Verdict:
    """Check a station's whole log, to which others may write meanwhile; see `verify`."""
    for _ in range(_TRIES):
        expected = registry.audit_head()
        verdict = verify(registry.audit_path, expected, marks)
        if not verdict.problems or registry.audit_head() == expected:
            break
        # Somebody wrote: what seems to be a line too many may be theirs.
    return verdict


def end_is_sound(path: Path) -> bool:
    """Whether the entries at a log's end continue each other; as quick for a long log as for a short one.

    It finds a log that was cut by more than the registry can put back; a line under way is passed over.

    Raises:
        OSError: the log cannot be read.
    """
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
        file.seek(start)
        lines = file.read().split(b"\n")[:-1]
    before = None if start else Head()
    for raw in lines[1:] if start else lines:  # the first begins before what was read
        line = line_of(0, raw)
        if not line.is_whole or (
            before is not None and (line.seq, line.previous) != (before.seq + 1, before.hash)
        ):
            return False
        before = Head(line.seq, line.hash)
    return True


def verify(path: Path, expected: Head | None, marks: Sequence[Head] = ()) -> Verdict:
    """Check a whole log against itself, and against what is known of it.

    Args:
        path: the log.
        expected: the number and hash that its last entry must have; None if that is not known, as of a copy.
        marks: entries that it must have. One that is missing is told of once: where the chain lacks it, or here.

    Raises:
        RegistryError: the log cannot be read.
    """
    head, entries, is_sound = Head(), 0, True
    restored: list[str] = []
    found = {mark.seq: (0, "") for mark in marks}
    for number, raw in lines_of(path):
        line = line_of(number, raw)
        entries += bool(line.found)
        if RESTORED.encode() in raw:
            restored += _restored(number, raw)
        is_sound = is_sound and line.is_whole and (line.seq, line.previous) == (head.seq + 1, head.hash)
        if line.is_whole and line.seq > head.seq:
            head = Head(line.seq, line.hash)
        if line.seq in found and line.found:
            found[line.seq] = number, line.found
    problems: list[Problem] = []
    if not is_sound or (expected is not None and head != expected):
        analysis = Analysis([line_of(number, raw) for number, raw in lines_of(path)], expected)
        problems = analysis.problems() or [Problem(0, "edited", "the log does not fit the registry")]
        marks = [mark for mark in marks if not analysis.lacks(mark.seq)]
        for mark in marks:
            line_believed = analysis.believed(mark.seq)
            found[mark.seq] = (line_believed.number, line_believed.hash) if line_believed else (0, "")
    problems += _against(marks, found, head)
    return Verdict(entries, head, tuple(problems), tuple(restored))


def _against(marks: Sequence[Head], found: Mapping[int, tuple[int, str]], head: Head) -> Iterator[Problem]:
    for mark in marks:
        number, digest = found[mark.seq]
        if digest == mark.hash or mark.seq == 0:
            continue
        if digest:
            text = (
                f"line {number} (entry {mark.seq}) is not the one of the checkpoint: it, or what is before it, was"
            )
            yield Problem(number, "rewritten", f"{text} rewritten", mark.hash, digest)
        else:
            text = f"entry {mark.seq}, of which there is a checkpoint, is not there"
            yield Problem(0, "rewritten", f"{text}: the log ends with entry {head.seq}", mark.hash)


def _restored(number: int, raw: bytes) -> Iterator[str]:
    entry: dict[str, Any] | None = parsed(raw)
    if entry is None or entry["action"] != RESTORED:
        return
    count = entry["details"].get("lines")
    what = "1 line was missing and was" if count == 1 else f"{count} lines were missing and were"
    yield f"before line {number} (entry {entry['seq']}, {escaped(entry['at'][:19])}Z), {what} put back"
