"""Client and broker, each as it is run: real processes, real TLS, and Debian's own MQTT client beside ours."""

from __future__ import annotations

import json
import queue
import shlex
import signal
import subprocess
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from support.broker_process import BrokerProcess
from support.device_command import DeviceCommand, run
from support.device_folder import enrolled
from support.patience import PATIENCE_S
from support.pki import SERVER, Pki, now
from support.programs import needs
from support.waiting import eventually
from support.watching import Watching, impatient

from birthmark.device.backoff import Backoff, RetryTimer
from birthmark.device.client import Client
from birthmark.device.commands import CommandFailedError
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.errors import BirthmarkError, LocalProtocolError, RefusedError, UnreachableError
from birthmark.device.events import AttemptFailed, Connected, Disconnected
from birthmark.device.presence import Presence

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from birthmark.device.received import Command, Message


@pytest.fixture
def own_broker(tmp_path: Path, pki: Pki) -> Iterator[BrokerProcess]:
    """One that a test may restart, and revoke at."""
    with BrokerProcess(tmp_path / "broker", pki) as process:
        yield process


def operator(tmp_path: Path, pki: Pki, gateway: BrokerProcess, name: str = "alice") -> Credentials:
    anchors = tmp_path / "ca.pem"
    anchors.write_bytes(pki.root.pem)
    identity = pki.operator(name).write(tmp_path / f"{name}.pem")
    return Credentials.from_files(identity, anchors, BrokerAddress("localhost", gateway.port))


class Presences:
    """What an operator sees on a device's status topic."""

    def __init__(self, client: Client, device_id: str) -> None:
        self.seen: list[Presence] = []
        client.subscribe(f"devices/{device_id}/status", self._take, wait=PATIENCE_S)

    def _take(self, message: Message) -> None:
        if message.payload:
            self.seen.append(Presence.from_bytes(message.payload))

    def wait_for(self, reason: str, *, online: bool) -> None:
        eventually(
            lambda: any((one.online, one.reason) == (online, reason) for one in self.seen),
            f"online={online} {reason!r}",
        )


def test_a_command_goes_round(tmp_path: Path, pki: Pki, gateway: BrokerProcess) -> None:
    state = enrolled(tmp_path / "state", pki, port=gateway.port, name="round-1")
    device = Client.from_folder(state)
    heard: list[Command] = []

    @device.command("measure")
    def measure(command: Command) -> dict[str, object]:
        heard.append(command)
        return {"celsius": 21.5, "of": command.json()["of"]}

    with Client.from_credentials(operator(tmp_path, pki, gateway)) as alice:
        presences = Presences(alice, "round-1")
        with device:
            presences.wait_for("", online=True)
            replies: list[Message] = []
            readings: list[Message] = []
            alice.subscribe("devices/+/replies/#", replies.append, wait=PATIENCE_S)
            alice.subscribe("devices/round-1/telemetry/#", readings.append, wait=PATIENCE_S)
            device.publish(device.telemetry("humidity"), {"percent": 40}, wait=PATIENCE_S)
            alice.publish("devices/round-1/commands/measure", {"of": "air"}, wait=PATIENCE_S)
            eventually(lambda: replies and readings, "the reply and the reading")
            assert replies[0].json() == {"celsius": 21.5, "of": "air"}
            assert (readings[0].topic, readings[0].json()) == (
                "devices/round-1/telemetry/humidity",
                {"percent": 40},
            )
        presences.wait_for("goodbye", online=False)
    assert [command.name for command in heard] == ["measure"]


def test_a_request_and_its_reply(tmp_path: Path, pki: Pki, gateway: BrokerProcess) -> None:
    state = enrolled(tmp_path / "state", pki, port=gateway.port, name="valve-1")
    device = Client.from_folder(state)

    @device.command("open")
    def open_valve(command: Command) -> dict[str, int]:
        percent = command.json()["percent"]
        if percent > 100:
            raise CommandFailedError("percent is at most 100")
        return {"percent": percent}

    with Client.from_credentials(operator(tmp_path, pki, gateway)) as alice:
        with device:
            assert alice.request("valve-1", "open", {"percent": 40}, timeout_s=PATIENCE_S).json() == {
                "percent": 40
            }
            with pytest.raises(CommandFailedError, match="failed: percent is at most 100"):
                alice.request("valve-1", "open", {"percent": 400}, timeout_s=PATIENCE_S)
            with pytest.raises(CommandFailedError, match="'dance': unknown: no such command"):
                alice.request("valve-1", "dance", timeout_s=PATIENCE_S)
            answered = queue.SimpleQueue[BaseException]()

            def in_a_callback(_: Message) -> None:
                try:
                    alice.request("valve-1", "open", timeout_s=PATIENCE_S)
                except BirthmarkError as error:
                    answered.put(error)

            alice.subscribe("devices/valve-1/telemetry/#", in_a_callback, wait=PATIENCE_S)
            device.publish(device.telemetry("a"), b"", wait=PATIENCE_S)
            assert isinstance(answered.get(timeout=PATIENCE_S), LocalProtocolError)
            with pytest.raises(RefusedError, match="policy denies"):  # a device may not listen to another one
                device.request("valve-2", "open", timeout_s=PATIENCE_S)
        # It waits at the broker while the device is away; back in time for nobody, the device does not begin.
        with pytest.raises(UnreachableError, match="none came within"):
            alice.request("valve-1", "open", {"percent": 1}, timeout_s=2)
        replies: list[Message] = []
        alice.subscribe("devices/valve-1/replies/#", replies.append, wait=PATIENCE_S)
        again = Client.from_folder(state)
        again.command("open")(lambda _: b"done after all")
        with again:
            eventually(lambda: replies, "the word that it was not begun")
        assert replies[0].topic.endswith("/expired")
    with pytest.raises(LocalProtocolError, match="more than 0"):
        alice.request("valve-1", "open", timeout_s=0)


