"""Topics and filters by which one device would reach another's; and those that break MQTT itself.

The control beside each: an identity that may do anything (`free-1`) does the same, and it works.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.mqtt_client import Delivery, RawClient, packet, text

if TYPE_CHECKING:
    from support.mqtt_world import ProcessWorld

LONGEST = 65_535
OWN = "devices/sensor-1/telemetry/t"

FOREIGN_FILTERS = [
    "#",
    "+",
    "+/#",
    "+/+/#",
    "+/sensor-1/#",
    "devices/#",
    "devices/+",
    "devices/+/#",
    "devices/+/commands/#",
    "devices/+/status",
    "devices/sensor-2/#",
    "devices/sensor-2/commands/x",
    "devices/SENSOR-1/#",
    "devices//#",
    "/devices/sensor-1/#",
    "gateway/#",
    "gateway/+/crl",
    "$SYS/#",
    "$SYS/+/x",
    "fleet/#",
]
NEVER_FILTERS = ["$share/group/devices/sensor-1/#", "$share/g/#", "$foo/#", "$SYSTEM/x", "$/x"]
FOREIGN_TOPICS = [
    "devices/sensor-2/telemetry/t",
    "devices/sensor-2/status",
    "devices/SENSOR-1/telemetry/t",
    "devices/sensor-1x/telemetry/t",
    "devices/ sensor-1/telemetry/t",
    "devices/s\u0435nsor-1/telemetry/t",
    "devices//telemetry/t",
    "/devices/sensor-1/telemetry/t",
    "devices",
    "fleet/announcements/all",
    "gateway/localhost/crl",
    "gateway/localhost/status",
]


@pytest.mark.parametrize("topic_filter", FOREIGN_FILTERS)
def test_a_foreign_filter_is_refused(world: ProcessWorld, topic_filter: str) -> None:
    free = world.client("free-1").subscribed((topic_filter, 1))
    with world.client("sensor-1") as device:
        device.send(mqtt.subscribe(7, (topic_filter, 1), ("devices/sensor-1/commands/#", 1)))
        assert device.read() == mqtt.suback(7, 0x80, 1)
    free.close()


@pytest.mark.parametrize("topic_filter", NEVER_FILTERS)
def test_a_filter_on_the_brokers_own_topics_is_refused_to_all(world: ProcessWorld, topic_filter: str) -> None:
    """Shared subscriptions among them: a stranger in the group would take messages away from those in it."""
    for name in ("sensor-1", "free-1"):
        with world.client(name) as client:
            client.send(mqtt.subscribe(7, (topic_filter, 1)))
            assert client.read() == mqtt.suback(7, 0x80)


def read_of_a_client(watcher: RawClient) -> Delivery:
    """The next message that is not the gateway's own word about who has connected."""
    while (found := watcher.read_delivery()).topic.startswith("gateway/localhost/seen/"):
        pass
    return found


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("topic", FOREIGN_TOPICS)
def test_a_message_to_a_foreign_topic_reaches_nobody_and_is_not_retained(
    world: ProcessWorld, topic: str, retain: bool
) -> None:
    watcher = world.client("free-1").subscribed(("#", 1))
    drain(watcher)
    with world.client("sensor-1") as device:
        for qos in (0, 1, 2):
            device.send(mqtt.publish(topic, b"evil", qos=qos, retain=retain, pid=qos))
        assert [device.read().first for _ in range(2)] == [0x40, 0x50], "acknowledged, and dropped"
        device.send(mqtt.publish(OWN, b"mine"))
    found = read_of_a_client(watcher)
    assert (found.topic, found.payload) == (OWN, b"mine")
    with world.client("free-2") as other:
        if not topic.startswith("gateway/"):  # where a gateway hears or speaks, for nobody else
            other.send(mqtt.publish(topic, b"good"))
            assert read_of_a_client(watcher).payload == b"good", "the control: it can be published to"
        other.subscribed((topic, 0))
        if topic != "gateway/localhost/status":  # where the gateway's own is retained
            other.ping()
    watcher.close()


@pytest.mark.parametrize(
    "topic", ["receipts", "policy-receipts", "status", "seen/sensor-1", "crl-in-force/00", "receipts/x"]
)
def test_nobody_says_anything_in_the_name_of_a_gateway(world: ProcessWorld, topic: str) -> None:
    """However wide the entries of a role are: a station believes a receipt, and calls a revocation done."""
    watcher = world.operator("alice", ("gateway/#", 0), ("devices/free-1/x", 0))
    drain(watcher)
    for name in ("localhost", "another"):
        with world.client("free-1") as free:
            for retain in (False, True):
                free.send(mqtt.publish(f"gateway/{name}/{topic}", b"evil", qos=1, pid=1, retain=retain))
                assert free.read().first == 0x40, "acknowledged, and dropped"
            free.send(mqtt.publish("devices/free-1/x", b"good"))
            free.ping()
        assert read_of_a_client(watcher).payload == b"good", "the control: of the rest it may publish all"
        will = (f"gateway/{name}/{topic}", b"evil", 0, True)
        assert world.answer(world.context("free-1"), mqtt.connect("free-1", will=will)) == 5
    watcher.close()


