"""Everything that a registry holds, as documents: the form in which it is backed up and moved between back ends.

Rules:

- A document is what TinyDB's back end stores (`document`), without fields that are unset; its place is a table and
  a number. They come in the order of `TABLES`, by ascending number: two registries hold the same exactly if their
  digests are the same.
- Documents are passed on one by one; no registry needs to fit into memory for another's sake.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson

from birthmark.device.errors import RegistryError
from birthmark.provisioning.audit import GENESIS, Head
from birthmark.provisioning.registry.document import from_document, to_document

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import IO, TypeAlias

Tables: TypeAlias = "dict[str, dict[str, dict[str, Any]]]"
"""What TinyDB stores: documents by id (as text), by table."""

PROGRAM: Final = "birthmark registry"
FORMAT: Final = 1
"""Of a `registry.json`."""
META: Final = "meta"
ROWS: Final = "rows"
OUTBOX: Final = "outbox"
BATCHES: Final = "batches"
QUARANTINE: Final = "quarantine"
NOTES: Final = "notes"
TABLES: Final = (META, ROWS, OUTBOX, BATCHES, QUARANTINE, NOTES)
META_ID: Final = 1
COUNTER: Final = "counter "
"""How the name of a counter begins among the facts, which are the one document of `META`."""

STANDING: Final = "standing"
"""What a registry says of itself, where that is not the usual."""
UNFINISHED: Final = "unfinished"
"""It is being brought here from elsewhere; the beginning of a word that is another one each time."""
MOVED: Final = "moved"
"""It was brought elsewhere from here."""

_HEADS: Final = [b'%s\n"%s":{' % (b"}," if each else b"{", table.encode()) for each, table in enumerate(TABLES)]
"""What stands before the documents of each table in a `registry.json`."""


def empty_tables() -> Tables:
    """Return the content of a new registry on TinyDB."""
    return {META: {str(META_ID): {"program": PROGRAM, "format": FORMAT}}, ROWS: {}, OUTBOX: {}}


def may_be_overwritten(standing: object) -> bool:
    """Whether a registry that stands so holds nothing that anybody goes by."""
    return isinstance(standing, str) and (standing == MOVED or standing.startswith(UNFINISHED))


def check_not_moved(standing: object, shown: str) -> None:
    """Refuse a registry that was brought elsewhere; `RegistryError`."""
    if standing == MOVED:
        raise RegistryError(
            f"could not use the registry {shown}: it was moved elsewhere, and is out of date",
            hint="station.toml named the one in force, under [registry]: put that back",
        )


def check_standing(expected: str, found: str, shown: str) -> None:
    """Check that nobody else has brought another registry to where one is being brought; `RegistryError`."""
    if found != expected:
        raise RegistryError(
            f"could not bring the registry to {shown}: another station has begun to do the same",
            hint="nothing was changed here; name another database",
        )


def audit_head_of(facts: dict[str, Any]) -> Head:
    """Return the head of the audit log that the registry remembers in its facts."""
    seq, digest = facts.get("audit_seq", 0), facts.get("audit_hash", GENESIS)
    if isinstance(seq, bool) or not isinstance(seq, int) or seq < 0 or not isinstance(digest, str):
        raise damaged("what it remembers of the audit log")
    return Head(seq, digest)


def damaged(what: str) -> RegistryError:
    """Return the error of a registry that holds what it cannot hold."""
    return RegistryError(
        f"could not read the registry: {what} is damaged",
        hint="restore it from a backup, together with the audit log",
    )


@dataclass(frozen=True, slots=True)
class Placed:
    """A document, and where it is."""

    table: str
    number: int
    document: dict[str, Any]


def from_tables(tables: Tables) -> Iterator[Placed]:
    """Yield the documents in tables of TinyDB; `RegistryError` if a row is damaged."""
    for table in TABLES:
        found = tables.get(table, {})
        for number in sorted(found, key=int):
            document = found[number]
            if table == META:
                document = {name: value for name, value in document.items() if name != STANDING}
            if table == ROWS:  # an older birthmark did not know all of what there is now
                document = {**document, **to_document(from_document(int(number), document))}
            yield Placed(table, int(number), without_unset(document))


def to_tables(documents: Iterable[Placed]) -> Tables:
    """Return tables of TinyDB with these documents."""
    tables = empty_tables()
    for placed in documents:
        tables.setdefault(placed.table, {})[str(placed.number)] = placed.document
    return tables


def without_unset(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document without the fields that are unset."""
    return {name: value for name, value in document.items() if value is not None}


def write_json(documents: Iterable[Placed], file: IO[bytes]) -> int:
    """Write a `registry.json`; return how many octets it has."""
    written, table = 0, -1
    for placed in documents:
        here = TABLES.index(placed.table)
        written += file.write(b",\n" if here == table else b"")
        written += sum(file.write(_HEADS[each]) for each in range(table + 1, here + 1))
        written += file.write(b'"%d":' % placed.number + orjson.dumps(placed.document))
        table = here
    written += sum(file.write(head) for head in _HEADS[table + 1 :])
    return written + file.write(b"}}\n")


class Tally:
    """Counts and digests documents as they pass."""

    def __init__(self) -> None:
        self.rows = 0
        self._digest = hashlib.sha256()

    def __call__(self, documents: Iterable[Placed]) -> Iterator[Placed]:
        """Pass documents on."""
        for placed in documents:
            place = [placed.table, placed.number, placed.document]
            self._digest.update(orjson.dumps(place, option=orjson.OPT_SORT_KEYS) + b"\n")
            self.rows += placed.table == ROWS
            yield placed

    @property
    def digest(self) -> str:
        """SHA-256 over everything that passed, in lower-case hex."""
        return self._digest.hexdigest()
