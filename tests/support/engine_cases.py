"""The decision suite: what a client tries, and what an engine makes of it. Black box, over MQTT alone.

Each case says whether the policy held, and how. That something is *not* delivered is seen by what comes after it:
an allowed message, sent later, arrives, and nothing arrived before it.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, NamedTuple

from support import mqtt_client as mqtt
from support.engines import MAX_PACKET_BYTES, revoking
from support.mqtt_client import ConnectionEndedError, RawClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.engines import Engine

CONTROL = b"control"
TRIED = b"tried"
OWN, OWN_COMMANDS = "devices/sensor-1/telemetry/x", "devices/sensor-1/commands/x"
FOREIGN_COMMANDS = "devices/sensor-2/commands/x"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


class Verdict(NamedTuple):
    """Whether the gateway's policy held, and how it was said."""

    held: bool
    how: str

    def __str__(self) -> str:
        return self.how if self.held else f"**no: {self.how}**"


class Case(NamedTuple):
    area: str
    title: str
    run: Callable[[Engine], Verdict]


CASES: list[Case] = []


def case(area: str, title: str) -> Callable[[Callable[[Engine], Verdict]], Callable[[Engine], Verdict]]:
    def add(run: Callable[[Engine], Verdict]) -> Callable[[Engine], Verdict]:
        CASES.append(Case(area, title, run))
        return run

    return add


def payloads_before_control(reader: RawClient) -> list[bytes]:
    """What arrives until the control does."""
    found = []
    while (payload := reader.read_delivery().payload) != CONTROL:
        found.append(payload)
    return found


def publishing(engine: Engine, name: str, topic: str, *, retain: bool = False) -> Verdict:
    """Publish on a topic, then what `sensor-1` may; an operator listens to both."""
    bob = engine.operator("devices/#", "gateway/+/receipts", name="bob")
    sender = engine.client(name)
    sender.send(mqtt.publish(topic, TRIED, qos=1, pid=1, retain=retain))
    assert sender.read() == mqtt.Packet(0x40, b"\x00\x01")  # §3.3.5: acknowledged, published or not
    (sender if name == "sensor-1" else engine.client("sensor-1")).send(mqtt.publish(OWN, CONTROL))
    arrived = TRIED in payloads_before_control(bob)
    return Verdict(arrived, "delivered") if arrived else Verdict(held=False, how="dropped")


def refused(verdict: Verdict) -> Verdict:
    """The policy denies it: not to be delivered is to hold."""
    return Verdict(not verdict.held, verdict.how)


def subscribing(engine: Engine, topic_filter: str, topic: str, *, retained: bool = False) -> Verdict:
    """Have `sensor-1` subscribe to a filter, and an operator publish what the policy does not allow it."""
    alice = engine.client("alice")
    if retained:
        alice.send(mqtt.publish(topic, TRIED, qos=1, pid=1, retain=True))
        assert alice.read() == mqtt.Packet(0x40, b"\x00\x01")
    device = engine.client("sensor-1").subscribed((OWN_COMMANDS, 0))
    device.send(mqtt.subscribe(2, (topic_filter, 0)))
    answer = device.read()
    assert answer.first == 0x90, answer
    if not retained:
        alice.send(mqtt.publish(topic, TRIED))
    alice.send(mqtt.publish(OWN_COMMANDS, CONTROL))
    arrived = payloads_before_control(device)
    if retained:
        alice.send(mqtt.publish(topic, b"", retain=True))
    if TRIED in arrived:
        return Verdict(held=False, how="delivered")
    return Verdict(held=True, how="refused" if answer.body[2] == 0x80 else "granted, nothing is delivered")


@case("publish", "a device, on its own topic")
def _(engine: Engine) -> Verdict:
    return publishing(engine, "sensor-1", OWN)


@case("publish", "a device, on another device's topic")
def _(engine: Engine) -> Verdict:
    return refused(publishing(engine, "sensor-1", "devices/sensor-2/telemetry/x"))


@case("publish", "a device, on a topic that begins like its own")
def _(engine: Engine) -> Verdict:
    return refused(publishing(engine, "sensor-1", "devices/sensor-10/telemetry/x"))


@case("publish", "a device, on its own topic in capitals")
def _(engine: Engine) -> Verdict:
    return refused(publishing(engine, "sensor-1", "devices/SENSOR-1/telemetry/x"))


@case("publish", "a topic that `deny_publish` takes out of a wider one")
def _(engine: Engine) -> Verdict:
    return refused(publishing(engine, "sensor-1", "devices/sensor-1/telemetry/locked/x"))


