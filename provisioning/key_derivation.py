"""Deriving the key of a CA's key file ahead, while the command loads its libraries and the registry.

A passphrase costs half a second, by intention, and OpenSSL spends it without Python's lock. A command that needs
the CA's key whatever happens begins with that, and waits for it where it needs it.

Rules:

- Only where nobody has to be asked: with the passphrase in the environment, and one issuing CA's key file.
- It changes nothing but the time: what was derived is for one passphrase and one file's content. Who reads another
  one derives for himself, and it is the reader who judges the file, the passphrase and the key.
- Neither passphrase nor key is anywhere but in memory, which is kept out of core files before.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from birthmark.device.core_dumps import forbid_core_dumps
from birthmark.provisioning.encrypted_key import EncryptedKey
from birthmark.provisioning.places import KEYS_FOLDER, PASSPHRASE_VARIABLE

if TYPE_CHECKING:
    from pathlib import Path

_KEY_FILES: Final = "issuing-*.key.pem"


class _Derivation(threading.Thread):
    """A thread that dies with the process: a command that fails before it needs the key waits for nobody."""

    def __init__(self, key: EncryptedKey, passphrase: bytes) -> None:
        super().__init__(name="key derivation", daemon=True)
        self._key = key
        self._passphrase = passphrase
        self.derived: bytes | None = None

    def run(self) -> None:
        with suppress(ValueError, MemoryError):  # whoever needs the key finds out, and says so
            self.derived = self._key.derivation.derive(self._passphrase, self._key.salt)


_under_way: dict[tuple[EncryptedKey, bytes], _Derivation] = {}


def derive_ahead(folder: Path) -> None:
    """Begin to derive what opens the issuing CA's key of the station in `folder`, if that can be known by now."""
    passphrase = os.environb.get(PASSPHRASE_VARIABLE.encode())
    try:
        (path,) = (folder / KEYS_FOLDER).glob(_KEY_FILES)
        key = EncryptedKey.from_pem(path.read_bytes())
    except (ValueError, OSError):
        return
    if key is not None and passphrase:
        forbid_core_dumps()
        derivation = _under_way[key, passphrase] = _Derivation(key, passphrase)
        derivation.start()


def derived(key: EncryptedKey, passphrase: bytes) -> bytes:
    """Return the AES key that `passphrase` stands for, from ahead if it was begun.

    Raises:
        ValueError: the file asks for a derivation that there is none of.
    """
    ahead = _under_way.pop((key, passphrase), None)
    if ahead is not None:
        ahead.join()
        if ahead.derived is not None:
            return ahead.derived
    return key.derivation.derive(passphrase, key.salt)
