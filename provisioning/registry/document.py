"""A row, a batch, a unit in quarantine as a JSON document, and back.

Binary fields are base64, times ISO 8601 in UTC, serial numbers hex (they exceed 64 bits). A field that is unset
is left out. `name_folded` is stored for queries. Fields of a newer birthmark are ignored here, and kept by an
update because an update changes only the fields it names.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from dataclasses import fields
from datetime import UTC, datetime
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, TypeVar

from birthmark.device.errors import BirthmarkError, RegistryError
from birthmark.provisioning.registry.line import Batch, Quarantined
from birthmark.provisioning.registry.model import KeyMode, Kind, RevokedCertificate, Row, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_BINARY: Final = ("hwid", "txn", "public_key_der", "certificate_der", "bundle", "bundle_sha256", "active_txn")
_ROW_TIMES: Final = ("created_at", "changed_at", "not_before", "not_after", "revoked_at")
_TIMES: Final = (*_ROW_TIMES, "opened_at", "closed_at", "since")
_ENUMS: Final = {"kind": Kind, "state": State, "key_mode": KeyMode}
_NUMBERS: Final = frozenset({"replaces", "replaced_by", "renews"})
_NAMES: Final = tuple(name for name in Row._fields if name != "number")
_REVOKED: Final = tuple(name for name in RevokedCertificate._fields if name != "number")
_QUARANTINED: Final = tuple(field.name for field in fields(Quarantined))
_T = TypeVar("_T")


def binary(value: bytes) -> str:
    """Return bytes as they are stored."""
    return b64encode(value).decode()


def to_document(row: Row) -> dict[str, Any]:
    """Return the row's document. An unset field is None there: an update has to overwrite what was set."""
    document = row._asdict()
    del document["number"]
    for name, write in _ROW_WRITERS:
        if document[name] is not None:
            document[name] = write(document[name])
    document["name_folded"] = row.name_folded
    return document


def from_document(number: int, document: dict[str, Any]) -> Row:
    """Return the row of a document.

    Raises:
        RegistryError: the document is damaged.
    """

    def read() -> Row:
        row = Row(number=number, **_values(document, _NAMES))
        if document.get("name_folded") != row.name_folded:
            raise ValueError("its two names differ")
        return row

    return _read(f"row {number}", read)


def revoked_from(number: int, document: dict[str, Any]) -> RevokedCertificate:
    """Return what a CRL needs to know of a row's document.

    Raises:
        RegistryError: the document is damaged.
    """

    def read() -> RevokedCertificate:
        unset: dict[str, Any] = {"issuer": "", "not_after": None}
        return RevokedCertificate(number, **unset | _values(document, _REVOKED)).checked()

    return _read(f"row {number}", read)


def batch_document(batch: Batch) -> dict[str, Any]:
    """Return the batch's document."""
    return {
        "name": batch.name,
        "name_folded": batch.name.lower(),
        "opened_at": encoded("opened_at", batch.opened_at),
        "closed_at": encoded("closed_at", batch.closed_at),
    }


def batch_from(document: dict[str, Any]) -> Batch:
    """Return the batch of a document.

    Raises:
        RegistryError: the document is damaged.
    """
    return _read("a batch", lambda: Batch(**_values(document, ("name", "opened_at", "closed_at"))))


def quarantined_document(unit: Quarantined) -> dict[str, Any]:
    """Return the document of a unit in quarantine."""
    return {name: encoded(name, getattr(unit, name)) for name in _QUARANTINED}


def quarantined_from(document: dict[str, Any]) -> Quarantined:
    """Return the unit in quarantine of a document.

    Raises:
        RegistryError: the document is damaged.
    """
    return _read("a unit in quarantine", lambda: Quarantined(**_values(document, _QUARANTINED)))


def _values(document: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: _decoded(name, document[name]) for name in names if document.get(name) is not None}


def _read(what: str, make: Callable[[], _T]) -> _T:
    try:
        return make()
    except (TypeError, ValueError, BirthmarkError) as error:
        raise RegistryError(
            f"could not read {what} of the registry: {error}",
            hint="the file is damaged; restore it from a backup, together with the audit log",
        ) from error


def encoded(name: str, value: Any) -> Any:
    """Return a field's value as it is stored."""
    write = None if value is None else _WRITERS.get(name)
    return value if write is None else write(value)


@lru_cache(256)
def _time_text(moment: datetime) -> str:
    # Most of what many rows take: all that are made or changed at once have the same times.
    return moment.astimezone(UTC).isoformat()


_WRITERS: Final[dict[str, Callable[[Any], str]]] = {
    **dict.fromkeys(_BINARY, binary),
    **dict.fromkeys(_TIMES, _time_text),
    **dict.fromkeys(_ENUMS, attrgetter("value")),
    "cert_serial": "{:x}".format,
}
"""How a value is stored that JSON has no form for."""
_ROW_WRITERS: Final = tuple((name, _WRITERS[name]) for name in _NAMES if name in _WRITERS)


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
