"""Many certificates in one go, for keys that were made elsewhere or are made here.

Rules:

- What is asked for is checked whole before (`birthmark.provisioning.bulk_requests`). Then all of it is recorded in
  one transaction, in KEYED, with key and serial number, or nothing of it is. Only then is it signed, in groups.
- A device of that id, role and key that is there already is not issued again: its certificate is written out once
  more. So a run that was killed, run again, goes on where it stopped, and ends in the same output.
- A request proves its key by its own signature, so its row is ATTESTED together with its certificate. With a key
  of the station's it is so only when the device's state folder is on disk; until then the row keeps the bundle.
- One at a time, with everything else that the station issues by itself.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Final

from cryptography import x509

from birthmark.device.errors import EnrollmentRefusedError
from birthmark.provisioning.bulk_output import output_at
from birthmark.provisioning.enrollment.bundles import bundle_of
from birthmark.provisioning.profile import new_cert_serial
from birthmark.provisioning.registry.interface import DuplicateError
from birthmark.provisioning.registry.model import TXN_OCTETS, KeyMode, Kind, Row, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from birthmark.provisioning.authority import Authority
    from birthmark.provisioning.bulk_output import Output, StationKey
    from birthmark.provisioning.bulk_requests import Wanted
    from birthmark.provisioning.enrollment.bundles import BrokerAddress
    from birthmark.provisioning.registry.line import Batch
    from birthmark.provisioning.station import Station

GROUP: Final = 5000
"""How many are signed between two writes of the registry."""


@dataclass(frozen=True, slots=True)
class Made:
    """What a run has come to."""

    issued: int
    """Certificates that were signed by this run."""
    known: int
    """Those that were there before."""


def issue_all(
    station: Station,
    source: Path,
    wanted: Sequence[Wanted],
    out: Path,
    *,
    broker: BrokerAddress,
    tell: Callable[[int, int], None],
) -> Made:
    """Issue a certificate for each of `wanted`, and write them out.

    Args:
        station: the station.
        source: where `wanted` was read, for errors and the audit log.
        wanted: what is to be issued, checked.
        out: a folder, or a file whose name ends in .jsonl (`birthmark.provisioning.bulk_output`).
        broker: where devices with a key of the station's are to connect.
        tell: is told how many of the whole are done.

    Raises:
        EnrollmentRefusedError: an id, a key or a hwid belongs to another device; nothing was recorded.
        ConfigurationError: keys are to be made, and `out` has no place for them; or the lifetime in the settings
            is none.
        AuthorityError: the CA cannot be unlocked, or its clock is wrong. What was recorded is resumed by the same
            call.
        OSError: something could not be written; the same call resumes.
    """
    station.settings.lifetimes.of(Kind.DEVICE)
    issuer = station.cas.for_clients.key_id
    station.check_key(issuer)  # unlocked before anybody has to wait
    output = output_at(out)
    with station.issue_lock(), station.registry.held_open():
        run = _Run(station, output, _station_keys(station, source, wanted, output), broker)
        rows = run.record(source, wanted, issuer)
        finished = run.deliver([row for row in rows if row.state is not State.KEYED])
        known = len(finished)
        for group in _groups([row for row in rows if row.state is State.KEYED]):
            finished += run.deliver(run.sign(group))
            tell(len(finished), len(rows))
        by_number = {row.number: row for row in finished}
        output.finish([by_number[row.number] for row in rows], station.cas)
    return Made(issued=len(rows) - known, known=known)


def _station_keys(
    station: Station, source: Path, wanted: Sequence[Wanted], output: Output
) -> dict[str, StationKey]:
    """Return a key for each that came without a request, by folded id; none is made for an id that is taken."""
    keyless = [one for one in wanted if one.public_key_der is None]
    with station.registry.view() as view:
        held = view.live_by_names([one.device_id.text for one in keyless])
    for one in keyless:
        if one.device_id.folded in held and not output.has_key(one.device_id):
            raise _refusal(source, one, DuplicateError("name", held[one.device_id.folded]))
    return {
        one.device_id.folded: output.key_for(one.device_id, secrets.token_bytes(TXN_OCTETS)) for one in keyless
    }


class _Run:
    def __init__(
        self, station: Station, output: Output, keys: Mapping[str, StationKey], broker: BrokerAddress
    ) -> None:
        self._station = station
        self._output = output
        self._keys = keys
        """By folded id: those that the station has made."""
        self._broker = broker

    def record(self, source: Path, wanted: Sequence[Wanted], issuer: str) -> list[Row]:
        """Make sure that there is a row for each, all or none; return them in the order of `wanted`.

        Args:
            source: where `wanted` was read.
            wanted: the devices.
            issuer: the key identifier of the CA that is to sign for those that have no row yet.
        """
        with self._station.signing() as transaction:
            held = transaction.live_by_names([one.device_id.text for one in wanted])
            batch = transaction.open_batch()
            now, missing = self._station.clock(), list[Row]()
            for one in wanted:
                row, fresh = held.get(one.device_id.folded), self._new_row(one, issuer, batch, now)
                if row is None:
                    missing.append(fresh)
                elif difference := _difference(row, fresh):
                    raise _refusal(source, one, DuplicateError("name", row), difference)
            try:
                added = transaction.insert_all(missing)
            except DuplicateError as error:
                raise _refusal(source, _claimant(wanted, missing, error), error) from error
            if added:
                transaction.record("issue-from", source.name, devices=len(added), batch=added[0].batch or None)
        held.update((row.name_folded, row) for row in added)
        return [held[one.device_id.folded] for one in wanted]

    def sign(self, rows: Sequence[Row]) -> list[Row]:
        """Sign for rows in KEYED of one issuing CA, and record that; return them in ATTESTED, or in ISSUED."""
        authority = self._station.authority_of(rows[0].issuer)
        now = self._station.clock()
        certificates = authority.issue_devices(rows, now=now)
        first = x509.load_der_x509_certificate(certificates[0])  # all of a group are valid as long
        validity = first.not_valid_before_utc, first.not_valid_after_utc
        not_after = validity[1].isoformat()
        issued = [
            self._issued(row, authority, certificate_der, validity)
            for row, certificate_der in zip(rows, certificates, strict=True)
        ]
        with self._station.registry.transaction() as transaction:
            issued = transaction.update_all(issued, known=rows)
            for row in issued:
                transaction.record(
                    "issue",
                    row.name,
                    row=row.number,
                    kind=row.kind.value,
                    role=row.role,
                    cert_serial=f"{row.cert_serial:x}",
                    not_after=not_after,
                )
        return issued

    def deliver(self, rows: Sequence[Row]) -> list[Row]:
        """Write out what is issued; return the rows, all of them in ATTESTED now."""
        ours = [row for row in rows if self._is_ours(row)]
        self._output.put([row for row in rows if not self._is_ours(row)], self._station.cas)
        waiting = [row for row in ours if row.state is not State.ATTESTED]
        self._output.put_slots(waiting, [self._keys[row.name_folded] for row in waiting])
        if not waiting:
            return list(rows)
        with self._station.registry.transaction() as transaction:
            attested = transaction.update_all([row.changed(state=State.ATTESTED) for row in waiting])
            for row in attested:
                transaction.record("release", row.name, row=row.number)
        return [row for row in rows if row.state is State.ATTESTED] + attested

    def _new_row(self, one: Wanted, issuer: str, batch: Batch | None, now: datetime) -> Row:
        """Return the row of a device that there is none of yet; the registry numbers and dates it."""
        key = self._keys.get(one.device_id.folded)
        return Row(
            number=1,
            kind=Kind.DEVICE,
            name=one.device_id.text,
            role=one.role.name,
            state=State.KEYED,
            created_at=now,
            changed_at=now,
            key_mode=KeyMode.ON_DEVICE if key is None else KeyMode.STATION,
            hwid=one.hwid,
            txn=secrets.token_bytes(TXN_OCTETS) if key is None else key.txn,
            public_key_der=one.public_key_der if key is None else key.public_key_der,
            cert_serial=new_cert_serial(secrets.token_bytes),
            issuer=issuer,
            batch="" if batch is None else batch.name,
        )

    def _is_ours(self, row: Row) -> bool:
        """Whether the station has made the key."""
        return bool(self._keys) and row.name_folded in self._keys

    def _issued(
        self, row: Row, authority: Authority, certificate_der: bytes, validity: tuple[datetime, datetime]
    ) -> Row:
        issued = row.certified(
            certificate_der,
            State.ISSUED if self._is_ours(row) else State.ATTESTED,
            anchors=authority.anchor_ids,
            not_before=validity[0],
            not_after=validity[1],
        )
        if not self._is_ours(row):
            return issued
        bundle = bundle_of(row, authority, self._broker, certificate_der, now=self._station.clock())
        return issued.changed(bundle=bundle, bundle_sha256=hashlib.sha256(bundle).digest())


def _difference(row: Row, fresh: Row) -> str:
    """Say why a row is not what an earlier run for the same device has left; empty if it is."""
    differences = {
        "and is revoked": row.is_revoked,
        "which is under way elsewhere": row.state not in (State.KEYED, State.ISSUED, State.ATTESTED),
        "which is no device": row.kind is not fresh.kind,
        "which is written otherwise": row.name != fresh.name,
        f"with the role {row.role}": row.role != fresh.role,
        "with another key": (row.key_mode, row.public_key_der) != (fresh.key_mode, fresh.public_key_der),
        "with another hwid": fresh.hwid is not None and row.hwid != fresh.hwid,
    }
    return next((text for text, differs in differences.items() if differs), "")


def _claimant(wanted: Sequence[Wanted], missing: Sequence[Row], error: DuplicateError) -> Wanted:
    """Return who of `wanted` wants what the holder in the error has."""
    taken = getattr(error.holder, error.attribute)
    name = next(row.name_folded for row in missing if getattr(row, error.attribute) == taken)
    return next(one for one in wanted if one.device_id.folded == name)


def _refusal(source: Path, one: Wanted, error: DuplicateError, difference: str = "") -> EnrollmentRefusedError:
    holder, what = error.holder, error.field.replace("_", " ")
    return EnrollmentRefusedError(
        f"could not use {source}, {one.where}: the {what} of {one.device_id} belongs to"
        f" {holder.kind} {holder.name}, row {holder.number}, {holder.state}{difference and f', {difference}'}",
        hint=f"nothing of the file was applied; look at it with `birthmark show {holder.name}`",
    )


def _groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield groups of at most `GROUP`, each of one issuing CA: one may have changed since a run was killed."""
    for _, of_one in groupby(sorted(rows, key=lambda row: row.issuer), key=lambda row: row.issuer):
        while group := list(islice(of_one, GROUP)):
            yield group