def test_what_the_policy_denies(tmp_path: Path, pki: Pki, gateway: BrokerProcess) -> None:
    state = enrolled(tmp_path / "state", pki, port=gateway.port, name="nosy-1")
    with Client.from_folder(state) as device:
        for topic_filter in ("devices/+/telemetry/#", "#", "devices/other/commands/#", "$SYS/#"):
            with pytest.raises(RefusedError, match="policy denies it"):
                device.subscribe(topic_filter, lambda _: None, wait=PATIENCE_S)
        device.subscribe("devices/nosy-1/commands/#", lambda _: None, wait=PATIENCE_S)


def test_goodbye_and_last_will(tmp_path: Path, pki: Pki, gateway: BrokerProcess) -> None:
    state = enrolled(tmp_path / "state", pki, port=gateway.port, name="mortal-1")
    with Client.from_credentials(operator(tmp_path, pki, gateway)) as alice:
        presences = Presences(alice, "mortal-1")
        with DeviceCommand("run", "--state", state, "--json") as device:
            presences.wait_for("", online=True)
            assert device.end(signal.SIGTERM) == 0
        presences.wait_for("goodbye", online=False)
        assert not [one for one in presences.seen if one.reason == "lost"]
        with DeviceCommand("run", "--state", state, "--json") as device:
            device.wait_for("connected")
            device.end(signal.SIGKILL)
        presences.wait_for("lost", online=False)


def test_the_last_word_is_retained(tmp_path: Path, pki: Pki, gateway: BrokerProcess) -> None:
    state = enrolled(tmp_path / "state", pki, port=gateway.port, name="gone-1")
    with Client.from_folder(state):
        pass
    with Client.from_credentials(operator(tmp_path, pki, gateway)) as alice:
        Presences(alice, "gone-1").wait_for("goodbye", online=False)


def test_the_next_connection_resumes_its_tls_session(tmp_path: Path, pki: Pki, gateway: BrokerProcess) -> None:
    state = enrolled(tmp_path / "state", pki, port=gateway.port, name="resumed-1")
    first, second = Watching(), Watching()
    with Client.from_folder(state, observe=first, retry=impatient()):
        first.wait_for(Connected)
        # The same identity connects elsewhere, and takes the session over; then the first one takes it back.
        with Client.from_folder(state, observe=second, retry=RetryTimer(unreachable=Backoff(600, 600))):
            assert not second.wait_for(Connected).tls_resumed
            assert first.wait_for(Disconnected).error.check == "closed"
            again = first.wait_for(Connected, 2)
            assert again.tls_resumed
            second.wait_for(Disconnected)


def test_it_comes_back_after_a_restart_of_the_broker(tmp_path: Path, pki: Pki, own_broker: BrokerProcess) -> None:
    state = enrolled(tmp_path / "state", pki, port=own_broker.port, name="loyal-1")
    watching = Watching()
    heard: list[bytes] = []
    device = Client.from_folder(state, observe=watching, retry=impatient())

    @device.command()
    def anything(command: Command) -> None:
        heard.append(command.payload)

    with device:
        own_broker.stop()
        watching.wait_for(Disconnected)
        meanwhile = device.publish(device.telemetry("count"), b"1")
        own_broker.start()
        watching.wait_for(Connected, 2)
        meanwhile.wait(PATIENCE_S)
        with Client.from_credentials(operator(tmp_path, pki, own_broker)) as alice:
            alice.publish("devices/loyal-1/commands/x", b"still there?", wait=PATIENCE_S)
            eventually(lambda: heard == [b"still there?"], "the command")


def test_revoked_while_connected_and_ever_after(tmp_path: Path, pki: Pki, own_broker: BrokerProcess) -> None:
    leaf = pki.device("rogue-1")
    state = enrolled(tmp_path / "state", pki, leaf, port=own_broker.port, name="rogue-1")
    watching = Watching()
    with Client.from_credentials(operator(tmp_path, pki, own_broker)) as alice:
        presences = Presences(alice, "rogue-1")
        with Client.from_folder(state, observe=watching, retry=impatient()) as device:
            presences.wait_for("", online=True)
            own_broker.revoke(leaf.cert_serial)
            watching.wait_for(Disconnected)
            error = watching.wait_for(AttemptFailed).error
            assert isinstance(error, RefusedError)
            assert not device.is_connected
        assert not [one for one in presences.seen if one.reason in ("lost", "goodbye")]
    done = run("run", "--state", state, "--once")
    assert done.returncode == 3
    assert "as rogue-1: the broker " in done.stderr


