"""A TOML file of ours, read so that every complaint names the file, the line and the key.

`tomllib` says on which line the syntax is broken, but not where a key was. So, after it has accepted a text,
a small scanner walks the same text again and notes the line of every key and of every array element; it may
assume valid TOML (1.0.0), which keeps it short.

Rules: a key that nobody asked for is an error (a misspelt `deny` must not be silence); so is a wrong type.
"""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any

from birthmark.device.errors import BirthmarkError, ConfigurationError
from birthmark.device.escape import escaped

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

KeyPath = tuple[str | int, ...]
MAX_FILE_BYTES = 4 * 1024 * 1024
"""A policy of 10,000 assignments has 0.6 MB."""
_TOML = "the file is TOML 1.0, which is UTF-8 text"


class Table:
    """One table of the file: typed access to its keys, and errors that say where.

    Args:
        where: the file's name, as the person gave it.
        values: the table.
        lines: the line of each key path of the whole file.
        path: where in the file this table is.
        error: the class of the errors raised.
    """

    def __init__(
        self,
        where: str,
        values: dict[str, Any],
        lines: dict[KeyPath, int],
        path: KeyPath = (),
        error: type[BirthmarkError] = ConfigurationError,
    ) -> None:
        self._where = where
        self._values = values
        self._lines = lines
        self._path = path
        self._error = error

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def keys(self) -> Iterator[str]:
        """The table's keys, in the file's order."""
        return iter(self._values)

    def complain(self, *key: str | int, cause: str, hint: str = "") -> BirthmarkError:
        """Return an error about a key of this table (or about the table itself, with no key)."""
        full = (*self._path, *key)
        located = full
        while located and located not in self._lines:
            located = located[:-1]
        line = self._lines.get(located, 1)
        shown = _shown(full)
        return self._error(f"could not use {self._where}, line {line}{shown}: {cause}", hint=hint)

    def only(self, known: Collection[str]) -> None:
        """Refuse any key that is not in `known`."""
        for key in self._values:
            if key not in known:
                raise self.complain(key, cause="unknown key", hint=f"known here: {', '.join(sorted(known))}")

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string; without a default, it must be there."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.complain(key, cause="it must be text in quotes")
        return value

    def whole(self, key: str, default: int, *, least: int, most: int) -> int:
        """Return a whole number within bounds."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.complain(key, cause=f"it must be a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float, *, least: float, most: float) -> float:
        """Return a number within bounds."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self.complain(key, cause=f"it must be a number from {least:g} to {most:g}")
        return float(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        """Return true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.complain(key, cause="it must be true or false")
        return value

    def texts(self, key: str) -> list[str]:
        """Return a list of strings; an absent key is an empty list."""
        value = self._get(key, [])
        if not isinstance(value, list):
            raise self.complain(key, cause="it must be a list of texts: [ ... ]")
        for position, item in enumerate(value):
            if not isinstance(item, str):
                raise self.complain(key, position, cause="it must be text in quotes")
        return value

    def has(self, key: str) -> bool:
        """Return whether there is anything under a key."""
        return key in self._values

    def table(self, key: str) -> Table:
        """Return the table under a key; an absent one is empty."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.complain(key, cause=f"it must be a table: [{escaped(key)}]")
        return self._inner(value, key)

    def tables(self, key: str) -> list[Table]:
        """Return the array of tables under a key; an absent one is empty."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.complain(key, cause=f"it must be a list of tables: [[{escaped(key)}]]")
        return [self._inner(item, key, position) for position, item in enumerate(value)]

    def _inner(self, values: dict[str, Any], *key: str | int) -> Table:
        return Table(self._where, values, self._lines, (*self._path, *key), self._error)

    def _get(self, key: str, default: object) -> Any:
        value = self._values.get(key, default)
        if value is None:
            raise self.complain(cause=f"the key {key!r} is missing")
        return value


def read_toml(path: Path, error: type[BirthmarkError], *, missing_hint: str = "") -> tuple[Table, bytes]:
    """Read a file; return its root table and its bytes.

    Raises:
        BirthmarkError: of the class `error`: it is not there, not readable, not UTF-8, or no TOML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as cause:
        is_missing = isinstance(cause, FileNotFoundError)
        hint = missing_hint if is_missing else "it must be a file that the broker's user may read"
        raise error(f"could not read {path}: {cause.strerror or cause}", hint=hint) from cause
    return parse_toml(content, str(path), error), content


def parse_toml(content: bytes, where: str, error: type[BirthmarkError]) -> Table:
    """Parse a TOML file's bytes; `where` names it in errors. Raises `error`."""
    if len(content) > MAX_FILE_BYTES:
        raise error(f"could not use {where}: it is larger than {MAX_FILE_BYTES} bytes")
    try:
        text = content.decode()
    except UnicodeDecodeError as cause:
        line = content[: cause.start].count(b"\n") + 1
        raise error(f"could not use {where}, line {line}: it is not UTF-8", hint=_TOML) from cause
    try:
        values = tomllib.loads(text)
    except ValueError as cause:  # a number of thousands of digits is another one than `TOMLDecodeError`
        raise error(f"could not use {where}: {_syntax(str(cause), text)}", hint=_TOML) from cause
    except RecursionError as cause:
        raise error(f"could not use {where}: it is nested too deeply") from cause
    return Table(where, values, key_lines(text), error=error)


def key_lines(text: str) -> dict[KeyPath, int]:
    """Return the line (from 1) of every key path and array element of a *valid* TOML text."""
    # tomllib reads CR LF as LF too.
    scanner = _Scanner(text.replace("\r\n", "\n"))
    scanner.document()
    return scanner.lines


class _Scanner:
    """Walks valid TOML and notes where each key is."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._line = 1
        self._counted = 0
        self._arrays: dict[KeyPath, int] = {}
        self.lines: dict[KeyPath, int] = {}

    def document(self) -> None:
        table: KeyPath = ()
        while self._skip_blank():
            if self._text.startswith("[[", self._at):
                table = self._header("[[", "]]", is_array=True)
            elif self._text[self._at] == "[":
                table = self._header("[", "]", is_array=False)
            else:
                self._pair(table)

    def _header(self, opening: str, closing: str, *, is_array: bool) -> KeyPath:
        line = self._line_now()
        self._at += len(opening)
        written = self._key()
        self._at = self._text.index(closing, self._at) + len(closing)
        path: KeyPath = ()
        for position, part in enumerate(written):
            path = (*path, part)
            if is_array and position == len(written) - 1:
                self._arrays[path] = self._arrays.get(path, -1) + 1
                self.lines.setdefault(path, line)
            if path in self._arrays:
                path = (*path, self._arrays[path])
            self.lines.setdefault(path, line)
        return path

    def _pair(self, table: KeyPath) -> None:
        line = self._line_now()
        path = table
        for part in self._key():
            path = (*path, part)
            self.lines.setdefault(path, line)
        self._at = self._text.index("=", self._at) + 1
        self._skip_blank()
        self._value(path)

    def _key(self) -> list[str]:
        parts = []
        while True:
            self._skip_spaces()
            if self._text[self._at] in "\"'":
                parts.append(self._quoted_key())
            else:
                start = self._at
                while self._text[self._at].isalnum() or self._text[self._at] in "-_":
                    self._at += 1
                parts.append(self._text[start : self._at])
            self._skip_spaces()
            if self._text[self._at] != ".":
                return parts
            self._at += 1

    def _quoted_key(self) -> str:
        start = self._at
        self._string()
        # The parser that knows every escape reads the key for us.
        return str(next(iter(tomllib.loads(f"{self._text[start : self._at]} = 0"))))

    def _value(self, path: KeyPath) -> None:
        first = self._text[self._at]
        if first in "\"'":
            self._string()
        elif first == "[":
            self._at += 1
            position = 0
            while self._skip_blank() and self._text[self._at] != "]":
                self.lines.setdefault((*path, position), self._line_now())
                self._value((*path, position))
                position += 1
                self._comma()
            self._at += 1
        elif first == "{":
            self._at += 1
            while self._skip_blank() and self._text[self._at] != "}":
                self._pair(path)
                self._comma()
            self._at += 1
        else:
            while self._at < len(self._text) and self._text[self._at] not in ",]}#\n":
                self._at += 1

    def _comma(self) -> None:
        self._skip_blank()
        if self._text[self._at] == ",":
            self._at += 1

    def _string(self) -> None:
        quote = self._text[self._at]
        if self._text.startswith(quote * 3, self._at):
            self._at += 3
            while not self._text.startswith(quote * 3, self._at):
                self._at += self._step(quote)
            self._at += 3
            # Up to two quotes may stand right before the closing three.
            while self._text.startswith(quote, self._at):
                self._at += 1
            return
        self._at += 1
        while self._text[self._at] != quote:
            self._at += self._step(quote)
        self._at += 1

    def _step(self, quote: str) -> int:
        return 2 if quote == '"' and self._text[self._at] == "\\" else 1

    def _skip_spaces(self) -> None:
        while self._at < len(self._text) and self._text[self._at] in " \t":
            self._at += 1

    def _skip_blank(self) -> bool:
        """Skip spaces, line ends and comments; return whether anything is left."""
        while self._at < len(self._text):
            if self._text[self._at] == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            elif self._text[self._at] in " \t\n":
                self._at += 1
            else:
                return True
        return False

    def _line_now(self) -> int:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line


def _shown(path: KeyPath) -> str:
    shown = ""
    for part in path:
        if isinstance(part, int):
            shown += f"[{part + 1}]"
        else:
            shown += ("." if shown else "") + escaped(part, 64)
    return f", {shown}" if shown else ""


def _syntax(message: str, text: str) -> str:
    if "at end of document" in message:
        return f"line {text.count(chr(10)) + 1}: {escaped(message)}"
    return escaped(message)
