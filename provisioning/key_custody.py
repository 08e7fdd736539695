"""A root's key on its way to a safe place, off the station; and an issuing CA's that is lost.

Rules:

- The key leaves the station only after its copy has been written, fsynced, read back from the medium and unlocked
  there, and fits the root's certificate. Killed at any step, there is at least one whole copy, and running it
  again finishes.
- The copy is the encrypted file as it is: under the same passphrase. A file of another content is never replaced.
- What is removed is unlinked, not wiped: no file system promises that. The passphrase protects what remains.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from birthmark.device.durable import remove_leftovers, sync_folder, write_durably
from birthmark.device.errors import AuthorityError, ConfigurationError
from birthmark.device.escape import quoted
from birthmark.provisioning import keyfile
from birthmark.provisioning.cas import SHORT, put_ca, read_cas

if TYPE_CHECKING:
    from pathlib import Path

    from birthmark.provisioning.cas import Ca
    from birthmark.provisioning.station import Station


@dataclass(frozen=True, slots=True)
class Detached:
    """A root whose key is away now."""

    root: Ca
    path: Path
    """Where the key is; `--root-key` takes it."""
    newly: bool
    """Whether it was still at the station."""


def detach_roots(
    station: Station, folder: Path, passphrase: bytes | None, *, same_disk: bool = False
) -> list[Detached]:
    """Move the keys of all roots that are trusted to `folder`.

    Args:
        station: whose.
        folder: a folder on another medium, mounted so that nobody else can read it.
        passphrase: the roots'; None: as in `Station.open_root`.
        same_disk: take a folder on the station's own file system as well.

    Raises:
        ConfigurationError: there is no such folder, or it is on the station's own file system.
        AuthorityError: a key is neither here nor there, cannot be unlocked, or another file is in its place;
            every key that was at the station is there still, but for those that were moved already.
        OSError: it could not be written; the same.
    """
    _check_folder(station, folder, same_disk=same_disk)
    with station.rollover_lock():
        return [_detach(station, root, folder, passphrase) for root in station.cas.roots]


def give_up_key(station: Station, word: str, *, found: bool = False) -> Ca:
    """Give an issuing CA's key up for lost: nothing waits for it any more, and its last CRL stays as it is.

    What the CA issued can no longer be revoked on a CRL; it is to be replaced, and retired.

    Args:
        station: whose.
        word: the CA's key identifier, or the beginning that people are shown.
        found: take that back.

    Raises:
        AuthorityError: there is no such issuing CA; nothing was changed.
    """
    with station.rollover_lock(), station.registry.transaction() as transaction:
        cas = read_cas(transaction)
        named = [ca for ca in cas.issuing if len(word) >= SHORT and ca.key_id.startswith(word.lower())]
        if len(named) != 1:
            raise AuthorityError(
                f"could not give up the key of the CA {quoted(word, 80)}: there is no such issuing CA",
                hint=f"name one of these: {', '.join(ca.short for ca in cas.issuing)}",
            )
        ca = replace(named[0], lost_at=None if found else named[0].lost_at or station.clock())
        if ca != named[0]:
            put_ca(transaction, ca)
            transaction.record("ca-key-found" if found else "ca-key-lost", "issuing-ca", key_id=ca.key_id)
        return ca


def _check_folder(station: Station, folder: Path, *, same_disk: bool) -> None:
    if not folder.is_dir():
        raise ConfigurationError(
            f"could not move the root's key to {folder}: there is no such folder", hint="is the medium mounted?"
        )
    if not same_disk and folder.stat().st_dev == station.folder.stat().st_dev:
        raise ConfigurationError(
            f"could not move the root's key to {folder}: it is on the station's own file system",
            hint="is the medium mounted? With --same-disk it goes there all the same",
        )


def _detach(station: Station, root: Ca, folder: Path, passphrase: bytes | None) -> Detached:
    source = station.key_path(root)
    target = folder.absolute() / source.name
    here = source.exists()
    if here:
        content = source.read_bytes()
        station.open_root(root, passphrase, source)
        station.note_unlock(root, source)
        _copy(content, target)
    elif not target.exists():
        raise AuthorityError(
            f"could not move the key of the root CA {root.short}: it is neither at the station nor in {folder}",
            hint="it was moved before: `birthmark audit show --action detach-root` says where to",
        )
    _drop_cached(target)
    station.open_root(root, passphrase, target)
    if here:
        # Before it is removed, so that no key is ever gone without a word of where it went.
        with station.registry.transaction() as transaction:
            transaction.record("detach-root", "root-ca", key_id=root.key_id, to=str(target))
        source.unlink()
        sync_folder(source.parent)
    else:
        station.note_unlock(root, target)
    return Detached(root, target, here)


def _copy(content: bytes, target: Path) -> None:
    remove_leftovers(target.parent, target.name)
    if target.exists():
        if target.read_bytes() == content:
            return
        raise AuthorityError(
            f"could not move the root's key to {target}: there is another file", hint="move that one away first"
        )
    write_durably(target, content, mode=keyfile.KEY_FILE_MODE)


def _drop_cached(path: Path) -> None:
    """Have the next reading come from the medium, as far as the system lets us."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
