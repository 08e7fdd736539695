"""What one identity may write into the log of a gateway."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

from birthmark.broker import log_budget
from birthmark.broker.connection_log import ConnectionLog
from birthmark.broker.denials import Denials
from birthmark.broker.log_budget import MAX_LINES, WINDOW_S, LogBudget

if TYPE_CHECKING:
    import pytest


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_each_identity_has_so_many_lines_of_each_kind() -> None:
    budget = LogBudget(Clock())
    assert sum(budget.grants("sensor-1", "denied") for _ in range(1_000)) == MAX_LINES
    assert budget.grants("sensor-2", "denied")
    assert budget.grants("sensor-1", "connections")


def test_what_was_withheld_is_said_with_the_next_line(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    budget = LogBudget(clock)
    for _ in range(MAX_LINES + 7):
        budget.grants("sensor-1", "denied")
    clock.now_s = WINDOW_S - 1
    assert not budget.grants("sensor-1", "denied")
    assert caplog.records == []
    clock.now_s = WINDOW_S
    assert budget.grants("sensor-1", "denied")
    assert [record.getMessage() for record in caplog.records] == [
        "8 lines about sensor-1 (denied) were not written: more than 60 in 60 s"
    ]
    assert all(budget.grants("sensor-1", "denied") for _ in range(MAX_LINES - 1)), "a new minute, a new account"
    clock.now_s = 2 * WINDOW_S
    with caplog.at_level(logging.INFO):
        budget.grants("sensor-1", "denied")
    assert len(caplog.records) == 1, "nothing was withheld this time"


def test_a_stranger_with_a_network_of_addresses_is_one_stranger(caplog: pytest.LogCaptureFixture) -> None:
    denials = Denials(Clock())
    for number in range(1_000):
        log = ConnectionLog(f"[2001:db8::{number:x}]:50112", denials)
        log.handshake_failed(ssl.SSLEOFError())
        log.timed_out("no TLS handshake")
    assert len(caplog.records) == 1, "and the time-out below a warning"
    ConnectionLog("[2001:db8:0:1::1]:50112", denials).handshake_failed(ssl.SSLEOFError())
    assert len(caplog.records) == 2


def test_the_quietest_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_budget, "MAX_REMEMBERED", 3)
    budget = LogBudget(Clock())
    for who in ("a", "b", "c"):
        for _ in range(MAX_LINES):
            assert budget.grants(who, "denied")
    assert not budget.grants("a", "denied")
    assert budget.grants("d", "denied"), "which makes room at the cost of b"
    assert len(budget._accounts) == 3
    assert not budget.grants("a", "denied")
    assert budget.grants("b", "denied")
