"""Where an identity is, by numbers alone: each rule, and any gateways under any delays, repeats and losses."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from birthmark.broker.fleet import visits as module
from birthmark.broker.fleet.visits import Verdict, Visit, Visits
from birthmark.device.messages import MAX_VISIT

ONE = "sensor-1"


def at(gateway: str, *heard: tuple[str, Visit]) -> Visits:
    found = Visits(gateway)
    for other, visit in heard:
        found.heard(ONE, other, visit, is_here=False)
    return found


def test_who_stays_is_counted_once() -> None:
    visits = at("a")
    assert visits.arrived(ONE)
    assert not visits.arrived(ONE)
    assert visits.of(ONE) == (1, "")


def test_who_moves_gets_the_next_number_and_the_old_gateway_lets_go() -> None:
    first = at("a")
    first.arrived(ONE)
    second = at("b", ("a", first.of(ONE)))
    assert second.arrived(ONE)
    assert second.of(ONE) == (2, "")
    assert first.heard(ONE, "b", second.of(ONE), is_here=True) is Verdict.GONE
    assert first.of(ONE) == (2, "b")
    assert first.of(ONE).is_over
    assert second.heard(ONE, "a", first.of(ONE), is_here=True) is Verdict.CAME_FROM_THERE
    assert second.heard(ONE, "a", Visit(1, "b"), is_here=True) is Verdict.NOTHING, "of a visit before this one"
    assert second.heard(ONE, "a", Visit(2, "c"), is_here=True) is Verdict.NOTHING
    assert first.arrived(ONE)
    assert first.of(ONE) == (3, "")


def test_the_name_of_a_gateway_is_the_same_in_any_case() -> None:
    visits = at("Berlin")
    visits.arrived(ONE)
    assert visits.heard(ONE, "oslo", Visit(1, "BERLIN"), is_here=True) is Verdict.CAME_FROM_THERE


def test_a_restart_goes_on_from_what_was_said() -> None:
    visits = at("a")
    visits.take_up(ONE, Visit(5, "b"))
    assert visits.arrived(ONE)
    assert visits.of(ONE) == (6, "")
    visits.take_up(ONE, Visit(7))
    assert not visits.arrived(ONE)


def test_the_same_number_is_nobodys() -> None:
    visits = at("a")
    visits.arrived(ONE)
    assert visits.heard(ONE, "b", Visit(1), is_here=True) is Verdict.CONTESTED
    assert not visits.of(ONE).is_over
    assert visits.arrived(ONE)
    assert visits.of(ONE).number == 2


def test_a_lower_number_is_told_better_by_who_has_the_identity_and_given_way_by_who_has_not() -> None:
    here, gone = at("a", ("c", Visit(6))), at("a", ("c", Visit(6)))
    for visits in (here, gone):
        visits.arrived(ONE)
    assert here.heard(ONE, "b", Visit(2), is_here=True) is Verdict.SAY_AGAIN
    assert here.of(ONE) == (7, "")
    assert gone.heard(ONE, "b", Visit(2), is_here=False) is Verdict.CONTESTED
    assert not gone.of(ONE).is_over
    assert gone.arrived(ONE)
    assert gone.of(ONE).number == 8, "the number that was given up is taken again"


@pytest.mark.parametrize("told", [Visit(0), Visit(0, "a"), Visit(9, "c")])
def test_what_claims_nothing_ends_nothing(told: Visit) -> None:
    visits = at("a")
    visits.arrived(ONE)
    assert visits.heard(ONE, "b", told, is_here=False) is Verdict.NOTHING
    assert visits.of(ONE) == (1, "")


def test_the_highest_number_stays_one_that_others_can_read() -> None:
    first = at("a", ("liar", Visit(MAX_VISIT)))
    first.arrived(ONE)
    assert first.of(ONE) == (MAX_VISIT, "")
    second = at("b", ("a", first.of(ONE)))
    second.arrived(ONE)
    assert second.of(ONE) == (MAX_VISIT, "")
    assert first.heard(ONE, "b", second.of(ONE), is_here=True) is Verdict.CONTESTED
    assert second.heard(ONE, "a", first.of(ONE), is_here=True) is Verdict.CAME_FROM_THERE
    assert second.of(ONE) == (MAX_VISIT, "")


def test_nothing_is_done_about_strangers() -> None:
    assert at("a").heard(ONE, "b", Visit(5), is_here=False) is Verdict.NOTHING


def test_what_was_heard_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HEARD", 10)
    visits = at("a")
    for number in range(50):
        visits.heard(f"sensor-{number}", "b", Visit(7), is_here=False)
    assert len(visits._heard) == 10
    visits.arrived("sensor-49")
    assert visits.of("sensor-49").number == 8


@dataclass
class Fleet:
    """Gateways, one device, and every message that is on its way, each from one gateway to one other."""

    gateways: dict[str, Visits] = field(default_factory=lambda: {name: Visits(name) for name in "abc"})
    live: set[str] = field(default_factory=set)
    """Where a connection of the device looks alive."""
    device_at: str | None = None
    """Where it really is."""
    wanted: str | None = None
    """Where it goes as soon as it is nowhere."""
    under_way: list[tuple[str, str, Visit]] = field(default_factory=list)
    said: list[tuple[str, str, Visit]] = field(default_factory=list)
    reconnects: int = 0

    def connect(self, gateway: str) -> None:
        self.device_at = self.wanted = gateway
        self.live.add(gateway)
        if self.gateways[gateway].arrived(ONE):
            self.say(gateway)

    def say(self, gateway: str) -> None:
        for other in self.gateways:
            if other != gateway:
                message = (gateway, other, self.gateways[gateway].of(ONE))
                self.under_way.append(message)
                self.said.append(message)

    def deliver(self, message: tuple[str, str, Visit]) -> None:
        sender, receiver, visit = message
        verdict = self.gateways[receiver].heard(ONE, sender, visit, is_here=receiver in self.live)
        if verdict in (Verdict.GONE, Verdict.CONTESTED, Verdict.SAY_AGAIN):
            self.say(receiver)
        if verdict in (Verdict.GONE, Verdict.CONTESTED) and receiver in self.live:
            self.live.discard(receiver)
            if self.device_at == receiver:
                self.device_at = None

    def settle(self) -> None:
        """Deliver all, in order for each pair; a device that was thrown out comes back where it was."""
        for _ in range(500):
            if self.under_way:
                self.deliver(self.under_way.pop(0))
            elif self.device_at is None and self.wanted is not None:
                self.reconnects += 1
                self.connect(self.wanted)
            else:
                return
        raise AssertionError("the gateways never come to rest")


STEPS = st.lists(
    st.tuples(st.just("move"), st.sampled_from("abc"))
    | st.tuples(st.just("deliver"), st.integers(0, 99))
    | st.tuples(st.just("repeat"), st.integers(0, 99))
    | st.tuples(st.just("lose"), st.integers(0, 99)),
    max_size=40,
)


@settings(max_examples=300)
@given(STEPS)
def test_whatever_happens_on_the_way_the_device_ends_up_at_one_gateway(steps: list[tuple[str, str | int]]) -> None:
    """Messages of one gateway to another keep their order; they may be late, said again, or lost."""
    fleet = Fleet()
    for step, what in steps:
        if step == "move":
            assert isinstance(what, str)
            fleet.connect(what)
            continue
        assert isinstance(what, int)
        if step == "repeat" and fleet.said:
            fleet.deliver(fleet.said[what % len(fleet.said)])
        elif step == "deliver" and fleet.under_way:
            first = _first_of_pair(fleet, what)
            fleet.deliver(fleet.under_way.pop(first))
        elif step == "lose" and fleet.under_way:
            fleet.under_way.pop(_first_of_pair(fleet, what))
        if fleet.device_at is None and fleet.wanted is not None:
            fleet.connect(fleet.wanted)
    fleet.settle()
    for gateway in fleet.gateways:  # what each retains is heard in the end, as after any new session of a link
        fleet.say(gateway)
    fleet.settle()
    if fleet.wanted is not None:
        assert fleet.live == {fleet.wanted}
        assert fleet.device_at == fleet.wanted
        assert not fleet.gateways[fleet.wanted].of(ONE).moved_to
        assert fleet.reconnects <= 2, "one for each time that it settled"


def _first_of_pair(fleet: Fleet, what: int) -> int:
    """The oldest message between the two gateways of the one picked."""
    sender, receiver, _ = fleet.under_way[what % len(fleet.under_way)]
    return next(at for at, found in enumerate(fleet.under_way) if found[:2] == (sender, receiver))


@given(st.lists(st.sampled_from("ab"), min_size=2, max_size=6))
def test_who_flaps_is_thrown_out_once_at_most(way: list[str]) -> None:
    """All moves happen before anybody hears of any."""
    fleet = Fleet({name: Visits(name) for name in "ab"})
    for gateway in way:
        fleet.connect(gateway)
    fleet.settle()
    assert fleet.live == {way[-1]}
    assert fleet.reconnects <= 1