@pytest.mark.parametrize("topic", ["$SYS/broker/version", "$SYS/x", "$foo", "$share/g/devices/sensor-1/x"])
def test_nobody_publishes_to_the_brokers_own_topics(world: ProcessWorld, topic: str) -> None:
    watcher = world.operator("alice", ("$SYS/#", 0))
    drain(watcher)
    for name in ("sensor-1", "free-1", "alice:2"):
        role = "operator" if name.startswith("alice") else "device"
        with world.client(name.partition(":")[0], role, client_id=name) as client:
            client.send(mqtt.publish(topic, b"evil", retain=True))
            client.ping()
    watcher.send(mqtt.PINGREQ)
    while (found := watcher.read()) != mqtt.PINGRESP:
        assert mqtt.delivery(found).payload != b"evil"
    watcher.close()


def drain(client: RawClient) -> None:
    """Read past what is retained."""
    client.send(mqtt.PINGREQ)
    while client.read() != mqtt.PINGRESP:
        pass


BROKEN_TEXT = {
    "NUL": b"devices/sensor-1/\0",
    "NUL in the middle": b"devices/sensor-1/a\0b",
    "overlong slash": b"devices/sensor-1\xc0\xaft",
    "overlong NUL": b"devices/sensor-1/\xc0\x80",
    "overlong in three bytes": b"devices/sensor-1/\xe0\x80\xaf",
    "overlong in four bytes": b"devices/sensor-1/\xf0\x80\x80\xaf",
    "surrogate": b"devices/sensor-1/\xed\xa0\x80",
    "surrogate pair (CESU-8)": b"devices/sensor-1/\xed\xa0\xbd\xed\xb8\x80",
    "beyond Unicode": b"devices/sensor-1/\xf4\x90\x80\x80",
    "five bytes": b"devices/sensor-1/\xf8\x88\x80\x80\x80",
    "lone continuation": b"devices/sensor-1/\x80",
    "cut short": b"devices/sensor-1/\xe2\x82",
    "Latin-1": b"devices/sensor-1/caf\xe9",
}


@pytest.mark.parametrize("raw", BROKEN_TEXT.values(), ids=BROKEN_TEXT.keys())
def test_text_that_is_no_utf_8_ends_the_connection_wherever_it_stands(world: ProcessWorld, raw: bytes) -> None:
    """MQTT 3.1.1 §1.5.3: what two implementations read differently is how a policy is got around."""
    hostile = {
        "publish": packet(0x30, text(raw) + b"x"),
        "subscribe": packet(0x82, b"\0\1" + text(raw) + b"\0"),
        "unsubscribe": packet(0xA2, b"\0\1" + text(raw)),
    }
    for data in hostile.values():
        with world.client("sensor-1") as device:
            device.send(data)
            assert device.read_end() == []
    with world.open(world.context("sensor-1")) as device:
        device.send(mqtt.connect("sensor-1", flags=2 | 4, tail=text(raw) + text(b"will")))
        assert device.read_end() == []
    with world.open(world.context("sensor-1")) as device:
        device.send(mqtt.connect(raw))
        assert device.read_end() == []


@pytest.mark.parametrize("good", ["caf\u00e9", "\U0001f600", "\ufeff", "\u20ac", "\x7f", "a b", "\u202e"])
def test_the_control_other_text_is_taken_as_it_is(world: ProcessWorld, good: str) -> None:
    topic = f"devices/sensor-1/{good}"
    with world.client("sensor-1") as device:
        device.subscribed((topic, 0))
        device.send(mqtt.publish(topic, b"x"))
        assert device.read_delivery().topic == topic
        device.ping()


@pytest.mark.parametrize("topic", ["devices/sensor-1/+", "devices/sensor-1/#", "+", "#", "a/+/b", "devices/+/x"])
def test_a_wildcard_in_a_topic_name_ends_the_connection(world: ProcessWorld, topic: str) -> None:
    with world.client("free-1") as client:
        client.send(mqtt.publish(topic, b"x"))
        assert client.read_end() == []
    with world.client("free-1") as client:
        client.subscribed((topic, 0))


@pytest.mark.parametrize("size", [LONGEST - 1, LONGEST])
def test_a_topic_of_65535_bytes_is_a_topic(world: ProcessWorld, size: int) -> None:
    mine = "devices/sensor-1/".ljust(size, "x")
    foreign = "devices/sensor-2/".ljust(size, "x")
    deep = "devices/sensor-1" + "/" * (size - 16)
    watcher = world.operator("alice", ("devices/#", 0))
    drain(watcher)
    with world.client("sensor-1") as device:
        for topic in (foreign, mine, deep):
            device.send(mqtt.publish(topic, b"x"))
        device.ping()
        assert watcher.read_delivery().topic == mine, "the control: one of its own gets through"
        assert watcher.read_delivery().topic == deep
        device.send(mqtt.subscribe(1, (foreign, 0), (mine, 0), (deep, 0)))
        assert device.read() == mqtt.suback(1, 0x80, 0x80, 0x80), "as filters they are too long, or too deep"
    watcher.close()
    world.broker.wait_for_log("sensor-1 may not subscribe to")
    said = [record for record in world.broker.log if record.get("event") == "denied"]
    assert max(len(str(record)) for record in said) < 2_000, "a line of the log stays a line"