@pytest.mark.parametrize("kind", ["of another CA", "expired", "not a client's", "without a role"])
def test_who_is_not_let_in(tmp_path: Path, pki: Pki, gateway: BrokerProcess, kind: str) -> None:
    leaf = {
        "of another CA": lambda: pki.stranger.device("odd-1"),
        "expired": lambda: pki.issuing.issue(cns=["odd-1"], not_after=now() - timedelta(hours=1)),
        "not a client's": lambda: pki.issuing.issue(cns=["odd-1"], usages=[SERVER]),
        "without a role": lambda: pki.issuing.issue(cns=["odd-1"], ous=[]),
    }[kind]()
    state = enrolled(tmp_path / "state", pki, leaf, port=gateway.port, name="odd-1")
    with pytest.raises(RefusedError) as refused:
        Client.from_folder(state).connect()
    assert refused.value.hint


def test_a_session_that_is_kept_gets_what_it_missed(tmp_path: Path, pki: Pki, gateway: BrokerProcess) -> None:
    state = enrolled(tmp_path / "state", pki, port=gateway.port, name="sleepy-1")
    with Client.from_folder(state) as device:
        device.subscribe("devices/sleepy-1/commands/#", lambda _: None, wait=PATIENCE_S)
    with Client.from_credentials(operator(tmp_path, pki, gateway)) as alice:
        for number in range(3):
            alice.publish(f"devices/sleepy-1/commands/{number}", b"", wait=PATIENCE_S)
    heard: list[str] = []
    watching = Watching()
    awake = Client.from_folder(state, observe=watching)

    @awake.command()
    def anything(command: Command) -> None:
        heard.append(command.name)

    with awake:
        assert watching.wait_for(Connected).session_present
        eventually(lambda: heard == ["0", "1", "2"], "the commands it missed")


def test_watch_and_send_from_the_command_line(tmp_path: Path, pki: Pki, gateway: BrokerProcess) -> None:
    state = enrolled(tmp_path / "state", pki, port=gateway.port, name="remote-1")
    operator(tmp_path, pki, gateway, "bob")
    identity = [
        *("--identity", str(tmp_path / "bob.pem"), "--ca", str(tmp_path / "ca.pem")),
        *("--broker", f"127.0.0.1:{gateway.port}"),
    ]
    with (
        DeviceCommand("run", "--state", state, "--json") as device,
        DeviceCommand("watch", "devices/remote-1/#", "--json", *identity) as watch,
    ):
        device.wait_for("connected")
        watch.wait_for("message", lambda record: record["topic"].endswith("/status"))
        sent = run("send", "remote-1", "wink", "twice", "--wait", "20", "--json", *identity)
        assert (sent.returncode, sent.stderr) == (0, "")
        assert json.loads(json.loads(sent.stdout)["reply"].replace("\\\\", "\\"))["command"] == "wink"
        assert device.wait_for("command")["payload"] == "twice"
        watch.wait_for("message", lambda record: record["topic"].startswith("devices/remote-1/replies/wink/?id="))
        assert device.end(signal.SIGTERM) == 0
        assert watch.end(signal.SIGINT) == 130


@needs("mosquitto_pub", "mosquitto-clients")
def test_debian_s_clients_with_the_exported_files(tmp_path: Path, pki: Pki, gateway: BrokerProcess) -> None:
    state = enrolled(tmp_path / "state", pki, port=gateway.port, name="stock-1")
    out = tmp_path / "pem"
    exported = json.loads(run("export", "--state", state, "--out", out, "--json").stdout)
    words = shlex.split(exported["try"])
    readings: list[Message] = []
    with Client.from_credentials(operator(tmp_path, pki, gateway)) as alice:
        alice.subscribe("devices/+/telemetry/#", readings.append, wait=PATIENCE_S)
        published = mosquitto(words)
        assert (published.returncode, published.stderr) == (0, "")
        eventually(lambda: readings, "what mosquitto_pub said")
        assert (readings[0].topic, readings[0].payload) == ("devices/stock-1/telemetry/try", b"hello")

        foreign = words[:]
        foreign[foreign.index("-t") + 1] = "devices/other/telemetry/try"
        mosquitto(foreign)
        mosquitto(words)
        eventually(lambda: len(readings) >= 2, "what mosquitto_pub said again")
        assert {reading.topic for reading in readings} == {"devices/stock-1/telemetry/try"}

        subscribed = ["mosquitto_sub", *words[1 : words.index("-t")]]
        denied = mosquitto([*subscribed, "-t", "devices/other/#", "-W", "60"])
        assert "denied" in denied.stdout + denied.stderr or "rejected" in denied.stdout + denied.stderr

    other_name = words[:]
    other_name[other_name.index("-i") + 1] = "somebody-else"
    assert mosquitto(other_name).returncode != 0


def mosquitto(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
