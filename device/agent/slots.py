"""The device's records: one file each in a folder of mode 0700 (docs/serial-protocol.md section 7).

    hwid      the hardware id where the hardware has none, hex text
    pending   transaction and key
    prepared  transaction, key and bundle
    active    the same; this one makes the device locked
    unlock    the transaction that a locked device may be enrolled in anew
    renewed   written by a renewal over the network, in the shape of `active` and with its transaction
    renewal   a renewal under way, with the same transaction (`device.renewal.store`)

Every record but `hwid` is PEM text of mode 0600. `active` is what `ssl.SSLContext.load_cert_chain` reads as it
is: the private key, the leaf, the issuing certificates, the bundle and the transaction, each in its block.

Rules:

- A record is written to a temporary name, fsynced, renamed, and the folder fsynced, before a call returns. A write
  that fails leaves the records as they were.
- COMMIT is one rename, `prepared` to `active`. It writes no data, so no lack of space can stop it half-way.
- The files are the state: nothing is kept in memory that a reboot could contradict.
- `unlock` counts only beside an `active` of another transaction; `pending` only without an `active`, or for the
  unlocked transaction; `prepared` only beside a `pending` with the same transaction and the same key. So one
  rename decides, and removing what no longer counts may fail or come late.
- `recover` at boot removes what does not count. A damaged `active` is an error, never a blank device.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from typing import TYPE_CHECKING, Final

from birthmark.device import pem
from birthmark.device.agent.storage import Storage
from birthmark.device.durable import private_folder, remove_leftovers
from birthmark.device.errors import BirthmarkError, CredentialError, SystemFailureError
from birthmark.device.frozen import Frozen
from birthmark.device.link.bundle import Bundle
from birthmark.device.link.vocabulary import MAX_HWID_BYTES, MIN_HWID_BYTES, TXN_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HWID: Final = "hwid"
PENDING: Final = "pending"
PREPARED: Final = "prepared"
ACTIVE: Final = "active"
UNLOCK: Final = "unlock"
RENEWED: Final = "renewed"
RENEWAL: Final = "renewal"

_RECORDS: Final = (HWID, PENDING, PREPARED, ACTIVE, UNLOCK, RENEWED, RENEWAL)
_MAX_RECORD_BYTES = 256 * 1024


class StoreError(SystemFailureError):
    """A record could not be written or removed; the records are as they were."""


class PendingKey(Frozen, secret=("key_der",)):
    """The key of an enrollment under way."""

    txn: bytes
    key_der: bytes
    """PKCS#8."""


class Slot(Frozen, secret=("key_der",)):
    """A whole identity: its transaction, key and bundle."""

    txn: bytes
    key_der: bytes
    """PKCS#8."""
    bundle: Bundle

    @property
    def bundle_sha256(self) -> bytes:
        """Of the bundle as it came."""
        return hashlib.sha256(self.bundle.to_bytes()).digest()

    @property
    def leaf_sha256(self) -> bytes:
        """Of the device's certificate, DER."""
        return hashlib.sha256(self.bundle.leaf_der).digest()

    def is_of(self, length: int, bundle_sha256: bytes) -> bool:
        """Whether it holds the bundle of this length and hash."""
        return (len(self.bundle.to_bytes()), self.bundle_sha256) == (length, bundle_sha256)

    def to_pem(self) -> bytes:
        """The record's text."""
        return b"".join(
            (
                pem.block(pem.PRIVATE_KEY, self.key_der),
                *(pem.block(pem.CERTIFICATE, der) for der in (self.bundle.leaf_der, *self.bundle.issuing_der)),
                pem.block(pem.BUNDLE, self.bundle.to_bytes()),
                pem.block(pem.TRANSACTION, self.txn),
            )
        )


