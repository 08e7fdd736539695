"""Topic filters against a naive matcher, and their set relations against brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from birthmark.broker.filters import TopicError, check_filter, check_topic, contains, matches, overlaps

# Every topic of up to three levels over this alphabet; `b` stands for "any other word".
_WORDS = ["a", "b", "", "$a"]
_SPELT = ["/".join(levels) for n in (1, 2, 3, 4) for levels in itertools.product(_WORDS, repeat=n)]
_TOPICS = [topic for topic in _SPELT if topic]

_levels = st.sampled_from(["a", "", "$a", "+"])


@st.composite
def filters(draw: st.DrawFn) -> str:
    levels = draw(st.lists(_levels, min_size=0, max_size=3))
    if draw(st.booleans()) or not levels:
        levels.append("#")
    text = "/".join(levels)
    assume(text)
    return text


def naive(topic_filter: str, topic: str) -> bool:
    """MQTT 3.1.1 §4.7, written as a recursion over the words of the standard."""
    if topic.startswith("$") and topic_filter[0] in "+#":
        return False

    def rest(f: list[str], t: list[str]) -> bool:
        if not f:
            return not t
        if f[0] == "#":
            return True
        if not t:
            return False
        return f[0] in ("+", t[0]) and rest(f[1:], t[1:])

    return rest(topic_filter.split("/"), topic.split("/"))


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("sport/tennis/player1/#", "sport/tennis/player1", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
        ("sport/#", "sport", True),
        ("#", "a/b/c", True),
        ("sport/tennis/+", "sport/tennis/player1/ranking", False),
        ("sport/+", "sport", False),
        ("sport/+", "sport/", True),
        ("+/+", "/finance", True),
        ("/+", "/finance", True),
        ("+", "/finance", False),
        ("#", "$SYS/monitor/Clients", False),
        ("+/monitor/Clients", "$SYS/monitor/Clients", False),
        ("$SYS/#", "$SYS/monitor/Clients", True),
        ("$SYS/monitor/+", "$SYS/monitor/Clients", True),
        ("a", "A", False),
    ],
)
def test_the_examples_of_the_standard(topic_filter: str, topic: str, *, expected: bool) -> None:
    assert matches(topic_filter, topic) is expected


@given(filters(), st.sampled_from(_TOPICS))
def test_matches_as_the_naive_matcher_does(topic_filter: str, topic: str) -> None:
    assert matches(topic_filter, topic) is naive(topic_filter, topic)


@given(filters(), filters())
def test_contains_is_what_brute_force_says(outer: str, inner: str) -> None:
    every = all(naive(outer, topic) for topic in _TOPICS if naive(inner, topic))
    assert contains(outer, inner) is every


@given(filters(), filters())
def test_overlaps_is_what_brute_force_says(one: str, other: str) -> None:
    some = any(naive(one, topic) and naive(other, topic) for topic in _TOPICS)
    assert overlaps(one, other) is some
    assert overlaps(other, one) is some


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("a/+", "a/#", False),
        ("a/#", "a/+", True),
        ("a/#", "a", True),
        ("a/#", "a/#", True),
        ("a/+/#", "a/#", False),
        ("+/#", "#", True),
        ("#", "$SYS/#", False),
        ("$SYS/#", "#", False),
        ("$SYS/#", "$SYS/a/+", True),
        ("+/a", "$SYS/a", False),
        ("a/b", "a/+", False),
        ("devices/x/#", "devices/+/#", False),
    ],
)
def test_contains_examples(outer: str, inner: str, *, expected: bool) -> None:
    assert contains(outer, inner) is expected


@pytest.mark.parametrize(
    "topic", ["", "a\0", "a/+", "a/#", "+", "#", "a+b", "\ud800", "x" * 65_536, "\u20ac" * 21_846]
)
def test_topics_that_mqtt_does_not_allow(topic: str) -> None:
    with pytest.raises(TopicError) as caught:
        check_topic(topic)
    assert caught.value.message.isascii()
    assert len(caught.value.message) < 1_000


@pytest.mark.parametrize(
    "text", ["", "a\0", "a/#/b", "#/a", "a+", "+a", "a#", "a/b#", "##", "++", "\udfff", "x" * 65_536]
)
def test_filters_that_mqtt_does_not_allow(text: str) -> None:
    with pytest.raises(TopicError):
        check_filter(text)


@pytest.mark.parametrize(
    "text", ["/", "a", "a/", "/a", "a//b", "#", "+", "+/#", "a/+/#", "$SYS/#", "x" * 65_535, "\u20ac" * 21_845]
)
def test_filters_that_mqtt_allows(text: str) -> None:
    check_filter(text)


@given(st.text(max_size=60))
def test_any_text_is_allowed_or_a_topic_error(text: str) -> None:
    for check in (check_topic, check_filter):
        try:
            check(text)
        except TopicError:
            continue
        assert text
        assert "\0" not in text


def test_the_topic_of_no_characters_is_none() -> None:
    """`/#` matches its parent, which would be that."""
    assert not overlaps("/#", "+")
    assert overlaps("/#", "+/+")
    assert overlaps("/#", "/#")
    assert contains("/+/#", "/#")
    assert contains("+/+/#", "/#")
    assert contains("/#", "/#")
    assert not contains("/+", "/#")
    assert not contains("a/#", "/#")
