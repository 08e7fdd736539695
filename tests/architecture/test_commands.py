"""Every console command: documented in docs/commands.md, with examples in its help, and `--json`."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

import pytest
from support.repository import ROOT

import birthmark.broker.cli as broker_cli
import birthmark.device.cli as device_cli
import birthmark.firmware_sim.cli as sim_cli
import birthmark.provisioning.cli as station_cli
from birthmark.device.console import run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def walk(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield every command that does something, with its full name."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in inner:
        for word, command in action.choices.items():
            yield from walk(command, f"{name} {word}")
    if not inner or parser.get_default("handler") is not None:
        yield name, parser


def groups(parser: argparse.ArgumentParser, title: str) -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """Yield every parser that has commands, or actions, below it, with what they are called."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in inner:
        yield parser, title
        for command in action.choices.values():
            yield from groups(command, "actions")


CLIS = {
    "birthmark": station_cli,
    "birthmark-broker": broker_cli,
    "birthmark-device": device_cli,
    "birthmark-sim": sim_cli,
}
COMMANDS = {name: parser for command, cli in CLIS.items() for name, parser in walk(cli.parser(), command)}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_documented_with_an_example(name: str) -> None:
    lines = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("#") and f"`{name}" in line for line in lines), f"no heading for {name}"
    assert any(line.lstrip("$ ").startswith(f"{name} ") or line.strip() == f"$ {name}" for line in lines)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_s_help_ends_in_examples(name: str) -> None:
    text = COMMANDS[name].format_help()
    assert "examples:\n" in text
    assert f"  {name}" in text.split("examples:\n", 1)[1]


@pytest.mark.parametrize(
    ("cli", "title"),
    [(cli, title) for top in CLIS.values() for cli, title in groups(top.parser(), "commands")],
    ids=lambda value: value.prog if isinstance(value, argparse.ArgumentParser) else value,
)
def test_commands_and_actions_stand_under_a_heading_of_their_own(cli: argparse.ArgumentParser, title: str) -> None:
    text = cli.format_help()
    assert f"\n{title}:\n" in text
    assert "positional arguments:" not in text
    assert cli.description
    assert cli.description[0].isupper() == (title == "commands")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_of_a_command_is_explained(name: str) -> None:
    for action in COMMANDS[name]._actions:
        assert action.help, f"{name}: {action.option_strings or action.dest} has no help"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_is_documented(name: str) -> None:
    """At its command, at another one that has it, or in what a part's commands have in common."""
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    part = next(part for part in page.split("\n## ") if f"\n### `{name}`\n" in part)
    for action in COMMANDS[name]._actions:
        options = [option for option in action.option_strings if option.startswith("--")]
        if options and action.dest not in ("help", "json"):
            assert any(re.search(rf"{option}(?![a-z-])", part) for option in options), f"{name} {options}"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("birthmark-device doctor --state none --broker g:0", "broker's port"),
        ("birthmark-device watch a --identity none --ca none --broker g:0", "broker's port"),
        ("birthmark-sim board --state none --fault nonsense", "no such fault"),
        ("birthmark-sim board --state none --interval -1", "out of range"),
        ("birthmark-sim fixture --state none --slots 2 --faults 9:login", "no slot 9"),
        ("birthmark-sim fleet --state none --fault nonsense", "no such fault"),
        ("birthmark-sim fleet --state none --broker g:0", "broker's port"),
    ],
)
def test_a_value_that_no_command_could_use_is_wrong_usage(
    line: str,
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *words = line.split()
    assert run(CLIS[command].parser(), words) == 2
    assert what in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_command_documented_is_missing() -> None:
    lines = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8").splitlines()
    headings = {line.split("`")[1] for line in lines if line.startswith("### `")}
    assert headings == set(COMMANDS)
