"""A CA's private key in a file: PKCS#8, encrypted under a passphrase with scrypt and AES-256-CBC.

Standards: PBES2 (RFC 8018 section 6.2) with scrypt (RFC 7914 section 7). `cryptography` reads this form but
writes only PBKDF2 with 2,048 rounds, which is nothing against today's guessing; so the dozen DER elements of
an EncryptedPrivateKeyInfo are written here. docs/adr/0001-ca-key-files.md says why this and not another form.

Rules: file mode 0400 in a folder 0700; a key file that others can read is refused; the key is never in an error.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from birthmark.device.durable import remove_leftovers, write_durably
from birthmark.device.errors import AuthorityError
from birthmark.device.pem import block

if TYPE_CHECKING:
    from pathlib import Path

KEY_FILE_MODE: Final = 0o400
_OTHERS: Final = 0o077
_LABEL: Final = "ENCRYPTED PRIVATE KEY"
_PBES2: Final = bytes.fromhex("06092a864886f70d01050d")
_SCRYPT: Final = bytes.fromhex("06092b06010401da47040b")
_AES_256_CBC: Final = bytes.fromhex("060960864801650304012a")
_AES_KEY_OCTETS: Final = 32
_BLOCK_OCTETS: Final = 16
_INTEGER, _OCTET_STRING, _SEQUENCE = 0x02, 0x04, 0x30


@dataclass(frozen=True, slots=True)
class KeyDerivation:
    """What it costs to try one passphrase.

    The default takes about half a second and 16 MiB. 16 MiB is what stock OpenSSL allows, so that
    `openssl pkey` can read the file in an emergency; `parallelism` makes up in time for it (OWASP's least for
    this memory is 5).
    """

    cost: int = 1 << 14
    block_size: int = 8
    parallelism: int = 16

    def derive(self, passphrase: bytes, salt: bytes) -> bytes:
        """Return the AES key."""
        scrypt = Scrypt(salt=salt, length=_AES_KEY_OCTETS, n=self.cost, r=self.block_size, p=self.parallelism)
        return scrypt.derive(passphrase)


DEFAULT_DERIVATION: Final = KeyDerivation()


def encrypted_pem(private_key: EllipticCurvePrivateKey, passphrase: bytes, derivation: KeyDerivation) -> bytes:
    """Return the key as an encrypted PKCS#8 PEM block.

    Raises:
        AuthorityError: the passphrase is empty.
    """
    if not passphrase:
        raise AuthorityError("could not encrypt the CA's key: the passphrase is empty", hint="choose a long one")
    salt, iv = secrets.token_bytes(_BLOCK_OCTETS), secrets.token_bytes(_BLOCK_OCTETS)
    plain = private_key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    padder = PKCS7(_BLOCK_OCTETS * 8).padder()
    encryptor = Cipher(AES256(derivation.derive(passphrase, salt)), CBC(iv)).encryptor()
    sealed = encryptor.update(padder.update(plain) + padder.finalize()) + encryptor.finalize()
    scrypt = _sequence(
        _SCRYPT,
        _sequence(
            _element(_OCTET_STRING, salt),
            _integer(derivation.cost),
            _integer(derivation.block_size),
            _integer(derivation.parallelism),
        ),
    )
    cipher = _sequence(_AES_256_CBC, _element(_OCTET_STRING, iv))
    der = _sequence(_sequence(_PBES2, _sequence(scrypt, cipher)), _element(_OCTET_STRING, sealed))
    return block(_LABEL, der)


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


def read_key(path: Path, passphrase: bytes, *, whose: str) -> EllipticCurvePrivateKey:
    """Read and decrypt a CA's key; `whose` names the CA in errors ("the issuing CA").

    Raises:
        AuthorityError: the file is missing, unreadable, open to others or no such key, or the passphrase is
            wrong.
    """
    what = f"could not unlock {whose}'s key {path}"
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise AuthorityError(
            f"{what}: it is not there", hint="if it was moved to a safe place, bring it back for this"
        ) from error
    except OSError as error:
        raise AuthorityError(f"{what}: {error.strerror}", hint="run this as the station's user") from error
    if mode & _OTHERS:
        raise AuthorityError(f"{what}: other users have access to it", hint=f"chmod 400 {path}")
    if _LABEL.encode() not in content:
        raise AuthorityError(f"{what}: it is no encrypted private key", hint="restore it from a backup")
    try:
        key = load_pem_private_key(content, passphrase)
    except TypeError as error:
        raise AuthorityError(f"{what}: no passphrase was given", hint="set BIRTHMARK_PASSPHRASE") from error
    except ValueError as error:
        raise AuthorityError(
            f"{what}: the passphrase is wrong, or the file is damaged", hint="try the passphrase again"
        ) from error
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP256R1):
        raise AuthorityError(f"{what}: it is no P-256 key", hint="restore it from a backup")
    return key


def _sequence(*parts: bytes) -> bytes:
    return _element(_SEQUENCE, b"".join(parts))


def _integer(value: int) -> bytes:
    return _element(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _element(tag: int, content: bytes) -> bytes:
    """Return a DER element: tag, shortest length, content (X.690 section 8.1.3)."""
    length = len(content)
    if length < 0x80:
        head = bytes([tag, length])
    else:
        octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
        head = bytes([tag, 0x80 | len(octets)]) + octets
    return head + content
