"""The registry as the station sees it, whichever back end keeps it.

Rules:

- A transaction is exclusive across processes and threads from its first read to the end of its block. When
  the block ends, everything in it is durable; when it ends in an exception, nothing of it is.
- A view is one consistent state; it takes no lock and never waits.
- Uniqueness (docs/serial-protocol.md section 8) holds at every insert and update: hwid and name among the live
  rows (neither VOID, nor being replaced, nor a renewal under way), names without regard to case and across
  devices, services and brokers; public key and certificate serial number among all rows ever.
- The audit entries of a transaction are durable with it, and reach the audit log after a crash too. What had to
  be put back into the log is recorded there (`audit.RESTORED`): a crash and a cut look the same.
- The counter `last_issued_at` follows the newest issuance: the seconds since 1970 at which a row got its
  certificate.
- Transactions do not nest.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol, TypedDict, Unpack

from birthmark.device.errors import EnrollmentRefusedError, RegistryError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from birthmark.provisioning.audit import Head
    from birthmark.provisioning.registry.content import Placed
    from birthmark.provisioning.registry.line import Batch, Quarantined
    from birthmark.provisioning.registry.model import KeyMode, Kind, RevokedCertificate, Row, State


LAST_ISSUED_AT: Final = "last_issued_at"
LAST_ROW: Final = "rows"
"""The counter of row numbers that were used."""


def moment(view: View, name: str) -> datetime:
    """Return the time that a counter of seconds since 1970 stands for.

    Raises:
        RegistryError: there is no such time.
    """
    try:
        return datetime.fromtimestamp(view.counter(name), UTC)
    except (OverflowError, ValueError, OSError) as error:
        raise RegistryError(
            f"could not read the registry: its counter {name} is no time",
            hint="restore it from a backup, together with the audit log",
        ) from error


class RegistryAwayError(RegistryError):
    """The server that keeps the registry cannot be reached, or the connection to it broke.

    What was under way is undone; if it broke while it was being written, a look at the registry tells. The same
    again, once the server is back, is always right.
    """


class DuplicateError(EnrollmentRefusedError):
    """A row would share what must be unique with another row.

    Args:
        field: `name`, `hwid`, `public_key` or `cert_serial`.
        holder: the row that has it already.
    """

    def __init__(self, field: str, holder: Row) -> None:
        self.field = field
        self.holder = holder
        what = field.replace("_", " ")
        owner = f"{holder.kind} {holder.name}, row {holder.number}, {holder.state}"
        super().__init__(
            f"could not take this {what}: it belongs to {owner}",
            hint=f"look at it with `birthmark show {holder.name}`",
        )

    @property
    def attribute(self) -> str:
        """The attribute of `Row` that has the value."""
        return {"name": "name_folded", "public_key": "public_key_der"}.get(self.field, self.field)


class RowFilters(TypedDict, total=False):
    """Which rows are meant; one that is None is not given."""

    kind: Kind | None
    """Of this kind."""
    states: Collection[State] | None
    """In one of these states."""
    role: str | None
    """With exactly this role."""
    batch: str | None
    """Made in exactly this batch; empty for those of none."""
    name_glob: str | None
    """Of such a name: `*` stands for any characters, `?` for one, everything else for itself, in whatever case."""
    expires_before: datetime | None
    """With a certificate that ends, or has ended, before this time."""
    revoked: bool | None
    """Whether the certificate is revoked."""


class View(Protocol):
    """One consistent state of the registry, for reading."""

    def rows(self, **filters: Unpack[RowFilters]) -> list[Row]:
        """Return the rows that fit every given filter, by ascending number."""

    def stream(self, **filters: Unpack[RowFilters]) -> Iterator[Row]:
        """Yield what `rows` returns, to be taken before the view ends: many at the memory of few."""

    def count(self, **filters: Unpack[RowFilters]) -> int:
        """Return how many rows fit every given filter."""

    def names(self, *, live: bool = False) -> set[str]:
        """Return every name ever, or only those that live rows hold, folded to lower case."""

    def row(self, number: int) -> Row | None:
        """Return the row with this number."""

    def numbered(self, numbers: Collection[int]) -> dict[int, Row]:
        """Return those of the rows with these numbers that there are, by number: many at the cost of few."""

    def differing(self, rows: Sequence[Row]) -> set[int]:
        """Return the numbers of those of `rows` that are not stored just so: many at the cost of few."""

    def named(self, name: str) -> list[Row]:
        """Return every row ever that had this name (without regard to case), by ascending number."""

    def live_by_name(self, name: str) -> Row | None:
        """Return the row, neither VOID nor being replaced, that holds this name (without regard to case)."""

    def live_by_names(self, names: Collection[str]) -> dict[str, Row]:
        """Return the live rows that hold these names, by `name_folded`: many at the cost of few."""

    def live_by_hwid(self, hwid: bytes) -> Row | None:
        """Return the row, neither VOID nor being replaced, that holds this hwid."""

    def by_cert_serial(self, cert_serial: int) -> Row | None:
        """Return the row, of whatever state, whose certificate has this serial number."""

    def by_cert_serials(self, cert_serials: Collection[int]) -> dict[int, Row]:
        """Return the rows, of whatever state, with these serial numbers, by them: many at the cost of few."""

    def by_public_key(self, public_key_der: bytes) -> Row | None:
        """Return the row, of whatever state, with this SubjectPublicKeyInfo (DER)."""

    def revoked(self) -> list[Row]:
        """Return every row whose certificate is revoked, by ascending number."""

    def revocations(self) -> list[RevokedCertificate]:
        """Return what a CRL needs of every certificate that is revoked, by ascending number of its row."""

    def batches(self) -> list[Batch]:
        """Return every batch, the oldest first."""

    def open_batch(self) -> Batch | None:
        """Return the batch that is open; None if there is none."""

    def quarantined(self) -> list[Quarantined]:
        """Return every unit in quarantine, the oldest first."""

    def counter(self, name: str) -> int:
        """Return a counter's value; 0 if it was never set."""

    def notes(self, topic: str) -> dict[str, dict[str, Any]]:
        """Return everything noted under a topic, by key: small JSON objects, which are the caller's to check."""


