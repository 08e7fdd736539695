"""A renewal on the device's disk: one record beside `active` and `renewed` (docs/renewal.md).

    renewal   while it is asked for: the new key, the certification request, the transaction of `active`
              once it is granted: a whole slot in the shape of `active`, to be tried and confirmed
    renewed   the same, confirmed: one rename

Rules:

- The record is written whole or not at all, mode 0600, and durable before a call returns; it survives a reboot.
- `active` is never touched, and `renewed` only by the rename that confirms: at every moment there is a whole slot.
- A record of another transaction than that of `active` is left over from before an enrollment anew: it does not
  count, and is removed.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from birthmark.device import pem
from birthmark.device.agent.slots import ACTIVE, RENEWAL, RENEWED, Slot
from birthmark.device.credentials import Credentials
from birthmark.device.durable import exclusive_lock, rename_durably, sync_folder, write_durably
from birthmark.device.errors import BirthmarkError, CredentialError, SystemFailureError
from birthmark.device.frozen import Frozen
from birthmark.device.link.bundle import Bundle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from birthmark.device.credentials import BrokerAddress

LOCK_FILE: Final = "renewal.lock"
_MAX_RECORD_BYTES: Final = 256 * 1024


class AskedKey(Frozen, secret=("key_der",)):
    """A new key that a certificate is asked for."""

    key_der: bytes
    """PKCS#8."""
    csr_der: bytes


class RenewalStore:
    """The record of one device's renewal.

    Args:
        folder: the state folder.
        broker: where to connect, if not where the bundle says.
    """

    def __init__(self, folder: Path, *, broker: BrokerAddress | None = None) -> None:
        self._folder = folder
        self._path = folder / RENEWAL
        self._broker = broker

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep every other client of this device from renewing, for the block.

        Raises:
            SystemFailureError: another one holds it, or the folder cannot be written.
        """
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(exclusive_lock(self._folder / LOCK_FILE, wait=False))
            except BlockingIOError:
                raise SystemFailureError(
                    f"could not renew in {self._folder}: another client with this identity is running",
                    hint="ask it from the station (`birthmark renew ID`), or stop it first",
                ) from None
            except OSError as error:
                raise _failed("keep the renewal to itself", error) from error
            yield

    def current(self) -> Credentials:
        """Return the credentials that are confirmed; raises `CredentialError`."""
        return Credentials.from_folder(self._folder, broker=self._broker)

    def current_slot(self) -> Slot:
        """Return the slot that is confirmed, with its key; raises `CredentialError`."""
        return self._slot(self._folder / self.current().pem_path.name)

    def asked(self) -> AskedKey | None:
        """Return the key that a certificate is asked for, if there is one.

        Raises:
            SystemFailureError: the record cannot be read at the moment.
        """
        blocks = self._counting()
        keys = [content for label, content in blocks if label == pem.PRIVATE_KEY]
        requests = [content for label, content in blocks if label == pem.CERTIFICATE_REQUEST]
        return AskedKey(keys[0], requests[0]) if len(keys) == len(requests) == 1 else None

    def candidate(self) -> Credentials | None:
        """Return the credentials that are to be tried and confirmed; None if there are none, or damaged ones.

        Raises:
            SystemFailureError, CredentialError: they are there, and cannot be read at the moment, or must not be.
        """
        if not any(label == pem.BUNDLE for label, _ in self._counting()):
            return None
        try:
            return Credentials.from_slot(self._path, broker=self._broker)
        except CredentialError as error:
            if isinstance(error.__cause__, OSError) or self._path.stat().st_mode & 0o077:
                raise  # the station may count on it: nothing is put in its place
            return None

    def candidate_slot(self) -> Slot:
        """Return the slot to be confirmed, with its key; raises `CredentialError`."""
        return self._slot(self._path)

    def keep_asked(self, asked: AskedKey) -> None:
        """Store a new key before a certificate is asked for.

        Raises:
            SystemFailureError: it could not be stored; nothing changed.
        """
        self._write(
            pem.block(pem.PRIVATE_KEY, asked.key_der)
            + pem.block(pem.CERTIFICATE_REQUEST, asked.csr_der)
            + pem.block(pem.TRANSACTION, self.current_slot().txn)
        )

    def keep_candidate(self, slot: Slot) -> Credentials:
        """Store what was granted, in the place of its key alone, and return it.

        Raises:
            SystemFailureError: it could not be stored; nothing changed.
            CredentialError: it cannot be read again.
        """
        self._write(slot.to_pem())
        return Credentials.from_slot(self._path, broker=self._broker)

    def confirm(self) -> Credentials:
        """Make what was granted the credentials from now on: one rename; return them.

        Raises:
            SystemFailureError: it could not be renamed; nothing changed.
        """
        try:
            rename_durably(self._path, self._folder / RENEWED)
        except OSError as error:
            raise _failed("keep the renewed certificate", error) from error
        return self.current()

    def drop(self) -> None:
        """Remove the record.

        Raises:
            SystemFailureError: it could not be removed.
        """
        try:
            self._path.unlink(missing_ok=True)
            sync_folder(self._folder)
        except OSError as error:
            raise _failed("remove the renewal", error) from error

    def _counting(self) -> list[tuple[str, bytes]]:
        """Return the record's blocks; none if there is no record, or one that does not count."""
        try:
            with self._path.open("rb") as file:
                blocks = pem.read_blocks(file.read(_MAX_RECORD_BYTES))
        except (FileNotFoundError, CredentialError):
            return []
        except OSError as error:
            raise _failed("read the renewal", error) from error
        txns = [content for label, content in blocks if label == pem.TRANSACTION]
        active = self._slot(self._folder / ACTIVE)
        return blocks if txns == [active.txn] else []

    def _slot(self, path: Path) -> Slot:
        try:
            blocks = dict(pem.read_blocks(path.read_bytes()))  # of several certificates, none is asked for here
            return Slot(blocks[pem.TRANSACTION], blocks[pem.PRIVATE_KEY], Bundle.from_bytes(blocks[pem.BUNDLE]))
        except (OSError, KeyError, BirthmarkError) as error:
            cause = error.strerror if isinstance(error, OSError) else "it is damaged"
            raise CredentialError(f"could not read the slot {path}: {cause}") from error

    def _write(self, content: bytes) -> None:
        try:
            write_durably(self._path, content, mode=0o600)
        except OSError as error:
            raise _failed("store the renewal", error) from error


def _failed(what: str, error: OSError) -> SystemFailureError:
    return SystemFailureError(
        f"could not {what}: {error.strerror or error}",
        hint="check the storage, its free space and its permissions; the identity in use stands",
    )
