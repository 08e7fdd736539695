"""A device with a good certificate that would be another one: the client id, the user name, the session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.mqtt_client import text

from birthmark.broker.log_budget import MAX_LINES

if TYPE_CHECKING:
    from support.mqtt_world import ProcessWorld

USER_NAME, PASSWORD = 0x80, 0x40
OTHERS = {
    "another's": "victim",
    "another's in capitals": "VICTIM",
    "its own in capitals": "SENSOR-1",
    "its own with a suffix": "sensor-1:x",
    "a service's": "alice",
    "a service's with a suffix": "alice:x",
    "with a wildcard": "+",
    "with NUL in it": "sensor-1\0",
    "a Cyrillic look-alike": "s\u0435nsor-1",
    "with a byte-order mark": "\ufeffsensor-1",
}


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("client_id", OTHERS.values(), ids=OTHERS.keys())
def test_another_client_id_is_refused_and_touches_nothing(
    world: ProcessWorld, client_id: str, clean: bool
) -> None:
    """Not while its session is connected, not while it is away; and its queue is still there."""
    topic = "devices/victim/commands/x"
    victim = world.client("victim").subscribed((topic, 1))
    context = world.context("sensor-1")
    answer = world.answer(context, mqtt.connect(client_id, clean=clean))
    assert answer == 2 or ("\0" in client_id and answer is None)
    victim.ping()
    operator = world.operator()
    operator.send(mqtt.publish(topic, b"for victim", qos=1, pid=1))
    assert victim.read_delivery().payload == b"for victim", "connected, subscribed, as if nothing had been"
    assert world.lets_in(context, "sensor-1"), "the control: by its own name it gets in"
    victim.close()
    operator.close()


def test_no_one_fills_the_log_with_refusals(world: ProcessWorld) -> None:
    """Each names what the client asked for, so no two are the same."""
    context = world.context("chatty")
    for number in range(2 * MAX_LINES):
        assert world.answer(context, mqtt.connect(f"name-{number}")) == 2
    world.client("last").close()
    world.broker.wait_for_log("last connected")  # so that all lines before it are there
    said = [record for record in world.broker.log if record.get("event") == "refused" and record["id"] == "chatty"]
    assert 0 < len(said) <= MAX_LINES


def test_the_persistent_session_of_another_stays_its_own(world: ProcessWorld) -> None:
    topic = "devices/keeper/commands/x"
    with world.client("keeper", clean=False) as keeper:
        keeper.subscribed((topic, 1))
        keeper.send(mqtt.DISCONNECT)
        keeper.read_end()
    with world.operator() as operator:
        for number in range(3):
            operator.send(mqtt.publish(topic, b"%d" % number, qos=1, pid=number + 1))
            operator.read()
    for clean in (False, True):
        assert world.answer(world.context("sensor-1"), mqtt.connect("keeper", clean=clean)) == 2
    with world.client("keeper", clean=False, present=True) as keeper:
        assert [keeper.read_delivery().payload for _ in range(3)] == [b"0", b"1", b"2"]
        for number in range(3):
            keeper.send(mqtt.puback(number + 1))
        keeper.ping()


@pytest.mark.parametrize("flags", [USER_NAME, USER_NAME | PASSWORD])
@pytest.mark.parametrize("name", ["victim", "alice", "operator", "root", "#"])
def test_a_user_name_gives_nothing(world: ProcessWorld, name: str, flags: int) -> None:
    """The certificate is who a client is; what it says beside that is read past (MQTT 3.1.1 §3.1.3.4)."""
    tail = text(name) + (text("password") if flags & PASSWORD else b"")
    watcher = world.operator("alice", ("devices/#", 0))
    client = world.open(world.context("sensor-1"))
    client.handshake(mqtt.connect("sensor-1", flags=flags | 2, tail=tail))
    client.send(mqtt.subscribe(1, ("devices/victim/#", 1), ("devices/#", 1), ("devices/sensor-1/#", 1)))
    assert client.read() == mqtt.suback(1, 0x80, 0x80, 1)
    for topic in ("devices/victim/telemetry/t", "devices/alice/status", "devices/sensor-1/telemetry/t"):
        client.send(mqtt.publish(topic, name.encode(), qos=0))
    found = watcher.read_delivery()
    assert found.topic == "devices/sensor-1/telemetry/t", "its own is the first that arrives"
    watcher.ping()
    client.close()
    watcher.close()


def test_a_service_has_sessions_of_its_own_name_alone(world: ProcessWorld) -> None:
    context = world.context("alice", "operator")
    for client_id in ("bob", "bob:x", "alicex", "sensor-1", "ALICE:x", ":x", ":alice"):
        assert world.answer(context, mqtt.connect(client_id)) == 2
    assert world.lets_in(context, "alice")
    assert world.lets_in(context, "alice:x")
