"""COBS, consistent overhead byte stuffing (Cheshire and Baker 1999; docs/serial-protocol.md section 1).

A zero-free form of any bytes: blocks of a code byte and `code - 1` bytes without a zero. A block with code 255
stands for its 254 bytes alone, any other for its bytes and a zero, except for the last block's zero.

Rules:

- The encoder emits the shortest form: no empty block after a full one that ends the data.
- The decoder takes both forms, and refuses a zero inside and a code that points past the end.
"""

from __future__ import annotations

from birthmark.device.errors import RemoteProtocolError

_FULL_BLOCK = 254


class FramingError(RemoteProtocolError):
    """A run of bytes that is no frame."""


def encode(raw: bytes) -> bytes:
    """Return `raw` without a zero byte: one byte longer, and one more for every 254."""
    encoded = bytearray()
    pieces = raw.split(b"\0")
    last = len(pieces) - 1
    for position, piece in enumerate(pieces):
        start = 0
        while len(piece) - start >= _FULL_BLOCK:
            encoded.append(0xFF)
            encoded += piece[start : start + _FULL_BLOCK]
            start += _FULL_BLOCK
        if position == last and start and start == len(piece):
            break  # a full block that ends the data needs no empty one after it
        encoded.append(len(piece) - start + 1)
        encoded += piece[start:]
    return bytes(encoded)


def decode(encoded: bytes) -> bytes:
    """Return what was encoded.

    Raises:
        FramingError: a zero inside, a code past the end, or no bytes at all.
    """
    if not encoded:
        raise FramingError("could not decode COBS: no bytes")
    if 0 in encoded:
        raise FramingError("could not decode COBS: a zero inside")
    raw = bytearray()
    position = 0
    while position < len(encoded):
        code = encoded[position]
        end = position + code
        if end > len(encoded):
            raise FramingError("could not decode COBS: a block ends past the data")
        raw += encoded[position + 1 : end]
        position = end
        if code <= _FULL_BLOCK and position < len(encoded):
            raw.append(0)
    return bytes(raw)