class Slots:
    """The records in one folder, which is made if needed.

    Args:
        folder: the device's state folder.
        storage: what they are written with: the file system, unless a simulator wants it to fail.
    """

    def __init__(self, folder: Path, storage: Storage | None = None) -> None:
        self.folder = folder
        self._storage = storage or Storage()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep every other agent off the folder for the block, by a lock on the folder itself.

        Raises:
            SystemFailureError: another agent holds it.
        """
        private_folder(self.folder, _RECORDS)
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemFailureError(
                    f"could not use the state folder {self.folder}: another agent is using it",
                    hint="stop the other `birthmark-device agent`, or give each its own --state",
                ) from None
            yield
        finally:
            os.close(descriptor)

    def recover(self) -> None:
        """Do what a boot does: make the folder if needed, and remove what a crash left behind.

        Raises:
            CredentialError: the active slot is there but damaged.
            StoreError: a leftover could not be removed.
        """
        with _storing("recover the records"):
            private_folder(self.folder, _RECORDS)
            remove_leftovers(self.folder)
            active = self.active()
            self._remove_unless(UNLOCK, self.unlocked_txn)
            self._remove_unless(PENDING, self.pending)
            self._remove_unless(PREPARED, self.prepared)
            self._remove_unless(RENEWED, lambda: self._renewed_of(active))
            self._remove_unless(RENEWAL, lambda: self._renewal_of(active))
            self._storage.sync(self.folder)

    def kept_hwid(self, random_bytes: Callable[[int], bytes], length: int) -> bytes:
        """The hardware id in the folder, made from `random_bytes` the first time.

        Raises:
            CredentialError: the record is damaged.
            StoreError: it could not be stored.
        """
        private_folder(self.folder, _RECORDS)
        text = self._read(HWID)
        if text is None:
            hwid = random_bytes(length)
            self._write(HWID, hwid.hex().encode() + b"\n")
            return hwid
        try:
            hwid = bytes.fromhex(text.decode("ascii"))
        except ValueError:
            hwid = b""
        if not MIN_HWID_BYTES <= len(hwid) <= MAX_HWID_BYTES:
            raise self._damaged(HWID, "it is no hardware id")
        return hwid

    def pending(self) -> PendingKey | None:
        """The key of the enrollment under way, if there is one."""
        blocks = self._blocks(PENDING)
        if blocks is None:
            return None
        pending = PendingKey(self._txn(PENDING, blocks), self._key(PENDING, blocks))
        return pending if self.active() is None or pending.txn == self.unlocked_txn() else None

    def prepared(self) -> Slot | None:
        """The slot that COMMIT would make active, if there is one for the pending key."""
        pending = self.pending()
        prepared = None if pending is None else self._slot(PREPARED)
        if pending is None or prepared is None:
            return None
        same = (prepared.txn, prepared.key_der) == (pending.txn, pending.key_der)
        return prepared if same else None

    def active(self) -> Slot | None:
        """The device's identity, if it is locked."""
        return self._slot(ACTIVE)

    def unlocked_txn(self) -> bytes | None:
        """The transaction that a locked device may be enrolled in, if it was unlocked for one."""
        blocks = self._blocks(UNLOCK)
        if blocks is None:
            return None
        txn = self._txn(UNLOCK, blocks)
        active = self.active()
        return None if active is None or active.txn == txn else txn

    def store_pending(self, pending: PendingKey) -> None:
        """Store a key, and drop the slot that was prepared for another one.

        Raises:
            StoreError: it could not be stored; nothing changed.
        """
        key = pem.block(pem.PRIVATE_KEY, pending.key_der)
        self._write(PENDING, key + pem.block(pem.TRANSACTION, pending.txn))
        self._sweep(PREPARED)

    def store_prepared(self, slot: Slot) -> None:
        """Store the slot that COMMIT will make active.

        Raises:
            StoreError: it could not be stored; nothing changed.
        """
        self._write(PREPARED, slot.to_pem())

    def store_unlocked(self, txn: bytes) -> None:
        """Let a locked device be enrolled in `txn`, and drop an enrollment in another one.

        Raises:
            StoreError: it could not be stored; nothing changed.
        """
        self._write(UNLOCK, pem.block(pem.TRANSACTION, txn))
        if self.pending() is None:
            self._sweep(PENDING, PREPARED)

    def commit(self) -> None:
        """Make the prepared slot the active one: one rename. The device is locked when this returns.

        Raises:
            StoreError: it could not be renamed; nothing changed.
        """
        with _storing("commit the prepared slot"):
            self._storage.rename(self.folder / PREPARED, self.folder / ACTIVE)
        self._sweep(RENEWED, RENEWAL, PENDING, UNLOCK)

    def confirm(self) -> None:
        """Make sure once more that what was renamed is durable; raises `StoreError`."""
        with _storing("confirm the active slot"):
            self._storage.sync(self.folder)

    def drop_open(self) -> None:
        """Drop what an enrollment under way has stored, an unlocking included.

        Raises:
            StoreError: a record could not be removed.
        """
        with _storing("drop the open enrollment"):
            for name in (PREPARED, PENDING, UNLOCK):
                self._remove(name)
            self._storage.sync(self.folder)

    def _sweep(self, *names: str) -> None:
        """Remove records that count no more; if that fails, the next boot removes them."""
        with contextlib.suppress(OSError):
            for name in names:
                self._remove(name)
            self._storage.sync(self.folder)

    def _remove_unless(self, name: str, counts: Callable[[], object]) -> None:
        """Remove a record that is damaged, or that does not count beside the others."""
        try:
            keep = counts() is not None
        except CredentialError:
            keep = False
        if not keep:
            self._remove(name)

    def _renewed_of(self, active: Slot | None) -> Slot | None:
        renewed = self._slot(RENEWED)
        return renewed if renewed and active and renewed.txn == active.txn else None

    def _renewal_of(self, active: Slot | None) -> bytes | None:
        blocks = self._blocks(RENEWAL)
        txn = None if blocks is None else self._txn(RENEWAL, blocks)
        return txn if active is not None and txn == active.txn else None

    def _slot(self, name: str) -> Slot | None:
        blocks = self._blocks(name)
        if blocks is None:
            return None
        try:
            bundle = Bundle.from_bytes(self._only(name, blocks, pem.BUNDLE))
        except CredentialError:
            raise
        except BirthmarkError as error:
            raise self._damaged(name, error.message) from None
        return Slot(self._txn(name, blocks), self._key(name, blocks), bundle)

    def _txn(self, name: str, blocks: list[tuple[str, bytes]]) -> bytes:
        txn = self._only(name, blocks, pem.TRANSACTION)
        if len(txn) != TXN_BYTES:
            raise self._damaged(name, f"its transaction has {len(txn)} bytes")
        return txn

    def _key(self, name: str, blocks: list[tuple[str, bytes]]) -> bytes:
        return self._only(name, blocks, pem.PRIVATE_KEY)

    def _only(self, name: str, blocks: list[tuple[str, bytes]], label: str) -> bytes:
        found = [content for block_label, content in blocks if block_label == label]
        if len(found) != 1:
            raise self._damaged(name, f"it holds {len(found)} blocks of {label} where one belongs")
        return found[0]

    def _blocks(self, name: str) -> list[tuple[str, bytes]] | None:
        text = self._read(name)
        if text is None:
            return None
        try:
            return pem.read_blocks(text)
        except CredentialError as error:
            raise self._damaged(name, error.message) from None

    def _damaged(self, name: str, cause: str) -> CredentialError:
        return CredentialError(
            f"could not read the record {self.folder / name}: {cause}",
            hint="the storage is damaged; only a physical reset of the device helps",
        )

    def _read(self, name: str) -> bytes | None:
        with _storing(f"read the record {name}"):
            try:
                with (self.folder / name).open("rb") as file:
                    return file.read(_MAX_RECORD_BYTES)
            except FileNotFoundError:
                return None

    def _write(self, name: str, content: bytes) -> None:
        with _storing(f"store the record {name}"):
            self._storage.write(self.folder / name, content)

    def _remove(self, name: str) -> None:
        self._storage.remove(self.folder / name)


@contextlib.contextmanager
def _storing(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"could not {what}: {error.strerror or error}", hint="check the storage and its free space"
        ) from error
