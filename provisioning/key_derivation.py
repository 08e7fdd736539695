"""Deriving the key of a CA's key file ahead, while the command loads its libraries and the registry.

A passphrase costs a third of a second, by intention, and OpenSSL spends it without Python's lock. A command
that needs the CA's key whatever happens begins with that, and waits for it where it needs it.

Rules:

- Only where nobody has to be asked: with the passphrase in the environment, or on a descriptor.
- Of several issuing CAs' keys, those of CAs that are trusted, as far as the copies of their certificates tell.
- It changes nothing but the time: what was derived is for one passphrase and one file's content. Who reads another
  one derives for himself, and it is the reader who judges the file, the passphrase and the key.
- Neither passphrase nor key is anywhere but in memory, which is kept out of core files before.
"""

from __future__ import annotations

import os
import re
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from birthmark.device.core_dumps import forbid_core_dumps
from birthmark.device.errors import AuthorityError, BirthmarkError
from birthmark.device.pem import read_blocks
from birthmark.provisioning.encrypted_key import EncryptedKey
from birthmark.provisioning.places import ISSUING_FILE, KEYS_FOLDER, PASSPHRASE_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_KEY_FILES: Final = "issuing-*.key.pem"
_NAME_OF_CA: Final = re.compile(rb"issuing CA ([0-9a-f]{8})")
"""A CA's name ends in the beginning of its key identifier, and so does that of its key file."""


class _Derivation(threading.Thread):
    """A thread that dies with the process: a command that fails before it needs the key waits for nobody."""

    def __init__(self, key: EncryptedKey, read_passphrase: Callable[[], bytes]) -> None:
        super().__init__(name="key derivation", daemon=True)
        self._key = key
        self._read_passphrase = read_passphrase
        self.passphrase = b""
        self.derived: bytes | None = None

    def run(self) -> None:
        with suppress(AuthorityError, ValueError, MemoryError):  # whoever needs the key finds out, and says so
            self.passphrase = self._read_passphrase()
            self.derived = self._key.derivation.derive(self.passphrase, self._key.salt)


_under_way: dict[EncryptedKey, _Derivation] = {}


def derive_ahead(folder: Path, *, descriptor: int | None = None, every: bool = False) -> None:
    """Begin to derive what opens the issuing CA's key of the station in `folder`, if that can be known by now.

    Args:
        folder: the station's.
        descriptor: where the passphrase is to be read, and not in the environment.
        every: derive for every issuing CA that is trusted, not only for the one that issues now.
    """
    passphrase = os.environb.get(PASSPHRASE_VARIABLE.encode())
    keys = [] if descriptor is None and not passphrase else _issuing_keys(folder, every=every)
    if not keys:
        return
    forbid_core_dumps()
    read_passphrase = (lambda: passphrase or b"") if descriptor is None else _early_line(descriptor)
    for key in keys:
        derivation = _under_way[key] = _Derivation(key, read_passphrase)
        derivation.start()


def derived(key: EncryptedKey, passphrase: bytes) -> bytes:
    """Return the AES key that `passphrase` stands for, from ahead if it was begun.

    Raises:
        ValueError: the file asks for a derivation that there is none of.
    """
    ahead = _under_way.pop(key, None)
    if ahead is not None:
        ahead.join()
        if ahead.derived is not None and ahead.passphrase == passphrase:
            return ahead.derived
    return key.derivation.derive(passphrase, key.salt)


def is_under_way() -> bool:
    """Whether what was begun ahead is not done yet: who is about to wait for it may do something else first."""
    return any(ahead.is_alive() for ahead in list(_under_way.values()))  # others take theirs out meanwhile


def _early_line(descriptor: int) -> Callable[[], bytes]:
    from birthmark.provisioning.passphrase import EarlyPassphrase  # noqa: PLC0415 - it takes time to import

    return EarlyPassphrase(descriptor).line


def _issuing_keys(folder: Path, *, every: bool) -> list[EncryptedKey]:
    """Return the keys in the key files of issuing CAs: of the trusted ones, the first of which issues now."""
    try:
        paths = list((folder / KEYS_FOLDER).glob(_KEY_FILES))
        if len(paths) > 1:
            names = (_NAME_OF_CA.search(der) for _, der in read_blocks((folder / ISSUING_FILE).read_bytes()))
            trusted = [_KEY_FILES.replace("*", name[1].decode()) for name in names if name]
            held = {path.name: path for path in paths}
            paths = [held[name] for name in trusted if name in held]
        found = [EncryptedKey.from_pem(path.read_bytes()) for path in (paths if every else paths[:1])]
    except (ValueError, OSError, BirthmarkError):
        return []
    return [key for key in found if key is not None]
