"""Deterministic CBOR as the link uses it (RFC 8949 section 4.2.1; docs/serial-protocol.md section 2).

Unsigned integers, byte strings, UTF-8 text, booleans, arrays, and maps with keys 0..255 in ascending order, at
most four deep. Everything else is refused: a longer head than needed, indefinite lengths, duplicate or unsorted
keys, any other type, bad UTF-8, truncation, trailing bytes. Whatever `decode` accepts, `encode` gives back byte
for byte.

There is no CBOR library underneath, on purpose. The checks above have to visit every head before a library may
see the bytes, and that walk already is the decoder: building the values on the way is one line a type, while a
second parser of the same bytes could only add a second opinion. The tests hold it against cbor2.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from birthmark.device.errors import LocalProtocolError, RemoteProtocolError

Value: TypeAlias = "int | bytes | str | bool | list[Value] | dict[int, Value]"

MAX_DEPTH: Final = 4
MAX_KEY: Final = 255
MAX_UINT: Final = 2**64 - 1

_UINT, _BYTES, _TEXT, _ARRAY, _MAP, _SIMPLE = 0, 2, 3, 4, 5, 7
_FALSE, _TRUE = 20, 21
_MAX_IN_HEAD = 23
# The additional information that announces 1, 2, 4 or 8 more bytes, and the first number worth that many.
_LONGER_HEADS = {24: (1, 24), 25: (2, 2**8), 26: (4, 2**16), 27: (8, 2**32)}


class CborError(RemoteProtocolError):
    """Bytes that are no deterministic CBOR of the kind that this link allows."""


def encode(value: Value) -> bytes:
    """Return the one encoding of `value`.

    Raises:
        LocalProtocolError: a type, a number, a key or a depth that the link does not allow.
    """
    encoded = bytearray()
    _write(encoded, value, depth=1)
    return bytes(encoded)


def decode(data: bytes) -> Value:
    """Return the one value that `data` encodes, all of it.

    No length is believed before it is checked against the bytes that are left.

    Raises:
        CborError: the bytes break one of the rules above.
    """
    reader = _Reader(data)
    value = reader.value(depth=1)
    if reader.left:
        raise CborError(f"could not decode CBOR: {reader.left} bytes after the end")
    return value


def _head(major: int, number: int) -> bytes:
    if number < 0:
        raise LocalProtocolError("could not encode CBOR: a negative number")
    if number <= _MAX_IN_HEAD:
        return bytes([major << 5 | number])
    for information, (width, _) in _LONGER_HEADS.items():
        if number < 1 << 8 * width:
            return bytes([major << 5 | information]) + number.to_bytes(width, "big")
    raise LocalProtocolError("could not encode CBOR: a number above 2^64 - 1")


def _write(encoded: bytearray, value: Value, *, depth: int) -> None:
    if isinstance(value, bool):
        encoded.append(_SIMPLE << 5 | (_TRUE if value else _FALSE))
    elif isinstance(value, int):
        encoded += _head(_UINT, value)
    elif isinstance(value, bytes):
        encoded += _head(_BYTES, len(value)) + value
    elif isinstance(value, str):
        text = value.encode()
        encoded += _head(_TEXT, len(text)) + text
    elif depth > MAX_DEPTH:
        raise LocalProtocolError(f"could not encode CBOR: nested more than {MAX_DEPTH} deep")
    elif isinstance(value, list):
        encoded += _head(_ARRAY, len(value))
        for item in value:
            _write(encoded, item, depth=depth + 1)
    else:
        encoded += _head(_MAP, len(value))
        if not all(0 <= key <= MAX_KEY for key in value):
            raise LocalProtocolError(f"could not encode CBOR: a key is not in 0..{MAX_KEY}")
        for key in sorted(value):
            encoded += _head(_UINT, key)
            _write(encoded, value[key], depth=depth + 1)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._position

    def value(self, *, depth: int) -> Value:
        major, number = self._head()
        if major == _UINT:
            return number
        if major == _BYTES:
            return self._take(number)
        if major == _TEXT:
            return self._text(number)
        if major == _SIMPLE and number in (_FALSE, _TRUE):
            return number == _TRUE
        if major not in (_ARRAY, _MAP):
            raise CborError("could not decode CBOR: a type that is not allowed")
        if depth > MAX_DEPTH:
            raise CborError(f"could not decode CBOR: nested more than {MAX_DEPTH} deep")
        # Every item takes at least one byte, so a length beyond what is left ends here, before any item is built.
        if number * (1 if major == _ARRAY else 2) > self.left:
            raise CborError("could not decode CBOR: a container announces more than there is")
        if major == _ARRAY:
            return [self.value(depth=depth + 1) for _ in range(number)]
        return self._map(number, depth=depth)

    def _map(self, pairs: int, *, depth: int) -> dict[int, Value]:
        found: dict[int, Value] = {}
        previous = -1
        for _ in range(pairs):
            major, key = self._head()
            if major != _UINT or key > MAX_KEY:
                raise CborError(f"could not decode CBOR: a key is not a number in 0..{MAX_KEY}")
            if key <= previous:
                raise CborError("could not decode CBOR: keys are not in ascending order")
            found[key] = self.value(depth=depth + 1)
            previous = key
        return found

    def _head(self) -> tuple[int, int]:
        initial = self._take(1)[0]
        major, information = initial >> 5, initial & 0x1F
        if information <= _MAX_IN_HEAD:
            return major, information
        if major == _SIMPLE or information not in _LONGER_HEADS:
            raise CborError("could not decode CBOR: a float, an indefinite length or a reserved head")
        width, lowest = _LONGER_HEADS[information]
        number = int.from_bytes(self._take(width), "big")
        if number < lowest:
            raise CborError("could not decode CBOR: a head is longer than needed")
        return major, number

    def _text(self, length: int) -> str:
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise CborError("could not decode CBOR: text is not UTF-8") from None

    def _take(self, count: int) -> bytes:
        if count > self.left:
            raise CborError("could not decode CBOR: the data ends too early")
        taken = self._data[self._position : self._position + count]
        self._position += count
        return taken
