"""A TOML table of `station.toml`, read strictly; and how a text is written there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from birthmark.device.errors import ConfigurationError
from birthmark.device.escape import quoted


def toml_text(text: str) -> str:
    """Return a TOML basic string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


class Table:
    """Typed access to one TOML table; what nobody asked for is refused at the end."""

    def __init__(self, name: str, values: Any) -> None:
        self._name = name
        if not isinstance(values, dict):
            raise ConfigurationError(f"[{name}] is no table")
        self._values = dict(values)

    def table(self, key: str) -> Table:
        """Return the table under a key; empty if there is none."""
        return Table(key, self._values.pop(key, {}))

    def tables(self, key: str) -> list[Table]:
        """Return the tables that are written [[key]]."""
        values = self._values.pop(key, [])
        if not isinstance(values, list):
            raise ConfigurationError(f"{key!r} must be written as [[{key}]]")
        return [Table(key, value) for value in values]

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text; without a default it must be there."""
        value = self._values.pop(key, default)
        if not isinstance(value, str):
            raise ConfigurationError(f"{self._where(key)} is {'missing' if value is None else 'no text'}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts; it must be there."""
        values = self._values.pop(key, None)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ConfigurationError(
                f"{self._where(key)} is {'missing' if values is None else 'no list of texts'}"
            )
        return tuple(values)

    def path(self, key: str) -> Path | None:
        """Return a path; None if there is none, or an empty one."""
        text = self.text(key, "")
        return Path(text) if text else None

    def whole(self, key: str, default: int) -> int:
        """Return a whole number."""
        value = self._values.pop(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigurationError(f"{self._where(key)} is no whole number")
        return value

    def finish(self) -> None:
        """Refuse what nobody has asked for."""
        if self._values:
            raise ConfigurationError(f"{self._where(next(iter(self._values)))} is unknown", hint="is it misspelt?")

    def _where(self, key: str) -> str:
        return f"key {quoted(key)}" + (f" in [{self._name}]" if self._name else "")
