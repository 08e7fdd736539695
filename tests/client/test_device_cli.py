"""`birthmark-device`: output, exit codes, and the files left behind."""

from __future__ import annotations

import json
import os
import signal
import ssl
from typing import TYPE_CHECKING

import pytest
from support.broker_stub import CONNECT, DISCONNECT, PUBLISH, BrokerStub
from support.device_command import DeviceCommand, run
from support.device_folder import enrolled

from birthmark.device.presence import Presence

if TYPE_CHECKING:
    from pathlib import Path

    from support.pki import Issued, Pki


@pytest.fixture
def leaf(pki: Pki) -> Issued:
    return pki.device("sensor-1")


@pytest.fixture
def state(tmp_path: Path, pki: Pki, broker: BrokerStub, leaf: Issued) -> Path:
    return enrolled(tmp_path / "state", pki, leaf, port=broker.port)


@pytest.fixture
def operator(tmp_path: Path, pki: Pki, broker: BrokerStub) -> list[str]:
    anchors = tmp_path / "ca.pem"
    anchors.write_bytes(pki.root.pem)
    identity = pki.operator("alice").write(tmp_path / "alice.pem")
    return ["--identity", str(identity), "--ca", str(anchors), "--broker", f"127.0.0.1:{broker.port}"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_run_stops_with_a_goodbye(state: Path, broker: BrokerStub, number: int, code: int) -> None:
    with DeviceCommand("run", "--state", state, "--json") as device:
        connected = device.wait_for("connected")
        assert (connected["client_id"], connected["tls"], connected["resumed"]) == ("sensor-1", "TLSv1.3", False)
        assert device.end(number) == code
        assert device.records[-1]["event"] == "stopped"
        assert device.errors() == ""
    broker.wait_for(DISCONNECT)
    farewell = [packet for packet in broker.packets if packet.kind == PUBLISH][-1]
    assert Presence.from_bytes(farewell.payload).reason == "goodbye"


def test_run_simulates_and_answers(state: Path, broker: BrokerStub) -> None:
    with DeviceCommand("run", "--state", state, "--json", "--simulate", "--interval", "0.02") as device:
        topic = "devices/sensor-1/telemetry/environment"
        assert device.wait_for("published", count=3)["topic"] == topic
        broker.deliver("devices/sensor-1/commands/reboot", b"now\x1b[2J", qos=1)
        command = device.wait_for("command")
        assert (command["name"], command["payload"]) == ("reboot", "now\\x1b[2J")
        reply = broker.wait_for(PUBLISH, lambda packet: packet.topic == "devices/sensor-1/replies/reboot")
        assert json.loads(reply.payload)["command"] == "reboot"
        assert device.end(signal.SIGTERM) == 0
    readings = [json.loads(p.payload) for p in broker.packets if p.kind == PUBLISH and p.topic == topic]
    assert [reading["count"] for reading in readings[:3]] == [1, 2, 3]
    assert all(reading["simulated"] for reading in readings)


def test_run_for_a_person(state: Path, broker: BrokerStub) -> None:
    broker.connack = 5
    done = run("run", "--state", state, "--once")
    assert done.returncode == 3
    assert "could not connect to 127.0.0.1:" in done.stdout
    assert "next attempt in" not in done.stdout, "with --once there is none"
    assert done.stderr.startswith(f"error: could not connect to 127.0.0.1:{broker.port} as sensor-1: ")
    assert "\nhint: " in done.stderr


def test_run_tries_for_ever_and_says_why_it_failed(state: Path, broker: BrokerStub) -> None:
    broker.connack = 3
    with DeviceCommand("run", "--state", state, "--json") as device:
        failed = device.wait_for("unreachable")
        assert failed["check"] == "broker-unavailable"
        assert failed["hint"]
        assert 0.1 <= failed["retry_in_s"] <= 1
        broker.connack = 0
        device.wait_for("connected")
        broker.drop()
        assert device.wait_for("disconnected")["check"] == "closed"
        assert device.wait_for("connected", count=2)["resumed"] is True
        assert device.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(("connack", "code"), [(5, 3), (3, 4)])
def test_run_once(state: Path, broker: BrokerStub, connack: int, code: int) -> None:
    broker.connack = connack
    done = run("run", "--state", state, "--once", "--json")
    assert done.returncode == code
    assert json.loads(done.stderr)["exit_code"] == code
    assert json.loads(done.stdout.splitlines()[0])["retry_in_s"] is None
    assert len(broker.resumed) == 1


def test_run_gives_up(state: Path, broker: BrokerStub) -> None:
    broker.connack = 3
    error = ""
    for seconds in ("0.3", "3", "30"):  # a busy machine may give up before its first attempt has ended
        if "not ready" not in error:
            done = run("run", "--state", state, "--json", "--give-up-after", seconds)
            assert done.returncode == 4
            error = json.loads(done.stderr)["error"]
    assert "not ready" in error


def test_run_at_another_broker(state: Path, pki: Pki) -> None:
    with (
        BrokerStub(pki) as other,
        DeviceCommand("run", "--state", state, "--json", "--broker", f"localhost:{other.port}") as device,
    ):
        assert device.wait_for("connected")["broker"] == f"localhost:{other.port}"
        assert device.end(signal.SIGTERM) == 0


def test_no_credentials(tmp_path: Path) -> None:
    for command in ("run", "show"):
        done = run(command, "--state", tmp_path / "none")
        assert (done.returncode, done.stdout) == (1, "")
        assert "there is no `active` slot" in done.stderr


def test_show(state: Path, leaf: Issued) -> None:
    done = run("show", "--state", state, "--json")
    shown = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert (shown["id"], shown["role"], shown["slot"]) == ("sensor-1", "device", "active")
    assert shown["cert_serial"] == f"{leaf.cert_serial:x}"
    assert shown["valid"] == "now"
    assert 727 <= shown["days_left"] <= 729
    assert "sensor-1" in run("show", "--state", state).stdout


def test_export(state: Path, tmp_path: Path, pki: Pki, leaf: Issued) -> None:
    out = tmp_path / "out"
    done = run("export", "--state", state, "--out", out, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()} == {
        "ca.pem": 0o644,
        "cert.pem": 0o644,
        "key.pem": 0o600,
    }
    assert out.stat().st_mode & 0o777 == 0o700
    assert (out / "ca.pem").read_bytes() == pki.root.pem
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(out / "cert.pem", out / "key.pem")
    assert json.loads(done.stdout)["try"].startswith("mosquitto_pub -h 127.0.0.1 ")
    assert "PRIVATE" not in done.stdout

    again = run("export", "--state", state, "--out", out)
    assert again.returncode == 1
    assert "not an empty folder" in again.stderr


def test_watch(operator: list[str], broker: BrokerStub) -> None:
    with DeviceCommand("watch", "devices/#", "--json", "--count", "2", *operator) as watch:
        broker.wait_for(8)
        broker.deliver("devices/a/status", b"\x1b]0;evil\x07", retain=True)
        broker.deliver("devices/b/status", b"two")
        broker.deliver("devices/c/status", b"three")
        assert watch.wait() == 0
        assert watch.errors() == ""
    assert [(r["topic"], r["payload"], r["retained"]) for r in watch.records] == [
        ("devices/a/status", "\\x1b]0;evil\\x07", True),
        ("devices/b/status", "two", False),
    ]
    assert broker.wait_for(CONNECT).body[12:].startswith(b"alice:watch-")


def test_watch_what_is_denied(operator: list[str], broker: BrokerStub) -> None:
    broker.suback = 0x80
    done = run("watch", "#", *operator)
    assert (done.returncode, done.stdout) == (3, "")
    assert "could not subscribe to # as alice:watch-" in done.stderr


def test_send(operator: list[str], broker: BrokerStub) -> None:
    done = run("send", "sensor-1", "reboot", '{"in":1}', "--json", *operator)
    assert (done.returncode, done.stderr) == (0, "")
    sent = broker.wait_for(PUBLISH)
    assert (sent.topic, sent.payload, sent.retain) == ("devices/sensor-1/commands/reboot", b'{"in":1}', False)
    assert json.loads(done.stdout) == {"id": "sensor-1", "command": "reboot", "sent": True}


def test_send_bytes_that_are_no_text(operator: list[str], broker: BrokerStub) -> None:
    done = run("send", "sensor-1", "reboot", os.fsdecode(b"\xff\x01"), *operator)
    assert (done.returncode, done.stderr) == (0, "")
    assert broker.wait_for(PUBLISH).payload == b"\xff\x01"


def test_send_and_no_reply(operator: list[str]) -> None:
    done = run("send", "sensor-1", "reboot", "--wait", "2", *operator)
    assert (done.returncode, done.stdout) == (4, "")
    assert "could not get a reply from sensor-1: none came within 2 s" in done.stderr


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["send", "a/b", "reboot"], "outside the grammar"),
        (["send", "sensor-1", "re+boot"], "it is a filter"),
        (["watch", "a/#/b"], "no MQTT filter"),
    ],
)
def test_what_makes_no_sense_is_refused_before_connecting(
    operator: list[str], broker: BrokerStub, words: list[str], cause: str
) -> None:
    done = run(*words, *operator)
    assert done.returncode == 1
    assert cause in done.stderr
    assert broker.resumed == []


@pytest.mark.parametrize(
    "words", [[], ["fly"], ["run"], ["run", "--state", "x", "--interval", "0"], ["watch", "#"]]
)
def test_usage(words: list[str]) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: birthmark-device")
