"""How the four commands look and behave: one module, so that they do it alike.

Rules:

- `--json` prints one JSON object a line on stdout; otherwise people read aligned text, coloured on a terminal
  only (and not if NO_COLOR is set).
- A failure prints `error: ...` and `hint: ...` on stderr (`{"error", "hint", "exit_code"}` with `--json`),
  a warning `warning: ...` (`{"warning"}`).
- Exit codes: 0 done, 1 expected failure, 2 usage, 3 refused, duplicate or quarantined, 4 time-out or no device,
  5 port or system, 6 authority or registry, 130 interrupted. A batch returns its worst.
- Every command's `--help` ends in examples.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import json
import os
import sys
import threading
from contextlib import suppress
from importlib import import_module
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, NoReturn

from birthmark.device.errors import BirthmarkError, SystemFailureError
from birthmark.device.escape import escaped
from birthmark.device.loading import loading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

PAGE_ROWS = 1000
"""Of a table: so many are held to find how wide its columns are."""
INTERRUPTED = 130
UNHEARD = 141
"""The reader of our output went away: 128 and SIGPIPE, as a shell has it. The command did not get to its end."""
_REMEDIES = {
    errno.EACCES: "check the path and its permissions, or run this as the user whom it belongs to",
    errno.EPERM: "check the path and its permissions, or run this as the user whom it belongs to",
    errno.EROFS: "this part of the file system is read-only: choose another path",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: a part of it is a file, not a folder",
    errno.EISDIR: "check the path: it is a folder, not a file",
    errno.ENOTSUP: "name a file, one that is there or a new one",
    errno.ENOSPC: "make room, then try again",
    errno.EDQUOT: "make room, then try again",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
}
_COLOURS = {"red": "31", "green": "32", "yellow": "33", "bold": "1", "dim": "2"}


class Console:
    """Where a command's answers go.

    Args:
        as_json: one JSON object a line instead of text.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json

    def say(self, text: str) -> None:
        """Tell a person something; nothing with `--json`."""
        if not self.as_json:
            _write_line(text)

    def emit_line(self, line: str) -> None:
        """Write a line of data, which ends itself: the same for a person and a machine."""
        _write_line(line.removesuffix("\n").removesuffix("\r"))

    def emit(self, record: Mapping[str, Any], text: str) -> None:
        """Give one answer: the record with `--json`, else the text."""
        _write_line(json.dumps(record, separators=(",", ":")) if self.as_json else text)

    def warn(self, text: str) -> None:
        """Say on stderr what does not stop the command."""
        if self.as_json:
            print(json.dumps({"warning": text}), file=sys.stderr, flush=True)
            return
        print(f"{self._paint('warning:', 'yellow', sys.stderr)} {text}", file=sys.stderr, flush=True)

    def table(self, rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, empty: str) -> None:
        """Print rows under headings; with `--json` one whole record a line; `empty` where there is no row.

        Rows are gone through once, and a page of them is held: where a later page has a wider cell, its column is
        wider from there on.
        """
        if self.as_json:
            for row in rows:
                self.emit(row, "")
            return
        headings = [column.replace("_", " ").upper() for column in columns]
        widths, page_count = [len(heading) for heading in headings], 0
        for page_count, page in enumerate(_pages(rows), 1):
            lines = [[_cell(row.get(column)) for column in columns] for row in page]
            for line in lines:
                widths = [max(width, len(cell)) for width, cell in zip(widths, line, strict=True)]
            if page_count == 1:
                self.say(self.paint(_line(headings, widths), "bold"))
            self.say("\n".join(_line(line, widths) for line in lines))
        if not page_count:
            self.say(empty)

    def facts(self, record: Mapping[str, Any]) -> None:
        """Print one record as `name  value` lines, or as one JSON object."""
        width = max(len(name) for name in record)
        lines = (f"{name.replace('_', ' '):<{width}}  {_cell(value)}" for name, value in record.items())
        self.emit(record, "\n".join(lines))

    def paint(self, text: str, colour: str) -> str:
        """Colour text for stdout, where colour is wanted."""
        return self._paint(text, colour, sys.stdout)

    def fail(self, error: BirthmarkError | OSError) -> int:
        """Report an expected failure, or what the system says, on stderr and return its exit code."""
        if isinstance(error, OSError):
            error = _system_failure(error)
        if self.as_json:
            record = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
            print(json.dumps(record), file=sys.stderr, flush=True)
        else:
            print(f"{self._paint('error:', 'red', sys.stderr)} {error.message}", file=sys.stderr)
            if error.hint:
                print(f"{self._paint('hint:', 'bold', sys.stderr)} {error.hint}", file=sys.stderr)
        return error.exit_code

    def _paint(self, text: str, colour: str, stream: IO[str]) -> str:
        if self.as_json or not stream.isatty() or "NO_COLOR" in os.environ:
            return text
        return f"\033[{_COLOURS[colour]}m{text}\033[0m"


