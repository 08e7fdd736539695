"""Routes and retained messages against the plainest possible matcher."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from birthmark.broker import router as router_module
from birthmark.broker.filters import matches
from birthmark.broker.retained import Retained, RetainedStore
from birthmark.broker.router import Router

LEVEL = st.sampled_from(["", "a", "b", "$s"])
TOPIC = st.lists(LEVEL, min_size=1, max_size=4).map("/".join).filter(bool)
FILTER = (
    st.tuples(st.lists(st.one_of(LEVEL, st.just("+")), max_size=4), st.booleans())
    .map(lambda item: "/".join([*item[0], "#"] if item[1] else item[0]))
    .filter(bool)
)
STEP = st.one_of(
    st.tuples(st.just("subscribe"), st.sampled_from("xyz"), FILTER, st.integers(0, 2)),
    st.tuples(st.just("unsubscribe"), st.sampled_from("xyz"), FILTER, st.just(0)),
    st.tuples(st.just("route"), st.just(""), TOPIC, st.just(0)),
)


def naive(subscriptions: dict[tuple[str, str], int], topic: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for (who, topic_filter), qos in subscriptions.items():
        if matches(topic_filter, topic):
            found[who] = max(qos, found.get(who, 0))
    return found


@given(st.lists(STEP, max_size=30), TOPIC)
def test_a_route_is_what_a_naive_matcher_finds(steps: list[tuple[str, str, str, int]], last: str) -> None:
    router: Router[str] = Router(lambda who, topic: not (who == "z" and topic.startswith("b")))
    subscriptions: dict[tuple[str, str], int] = {}

    def check(topic: str) -> None:
        expected = {
            who: qos
            for who, qos in naive(subscriptions, topic).items()
            if not (who == "z" and topic.startswith("b"))
        }
        route = router.route(topic)
        assert dict(route.targets) == expected
        assert len(route.targets) == len(expected), "nobody is in a route twice"

    for action, who, text, qos in steps:
        if action == "subscribe":
            router.subscribe(who, text, qos)
            subscriptions[who, text] = qos
        elif action == "unsubscribe":
            router.unsubscribe(who, text)
            subscriptions.pop((who, text), None)
        else:
            check(text)
        assert router.count == len(subscriptions)
    check(last)
    assert {(w, f): q for f, subs in router.filters() for w, q in subs.items()} == subscriptions
    for who, text in list(subscriptions):
        router.unsubscribe(who, text)
    assert not list(router.filters())
    assert router._root.children == {}, "no empty branch is left behind"


def test_routes_kept_are_bounded() -> None:
    router: Router[int] = Router(lambda _who, _topic: True)
    for who in range(100):
        router.subscribe(who, "#", 0)
    for number in range(router_module.MAX_ROUTE_TARGETS // 100 + 50):
        router.route(str(number))
    assert router._route_targets <= router_module.MAX_ROUTE_TARGETS
    assert sum(len(route.targets) for route in router._routes.values()) == router._route_targets
    router.route("x" * 60_000)
    assert "x" * 60_000 not in router._routes


def test_a_filter_of_many_levels_is_no_recursion() -> None:
    router: Router[str] = Router(lambda _who, _topic: True)
    deep = "/".join("a" * 30_000)
    router.subscribe("x", deep, 1)
    assert router.route(deep).targets == (("x", 1),)
    router.unsubscribe("x", deep)
    store = RetainedStore(10, 100_000_000)
    assert store.put(Retained(deep, b"x", 0, None))
    assert store.topics("#") == [deep]
    assert store.put(Retained(deep, b"", 0, None))
    assert store.topics("#") == []


@given(st.lists(st.tuples(TOPIC, st.sampled_from([b"", b"x", b"yy"])), max_size=30), FILTER)
def test_retained_topics_are_what_a_naive_matcher_finds(puts: list[tuple[str, bytes]], topic_filter: str) -> None:
    store = RetainedStore(1_000, 10_000_000)
    expected: dict[str, bytes] = {}
    for topic, payload in puts:
        assert store.put(Retained(topic, payload, 0, None))
        expected.pop(topic, None)
        if payload:
            expected[topic] = payload
    assert {message.topic: message.payload for message in store} == expected
    assert sorted(store.topics(topic_filter)) == sorted(t for t in expected if matches(topic_filter, t))
    assert store.total_bytes == sum(message.size_bytes for message in store)
    for topic in expected:
        store.put(Retained(topic, b"", 0, None))
    assert store.total_bytes == 0
    assert store._root.children == {}


def test_a_full_store_keeps_what_it_has() -> None:
    store = RetainedStore(2, 10_000)
    assert store.put(Retained("a", b"1", 0, None))
    assert store.put(Retained("b", b"1", 0, None))
    assert not store.put(Retained("c", b"1", 0, None)), "one too many"
    assert store.put(Retained("a", b"2", 0, None)), "another for a topic that is there"
    assert not store.put(Retained("a", bytes(20_000), 0, None)), "too large"
    found = store.get("a")
    assert found is not None
    assert found.payload == b"2"
