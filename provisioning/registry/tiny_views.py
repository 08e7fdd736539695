"""What a view or a transaction on TinyDB can be asked.

Document ids are row numbers of ours; TinyDB's query cache is off: it outlives changes by other processes.
"""

from __future__ import annotations

import re
from datetime import UTC
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack, cast

from tinydb import TinyDB, where

from birthmark.provisioning.registry.content import (
    BATCHES,
    META,
    META_ID,
    NOTES,
    QUARANTINE,
    ROWS,
    damaged,
)
from birthmark.provisioning.registry.document import (
    batch_from,
    binary,
    from_document,
    quarantined_from,
    revoked_from,
    to_document,
)
from birthmark.provisioning.registry.model import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from tinydb.table import Table

    from birthmark.provisioning.registry.interface import RowFilters
    from birthmark.provisioning.registry.line import Batch, Quarantined
    from birthmark.provisioning.registry.model import RevokedCertificate
    from birthmark.provisioning.registry.storage import TransactionStorage

    _Test: TypeAlias = Callable[[dict[str, Any]], bool]

_HEX = re.compile("[0-9a-f]{1,64}")
_UNSET = dict.fromkeys(Row._fields)
"""A document of nothing: a field that is unset may be left out of one."""


class TinyView:
    """One state of the registry (`interface.View`)."""

    def __init__(self, storage: TransactionStorage) -> None:
        database = TinyDB(storage=lambda: storage)
        self._storage = storage
        self._rows = _table(database, ROWS)
        self._meta = _table(database, META)
        self._batches = _table(database, BATCHES)
        self._quarantine = _table(database, QUARANTINE)
        self._notes = _table(database, NOTES)

    def rows(self, **filters: Unpack[RowFilters]) -> list[Row]:
        """Return the rows that fit every given filter, by ascending number (`interface.View.rows`)."""
        return self._search(_fitting(**filters))

    def stream(self, **filters: Unpack[RowFilters]) -> Iterator[Row]:
        """Yield them one after the other (`interface.View.stream`); their documents are in memory anyway."""
        for number, facts in self._found(_fitting(**filters)):
            yield from_document(number, facts)

    def count(self, **filters: Unpack[RowFilters]) -> int:
        """Return how many rows fit every given filter."""
        fits = _fitting(**filters)
        return sum(fits(facts) for _, facts in self._stored_rows())

    def names(self, *, live: bool = False) -> set[str]:
        """Return every name ever, or only those that live rows hold (`interface.View.names`)."""
        if live:
            return {row.name_folded for row in self.rows() if row.is_live}
        return {facts["name_folded"] for _, facts in self._stored_rows()}

    def row(self, number: int) -> Row | None:
        """Return the row with this number."""
        document = self._rows.get(doc_id=number)
        return None if document is None else from_document(number, document)

    def numbered(self, numbers: Collection[int]) -> dict[int, Row]:
        """Return the rows with these numbers (`interface.View.numbered`)."""
        return {number: row for number in numbers if (row := self.row(number)) is not None}

    def differing(self, rows: Sequence[Row]) -> set[int]:
        """Return the numbers of the rows that are stored otherwise, or not (`interface.View.differing`)."""
        stored = self._storage.read().get(ROWS, {})
        return {
            row.number
            for row in rows
            if not to_document(row).items() <= (_UNSET | stored.get(str(row.number), {})).items()
        }

    def named(self, name: str) -> list[Row]:
        """Return every row ever that had this name (without regard to case), by ascending number."""
        return self._having("name_folded", name.lower())

    def live_by_name(self, name: str) -> Row | None:
        """Return the live row that holds this name (without regard to case)."""
        return next((row for row in self.named(name) if row.is_live), None)

    def live_by_names(self, names: Collection[str]) -> dict[str, Row]:
        """Return the live rows that hold these names (`interface.View.live_by_names`)."""
        wanted = {name.lower() for name in names}
        found = self._search(lambda facts: facts.get("name_folded") in wanted)
        return {row.name_folded: row for row in found if row.is_live}

    def live_by_hwid(self, hwid: bytes) -> Row | None:
        """Return the live row that holds this hwid."""
        return next((row for row in self._having("hwid", binary(hwid)) if row.is_live), None)

    def by_cert_serial(self, cert_serial: int) -> Row | None:
        """Return the row whose certificate has this serial number."""
        return next(iter(self._having("cert_serial", f"{cert_serial:x}")), None)

    def by_cert_serials(self, cert_serials: Collection[int]) -> dict[int, Row]:
        """Return the rows with these serial numbers (`interface.View.by_cert_serials`)."""
        wanted = {f"{each:x}" for each in cert_serials}
        found = self._search(lambda facts: facts.get("cert_serial") in wanted)
        return {row.cert_serial: row for row in found if row.cert_serial is not None}

    def by_public_key(self, public_key_der: bytes) -> Row | None:
        """Return the row with this SubjectPublicKeyInfo (DER)."""
        return next(iter(self._having("public_key_der", binary(public_key_der))), None)

    def revoked(self) -> list[Row]:
        """Return every row whose certificate is revoked, by ascending number."""
        return self.rows(revoked=True)

    def revocations(self) -> list[RevokedCertificate]:
        """Return what a CRL needs of every certificate that is revoked, by ascending number of its row."""
        found = [
            (int(number), facts) for number, facts in self._stored_rows() if facts.get("revoked_at") is not None
        ]
        return [revoked_from(number, facts) for number, facts in sorted(found, key=lambda one: one[0])]

    def counter(self, name: str) -> int:
        """Return a counter's value; 0 if it was never set."""
        value = self._facts().get(f"counter {name}", "0")
        if not isinstance(value, str) or not _HEX.fullmatch(value):
            raise damaged(f"its counter {name}")
        return int(value, 16)

    def batches(self) -> list[Batch]:
        """Return every batch, the oldest first."""
        return [batch_from(found) for found in sorted(self._batches.all(), key=lambda one: one.doc_id)]

    def open_batch(self) -> Batch | None:
        """Return the batch that is open."""
        return next((batch for batch in self.batches() if batch.closed_at is None), None)

    def quarantined(self) -> list[Quarantined]:
        """Return every unit in quarantine, the oldest first."""
        return [quarantined_from(found) for found in sorted(self._quarantine.all(), key=lambda one: one.doc_id)]

    def notes(self, topic: str) -> dict[str, dict[str, Any]]:
        """Return everything noted under a topic, by key (`interface.View.notes`)."""
        found = self._notes.search(where("topic") == topic)
        if not all(isinstance(hit.get("key"), str) and isinstance(hit.get("note"), dict) for hit in found):
            raise damaged(f"what it notes of {topic}")
        return {hit["key"]: dict(hit["note"]) for hit in sorted(found, key=lambda one: one.doc_id)}

    def _facts(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self._meta.get(doc_id=META_ID))

    def _having(self, key: str, value: str) -> list[Row]:
        """Return the rows with this stored value, by ascending number."""
        return self._search(lambda facts: facts.get(key) == value)

    def _stored_rows(self) -> Iterable[tuple[str, dict[str, Any]]]:
        return self._storage.tables.get(ROWS, {}).items()

    def _search(self, fits: _Test) -> list[Row]:
        """Return the rows whose document fits, by ascending number."""
        return [from_document(number, facts) for number, facts in self._found(fits)]

    def _found(self, fits: _Test) -> list[tuple[int, dict[str, Any]]]:
        """Return the documents of rows that fit, by ascending number.

        Past TinyDB's queries: they make an object of every row that they look at, and cost ten times as much.
        """
        found = [(int(number), facts) for number, facts in self._stored_rows() if fits(facts)]
        return sorted(found, key=lambda one: one[0])


