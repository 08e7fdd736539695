"""The client against a broker that does what the test says: order, presence, commands, reconnecting."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
from typing import TYPE_CHECKING

import pytest
from support.broker_stub import CONNECT, DISCONNECT, PUBACK, PUBLISH, SUBSCRIBE, UNSUBSCRIBE, BrokerStub
from support.device_folder import enrolled
from support.patience import PATIENCE_S
from support.ports import steady_port
from support.waiting import eventually
from support.watching import Watching, impatient

from birthmark.device.backoff import Backoff, RetryTimer
from birthmark.device.client import Client
from birthmark.device.commands import MAX_AHEAD_S
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.dispatch import MAX_WAITING
from birthmark.device.errors import IdentityError, LocalProtocolError, RefusedError, UnreachableError
from birthmark.device.events import (
    AttemptFailed,
    Connected,
    Disconnected,
    HandlerFailed,
    RenewalChanged,
    SubscriptionDenied,
)
from birthmark.device.presence import Presence

if TYPE_CHECKING:
    from pathlib import Path

    from support.pki import Pki

    from birthmark.device.received import Command, Message

STATUS = "devices/sensor-1/status"


@pytest.fixture
def operator(tmp_path: Path, pki: Pki, broker: BrokerStub) -> Credentials:
    anchors = tmp_path / "ca.pem"
    anchors.write_bytes(pki.root.pem)
    identity = pki.operator("alice").write(tmp_path / "alice.pem")
    return Credentials.from_files(identity, anchors, BrokerAddress("127.0.0.1", broker.port))


def test_connect_carries_the_identity_the_keepalive_and_the_last_will(state: Path, broker: BrokerStub) -> None:
    with Client.from_folder(state):
        body = broker.wait_for(CONNECT).body
    assert body.startswith(b"\0\x04MQTT\x04")  # 3.1.1
    assert body[7] == 0x04 | 0x08 | 0x20  # a will of QoS 1, retained; the session is kept
    assert int.from_bytes(body[8:10]) == 77
    rest = body[10:]
    fields = []
    while rest:
        length = int.from_bytes(rest[:2])
        fields.append(rest[2 : 2 + length])
        rest = rest[2 + length :]
    assert fields[:2] == [b"sensor-1", STATUS.encode()]
    will = Presence.from_bytes(fields[2])
    assert (will.online, will.reason) == (False, "lost")


def test_online_after_each_connect_and_goodbye_before_leaving(state: Path, broker: BrokerStub) -> None:
    with Client.from_folder(state, retry=impatient()):
        broker.wait_for(PUBLISH)
        broker.drop()
        broker.wait_for(PUBLISH, lambda packet: packet.connection == 1)
    broker.wait_for(DISCONNECT)
    said = [packet for packet in broker.packets if packet.kind == PUBLISH]
    assert {packet.topic for packet in said} == {STATUS}
    assert all(packet.retain and packet.qos == 1 for packet in said)
    presences = [Presence.from_bytes(packet.payload) for packet in said]
    assert [presence.online for presence in presences[:-1]] == [True] * (len(said) - 1)
    assert (presences[-1].online, presences[-1].reason) == (False, "goodbye")
    last = [packet.kind for packet in broker.packets if packet.connection == 1][-2:]
    assert last == [PUBLISH, DISCONNECT]


def test_whoever_was_seen_online_says_goodbye_however_soon_it_stops(state: Path, broker: BrokerStub) -> None:
    for number in range(10):
        client = Client.from_folder(state)
        client.start()
        broker.wait_for(PUBLISH, lambda packet, n=number: packet.connection == n)  # type: ignore[misc]
        client.stop()
        broker.wait_for(DISCONNECT, count=number + 1)
    for number in range(10):
        said = [p.payload for p in broker.packets if p.kind == PUBLISH and p.connection == number]
        assert [Presence.from_bytes(payload).reason for payload in said] == ["", "goodbye"]


def test_whoever_sees_it_online_can_send_it_a_command(state: Path, broker: BrokerStub) -> None:
    client = Client.from_folder(state)
    client.publish(client.telemetry("early"), b"first")

    @client.command("reboot")
    def reboot(_: Command) -> None: ...

    with client:
        broker.wait_for(PUBLISH, count=2)
    order = [(p.kind, p.topic if p.kind == PUBLISH else "") for p in broker.packets][:4]
    assert order == [
        (CONNECT, ""),
        (SUBSCRIBE, ""),
        (PUBLISH, STATUS),
        (PUBLISH, "devices/sensor-1/telemetry/early"),
    ]
    assert broker.wait_for(SUBSCRIBE).filters == ["devices/sensor-1/commands/#", "devices/sensor-1/renewal/answer"]


def test_publish_waits_for_the_acknowledgement(state: Path, broker: BrokerStub) -> None:
    with Client.from_folder(state) as client:
        client.publish("devices/sensor-1/telemetry/a", {"celsius": 21.5}, wait=PATIENCE_S)
        client.publish("devices/sensor-1/telemetry/b", "h\u00e4", retain=True, wait=PATIENCE_S)
        client.publish("devices/sensor-1/telemetry/c", b"\0\xff", qos=0, wait=PATIENCE_S)
        broker.wait_for(PUBLISH, lambda packet: packet.topic.endswith("/c"))
        sent = {packet.topic[-1]: packet for packet in broker.packets if packet.kind == PUBLISH}
        assert json.loads(sent["a"].payload) == {"celsius": 21.5}
        assert (sent["b"].payload, sent["b"].retain) == ("h\u00e4".encode(), True)
        assert (sent["c"].payload, sent["c"].qos) == (b"\0\xff", 0)

        broker.acknowledges = False
        with pytest.raises(UnreachableError, match="did not acknowledge it within"):
            client.publish("devices/sensor-1/telemetry/d", wait=0.05)
        client.stop(timeout_s=0.1)


def test_what_was_not_acknowledged_goes_out_again_and_before_what_came_later(
    state: Path, broker: BrokerStub
) -> None:
    broker.acknowledges = False
    with Client.from_folder(state, retry=impatient()) as client:
        first = client.publish("devices/sensor-1/telemetry/a", b"1")
        broker.wait_for(PUBLISH, lambda packet: packet.payload == b"1")
        assert not first.done
        broker.connack = None  # hold the next connection back
        broker.drop()
        broker.wait_for(CONNECT, count=2)
        second = client.publish("devices/sensor-1/telemetry/a", b"2")
        broker.acknowledges, broker.connack = True, 0
        broker.drop()
        first.wait(PATIENCE_S)
        second.wait(PATIENCE_S)
    again = [p.payload for p in broker.packets if p.kind == PUBLISH and p.payload in (b"1", b"2")]
    assert again == [b"1", b"1", b"2"]


def test_nothing_is_taken_after_the_end(state: Path) -> None:
    with Client.from_folder(state) as client:
        assert client.is_connected
    assert not client.is_connected
    with pytest.raises(UnreachableError, match="the client has stopped"):
        client.publish("a", b"", qos=0)


def test_commands_and_replies(state: Path, broker: BrokerStub) -> None:
    client = Client.from_folder(state)
    seen: list[Command] = []

    @client.command("reboot")
    def reboot(command: Command) -> dict[str, object]:
        seen.append(command)
        return {"delay_s": command.json()["delay_s"]}

    @client.command("quiet")
    def quiet(command: Command) -> None:
        seen.append(command)

    @client.command()
    def anything(command: Command) -> str:
        return f"no {command.name}"

    with client:
        broker.wait_for(PUBLISH)
        broker.deliver("devices/sensor-1/commands/reboot", b'{"delay_s":3}', qos=1, packet_id=10)
        broker.deliver("devices/sensor-1/commands/quiet", b"", qos=1, packet_id=11)
        broker.deliver("devices/sensor-1/commands/dance/slowly", b"", qos=0)
        reply = broker.wait_for(PUBLISH, lambda packet: packet.topic == "devices/sensor-1/replies/reboot")
        other = broker.wait_for(PUBLISH, lambda packet: packet.topic.endswith("replies/dance/slowly"))
        for packet_id in (10, 11):
            broker.wait_for(PUBACK, lambda packet, i=packet_id: packet.packet_id == i.to_bytes(2))  # type: ignore[misc]
    assert json.loads(reply.payload) == {"delay_s": 3}
    assert other.payload == b"no dance/slowly"
    assert [command.name for command in seen] == ["reboot", "quiet"]


def test_a_message_is_acknowledged_after_its_callback_and_not_to_another_connection(
    state: Path, broker: BrokerStub
) -> None:
    release, started = threading.Event(), threading.Event()
    client = Client.from_folder(state, retry=impatient())

    @client.on("work/#")
    def work(_: Message) -> None:
        started.set()
        release.wait(PATIENCE_S)

    with client:
        broker.wait_for(PUBLISH)
        broker.deliver("work/1", b"", qos=1, packet_id=5)
        assert started.wait(PATIENCE_S)
        assert not [packet for packet in broker.packets if packet.kind == PUBACK]
        broker.drop()
        broker.wait_for(PUBLISH, lambda packet: packet.connection == 1)
        release.set()
        broker.deliver("work/2", b"", qos=1, packet_id=6)
        broker.wait_for(PUBACK)
    assert [packet.packet_id for packet in broker.packets if packet.kind == PUBACK] == [b"\0\x06"]


def test_a_callback_that_raises_costs_nothing_else(
    state: Path, broker: BrokerStub, caplog: pytest.LogCaptureFixture
) -> None:
    watching = Watching()
    client = Client.from_folder(state, observe=watching)
    after: list[bytes] = []

    @client.on("a/+")
    def bad(_: Message) -> None:
        raise ZeroDivisionError

    @client.on("a/#")
    def good(message: Message) -> None:
        after.append(message.payload)

    with client:
        broker.wait_for(PUBLISH)
        broker.deliver("a/1", b"one", qos=1)
        broker.deliver("a/2", b"two", qos=1, packet_id=2)
        broker.wait_for(PUBACK, count=2)
        assert client.is_connected
    assert after == [b"one", b"two"]
    assert isinstance(watching.wait_for(HandlerFailed).error, ZeroDivisionError)
    assert "a handler of a/+ failed" in caplog.text


def test_an_observer_that_raises_costs_nothing_else(
    state: Path, broker: BrokerStub, caplog: pytest.LogCaptureFixture
) -> None:
    def observe(event: object) -> None:
        raise ZeroDivisionError

    with Client.from_folder(state, observe=observe) as client:
        client.publish("a", b"", wait=PATIENCE_S)
    assert "an observer failed" in caplog.text


def test_a_callback_may_wait_for_a_publication_and_stop_the_client(state: Path, broker: BrokerStub) -> None:
    client = Client.from_folder(state)
    done = threading.Event()

    @client.on("a")
    def handle(_: Message) -> None:
        client.publish("b", b"", wait=PATIENCE_S)
        client.stop()
        done.set()

    with client:
        broker.wait_for(PUBLISH)
        broker.deliver("a", b"")
        assert done.wait(PATIENCE_S)
        broker.wait_for(DISCONNECT)


def test_subscriptions_come_along(state: Path, broker: BrokerStub) -> None:
    with Client.from_folder(state, retry=impatient(), renewal=False) as client:
        got: list[str] = []
        client.subscribe("a/+", lambda message: got.append(message.topic), wait=PATIENCE_S)
        client.subscribe("b", lambda message: got.append(message.topic), qos=0, wait=PATIENCE_S)
        client.unsubscribe("b")
        broker.wait_for(UNSUBSCRIBE)
        broker.drop()
        assert broker.wait_for(SUBSCRIBE, lambda packet: packet.connection == 1).filters == ["a/+"]
        broker.deliver("b", b"")
        broker.deliver("a/1", b"")
        eventually(lambda: got == ["a/1"], "the message")


def test_a_denied_subscription_is_reported(state: Path, broker: BrokerStub) -> None:
    broker.suback = 0x80
    watching = Watching()
    with Client.from_folder(state, observe=watching, renewal=False) as client:
        with pytest.raises(RefusedError, match="policy denies it") as denied:
            client.subscribe("devices/other/#", lambda _: None, wait=PATIENCE_S)
        assert denied.value.check == "not-authorised"
        assert watching.wait_for(SubscriptionDenied).topic_filter == "devices/other/#"
        assert client.is_connected


def test_a_request_whose_reply_cannot_be_heard_leaves_no_subscription(
    operator: Credentials, broker: BrokerStub
) -> None:
    broker.suback = 0x80
    with Client.from_credentials(operator) as client:
        with pytest.raises(RefusedError, match="policy denies it"):
            client.request("valve-1", "open", timeout_s=PATIENCE_S)
        asked = broker.wait_for(SUBSCRIBE).filters
        assert broker.wait_for(UNSUBSCRIBE).body[4:].decode() == asked[0]


def test_a_retained_renewal_answers_nobody(state: Path, broker: BrokerStub) -> None:
    watching = Watching()
    answers = "devices/sensor-1/renewal/answer"
    with Client.from_folder(state, observe=watching):
        broker.wait_for(SUBSCRIBE, lambda packet: answers in packet.filters)
        broker.deliver(answers, b"retained", retain=True)
        broker.deliver(answers, b"junk")
        watching.wait_for(RenewalChanged)
    assert [event.state for event in watching.events if isinstance(event, RenewalChanged)] == ["failed"]


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, MAX_AHEAD_S + 1, float("nan")])
def test_a_request_waits_no_longer_than_a_device_remembers(operator: Credentials, timeout_s: float) -> None:
    with pytest.raises(LocalProtocolError, match="at most 86400"):
        Client.from_credentials(operator).request("valve-1", "open", timeout_s=timeout_s)


def test_events_tell_the_story(state: Path, broker: BrokerStub) -> None:
    watching = Watching()
    with Client.from_folder(state, observe=watching, retry=impatient()):
        first = watching.wait_for(Connected)
        assert (first.client_id, first.tls_version, first.tls_resumed) == ("sensor-1", "TLSv1.3", False)
        broker.connack = 5
        broker.drop()
        assert watching.wait_for(Disconnected).error.check == "closed"
        assert watching.wait_for(AttemptFailed).error.check == "not-authorised"
        broker.connack = 0
        again = watching.wait_for(Connected, 2)
        # The refusal in between forgot the TLS session: a new verdict needs a full handshake.
        assert not again.tls_resumed
        broker.drop()
        assert watching.wait_for(Connected, 3).tls_resumed
    assert broker.resumed[-1]


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x30\x06\0\x02\xff\xfeab",  # a topic that is no UTF-8
        b"\x30\x02\0\x09",  # a topic longer than its packet
        b"\x32\x03\0\x01a",  # QoS 1 without a packet id
        b"\x36\x05\0\x01a\0\x01",  # QoS 3
        b"\x40\0",  # a PUBACK without a packet id
        b"\x40\x01\0",
        b"\x90\0",  # a SUBACK of nothing
        b"\x90\x04\0\x01\x77\x77",  # of a QoS that is none
        b"\x20\0",  # a CONNACK of nothing
        b"\x20\x02\0\x05",  # a refusal after the acceptance
        b"\xf0\0",
        b"\0\0",
        b"\x30\xff\xff\xff\xff\xff",  # a length without end
    ],
)
def test_a_broker_that_does_not_keep_to_mqtt_is_left_and_tried_again(
    state: Path, broker: BrokerStub, garbage: bytes
) -> None:
    watching = Watching()
    with Client.from_folder(state, observe=watching, retry=impatient()) as client:
        client.subscribe("#", lambda _: None, wait=PATIENCE_S)
        broker.wait_for(PUBLISH)
        broker.send_raw(garbage)
        broker.drop()
        watching.wait_for(Disconnected)
        watching.wait_for(Connected, 2)
        client.publish("still/there", b"", wait=PATIENCE_S)


def test_any_bytes_from_a_broker_cost_one_connection_at_most(state: Path, broker: BrokerStub) -> None:
    chance = random.Random(17)
    watching = Watching()
    with Client.from_folder(state, observe=watching, retry=impatient()) as client:
        client.subscribe("#", lambda _: None, wait=PATIENCE_S)
        for count in range(1, 21):
            broker.send_raw(chance.randbytes(200))
            broker.drop()
            watching.wait_for(Connected, count + 1)
        client.publish("still/there", b"", wait=PATIENCE_S)


def test_stop_does_not_wait_for_a_connect_that_hangs(tmp_path: Path, pki: Pki) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        state = enrolled(tmp_path / "s", pki, port=listener.getsockname()[1])
        client = Client.from_folder(state, connect_timeout_s=600)
        client.start()
        connection, _ = listener.accept()
        connection.recv(1)  # the handshake has begun, and gets no answer
        client.stop()
        worker = client._worker._thread
        assert worker is not None
        assert worker.is_alive()
        connection.close()
        worker.join(PATIENCE_S)
        assert not worker.is_alive()


def test_a_service_has_no_presence_and_may_have_several_sessions(
    operator: Credentials, broker: BrokerStub
) -> None:
    with (
        Client.from_credentials(operator, client_suffix="one") as one,
        Client.from_credentials(operator, client_suffix="two"),
    ):
        one.publish("a", b"", wait=PATIENCE_S)
    broker.wait_for(DISCONNECT, count=2)
    connects = [packet.body for packet in broker.packets if packet.kind == CONNECT]
    assert [body[7] for body in connects] == [0x02, 0x02]  # a clean session, no will
    assert [body[12:] for body in connects] == [b"alice:one", b"alice:two"]
    assert len([packet for packet in broker.packets if packet.kind == PUBLISH]) == 1


def test_a_device_has_one_session(state: Path) -> None:
    with pytest.raises(IdentityError, match="a device has one session"):
        Client.from_folder(state, client_suffix="x")


def test_the_first_attempt_decides_unless_there_is_time(tmp_path: Path, pki: Pki) -> None:
    port = steady_port()
    state = enrolled(tmp_path / "state", pki, port=port)
    with pytest.raises(UnreachableError):
        Client.from_folder(state, retry=impatient()).connect()

    patient = Client.from_folder(state, retry=impatient())
    late = threading.Thread(target=patient.connect, args=(PATIENCE_S,))
    late.start()
    with BrokerStub(pki, port=port) as back:
        back.wait_for(CONNECT)
        late.join(PATIENCE_S)
        assert patient.is_connected
        patient.stop()


def test_a_refusal_is_not_waited_out(state: Path, broker: BrokerStub) -> None:
    broker.connack = 5
    with pytest.raises(RefusedError):
        Client.from_folder(state, retry=impatient()).connect(timeout_s=3600)


def test_stop_is_quick_while_waiting_and_may_be_repeated(tmp_path: Path, pki: Pki) -> None:
    watching = Watching()
    hour = Backoff(3600, 3600)
    client = Client.from_folder(
        enrolled(tmp_path / "s", pki, port=steady_port()), observe=watching, retry=RetryTimer(unreachable=hour)
    )
    waiting = client.publish("a", b"")
    client.start()
    watching.wait_for(AttemptFailed)
    client.stop()
    client.stop()
    with pytest.raises(UnreachableError, match="the client stopped first"):
        waiting.wait(0)
    with pytest.raises(LocalProtocolError, match="started before"):
        client.start()


def test_a_client_that_was_never_started_can_be_stopped(state: Path) -> None:
    client = Client.from_folder(state)
    acknowledgement = client.publish("a", b"")
    client.stop()
    with pytest.raises(UnreachableError):
        acknowledgement.wait(0)


def test_many_threads_publish_at_once(state: Path, broker: BrokerStub) -> None:
    each, threads = 50, 8
    with Client.from_folder(state, retry=impatient()) as client:

        def publish(number: int) -> None:
            for count in range(each):
                client.publish(f"t/{number}", str(count).encode(), wait=PATIENCE_S if count == each - 1 else None)

        workers = [threading.Thread(target=publish, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(PATIENCE_S)
    by_topic: dict[str, list[int]] = {}
    for packet in broker.packets:
        if packet.kind == PUBLISH and packet.topic.startswith("t/"):
            by_topic.setdefault(packet.topic, []).append(int(packet.payload))
    assert by_topic == {f"t/{number}": list(range(each)) for number in range(threads)}


def test_a_slow_callback_slows_the_broker_down_and_loses_nothing(state: Path, broker: BrokerStub) -> None:
    release = threading.Event()
    got: list[int] = []

    def handle(message: Message) -> None:
        release.wait(PATIENCE_S)
        got.append(int(message.payload))

    total = MAX_WAITING * 3
    with Client.from_folder(state) as client:
        client.subscribe("a", handle, wait=PATIENCE_S)
        for number in range(total):
            broker.deliver("a", str(number).encode())
        eventually(lambda: client._dispatcher.is_full, "the queue to fill")
        release.set()
        eventually(lambda: len(got) == total, "every message")
    assert got == list(range(total))


@pytest.mark.parametrize("topic", ["", "a/+", "#", "a\0b", "x" * 65_536, "\ud800"])
def test_what_is_no_topic(state: Path, topic: str) -> None:
    with pytest.raises(LocalProtocolError, match="could not publish"):
        Client.from_folder(state).publish(topic, b"")


@pytest.mark.parametrize("topic_filter", ["", "a+", "a/#/b", "#a", "a\0", "x" * 65_536, "\ud800"])
def test_what_is_no_filter(state: Path, topic_filter: str) -> None:
    with pytest.raises(LocalProtocolError, match="could not subscribe"):
        Client.from_folder(state).subscribe(topic_filter, lambda _: None)


def test_waiting_for_callbacks_waits_for_those_of_everything_that_has_come(
    state: Path, broker: BrokerStub
) -> None:
    began, go_on, seen = threading.Event(), threading.Event(), []

    def take(message: Message) -> None:
        began.set()
        assert go_on.wait(PATIENCE_S)
        seen.append(message.payload)

    with Client.from_folder(state) as client:
        client.subscribe("devices/sensor-1/x", take, wait=PATIENCE_S)
        broker.deliver("devices/sensor-1/x", b"1")
        assert began.wait(PATIENCE_S)
        with pytest.raises(UnreachableError, match=r"0\.01 s"):
            client.wait_for_callbacks(0.01)
        go_on.set()
        client.wait_for_callbacks(PATIENCE_S)
        assert seen == [b"1"]


def test_what_json_cannot_hold(state: Path) -> None:
    client = Client.from_folder(state)
    for payload in ({"a": object()}, {"a": float("nan")}, {"a": b""}):
        with pytest.raises(LocalProtocolError, match="JSON cannot hold"):
            client.publish("a", payload)
    with pytest.raises(LocalProtocolError, match="lone surrogate"):
        client.publish("a", "\ud800")
    for qos in (2, -1):
        with pytest.raises(LocalProtocolError, match="0 or 1"):
            client.publish("a", b"", qos=qos)
        with pytest.raises(LocalProtocolError, match="0 or 1"):
            client.subscribe("a", lambda _: None, qos=qos)


def test_no_key_in_any_repr(state: Path) -> None:
    client = Client.from_folder(state)
    with contextlib.suppress(ConnectionError):
        assert "PRIVATE" not in repr(client.credentials) + repr(client)
