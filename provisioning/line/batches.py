"""Batches: units that are made, counted and released together (docs/serial-protocol.md section 8, "Release").

Rules:

- One batch is open at a time; every row reserved meanwhile is in it, and stays in it.
- Only ATTESTED is made. Closing voids every other row of the batch and revokes every serial number that was stored
  without ATTESTED, whether or not its certificate is known: it may have been signed just before a crash.
- All of a closing is one transaction, the CRL follows; after a kill in between, the next CRL of whatever command
  carries it.
- Attempts are counted from the audit log, which has them in the order in which they ended.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from cryptography import x509

from birthmark.device.errors import RegistryError
from birthmark.device.escape import escaped
from birthmark.provisioning import audit
from birthmark.provisioning.enrollment.outcomes import Outcome
from birthmark.provisioning.enrollment.transitions import ATTEMPT
from birthmark.provisioning.registry.line import Batch
from birthmark.provisioning.registry.model import Row, State
from birthmark.provisioning.revocation import mark_revoked

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from birthmark.provisioning.registry.interface import View
    from birthmark.provisioning.station import Station


@dataclass(frozen=True, slots=True)
class Closing:
    """What closing a batch did."""

    batch: Batch
    made: int
    voided: tuple[Row, ...]
    revoked: int
    """Serial numbers that were not revoked before."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What the attempts of a batch add up to."""

    attempts: int = 0
    units: int = 0
    """Different boards that said who they are."""
    passed_at_first: int = 0
    retries: int = 0
    """Attempts at a board after its first one."""
    failures_by_step: tuple[tuple[str, int], ...] = ()
    failures_by_code: tuple[tuple[str, int], ...] = ()
    boards_an_hour: float | None = None
    """From the beginning of the first attempt to the end of the last one; None without two moments."""


