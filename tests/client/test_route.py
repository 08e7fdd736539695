"""Which broker comes next, how long a connection may be silent: decisions, without a network."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from birthmark.device.credentials import BrokerAddress
from birthmark.device.errors import RefusedError, UnreachableError
from birthmark.device.keepalive import HELD_LONG_S, HELD_S, Keepalive
from birthmark.device.route import LONGEST_RETURN_S, Route

ONE, TWO, THREE = (BrokerAddress(f"gw-{number}.example.com") for number in (1, 2, 3))
GONE, NO = UnreachableError("gone"), RefusedError("no")


def middle(low: float, high: float) -> float:
    return (low + high) / 2


def test_each_is_tried_once_in_a_round() -> None:
    route = Route([ONE, TWO, TWO, THREE], 600, middle)
    seen = []
    for _ in range(2):
        for is_last in (False, False, True):
            seen.append(route.broker)
            assert (route.failed(GONE) is not None) == is_last
    assert seen == [ONE, TWO, THREE] * 2


@pytest.mark.parametrize(
    ("errors", "verdict"), [([NO, GONE, NO], GONE), ([NO, NO, NO], NO), ([GONE, GONE, NO], GONE)]
)
def test_what_may_pass_stands_for_the_round(
    errors: list[RefusedError | UnreachableError], verdict: object
) -> None:
    route = Route([ONE, TWO, THREE], 600)
    assert [route.failed(error) for error in errors][-1] is verdict


def test_after_a_connection_that_held_it_begins_with_the_first() -> None:
    route = Route([ONE, TWO], 600, middle)
    route.failed(GONE)
    assert route.connected() == 600
    route.restart()
    assert route.broker == ONE


def test_the_first_is_looked_for_less_and_less_often_while_it_does_not_do() -> None:
    route = Route([ONE, TWO], 600, middle)
    route.failed(GONE)
    waits = [route.connected()]
    for _ in range(8):
        route.go_back()
        assert route.broker == ONE
        route.failed(NO)
        waits.append(route.connected())
    assert waits == [600, 1200, 2400, 4800, 9600, 19200, LONGEST_RETURN_S, LONGEST_RETURN_S, LONGEST_RETURN_S]
    route.go_back()
    assert route.connected() is None
    route.failed(GONE)
    assert route.connected() == 600


def test_a_renewed_identity_may_have_another_broker() -> None:
    route = Route([ONE, TWO], 600)
    route.failed(GONE)
    route.replace_first(THREE)
    assert (route.broker, route.first) == (THREE, THREE)
    route.failed(GONE)
    assert route.broker == TWO


def test_the_keepalive_gives_way_to_the_network_and_comes_back() -> None:
    keepalive = Keepalive(120)
    assert keepalive.current_s == 120
    keepalive.ended(500, in_silence=True)
    keepalive.ended(500, in_silence=True)
    keepalive.ended(500, in_silence=True)
    assert keepalive.current_s == 30  # a quarter
    keepalive.ended(HELD_S, in_silence=False)
    assert keepalive.current_s == 30  # it was too long today
    seen = []
    for _ in range(8):
        keepalive.ended(HELD_LONG_S, in_silence=False)
        seen.append(keepalive.current_s)
    assert seen == [37, 46, 57, 71, 88, 110, 120, 120]


@given(
    st.integers(1, 65535),
    st.none() | st.tuples(st.integers(5, 100), st.integers(100, 65535)),
    st.lists(st.tuples(st.floats(0, 200_000), st.booleans()), max_size=30),
)
def test_the_keepalive_stays_between_its_bounds(
    enrolled_s: int, bounds_s: tuple[int, int] | None, ends: list[tuple[float, bool]]
) -> None:
    keepalive = Keepalive(enrolled_s, bounds_s)
    shortest_s, longest_s = bounds_s or (1, enrolled_s)
    for held_s, in_silence in ends:
        before = keepalive.current_s
        keepalive.ended(held_s, in_silence=in_silence)
        assert shortest_s <= keepalive.current_s <= longest_s
        if in_silence:
            assert keepalive.current_s <= before
        else:
            assert keepalive.current_s >= before
            assert held_s >= HELD_S or keepalive.current_s == before


def test_what_was_too_long_is_tried_again_after_a_day() -> None:
    keepalive = Keepalive(60, (15, 300))
    for _ in range(20):
        keepalive.ended(HELD_S, in_silence=False)
    assert keepalive.current_s == 300
    keepalive.ended(400, in_silence=True)
    for _ in range(20):
        keepalive.ended(HELD_S, in_silence=False)
    assert keepalive.current_s == 299
    keepalive.ended(HELD_LONG_S, in_silence=False)
    assert keepalive.current_s == 300
