"""How long a client waits before it tries again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from birthmark.device.backoff import Backoff, RetryTimer
from birthmark.device.errors import RefusedError, UnreachableError

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


def test_waits_double_up_to_a_minute() -> None:
    timer = RetryTimer(longest)
    assert [timer.wait_s(NOBODY) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_refused_identity_waits_longer() -> None:
    timer = RetryTimer(longest)
    assert [timer.wait_s(NO) for _ in range(9)] == [5, 10, 20, 40, 80, 160, 320, 640, 900]


def test_a_connection_that_held_starts_the_count_anew() -> None:
    timer = RetryTimer(longest)
    for _ in range(4):
        timer.wait_s(NOBODY)
    assert timer.wait_s(NOBODY, connected_for_s=60) == 1


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
