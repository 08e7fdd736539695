"""The journal on disk: each transition of an enrollment as one registry transaction, and what the CA signs for it.

Rules (docs/serial-protocol.md section 8):

- A call returns when its transition is durable, with its audit entry.
- The serial number is durable before the certificate is signed, so a crash in between signs again under the same
  number; the certificate and its bundle are durable before anything of them is sent.
- A row that another station has changed in the meantime stops this one: nobody continues from a stale row.
- A row that replaces another one voids it with its own ATTESTED, in one transaction.
- A row that becomes VOID after KEYED takes its certificate with it: the serial number is marked revoked, whether
  or not the certificate was ever signed or seen.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from cryptography import x509

from birthmark.device.errors import EnrollmentRefusedError
from birthmark.provisioning.authority import with_certificate
from birthmark.provisioning.enrollment.bundles import bundle_of
from birthmark.provisioning.enrollment.journal import Action
from birthmark.provisioning.registry.line import Quarantined
from birthmark.provisioning.registry.model import Kind, State
from birthmark.provisioning.revocation import mark_revoked

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from birthmark.device.identity import Role
    from birthmark.device.link.messages import HelloAnswer
    from birthmark.provisioning.authority import Authority
    from birthmark.provisioning.enrollment.bundles import BrokerAddress
    from birthmark.provisioning.enrollment.journal import Wish
    from birthmark.provisioning.enrollment.outcomes import Attempt
    from birthmark.provisioning.registry.interface import Registry, Transaction
    from birthmark.provisioning.registry.model import KeyMode, Row

TXN_BYTES: Final = 16
ATTEMPT: Final = "attempt"
"""The audit log's word for the end of an attempt at a unit."""