def _fitting(**filters: Unpack[RowFilters]) -> _Test:
    """Return what tells a document that fits every given filter."""
    tests: list[_Test] = []
    if (kind := filters.get("kind")) is not None:
        tests.append(lambda facts: bool(facts["kind"] == kind.value))
    if (states := filters.get("states")) is not None:
        wanted = {state.value for state in states}
        tests.append(lambda facts: facts["state"] in wanted)
    if (role := filters.get("role")) is not None:
        tests.append(lambda facts: bool(facts["role"] == role))
    if (batch := filters.get("batch")) is not None:
        tests.append(lambda facts: (facts.get("batch") or "") == batch)
    if (name_glob := filters.get("name_glob")) is not None:
        pattern = _glob(name_glob)
        tests.append(lambda facts: pattern.fullmatch(facts["name_folded"]) is not None)
    if (expires_before := filters.get("expires_before")) is not None:
        end = expires_before.astimezone(UTC).isoformat()  # as stored: the order of texts is that of times
        tests.append(lambda facts: facts.get("not_after") is not None and facts["not_after"] < end)
    if (revoked := filters.get("revoked")) is not None:
        tests.append(lambda facts: (facts.get("revoked_at") is not None) == revoked)
    return lambda facts: all(test(facts) for test in tests)


def _glob(pattern: str) -> re.Pattern[str]:
    """Return what a pattern of `*` and `?` stands for, to be matched with a folded name."""
    return re.compile(re.escape(pattern.lower()).replace(r"\*", ".*").replace(r"\?", "."), re.DOTALL)


def _table(database: TinyDB, name: str) -> Table:
    return database.table(name, cache_size=0)
