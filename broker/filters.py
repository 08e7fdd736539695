"""Topic names and topic filters (MQTT 3.1.1 §4.7): validity, matching, containment, overlap.

Pure. Rules:

- A topic name or filter is 1 to 65,535 bytes of UTF-8 without NUL and without surrogates (§1.5.3, §4.7.3).
- `+` and `#` stand alone in their level; `#` only in the last one. `a/#` matches `a` as well (§4.7.1.2).
- A filter that begins with a wildcard matches no topic that begins with `$` (§4.7.2).
- Levels may be empty: `/a` has two, and `+/a` matches it (§4.7.1.3).

`contains` and `overlaps` speak of *sets of topics*: a filter is the set of topic names that it matches.
"""

from __future__ import annotations

from birthmark.device.errors import ProtocolError
from birthmark.device.escape import quoted

MAX_TOPIC_BYTES = 65_535
"""The length field of an MQTT string has 16 bits (§1.5.3)."""


class TopicError(ProtocolError):
    """A topic name or a topic filter that MQTT does not allow."""


def check_topic(name: str) -> None:
    """Accept a topic name, as in a PUBLISH.

    Raises:
        TopicError: it is empty, too long, holds a wildcard or NUL, or is no UTF-8.
    """
    _check_text(name, "topic")
    if "+" in name or "#" in name:
        raise _refused(name, "topic", "a topic name holds no wildcard (+ or #)")


def check_filter(topic_filter: str) -> None:
    """Accept a topic filter, as in a SUBSCRIBE.

    Raises:
        TopicError: it is empty, too long, holds NUL or a misplaced wildcard, or is no UTF-8.
    """
    _check_text(topic_filter, "topic filter")
    if "+" not in topic_filter and "#" not in topic_filter:
        return
    levels = topic_filter.split("/")
    for position, level in enumerate(levels):
        if level in ("+", "#"):
            if level == "#" and position != len(levels) - 1:
                raise _refused(topic_filter, "topic filter", "# may only be the last level")
        elif "+" in level or "#" in level:
            raise _refused(topic_filter, "topic filter", "a wildcard must be a whole level between slashes")


def matches(topic_filter: str, topic: str) -> bool:
    """Return whether the filter matches the topic name. Both must be valid."""
    if topic_filter == topic:
        return True
    return levels_match(topic_filter.split("/"), topic.split("/"))


def levels_match(outer: list[str], topic: list[str]) -> bool:
    """Return whether the filter with these levels matches the topic with those."""
    if topic[0].startswith("$") and outer[0] in ("+", "#"):
        return False
    for position, level in enumerate(outer):
        if level == "#":
            return True
        if position == len(topic) or level not in ("+", topic[position]):
            return False
    return len(outer) == len(topic)


def contains(outer: str, inner: str) -> bool:
    """Return whether every topic that `inner` can match is matched by `outer`. Both must be valid filters."""
    return outer == inner or levels_contain(outer.split("/"), inner.split("/"))


def levels_contain(outer: list[str], inner: list[str]) -> bool:
    """`contains` for filters already split into levels.

    Level by level this is exact: a level can be any of endlessly many words, so nothing but `+` (or `#`)
    covers a `+`, and nothing but `#` covers a `#`.
    """
    if inner[0].startswith("$") and outer[0] in ("+", "#"):
        return False
    if inner == ["#"]:
        # Every topic has at least one level, so at the very start `+/#` says the same as `#`.
        return outer in (["#"], ["+", "#"])
    inner = _spelt_out(inner)
    for position, level in enumerate(outer):
        if level == "#":
            return True
        if position == len(inner) or inner[position] == "#":
            return False
        if level not in ("+", inner[position]):
            return False
    return len(outer) == len(inner)


def overlaps(one: str, other: str) -> bool:
    """Return whether some topic is matched by both filters. Both must be valid filters."""
    return levels_overlap(one.split("/"), other.split("/"))


def levels_overlap(one: list[str], other: list[str]) -> bool:
    """`overlaps` for filters already split into levels."""
    for first, second in ((one[0], other[0]), (other[0], one[0])):
        if first.startswith("$") and second in ("+", "#"):
            return False
    one, other = _spelt_out(one), _spelt_out(other)
    for position in range(max(len(one), len(other))):
        # A `#` also matches its parent, hence the look one level past the shorter filter's end.
        mine = one[position] if position < len(one) else None
        theirs = other[position] if position < len(other) else None
        if "#" in (mine, theirs):
            return True
        if mine is None or theirs is None:
            return False
        if mine != theirs and "+" not in (mine, theirs):
            return False
    return True


def _spelt_out(levels: list[str]) -> list[str]:
    """Say `/#` as `/+/#`: its parent would be the topic of no characters, which there is not (§4.7.3-1)."""
    return ["", "+", "#"] if levels == ["", "#"] else levels


def _check_text(text: str, what: str) -> None:
    if not text:
        raise _refused(text, what, "it is empty")
    if "\0" in text:
        raise _refused(text, what, "it holds NUL")
    try:
        encoded = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        raise _refused(text, what, "it is no UTF-8") from error
    if encoded > MAX_TOPIC_BYTES:
        raise _refused(text, what, f"it is longer than {MAX_TOPIC_BYTES} bytes")


def _refused(text: str, what: str, cause: str) -> TopicError:
    return TopicError(f"could not use {quoted(text, 80)} as a {what}: {cause}")
