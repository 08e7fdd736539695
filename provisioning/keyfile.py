"""A CA's private key in a file: PKCS#8, encrypted under a passphrase with scrypt and AES-256-CBC.

The form is `encrypted_key`'s: `cryptography` reads it, but writes only PBKDF2 with 2,048 rounds, which is nothing
against today's guessing. An encrypted key of another program's is read as well, if it is of PKCS#8.

Rules: file mode 0400 in a folder 0700; a key file that others can read is refused; the key is never in an error.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
    load_pem_private_key,
)

from birthmark.device.durable import remove_leftovers, write_durably
from birthmark.device.errors import AuthorityError
from birthmark.provisioning.encrypted_key import (
    BLOCK_OCTETS,
    DEFAULT_DERIVATION,
    LABEL,
    EncryptedKey,
    KeyDerivation,
)
from birthmark.provisioning.key_derivation import derived

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

KEY_FILE_MODE: Final = 0o400
_OTHERS: Final = 0o077


class WrongPassphraseError(AuthorityError):
    """A passphrase that does not open a key file."""


def encrypted_pem(private_key: EllipticCurvePrivateKey, passphrase: bytes, derivation: KeyDerivation) -> bytes:
    """Return the key as an encrypted PKCS#8 PEM block.

    Raises:
        AuthorityError: the passphrase is empty.
    """
    if not passphrase:
        raise AuthorityError("could not encrypt the CA's key: the passphrase is empty", hint="choose a long one")
    salt, iv = secrets.token_bytes(BLOCK_OCTETS), secrets.token_bytes(BLOCK_OCTETS)
    plain = private_key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    padder = PKCS7(BLOCK_OCTETS * 8).padder()
    encryptor = Cipher(AES256(derivation.derive(passphrase, salt)), CBC(iv)).encryptor()
    sealed = encryptor.update(padder.update(plain) + padder.finalize()) + encryptor.finalize()
    return EncryptedKey(derivation, salt, iv, sealed).pem


def write_key(
    path: Path,
    private_key: EllipticCurvePrivateKey,
    passphrase: bytes,
    derivation: KeyDerivation = DEFAULT_DERIVATION,
) -> None:
    """Write the key durably, mode 0400, into a folder that exists."""
    write_durably(path, encrypted_pem(private_key, passphrase, derivation), mode=KEY_FILE_MODE)


def replace_key(
    path: Path, private_key: EllipticCurvePrivateKey, passphrase: bytes, derivation: KeyDerivation
) -> None:
    """Put the key at `path` under another passphrase, and overwrite what the old file was on the disk.

    Raises:
        AuthorityError: the passphrase is empty; the file is as it was.
        OSError: it could not be replaced; it is as it was.
    """
    content = encrypted_pem(private_key, passphrase, derivation)
    again = load_pem_private_key(content, passphrase)
    if not isinstance(again, EllipticCurvePrivateKey) or again.private_numbers() != private_key.private_numbers():
        raise AuthorityError(f"could not encrypt the CA's key {path} anew", hint="the file is as it was")
    remove_leftovers(path.parent, path.name)
    old = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        write_durably(path, content, mode=KEY_FILE_MODE)
        with contextlib.suppress(OSError):  # whatever the file system lets
            _overwrite(old)
    finally:
        os.close(old)


def _overwrite(old: int) -> None:
    """Overwrite a file that has lost its name; one that has another, a copy that somebody keeps, stays."""
    state = os.fstat(old)
    if state.st_nlink:
        return
    os.fchmod(old, 0o600)
    writable = os.open(f"/proc/self/fd/{old}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(writable, secrets.token_bytes(state.st_size), 0)
        os.fsync(writable)
    finally:
        os.close(writable)


def read_key(
    path: Path,
    passphrase: bytes,
    *,
    whose: str,
    if_missing: str = "bring it back, or restore it from a backup",
    if_wrong: str = "try the passphrase again",
) -> EllipticCurvePrivateKey:
    """Read and decrypt a CA's key; `whose` names the CA in errors ("the issuing CA"), the other two are hints.

    Raises:
        WrongPassphraseError: the passphrase does not open it.
        AuthorityError: the file is missing, unreadable, open to others or no such key.
    """
    what = f"could not unlock {whose}'s key {path}"
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise AuthorityError(f"{what}: it is not there", hint=if_missing) from error
    except IsADirectoryError as error:
        raise AuthorityError(f"{what}: it is a folder", hint="name the file that is in it") from error
    except OSError as error:
        raise AuthorityError(f"{what}: {error.strerror}", hint="run this as the station's user") from error
    if mode & _OTHERS:
        raise AuthorityError(f"{what}: other users have access to it", hint=f"chmod 400 {path}")
    if LABEL.encode() not in content:
        raise AuthorityError(f"{what}: it is no encrypted private key", hint="restore it from a backup")
    try:
        key = _opened(content, passphrase)
    except TypeError as error:
        raise AuthorityError(f"{what}: no passphrase was given", hint="set BIRTHMARK_PASSPHRASE") from error
    except (ValueError, UnsupportedAlgorithm) as error:  # the latter of a damaged IV
        raise WrongPassphraseError(
            f"{what}: the passphrase is wrong, or the file is damaged", hint=if_wrong
        ) from error
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP256R1):
        raise AuthorityError(f"{what}: it is no P-256 key", hint="restore it from a backup")
    return key


def _opened(content: bytes, passphrase: bytes) -> PrivateKeyTypes:
    """Decrypt a key; `ValueError` if that cannot be, `TypeError` without a passphrase."""
    key = EncryptedKey.from_pem(content)
    if key is None or not passphrase:
        return load_pem_private_key(content, passphrase)  # in a form of another program's
    decryptor = Cipher(AES256(derived(key, passphrase)), CBC(key.iv)).decryptor()
    unpadder = PKCS7(BLOCK_OCTETS * 8).unpadder()
    padded = decryptor.update(key.sealed) + decryptor.finalize()
    return load_der_private_key(unpadder.update(padded) + unpadder.finalize(), None)
