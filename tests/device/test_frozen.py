"""Frozen values: made, compared, shown and refused as a frozen dataclass would be."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from birthmark.device.frozen import Frozen


class Reading(Frozen):
    celsius: float
    place: str = "outside"

    def __post_init__(self) -> None:
        if self.celsius < -273.15:
            raise ValueError("colder than anything")


class Sealed(Reading, secret=("key",)):
    key: bytes = b"k"
    by: str = ""


def test_is_made_by_position_by_name_and_by_default() -> None:
    made = [Reading(1.5), Reading(1.5, "outside"), Reading(celsius=1.5), Reading(1.5, place="outside")]
    assert {(each.celsius, each.place) for each in made} == {(1.5, "outside")}
    assert Sealed(2.0, by="me") == Sealed(2.0, "outside", b"k", "me")  # fields of the base come first


@pytest.mark.parametrize(
    ("values", "named"),
    [((), {}), ((), {"place": "x"}), ((1.0, "x", 3), {}), ((1.0,), {"celsius": 2.0}), ((1.0,), {"kelvin": 1})],
)
def test_refuses_what_is_missing_unknown_or_given_twice(values: tuple[Any, ...], named: dict[str, Any]) -> None:
    make: Any = Reading
    with pytest.raises(TypeError, match="Reading takes celsius, place"):
        make(*values, **named)


def test_is_equal_and_hashed_by_class_and_content() -> None:
    assert Reading(1.0) == Reading(1.0)
    assert hash(Reading(1.0)) == hash(Reading(1.0))
    assert Reading(1.0) != Reading(1.0, "inside")
    assert Reading(1.0) != Sealed(1.0)
    assert Reading(1.0) != (1.0, "outside")


def test_never_changes() -> None:
    reading: Any = Reading(1.0)
    with pytest.raises(AttributeError, match="frozen"):
        reading.celsius = 2.0
    with pytest.raises(AttributeError, match="frozen"):
        del reading.celsius
    with pytest.raises(AttributeError, match="frozen"):
        reading.humidity = 2.0
    assert not hasattr(reading, "__dict__")
    assert reading == Reading(1.0)


def test_is_checked_when_it_is_made_and_when_a_changed_one_is() -> None:
    assert Reading(1.0).changed(place="inside") == Reading(1.0, "inside")
    with pytest.raises(ValueError, match="colder"):
        Reading(-300.0)
    with pytest.raises(ValueError, match="colder"):
        Reading(1.0).changed(celsius=-300.0)
    with pytest.raises(TypeError, match="unknown"):
        Reading(1.0).changed(kelvin=1)


def test_does_not_show_its_secrets_nor_does_a_subclass() -> None:
    class Box(Sealed):
        size: int = 0

    assert repr(Sealed(1.0, by="me")) == "Sealed(celsius=1.0, place='outside', by='me')"
    assert "key" not in repr(Box(1.0, "x", b"k", "me", 3))
    assert repr(Box(1.0, "x", b"k", "me", 3)).endswith("by='me', size=3)")


def test_becomes_a_dictionary_with_the_values_in_it() -> None:
    class Pair(Frozen):
        first: Reading
        second: int

    assert Pair(Reading(1.0), 2).as_dict() == {"first": {"celsius": 1.0, "place": "outside"}, "second": 2}


def test_is_matched_by_position_and_copied() -> None:
    match Reading(1.0, "inside"):
        case Reading(celsius, place):
            assert (celsius, place) == (1.0, "inside")
    sealed = Sealed(1.0, by="me")
    assert copy.copy(sealed) == copy.deepcopy(sealed) == pickle.loads(pickle.dumps(sealed)) == sealed  # noqa: S301