@case("publish", "in a gateway's name (`gateway/+/receipts`)")
def _(engine: Engine) -> Verdict:
    return refused(publishing(engine, "alice", "gateway/localhost/receipts"))


@case("publish", "a retained message on another device's topic")
def _(engine: Engine) -> Verdict:
    verdict = refused(publishing(engine, "sensor-1", "devices/sensor-2/status", retain=True))
    engine.operator("devices/sensor-2/status").ping()  # nothing is there for who comes later
    return verdict


@case("publish", "on `$SYS/...`")
def _(engine: Engine) -> Verdict:
    sender = engine.client("sensor-1")
    sender.send(mqtt.publish("$SYS/broker/x", TRIED))
    try:
        sender.ping()
    except ConnectionEndedError:
        return Verdict(held=True, how="disconnected")
    bob = engine.operator("devices/#", name="bob")
    sender.send(mqtt.publish(OWN, CONTROL))
    assert payloads_before_control(bob) == []
    return Verdict(held=True, how="dropped")


@case("subscribe", "a device, to its own commands")
def _(engine: Engine) -> Verdict:
    device = engine.client("sensor-1").subscribed(("devices/sensor-1/commands/#", 0))
    engine.client("alice").send(mqtt.publish(OWN_COMMANDS, CONTROL))
    return Verdict(payloads_before_control(device) == [], "delivered")


@case("subscribe", "a device, to another device's commands")
def _(engine: Engine) -> Verdict:
    return subscribing(engine, FOREIGN_COMMANDS, FOREIGN_COMMANDS)


@case("subscribe", "a wildcard wider than its entry (`devices/+/commands/#`)")
def _(engine: Engine) -> Verdict:
    return subscribing(engine, "devices/+/commands/#", FOREIGN_COMMANDS)


@case("subscribe", "everything (`#`)")
def _(engine: Engine) -> Verdict:
    return subscribing(engine, "#", FOREIGN_COMMANDS)


@case("subscribe", "a topic of `deny_subscribe`")
def _(engine: Engine) -> Verdict:
    return subscribing(engine, "devices/sensor-1/config/factory", "devices/sensor-1/config/factory")


@case("subscribe", "around a topic of `withhold`")
def _(engine: Engine) -> Verdict:
    return subscribing(engine, "fleet/#", "fleet/secret/x")


@case("subscribe", "around a topic of `withhold`: the rest of it")
def _(engine: Engine) -> Verdict:
    device = engine.client("sensor-1").subscribed(("fleet/#", 0))
    engine.client("alice").send(mqtt.publish("fleet/news", CONTROL))
    return Verdict(payloads_before_control(device) == [], "delivered")


@case("subscribe", "to what is retained for another device")
def _(engine: Engine) -> Verdict:
    return subscribing(engine, FOREIGN_COMMANDS, FOREIGN_COMMANDS, retained=True)


@case("subscribe", "a device, to the engine's own figures (`$SYS/#`)")
def _(engine: Engine) -> Verdict:
    alice, device = engine.client("alice"), engine.client("sensor-1").subscribed((OWN_COMMANDS, 0))
    device.send(mqtt.subscribe(2, ("$SYS/#", 0)))
    code = device.read().body[2]
    alice.send(mqtt.publish(OWN_COMMANDS, CONTROL))
    if payloads_before_control(device):
        return Verdict(held=False, how="delivered")
    return Verdict(held=True, how="refused" if code == 0x80 else "granted, nothing is delivered")


@case("subscribe", "a shared subscription to another device's commands")
def _(engine: Engine) -> Verdict:
    return subscribing(engine, f"$share/group/{FOREIGN_COMMANDS}", FOREIGN_COMMANDS)


def willing(engine: Engine, topic: str) -> Verdict:
    """Leave a last will by being taken over, then publish the control as the one who took over."""
    bob = engine.operator("devices/#", name="bob")
    client = engine.open("sensor-1")
    client.send(mqtt.connect("sensor-1", will=(topic, TRIED, 1, False)))
    if client.read() != mqtt.connack(0):
        return Verdict(held=False, how="refused")
    engine.client("sensor-1").send(mqtt.publish(OWN, CONTROL))
    arrived = TRIED in payloads_before_control(bob)
    return Verdict(arrived, "delivered" if arrived else "taken, never published")


@case("will", "on its own topic")
def _(engine: Engine) -> Verdict:
    return willing(engine, "devices/sensor-1/status")


@case("will", "on another device's topic")
def _(engine: Engine) -> Verdict:
    return refused(willing(engine, "devices/sensor-2/status"))


