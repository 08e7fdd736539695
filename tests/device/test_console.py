"""How the commands behave: exit codes, streams, JSON, escaping."""

import argparse
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest

from birthmark.device import console, errors
from birthmark.device.escape import escaped, quoted


def _parser(outcome: BaseException | int | None) -> console.Parser:
    def handler(_arguments: argparse.Namespace, _console: console.Console) -> int | None:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    parser = console.Parser(prog="tool")
    console.command(parser.add_subparsers(required=True), "go", handler, "Go.", "tool go")
    return parser


ENDING = """
import atexit, threading
from birthmark.device.console import exit_with
atexit.register(print, "cleaned up")
go_on = threading.Event()
def work():
    go_on.wait()
    print("worked")
threading.Thread(target=work, daemon=DAEMON).start()
print("printed")
if not DAEMON:
    go_on.set()
exit_with(3)
"""


@pytest.mark.parametrize(
    ("is_daemon", "said"), [(True, ["printed"]), (False, ["cleaned", "printed", "up", "worked"])]
)
def test_nothing_is_cleaned_up_beneath_a_thread_that_nobody_waits_for(is_daemon: bool, said: list[str]) -> None:
    script = ENDING.replace("DAEMON", str(is_daemon))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 3
    assert sorted(ended.stdout.split()) == said


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (None, 0),
        (4, 4),
        (errors.BirthmarkError("no"), 1),
        (errors.EnrollmentRefusedError("no"), 3),
        (errors.UnreachableError("no"), 4),
        (errors.PortError("no"), 5),
        (errors.RegistryError("no"), 6),
        (KeyboardInterrupt(), 130),
        (PermissionError(13, "Permission denied", "/x"), 5),
    ],
)
def test_exit_codes(outcome: BaseException | int | None, code: int) -> None:
    assert console.run(_parser(outcome), ["go"]) == code


def test_a_command_whose_reader_went_away_is_not_done() -> None:
    script = (
        "import sys\n"
        "from birthmark.device.console import Parser, command, run\n"
        "parser = Parser(prog='tool')\n"
        "go = lambda arguments, console: console.say('half of it') or console.say('made') or 0\n"
        "command(parser.add_subparsers(required=True), 'go', go, 'Go.', 'tool go')\n"
        "sys.exit(run(parser, ['go']))\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, check=False, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (console.UNHEARD, b"")


def test_an_error_and_its_hint_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.run(_parser(errors.PolicyError("could not read it", hint="look at line 3")), ["go"])
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err == "error: could not read it\nhint: look at line 3\n"


def test_an_error_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    console.run(_parser(errors.RegistryError("could not", hint="do")), ["go", "--json"])
    assert json.loads(capsys.readouterr().err) == {"error": "could not", "hint": "do", "exit_code": 6}


def test_a_bug_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        console.run(_parser(ZeroDivisionError()), ["go"])


def test_a_table_for_people_and_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, str | None]] = [{"id": "a", "state": None}, {"id": "long-name", "state": "LIVE"}]
    console.Console().table(rows, ["id", "state"], empty="none")
    assert capsys.readouterr().out == "ID         STATE\na          -\nlong-name  LIVE\n"
    console.Console(as_json=True).table(rows, ["id", "state"], empty="none")
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    console.Console().table([], ["id"], empty="none yet")
    assert capsys.readouterr().out == "none yet\n"


def test_a_long_table_is_gone_through_once_a_page_at_a_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PAGE_ROWS", 2)
    printed: list[str] = []

    def rows() -> Iterator[dict[str, str]]:
        for name in ("a", "bb", "c", "long", "d"):
            yield {"id": name, "state": "LIVE"}
            printed.append(capsys.readouterr().out)

    console.Console().table(rows(), ["id", "state"], empty="none")
    assert printed == ["", "ID  STATE\na   LIVE\nbb  LIVE\n", "", "c     LIVE\nlong  LIVE\n", ""]
    assert capsys.readouterr().out == "d     LIVE\n", "no narrower than before"


def test_untrusted_text_is_escaped() -> None:
    assert escaped("\x1b[2J\n\u202e\U0001f600\\") == "\\x1b[2J\\x0a\\u202e\\U0001f600\\\\"
    assert escaped(b"\xff\x00ok") == "\\xff\\x00ok"
    assert escaped("a" * 300) == "a" * 256 + "..."


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s\u0435nsor-1", r"'s\u0435nsor-1'"),
        ("it's \\ here", r"'it\'s \\ here'"),
        (r"\'", r"'\\\''"),
        (b"\xff", r"'\xff'"),
        ("", "''"),
        ("abcdef", "'abcd'..."),
        ("a''b", r"'a\'\'b'"),
    ],
)
def test_quoted_text_is_escaped_once_and_its_end_is_plain(text: str | bytes, shown: str) -> None:
    assert quoted(text, 4 if text == "abcdef" else 256) == shown


def test_what_a_table_or_a_fact_holds_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    console.Console().table([{"id": "a\x1b[2J", "who": "Söhne\u202e"}], ["id", "who"], empty="none")
    console.Console().facts({"void_reason": "x\ny"})
    assert capsys.readouterr().out.splitlines()[1:] == [r"a\x1b[2J  Söhne\u202e", r"void reason  x\x0ay"]


def test_a_warning_is_an_object_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    console.Console().warn("mind it")
    console.Console(as_json=True).warn("mind it")
    plain, structured = capsys.readouterr().err.splitlines()
    assert plain == "warning: mind it"
    assert json.loads(structured) == {"warning": "mind it"}


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.EACCES, "permissions"), (errno.ENOSPC, "make room"), (errno.EIO, "try again")]
)
def test_what_the_system_refuses_has_a_hint(
    number: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.run(_parser(OSError(number, "no", "/some/file")), ["go"]) == 5
    assert capsys.readouterr().err.startswith("error: could not use /some/file: no\nhint: ")
    assert console.run(_parser(OSError(number, "no", "/some/file")), ["go"]) == 5
    assert expected in capsys.readouterr().err


def test_ctrl_c_while_it_loads_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_libraries.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert console.main_of("slow_libraries", "station") == console.INTERRUPTED


def test_a_line_is_written_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services print from several threads: what is written in two pieces, another's line gets between."""
    written: list[str] = []

    class Recorder(StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    monkeypatch.setattr("sys.stdout", Recorder())
    console.Console(as_json=True).emit({"a": 1}, "text")
    console.Console().emit({"a": 1}, "text")
    console.Console().say("more")
    assert written == ['{"a":1}\n', "text\n", "more\n"]


def test_a_line_that_the_terminal_has_no_characters_for_is_written_all_the_same() -> None:
    program = r"from birthmark.device.console import Console; Console().say('gr\xfcn \udcff')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, rb"gr\xfcn \udcff" + b"\n", b"")
