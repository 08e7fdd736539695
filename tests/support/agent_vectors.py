"""The golden vectors of the link, with their decoded values as Python values."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

_PATH = Path(__file__).parent.parent / "vectors" / "serial.json"


@cache
def vectors() -> dict[str, Any]:
    """The whole file."""
    loaded: dict[str, Any] = json.loads(_PATH.read_text())
    return loaded


def section(name: str) -> list[Any]:
    """The entries of one section, as pytest parameters with their names as ids."""
    import pytest

    entries = vectors()[name]
    assert entries
    return [
        pytest.param(entry, id=entry["name"] if "name" in entry else entry["encoded"][:24]) for entry in entries
    ]


def value_of(decoded: Any) -> Any:
    """A decoded value: `{"hex": ...}` is a byte string, any other object a map with numbers for keys."""
    if isinstance(decoded, dict):
        if decoded.keys() == {"hex"}:
            return bytes.fromhex(decoded["hex"])
        return {int(key): value_of(item) for key, item in decoded.items()}
    if isinstance(decoded, list):
        return [value_of(item) for item in decoded]
    return decoded
