"""Certificates that a renewal has replaced, and that are revoked (superseded) after a grace (docs/renewal.md).

Rules:

- What is due, and when, is noted in the registry in the transaction that makes the renewal stand, and forgotten in
  the one that revokes: it is neither lost nor done twice.
- What is replaced within an hour is revoked together: a CRL goes to every gateway whole, so one for each renewal
  of a large fleet would be more than all its messages.
- A revocation becomes effective with the next CRL: whoever retires has one signed and brought to the gateways. A
  full disk, a registry or a token that is away, or a defect puts that off, and no more.
- A row that is retired stays ATTESTED: its unit was made, and its batch counts it. Its certificate is revoked.
"""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from cryptography import x509

from birthmark.device.errors import BirthmarkError, RegistryError
from birthmark.provisioning.crl_delivery import bring_new_crl
from birthmark.provisioning.crls import stale_crls
from birthmark.provisioning.defects import described
from birthmark.provisioning.revocation import mark_revoked

if TYPE_CHECKING:
    from birthmark.device.console import Console
    from birthmark.provisioning.registry.interface import Transaction, View
    from birthmark.provisioning.registry.model import Row
    from birthmark.provisioning.station import Station

RETIREMENTS: Final = "retirement"
"""The topic of the notes: row number to `{"due": seconds since 1970}`."""
_WORD: Final = "renewed"
_LONGEST_NAP_S: Final = 60.0
_TROUBLE_NAP_S: Final = 300.0


def retirement_at(now: datetime, after_hours: int) -> datetime:
    """Return when a certificate that is replaced now is to be revoked: `after_hours` later, at the next full hour.

    With 0 hours it is at once.
    """
    due_at = now + timedelta(hours=after_hours)
    begun_at = due_at.replace(minute=0, second=0, microsecond=0)
    return due_at if not after_hours or begun_at == due_at else begun_at + timedelta(hours=1)


def note_retirement(transaction: Transaction, row: Row, due_at: datetime) -> None:
    """Have the certificate of `row` revoked at `due_at`."""
    transaction.put_note(RETIREMENTS, str(row.number), {"due": int(due_at.timestamp())})


def due_retirements(view: View, now: datetime) -> list[int]:
    """Return the numbers of the rows whose certificates are to be revoked by now."""
    return [number for number, due_at in _noted(view) if due_at <= now]


def next_retirement_at(view: View) -> datetime | None:
    """Return when the next one is due; None if there is none."""
    return min((due_at for _, due_at in _noted(view)), default=None)


def retire_due(station: Station) -> int:
    """Mark as revoked what is due; the caller then has a CRL signed and delivered.

    Returns:
        How many certificates were revoked.

    Raises:
        RegistryError: the registry cannot be used; nothing was changed.
    """
    now = station.clock()
    with station.registry.view() as view:
        if not due_retirements(view, now):
            return 0
    retired = 0
    with station.registry.transaction() as transaction:
        for number in due_retirements(transaction, now):
            row = transaction.row(number)
            if row is not None:
                retired += mark_revoked(transaction, row, x509.ReasonFlags.superseded, word=_WORD, now=now)
            transaction.put_note(RETIREMENTS, str(number), None)
    return retired


class Retiring:
    """Revokes what is due, when its time has come, and has the gateways know, on a thread of its own.

    Args:
        station: unlocked at the first CRL.
        console: where it is told.
    """

    def __init__(self, station: Station, console: Console) -> None:
        self._station = station
        self._console = console
        self._look = threading.Event()
        self._is_over = False
        self._is_owed = False
        """Whether a CRL is still to be signed, or to be brought to the gateways."""
        self._thread = threading.Thread(target=self._run, name="birthmark-retiring", daemon=True)

    def start(self) -> None:
        """Begin, with what a run that was killed has left.

        Raises:
            RegistryError: the registry cannot be read.
        """
        self._is_owed = bool(stale_crls(self._station)[0])
        self._thread.start()

    def look(self) -> None:
        """Look again when the next one is due."""
        self._look.set()

    def stop(self) -> None:
        """End, once what is under way is done."""
        self._is_over = True
        self._look.set()
        self._thread.join()

    def _run(self) -> None:
        nap_s = 0.0
        while True:
            self._look.wait(nap_s)
            self._look.clear()
            if self._is_over:
                return
            try:
                self._turn()
                nap_s = self._nap_s()
            except BirthmarkError as error:
                self._console.warn(f"{error.message} ({error.hint})")
                nap_s = _TROUBLE_NAP_S
            except OSError as error:
                self._console.warn(f"could not bring what is retired to the gateways: {error.strerror or error}")
                nap_s = _TROUBLE_NAP_S
            except Exception as error:  # noqa: BLE001 - or replaced certificates would stay good for good
                self._console.warn(
                    f"could not bring what is retired to the gateways: a defect: {described(error)}"
                )
                nap_s = _TROUBLE_NAP_S

    def _turn(self) -> None:
        if retire_due(self._station):
            self._is_owed = True
        if self._is_owed:
            bring_new_crl(self._station, self._console)
            self._is_owed = False

    def _nap_s(self) -> float:
        with self._station.registry.view() as view:
            due_at = next_retirement_at(view)
        if due_at is None:
            return _LONGEST_NAP_S
        left = due_at - self._station.clock() + timedelta(seconds=1)
        return min(_LONGEST_NAP_S, max(1.0, left.total_seconds()))


def _noted(view: View) -> list[tuple[int, datetime]]:
    found = []
    for key, note in view.notes(RETIREMENTS).items():
        due = note.get("due")
        if not key.isdecimal() or isinstance(due, bool) or not isinstance(due, int):
            raise RegistryError(
                "could not read the registry: a note of a retirement is damaged",
                hint="restore it from a backup, together with the audit log",
            )
        found.append((int(key), datetime.fromtimestamp(due, UTC)))
    return found
