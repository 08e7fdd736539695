"""policy.toml and TOML positions: every complaint names file, line and key."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from birthmark.broker.policy_file import parse_policy, read_policy
from birthmark.broker.toml_file import KeyPath, key_lines
from birthmark.device.errors import PolicyError

if TYPE_CHECKING:
    from pathlib import Path

GOOD = '[roles.device]\npublish = ["a"]\n[[assignments]]\ncn = "*"\nrole = "device"\n'


def complaint(text: str) -> str:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text.encode(), "policy.toml")
    return caught.value.message


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("", 1, "it has no roles"),
        ("# nothing\n", 1, "it has no roles"),
        ("[roles.device]\n", 1, "it has no assignments"),
        (GOOD + "[extra]\n", 6, "extra: unknown key"),
        ('\n[roles.device]\npublsh = ["a"]\n', 3, "roles.device.publsh: unknown key"),
        ('[roles.device]\npublish = [\n  "a",  # fine\n  "a/#/b",\n]\n', 4, "roles.device.publish[2]"),
        ('[roles.device]\nsubscribe = ["a+"]\n', 2, "a wildcard must be a whole level"),
        ('[roles.device]\nsubscribe = ["x-{id}"]\n', 2, "braces only as {id}"),
        ('[roles.device]\npublish = ["{ID}"]\n', 2, "braces only as {id}"),
        ('[roles.device]\npublish = ["$SYS/x"]\n', 2, "the broker's alone"),
        ('[roles.device]\nsubscribe = ["$share/g/a"]\n', 2, "the broker's alone"),
        ('[roles.device]\npublish = [""]\n', 2, "it is empty"),
        ("[roles.device]\npublish = [1]\n", 2, "roles.device.publish[1]: it must be text"),
        ('[roles.device]\npublish = "a"\n', 2, "it must be a list"),
        ("roles = 1\n", 1, "roles: it must be a table"),
        ("[[roles]]\n", 1, "roles: it must be a table"),
        ('[roles."a b"]\n', 1, "outside the grammar"),
        (GOOD.replace('"device"', '"devcie"'), 5, "assignments[1].role: there is no role 'devcie'"),
        (GOOD.replace('"*"', '"a/*"'), 4, "assignments[1].cn"),
        (GOOD.replace('cn = "*"\n', ""), 3, "neither cn nor ou"),
        (GOOD + "[[assignments]]\n", 6, "assignments[2]: the key 'role' is missing"),
        (GOOD + '[[assignments]]\nrole="device"\nou=["x"]\n', 8, "assignments[2].ou: it must be text"),
        (GOOD.replace("device", "operator"), 3, "reserved for services"),
        (GOOD + "[roles.device]\n", 6, "Cannot declare"),
        ("a = \n", 1, "Invalid value"),
    ],
)
def test_a_complaint_names_file_line_and_key(text: str, line: int, expected: str) -> None:
    message = complaint(text)
    assert message.startswith("could not use policy.toml")
    assert f"line {line}" in message
    assert expected in message


def test_what_is_not_utf8_or_too_large_is_refused() -> None:
    with pytest.raises(PolicyError, match="line 2: it is not UTF-8"):
        parse_policy(b"# a\n\xff", "policy.toml")
    with pytest.raises(PolicyError, match="larger than"):
        parse_policy(b"#" * (5 << 20), "policy.toml")
    with pytest.raises(PolicyError):
        parse_policy(b"a=" + b"[" * 100_000, "policy.toml")
    with pytest.raises(PolicyError):
        parse_policy(b"a=" + b"1" * 5_000, "policy.toml")


def test_a_missing_file_has_a_hint(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="No such file") as caught:
        read_policy(tmp_path / "policy.toml")
    assert "birthmark-broker init" in caught.value.hint


def test_a_file_that_is_there_and_cannot_be_read_is_not_to_be_made_anew(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").mkdir()
    with pytest.raises(PolicyError, match="Is a directory") as caught:
        read_policy(tmp_path / "policy.toml")
    assert caught.value.hint
    assert "init" not in caught.value.hint


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_policy_or_our_own_error(content: bytes) -> None:
    try:
        parse_policy(content, "policy.toml")
    except PolicyError:
        return


# Texts built together with the lines that their keys are on.

_key = st.sampled_from(["a", "b-1", '"q r"', "'s.t'", '"\\u00e9"'])
_scalar = st.sampled_from(
    [
        "1",
        "true",
        '"x # ]"',
        "'y'",
        "1979-05-27 07:32:00",
        '"""m\n"" \\" #\n"""',
        "'''\n''n\n]'''",
        "-1.5e3",
        '"""q"""""',
    ]
)
_space = st.sampled_from(["", " ", "\n", " # ] } comment\n", "\t\n\n"])


@st.composite
def values(draw: st.DrawFn, depth: int = 2) -> str:
    if depth == 0 or draw(st.booleans()):
        return draw(_scalar)
    items = draw(st.lists(values(depth - 1), max_size=3))
    return "[" + "".join(draw(_space) + item + draw(_space) + "," for item in items) + draw(_space) + "]"


@st.composite
def documents(draw: st.DrawFn) -> str:
    parts = []
    for number in range(draw(st.integers(0, 4))):
        header = draw(st.sampled_from(["", f"[t{number}]", "[[arr]]", f"[t{number} . {draw(_key)}]"]))
        if header or number == 0:
            parts.append(header + draw(st.sampled_from(["", " # c"])) + "\n")
            keys = draw(st.lists(_key, unique=True, max_size=3))
            for key in keys:
                indent, comment = draw(st.sampled_from(["", "  "])), draw(st.sampled_from(["", " # d"]))
                parts.append(f"{indent}{key} = {draw(values())}{comment}\n")
    text = "".join(parts)
    return text.replace("\n", "\r\n") if draw(st.booleans()) else text


def _paths(value: Any, path: KeyPath = ()) -> set[KeyPath]:
    children: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    found = {path} if path else set()
    for key, child in children:
        found |= _paths(child, (*path, key))
    return found


@given(documents())
def test_every_key_of_a_document_has_a_line_and_no_other(text: str) -> None:
    lines = key_lines(text)
    assert set(lines) == _paths(tomllib.loads(text))
    written = text.split("\n")
    for path, line in lines.items():
        last = path[-1]
        if isinstance(last, str) and last.isascii():
            assert last in written[line - 1] or "arr" in written[line - 1]