@dataclass(frozen=True, slots=True)
class Report:
    """What there is to say of a batch. It names only the units that are made."""

    batch: Batch
    made: tuple[Row, ...]
    units: int
    """Different boards that were begun."""
    counts: Counts

    def record(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        counts = self.counts
        return {
            "batch": self.batch.name,
            "opened_at": moment(self.batch.opened_at),
            "closed_at": moment(self.batch.closed_at),
            "made": len(self.made),
            "units": self.units,
            "first_pass_yield": ratio(counts.passed_at_first, self.units),
            "final_yield": ratio(len(self.made), self.units),
            "attempts": counts.attempts,
            "retries": counts.retries,
            "failures_by_step": dict(counts.failures_by_step),
            "failures_by_code": dict(counts.failures_by_code),
            "boards_an_hour": counts.boards_an_hour,
            "devices": [device_record(row) for row in self.made],
        }


def open_batch(station: Station, name: str) -> Batch:
    """Open a batch.

    Raises:
        ConfigurationError: that is no name for one.
        RegistryError: another one is open, or there was one of that name.
    """
    batch = Batch(name, station.clock())
    with station.registry.transaction() as transaction:
        current = transaction.open_batch()
        if current is not None:
            raise RegistryError(
                f"could not open the batch {name}: {current.name} is open",
                hint="close it first: `birthmark batch close`",
            )
        if any(other.name.lower() == name.lower() for other in transaction.batches()):
            raise RegistryError(
                f"could not open the batch {name}: there was one of that name", hint="choose another name"
            )
        transaction.put_batch(batch)
        transaction.record("batch-open", name)
    return batch


def close_batch(station: Station) -> Closing:
    """Close the open batch; the caller has a CRL signed if anything was revoked.

    Raises:
        RegistryError: no batch is open.
        AuthorityError: the CA cannot be unlocked; nothing was changed.
    """
    with station.registry.view() as view:
        _open(view)
    _ = station.authority  # a wrong passphrase must stop this before anything is changed
    with station.registry.transaction() as transaction:
        batch = _open(transaction)
        now = station.clock()
        word = f"batch {batch.name} closed before it was attested"
        voided, revoked = [], 0
        rows = _rows_of(transaction, batch)
        for row in rows:
            if row.state is State.ATTESTED:
                continue
            revoked += mark_revoked(transaction, row, x509.ReasonFlags.cessation_of_operation, word=word, now=now)
            current = transaction.row(row.number) or row
            if current.state is not State.VOID:
                current = transaction.update(current.changed(state=State.VOID, void_reason=word))
            if row.state is not State.VOID:
                transaction.record("void", row.name, row=row.number, reason=word)
                voided.append(current)
        batch = replace(batch, closed_at=now)
        transaction.put_batch(batch)
        made = sum(row.state is State.ATTESTED for row in rows)
        transaction.record("batch-close", batch.name, made=made, voided=len(voided), revoked=revoked)
    return Closing(batch, made, tuple(voided), revoked)


def report(station: Station, name: str | None = None) -> Report:
    """Return what there is to say of a batch: the one of that name, else the open one, else the last one.

    Raises:
        RegistryError: there is no such batch.
    """
    station.registry.audit_head()  # brings the log up to date
    with station.registry.view() as view:
        batches = view.batches()
        wanted = [batch for batch in batches if name is None or batch.name.lower() == name.lower()]
        if not wanted:
            cause = "there is no such batch" if batches else "there never was one"
            raise RegistryError(
                f"could not report on {escaped(name, 80) if name else 'a batch'}: {cause}",
                hint="open one with `birthmark batch open NAME`",
            )
        batch = next((one for one in wanted if one.closed_at is None), wanted[-1])
        rows = _rows_of(view, batch)
    made = tuple(row for row in rows if row.state is State.ATTESTED)
    attempts = [
        entry
        for entry in audit.read(station.registry.audit_path)
        if entry["action"] == ATTEMPT and entry["details"].get("batch") == batch.name
    ]
    boards = {row.hwid.hex() for row in rows if row.hwid} | set(_boards(attempts))
    return Report(batch, made, len(boards), counted(attempts))


def counted(attempts: Sequence[dict[str, Any]]) -> Counts:
    """Add up attempts, as the audit log has them."""
    first: dict[str, str] = {}
    for entry in attempts:
        hwid = entry["details"].get("hwid")
        if hwid:
            first.setdefault(hwid, entry["details"].get("outcome", ""))
    boards = _boards(attempts)
    failures = [entry["details"] for entry in attempts if entry["details"].get("outcome") == Outcome.FAIL]
    return Counts(
        attempts=len(attempts),
        units=len(first),
        passed_at_first=sum(outcome == Outcome.PASS for outcome in first.values()),
        retries=len(boards) - len(first),
        failures_by_step=_ranked(str(details.get("step", "")) for details in failures),
        failures_by_code=_ranked(str(details.get("code", "")) for details in failures),
        boards_an_hour=_rate(attempts),
    )


def device_record(row: Row) -> dict[str, Any]:
    """Return one made device, as in a report."""
    return {
        "id": row.name,
        "role": row.role,
        "hwid": row.hwid.hex() if row.hwid else "",
        "cert_serial": f"{row.cert_serial:x}",
        "not_before": moment(row.not_before),
        "not_after": moment(row.not_after),
        "made_at": moment(row.changed_at),
        "revoked": row.revocation_reason,
        "label": row.label,
    }


def moment(at: datetime | None) -> str | None:
    """Return a time as reports write it."""
    return None if at is None else at.strftime("%Y-%m-%dT%H:%M:%SZ")


def ratio(part: int, whole: int) -> float | None:
    """Return a yield; None where nothing was begun."""
    return round(part / whole, 4) if whole else None


def _open(view: View) -> Batch:
    batch = view.open_batch()
    if batch is None:
        raise RegistryError(
            "could not close the batch: none is open",
            hint="if the last one's CRL did not get out, `birthmark crl` brings it to the gateways",
        )
    return batch


def _rows_of(view: View, batch: Batch) -> list[Row]:
    return view.rows(batch=batch.name)


def _boards(attempts: Iterable[dict[str, Any]]) -> list[str]:
    return [entry["details"]["hwid"] for entry in attempts if entry["details"].get("hwid")]


def _ranked(words: Iterable[str]) -> tuple[tuple[str, int], ...]:
    return tuple(Counter(words).most_common())


def _rate(attempts: Sequence[dict[str, Any]]) -> float | None:
    passed = sum(entry["details"].get("outcome") == Outcome.PASS for entry in attempts)
    if not passed:
        return None
    first, last = attempts[0], attempts[-1]
    began = datetime.fromisoformat(first["at"]).timestamp() - first["details"].get("elapsed_ms", 0) / 1000
    elapsed_s = datetime.fromisoformat(last["at"]).timestamp() - began
    return round(passed * 3600 / elapsed_s, 1) if elapsed_s > 0 else None