class Transaction(View, Protocol):
    """An exclusive read, change and write. It sees its own changes."""

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
        """Add a row (RESERVED unless `state` says otherwise), numbered and dated by the registry.

        With `replaces`, that row is marked as being replaced by the new one, and no longer holds its name
        and hwid.

        Raises:
            DuplicateError: what must be unique is taken; nothing was added.
        """

    def insert_all(self, rows: Sequence[Row]) -> list[Row]:
        """Add many rows at the cost of few, as `insert` does one; return them as stored, in their order.

        Their number, `created_at` and `changed_at` are the registry's to give: what the rows say there is
        ignored. Rules and errors are those of `insert`, among the rows themselves too.

        Raises:
            DuplicateError: what must be unique is taken; nothing at all was added.
        """

    def update_all(self, rows: Sequence[Row], *, known: Sequence[Row] = ()) -> list[Row]:
        """Change many rows, each another one, at the cost of few; rules and errors are those of `update`.

        If one cannot be changed, none is. Return them as stored, in their order. `known` is what the caller thinks
        is stored of them: what is indeed so is compared, which costs less than to make a row of it.
        """

    def update(self, row: Row) -> Row:
        """Put `row` in the place of the row with its number, and return it as stored.

        `changed_at` is set by the registry; the bundle's bytes are dropped once the row is ATTESTED or VOID.
        When a row that replaces another becomes VOID, the other one stands again.

        Raises:
            DuplicateError: what must be unique is taken; nothing was changed.
            RegistryError: there is no such row, or it may not change so (`model.check_change`): read it again.
        """

    def apart(self) -> AbstractContextManager[None]:
        """Undo what was done in the block, and that alone, if it ends in an exception."""

    def set_counter(self, name: str, value: int) -> None:
        """Set a counter (never below its value: a `RegistryError` otherwise)."""

    def put_batch(self, batch: Batch) -> None:
        """Add a batch, or change the one of that name (without regard to case)."""

    def quarantine(self, unit: Quarantined) -> None:
        """Remember a unit in quarantine, in the place of what was remembered of it."""

    def clear_quarantine(self, hwid: bytes) -> bool:
        """Forget a unit in quarantine; return whether it was in it."""

    def put_note(self, topic: str, key: str, note: dict[str, Any] | None) -> None:
        """Note a small JSON object under topic and key, in the place of what was noted there; None: forget it."""

    def record(self, action: str, subject: str, **details: str | int | bool | None) -> None:
        """Add an entry to the audit log, durable with this transaction."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that a registry holds, and as much of the audit log as belongs to it."""

    documents: Iterable[Placed]
    """Everything in it; to be taken once, before the block ends."""
    audit_bytes: int
    """The length of the audit log; what is appended later is not of this state."""
    release: Callable[[], None]
    """Lets the others go on; the documents stay those of this state."""


