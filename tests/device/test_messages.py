"""The messages on the topics: round trips, and only our own error for anything else."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from birthmark.device.errors import RemoteProtocolError
from birthmark.device.messages import (
    AddressSeen,
    ClosedIdentity,
    GatewayStatus,
    Receipt,
    Sighting,
    UpstreamState,
)
from birthmark.device.presence import Presence

CLOSED = ClosedIdentity(
    id="sensor-17",
    cert_serial="5a01",
    sessions_closed=1,
    elapsed_ms=2.5,
    will_suppressed=True,
    queued_messages_purged=3,
    retained_presence_purged=True,
)
RECEIPT = Receipt(
    gateway="gw-1",
    outcome="installed",
    issuer="ab12",
    crl_number=7,
    crl_sha256="00ff",
    revoked_count=2,
    installed_at=3.0,
    elapsed_ms=4.0,
    closed=(CLOSED,),
    reason="",
)
STATUS = GatewayStatus(
    gateway="gw-1",
    online=True,
    clock=1.0,
    crl_numbers={"ab12": 7},
    crl_next_update=9.0,
    policy_sha256="cd",
    sessions=3,
    alarms=("crl-due", "crl-refusing"),
    counters={"messages_in": 4},
    policy_version=12,
    upstreams=(
        UpstreamState("cloud", connected=False, since=5.0, server="mq1:8883", spooled=8, reason="refused"),
    ),
)
Message = Presence | Receipt | GatewayStatus | Sighting
MESSAGES: list[Message] = [
    Presence(online=True, since=1.5),
    Presence(online=False, since=2.0, reason="lost"),
    RECEIPT,
    STATUS,
    Sighting("sensor-1", "5a01", 1.0, 2.0, (AddressSeen("192.0.2.7", 1.5, 2.0),), 3, "gw-2"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_round_trip(message: Message) -> None:
    assert type(message).from_bytes(message.to_bytes()) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_unknown_keys_are_ignored(message: Message) -> None:
    fields: dict[str, Any] = json.loads(message.to_bytes())
    assert type(message).from_bytes(json.dumps({**fields, "later": [1]}).encode()) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_wrong_type_is_refused_key_by_key(message: Message) -> None:
    fields: dict[str, Any] = json.loads(message.to_bytes())
    for key, value in fields.items():
        for wrong in (None, 5 if isinstance(value, str) else "5"):
            with pytest.raises(RemoteProtocolError):
                type(message).from_bytes(json.dumps({**fields, key: wrong}).encode())


def test_what_older_gateways_do_not_say_has_a_default() -> None:
    status = json.loads(STATUS.to_bytes())
    for key in ("policy_version", "upstreams", "counters"):
        del status[key]
    read = GatewayStatus.from_bytes(json.dumps(status).encode())
    assert (read.policy_version, read.upstreams, read.counters) == (0, (), {})
    sighting = json.loads(Sighting("sensor-1", "5a01", 1.0, 2.0, visit=3).to_bytes())
    del sighting["visit"], sighting["moved_to"]
    old = Sighting.from_bytes(json.dumps(sighting).encode())
    assert (old.visit, old.moved_to) == (0, "")


def test_an_unknown_outcome_is_refused_and_escaped() -> None:
    fields = json.loads(RECEIPT.to_bytes())
    with pytest.raises(RemoteProtocolError) as caught:
        Receipt.from_bytes(json.dumps({**fields, "outcome": "\x1b[31mfine"}).encode())
    assert "\x1b" not in caught.value.message


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(
    lambda v: json.dumps(v).encode()
)


@pytest.mark.parametrize("kind", [Presence, Receipt, GatewayStatus, Sighting])
@given(st.binary(max_size=200) | JSON)
def test_any_bytes_give_only_our_error(kind: type[Message], payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        kind.from_bytes(payload)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_a_number_is_one_that_a_clock_can_show(number: str) -> None:
    with pytest.raises(RemoteProtocolError, match="out of range"):
        Presence.from_bytes(f'{{"online": true, "since": {number}}}'.encode())


def test_a_gateway_status_of_an_older_gateway_has_no_alarms() -> None:
    fields: dict[str, Any] = json.loads(STATUS.to_bytes())
    del fields["alarms"], fields["counters"]
    status = GatewayStatus.from_bytes(json.dumps(fields).encode())
    assert (status.sessions, status.alarms, status.counters) == (3, (), {})


@pytest.mark.parametrize("alarms", ["crl-due", [1], {"crl-due": True}, None])
def test_alarms_of_another_type_are_refused(alarms: Any) -> None:
    fields: dict[str, Any] = json.loads(STATUS.to_bytes())
    with pytest.raises(RemoteProtocolError, match="'alarms' is not a list of texts"):
        GatewayStatus.from_bytes(json.dumps({**fields, "alarms": alarms}).encode())
