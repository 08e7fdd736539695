"""Closed schemas over CBOR maps, for the messages and the bundle (docs/serial-protocol.md sections 2 and 5).

A field says under which key a value stands, which attribute holds it, and what it must be. A missing key, an
unknown key, a wrong type, length or range refuses the whole map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from birthmark.device.errors import RemoteProtocolError
from birthmark.device.frozen import Frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from birthmark.device.link.cbor import Value


class SchemaError(RemoteProtocolError):
    """A value that is not what the schema says."""


class Field(Frozen):
    """One key of a map.

    Attributes:
        key: under which the value stands.
        name: of the attribute that holds it; for a constant, what to call it in an error.
        check: says what is wrong with a value, or returns an empty string.
        optional: whether the key may be missing; its attribute is then None (False for a flag).
        constant: the only value allowed, held by no attribute.
    """

    key: int
    name: str
    check: Callable[[Value], str]
    optional: bool = False
    constant: Value | None = None


def read_map(
    value: Value, fields: tuple[Field, ...], *, what: str, ignore_unknown: bool = False
) -> dict[str, Any]:
    """Return the attributes that a map holds, by name, every one checked.

    Raises:
        SchemaError: the map is not what `fields` say; `what` names it in the message.
    """
    if not isinstance(value, dict):
        raise SchemaError(f"could not read {what}: not a map")
    if not ignore_unknown and (unknown := value.keys() - {field.key for field in fields}):
        raise SchemaError(f"could not read {what}: unknown key {min(unknown)}")
    attributes: dict[str, Any] = {}
    for field in fields:
        if field.key not in value:
            if field.optional:
                continue
            raise SchemaError(f"could not read {what}: {field.name} is missing")
        if problem := field.check(value[field.key]):
            raise SchemaError(f"could not read {what}: {field.name} is {problem}")
        if field.constant is None:
            attributes[field.name] = value[field.key]
    return attributes


def write_map(attributes: Mapping[str, Any], fields: tuple[Field, ...], *, what: str) -> dict[int, Value]:
    """Return the map that holds `attributes`: None and False ones of optional fields are left out.

    Raises:
        SchemaError: an attribute is not what `fields` say.
    """
    value: dict[int, Value] = {}
    for field in fields:
        item = attributes[field.name] if field.constant is None else field.constant
        if field.optional and (item is None or item is False):
            continue
        if problem := field.check(item):
            raise SchemaError(f"could not make {what}: {field.name} is {problem}")
        value[field.key] = item
    return value


def bstr(shortest: int, longest: int | None = None, *, or_empty: bool = False) -> Callable[[Value], str]:
    """A byte string of this many bytes."""
    upper = shortest if longest is None else longest

    def check(value: Value) -> str:
        if not isinstance(value, bytes):
            return "not a byte string"
        if shortest <= len(value) <= upper or (or_empty and not value):
            return ""
        return f"{len(value)} bytes long"

    return check


def uint(lowest: int, highest: int) -> Callable[[Value], str]:
    """An unsigned integer in this range."""

    def check(value: Value) -> str:
        if isinstance(value, bool) or not isinstance(value, int):
            return "not a number"
        return "" if lowest <= value <= highest else f"not in {lowest}..{highest}"

    return check


def is_true(value: Value) -> str:
    """True, the one value of a flag that is there."""
    return "" if value is True else "not true"


def printable(longest: int) -> Callable[[Value], str]:
    """Text of 1 to `longest` characters, each of 20..7e."""

    def check(value: Value) -> str:
        if not isinstance(value, str):
            return "not text"
        if not 1 <= len(value) <= longest:
            return f"{len(value)} characters long"
        return "" if all(" " <= character <= "~" for character in value) else "not printable ASCII"

    return check


def array_of(shortest: int, longest: int, item: Callable[[Value], str]) -> Callable[[Value], str]:
    """An array of this many items, each as `item` says."""

    def check(value: Value) -> str:
        if not isinstance(value, list):
            return "not an array"
        if not shortest <= len(value) <= longest:
            return f"an array of {len(value)}"
        return next((f"an array with an item {problem}" for problem in map(item, value) if problem), "")

    return check
