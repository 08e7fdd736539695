"""Renewing certificates over the network: what the station checks, records and signs (docs/renewal.md).

Rules:

- Only the device that has the current certificate gets the next one: the request is signed by the current key, and
  by the new key, for the device whose topic it came on. Both are checked against the registry, not against what
  the request or the broker says.
- The current certificate is the one of the live row: ATTESTED, not revoked, not being replaced, not longer expired
  than `grace_days`. The new key was never used before.
- A renewal is a row of its own (`Row.renews`): KEYED, with key and serial number, before anything is signed;
  ISSUED before it is sent; ATTESTED once the device has proven that it connected with it. Until then the old row
  stands. There is at most one such row beside the live one: another key voids it, and revokes what was signed.
- The same request again, after whatever crash, gets the same certificate; the same confirmation the same answer.
  A request that is made with a renewed certificate confirms it: its device goes by nothing else any more.
- Nobody is told anything of consequence unless a key of the device's asked. What is said then is signed (`Seals`):
  a confirmation, or a refusal, after which nothing will ever stand for that key, or that certificate.
- With ATTESTED the old certificate is due to be revoked (superseded): after `retire_after_hours`, at a full hour,
  durably noted.
- Requests are answered in groups: each step is one transaction for all of them, and one that is refused spoils
  nothing for the others.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from birthmark.device.errors import AuthorityError, BirthmarkError, RegistryError
from birthmark.device.renewal.messages import MAX_WAIT_S, AnchorUpdate, RenewalAnswer
from birthmark.device.renewal.proofs import anchors_transcript, is_proven
from birthmark.provisioning.authority import with_certificate
from birthmark.provisioning.cas import read_cas
from birthmark.provisioning.enrollment.signing_request import requested_key
from birthmark.provisioning.registry.interface import DuplicateError
from birthmark.provisioning.registry.model import KeyMode, Kind, Row, State
from birthmark.provisioning.renewal_seal import Seals
from birthmark.provisioning.retirement import note_retirement, retirement_at
from birthmark.provisioning.revocation import mark_revoked
from birthmark.provisioning.rollover.anchors import NoAnchors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from birthmark.device.identity import DeviceId
    from birthmark.device.renewal.messages import RenewalRequest
    from birthmark.provisioning.authority import Authority
    from birthmark.provisioning.cas import Cas
    from birthmark.provisioning.registry.interface import Transaction, View
    from birthmark.provisioning.rollover.anchors import AnchorSource, PendingAnchors
    from birthmark.provisioning.station import Station

_DAY: Final = timedelta(days=1)
_REFUSALS_EVERY: Final = timedelta(hours=1)
"""How often at most a device's refusals go into the audit log."""
_UNCONFIRMED: Final = "another key was asked for before it was confirmed"


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and the device on whose topic it came."""

    device_id: DeviceId
    request: RenewalRequest
    via: str = ""
    """The gateway that it came through, for the audit log."""


class _RefusedError(Exception):
    """A request that is not granted."""

    def __init__(self, reason: str, *, retry: bool = False, retry_after_s: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry = retry
        self.retry_after_s = retry_after_s

    def answer(self, nonce: bytes) -> RenewalAnswer:
        return RenewalAnswer(
            "refused", nonce, reason=self.reason, retry=self.retry, retry_after_s=self.retry_after_s
        )


class Renewals:
    """The renewals of one station.

    Args:
        station: with its authority, which is unlocked at the first certificate.
        anchors: what devices are to trust next.
    """

    def __init__(self, station: Station, *, anchors: AnchorSource | None = None) -> None:
        self._station = station
        self._anchors: AnchorSource = anchors or NoAnchors()
        self._told_at: dict[str, datetime] = {}
        """When a device's refusal was last put in the audit log."""

    def answer(self, asked: Sequence[Asked]) -> list[RenewalAnswer]:
        """Answer requests, in their order. What is answered is durable.

        Raises:
            AuthorityError: the CA cannot be unlocked, or the clock is wrong; nothing was signed.
            RegistryError: the registry cannot be used; what was not answered may be asked again.
        """
        answers: dict[int, RenewalAnswer] = {}
        provers: dict[int, Row] = {}
        rows: dict[int, Row] = {}
        told: dict[str, datetime] = {}
        authority = self._station.authority
        seals = Seals(self._station, authority)
        with self._station.registry.transaction() as transaction:
            for index, one in enumerate(asked):
                try:
                    prover = provers[index] = _prover(transaction, one)
                    if one.request.kind == "confirm":
                        answers[index] = self._confirmed(transaction, one, prover)
                    else:
                        rows[index] = self._keyed(transaction, one, prover, authority)
                except _RefusedError as refusal:
                    answers[index] = self._refuse(transaction, one, refusal, told)
        self._told_at |= told  # it is on record only now
        signed = self._signed({row.number: row for row in rows.values() if row.state is State.KEYED}, authority)
        if signed:
            with self._station.registry.transaction() as transaction:
                for number, leaf_der in signed.items():
                    self._issued(transaction, number, leaf_der)
        with self._station.registry.view() as view:
            stored = {index: view.row(row.number) for index, row in rows.items()}
            cas = read_cas(view)
        for index, row in stored.items():
            answers[index] = self._issue_answer(asked[index], row, cas)
        for index, prover in provers.items():
            if answers[index].outcome != "issued":
                with suppress(AuthorityError, RegistryError):  # unsigned it costs the device one attempt
                    answers[index] = seals.sealed(answers[index], prover)
        return [answers[index] for index in range(len(asked))]

    # --- a certificate ------------------------------------------------------------------------------------

    def _keyed(self, transaction: Transaction, one: Asked, prover: Row, authority: Authority) -> Row:
        """Return the row of a request for a certificate: in KEYED, or further if it was asked for before."""
        request = one.request
        public_key_der = self._new_key(one)
        known = transaction.by_public_key(public_key_der)
        is_successor = known is not None and known.renews == prover.number and known.state is State.ATTESTED
        if known is not None and is_successor and not known.is_revoked:
            return known  # what the device asks with may be revoked: this is what took its place
        current = self._current(transaction, one, prover)
        if known is not None:
            # Asked for before: its answer was lost, or is about to be.
            signer = authority.key_id if known.state is State.KEYED else known.issuer
            if known.renews == current.number and known.issuer == signer and known.state is not State.VOID:
                return known
            raise _RefusedError("the new key was used before: make another one", retry=True)
        if current.replaced_by is not None:
            raise _RefusedError("the certificate in use was renewed already, for another key")
        self._check_current(transaction, current)
        try:
            row = transaction.insert(
                kind=Kind.DEVICE,
                name=current.name,
                role=current.role,
                state=State.KEYED,
                key_mode=KeyMode.ON_DEVICE,
                hwid=current.hwid,
                txn=current.txn,
                public_key_der=public_key_der,
                cert_serial=authority.new_cert_serial(),
                issuer=authority.key_id,
                bundle_sha256=current.bundle_sha256,
                renews=current.number,
                label=current.label,
            )
        except DuplicateError as error:
            raise _RefusedError(f"the new key cannot be taken: {error.message}", retry=True) from error
        now = self._station.clock()
        for open_row in open_renewals(transaction, current):
            if open_row.number != row.number:
                mark_revoked(transaction, open_row, x509.ReasonFlags.superseded, word=_UNCONFIRMED, now=now)
        transaction.record(
            "renew",
            row.name,
            row=row.number,
            renews=current.number,
            cert_serial=f"{row.cert_serial:x}",
            old_cert_serial=f"{current.cert_serial:x}",
            nonce=request.nonce.hex(),
            by=str(one.device_id),
            via=one.via or None,
        )
        return row

    def _current(self, transaction: Transaction, one: Asked, row: Row) -> Row:
        """Return the row of the certificate that the request is made with, if it stands."""
        if row.is_revoked:
            raise _RefusedError("the certificate in use is revoked")
        successor = None if row.replaced_by is None else transaction.row(row.replaced_by)
        if successor is not None and successor.renews != row.number:
            raise _RefusedError("the device is being enrolled anew", retry=True)
        if row.is_open_renewal:
            return self._attested(transaction, one, row)
        if row.state is not State.ATTESTED:
            raise _RefusedError("the certificate in use is not confirmed yet", retry=True)
        return row

    def _check_current(self, transaction: Transaction, current: Row) -> None:
        settings = self._station.settings.renewal
        now = self._station.clock()
        if current.not_after is None or now > current.not_after + settings.grace_days * _DAY:
            raise _RefusedError(f"the certificate in use expired more than {settings.grace_days} days ago")
        lately = [
            row.created_at
            for row in transaction.named(current.name)
            if row.renews is not None and row.created_at > now - _DAY
        ]
        if len(lately) >= settings.max_per_day:
            wait_s = min(int((min(lately) + _DAY - now).total_seconds()) + 1, MAX_WAIT_S)
            raise _RefusedError(
                f"there were {len(lately)} renewals within a day", retry=True, retry_after_s=wait_s
            )

    def _new_key(self, one: Asked) -> bytes:
        try:
            return requested_key(one.request.csr_der, str(one.device_id))
        except BirthmarkError as error:
            raise _RefusedError(error.message) from error

    def _signed(self, keyed: dict[int, Row], authority: Authority) -> dict[int, bytes]:
        """Return the certificates of rows, by their numbers; of those that are still to be signed by now."""
        signed = {}
        for number, row in keyed.items():
            try:
                signed[number] = authority.issue_device(row, now=self._station.clock())
            except AuthorityError:
                with self._station.registry.view() as view:
                    now = view.row(number)
                if now is not None and now.state is State.KEYED and not now.is_revoked:
                    raise  # the CA's trouble, or the clock's
                # Its device asked with another key, or another service was faster: no trouble of anybody else's.
        return signed

    def _issued(self, transaction: Transaction, number: int, leaf_der: bytes) -> None:
        """Record a signed certificate; what happened to its row meanwhile decides whether it is sent."""
        row = transaction.row(number)
        if row is None or row.state is not State.KEYED:
            return
        renewed = None if row.renews is None else transaction.row(row.renews)
        if renewed is None or not renewed.is_live or renewed.is_revoked:
            now, word = self._station.clock(), "the certificate in use was revoked or replaced meanwhile"
            mark_revoked(transaction, row, x509.ReasonFlags.superseded, word=word, now=now)
            return
        transaction.update(with_certificate(row, leaf_der, anchors=renewed.anchors))

    def _issue_answer(self, one: Asked, row: Row | None, cas: Cas) -> RenewalAnswer:
        nonce = one.request.nonce
        if row is None or row.certificate_der is None or row.is_revoked or row.state is State.VOID:
            return RenewalAnswer("refused", nonce, reason="the renewal was revoked meanwhile", retry=True)
        anchors = self._anchors.pending_anchors(row, one.request.anchors_sha256)
        return RenewalAnswer(
            "issued",
            nonce,
            leaf_der=row.certificate_der,
            chain_der=(cas.get(row.issuer or cas.for_clients.key_id).certificate_der,),
            anchors=None if anchors is None else _update(one, anchors),
        )

    # --- its confirmation ---------------------------------------------------------------------------------

    def _confirmed(self, transaction: Transaction, one: Asked, row: Row) -> RenewalAnswer:
        """Make a renewal the device's certificate: it has connected with it."""
        if row.renews is None:
            raise _RefusedError("there is no such renewal")
        if row.is_revoked or row.state is State.VOID:
            raise _RefusedError("the renewed certificate is revoked")
        if row.state is not State.ATTESTED:
            self._attested(transaction, one, row)
        return RenewalAnswer("confirmed", one.request.nonce)

    def _attested(self, transaction: Transaction, one: Asked, row: Row) -> Row:
        """Have a renewal stand, and the certificate that it renews be due to be revoked."""
        if row.renews is None:
            raise ValueError(f"row {row.number} renews nothing")
        old = transaction.row(row.renews)
        if old is None or not old.is_live or old.is_revoked:
            raise _RefusedError("the certificate that it renews was revoked or replaced meanwhile")
        transaction.update(old.changed(replaced_by=row.number))
        made = transaction.update(row.changed(state=State.ATTESTED))
        made = self._anchors.confirmed_anchors(transaction, made, one.request.anchors_sha256)
        due_at = retirement_at(self._station.clock(), self._station.settings.renewal.retire_after_hours)
        note_retirement(transaction, old, due_at)
        transaction.record(
            "renewed",
            made.name,
            row=made.number,
            renews=old.number,
            cert_serial=f"{made.cert_serial:x}",
            old_cert_serial=f"{old.cert_serial:x}",
            old_revoked_after=due_at.isoformat(timespec="seconds"),
            by=str(one.device_id),
            via=one.via or None,
        )
        return made

    def _refuse(
        self, transaction: Transaction, one: Asked, refusal: _RefusedError, told: dict[str, datetime]
    ) -> RenewalAnswer:
        now, name = self._station.clock(), one.device_id.folded
        last = told.get(name) or self._told_at.get(name)
        is_due = last is None or last <= now - _REFUSALS_EVERY
        if is_due and transaction.named(name):
            # Not each one, and none in a name that we never gave: whoever means ill must not fill the audit log.
            told[name] = now
            transaction.record(
                "refuse", str(one.device_id), cause=refusal.reason, kind=one.request.kind, via=one.via or None
            )
        return refusal.answer(one.request.nonce)


