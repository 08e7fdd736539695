"""The tables of a registry in a database, and a row, a batch, a unit in quarantine as records of them.

Rules:

- Times are microseconds since 1970 in UTC (`to_timestamp(not_after / 1e6)` in psql), so that their order is that
  of numbers in every database; serial numbers and counters are hex, because they exceed 64 bits.
- What the rules of the registry hold to be unique (`interface`) is a unique index here, too: a program that goes
  past the rules is refused by the database.
- `birthmark_meta` says what this is, and in which format; a newer format is refused. An older one is brought up to
  date where the tables are changed, never by a reader.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import compress
from operator import attrgetter, ne
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy import BigInteger, Column, LargeBinary, MetaData, Table, Text, UniqueConstraint, text

from birthmark.device.errors import BirthmarkError, RegistryError
from birthmark.provisioning.registry.line import Batch, Quarantined
from birthmark.provisioning.registry.model import REVOKED_AT_HAND, KeyMode, Kind, RevokedCertificate, Row, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

FORMAT: Final = 1
METADATA: Final = MetaData()
_ASCII: Final = Text().with_variant(Text(collation="C"), "postgresql")
"""Text whose order is that of its octets: a name's beginning is found by an index."""

META: Final = Table(
    "birthmark_meta",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)
COUNTERS: Final = Table(
    "birthmark_counters",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)
