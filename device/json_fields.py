"""Reading and writing JSON messages: typed access to what somebody else has written.

Rules: known keys must have the right types, unknown ones are ignored (a newer writer may add some); any bytes in,
`RemoteProtocolError` out. Nothing here knows any message.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any, Final

from birthmark.device.errors import RemoteProtocolError

MAX_COUNT: Final = 2**160 - 1
"""The number of a CRL has so many bits (RFC 5280 section 5.2.3), and nothing that is counted has more."""


def dump(value: dict[str, Any]) -> bytes:
    """Return a message's payload."""
    return json.dumps(value, separators=(",", ":")).encode()


class Fields:
    """Typed access to an untrusted JSON object; whatever does not fit is a `RemoteProtocolError`."""

    def __init__(self, what: str, payload: bytes | dict[str, Any]) -> None:
        self._what = what
        if isinstance(payload, bytes | bytearray):
            try:
                value = json.loads(payload)
            except (ValueError, RecursionError) as error:
                raise self.error("not JSON") from error
        else:
            value = payload
        if not isinstance(value, dict):
            raise self.error("not an object")
        self._value: dict[str, Any] = value

    def error(self, cause: str) -> RemoteProtocolError:
        """Return the error that names what is read."""
        return RemoteProtocolError(f"could not read a {self._what}: {cause}")

    def has(self, key: str) -> bool:
        """Whether there is something."""
        return self._value.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text."""
        value = self._value.get(key, default)
        if not isinstance(value, str):
            raise self.error(f"{key!r} is not text")
        return value

    def boolean(self, key: str) -> bool:
        """Return a boolean."""
        value = self._value.get(key)
        if not isinstance(value, bool):
            raise self.error(f"{key!r} is not a boolean")
        return value

    def number(self, key: str) -> float:
        """Return a finite number."""
        value = self._value.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{key!r} is not a number")
        try:
            number = float(value)
        except OverflowError as error:
            raise self.error(f"{key!r} is out of range") from error
        if not math.isfinite(number):  # Python's JSON knows NaN and Infinity; nobody's clock does
            raise self.error(f"{key!r} is out of range")
        return number

    def whole(self, key: str, default: int | None = None, *, most: int = MAX_COUNT) -> int:
        """Return a whole number from 0 to `most`."""
        value = self._value.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(f"{key!r} is not a count")
        if value > most:
            raise self.error(f"{key!r} is out of range")
        return value

    def counts(self, key: str, default: dict[str, int] | None = None) -> dict[str, int]:
        """Return an object of whole numbers."""
        value = self._value.get(key, default)
        if not isinstance(value, dict):
            raise self.error(f"{key!r} is not an object")
        inner = Fields(self._what, value)
        return {name: inner.whole(name) for name in value}

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts; empty if it is not there."""
        value = self._value.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(f"{key!r} is not a list of texts")
        return tuple(value)

    def objects(self, key: str) -> list[Fields]:
        """Return a list of objects; empty if it is not there."""
        value = self._value.get(key, [])
        if not isinstance(value, list):
            raise self.error(f"{key!r} is not a list")
        return [Fields(self._what, item if isinstance(item, dict) else {}) for item in value]

    def octets(self, key: str, *, most: int, default: bytes | None = None) -> bytes:
        """Return octets, at most `most`, written in base64 (RFC 4648 section 4)."""
        return self._octets(key, self._value.get(key, default), most)

    def hex(self, key: str, *, length: int, default: bytes | None = None) -> bytes:
        """Return `length` octets, written in hex; an empty text where there is a default stands for it."""
        told = self.text(key, None if default is None else "")
        if default is not None and not told:
            return default
        return self._hex(key, told, length)

    def hexes(self, key: str, *, length: int, most: int) -> tuple[bytes, ...]:
        """Return a list of at most `most` texts of `length` octets each, written in hex."""
        return tuple(self._hex(key, told, length) for told in self._few(key, self.texts(key), most))

    def octets_list(self, key: str, *, most: int, most_each: int) -> tuple[bytes, ...]:
        """Return a list of at most `most` runs of octets, each at most `most_each`, written in base64."""
        told = self._few(key, self.texts(key), most)
        return tuple(self._octets(key, item, most_each) for item in told)

    def inner(self, key: str) -> Fields | None:
        """Return an object within; None if it is not there."""
        value = self._value.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(f"{key!r} is not an object")
        return Fields(self._what, value)

    def _few(self, key: str, told: tuple[str, ...], most: int) -> tuple[str, ...]:
        if len(told) > most:
            raise self.error(f"{key!r} has more than {most} entries")
        return told

    def _octets(self, key: str, told: object, most: int) -> bytes:
        if isinstance(told, bytes):
            return told
        if not isinstance(told, str) or len(told) > (most + 2) // 3 * 4:
            raise self.error(f"{key!r} is not at most {most} octets in base64")
        try:
            octets = base64.b64decode(told, validate=True)
        except ValueError as error:
            raise self.error(f"{key!r} is not base64") from error
        if len(octets) > most:
            raise self.error(f"{key!r} is not at most {most} octets in base64")
        return octets

    def _hex(self, key: str, told: str, length: int) -> bytes:
        try:
            octets = bytes.fromhex(told)
        except ValueError as error:
            raise self.error(f"{key!r} is not hex") from error
        if len(octets) != length or octets.hex() != told:
            raise self.error(f"{key!r} is not {length} octets in lower-case hex")
        return octets


def base64_text(octets: bytes) -> str:
    """Return octets as a message carries them (RFC 4648 section 4)."""
    return base64.b64encode(octets).decode("ascii")
