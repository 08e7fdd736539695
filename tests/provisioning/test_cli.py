"""The command line, put together from its modules: whole, or for one command."""

from __future__ import annotations

import argparse
import shlex
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
        ("restore --crl crl.pem --lost-key 1a2b3c4d", "no backup is named"),
        ("ca rollover start root --root-key key.pem", "a key of its own"),
        ("ca rollover start issuing --key rubbish", "no PKCS#11 URI"),
        ("crl --root-key key.pem", "it is for the root's own CRL"),
        ("crl --root-passphrase-fd 3", "it is for the root's own CRL"),
        ("gateway add g", "needs either a path or a broker"),
        ("gateway add g --host h", "needs either a path or a broker"),
        ("gateway add g --path /crl.pem --via cloud", "needs either a path or a broker"),
        ("gateway add g --via cloud --clients-ca /ca.pem", "cannot be brought over MQTT"),
        ("gateway add g --host h --operator o.pem --port 0", "'0' is no number"),
        ("upstream add cloud --host h:70000 --operator o.pem", "70000"),
        ("renew s --broker g:70000 --identity o.pem", "70000"),
        ("renew s --broker g --identity o.pem --spread 86401", "0 to 86400"),
        ("quarantine clear 0123456789abcdef --reason ''", "could not use the reason"),
        ("run --port p --template s", "it needs {n} once"),
        ("flash --port p --id s --broker h:70000", "70000"),
        ("flash --port p --id s --baud 0", "'0' is no number"),
        ("revoke --cert-serial -5 --reason lost", "no serial number"),
        ("init --keepalive-s 70000", "70000"),
        ("init --broker-port 0", "'0' is no number"),
        ("init --organization ''", "organization"),
        ("init --issuing-key rubbish", "no PKCS#11 URI"),
        ("init --registry mysql://host/name", "mysql is not supported"),
        ("registry migrate nonsense", "no URL of a database"),
    ],
)
def test_options_that_say_nothing_together_and_values_of_no_use_are_wrong_usage(
    line: str, what: str, birthmark: Command
) -> None:
    answer = birthmark(*shlex.split(line))

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
        ("restore occupied/file --to new --registry nonsense", 2, "no URL of a database"),
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
