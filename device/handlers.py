"""Who wants which messages: the handlers of a client, by filter (MQTT 3.1.1 §4.7)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from birthmark.device.errors import LocalProtocolError
from birthmark.device.escape import escaped, quoted
from birthmark.device.mqtt import topic_matches
from birthmark.device.publication import MAX_TOPIC_BYTES, is_utf8

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.device.received import Message

    MessageHandler = Callable[[Message], object]

_log = logging.getLogger("birthmark.device")


class Handlers:
    """Calls every handler whose filter matches; may be changed from any thread.

    Args:
        failed: is told of a handler that raised: the topic, and what it raised.
    """

    def __init__(self, failed: Callable[[str, Exception], object]) -> None:
        self._failed = failed
        self._by_filter: tuple[tuple[str, MessageHandler], ...] = ()

    def add(self, topic_filter: str, handler: MessageHandler) -> None:
        """Call `handler` from now on.

        Raises:
            LocalProtocolError: MQTT has no such filter.
        """
        _check_filter(topic_filter)
        self._by_filter = (*self._by_filter, (topic_filter, handler))

    def remove(self, topic_filter: str) -> None:
        """Call none of this filter any more."""
        self._by_filter = tuple(entry for entry in self._by_filter if entry[0] != topic_filter)

    def call(self, message: Message) -> bool:
        """Call who wants a message; return whether anybody did."""
        is_wanted = False
        for topic_filter, handler in self._by_filter:
            if topic_matches(topic_filter, message.topic):
                is_wanted = True
                try:
                    handler(message)
                except Exception as error:  # noqa: BLE001 - it is somebody else's code; it is reported
                    _log.exception("a handler of %s failed", escaped(topic_filter))
                    self._failed(message.topic, error)
        return is_wanted


def _check_filter(topic_filter: str) -> None:
    """Refuse what is no filter (MQTT 3.1.1 §4.7.1)."""
    levels = topic_filter.split("/")
    wrong = not topic_filter or "\0" in topic_filter or not is_utf8(topic_filter)
    wrong = wrong or len(topic_filter.encode()) > MAX_TOPIC_BYTES
    for position, level in enumerate(levels):
        wrong |= "+" in level and level != "+"
        wrong |= "#" in level and (level != "#" or position != len(levels) - 1)
    if wrong:
        raise LocalProtocolError(
            f"could not subscribe to {quoted(topic_filter)}: it is no MQTT filter",
            hint="+ stands for a whole level, # for the rest, at the end",
        )
