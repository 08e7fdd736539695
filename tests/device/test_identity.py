"""The identity grammar: what is a name, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from birthmark.device.errors import IdentityError
from birthmark.device.identity import BrokerName, DeviceId, Role, device_role


@pytest.mark.parametrize("text", ["a", "A9", "sensor-17", "x" * 63, "0"])
def test_accepts_the_grammar(text: str) -> None:
    assert str(DeviceId(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-a",
        "a-",
        "+",
        "#",
        "a/b",
        "$SYS",
        "a\0b",
        "a\n",
        "x" * 64,
        "sensor 1",
        "\u0441ensor",
        "a\u202eb",
        "a.b",
        "a_b",
    ],
)
def test_refuses_everything_else(text: str) -> None:
    with pytest.raises(IdentityError) as caught:
        DeviceId(text)
    assert caught.value.hint
    assert caught.value.message.isascii()
    assert caught.value.message.isprintable()


@given(st.text(max_size=80))
def test_no_id_can_hold_a_topic_separator_or_wildcard(text: str) -> None:
    try:
        device_id = DeviceId(text)
    except IdentityError:
        return
    assert not set(str(device_id)) & set("/+#$\0\n ")


def test_ids_that_differ_in_case_are_one() -> None:
    assert DeviceId("Sensor-1").folded == DeviceId("sENSOR-1").folded


@pytest.mark.parametrize("name", ["operator", "Operator", "service-billing", "SERVICE-x"])
def test_reserved_roles_are_refused_for_devices(name: str) -> None:
    assert Role(name).is_reserved
    with pytest.raises(IdentityError, match="reserved"):
        device_role(name)


@pytest.mark.parametrize("name", ["", "-a", "a b", "x" * 33, "ü"])
def test_roles_outside_the_grammar_are_refused(name: str) -> None:
    with pytest.raises(IdentityError):
        Role(name)


@pytest.mark.parametrize("name", ["gateway-1.example.com", "127.0.0.1", "::1", "localhost"])
def test_broker_names(name: str) -> None:
    assert str(BrokerName(name)) == name


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "x" * 65, "a\0", "-a"])
def test_bad_broker_names(name: str) -> None:
    with pytest.raises(IdentityError):
        BrokerName(name)
