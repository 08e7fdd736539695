"""The audit log: appended once whatever happens, and every tampering is found and located."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.station import NOON

from birthmark.device.errors import RegistryError
from birthmark.provisioning.audit import Head, append_missing, chained, described, digest, read, written
from birthmark.provisioning.audit_check import check, end_is_sound, verify

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def chain(count: int, head: Head | None = None) -> tuple[list[str], Head]:
    lines: list[str] = []
    head = head or Head()
    for number in range(count):
        line, head = chained(
            head,
            at=NOON,
            actor="eve@host",
            action="issue",
            subject=f"d-{head.seq + 1}",
            details={"row": number, "role": "sensor", "none": None},
        )
        lines.append(line)
    return lines, head


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    append_missing(path, chain(6)[0])
    return path


HEAD = chain(6)[1]


def rewrite(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    lines = change(path.read_text().splitlines())
    path.write_text("".join(line + "\n" for line in lines))


def test_a_sound_log(log: Path) -> None:
    verdict = verify(log, HEAD)
    assert verdict.problems == ()
    assert verdict.entries == 6
    assert verdict.head == HEAD
    assert [entry["seq"] for entry in read(log)] == [1, 2, 3, 4, 5, 6]
    assert log.stat().st_mode & 0o777 == 0o600


def test_no_log_is_sound_only_if_there_should_be_none(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    assert verify(path, Head()).problems == ()
    assert [problem.kind for problem in verify(path, HEAD).problems] == ["cut"]
    append_missing(path, [])
    assert not path.exists()


@pytest.mark.parametrize("key", ["at", "actor", "action", "subject", "details", "previous", "hash", "seq"])
def test_an_edit_is_found_and_located(log: Path, key: str) -> None:
    def change(lines: list[str]) -> list[str]:
        entry = json.loads(lines[2])
        entry[key] = {"details": {"row": 9}, "seq": 33}.get(key, "0" * 64)
        lines[2] = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        return lines

    rewrite(log, change)
    first = verify(log, HEAD).problems[0]
    assert first.line == 3
    assert first.kind == "edited"
    assert "line 3" in first.text


def test_an_edit_with_its_hash_made_to_fit_is_found(log: Path) -> None:
    def change(lines: list[str]) -> list[str]:
        forged, _ = chained(
            Head(2, json.loads(lines[1])["hash"]), at=NOON, actor="x", action="issue", subject="d-3", details={}
        )
        return [*lines[:2], forged, *lines[3:]]

    rewrite(log, change)
    problems = verify(log, HEAD).problems
    assert [(problem.line, problem.kind) for problem in problems] == [(3, "edited")]
    assert "entry 4 names another" in problems[0].text


def test_a_log_rewritten_from_some_place_on_does_not_fit_the_registry(log: Path) -> None:
    def change(lines: list[str]) -> list[str]:
        forged = lines[:3]
        head = Head(3, json.loads(lines[2])["hash"])
        for _ in range(3):
            line, head = chained(head, at=NOON, actor="x", action="issue", subject="forged", details={})
            forged.append(line)
        return forged

    rewrite(log, change)
    problems = verify(log, HEAD).problems
    assert [(problem.line, problem.kind, problem.expected) for problem in problems] == [(6, "edited", HEAD.hash)]
    assert "the registry remembers another; what is before it" in problems[0].text


@pytest.mark.parametrize(("start", "end", "line"), [(0, 1, 1), (1, 2, 2), (2, 5, 3)])
def test_a_cut_in_the_middle_is_found_and_located(log: Path, start: int, end: int, line: int) -> None:
    rewrite(log, lambda lines: lines[:start] + lines[end:])
    problems = verify(log, HEAD).problems
    assert [(problem.line, problem.kind) for problem in problems] == [(line, "cut")]
    assert str(start + 1) in problems[0].text


@pytest.mark.parametrize("kept", [0, 1, 5])
def test_a_cut_at_the_end_is_found(log: Path, kept: int) -> None:
    rewrite(log, lambda lines: lines[:kept])
    problems = verify(log, HEAD).problems
    assert [(problem.line, problem.kind) for problem in problems] == [(0, "cut")]
    assert f"ends with entry {kept}" in problems[0].text


def test_entries_that_changed_places_are_found(log: Path) -> None:
    rewrite(log, lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]])
    (problem,) = verify(log, HEAD).problems
    assert (problem.line, problem.kind) == (3, "swapped")
    assert "line 3 (entry 4) and line 4 (entry 3)" in problem.text


def test_entries_that_were_put_in_are_found(log: Path) -> None:
    rewrite(log, lambda lines: [*lines[:3], lines[2], *lines[3:]])
    assert [(problem.line, problem.kind) for problem in verify(log, HEAD).problems] == [(4, "repeated")]
    more, _ = chain(1, HEAD)
    rewrite(log, lambda lines: [*lines[:3], *lines[4:], *more])
    assert [(problem.line, problem.kind) for problem in verify(log, HEAD).problems] == [(7, "inserted")]


@pytest.mark.parametrize("junk", ["", "{}", "[]", "null", '{"seq": 1}', "\x00", "[" * 5000])
def test_lines_that_are_no_entries_are_found(log: Path, junk: str) -> None:
    rewrite(log, lambda lines: [*lines[:4], junk, *lines[4:]])
    problems = verify(log, HEAD).problems
    assert [(problem.line, problem.kind) for problem in problems] == [(5, "inserted")]


@pytest.mark.parametrize(
    "rewritten",
    [
        lambda line: line.replace(b'":', b'": ', 1),
        lambda line: b'{"action":"nothing",' + line[1:],  # the last of two equal keys counts
        lambda line: line + b"\r",
        lambda line: line + b" ",
        lambda line: b"\xef\xbb\xbf" + line,
        lambda line: line.decode().encode("utf-16-be"),
        lambda line: line.replace(b"sensor", rb"s\u0065nsor"),
    ],
)
def test_the_same_content_written_otherwise_is_found(log: Path, rewritten: Callable[[bytes], bytes]) -> None:
    lines = log.read_bytes().splitlines()
    assert rewritten(lines[2]) != lines[2]
    lines[2] = rewritten(lines[2])
    log.write_bytes(b"".join(line + b"\n" for line in lines))
    first = verify(log, HEAD).problems[0]
    assert (first.line, first.kind) == (3, "edited")


@given(position=st.integers(0, 10_000), octet=st.integers(0, 255))
def test_any_changed_byte_is_found(tmp_path_factory: pytest.TempPathFactory, position: int, octet: int) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    content = bytearray(("\n".join(chain(6)[0]) + "\n").encode())
    position %= len(content) - 1  # the last line end may be missing: nothing of an entry is
    if content[position] == octet:
        return
    content[position] = octet
    path.write_bytes(content)
    assert verify(path, HEAD).problems


def test_appending_again_changes_nothing(log: Path) -> None:
    before = log.read_bytes()
    append_missing(log, chain(6)[0][3:])
    assert log.read_bytes() == before


@given(cut=st.integers(0, 2000))
def test_a_log_cut_anywhere_in_what_is_being_appended_is_repaired(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "torn.jsonl"
    lines, head = chain(9)
    old = "".join(line + "\n" for line in lines[:6]).encode()
    new = "".join(line + "\n" for line in lines[6:]).encode()
    path.write_bytes(old + new[: cut % (len(new) + 1)])
    append_missing(path, lines[6:])
    assert path.read_bytes() == old + new
    assert verify(path, head).problems == ()


def test_a_foreign_end_is_kept_as_evidence(log: Path) -> None:
    with log.open("ab") as file:
        file.write(b"somebody was here")
    more, head = chain(1, HEAD)
    append_missing(log, more)
    problems = verify(log, head).problems
    assert [(problem.line, problem.kind) for problem in problems] == [(7, "inserted")]
    assert b"somebody was here" in log.read_bytes()


def test_an_unreadable_log_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="audit log"):
        verify(tmp_path, HEAD)


def test_an_entry_is_shown_in_printable_ascii() -> None:
    line, _ = chained(
        Head(),
        at=NOON,
        actor="\x1b[31m",
        action="issue",
        subject="a\u202eb",
        details={"x\x1b[2J": "\n", "empty": None},
    )
    shown = described(json.loads(line))
    assert shown.isascii()
    assert shown.isprintable()
    assert "empty" not in shown


VALUES = st.none() | st.booleans() | st.integers() | st.text(st.characters())
"""Half a character among them, which nobody writes who does not forge."""


@given(st.dictionaries(st.text(st.characters()), VALUES))
@example({"delete": "\x7f"})
@example({"beyond": 1 << 64})
def test_an_object_is_written_as_json_writes_it(content: dict[str, object]) -> None:
    """Whichever library writes it: a log of before has the hashes of that."""
    assert written(content) == json.dumps(content, sort_keys=True, separators=(",", ":"))


# --- any one tampering is found, named and located ---------------------------------------------------------------

LONG, LONG_HEAD = chain(12)


def forged(seq: int, previous: str) -> str:
    """A line that fits itself, and nothing else."""
    return chained(Head(seq - 1, previous), at=NOON, actor="x", action="issue", subject="forged", details={})[0]


@given(
    first=st.integers(0, 11),
    second=st.integers(0, 11),
    how=st.sampled_from(["edit", "forge", "cut", "twice", "put", "swap", "tear"]),
)
def test_any_one_tampering_is_named_in_its_place(
    tmp_path_factory: pytest.TempPathFactory, first: int, second: int, how: str
) -> None:
    lines = list(LONG)
    place, kinds, line = f"entry {first + 1}", {how}, first + 1
    entry = json.loads(lines[first])
    if how == "edit":
        lines[first] = lines[first].replace("eve@host", "bob@host")
        kinds = {"edited"}
    elif how == "forge":
        lines[first] = forged(first + 1, entry["previous"])
        kinds = {"edited"}
    elif how == "cut":
        end = max(first + 1, min(second, 12))
        del lines[first:end]
        line = first + 1 if end < 12 else 0
        place = str(first + 1) if line else f"ends with entry {first}"
    elif how == "twice":
        lines.insert(second, lines[first])
        kinds = {"repeated"}
        line = second + 1 if second != first else second + 2
        place = f"repeats line {first + 1 if second > first else first + 2 if second < first else first + 1}"
    elif how == "put":
        lines.insert(first, forged(second + 1, "0" * 64))
        kinds, place = {"inserted"}, f"line {first + 1}"
    elif how == "swap":
        if first == second:
            return
        lines[first], lines[second] = lines[second], lines[first]
        kinds, line = {"swapped"}, min(first, second) + 1
        place = f"line {max(first, second) + 1} (entry {min(first, second) + 1})"
    path = tmp_path_factory.getbasetemp() / "tampered.jsonl"
    content = "".join(each + "\n" for each in lines).encode()
    if how == "tear":
        starts = [0]
        for each in lines:
            starts.append(starts[-1] + len(each) + 1)
        content = content[: starts[first] + 1 + (second * 31) % (len(lines[first]) - 1)]
        kinds = {"torn"} if first == 11 else {"torn", "cut"}
    path.write_bytes(content)

    problems = verify(path, LONG_HEAD).problems

    assert {problem.kind for problem in problems} == kinds, problems
    assert (problems[0].line, len(problems)) == (line, len(kinds)), problems
    assert place in problems[0].text, problems
    if how in ("edit", "forge"):
        assert problems[0].expected == entry["hash"]
        assert problems[0].found == digest(json.loads(lines[first])) != entry["hash"]
    if how == "cut":
        assert problems[0].expected == (json.loads(LONG[end - 1])["hash"])


@given(data=st.data())
def test_whatever_is_done_to_a_log_something_is_said_and_nothing_fails(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    pool = [
        *LONG,
        forged(4, "0" * 64),
        forged(10**15, "f" * 64),
        forged(-3, "x"),
        forged(0, ""),
        "",
        "{}",
        LONG[3][:40],
    ]
    lines = data.draw(st.lists(st.sampled_from(pool), max_size=16))
    path = tmp_path_factory.getbasetemp() / "whatever.jsonl"
    path.write_text("".join(each + "\n" for each in lines))
    verdict = verify(path, LONG_HEAD, [LONG_HEAD])
    assert bool(verdict.problems) is (lines != LONG)
    assert all(0 <= problem.line <= len(lines) for problem in verdict.problems)
    numbers = [problem.line for problem in verdict.problems if problem.kind != "rewritten"]
    assert numbers == sorted(numbers, key=lambda number: (number == 0, number))
    verify(path, None)
    verify(path, Head(10**15, "a" * 64))


def test_a_line_that_moved_is_named_once(log: Path) -> None:
    rewrite(log, lambda lines: [*lines[1:4], lines[0], *lines[4:]])
    (problem,) = verify(log, HEAD).problems
    assert (problem.line, problem.kind) == (4, "moved")
    assert "belongs at the beginning" in problem.text


def test_two_tamperings_are_both_named(log: Path) -> None:
    rewrite(log, lambda lines: [lines[0], lines[1].replace("eve", "bob"), lines[2], *lines[4:]])
    assert [(problem.line, problem.kind) for problem in verify(log, HEAD).problems] == [(2, "edited"), (4, "cut")]


def test_a_copy_without_a_head_is_held_against_itself_and_against_marks(log: Path) -> None:
    early = Head(3, json.loads(log.read_text().splitlines()[2])["hash"])
    assert verify(log, None, [early, HEAD]).problems == ()
    other = chain(6, None)[0]
    whole, head = [], Head()
    for number in range(6):
        line, head = chained(head, at=NOON, actor="x", action="issue", subject=str(number), details={})
        whole.append(line)
    assert len(other) == len(whole)
    log.write_text("".join(line + "\n" for line in whole))
    assert verify(log, head).problems == ()  # with the registry rewritten too, nothing here can tell
    (problem,) = verify(log, head, [early]).problems
    assert (problem.line, problem.kind, problem.expected) == (3, "rewritten", early.hash)
    assert verify(log, None, [Head(9, "a" * 64)]).problems[0].line == 0
    assert written({"b": 1, "a": "é"}) == '{"a":"\\u00e9","b":1}'


class Growing:
    """A registry to which somebody writes while its log is checked, `more` times."""

    def __init__(self, path: Path, more: int) -> None:
        self.audit_path = path
        self._head, self._more = HEAD, more

    def audit_head(self) -> Head:
        told = self._head
        if self._more:
            self._more -= 1
            lines, self._head = chain(1, self._head)
            append_missing(self.audit_path, lines)
        return told


def test_what_others_write_meanwhile_is_no_problem(log: Path) -> None:
    assert check(Growing(log, more=3)).problems == ()
    rewrite(log, lambda lines: lines[1:])
    assert check(Growing(log, more=0)).problems[0].kind == "cut"


def test_the_end_of_a_long_log_is_looked_at_alone(log: Path) -> None:
    lines, _ = chain(3000)
    whole = "".join(f"{line}\n" for line in lines)
    log.write_text(whole)
    assert end_is_sound(log)
    log.write_text(whole + lines[0][:40])  # somebody is writing
    assert end_is_sound(log)
    log.write_text(f"x{whole}")
    assert end_is_sound(log)
    log.write_text("".join(f"{line}\n" for line in lines[:-3] + lines[-2:]))
    assert not end_is_sound(log)
    log.write_text("".join(f"{line}\n" for line in lines[1:400]))  # a short one is looked at whole
    assert not end_is_sound(log)
