"""Records from a CSV or a JSONL file that somebody else wrote, each with the line that it begins on.

Rules:

- UTF-8, with or without a byte order mark, with any line ends. A file is CSV or JSONL by the end of its name.
- CSV has a heading that names the columns, in any order, each once and none that is not known. JSONL has an object
  of texts a line. A field that is empty or null is one that is not there.
- Nothing is guessed: what is odd is an error that names the file, the line and what is wrong with it. So nothing
  of a file is used that cannot be used whole.
"""

from __future__ import annotations

import csv
import json
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

from birthmark.device.errors import BirthmarkError, ConfigurationError
from birthmark.device.escape import escaped, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

CSV: Final = ".csv"
JSONL: Final = ".jsonl"
MAX_FIELD_CHARACTERS: Final = 16_384
"""A certificate of 2 KiB and its issuers in PEM are well below it."""
_MAX_LINE_CHARACTERS: Final = 65_536


class Record(NamedTuple):
    """The fields of one record that are not empty, and where it stands: `line 7`."""

    where: str
    fields: dict[str, str]


class Columns(NamedTuple):
    """The fields that a record may have, and those among them that it must have."""

    known: Sequence[str]
    required: Sequence[str]
    is_exact: bool = False
    """Whether the space around a value belongs to it."""


def read_records(path: Path, columns: Columns) -> Iterator[Record]:
    """Yield a file's records in their order.

    Raises:
        ConfigurationError: it cannot be read, or a line of it breaks a rule of this module.
    """
    suffix = path.suffix.lower()
    if suffix not in (CSV, JSONL) and path.exists():
        raise ConfigurationError(
            f"could not read {path}: its name ends neither in {CSV} nor in {JSONL}",
            hint="name the file by what is in it",
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _csv_records(path, file, columns) if suffix == CSV else _jsonl_records(path, file, columns)
    except OSError as error:
        raise ConfigurationError(
            f"could not read {path}: {error.strerror}", hint="check the path and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"could not read {path}: it is not in UTF-8 ({error.reason})",
            hint="save it as UTF-8; nothing of it was used",
        ) from error


@contextmanager
def naming(path: Path, where: str) -> Iterator[None]:
    """Let an error in the block say which record of which file it is about."""
    try:
        yield
    except BirthmarkError as error:
        if isinstance(error, _LineError):
            raise
        raise line_error(path, where, error.message, error.hint) from error


def line_error(path: Path, where: str, cause: str, hint: str = "") -> ConfigurationError:
    """Return the error for a record that cannot be used."""
    place = f"{path}, {where}" if where else str(path)
    return _LineError(
        f"could not use {place}: {cause}", hint=hint or "correct it; nothing of the file was applied"
    )


class _LineError(ConfigurationError):
    """Names the record already."""


def _csv_records(path: Path, file: IO[str], columns: Columns) -> Iterator[Record]:
    reader = csv.reader(_short_lines(path, file), strict=True)
    heading: list[str] | None = None
    line = 1
    try:
        for values in reader:
            where, line = f"line {line}", reader.line_num + 1
            if heading is None:
                heading = [name.strip() for name in values]
                _check_heading(path, heading, columns)
            elif values:
                if len(values) != len(heading):
                    cause = f"it has {len(values)} fields, and the heading names {len(heading)}"
                    raise line_error(path, where, cause)
                yield _record(path, where, dict(zip(heading, values, strict=True)), columns)
    except csv.Error as error:
        raise line_error(path, f"line {line}", f"it is no CSV ({escaped(str(error), 80)})") from error
    if heading is None:
        raise line_error(path, "", "it is empty", f"its first line names the columns: {', '.join(columns.known)}")


def _check_heading(path: Path, heading: list[str], columns: Columns) -> None:
    known = ", ".join(columns.known)
    unknown = [name for name in heading if name not in columns.known]
    if unknown:
        raise line_error(path, "line 1", f"there is no column {quoted(unknown[0], 40)}", f"there are: {known}")
    if len(set(heading)) < len(heading):
        twice = next(name for name in heading if heading.count(name) > 1)
        raise line_error(path, "line 1", f"it names the column {twice} twice")
    missing = [name for name in columns.required if name not in heading]
    if missing:
        raise line_error(path, "line 1", f"it names no column {missing[0]}", f"there are: {known}")


def _jsonl_records(path: Path, file: IO[str], columns: Columns) -> Iterator[Record]:
    for number, text in enumerate(_short_lines(path, file), start=1):
        where = f"line {number}"
        if not text.strip():
            continue
        try:
            fields = _DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            cause = str(error) if isinstance(error, _TwiceError) else "it is no JSON"
            raise line_error(path, where, cause) from error
        if not isinstance(fields, dict):
            raise line_error(path, where, "it is no JSON object")
        for name, value in fields.items():
            if name not in columns.known:
                hint = f"there are: {', '.join(columns.known)}"
                raise line_error(path, where, f"there is no field {quoted(name, 40)}", hint)
            if value is not None and not isinstance(value, str):
                raise line_error(path, where, f"its {name} is no text")
        yield _record(path, where, {name: value or "" for name, value in fields.items()}, columns)


class _TwiceError(ValueError):
    """An object has a name twice: one reader takes the first, another one the last."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError("it names a field twice")
    return found


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_once)


def _record(path: Path, where: str, fields: dict[str, str], columns: Columns) -> Record:
    found = {}
    for name, value in fields.items():
        text = value if columns.is_exact else value.strip()
        if len(text) > MAX_FIELD_CHARACTERS:
            raise line_error(path, where, f"its {name} is longer than {MAX_FIELD_CHARACTERS} characters")
        if not text.isascii() and any("\ud800" <= each <= "\udfff" for each in text):
            raise line_error(path, where, f"its {name} has half a character in it")
        if "\0" in text:
            raise line_error(path, where, f"its {name} has a NUL in it")
        if text:
            found[name] = text
    for name in columns.required:
        if name not in found:
            raise line_error(path, where, f"it has no {name}")
    return Record(where, found)


def _short_lines(path: Path, file: IO[str]) -> Iterator[str]:
    number = 0
    while line := file.readline(_MAX_LINE_CHARACTERS):
        number += 1
        if len(line) == _MAX_LINE_CHARACTERS:
            raise line_error(path, f"line {number}", f"it is longer than {_MAX_LINE_CHARACTERS} characters")
        yield line
