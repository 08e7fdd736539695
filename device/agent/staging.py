"""A bundle on its way in: chunks in any order, overlapping and repeated (docs/serial-protocol.md section 3)."""

from __future__ import annotations

import hashlib


class Staging:
    """What has arrived of the bundle that a BEGIN announced. It lives in RAM.

    Args:
        txn: the transaction it belongs to.
        length: of the bundle, in bytes; its bound has been checked.
        sha256: of the bundle.
    """

    def __init__(self, txn: bytes, length: int, sha256: bytes) -> None:
        self.txn = txn
        self.length = length
        self.sha256 = sha256
        self._data = bytearray(length)
        self._have = bytearray(length)  # one byte for each, 1 once it is there
        self._prefix = 0

    @property
    def next_offset(self) -> int:
        """The end of the gapless prefix."""
        return self._prefix

    @property
    def is_complete(self) -> bool:
        """Whether every byte is there."""
        return self._prefix == self.length

    @property
    def matches(self) -> bool:
        """Whether what is there has the hash that was announced."""
        return hashlib.sha256(self._data).digest() == self.sha256

    def is_for(self, txn: bytes, length: int, sha256: bytes) -> bool:
        """Whether a BEGIN with these values resumes it."""
        return (self.txn, self.length, self.sha256) == (txn, length, sha256)

    def fits(self, offset: int, chunk: bytes) -> bool:
        """Whether a chunk lies within the bundle."""
        return offset + len(chunk) <= self.length

    def put(self, offset: int, chunk: bytes) -> None:
        """Take a chunk that fits."""
        end = offset + len(chunk)
        self._data[offset:end] = chunk
        self._have[offset:end] = b"\1" * len(chunk)
        gap = self._have.find(0, self._prefix)
        self._prefix = self.length if gap < 0 else gap

    def to_bytes(self) -> bytes:
        """The bundle, once it is complete."""
        return bytes(self._data)
