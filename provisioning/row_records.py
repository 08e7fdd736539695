"""A row of the registry as a record of texts, for a CSV or JSONL file, and back.

Rules:

- A record has what is known of an identity, and never a private key: a row has none.
- Times are ISO 8601 with their zone; serial numbers and short octets hex; a certificate is the base64 of its DER,
  as between the lines of a PEM. What is not set is left out.
- In CSV a text that a spreadsheet would take for a formula, because of its first character, has an apostrophe in
  front, and so has one that begins with an apostrophe; reading takes it away again.

Pure.
"""

from __future__ import annotations

import csv
import io
import json
import re
from base64 import b64decode, b64encode
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from birthmark.provisioning.record_files import Columns
from birthmark.provisioning.registry.model import KeyMode, Kind, Row, State

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_TEXTS: Final = (
    "name",
    "role",
    "revocation_reason",
    "batch",
    "label",
    "issuer",
    "anchors",
    "replaces_reason",
    "void_reason",
)
_NUMBERS: Final = ("number", "replaces", "replaced_by", "renews")
_TIMES: Final = ("not_before", "not_after", "revoked_at", "created_at", "changed_at")
_HEX: Final = ("hwid", "txn", "bundle_sha256")
_ENUMS: Final[Mapping[str, Any]] = {"kind": Kind, "state": State, "key_mode": KeyMode}
_BASE64: Final = ("certificate_der", "public_key_der")
_NAMES: Final = {"name": "id", "certificate_der": "certificate", "public_key_der": "public_key"}
"""Fields that a record calls otherwise."""
_ORDER: Final = (
    "number",
    "name",
    "kind",
    "role",
    "state",
    "cert_serial",
    "not_before",
    "not_after",
    "revoked_at",
    "revocation_reason",
    "hwid",
    "batch",
    "label",
    "key_mode",
    "txn",
    "bundle_sha256",
    "issuer",
    "anchors",
    "replaces",
    "replaced_by",
    "renews",
    "replaces_reason",
    "void_reason",
    "created_at",
    "changed_at",
    "certificate_der",
    "public_key_der",
)
_REQUIRED: Final = ("number", "id", "kind", "state", "created_at", "changed_at")
_DIGITS: Final = {10: re.compile("[0-9]{1,18}"), 16: re.compile("[0-9a-f]{1,40}")}
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")
_APOSTROPHE: Final = "'"

COLUMNS: Final = Columns(
    known=tuple(_NAMES.get(field, field) for field in _ORDER), required=_REQUIRED, is_exact=True
)


def to_record(row: Row) -> dict[str, str]:
    """Return what is set in a row, in the order of the columns."""
    return {
        _NAMES.get(field, field): _text_of(field, value)
        for field in _ORDER
        if (value := getattr(row, field)) not in (None, "")
    }


def from_record(record: Mapping[str, str]) -> Row:
    """Return the row of a record.

    Raises:
        ValueError: a field is not written as it should be, or contradicts another one.
        IdentityError: the id or the role is outside its grammar.
    """
    facts: dict[str, Any] = {"role": ""}
    for field in _ORDER:
        text = record.get(_NAMES.get(field, field))
        if text is not None:
            facts[field] = _value_of(field, text)
    return Row(**facts)


def csv_lines(rows: Iterable[Row]) -> Iterator[str]:
    """Yield a heading and a line for each row, with their line ends (RFC 4180)."""
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\r\n")  # RFC 4180; and so a lone CR in a text is quoted, too
    for values in _table(rows):
        writer.writerow(values)
        yield line.getvalue()
        line.seek(0)
        line.truncate()


def jsonl_lines(rows: Iterable[Row]) -> Iterator[str]:
    """Yield an object a row, with its line end."""
    for row in rows:
        yield json.dumps(to_record(row), separators=(",", ":")) + "\n"


def from_cell(text: str) -> str:
    """Return what stands in a cell of a CSV file."""
    return text.removeprefix(_APOSTROPHE)


def _table(rows: Iterable[Row]) -> Iterator[list[str]]:
    yield list(COLUMNS.known)
    for row in rows:
        record = to_record(row)
        yield [_cell(record.get(name, "")) for name in COLUMNS.known]


def _cell(text: str) -> str:
    return _APOSTROPHE + text if text.startswith((*_FORMULA, _APOSTROPHE)) else text


def _text_of(field: str, value: Any) -> str:
    if field in _TIMES:
        return str(value.astimezone(UTC).isoformat())
    if field in _HEX:
        return str(value.hex())
    if field in _BASE64:
        return b64encode(value).decode()
    return f"{value:x}" if field == "cert_serial" else str(value)


def _value_of(field: str, text: str) -> Any:
    try:
        if field in _TEXTS:
            return text
        if field in _NUMBERS:
            return _whole(text, 10)
        if field == "cert_serial":
            return _whole(text, 16)
        if field in _TIMES:
            return _moment(text)
        if field in _HEX:
            return bytes.fromhex(text)
        if field in _BASE64:
            return b64decode(text, validate=True)
        return _ENUMS[field](text)
    except ValueError:
        raise ValueError(f"its {_NAMES.get(field, field)} is not {_wanted(field)}") from None


def _moment(text: str) -> datetime:
    """Read a time; `ValueError` for one before 1970, or that is none in UTC: no CRL can say it."""
    at = datetime.fromisoformat(text)
    try:
        if at.tzinfo is None or at.astimezone(UTC) >= _EPOCH:
            return at
    except OverflowError:
        pass
    raise ValueError(text)


def _wanted(field: str) -> str:
    """Say how a field is written: a spreadsheet may have written it in its own way."""
    if field in _NUMBERS:
        return "a whole number"
    if field in _TIMES:
        return "a time like 2026-11-27T08:30:00+00:00"
    if field in _ENUMS:
        return f"one of {', '.join(one.value for one in _ENUMS[field])}"
    return "base64" if field in _BASE64 else "small hex digits" if field == "cert_serial" else "hex digits"


def _whole(text: str, base: int) -> int:
    if not _DIGITS[base].fullmatch(text):  # `int` takes signs, underscores and prefixes
        raise ValueError(text)
    return int(text, base)
