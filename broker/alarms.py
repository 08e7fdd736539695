"""What about a gateway needs a person: said when it begins, now and then while it stays, and when it is over.

Of each kind of alarm no more is written than `log_budget.py` grants: what others send may raise one, and end it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from birthmark.broker.log_budget import LogBudget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

REPEAT_S = 3_600.0
"""An alarm that stays is said again this often."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something about the gateway that a person should look at. The same thing later is an equal one."""

    code: Literal[
        "crl-due",
        "crl-expired",
        "crl-refusing",
        "certificate-due",
        "certificate-expired",
        "certificate-not-yet-valid",
        "upstream-down",
        "upstream-refuses",
        "upstream-refused-message",
        "upstream-spool-full",
        "upstream-certificate-due",
        "fleet-crl-refused",
        "fleet-policy-refused",
        "fleet-unheard",
        "policy-local",
        "policy-signer",
    ]
    message: str
    hint: str
    level: int = logging.WARNING


class Alarms:
    """The alarms that stand.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._looked_s = 0.0
        self._budget = LogBudget(lambda: self._looked_s)
        self._standing: dict[Alarm, float] = {}
        self.raised = 0
        """How many have begun since the start."""

    @property
    def codes(self) -> tuple[str, ...]:
        """What stands, each code once, in order."""
        return tuple(sorted({alarm.code for alarm in self._standing}))

    def look(self, found: Iterable[Alarm]) -> bool:
        """Take note of what stands now, and log what is due; return whether the codes have changed."""
        self._looked_s = moment_s = self._clock()
        before = self.codes
        standing: dict[Alarm, float] = {}
        for alarm in found:
            last_s = self._standing.get(alarm)
            if last_s is None:
                self.raised += 1
            if last_s is None or moment_s - last_s >= REPEAT_S:
                if self._budget.grants(alarm.code, "alarm"):
                    _say(alarm)
                last_s = moment_s
            standing[alarm] = last_s
        self._standing = standing
        for code in before:
            if code not in self.codes and self._budget.grants(code, "alarm_over"):
                _log.info("alarm %s is over", code, extra={"fields": {"event": "alarm_over", "code": code}})
        return before != self.codes


def _say(alarm: Alarm) -> None:
    _log.log(
        alarm.level,
        "ALARM %s: %s (%s)",
        alarm.code,
        alarm.message,
        alarm.hint,
        extra={"fields": {"event": "alarm", "code": alarm.code}},
    )