class Registry(Protocol):
    """Where the station's rows are."""

    def transaction(self) -> AbstractContextManager[Transaction]:
        """Open a transaction; see the module's rules.

        Raises:
            RegistryError: the registry cannot be read or written; nothing was changed.
        """

    def view(self) -> AbstractContextManager[View]:
        """Open a view of the last durable state.

        Raises:
            RegistryError: the registry cannot be read.
        """

    def audit_head(self) -> Head:
        """Bring the audit log up to date, and return the number and hash that its last entry must have.

        On a disk that is mounted read-only the log stays as it is.

        Raises:
            RegistryError: registry or log cannot be used.
        """


class StoredRegistry(Registry, Protocol):
    """A registry with a store of its own, which can be backed up."""

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """Hold everybody else off, and open all of the registry's content, for a backup.

        Raises:
            RegistryError: registry or log cannot be read.
        """

    def make(self, documents: Iterable[Placed] = (), *, standing: str = "") -> None:
        """Write a new registry, empty or of these documents, whole or not at all.

        The caller keeps everybody else away from the folder.

        Args:
            documents: what it is to hold.
            standing: what it is to say of itself (`content.UNFINISHED`).

        Raises:
            RegistryError: there is one already, or it cannot be written; nothing was changed.
        """

    def documents(self) -> AbstractContextManager[Iterable[Placed]]:
        """Open everything that it holds, to be taken once; `RegistryError` if it cannot be read."""

    def arrive(self, standing: str, action: str, subject: str, **details: str | int | bool | None) -> list[str]:
        """Record, as the last thing before it is in force, how it came here; the log is not written yet.

        Returns:
            The lines that the audit log is to get.

        Raises:
            RegistryError: it cannot be written, or does not stand so any more: somebody else was here.
        """

    def stand(self, standing: str) -> None:
        """Say of this registry how it stands: `content.MOVED`, or empty; `RegistryError` if it cannot."""

    def discard(self, standing: str = "") -> None:
        """Remove what was just made and is not wanted after all, if it still stands so; what cannot be stays."""

    def shares(self) -> bool:
        """Whether other stations, with audit logs of their own, use it, too."""

    @property
    def audit_path(self) -> Path:
        """Where the audit log is."""

    @property
    def shown(self) -> str:
        """Where the registry is, for people."""

    def held_open(self) -> AbstractContextManager[None]:
        """Hold open what transactions share that follow each other in the block, and the last one would close."""

    def files(self) -> frozenset[Path]:
        """Return the files that it consists of."""

    def close(self) -> None:
        """Let go of files and connections; they are opened again if the registry is used again."""
