"""The audit log: appended once whatever happens, and every tampering is found and located."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.station import NOON

from birthmark.device.errors import RegistryError
from birthmark.provisioning.audit import Head, append_missing, chained, described, read, verify

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


def test_an_edit_with_its_hash_made_to_fit_is_found_at_the_next_entry(log: Path) -> None:
    def change(lines: list[str]) -> list[str]:
        forged, _ = chained(
            Head(2, json.loads(lines[1])["hash"]), at=NOON, actor="x", action="issue", subject="d-3", details={}
        )
        return [*lines[:2], forged, *lines[3:]]

    rewrite(log, change)
    problems = verify(log, HEAD).problems
    assert [(problem.line, problem.kind) for problem in problems] == [(4, "edited")]


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
    assert [(problem.line, problem.kind) for problem in problems] == [(0, "edited")]


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
    problems = verify(log, HEAD).problems
    assert {(3, "cut"), (4, "moved")} <= {(problem.line, problem.kind) for problem in problems}


def test_entries_that_were_put_in_are_found(log: Path) -> None:
    rewrite(log, lambda lines: [*lines[:3], lines[2], *lines[3:]])
    assert [(problem.line, problem.kind) for problem in verify(log, HEAD).problems] == [(4, "inserted")]
    more, _ = chain(1, HEAD)
    rewrite(log, lambda lines: [*lines[:3], *lines[4:], *more])
    assert [(problem.line, problem.kind) for problem in verify(log, HEAD).problems] == [(0, "inserted")]


@pytest.mark.parametrize("junk", ["", "{}", "[]", "null", '{"seq": 1}', "\x00", "[" * 5000])
def test_lines_that_are_no_entries_are_found(log: Path, junk: str) -> None:
    rewrite(log, lambda lines: [*lines[:4], junk, *lines[4:]])
    problems = verify(log, HEAD).problems
    assert [(problem.line, problem.kind) for problem in problems] == [(5, "edited")]


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
    assert [(problem.line, problem.kind) for problem in problems] == [(7, "edited")]
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
