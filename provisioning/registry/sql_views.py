"""What a view or a transaction on a database can be asked: each question one query that an index answers."""

from __future__ import annotations

import json
import re
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Unpack

from sqlalchemy import func, select, text
from sqlalchemy.exc import SQLAlchemyError

from birthmark.device.errors import RegistryError
from birthmark.provisioning.audit import Head
from birthmark.provisioning.registry.content import PROGRAM, STANDING, check_not_moved, damaged
from birthmark.provisioning.registry.sql_schema import (
    BATCHES,
    COUNTERS,
    FORMAT,
    LIVE,
    LOGS,
    META,
    NOTES,
    OF_REVOKED,
    QUARANTINE,
    ROW_COLUMNS,
    ROWS,
    batch_from,
    microseconds,
    quarantined_from,
    revoked_from,
    row_columns,
    row_from,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import ColumnElement
    from sqlalchemy.engine import Connection, CursorResult
    from sqlalchemy.sql.base import Executable

    from birthmark.provisioning.registry.interface import RowFilters
    from birthmark.provisioning.registry.line import Batch, Quarantined
    from birthmark.provisioning.registry.model import RevokedCertificate, Row
    from birthmark.provisioning.registry.sql_database import Database

AT_ONCE: Final = 2000
"""How many values one statement asks for: SQLite takes some ten thousand parameters."""
_HEX: Final = re.compile("[0-9a-f]{1,64}")
_LAST: Final = "\x7f"
"""Above every character of a name."""


class SqlView:
    """One state of the registry (`interface.View`).

    Args:
        database: where it is.
        connection: in a transaction, which the caller ends.
    """

    def __init__(self, database: Database, connection: Connection) -> None:
        self._database = database
        self._connection = connection
        self._is_over = False
        self.standing = ""
        """What the registry says of itself, beyond the usual; known once its format was checked."""

    def end(self) -> None:
        """Let nobody use it any more."""
        self._is_over = True

    def rows(self, **filters: Unpack[RowFilters]) -> list[Row]:
        """Return the rows that fit every given filter, by ascending number (`interface.View.rows`)."""
        return self._rows(*_fitting(**filters))

    def stream(self, **filters: Unpack[RowFilters]) -> Iterator[Row]:
        """Yield them one after the other, as the database gives them (`interface.View.stream`)."""
        for statement in self._database.dialect.wait_long:  # for whoever reads what is made of them
            self.run(text(statement))
        query = select(ROWS).where(*_fitting(**filters)).order_by(ROWS.c.number)
        with self.run(query.execution_options(stream_results=True, yield_per=AT_ONCE)) as records:
            for record in records:
                yield row_from(record)

    def count(self, **filters: Unpack[RowFilters]) -> int:
        """Return how many rows fit every given filter."""
        return int(self.run(select(func.count()).select_from(ROWS).where(*_fitting(**filters))).scalar_one())

    def names(self, *, live: bool = False) -> set[str]:
        """Return every name ever, or only those that live rows hold: from an index, without the rows."""
        query = select(ROWS.c.name_folded)
        return set(self.run(query.where(LIVE) if live else query).scalars().all())

    def row(self, number: int) -> Row | None:
        """Return the row with this number."""
        return next(iter(self._rows(ROWS.c.number == number)), None)

    def numbered(self, numbers: Collection[int]) -> dict[int, Row]:
        """Return the rows with these numbers (`interface.View.numbered`)."""
        found = map(row_from, self.among("number", sorted({*numbers})))
        return {row.number: row for row in found}

    def differing(self, rows: Sequence[Row]) -> set[int]:
        """Return the numbers of the rows that are stored otherwise, or not (`interface.View.differing`).

        What all of them have alike, which is most of it, is the database's to compare.
        """
        if not rows:
            return set()
        alike, own = {}, {}
        for name, values in zip(ROW_COLUMNS, row_columns(rows), strict=True):
            if name != "number" and values.count(values[0]) == len(values):
                alike[name] = values[0]
            else:
                own[name] = values
        numbers = own["number"]  # the first column
        wanted = dict(zip(numbers, zip(*own.values(), strict=True), strict=True))
        found = self.among("number", numbers, columns=own, alike=alike)
        return wanted.keys() - {record[0] for record in found if wanted[record[0]] == tuple(record)}

    def named(self, name: str) -> list[Row]:
        """Return every row ever that had this name (without regard to case), by ascending number."""
        return self._rows(ROWS.c.name_folded == name.lower())

    def live_by_name(self, name: str) -> Row | None:
        """Return the live row that holds this name (without regard to case)."""
        return next((row for row in self.named(name) if row.is_live), None)

    def live_by_names(self, names: Collection[str]) -> dict[str, Row]:
        """Return the live rows that hold these names (`interface.View.live_by_names`)."""
        wanted = sorted({name.lower() for name in names})
        found = map(row_from, self.among("name_folded", wanted))
        return {row.name_folded: row for row in found if row.is_live}

    def live_by_hwid(self, hwid: bytes) -> Row | None:
        """Return the live row that holds this hwid."""
        return next((row for row in self._rows(ROWS.c.hwid == hwid) if row.is_live), None)

    def by_cert_serial(self, cert_serial: int) -> Row | None:
        """Return the row whose certificate has this serial number."""
        return next(iter(self._rows(ROWS.c.cert_serial == f"{cert_serial:x}")), None)

    def by_cert_serials(self, cert_serials: Collection[int]) -> dict[int, Row]:
        """Return the rows with these serial numbers (`interface.View.by_cert_serials`)."""
        wanted = sorted({f"{each:x}" for each in cert_serials})
        found = map(row_from, self.among("cert_serial", wanted))
        return {row.cert_serial: row for row in found if row.cert_serial is not None}

    def by_public_key(self, public_key_der: bytes) -> Row | None:
        """Return the row with this SubjectPublicKeyInfo (DER)."""
        return next(iter(self._rows(ROWS.c.public_key_der == public_key_der)), None)

    def revoked(self) -> list[Row]:
        """Return every row whose certificate is revoked, by ascending number."""
        return self.rows(revoked=True)

    def revocations(self) -> list[RevokedCertificate]:
        """Return what a CRL needs of every certificate that is revoked: from an index, without the rows."""
        columns = [ROWS.c[name] for name in OF_REVOKED]
        query = select(*columns).where(ROWS.c.revoked_at.is_not(None)).order_by(ROWS.c.number)
        return revoked_from(self.run(query).all())

    def batches(self) -> list[Batch]:
        """Return every batch, the oldest first."""
        return [batch_from(record) for record in self.records(select(BATCHES).order_by(BATCHES.c.number))]

    def open_batch(self) -> Batch | None:
        """Return the batch that is open."""
        return next((batch for batch in self.batches() if batch.closed_at is None), None)

    def quarantined(self) -> list[Quarantined]:
        """Return every unit in quarantine, the oldest first."""
        found = self.records(select(QUARANTINE).order_by(QUARANTINE.c.number))
        return [quarantined_from(record) for record in found]

    def counter(self, name: str) -> int:
        """Return a counter's value; 0 if it was never set."""
        value = self.run(select(COUNTERS.c.value).where(COUNTERS.c.name == name)).scalar()
        if value is None:
            return 0
        if not isinstance(value, str) or not _HEX.fullmatch(value):
            raise damaged(f"its counter {name}")
        return int(value, 16)

    def notes(self, topic: str) -> dict[str, dict[str, Any]]:
        """Return everything noted under a topic, by key (`interface.View.notes`)."""
        found = self.records(select(NOTES).where(NOTES.c.topic == topic).order_by(NOTES.c.number))
        return {record["key"]: note_from(topic, record["note"]) for record in found}

    def head(self, log: str) -> Head:
        """Return the last entry of an audit log, as the registry remembers it."""
        found = self.records(select(LOGS).where(LOGS.c.log == log))
        return Head(found[0]["seq"], found[0]["hash"]) if found else Head()

    def check_format(self) -> None:
        """Check that this is a registry of ours, in a format that is known; the first question to ask.

        Raises:
            RegistryError: it is not.
        """
        facts = {record["name"]: record["value"] for record in self.records(select(META))}
        where = f"could not read the registry {self._database.shown}"
        check_not_moved(facts.get(STANDING), self._database.shown)
        self.standing = str(facts.get(STANDING, ""))
        version = facts.get("format", "")
        if facts.get("program") != PROGRAM or not version.isdecimal() or int(version) < 1:
            raise RegistryError(f"{where}: it is no registry of birthmark's", hint="nothing was changed")
        if int(version) > FORMAT:
            raise RegistryError(
                f"{where}: it has format {version}, this birthmark knows {FORMAT}",
                hint="a newer birthmark wrote it: update this one",
            )

    def among(
        self,
        column: str,
        values: Collection[Any],
        *,
        columns: Iterable[str] = ROW_COLUMNS,
        alike: Mapping[str, Any] = MappingProxyType({}),
    ) -> Iterator[Sequence[Any]]:
        """Yield what is stored of rows that have one of these values, as it is stored, in a column.

        In the words of the driver: to write a list of thousands takes SQLAlchemy longer than to look takes SQLite.

        Args:
            column: the column's name.
            values: any of these.
            columns: what is wanted of each row.
            alike: what else they have, as it is stored, by column.
        """
        mark = self._database.dialect.mark
        tests = [f"{name} IS NULL" if value is None else f"{name} = {mark}" for name, value in alike.items()]
        given = tuple(value for value in alike.values() if value is not None)
        query = f"SELECT {', '.join(columns)} FROM {ROWS.name} WHERE"  # noqa: S608 - names of ours
        wanted = tuple(values)
        for start in range(0, len(wanted), AT_ONCE):
            some = wanted[start : start + AT_ONCE]
            among = f"{column} IN ({', '.join([mark] * len(some))})"
            yield from self.run_text(f"{query} {' AND '.join([*tests, among])}", (*given, *some)).all()

    def _rows(self, *tests: ColumnElement[bool]) -> list[Row]:
        return [row_from(record) for record in self.run(select(ROWS).where(*tests).order_by(ROWS.c.number)).all()]

    def records(self, statement: Executable) -> Sequence[Any]:
        """Return what a query finds; `RegistryError` if the database cannot answer."""
        return self.run(statement).mappings().all()

    def run(self, statement: Executable, parameters: Any = None) -> CursorResult[Any]:
        """Run a statement; `RegistryError` if the database cannot."""
        if self._is_over:
            raise RuntimeError("a transaction was used after its end")
        try:
            return self._connection.execute(statement, parameters)
        except SQLAlchemyError as error:
            raise self._failed(self._database.failure(error)) from error
        except UnicodeEncodeError:  # no stored text has half a character in it; an argument of a command's may
            cause = "could not ask the registry: what it was asked for is no text"
            raise self._failed(RegistryError(cause, hint="check how the name, role or batch is written")) from None

    def run_text(self, statement: str, parameters: Any = None) -> CursorResult[Any]:
        """Run a statement in the driver's own words; `RegistryError` if the database cannot."""
        if self._is_over:
            raise RuntimeError("a transaction was used after its end")
        try:
            return self._connection.exec_driver_sql(statement, parameters)
        except SQLAlchemyError as error:
            raise self._failed(self._database.failure(error)) from error

    def _failed(self, error: RegistryError) -> RegistryError:
        """Take note of what a statement failed with."""
        return error


def note_from(topic: str, text: str) -> dict[str, Any]:
    """Return a stored note; `RegistryError` if it is damaged."""
    try:
        note = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        note = None
    if not isinstance(note, dict):
        raise damaged(f"what it notes of {topic}")
    return note


def _fitting(**filters: Unpack[RowFilters]) -> list[ColumnElement[bool]]:
    """Return what is true of a row that fits every given filter."""
    tests: list[ColumnElement[bool]] = []
    if (kind := filters.get("kind")) is not None:
        tests.append(ROWS.c.kind == kind.value)
    if (states := filters.get("states")) is not None:
        tests.append(ROWS.c.state.in_(sorted(state.value for state in states)))
    if (role := filters.get("role")) is not None:
        tests.append(ROWS.c.role == role)
    if (batch := filters.get("batch")) is not None:
        tests.append(ROWS.c.batch == batch)
    if (name_glob := filters.get("name_glob")) is not None:
        tests += _named_like(name_glob.lower())
    if (expires_before := filters.get("expires_before")) is not None:
        tests.append(ROWS.c.not_after < microseconds(expires_before))
    if (revoked := filters.get("revoked")) is not None:
        tests.append(ROWS.c.revoked_at.is_not(None) if revoked else ROWS.c.revoked_at.is_(None))
    return tests


def _named_like(pattern: str) -> Iterator[ColumnElement[bool]]:
    """Yield what is true of a folded name that fits a pattern of `*` and `?`; an index knows its beginning."""
    beginning = re.split(r"[*?]", pattern, maxsplit=1)[0]
    if beginning:
        yield ROWS.c.name_folded >= beginning
        yield ROWS.c.name_folded < beginning + _LAST
    escaped = re.sub(r"([\\%_])", r"\\\1", pattern).replace("*", "%").replace("?", "_")
    yield ROWS.c.name_folded.like(escaped, escape="\\")