class Transitions:
    """The journal of one station.

    Args:
        registry: where the rows are.
        authority: returns the issuing CA with this key identifier, or the current one if it is empty; called at
            the first signing, not before.
        broker: what the bundles say of the broker.
        default_role: of a new unit for which no role was asked.
        clock: the time, aware and in UTC.
        random_bytes: a cryptographic source of transactions.
    """

    def __init__(
        self,
        registry: Registry,
        authority: Callable[[str], Authority],
        *,
        broker: BrokerAddress,
        default_role: Role,
        clock: Callable[[], datetime],
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._registry = registry
        self._authority = authority
        self._broker = broker
        self._default_role = default_role
        self._clock = clock
        self._random_bytes = random_bytes
        self.revoked: dict[int, str] = {}
        """The revoked certificates of the units that were at work, by serial number, and who issued each: the CRL
        is to list them. Some of them a run may have revoked that was killed before it came to its CRL."""

    def look(self) -> None:
        """See whether the registry can be read.

        Raises:
            RegistryError: it cannot.
        """
        with self._registry.view():
            pass

    def standing(self, hwid: bytes) -> tuple[Row | None, Row | None]:
        """Return the unit's live row and, if that row is to replace another one, the other one."""
        with self._registry.view() as view:
            row = view.live_by_hwid(hwid)
            replaced = view.row(row.replaces) if row is not None and row.replaces is not None else None
            past = view.named(row.name) if row is not None else []
        now = self._clock()
        for old in past:
            # What has expired has left the CRL, or will.
            if old.is_revoked and old.cert_serial is not None and (old.not_after is None or old.not_after > now):
                self.revoked[old.cert_serial] = old.issuer
        return row, replaced

    def reserve(self, hwid: bytes, wish: Wish) -> Row:
        """Make a row in RESERVED with a fresh transaction; see `journal.Journal`."""
        role = wish.role or self._default_role
        with self._registry.transaction() as transaction:
            row = transaction.insert(
                kind=Kind.DEVICE,
                name=wish.device_id.text,
                role=role.name,
                key_mode=wish.mode_for(None),
                hwid=hwid,
                txn=self._random_bytes(TXN_BYTES),
                batch=_batch(transaction),
                label=wish.label,
            )
            _record(transaction, "reserve", row)
        return row

    def replace(self, row: Row, action: Action, wish: Wish) -> Row:
        """Make a new row in RESERVED for a unit that is made already; see `journal.Journal`."""
        with self._registry.transaction() as transaction:
            _check_unchanged(transaction, row)
            erased = action is Action.ERASED
            if erased:
                self._void(transaction, row.number, "erased, and made again", wish.replaces_reason)
            fresh = transaction.insert(
                kind=Kind.DEVICE,
                name=row.name,
                role=wish.role.name if wish.role else row.role,
                key_mode=wish.mode_for(row),
                hwid=row.hwid,
                txn=self._random_bytes(TXN_BYTES),
                replaces=None if erased else row.number,
                replaces_reason="" if erased else wish.replaces_reason,
                batch=_batch(transaction),
                label=wish.label or row.label,
            )
            _record(transaction, "reflash", fresh, reason=wish.replaces_reason)
        return fresh

    def quarantined(self, hwid: bytes) -> Quarantined | None:
        """Return the unit as it was put in quarantine; see `journal.Journal`."""
        with self._registry.view() as view:
            return next((unit for unit in view.quarantined() if unit.hwid == hwid), None)

    def quarantine(self, unit: HelloAnswer, name: str, reason: str) -> None:
        """Put a unit in quarantine; see `journal.Journal`."""
        with self._registry.transaction() as transaction:
            transaction.quarantine(Quarantined(unit.hwid, self._clock(), name, reason, unit.active_txn))
            subject = name or unit.hwid.hex()
            transaction.record("quarantine", subject, hwid=unit.hwid.hex(), active_txn=unit.active_txn.hex())

    def key(self, row: Row, public_key_der: bytes) -> Row:
        """Move a row to KEYED; see `journal.Journal`."""
        authority = self._authority("")
        keyed = row.changed(
            state=State.KEYED,
            public_key_der=public_key_der,
            cert_serial=authority.new_cert_serial(),
            issuer=authority.key_id,
        )
        return self._change(row, "key", keyed)

    def issue(self, row: Row) -> Row:
        """Sign the certificate of a row in KEYED, and move the row to ISSUED; see `journal.Journal`."""
        authority = self._authority(row.issuer)
        now = self._clock()
        certificate_der = authority.issue_device(row, now=now)
        issued = with_certificate(row, certificate_der, anchors=authority.anchor_ids)
        bundle = bundle_of(row, authority, self._broker, certificate_der, now=now)
        issued = issued.changed(bundle=bundle, bundle_sha256=hashlib.sha256(bundle).digest())
        return self._change(row, "issue", issued)

    def advance(self, row: Row, state: State) -> Row:
        """Move a row forward to PREPARED, COMMITTED or ATTESTED; see `journal.Journal`."""
        with self._registry.transaction() as transaction:
            _check_unchanged(transaction, row)
            stored = transaction.update(row.changed(state=state))
            _record(transaction, _ADVANCES[state], stored)
            if state is State.ATTESTED and stored.replaces is not None:
                self._void(
                    transaction, stored.replaces, f"replaced by row {stored.number}", stored.replaces_reason
                )
        return stored

    def restart(self, row: Row, reason: str, key_mode: KeyMode) -> Row:
        """Make a row VOID, and a new one in RESERVED in its place; see `journal.Journal`."""
        with self._registry.transaction() as transaction:
            _check_unchanged(transaction, row)
            self._void(transaction, row.number, reason)
            fresh = transaction.insert(
                kind=Kind.DEVICE,
                name=row.name,
                role=row.role,
                key_mode=key_mode,
                hwid=row.hwid,
                txn=self._random_bytes(TXN_BYTES),
                replaces=row.replaces,
                replaces_reason=row.replaces_reason,
                batch=row.batch,
                label=row.label,
            )
            _record(transaction, "reserve", fresh)
        return fresh

    def sign_unlock(self, row: Row, old_txn: bytes, signed: bytes) -> tuple[bytes, bytes]:
        """Return the SHA-256 of an issuing CA's certificate and its signature; see `journal.Journal`."""
        with self._registry.view() as view:
            # What was renewed over the network since shares the txn: the first one has the CA of the bundle.
            flashed = next((old for old in view.named(row.name) if old.txn == old_txn and old.issuer), None)
        authority = self._authority(flashed.issuer if flashed is not None else "")
        with self._registry.transaction() as transaction:
            # Before it is sent: a lock is never opened without a word of it.
            _record(transaction, "unlock-device", row, old_txn=old_txn.hex(), issuer=authority.key_id)
        return hashlib.sha256(authority.issuing_der).digest(), authority.sign_transcript(signed)

    def interrupted(self, row: Row) -> None:
        """Leave word in the audit log that a person stopped an enrollment; the row itself needs nothing."""
        with self._registry.transaction() as transaction:
            _record(transaction, "interrupt", row)

    def refused(self, device_id: str, cause: str) -> None:
        """Leave word in the audit log that a unit was refused; no row changes."""
        with self._registry.transaction() as transaction:
            transaction.record("refuse", device_id, cause=cause)

    def attempted(self, attempt: Attempt) -> None:
        """Count an attempt at a unit, if a batch is open; no row changes."""
        with self._registry.view() as view:
            if view.open_batch() is None:
                return
        with self._registry.transaction() as transaction:
            batch = _batch(transaction)
            if batch:
                transaction.record(
                    ATTEMPT,
                    attempt.device_id,
                    batch=batch,
                    outcome=attempt.outcome.value,
                    hwid=attempt.hwid.hex() or None,
                    step=attempt.step or None,
                    code=attempt.code or None,
                    elapsed_ms=round(attempt.elapsed_ms),
                )

    def _void(self, transaction: Transaction, number: int, reason: str, revocation_reason: str = "") -> None:
        row = transaction.row(number)
        if row is None or row.state is State.VOID:
            return
        for relative in _renewed_with(transaction, row):
            self._void(transaction, relative.number, reason, revocation_reason)
        flag = x509.ReasonFlags(revocation_reason or x509.ReasonFlags.superseded)
        if mark_revoked(transaction, row, flag, word=reason, now=self._clock()) and row.cert_serial is not None:
            self.revoked[row.cert_serial] = row.issuer
        row = transaction.row(number) or row
        if row.state is not State.VOID:
            row = transaction.update(row.changed(state=State.VOID, void_reason=reason))
        _record(transaction, "void", row, reason=reason)

    def _change(self, row: Row, action: str, changed: Row) -> Row:
        with self._registry.transaction() as transaction:
            _check_unchanged(transaction, row)
            stored = transaction.update(changed)
            _record(transaction, action, stored)
        return stored


_ADVANCES: Final = {State.PREPARED: "prepare", State.COMMITTED: "commit", State.ATTESTED: "attest"}


def _renewed_with(transaction: Transaction, row: Row) -> list[Row]:
    """Return the rows that stand and fall with one: its renewals under way, and what it has renewed itself."""
    return [
        other
        for other in transaction.named(row.name)
        if (other.renews == row.number and other.is_open_renewal)
        or (row.renews == other.number and other.replaced_by == row.number)
    ]


def _batch(transaction: Transaction) -> str:
    batch = transaction.open_batch()
    return batch.name if batch is not None else ""


def _check_unchanged(transaction: Transaction, row: Row) -> None:
    current = transaction.row(row.number)
    if current != row:
        raise EnrollmentRefusedError(
            f"could not go on with {row.name}: another station works on its row",
            hint="run the same command again, on one station",
        )


def _record(transaction: Transaction, action: str, row: Row, **details: str) -> None:
    facts: dict[str, str | int] = {"row": row.number, "state": row.state.value, **details}
    if row.hwid is not None:
        facts["hwid"] = row.hwid.hex()
    if row.txn is not None:
        facts["txn"] = row.txn.hex()
    if row.cert_serial is not None:
        facts["cert_serial"] = f"{row.cert_serial:x}"
    transaction.record(action, row.name, **facts)
