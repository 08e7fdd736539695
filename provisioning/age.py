"""Files encrypted under a passphrase, in the age format, version 1: `age -d FILE` reads them without us.

Standard: the age file encryption format (https://age-encryption.org/v1; C2SP age.md): one scrypt recipient, the
header under HMAC-SHA-256, the payload in chunks of 64 KiB under ChaCha20-Poly1305 (the STREAM construction).
docs/adr/0012-backups.md says why this format, and why it is written here.

Rules:

- Neither side holds more than a chunk in memory, whatever the size of the file.
- What `Decrypting.read` returns is authentic and in order; that the file is whole is known only when it returns
  b"" at the end. A caller acts on nothing before that.
- Any bytes in, only an `AgeError` out; the cost of the key derivation that a file asks for is bounded.
"""

from __future__ import annotations

import hmac
import io
import re
import secrets
from base64 import b64decode, b64encode
from typing import IO, TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

if TYPE_CHECKING:
    from typing import Any

VERSION_LINE: Final = b"age-encryption.org/v1"
DEFAULT_COST_LOG2: Final = 17
"""scrypt with N = 2^17, r = 8, p = 1: 128 MiB and about half a second, OWASP's first choice."""
MAX_COST_LOG2: Final = 20
"""A file that asks for more is refused: 1 GiB is what a station can be expected to have."""
CHUNK_BYTES: Final = 65_536
_FILE_KEY_OCTETS: Final = 16
_SALT_OCTETS: Final = 16
_NONCE_OCTETS: Final = 16
_TAG_OCTETS: Final = 16
_KEY_OCTETS: Final = 32
_MAX_LINE_BYTES: Final = 128
_STANZA: Final = re.compile(rb"-> scrypt ([A-Za-z0-9+/]{22}) ([1-9][0-9]?)")
_BODY: Final = re.compile(rb"[A-Za-z0-9+/]{43}")
_MAC: Final = re.compile(rb"--- ([A-Za-z0-9+/]{43})")
_ZERO_NONCE: Final = bytes(12)


