"""The command line, put together from its modules: whole, or for one command."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from birthmark.provisioning import cli
from birthmark.provisioning.entry import parser

if TYPE_CHECKING:
    from support.station import Command

    from birthmark.device.console import Parser

UNWANTED = {
    "show": ("paho", "serial", "sqlalchemy"),
    "revoke": ("paho", "serial", "sqlalchemy"),
    "crl": ("paho", "serial", "sqlalchemy"),
    "issue": ("paho", "serial", "sqlalchemy"),
    "registry": ("paho",),
}
"""What a command waits for no longer than it must; TinyDB is this station's registry."""


def choices(of: Parser) -> dict[str, Parser]:
    (action,) = [action for action in of._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(action.choices)


WHOLE = choices(cli.parser())


@pytest.mark.parametrize("name", WHOLE)
def test_the_parser_for_one_command_knows_it_as_the_whole_one_does(name: str) -> None:
    alone = choices(parser([name, "--json"]))
    assert len(alone) < len(WHOLE) / 2
    assert alone[name].format_help() == WHOLE[name].format_help()


@pytest.mark.parametrize("words", [[], ["--help"], ["nonsense"], ["--json", "show"]])
def test_anything_else_is_for_the_whole_parser(words: list[str]) -> None:
    assert list(choices(parser(words))) == list(WHOLE)


@pytest.mark.parametrize("name", UNWANTED)
def test_a_command_does_not_load_what_others_need(name: str) -> None:
    program = f"""
import sys
from birthmark.provisioning.entry import parser
parser([{name!r}])
print(*(each for each in {UNWANTED[name]!r} if each in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("restore station.age", "no place is named"),
        ("restore --to station", "no backup is named"),
        ("backup --verify station.age --include alice.pem", "--include is for writing one"),
        ("run --template s-{n}", "could not choose a port"),
        ("run --port p --template s-{n} --pattern x", "it is for --scan"),
        ("issue --from list.csv --out out --broker gateway:8883", "it is for devices whose key is made here"),
        ("ca passphrase issuing --root-key key.pem", "it is for the root"),
        ("ca rollover start issuing --existing-key", "none is named"),
        ("audit show --since yesterday", "'yesterday' is no time"),
        ("audit show --last -1", "-1"),
    ],
)
def test_options_that_say_nothing_together_are_wrong_usage(line: str, what: str, birthmark: Command) -> None:
    answer = birthmark(*line.split())

    assert (answer.exit_code, answer.stdout) == (2, "")
    assert what in answer.stderr
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("line", "code", "what"),
    [
        ("init --station occupied", 1, "there is something already"),
        ("backup occupied/file", 1, "it is there already"),
        ("backup --verify none.age", 5, "No such file"),
        ("restore none.age --to station", 5, "No such file"),
        ("restore occupied/file --to occupied", 1, "there is something already"),
    ],
)
def test_nobody_is_asked_for_a_passphrase_in_vain(
    line: str, code: int, what: str, birthmark: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("BIRTHMARK_PASSPHRASE", "BIRTHMARK_BACKUP_PASSPHRASE"):
        monkeypatch.delenv(variable, raising=False)  # so that asking would be the error: there is no terminal
    Path("occupied").mkdir()
    Path("occupied/file").write_bytes(b"")

    answer = birthmark(*line.split())

    assert (answer.exit_code, answer.stdout) == (code, "")
    assert what in answer.stderr
