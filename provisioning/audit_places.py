"""Where an audit log that does not verify was tampered with, and how. Pure: lines in, problems out.

Rules:

- The head that the registry remembers is believed: from it the chain leads back, each entry naming the hash of
  the one before it. Where it cannot be followed (the entry that names the hash is itself gone), lines that
  continue each other are believed. A line that is not in this chain is a stranger.
- A stranger where an entry is missing is that entry, edited; or torn, if it is but a beginning. One where nothing
  is missing was inserted. What is left of the missing was cut.
- An entry that is there twice is repeated. Two that hold each other's places have changed them; of the others, as
  few as possible have moved.
- So one tampering is reported once and in its place, whatever comes after it.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from birthmark.provisioning.audit import GENESIS, Head, digest, parsed, written

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_HALF: Final = re.compile(rb"(?:\\(?:u[0-9a-f]{0,3})?|[:,](?:n(?:ul?)?|t(?:ru?)?|f(?:al?s?)?))\Z")
"""How JSON ends that was broken off in an escape or in a word."""
_HASH: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Problem:
    """One place where the log is not what was written."""

    line: int
    """Counted from 1; 0 stands for the end of the log."""
    kind: str
    """`edited`, `cut`, `inserted`, `repeated`, `moved`, `swapped`, `torn`, or `rewritten` (says a checkpoint)."""
    text: str
    expected: str = ""
    """The hash of what must be there, as chain, registry or checkpoint have it; empty if none of them tells."""
    found: str = ""
    """The hash of what is; empty if that is no entry, or nothing."""


@dataclass(frozen=True, slots=True)
class Line:
    """What the analysis needs of one line."""

    number: int
    seq: int = 0
    """What it says of itself, as the next two; 0 and empty for what is no entry."""
    previous: str = ""
    hash: str = ""
    found: str = ""
    """The hash of its content; empty for what is no entry."""
    is_written: bool = False
    """Whether it is an entry, written in the one way."""
    is_torn: bool = False
    """Whether it is the beginning of an entry."""

    @property
    def is_whole(self) -> bool:
        """Whether it is an entry as this program writes, and its content fits its hash."""
        return self.is_written and self.found == self.hash

    @property
    def shown(self) -> str:
        """What it is called."""
        return f"line {self.number} (entry {self.seq})" if self.found else f"line {self.number}"


def line_of(number: int, raw: bytes) -> Line:
    """Read one line."""
    entry = parsed(raw)
    if entry is None:
        return Line(number, is_torn=_is_beginning(raw))
    # A key that is given twice, another encoding: other readers of JSON may see something else in it.
    is_written = raw == written(entry).encode()
    own = entry["hash"] if _HASH.fullmatch(entry["hash"]) else ""
    found = digest(entry)
    return Line(number, entry["seq"], entry["previous"], found if own == found else own, found, is_written)


def _is_beginning(raw: bytes) -> bool:
    """Whether a line is the beginning of an entry: JSON that is broken off."""
    if not b'{"action":"'.startswith(raw[:11]) or not raw or raw.endswith(b"}"):
        return False
    try:
        json.loads(raw)
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc) or error.msg.startswith("Unterminated") or bool(_HALF.search(raw))
    except (ValueError, RecursionError):
        pass
    return False


class Analysis:
    """A log as a whole.

    Args:
        lines: all of it.
        expected: the number and hash that its last entry must have; None if that is not known.
    """

    def __init__(self, lines: Sequence[Line], expected: Head | None) -> None:
        self._lines = lines
        self._expected = expected
        self._whole: dict[int, dict[str, Line]] = {}
        """Lines that are sound in themselves, by number and hash."""
        self._odd: dict[int, list[Line]] = {}
        """Entries that are not, by what they say is their number."""
        for line in lines:
            if line.is_whole:
                self._whole.setdefault(line.seq, {}).setdefault(line.hash, line)
            elif line.found:
                self._odd.setdefault(line.seq, []).append(line)
        self._demanded: dict[int, str] = {}
        """The hash of an entry that is not there, where one that is there names it."""
        self._moved: list[int] = []
        """Entries that are there, but not in their places."""
        self._believed = self._follow_chain()
        self._end = expected.seq if expected is not None else max(self._believed, default=0)

    def believed(self, seq: int) -> Line | None:
        """Return the line that is believed to be this entry."""
        return self._believed.get(seq)

    def lacks(self, seq: int) -> bool:
        """Whether this entry must be there and is not, which `problems` tell of."""
        return seq <= self._end and seq not in self._believed

    def problems(self) -> list[Problem]:
        """Return what is wrong, in the order of the lines; what concerns the end comes last."""
        in_place, problems = self._sorted_out()
        problems += self._between(in_place)
        return sorted(problems, key=lambda one: (one.line == 0, one.line))

    # --- whom to believe ------------------------------------------------------------------------------------

    def _follow_chain(self) -> dict[int, Line]:
        expected = self._expected
        believed: dict[int, Line] = {}
        at, wanted = (expected.seq, expected.hash) if expected is not None else (0, "")
        known = {seq for seq in (*self._whole, *self._odd) if seq > 0 and (expected is None or seq < at)}
        for seq in sorted(known | ({at} - {0}), reverse=True):
            if wanted and seq != at:  # between the two, everything is gone
                self._demanded[at], wanted = wanted, ""
            chosen = self._chosen(seq, wanted)
            if chosen is not None:
                believed[seq] = chosen
                wanted = chosen.previous
            elif wanted:
                self._demanded[seq] = wanted
                wanted = self._named_by_edited(seq, wanted)
            at = seq - 1
        if wanted and at >= 1:
            self._demanded[at] = wanted
        return believed

    def _chosen(self, seq: int, wanted: str) -> Line | None:
        candidates = self._whole.get(seq, {})
        if wanted or not candidates:
            return candidates.get(wanted)
        before = self._whole.get(seq - 1, {GENESIS: None} if seq == 1 else {})
        linked = (line for line in candidates.values() if line.previous in before)
        return next(linked, next(iter(candidates.values())))

    def _named_by_edited(self, seq: int, wanted: str) -> str:
        """Return the hash that an edited entry has as `previous`, if there is such an entry."""
        before = self._whole.get(seq - 1, {})
        named = (
            line.previous for line in self._odd.get(seq, ()) if line.hash == wanted and line.previous in before
        )
        return next(named, "")

    # --- in which order -------------------------------------------------------------------------------------

    def _sorted_out(self) -> tuple[list[_Place], list[Problem]]:
        """Return the believed lines in their places, swaps undone, and what is wrong with the others."""
        copies = [line for line in self._lines if self._is_believed(line)]
        rising = _rising([line.seq for line in copies])
        kept = {line.seq: line for line in reversed(copies)} | {copies[at].seq: copies[at] for at in rising}
        problems = [_repeated(line, kept[line.seq]) for line in copies if kept[line.seq] is not line]
        copies = [line for line in copies if kept[line.seq] is line]
        numbers = [line.number for line in copies]
        own = {line.seq: index for index, line in enumerate(sorted(copies, key=lambda line: line.seq))}
        for index, line in enumerate(tuple(copies)):
            other_index = own[line.seq]
            other = copies[other_index]
            if index < other_index and own[other.seq] == index and copies[index] is line:
                problems.append(_swapped(line, other))
                copies[index], copies[other_index] = other, line
        rising = _rising([line.seq for line in copies])
        seqs = [copies[at].seq for at in rising]
        for index in sorted(set(range(len(copies))) - set(rising)):
            line = copies[index]
            at = bisect_left(seqs, line.seq)
            problems.append(_moved(line, seqs[at - 1] if at else 0))
            self._moved.append(line.seq)
        self._moved.sort()
        return [_Place(numbers[index], copies[index].seq) for index in rising], problems

    def _is_believed(self, line: Line) -> bool:
        believed = self._believed.get(line.seq)
        return line.is_whole and believed is not None and believed.hash == line.hash

    # --- what is missing, and what is too much --------------------------------------------------------------

    def _between(self, in_place: Sequence[_Place]) -> Iterator[Problem]:
        """Look at each gap between two lines that are in their places, and at the end."""
        strangers = [line for line in self._lines if not self._is_believed(line)]
        numbers = [line.number for line in strangers]
        before = _Place(0, 0)
        for place in [*in_place, _Place(0, self._end + 1)]:
            start = bisect_left(numbers, before.number)
            end = bisect_left(numbers, place.number) if place.number else len(numbers)
            if start < end or place.seq - before.seq > 1:
                yield from self._gap(before.seq, place, strangers[start:end])
            before = place

    def _gap(self, low: int, place: _Place, strangers: Sequence[Line]) -> Iterator[Problem]:
        """Say which of the entries after `low` and before `place` are edited or missing, and what is too much."""
        standing_in = self._paired(low, place.seq, strangers)
        for line in strangers:
            seq = standing_in.get(line.number)
            yield self._surplus(line) if seq is None else self._altered(line, seq)
        moved = self._moved[bisect_left(self._moved, low + 1) : bisect_left(self._moved, place.seq)]
        there = sorted({*standing_in.values(), *moved, place.seq})
        for seq in there:
            if seq > low + 1:
                yield self._cut(low + 1, seq - 1, place.number)
            low = seq

    def _paired(self, low: int, high: int, strangers: Sequence[Line]) -> dict[int, int]:
        """Return which missing entry each stranger stands for: the one that it says, or the next one."""
        named = {expected: seq for seq, expected in self._demanded.items()}
        pairs: dict[int, int] = {}
        taken: set[int] = set()
        for line in strangers:
            seq = named.get(line.hash, line.seq)
            if low < seq < high and seq not in self._believed and seq not in taken:
                pairs[line.number] = seq
                taken.add(seq)
        limits, limit = {}, high
        for line in reversed(strangers):
            limits[line.number] = limit
            limit = min(limit, pairs.get(line.number, limit))
        for line in strangers:
            if line.number not in pairs:
                seq = low + 1
                while seq in taken or seq in self._believed:
                    seq += 1
                if seq >= limits[line.number]:
                    continue
                pairs[line.number] = seq
                taken.add(seq)
            low = max(low, pairs[line.number])
        return pairs

    def _surplus(self, line: Line) -> Problem:
        kept = self._believed.get(line.seq)
        if kept is not None and kept.hash == line.hash:
            text = f"{line.shown} was edited: it stands as it was in line {kept.number}, where it was put back"
            return Problem(line.number, "edited", text, kept.hash, line.found)
        if not line.found:
            text = f"line {line.number} is no audit entry: it was put in"
        elif line.seq > self._end:
            text = f"{line.shown} was put in: the registry remembers {self._end} entries"
        else:
            text = f"{line.shown} was put in: it continues nothing that is there"
        return Problem(line.number, "inserted", text, found=line.found)

    def _altered(self, line: Line, seq: int) -> Problem:
        expected = self._demanded.get(seq, "")
        if line.is_torn:
            return Problem(
                line.number, "torn", f"line {line.number} is but the beginning of entry {seq}", expected
            )
        if not line.found:
            text = f"line {line.number} is no audit entry: entry {seq} was edited, or taken out for it"
        elif not line.is_written:
            text = f"{line.shown} was edited: it is not written as this program writes"
        elif not line.is_whole:
            text = f"{line.shown} was edited: its content does not fit its hash"
        else:
            whose = "the registry remembers" if seq == self._end else f"entry {seq + 1} names"
            text = f"{line.shown} was replaced: {whose} another; what is before it may be replaced as well"
        return Problem(line.number, "edited", text, expected, line.found)

    def _cut(self, first: int, last: int, number: int) -> Problem:
        expected = self._demanded.get(last, "")
        if number == 0:
            text = f"the log ends with entry {first - 1}, but the registry remembers {last}: its end was cut"
        elif first == last:
            text = f"before line {number}, entry {first} is missing"
        else:
            text = f"before line {number}, entries {first} to {last} are missing"
        return Problem(number, "cut", text, expected)


@dataclass(frozen=True, slots=True)
class _Place:
    """A line, and the entry that is there, or would be but for a swap."""

    number: int
    """0: the end of the log."""
    seq: int


def _repeated(line: Line, kept: Line) -> Problem:
    return Problem(line.number, "repeated", f"{line.shown} repeats line {kept.number}", found=line.found)


def _swapped(line: Line, other: Line) -> Problem:
    text = f"{line.shown} and {other.shown} changed places"
    return Problem(line.number, "swapped", text, other.found, line.found)


def _moved(line: Line, after: int) -> Problem:
    where = f"after entry {after}" if after else "at the beginning"
    return Problem(line.number, "moved", f"{line.shown} is out of order: it belongs {where}", found=line.found)


def _rising(seqs: Sequence[int]) -> list[int]:
    """Return the places of a longest rising choice of these numbers; of two equal ones, the first."""
    ends: list[int] = []
    places: list[int] = []
    before: list[int] = []
    for place, seq in enumerate(seqs):
        at = bisect_left(ends, seq)
        before.append(places[at - 1] if at else -1)
        if at == len(ends):
            ends.append(seq)
            places.append(place)
        elif ends[at] != seq:
            ends[at], places[at] = seq, place
    chosen: list[int] = []
    place = places[-1] if places else -1
    while place >= 0:
        chosen.append(place)
        place = before[place]
    return chosen[::-1]
