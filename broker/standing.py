"""What a gateway has retained of a state of its own: said when it changes, taken back when it is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Standing:
    """Retained messages that follow a state.

    Args:
        publish: retains a message of the broker's own.
    """

    def __init__(self, publish: Callable[[str, bytes], None]) -> None:
        self._publish = publish
        self._told: dict[str, str] = {}

    def tell(self, wanted: Mapping[str, tuple[str, bytes]]) -> None:
        """Have just this retained: by topic, what names the content (a hash, a version), and the content."""
        for topic in self._told.keys() - wanted.keys():
            self._publish(topic, b"")
        for topic, (name, payload) in wanted.items():
            if self._told.get(topic) != name:
                self._publish(topic, payload)
        self._told = {topic: name for topic, (name, _payload) in wanted.items()}
