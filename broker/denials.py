"""What the policy refused: counted always, logged once per client, action and topic in a while; not without end.

A denial that nobody can see costs a field engineer a day; one that fills the disk costs the gateway.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal, TypeAlias

from birthmark.broker.log_budget import LogBudget
from birthmark.device.escape import escaped

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.broker.peer import Peer

INTERVAL_S = 60.0
MAX_REMEMBERED = 4_096
MAX_REMEMBERED_CHARACTERS = 256

Denied: TypeAlias = Literal["publish", "subscribe", "subscription", "will"]
_WORDS: dict[Denied, str] = {
    "publish": "publish to",
    "subscribe": "subscribe to",
    "subscription": "keep its subscription to",
    "will": "have its last will on",
}

_log = logging.getLogger(__name__)


class Denials:
    """Says each thing once in `INTERVAL_S`.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._said: dict[tuple[str, str, str], float] = {}
        self.budget = LogBudget(clock)
        """Of each identity's lines, those about its connections included."""

    def denied(self, peer: Peer, action: Denied, topic: str, rule: str) -> None:
        """Log that the policy denies an action, with the rule that does."""
        who = str(peer.device_id)
        if self._is_due(who, action, topic) and self.budget.grants(who, "denied"):
            shown = escaped(topic)
            fields = {"event": "denied", "id": who, "action": action, "topic": shown, "rule": rule}
            _log.warning(
                "denied: %s may not %s %s: %s", who, _WORDS[action], shown, rule, extra={"fields": fields}
            )

    def dropped(self, peer: Peer, what: str, topic: str) -> None:
        """Log that messages for a client are being dropped."""
        if self._is_due(str(peer.device_id), what, ""):
            _log.warning(
                "dropping messages for %s: %s (now on %s)",
                peer.device_id,
                what,
                escaped(topic),
                extra={"fields": {"event": "dropped", "id": str(peer.device_id), "reason": what}},
            )

    def slowed(self, peer: Peer, delay_s: float) -> None:
        """Log that a client sends faster than it may."""
        if self._is_due(str(peer.device_id), "slowed", ""):
            _log.warning(
                "%s sends faster than it may (limits.max_messages_per_s, _bytes_per_s): not read from for %.2f s",
                peer.device_id,
                delay_s,
                extra={"fields": {"event": "slowed", "id": str(peer.device_id)}},
            )

    def not_retained(self, topic: str) -> None:
        """Log that the store of retained messages is full."""
        if self._is_due("", "not retained", ""):
            _log.warning(
                "the store of retained messages is full: not retaining %s (limits.max_retained_*)",
                escaped(topic),
                extra={"fields": {"event": "not_retained", "topic": escaped(topic)}},
            )

    def due(self, key: str) -> bool:
        """Whether something else, named by a key, is due to be said again."""
        return self._is_due("", key, "")

    def _is_due(self, who: str, what: str, topic: str) -> bool:
        now = self._clock()
        key = (who, what, topic[:MAX_REMEMBERED_CHARACTERS])
        last = self._said.get(key)
        if last is not None and now - last < INTERVAL_S:
            return False
        if len(self._said) >= MAX_REMEMBERED:
            self._said.clear()
        self._said[key] = now
        return True
