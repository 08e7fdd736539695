"""An encrypted private key as the station writes one: PKCS#8, under a passphrase, with scrypt and AES-256-CBC.

Standards: EncryptedPrivateKeyInfo (RFC 5958 section 3), PBES2 (RFC 8018 section 6.2), scrypt (RFC 7914 section 7);
DER as in X.690. docs/adr/0001-ca-key-files.md says why this form.

Rules: only exactly the form that is written here is read here; other bytes are None, and somebody else's to read.

With nothing more of `cryptography` than scrypt: a command begins to derive the key before it has loaded the rest
(`key_derivation`). The OpenSSL that comes with it takes an eighth less for this than Debian's beneath `hashlib`.
"""

from __future__ import annotations

from typing import Final, Self

from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from birthmark.device.errors import BirthmarkError
from birthmark.device.frozen import Frozen
from birthmark.device.pem import block, read_blocks
from birthmark.provisioning.der import INTEGER, OBJECT_ID, OCTET_STRING, SEQUENCE, integer_octets, tlv

LABEL: Final = "ENCRYPTED PRIVATE KEY"
AES_KEY_OCTETS: Final = 32
BLOCK_OCTETS: Final = 16
_PBES2: Final = bytes.fromhex("06092a864886f70d01050d")
_SCRYPT: Final = bytes.fromhex("06092b06010401da47040b")
_AES_256_CBC: Final = bytes.fromhex("060960864801650304012a")
_TAGS: Final = bytes((OBJECT_ID, OBJECT_ID, OCTET_STRING, *[INTEGER] * 3, OBJECT_ID, *[OCTET_STRING] * 2))
"""What is in the sequences, in its order: scheme, derivation, salt, its numbers, cipher, IV, what is sealed."""
_MAX_OCTETS: Final = 1024
_BLOCK_OCTETS: Final = 128
"""Of the memory of scrypt, which has N + p blocks of r times as much (RFC 7914 section 6)."""
_MAX_MEMORY: Final = 1 << 30


class KeyDerivation(Frozen):
    """What it costs to try one passphrase.

    The default takes a third of a second and 30 MiB. Stock OpenSSL allows 32 MiB, so that `openssl pkey` can
    read the file in an emergency. Within that, memory comes first: it is what a guesser's hardware is short of,
    and `parallelism` adds nothing but time (OWASP's least, at 32 MiB, is two thirds of this work).
    """

    cost: int = 1 << 14
    block_size: int = 15
    parallelism: int = 5

    def derive(self, passphrase: bytes, salt: bytes) -> bytes:
        """Return the AES key. Other threads run meanwhile.

        Raises:
            ValueError: there is no such derivation, or it needs more than a gigabyte.
        """
        if _BLOCK_OCTETS * self.block_size * (self.cost + self.parallelism) > _MAX_MEMORY:
            raise ValueError("the derivation needs more than a gigabyte")
        try:
            scrypt = Scrypt(salt, AES_KEY_OCTETS, n=self.cost, r=self.block_size, p=self.parallelism)
            return scrypt.derive(passphrase)
        except (MemoryError, OverflowError) as error:  # the first of N too large for r, too (RFC 7914 section 2)
            raise ValueError("there is no such derivation, or no memory for it") from error


DEFAULT_DERIVATION: Final = KeyDerivation()


class EncryptedKey(Frozen):
    """A private key, encrypted; nothing in it is secret to whoever lacks the passphrase."""

    derivation: KeyDerivation
    salt: bytes
    iv: bytes
    sealed: bytes
    """PKCS#8, padded as PKCS#7 has it, under AES-256 in CBC mode."""

    @classmethod
    def from_pem(cls, pem: bytes) -> Self | None:
        """Return the key in a PEM file; None if it is not exactly of this form."""
        try:
            ((label, der),) = read_blocks(pem)
        except (ValueError, BirthmarkError):
            return None
        found = _read(der) if label == LABEL and len(der) <= _MAX_OCTETS else []
        if bytes(tag for tag, _ in found) != _TAGS:
            return None
        cost, block_size, parallelism = (int.from_bytes(found[place][1], "big") for place in (3, 4, 5))
        key = cls(KeyDerivation(cost, block_size, parallelism), found[2][1], sealed=found[8][1], iv=found[7][1])
        return key if key.der == der else None

    @property
    def pem(self) -> bytes:
        """The file's content."""
        return block(LABEL, self.der)

    @property
    def der(self) -> bytes:
        """The EncryptedPrivateKeyInfo."""
        derivation = self.derivation
        scrypt = _sequence(
            _SCRYPT,
            _sequence(
                tlv(OCTET_STRING, self.salt),
                _integer(derivation.cost),
                _integer(derivation.block_size),
                _integer(derivation.parallelism),
            ),
        )
        cipher = _sequence(_AES_256_CBC, tlv(OCTET_STRING, self.iv))
        return _sequence(_sequence(_PBES2, _sequence(scrypt, cipher)), tlv(OCTET_STRING, self.sealed))


def _sequence(*parts: bytes) -> bytes:
    return tlv(SEQUENCE, b"".join(parts))


def _integer(value: int) -> bytes:
    return tlv(INTEGER, integer_octets(value))


def _read(der: bytes) -> list[tuple[int, bytes]]:
    """Return tag and content of what is no sequence, in order. Nothing is checked: what differs is seen later."""
    found: list[tuple[int, bytes]] = []
    while len(der) > 1 and len(found) <= len(_TAGS):
        tag, length, head = der[0], der[1], 2
        if length & 0x80:
            head += length & 0x7F
            length = int.from_bytes(der[2:head], "big")
        if tag == SEQUENCE:
            der = der[head:]
        else:
            found.append((tag, der[head : head + length]))
            der = der[head + length :]
    return found