def _system_failure(error: OSError) -> SystemFailureError:
    what = f"use {error.filename}" if error.filename else "go on"
    hint = _REMEDIES.get(error.errno or 0, "see what the system says about it, then try again")
    return SystemFailureError(f"could not {what}: {error.strerror or error}", hint)


def _write_line(text: str) -> None:
    """Write a line to stdout in one piece: between what `print` writes and its end, another thread may get."""
    try:
        sys.stdout.write(text + "\n")
    except UnicodeEncodeError:  # a path that is no text, or a terminal without such characters: all is done by now
        encoding = sys.stdout.encoding
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    sys.stdout.flush()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value) or "-"
    # Names are checked where they come in; should one get past that, it is still no escape sequence here.
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else escaped(c) for c in text)


def _pages(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    following = iter(rows)
    while page := list(islice(following, PAGE_ROWS)):
        yield page


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


class Parser(argparse.ArgumentParser):
    """An argument parser with examples at the end of `--help`.

    Args:
        examples: one command a line.
        real: makes the parser that this one stands in for, when it is first needed: for a command whose libraries
            the others should not wait for.
        options: those of `argparse.ArgumentParser`.
    """

    def __init__(self, *, examples: str = "", real: Callable[[], Parser] | None = None, **options: Any) -> None:
        self._real = real
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        if examples:
            options["epilog"] = "examples:\n" + "\n".join(f"  {line}" for line in examples.strip().splitlines())
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, or have the real parser parse."""
        if self._real is not None:
            return self._real().parse_known_args(args, namespace)
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        """Return the help text, the real parser's if there is one."""
        return self._real().format_help() if self._real is not None else super().format_help()


def command(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    handler: Callable[[argparse.Namespace, Console], int | None],
    summary: str,
    examples: str,
) -> Parser:
    """Add a command: `handler(arguments, console)` returns an exit code (None: 0) or raises BirthmarkError."""
    parser = commands.add_parser(name, help=summary, description=summary, examples=examples)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.set_defaults(handler=handler, command_line=parser.prog)
    return parser


def run(parser: Parser, arguments: Sequence[str] | None = None) -> int:
    """Parse, run the command's handler, and return the exit code. Expected failures end here, once."""
    parsed = parser.parse_args(arguments)
    console = Console(as_json=getattr(parsed, "json", False))
    try:
        return parsed.handler(parsed, console) or 0
    except BirthmarkError as error:
        return console.fail(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`... | head`): nothing to say, and nobody to say it to. But the
        # command may not be done: `flash` ends here with a unit that is not made.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNHEARD
    except OSError as error:
        return console.fail(error)


def exit_with(code: int) -> NoReturn:
    """End the process with this code, once all is done that is to be waited for, and what was printed is out.

    A thread that nobody waits for may be in a handshake, which nothing can end, and OpenSSL's clean-up at the end
    of a process takes away what it works with: SIGSEGV, once in some hundred times. So nothing is cleaned up then.
    """
    atexit.register(_leave, code)
    sys.exit(code)


def _leave(code: int) -> None:
    if not any(thread.daemon for thread in threading.enumerate()):
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or its reader has gone
            stream.flush()
    os._exit(code)


def main_of(cli_module: str, extra: str, *, by_command: bool = False) -> int:
    """Run a part's command line; a missing library becomes the line that installs it.

    Args:
        cli_module: where the part's `parser` is.
        extra: what installs its libraries.
        by_command: `parser` takes the words of the command line, to load no more than that command needs.
    """
    try:
        with loading():
            cli = import_module(cli_module)
            parser = cli.parser(sys.argv[1:]) if by_command else cli.parser()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("birthmark"):
            raise
        missing = BirthmarkError(
            f"could not start: the library {error.name} is not installed",
            hint=f"pip install 'birthmark[{extra}]'",
        )
        return Console().fail(missing)
    except KeyboardInterrupt:  # the libraries take a moment, and nothing has begun
        return INTERRUPTED
    return run(parser)