def open_renewals(view: View, row: Row) -> list[Row]:
    """Return the renewals of `row` that its device has not confirmed."""
    return [other for other in view.named(row.name) if other.renews == row.number and other.is_open_renewal]


def _prover(view: View, one: Asked) -> Row:
    """Return the row of the certificate that a request is made with: its key signed the request."""
    named = view.named(str(one.device_id))
    row = next((row for row in named if _leaf_sha256(row) == one.request.leaf_sha256), None)
    if row is None or row.kind is not Kind.DEVICE:
        raise _RefusedError("the certificate in use is not one of this device's in the registry")
    if not is_proven(one.request, one.device_id, _public_key(row)):
        raise _RefusedError("the request is not signed by the key in use")
    return row


def _leaf_sha256(row: Row) -> bytes | None:
    return None if row.certificate_der is None else hashlib.sha256(row.certificate_der).digest()


def _public_key(row: Row) -> ec.EllipticCurvePublicKey:
    if row.certificate_der is None:
        raise ValueError(f"row {row.number} has no certificate")
    key = x509.load_der_x509_certificate(row.certificate_der).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise RegistryError(f"could not use the certificate of row {row.number}: its key is on no curve")
    return key


def _update(one: Asked, anchors: PendingAnchors) -> AnchorUpdate:
    signed = anchors_transcript(one.device_id, nonce=one.request.nonce, anchors_der=anchors.anchors_der)
    return AnchorUpdate(anchors.anchors_der, anchors.signer_der, anchors.sign(signed))
