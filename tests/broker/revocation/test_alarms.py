"""When an alarm is said: once, now and then, and when it is over."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from birthmark.broker.alarms import REPEAT_S, Alarm, Alarms

if TYPE_CHECKING:
    import pytest

DUE, OTHER = Alarm("crl-due", "CRL 1", "hint"), Alarm("crl-due", "CRL 2", "hint")
EXPIRED = Alarm("crl-expired", "CRL 1", "hint")


def test_an_alarm_is_said_once_and_again_after_a_while(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "birthmark")
    moments_s = iter((0.0, 1.0, REPEAT_S - 1, REPEAT_S))
    alarms = Alarms(lambda: next(moments_s))
    assert [alarms.look([DUE]) for _ in range(3)] == [True, False, False]
    assert [record.getMessage() for record in caplog.records] == ["ALARM crl-due: CRL 1 (hint)"]
    assert not alarms.look([DUE])
    assert len(caplog.records) == 2
    assert alarms.raised == 1


def test_an_end_is_said_and_a_return_counts_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "birthmark")
    alarms = Alarms(lambda: 0.0)
    assert list(alarms.codes) == []
    assert alarms.look([DUE, OTHER])
    assert list(alarms.codes) == ["crl-due"]
    assert not alarms.look([OTHER]), "one of a kind is over, another stands"
    assert alarms.look([EXPIRED])
    assert list(alarms.codes) == ["crl-expired"]
    assert alarms.look([])
    assert [record.getMessage() for record in caplog.records][-3:] == [
        "ALARM crl-expired: CRL 1 (hint)",
        "alarm crl-due is over",
        "alarm crl-expired is over",
    ]
    assert alarms.look([DUE])
    assert alarms.raised == 4
