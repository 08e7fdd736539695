"""Several at once: each is done, together, in order; what one raises is raised where it is waited for."""

from __future__ import annotations

import threading

import pytest
from support.patience import PATIENCE_S

from birthmark.provisioning.at_once import MOST_AT_ONCE, as_done, in_order


def test_they_are_done_together_and_come_back_in_order() -> None:
    together = threading.Barrier(MOST_AT_ONCE)

    def do(number: int) -> int:
        if number < MOST_AT_ONCE:
            together.wait(PATIENCE_S)  # nobody gets past before all of them are here
        return number * number

    numbers = range(3 * MOST_AT_ONCE)
    assert in_order(do, numbers) == [number * number for number in numbers]
    assert in_order(do, []) == []


def test_each_is_there_as_soon_as_it_is_done() -> None:
    first_was_seen = threading.Event()

    def do(what: str) -> bool:
        return what == "first" or first_was_seen.wait(PATIENCE_S)

    seen = []
    for place, outcome in as_done(do, ["last", "first"]):
        seen.append((place, outcome))
        first_was_seen.set()
    assert seen == [(1, True), (0, True)]


def test_what_one_raises_is_raised_where_it_is_waited_for() -> None:
    def do(number: int) -> None:
        if number == 1:
            raise LookupError("no such gateway")

    with pytest.raises(LookupError, match="no such gateway"):
        in_order(do, range(3))