class AgeError(Exception):
    """An encrypted file cannot be read; nothing of it may be used.

    Args:
        cause: to follow `could not read FILE: `.
        hint: what to do next.
    """

    def __init__(self, cause: str, hint: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.hint = hint


class Encrypting(io.RawIOBase):
    """Writes to `file`, encrypted; `finish` ends it. `file` stays open.

    Args:
        file: where to, binary.
        passphrase: not empty.
        cost_log2: what trying one passphrase costs, as the logarithm of scrypt's N.
    """

    def __init__(self, file: IO[bytes], passphrase: bytes, *, cost_log2: int = DEFAULT_COST_LOG2) -> None:
        super().__init__()
        file_key, salt = secrets.token_bytes(_FILE_KEY_OCTETS), secrets.token_bytes(_SALT_OCTETS)
        sealed = ChaCha20Poly1305(_wrapping_key(passphrase, salt, cost_log2)).encrypt(_ZERO_NONCE, file_key, None)
        header = b"%s\n-> scrypt %s %d\n%s\n---" % (VERSION_LINE, _text(salt), cost_log2, _text(sealed))
        nonce = secrets.token_bytes(_NONCE_OCTETS)
        file.write(header + b" " + _text(_header_mac(file_key, header)) + b"\n" + nonce)
        self._file = file
        self._cipher = ChaCha20Poly1305(_derived(file_key, nonce, b"payload"))
        self._counter = 0
        self._pending = bytearray()

    def writable(self) -> bool:
        """Whether this can be written to: yes."""
        return True

    def write(self, content: Any) -> int:
        """Encrypt; the last chunk waits until more comes, or the end."""
        view = memoryview(content)
        self._pending += view
        while len(self._pending) > CHUNK_BYTES:
            self._seal(bytes(self._pending[:CHUNK_BYTES]), last=False)
            del self._pending[:CHUNK_BYTES]
        return view.nbytes

    def finish(self) -> None:
        """Write the last chunk: only with it the file is whole."""
        self._seal(bytes(self._pending), last=True)
        self._pending.clear()

    def _seal(self, chunk: bytes, *, last: bool) -> None:
        self._file.write(self._cipher.encrypt(_chunk_nonce(self._counter, last=last), chunk, None))
        self._counter += 1


class Decrypting(io.RawIOBase):
    """Reads what `Encrypting` (or `age -p`) wrote.

    Args:
        file: where from, binary, at its beginning.
        passphrase: its passphrase.

    Raises:
        AgeError: it is no such file, the passphrase is wrong, or its head is damaged.
    """

    def __init__(self, file: IO[bytes], passphrase: bytes) -> None:
        super().__init__()
        file_key, header, mac = _read_header(file, passphrase)
        if not hmac.compare_digest(_header_mac(file_key, header), mac):
            raise _damaged("its head was changed")
        nonce = file.read(_NONCE_OCTETS)
        if len(nonce) < _NONCE_OCTETS:
            raise _damaged("it ends in its head")
        self._file = file
        self._cipher = ChaCha20Poly1305(_derived(file_key, nonce, b"payload"))
        self._counter = 0
        self._ahead = file.read(CHUNK_BYTES + _TAG_OCTETS)
        self._plain = memoryview(b"")
        self._is_over = False

    def readable(self) -> bool:
        """Whether this can be read from: yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Decrypt into `buffer`; 0 at the end of a whole file.

        Raises:
            AgeError: the file is damaged or cut.
        """
        while not self._plain and not self._is_over:
            self._plain = memoryview(self._next_chunk())
        count = min(len(self._plain), len(buffer))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count

    def _next_chunk(self) -> bytes:
        chunk, self._ahead = self._ahead, self._file.read(CHUNK_BYTES + _TAG_OCTETS)
        is_last = not self._ahead
        try:
            plain = self._cipher.decrypt(_chunk_nonce(self._counter, last=is_last), chunk, None)
        except InvalidTag:
            raise _damaged("it was changed, or its end is missing") from None
        if not plain and self._counter:
            raise _damaged("it ends in an empty chunk")
        self._counter += 1
        self._is_over = is_last
        return plain


def _read_header(file: IO[bytes], passphrase: bytes) -> tuple[bytes, bytes, bytes]:
    """Return the file's key, the head that its MAC is over, and the MAC."""
    first = file.readline(_MAX_LINE_BYTES)
    if not first.startswith(b"age-encryption.org/"):
        raise AgeError("it is no encrypted backup", hint="name the file that `birthmark backup` wrote")
    if first != VERSION_LINE + b"\n":
        raise AgeError("it is encrypted in a way that this birthmark does not know", hint="update birthmark")
    lines = [file.readline(_MAX_LINE_BYTES) for _ in range(3)]
    if not all(line.endswith(b"\n") for line in lines):
        raise _damaged("its head is cut, or no head")
    stanza, body, end = (line[:-1] for line in lines)
    found, mac = _STANZA.fullmatch(stanza), _MAC.fullmatch(end)
    if found is None or _BODY.fullmatch(body) is None or mac is None:
        raise _damaged("its head says something else than one passphrase")
    cost_log2 = int(found[2])
    if cost_log2 > MAX_COST_LOG2:
        raise _damaged(f"it asks for 2^{cost_log2} rounds of work, and at most 2^{MAX_COST_LOG2} are done for it")
    wrapping = ChaCha20Poly1305(_wrapping_key(passphrase, _octets(found[1]), cost_log2))
    try:
        file_key = wrapping.decrypt(_ZERO_NONCE, _octets(body), None)
    except InvalidTag:
        raise AgeError("the passphrase is wrong, or its head is damaged", hint="try again") from None
    header = b"".join(lines[:2])
    return file_key, VERSION_LINE + b"\n" + header + b"---", _octets(mac[1])


def _wrapping_key(passphrase: bytes, salt: bytes, cost_log2: int) -> bytes:
    if not passphrase:
        raise AgeError("the passphrase is empty", hint="choose a long one")
    scrypt = Scrypt(salt=VERSION_LINE + b"/scrypt" + salt, length=_KEY_OCTETS, n=1 << cost_log2, r=8, p=1)
    return scrypt.derive(passphrase)


def _derived(file_key: bytes, salt: bytes, purpose: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=_KEY_OCTETS, salt=salt, info=purpose).derive(file_key)


def _header_mac(file_key: bytes, header: bytes) -> bytes:
    return hmac.digest(_derived(file_key, b"", b"header"), header, "sha256")


def _chunk_nonce(counter: int, *, last: bool) -> bytes:
    return counter.to_bytes(11, "big") + bytes([last])


def _text(octets: bytes) -> bytes:
    return b64encode(octets).rstrip(b"=")


def _octets(text: bytes) -> bytes:
    """Return the octets of unpadded base64 that is written in the one canonical way."""
    octets = b64decode(text + b"=" * (-len(text) % 4))
    if _text(octets) != text:
        raise _damaged("its head is not written as it should be")
    return octets


def _damaged(cause: str) -> AgeError:
    return AgeError(f"it is damaged: {cause}", hint="take another copy of the backup")