@case("role", "a role by a glob on the CN: what it may")
def _(engine: Engine) -> Verdict:
    return publishing(engine, "camera-1", "devices/camera-1/frames/1")


@case("role", "a role by a glob on the CN: what others of its OU may")
def _(engine: Engine) -> Verdict:
    return refused(publishing(engine, "camera-1", "devices/camera-1/telemetry/x"))


@case("role", "an identity that no assignment matches")
def _(engine: Engine) -> Verdict:
    return refused(publishing(engine, "visitor", "devices/visitor/telemetry/x"))


@case("role", "a certificate with an operator's CN and a device's OU")
def _(engine: Engine) -> Verdict:
    device = engine.client("sensor-1").subscribed((OWN_COMMANDS, 0))
    imposter = engine.open("alice, but a device").handshake(mqtt.connect("alice"))
    imposter.send(mqtt.publish(OWN_COMMANDS, TRIED, qos=1, pid=1))
    assert imposter.read() == mqtt.Packet(0x40, b"\x00\x01")
    engine.client("bob").send(mqtt.publish(OWN_COMMANDS, CONTROL))
    return Verdict(payloads_before_control(device) == [], "dropped")


@case("client id", "another device's")
def _(engine: Engine) -> Verdict:
    owner = engine.client("sensor-1").subscribed((OWN_COMMANDS, 0))
    thief = engine.open("sensor-2")
    thief.send(mqtt.connect("sensor-1", clean=False))
    answer = thief.read()
    owner.ping()  # it is still connected
    if answer != mqtt.connack(0):
        return Verdict(held=True, how="refused")
    engine.client("alice").send(mqtt.publish(OWN_COMMANDS, CONTROL))
    assert payloads_before_control(owner) == []
    thief.ping()  # and nothing came to the thief
    return Verdict(held=True, how="taken, as a name for its own session")


def letting_in(name: str, title: str) -> None:
    """Add a case of a certificate that is not to be let in; a good one is, after it."""

    @case("certificate", title)
    def _(engine: Engine) -> Verdict:
        is_in = engine.lets_in(name)
        assert engine.lets_in("sensor-1")
        return Verdict(not is_in, "let in" if is_in else "refused")


letting_in("sensor-1 of a stranger", "of another issuer by the same name")
letting_in("sensor-1 of another CA of the root", "of another CA below the same root")
letting_in("sensor-1 of the root", "of the root itself")
letting_in("sensor-1 of a device", "of a CA that is none")
letting_in("sensor-1, expired", "expired")
letting_in("sensor-1, not yet", "not valid yet")
letting_in("sensor-1, a server", "for a server")
letting_in("sensor-1, not by the profile", "right in all but the profile")


@case("certificate", "with two CNs")
def _(engine: Engine) -> Verdict:
    if not engine.lets_in("two names"):
        return Verdict(held=True, how="refused")
    bob, client = engine.operator("devices/#", name="bob"), engine.open("two names")
    client.handshake(mqtt.connect("sensor-1")).send(mqtt.publish(OWN, TRIED, qos=1, pid=1))
    assert client.read() == mqtt.Packet(0x40, b"\x00\x01")
    engine.client("sensor-1").send(mqtt.publish(OWN, CONTROL))
    return Verdict(payloads_before_control(bob) == [], "let in, may do nothing")


@case("packet", "as large as `max_packet_bytes`")
def _(engine: Engine) -> Verdict:
    bob, client = engine.operator("devices/#", name="bob"), engine.client("sensor-1")
    client.send(mqtt.publish(OWN, b"x" * (MAX_PACKET_BYTES - 2 - len(OWN))))
    return Verdict(len(bob.read_delivery().payload) == MAX_PACKET_BYTES - 2 - len(OWN), "delivered")


@case("packet", "one byte larger")
def _(engine: Engine) -> Verdict:
    bob, client = engine.operator("devices/#", name="bob"), engine.client("sensor-1")
    client.send(mqtt.publish(OWN, b"x" * (MAX_PACKET_BYTES - 1 - len(OWN))))
    client.read_end()
    engine.client("sensor-1").send(mqtt.publish(OWN, CONTROL))
    return Verdict(payloads_before_control(bob) == [], "disconnected")


@case("protocol", "MQTT 5")
def _(engine: Engine) -> Verdict:
    client = engine.open("sensor-1")
    hello = mqtt.text("MQTT") + bytes([5, 2]) + struct.pack(">H", 60) + b"\x00" + mqtt.text("sensor-1")
    client.send(mqtt.packet(0x10, hello))
    try:
        answer = client.read()
    except ConnectionEndedError:
        return Verdict(held=True, how="refused")
    return Verdict(held=True, how="taken, within the same rights" if answer.body[1] == 0 else "refused")


