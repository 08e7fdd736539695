"""A row as a JSON document, and back.

Binary fields are base64, times ISO 8601 in UTC, serial numbers hex (they exceed 64 bits). A field that is unset
is left out. `name_folded` is stored for queries. Fields of a newer birthmark are ignored here, and kept by an
update because an update changes only the fields it names.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, Final

from birthmark.device.errors import BirthmarkError, RegistryError
from birthmark.provisioning.registry.model import KeyMode, Kind, Row, State

_BINARY: Final = frozenset({"hwid", "txn", "public_key_der", "certificate_der", "bundle", "bundle_sha256"})
_TIMES: Final = frozenset({"created_at", "changed_at", "not_before", "not_after", "revoked_at"})
_ENUMS: Final = {"kind": Kind, "state": State, "key_mode": KeyMode}
_NUMBERS: Final = frozenset({"replaces", "replaced_by"})
_NAMES: Final = tuple(field.name for field in fields(Row) if field.name != "number")


def binary(value: bytes) -> str:
    """Return bytes as they are stored."""
    return b64encode(value).decode()


def to_document(row: Row) -> dict[str, Any]:
    """Return the row's document. An unset field is None there: an update has to overwrite what was set."""
    document: dict[str, Any] = {"name_folded": row.name_folded}
    for name in _NAMES:
        document[name] = _encoded(name, getattr(row, name))
    return document


def from_document(number: int, document: dict[str, Any]) -> Row:
    """Return the row of a document.

    Raises:
        RegistryError: the document is damaged.
    """
    try:
        values = {name: _decoded(name, document[name]) for name in _NAMES if document.get(name) is not None}
        return Row(number=number, **values)
    except (TypeError, ValueError, BirthmarkError) as error:
        raise RegistryError(
            f"could not read row {number} of the registry: {error}",
            hint="the file is damaged; restore it from a backup, together with the audit log",
        ) from error


def _encoded(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in _BINARY:
        return binary(value)
    if name in _TIMES:
        return value.astimezone(UTC).isoformat()
    if name == "cert_serial":
        return f"{value:x}"
    if name in _ENUMS:
        return value.value
    return value


def _decoded(name: str, value: Any) -> Any:
    if name in _NUMBERS:
        return _whole(value)
    if not isinstance(value, str):
        raise TypeError(f"{name} is no text")
    if name in _BINARY:
        return b64decode(value, validate=True)
    if name in _TIMES:
        return datetime.fromisoformat(value)
    if name == "cert_serial":
        return int(value, 16)
    if name in _ENUMS:
        return _ENUMS[name](value)
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r:.20} is no whole number")
    return value
