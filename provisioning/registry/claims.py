"""What rows claim for themselves, and whether they may: the registry's rule of uniqueness, for every back end.

Rules (docs/serial-protocol.md section 8):

- Name (without regard to case) and hwid belong to one live row; public key and certificate serial number to one
  row ever.
- Many rows are checked at once, against those that share something with one of them and against each other. A back
  end looks for the former once, by `values_of`.

Pure.
"""

from __future__ import annotations

from collections import defaultdict
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from birthmark.provisioning.registry.interface import DuplicateError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from birthmark.provisioning.registry.model import Row

CLAIMED: Final = ("name_folded", "hwid", "public_key_der", "cert_serial")
"""The fields of a row that it may have to share with nobody."""


def claims(row: Row) -> tuple[object, ...]:
    """Return what a row wants to itself; while that stays, nobody else can have come by it."""
    return row.is_live, row.name_folded, row.hwid, row.public_key_der, row.cert_serial


def values_of(rows: Iterable[Row], field: str) -> set[object]:
    """Return what the rows have in one of the fields `CLAIMED`, where it is set."""
    return {getattr(row, field) for row in rows} - {None}


def check_unique(rows: Iterable[Row], others: Iterable[Row]) -> None:
    """Check that `rows` can stand beside `others` and beside each other.

    Args:
        rows: as they are to be.
        others: every stored row that shares a value with one of `rows`, as stored; one that has the number of a
            row in `rows` is about to be replaced by it, and does not count.

    Raises:
        DuplicateError: they cannot; it names the first other row that is in the way.
    """
    rows, others = list(rows), list(others)
    if not others and _share_nothing(rows):
        return
    mine = {row.number for row in rows}
    holders: defaultdict[tuple[str, object], list[Row]] = defaultdict(list)
    for other in sorted(others, key=lambda one: one.number):
        if other.number not in mine:
            for claim in _claimed(other):
                holders[claim].append(other)
    for row in rows:
        met: dict[int, Row] = {}
        for claim in _claimed(row):
            met.update((other.number, other) for other in holders[claim])
            holders[claim].append(row)
        for number in sorted(met):
            _check_pair(row, met[number])


def _share_nothing(rows: Sequence[Row]) -> bool:
    """Whether no two rows have a value in common: the usual case, and told at once for thousands."""
    for field in CLAIMED:
        values = [value for value in map(attrgetter(field), rows) if value is not None]
        if len(set(values)) < len(values):
            return False
    return True


def _claimed(row: Row) -> Iterator[tuple[str, object]]:
    for field in CLAIMED:
        value = getattr(row, field)
        if value is not None:
            yield field, value


def _check_pair(row: Row, other: Row) -> None:
    if row.public_key_der is not None and other.public_key_der == row.public_key_der:
        raise DuplicateError("public_key", other)
    if row.cert_serial is not None and other.cert_serial == row.cert_serial:
        raise DuplicateError("cert_serial", other)
    if not (row.is_live and other.is_live):
        return
    if other.name_folded == row.name_folded:
        raise DuplicateError("name", other)
    if row.hwid is not None and other.hwid == row.hwid:
        raise DuplicateError("hwid", other)