def revocation(engine: Engine) -> dict[str, Verdict]:
    """Revoke `doomed` while it is connected, and try all that it had."""
    found: dict[str, Verdict] = {}
    own, presence = "devices/doomed/telemetry/x", "devices/doomed/status"
    bob = engine.operator("devices/#", name="alice")
    doomed = engine.client("doomed", will=(presence, b"will", 1, False))
    doomed.subscribed(("devices/doomed/commands/#", 0))
    for topic in (own, presence):
        doomed.send(mqtt.publish(topic, b"retained", retain=True))
        assert bob.read_delivery().payload == b"retained"
    session = doomed.tls.session
    assert session is not None
    assert engine.lets_in("sensor-1")
    engine.control.revoke(revoking(engine.identities))

    found["a new connection"] = _let_in(engine.lets_in("doomed", "doomed"))
    found["a TLS session that is resumed"] = _let_in(engine.lets_in("doomed", "doomed", session))
    closed = False
    try:
        doomed.send(mqtt.publish(own, TRIED, qos=1, pid=9))
        doomed.read()
    except (OSError, ConnectionEndedError):
        closed = True
    how = "disconnected" if closed else "dropped"
    sensor = engine.client("sensor-1")
    sensor.send(mqtt.publish(OWN, CONTROL))
    heard = payloads_before_control(bob)
    found["what it publishes on a live connection"] = Verdict(TRIED not in heard, how)
    found["its presence, for those who listen"] = Verdict(
        b"" in heard, "taken back" if b"" in heard else "it stays"
    )
    commander = engine.client("bob")
    commander.send(mqtt.publish("devices/doomed/commands/x", TRIED, qos=1, pid=1))
    assert commander.read() == mqtt.Packet(0x40, b"\x00\x01")
    if closed:
        found["what is sent to it on a live connection"] = Verdict(held=True, how=how)
        found["the live connection itself"] = Verdict(held=True, how=how)
    else:
        doomed.send(mqtt.PINGREQ)
        has_come = doomed.read() != mqtt.PINGRESP
        found["what is sent to it on a live connection"] = Verdict(not has_come, "dropped")
        found["the live connection itself"] = Verdict(held=False, how="it stays open")
        assert bob.read_delivery().payload == TRIED  # what was sent to it; an operator hears that
    doomed.close()
    engine.control.wait_for_end("doomed")
    sensor.send(mqtt.publish(OWN, CONTROL))
    found["its last will"] = Verdict(b"will" not in payloads_before_control(bob), "not published")
    late = engine.client("bob").subscribed((presence, 0))
    late.send(mqtt.PINGREQ)
    found["its presence, for those who come later"] = Verdict(late.read() == mqtt.PINGRESP, "not there")
    late.close()
    late = engine.client("bob").subscribed((own, 0))
    late.send(mqtt.PINGREQ)
    stays = late.read() != mqtt.PINGRESP
    found["another message that it left retained"] = Verdict(held=True, how="it stays" if stays else "not there")
    engine.close_clients()
    return found


def _let_in(is_in: bool) -> Verdict:
    return Verdict(not is_in, "let in" if is_in else "refused")


Row = tuple[str, str, Verdict, Verdict]


def measure(gateway: Engine, mosquitto: Engine) -> list[Row]:
    """Run every case against both; the revocation comes last."""
    rows: list[Row] = []
    for area, title, run in CASES:
        one, other = (_run(engine, run, f"{area}, {title}") for engine in (gateway, mosquitto))
        rows.append((area, title, one, other))
    here, there = revocation(gateway), revocation(mosquitto)
    rows += [("revoked", title, here[title], there[title]) for title in here]
    return rows


def _run(engine: Engine, run: Callable[[Engine], Verdict], what: str) -> Verdict:
    try:
        return run(engine)
    except Exception as error:
        error.add_note(f"{engine.name}: {what}")
        raise
    finally:
        engine.close_clients()


def table(rows: list[Row]) -> str:
    """The matrix, in Markdown."""
    lines = ["| | tried | birthmark-broker | Mosquitto 2.0, exported |", "|---|---|---|---|"]
    lines += [f"| {area} | {title} | {one} | {other} |" for area, title, one, other in rows]
    return "\n".join(lines)


def with_table(page: str, measured: str) -> str:
    """The page with this matrix between its marks."""
    assert BEGIN in page
    assert END in page
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{measured}\n{END}", page, flags=re.DOTALL)