ROWS: Final = Table(
    "birthmark_rows",
    METADATA,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("name_folded", _ASCII, nullable=False),
    Column("role", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("changed_at", BigInteger, nullable=False),
    Column("key_mode", Text),
    Column("hwid", LargeBinary),
    Column("txn", LargeBinary),
    Column("public_key_der", LargeBinary),
    Column("cert_serial", Text),
    Column("issuer", Text, nullable=False),
    Column("anchors", Text, nullable=False),
    Column("certificate_der", LargeBinary),
    Column("bundle", LargeBinary),
    Column("bundle_sha256", LargeBinary),
    Column("replaces", BigInteger),
    Column("replaced_by", BigInteger),
    Column("renews", BigInteger),
    Column("replaces_reason", Text, nullable=False),
    Column("batch", Text, nullable=False),
    Column("label", Text, nullable=False),
    Column("void_reason", Text, nullable=False),
    Column("not_before", BigInteger),
    Column("not_after", BigInteger),
    Column("revoked_at", BigInteger),
    Column("revocation_reason", Text, nullable=False),
)
BATCHES: Final = Table(
    "birthmark_batches",
    METADATA,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("name", Text, nullable=False),
    Column("name_folded", _ASCII, nullable=False, unique=True),
    Column("opened_at", BigInteger, nullable=False),
    Column("closed_at", BigInteger),
)
QUARANTINE: Final = Table(
    "birthmark_quarantine",
    METADATA,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("hwid", LargeBinary, nullable=False, unique=True),
    Column("since", BigInteger, nullable=False),
    Column("name", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("active_txn", LargeBinary, nullable=False),
)
NOTES: Final = Table(
    "birthmark_notes",
    METADATA,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("topic", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("note", Text, nullable=False),
    UniqueConstraint("topic", "key"),
)
LOGS: Final = Table(
    "birthmark_audit_logs",
    METADATA,
    Column("log", Text, primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("hash", Text, nullable=False),
)
"""The last entry of each station's audit log: stations that share a registry have a log each."""
OUTBOX: Final = Table(
    "birthmark_audit_outbox",
    METADATA,
    Column("log", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("line", Text, nullable=False),
)

_IS_LIVE: Final = "state <> 'VOID' AND replaced_by IS NULL AND (renews IS NULL OR state = 'ATTESTED')"
LIVE: Final = text(_IS_LIVE)
"""`Row.is_live`, for the database."""
OF_REVOKED: Final = ("number", "cert_serial", "issuer", "not_after", "revoked_at", "revocation_reason")
"""The columns that a CRL is made from; they are in an index, so that it is read and not the rows."""
# In words that both databases understand: SQLAlchemy's objects for partial ones load both dialects, and every
# command would wait for that.
INDEXES: Final = (
    f"CREATE UNIQUE INDEX birthmark_live_name ON birthmark_rows (name_folded) WHERE {_IS_LIVE}",
    f"CREATE UNIQUE INDEX birthmark_live_hwid ON birthmark_rows (hwid) WHERE hwid IS NOT NULL AND {_IS_LIVE}",
    "CREATE UNIQUE INDEX birthmark_public_key ON birthmark_rows (public_key_der)",
    "CREATE UNIQUE INDEX birthmark_cert_serial ON birthmark_rows (cert_serial)",
    "CREATE INDEX birthmark_name ON birthmark_rows (name_folded, number)",
    "CREATE INDEX birthmark_hwid ON birthmark_rows (hwid) WHERE hwid IS NOT NULL",
    "CREATE INDEX birthmark_unfinished ON birthmark_rows (number) WHERE state NOT IN ('ATTESTED', 'VOID')",
    f"CREATE INDEX birthmark_revoked ON birthmark_rows ({', '.join(OF_REVOKED)}) WHERE revoked_at IS NOT NULL",
    "CREATE INDEX birthmark_batch ON birthmark_rows (batch, number) WHERE batch <> ''",
    "CREATE INDEX birthmark_not_after ON birthmark_rows (not_after) WHERE not_after IS NOT NULL",
)
"""Made with the tables, and gone with them. Of what is often unset there is only what is set: nobody looks for the
rest, which would be written with each row."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_TIMES: Final = frozenset({"created_at", "changed_at", "not_before", "not_after", "revoked_at", "opened_at"}) | {
    "closed_at",
    "since",
}
ROW_COLUMNS: Final = tuple(column.name for column in ROWS.c)
_NAME_FOLDED: Final = ROW_COLUMNS.index("name_folded")
"""The one column that is no field: without it, columns and fields are the same and in the same order."""
_KIND, _STATE, _KEY_MODE, _CERT_SERIAL = (
    Row._fields.index(name) for name in ("kind", "state", "key_mode", "cert_serial")
)
_ROW_TIMES: Final = tuple(place for place, name in enumerate(Row._fields) if name in _TIMES)
_OF_BATCH: Final = ("name", "opened_at", "closed_at")
_OF_QUARANTINED: Final = ("hwid", "since", "name", "reason", "active_txn")
_DAMAGED: Final = (TypeError, ValueError, AttributeError, BirthmarkError)
"""What reading a record of other values than ours ends in."""
_T = TypeVar("_T")


def microseconds(moment: datetime) -> int:
    """Return a time as it is stored."""
    return (moment - _EPOCH) // _MICROSECOND


_WRITERS: Final[dict[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(("kind", "state", "key_mode"), attrgetter("value")),
    **dict.fromkeys(_TIMES, microseconds),
    "cert_serial": "{:x}".format,
}
"""How a value is stored that the databases have no form for in common."""
_ROW_WRITERS: Final = tuple((name, write) for name, write in _WRITERS.items() if name in Row._fields)


def row_columns(rows: Sequence[Row]) -> list[Sequence[Any]]:
    """Return what is stored of rows, one at least, in each column of `ROWS`."""
    columns = _stored(zip(Row._fields, zip(*rows, strict=True), strict=True))
    columns.insert(_NAME_FOLDED, [row.name_folded for row in rows])
    return columns


def row_record(row: Row) -> dict[str, Any]:
    """Return the row as a record of `ROWS`."""
    record = {**row._asdict(), "name_folded": row.name_folded}
    for name, write in _ROW_WRITERS:
        if record[name] is not None:
            record[name] = write(record[name])
    return record


def changed_values(changes: Iterable[tuple[Row, Row]]) -> dict[tuple[str, ...], list[tuple[Any, ...]]]:
    """Return what is to be written of rows that change, each as it is stored and as it is to be.

    By the columns that change, in their order, are the values there of each row and, last, its number. A row's
    name never changes.
    """
    alike: dict[tuple[bool, ...], list[Sequence[Any]]] = {}
    for old, new in changes:
        differs = tuple(map(ne, old, new))
        if any(differs):
            alike.setdefault(differs, []).append((*compress(new, differs), new.number))
    found = {}
    for differs, records in alike.items():
        names = tuple(compress(Row._fields, differs))
        columns = _stored(zip((*names, "number"), zip(*records, strict=True), strict=True))
        found[names] = list(zip(*columns, strict=True))
    return found


def _stored(columns: Iterable[tuple[str, Sequence[Any]]]) -> list[Sequence[Any]]:
    """Return the values of many rows in each of these fields as they are stored.

    A column at a time: nearly all of it is the same value over and over, or stored as it is.
    """
    stored: list[Sequence[Any]] = []
    for name, values in columns:
        write = _WRITERS.get(name)
        if write is None:
            stored.append(values)
        elif name == "cert_serial":  # no two are the same
            stored.append([None if value is None else write(value) for value in values])
        else:
            written = {value: write(value) for value in {*values} - {None}}
            stored.append([written.get(value) for value in values])
    return stored


def row_from(record: Sequence[Any]) -> Row:
    """Return the row of a record of `ROWS`, whose values are in the order of the columns.

    Raises:
        RegistryError: the record is damaged.
    """

    def read() -> Row:
        values = list(record)
        name_folded = values.pop(_NAME_FOLDED)
        values[_KIND], values[_STATE] = Kind(values[_KIND]), State(values[_STATE])
        if values[_KEY_MODE] is not None:
            values[_KEY_MODE] = KeyMode(values[_KEY_MODE])
        if values[_CERT_SERIAL] is not None:
            values[_CERT_SERIAL] = int(values[_CERT_SERIAL], 16)
        for place in _ROW_TIMES:
            if values[place] is not None:
                values[place] = moment_from(values[place])
        row = Row(*values)
        if name_folded != row.name_folded:
            raise ValueError("its two names differ")
        return row

    return _read(f"row {record[0]}", read)


def revoked_from(records: Iterable[Any]) -> list[RevokedCertificate]:
    """Return what a CRL needs to know, from the columns `OF_REVOKED`; `RegistryError` if a record is damaged."""
    found: list[RevokedCertificate] = []
    number = None
    try:
        for record in records:
            number = record[0]
            found.append(_revoked(record))
    except _DAMAGED as error:
        raise _damaged(f"row {number}", error) from error
    return found


@lru_cache(REVOKED_AT_HAND)
def _revoked(record: tuple[Any, ...]) -> RevokedCertificate:
    number, cert_serial, issuer, not_after, revoked_at, reason = record
    ends = None if not_after is None else moment_from(not_after)
    read = RevokedCertificate(number, int(cert_serial, 16), issuer, ends, moment_from(revoked_at), reason)
    return read.checked()


def batch_record(batch: Batch) -> dict[str, Any]:
    """Return the batch as a record of `BATCHES`, but for its number."""
    record = {name: getattr(batch, name) for name in _OF_BATCH}
    return _with_times({**record, "name_folded": batch.name.lower()})


def batch_from(record: Mapping[str, Any]) -> Batch:
    """Return the batch of a record; `RegistryError` if it is damaged."""
    return _read("a batch", lambda: Batch(**_plain(record, _OF_BATCH)))


def quarantined_record(unit: Quarantined) -> dict[str, Any]:
    """Return the unit as a record of `QUARANTINE`, but for its number."""
    return _with_times({name: getattr(unit, name) for name in _OF_QUARANTINED})


def quarantined_from(record: Mapping[str, Any]) -> Quarantined:
    """Return the unit of a record; `RegistryError` if it is damaged."""
    return _read("a unit in quarantine", lambda: Quarantined(**_plain(record, _OF_QUARANTINED)))


def moment_from(value: Any) -> datetime:
    """Return a stored time; `ValueError` or `TypeError` if it is none."""
    if type(value) is not int:
        raise TypeError("a time is no whole number")
    try:
        return _EPOCH + timedelta(0, 0, value)
    except OverflowError as error:
        raise ValueError("a time is out of range") from error


def _with_times(record: dict[str, Any]) -> dict[str, Any]:
    for name in _TIMES & record.keys():
        if record[name] is not None:
            record[name] = microseconds(record[name])
    return record


def _plain(record: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: record[name] for name in names}
    for name in _TIMES & values.keys():
        if values[name] is not None:
            values[name] = moment_from(values[name])
    return values


def _read(what: str, make: Callable[[], _T]) -> _T:
    try:
        return make()
    except _DAMAGED as error:
        raise _damaged(what, error) from error


def _damaged(what: str, error: Exception) -> RegistryError:
    return RegistryError(
        f"could not read {what} of the registry: {error}",
        hint="the database is damaged; restore it from a backup, together with the audit log",
    )
