"""What a transaction does with rows, counters and audit entries, whichever back end keeps them.

Rules:

- A change is checked here, before anything is written: the order of states and what may not change (`model`),
  uniqueness (`claims`), counters that only rise.
- Many rows are changed all or none, at the cost of few statements.
- A back end adds how to look, how to write, and how to undo a share (`apart`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from birthmark.device.errors import RegistryError
from birthmark.provisioning.audit import chained
from birthmark.provisioning.registry.claims import check_unique, claims
from birthmark.provisioning.registry.interface import LAST_ISSUED_AT, LAST_ROW
from birthmark.provisioning.registry.model import KeyMode, Kind, Row, State, check_change

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime

    from birthmark.provisioning.audit import Head

_NO_BUNDLE = frozenset({State.ATTESTED, State.VOID})


class RuledTransaction(ABC):
    """The rules of `interface.Transaction`, above what a back end can do.

    Args:
        clock: the current time, aware.
        actor: who is at work, for the audit log.
        head: the last entry of the audit log.
    """

    def __init__(self, clock: Callable[[], datetime], actor: str, head: Head) -> None:
        self._clock = clock
        self._actor = actor
        self._head = head
        self._lines: list[str] = []

    @property
    def lines(self) -> list[str]:
        """The audit entries of this transaction."""
        return list(self._lines)

    def insert(
        self,
        *,
        kind: Kind,
        name: str,
        role: str = "",
        state: State | None = None,
        key_mode: KeyMode | None = None,
        hwid: bytes | None = None,
        txn: bytes | None = None,
        public_key_der: bytes | None = None,
        cert_serial: int | None = None,
        issuer: str = "",
        bundle_sha256: bytes | None = None,
        replaces: int | None = None,
        renews: int | None = None,
        replaces_reason: str = "",
        batch: str = "",
        label: str = "",
    ) -> Row:
        """Add a row (`interface.Transaction.insert`)."""
        now = self._clock()
        wanted = Row(
            number=1,
            kind=kind,
            name=name,
            role=role,
            state=state or State.RESERVED,
            created_at=now,
            changed_at=now,
            key_mode=key_mode,
            hwid=hwid,
            txn=txn,
            public_key_der=public_key_der,
            cert_serial=cert_serial,
            issuer=issuer,
            bundle_sha256=bundle_sha256,
            replaces=replaces,
            renews=renews,
            replaces_reason=replaces_reason,
            batch=batch,
            label=label,
        )
        return self.insert_all([wanted])[0]

    def insert_all(self, rows: Sequence[Row]) -> list[Row]:
        """Add many rows (`interface.Transaction.insert_all`)."""
        now, last = self._clock(), self.counter(LAST_ROW)
        numbered = [
            row.stamped(number=number, created_at=now, changed_at=now, bundle=_kept_bundle(row))
            for number, row in enumerate(rows, start=last + 1)
        ]
        with self.apart():
            for row in numbered:
                if row.replaces is not None:
                    self._give_way(row.replaces, to=row.number)
            self._check_unique(numbered)
            self._add_rows(numbered)
            self.set_counter(LAST_ROW, last + len(numbered))
            self._note_issuances(numbered)
        return numbered

    def update(self, row: Row) -> Row:
        """Put `row` in the place of the row with its number (`interface.Transaction.update`)."""
        return self.update_all([row])[0]

    def update_all(self, rows: Sequence[Row], *, known: Sequence[Row] = ()) -> list[Row]:
        """Change many rows (`interface.Transaction.update_all`)."""
        now = self._clock()
        differing = self.differing(known)
        stored = {row.number: row for row in known if row.number not in differing}
        stored |= self.numbered({row.number for row in rows} - stored.keys())
        changes, claiming, issued = [], [], []
        for row in rows:
            old = _known(stored.get(row.number), row.number)
            new = row.stamped(
                number=row.number, created_at=row.created_at, changed_at=now, bundle=_kept_bundle(row)
            )
            try:
                check_change(old, new)
            except ValueError as error:
                raise RegistryError(
                    f"could not change the registry: {error}",
                    hint="it was changed meanwhile: start this unit again",
                ) from error
            changes.append((old, new))
            if claims(new) != claims(old):
                claiming.append(new)
            if old.certificate_der is None:
                issued.append(new)
        with self.apart():
            self._check_unique(claiming)
            self._change_rows(changes)
            self._note_issuances(issued)
            for _, row in changes:
                if row.state is State.VOID and row.replaces is not None:
                    self._reinstate(row.replaces, row.number)
        return [new for _, new in changes]

    def set_counter(self, name: str, value: int) -> None:
        """Set a counter, never below its value."""
        before = self.counter(name)
        if value < before:
            raise RegistryError(f"could not set the counter {name} to {value}: it is at {before}")
        self._put_counter(name, value)

    def record(self, action: str, subject: str, **details: str | int | bool | None) -> None:
        """Add an entry to the audit log, durable with this transaction."""
        line, self._head = chained(
            self._head, at=self._clock(), actor=self._actor, action=action, subject=subject, details=details
        )
        self._lines.append(line)
        self._changed()

    # --- what a back end adds ------------------------------------------------------------------------------------

    @abstractmethod
    def apart(self) -> AbstractContextManager[None]:
        """Undo what was done in the block, and that alone, if it ends in an exception."""

    @abstractmethod
    def counter(self, name: str) -> int:
        """Return a counter's value."""

    @abstractmethod
    def _changed(self) -> None:
        """Note that there is something to write."""

    @abstractmethod
    def _put_counter(self, name: str, value: int) -> None:
        """Set a counter."""

    @abstractmethod
    def numbered(self, numbers: Collection[int]) -> dict[int, Row]:
        """Return the rows with these numbers (`interface.View.numbered`)."""

    @abstractmethod
    def differing(self, rows: Sequence[Row]) -> set[int]:
        """Return the numbers of the rows that are stored otherwise, or not (`interface.View.differing`)."""

    @abstractmethod
    def _rows_sharing(self, rows: Sequence[Row]) -> Iterable[Row]:
        """Return every stored row that shares a value with one of `rows` in a field of `claims.CLAIMED`."""

    @abstractmethod
    def _add_rows(self, rows: Sequence[Row]) -> None:
        """Write new rows."""

    @abstractmethod
    def _change_rows(self, changes: Sequence[tuple[Row, Row]]) -> None:
        """Write rows anew: for each what is stored, and what is to be."""

    # --- the rules beneath ---------------------------------------------------------------------------------------

    def _check_unique(self, rows: Sequence[Row]) -> None:
        """Check what `rows`, as they are to be, claim."""
        if rows:
            check_unique(rows, self._rows_sharing(rows))

    def _give_way(self, number: int, *, to: int) -> None:
        old = self._existing(number)
        if not old.is_live:
            raise RegistryError(
                f"could not replace row {old.number}: it is VOID or being replaced already",
                hint=f"look at it with `birthmark show {old.name}`",
            )
        self._change_rows([(old, old.changed(replaced_by=to))])

    def _reinstate(self, number: int, voided: int) -> None:
        old = self._existing(number)
        if old.state is not State.VOID and old.replaced_by == voided:
            again = old.changed(replaced_by=None)
            self._check_unique([again])
            self._change_rows([(old, again)])

    def _note_issuances(self, rows: Iterable[Row]) -> None:
        """Let the counter follow those that have got their certificate."""
        issued = {row.changed_at for row in rows if row.certificate_der is not None}
        if issued:
            self.set_counter(LAST_ISSUED_AT, max(int(max(issued).timestamp()), self.counter(LAST_ISSUED_AT)))

    def _existing(self, number: int) -> Row:
        return _known(self.numbered([number]).get(number), number)


def _known(row: Row | None, number: int) -> Row:
    if row is None:
        raise RegistryError(f"could not change row {number}: there is no such row")
    return row


def _kept_bundle(row: Row) -> bytes | None:
    return None if row.state in _NO_BUNDLE else row.bundle
