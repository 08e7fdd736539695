"""How long a client waits before it tries again."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import stampede

from birthmark.device import event_lines
from birthmark.device.backoff import OF_THE_IDENTITY, Backoff, RetryTimer
from birthmark.device.connection_checks import Check
from birthmark.device.console import Console
from birthmark.device.errors import ConnectionFailedError, RefusedError, UnreachableError
from birthmark.device.events import AttemptFailed

NOBODY = UnreachableError("nobody answered")
NO = RefusedError("no")


def longest(_low: float, high: float) -> float:
    return high


@given(st.floats(0.01, 100), st.floats(1, 100), st.floats(1, 5), st.integers(0, 10_000), st.floats(0, 1))
def test_a_wait_lies_between_a_tenth_of_its_ceiling_and_its_ceiling(
    first_s: float, more: float, factor: float, attempt: int, draw: float
) -> None:
    backoff = Backoff(first_s, first_s * more, factor)
    ceiling = backoff.ceiling_s(attempt)
    assert first_s <= ceiling <= first_s * more
    assert backoff.ceiling_s(attempt + 1) >= ceiling
    wait = backoff.wait_s(attempt, lambda low, high: low + draw * (high - low))
    assert ceiling * 0.1 * 0.999 <= wait <= ceiling * 1.001


@pytest.mark.parametrize(("first_s", "longest_s", "factor"), [(0, 1, 2), (2, 1, 2), (1, 2, 0.5), (-1, 1, 2)])
def test_a_wait_that_does_not_grow_is_refused(first_s: float, longest_s: float, factor: float) -> None:
    with pytest.raises(ValueError, match="grows"):
        Backoff(first_s, longest_s, factor)


def test_waits_double_up_to_two_minutes() -> None:
    timer = RetryTimer(longest)
    assert [timer.wait_s(NOBODY) for _ in range(9)] == [1, 2, 4, 8, 16, 32, 64, 120, 120]


@pytest.mark.parametrize("check", sorted(OF_THE_IDENTITY))
def test_a_refused_identity_waits_for_hours(check: str) -> None:
    timer = RetryTimer(longest)
    refused = RefusedError("no", check=check)
    assert [timer.wait_s(refused) for _ in range(8)] == [5, 20, 80, 320, 1280, 5120, 14400, 14400]


@pytest.mark.parametrize("check", [Check.CLOSED, Check.SERVER_CA, Check.SERVER_EXPIRED, Check.TLS, Check.EXPIRED])
def test_a_refusal_that_may_be_the_network_s_or_the_broker_s_does_not(check: Check) -> None:
    timer = RetryTimer(longest)
    refused = RefusedError("no", check=check)
    assert [timer.wait_s(refused) for _ in range(9)] == [5, 10, 20, 40, 80, 160, 320, 640, 900]


def test_a_connection_that_held_starts_the_count_anew() -> None:
    timer = RetryTimer(longest)
    for _ in range(4):
        timer.wait_s(NOBODY)
    assert [timer.wait_s(NOBODY, connected_for_s=60), *(timer.wait_s(NOBODY) for _ in range(2))] == [5, 10, 20]


def test_one_that_is_dropped_at_once_does_not() -> None:
    timer = RetryTimer(longest)
    assert [timer.wait_s(NOBODY, connected_for_s=0.5) for _ in range(4)] == [1, 2, 4, 8]


def test_to_be_let_in_once_ends_the_count_of_refusals() -> None:
    timer = RetryTimer(longest)
    assert [timer.wait_s(NO), timer.wait_s(NO)] == [5, 10]
    timer.wait_s(NOBODY, connected_for_s=0.5)
    assert timer.wait_s(NO) == 5


def test_two_devices_do_not_wait_alike() -> None:
    one, other = RetryTimer(), RetryTimer()
    assert [one.wait_s(NOBODY) for _ in range(5)] != [other.wait_s(NOBODY) for _ in range(5)]


def test_a_fleet_that_lost_its_gateway_comes_back_spread_out() -> None:
    for outage_s in (2.0, 30.0, 600.0):
        shown = stampede.back_after(outage_s, devices=1000, seed=1)
        assert shown.connected == 1000
        assert shown.busiest_second <= 300
        assert shown.all_back_s <= outage_s + 130
    at_once = stampede.back_after(0.0, devices=1000, seed=1, first_s=0.1)
    assert at_once.busiest_second > 900  # the figure sees a stampede


def test_a_line_says_that_something_else_is_done_first(capsys: pytest.CaptureFixture[str]) -> None:
    """A certificate that has expired is renewed at once, at another port: nobody waits for the next attempt."""
    expired = RefusedError("no", check=Check.EXPIRED)
    event_lines.show(Console(as_json=False), AttemptFailed(expired, 24.0, renews=True))
    last = capsys.readouterr().out.splitlines()[-1].strip()
    assert last == "renewing at the renewal listener now; else the next attempt in 24.0 s"
    event_lines.show(Console(as_json=False), AttemptFailed(expired, 0.0, renews=True))
    last = capsys.readouterr().out.splitlines()[-1].strip()
    assert last == "renewing at the renewal listener now; trying the next broker"
    event_lines.show(Console(as_json=True), AttemptFailed(expired, 24.0, renews=True))
    assert json.loads(capsys.readouterr().out)["renews"] is True


@pytest.mark.parametrize(
    ("error", "retry_in_s", "said"),
    [
        (NOBODY, 0.0, "trying the next broker"),
        (NOBODY, 0.25, "next attempt in 0.2 s"),
        (NOBODY, 89.0, "next attempt in 89.0 s"),
        (NOBODY, 120.0, "next attempt in 2.0 min"),
        (
            RefusedError("no", check=Check.REVOKED),
            14_000.0,
            "next attempt in 3.9 h; an identity that is refused is tried less and less often",
        ),
    ],
)
def test_a_line_says_when_the_next_attempt_is_made(
    error: ConnectionFailedError, retry_in_s: float, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    event_lines.show(Console(as_json=False), AttemptFailed(error, retry_in_s))
    assert capsys.readouterr().out.splitlines()[-1].strip() == said
