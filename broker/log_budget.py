"""How many lines of the log one identity may cause: a good certificate must not be able to fill a gateway's disk.

Rules: each identity has `MAX_LINES` in `WINDOW_S`, of each kind; what is beyond is not written, but counted, and
the next line after that says how many there were. Ordinary life (a device that comes and goes every few seconds, a
policy that denies it a dozen topics) stays below it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_LINES = 60
WINDOW_S = 60.0
MAX_REMEMBERED = 16_384
"""Identities; the one that has been quiet for the longest is forgotten first."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Account:
    since_s: float
    written: int = 0
    withheld: int = 0


class LogBudget:
    """Grants lines of the log.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._accounts: dict[tuple[str, str], _Account] = {}

    def grants(self, who: str, kind: str) -> bool:
        """Whether a line of a kind about an identity (fit for a log) may be written; it is taken to be."""
        now_s = self._clock()
        account = self._accounts.pop((who, kind), None)
        if account is None or now_s - account.since_s >= WINDOW_S:
            if account is not None and account.withheld:
                self._say_withheld(who, kind, account.withheld)
            account = _Account(now_s)
            if len(self._accounts) >= MAX_REMEMBERED:
                del self._accounts[next(iter(self._accounts))]
        self._accounts[who, kind] = account
        if account.written >= MAX_LINES:
            account.withheld += 1
            return False
        account.written += 1
        return True

    def _say_withheld(self, who: str, kind: str, count: int) -> None:
        _log.warning(
            "%s lines about %s (%s) were not written: more than %s in %.0f s",
            count,
            who,
            kind,
            MAX_LINES,
            WINDOW_S,
            extra={"fields": {"event": "withheld", "id": who, "kind": kind, "count": count}},
        )
