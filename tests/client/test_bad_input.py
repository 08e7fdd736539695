"""What may be wrong on a device and around it: a state, a line, an exit code, and everything else goes on."""

from __future__ import annotations

import json
import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from support.device_command import DeviceCommand, run
from support.device_folder import enrolled
from support.waiting import eventually
from support.watching import Watching

from birthmark.device import requests
from birthmark.device.asking import _why
from birthmark.device.client import Client
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.errors import ConfigurationError, LocalProtocolError
from birthmark.device.events import Disconnected, HandlerFailed
from birthmark.device.publication import HEAD_BYTES
from birthmark.device.settings import MAX_PACKET_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.broker_process import BrokerProcess
    from support.pki import Pki

    from birthmark.device.received import Command


def status(state: Path) -> tuple[dict[str, Any], int]:
    done = run("status", "--state", state, "--json")
    assert done.stderr == ""
    return json.loads(done.stdout), done.returncode


# --- the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "doctor --timeout inf",
        "doctor --timeout nan",
        "doctor --timeout -1",
        "renew --timeout 1e30",
        "renew --renewal-port 99999",
        "run --renewal-port 0",
        "run --simulate --interval 0",
        "run --give-up-after nan",
    ],
)
def test_a_number_that_no_command_can_use(words: str, tmp_path: Path) -> None:
    done = run(*words.split(), "--state", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    *_, option, value = words.split()
    assert f"argument {option}: {value!r} is no" in done.stderr


def test_how_many_messages_is_a_number_from_1(tmp_path: Path) -> None:
    where = ("--identity", tmp_path, "--ca", tmp_path, "--broker", "localhost")
    done = run("watch", "#", "--count", "0", *where)
    assert done.returncode == 2
    assert "argument --count: '0' is no number from 1" in done.stderr


def test_a_renewal_port_that_is_none_is_refused_before_it_is_needed(tmp_path: Path, pki: Pki) -> None:
    state = enrolled(tmp_path / "s", pki)
    with pytest.raises(ConfigurationError, match="70000"):
        Client.from_folder(state, renewal_port=70_000)


# --- the slot ---------------------------------------------------------------------------------------------


def test_a_damaged_slot_is_waited_out_and_nothing_is_lost(
    tmp_path: Path, pki: Pki, gateway: BrokerProcess
) -> None:
    """Without `--wait` it is an exit code; with it, as a service has it, there is no loop of crashes."""
    state = enrolled(tmp_path / "s", pki, port=gateway.port)
    whole = (state / "active").read_bytes()
    damaged = whole[: len(whole) // 2]
    (state / "active").write_bytes(damaged)
    once = run("run", "--state", state, "--json")
    assert once.returncode == 1
    assert "the board must be enrolled again" in json.loads(once.stderr)["hint"]
    with DeviceCommand("run", "--state", state, "--json", "--wait") as device:
        said = device.wait_for("no_identity")
        assert said["reason"] == json.loads(once.stderr)["error"]
        found, code = status(state)
        assert (found["state"], code) == ("credentials", 1)
        assert said["reason"] in found["summary"]
        assert (state / "active").read_bytes() == damaged
        (state / "active").write_bytes(whole)
        device.wait_for("connected")
        assert [record["event"] for record in device.records].count("no_identity") == 1
        assert device.end(signal.SIGTERM) == 0


def test_waiting_ends_when_it_is_told_to(tmp_path: Path) -> None:
    with DeviceCommand("run", "--state", tmp_path, "--json", "--wait") as device:
        assert "no `active` slot" in device.wait_for("no_identity")["reason"]
        assert device.end(signal.SIGTERM) == 0


def test_settings_that_make_no_sense(tmp_path: Path, pki: Pki, gateway: BrokerProcess) -> None:
    state = enrolled(tmp_path / "s", pki, port=gateway.port, name="typo-1")
    (state / "device.toml").write_text('clok = "trust-broker"\n')
    with DeviceCommand("run", "--state", state, "--json", "--wait") as device:
        assert "clok is not known" in device.wait_for("no_identity")["reason"]
        found, code = status(state)
        assert (found["state"], found["id"], code) == ("settings", "typo-1", 1)
        (state / "device.toml").write_text('clock = "trust-broker"\n')
        device.wait_for("connected")
        assert device.end(signal.SIGTERM) == 0


def foreign_key(state: Path, pki: Pki) -> None:
    """The key of another device, in the certificates' file."""
    other = pki.device("sensor-2").pem.split(b"-----BEGIN CERTIFICATE")[0]
    mine = (state / "active").read_bytes()
    (state / "active").write_bytes(other + mine[mine.index(b"-----BEGIN CERTIFICATE") :])


def foreign_certificate(state: Path, pki: Pki) -> None:
    """The key and certificates of another device, before this one's bundle."""
    mine = (state / "active").read_bytes()
    (state / "active").write_bytes(pki.device("sensor-2").pem + mine[mine.index(b"-----BEGIN BIRTHMARK BUNDLE") :])


@pytest.mark.parametrize("change", [foreign_key, foreign_certificate])
def test_credentials_of_another_device(tmp_path: Path, pki: Pki, change: Any) -> None:
    state = enrolled(tmp_path / "s", pki)
    change(state, pki)
    found, code = status(state)
    assert (found["state"], code) == ("credentials", 1)
    assert "another certificate" in found["summary"] or "not those of its bundle" in found["summary"]
    done = run("run", "--state", state, "--json", "--once")
    assert done.returncode == 1
    assert json.loads(done.stderr)["error"] in found["summary"]


# --- the disk ---------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of a few pages; only root can have one."""
    folder.mkdir(mode=0o700)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k,mode=0700", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True, capture_output=True)


def fill(folder: Path) -> Path:
    """Leave not a byte."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
    return folder / "ballast"


def test_a_full_disk(tmp_path: Path, pki: Pki, gateway: BrokerProcess) -> None:
    with small_disk(tmp_path / "disk") as disk:
        state = enrolled(disk / "s", pki, port=gateway.port, name="full-1")
        ballast = fill(disk)
        with DeviceCommand("run", "--state", state, "--simulate", "--interval", "0.05", "--json") as device:
            device.wait_for("connected")
            device.wait_for("published", count=3)
            assert "No space left on device" in device.wait_for("warning")["text"]
            found, code = status(state)
            assert (found["state"], found["storage"], code) == ("storage", "full", 5)
            assert "make room" in found["summary"]
            ballast.unlink()
            device.process.send_signal(signal.SIGTERM)
            assert device.wait() == 0
        assert sorted(path.name for path in state.glob(".*")) == []
        assert Credentials.from_folder(state).device_id.text == "full-1"


def test_a_read_only_file_system(tmp_path: Path, pki: Pki, gateway: BrokerProcess) -> None:
    with small_disk(tmp_path / "disk") as disk:
        state = enrolled(disk / "s", pki, port=gateway.port, name="frozen-1")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with DeviceCommand("run", "--state", state, "--simulate", "--interval", "0.05", "--json") as device:
            device.wait_for("connected")
            device.wait_for("published", count=3)
            assert "Read-only file system" in device.wait_for("warning")["text"]
            assert device.wait_for("renewal")["state"] == "failed"  # it says so now, and not in a year
            found, code = status(state)
            assert (found["state"], found["storage"], code) == ("storage", "read-only", 5)
            assert device.end(signal.SIGTERM) == 0


# --- messages ---------------------------------------------------------------------------------------------


def test_a_command_that_is_not_json(tmp_path: Path, pki: Pki, gateway: BrokerProcess) -> None:
    state, watching = enrolled(tmp_path / "s", pki, port=gateway.port, name="odd-1"), Watching()
    anchors = tmp_path / "ca.pem"
    anchors.write_bytes(pki.root.pem)
    identity = pki.operator("alice").write(tmp_path / "alice.pem")
    operator = Client(Credentials.from_files(identity, anchors, BrokerAddress("localhost", gateway.port)))
    client = Client.from_folder(state, observe=watching)
    done: list[Any] = []

    @client.command("interval")
    def interval(command: Command) -> None:
        done.append(command.json())

    with client, operator:
        for payload in (b"{", b"\xff\x00", b"[" * 50_000, b'{"seconds": 5}'):
            operator.publish("devices/odd-1/commands/interval", payload, wait=20)
        eventually(lambda: done, "the one that is JSON")
        assert done == [{"seconds": 5}]
        assert [
            event.error.__class__.__name__ for event in watching.events if isinstance(event, HandlerFailed)
        ] == ["RemoteProtocolError"] * 3
        found, code = status(state)
        assert (found["state"], code) == ("ok", 0)
        assert found["last_trouble"] == (
            "the handler of devices/odd-1/commands/interval failed: could not read a message on"
            " devices/odd-1/commands/interval: not JSON"
        )
        assert not any(isinstance(event, Disconnected) for event in watching.events)


@pytest.mark.parametrize("settings", ["", "[outbox]\n"])
def test_a_payload_over_the_limit(tmp_path: Path, pki: Pki, gateway: BrokerProcess, settings: str) -> None:
    """At a gateway it ends the connection, and sent again it would end every other: it is refused before."""
    name = f"large-{len(settings)}"
    state, watching = enrolled(tmp_path / "s", pki, port=gateway.port, name=name), Watching()
    (state / "device.toml").write_text(settings)
    with Client.from_folder(state, observe=watching) as client:
        topic = client.telemetry("picture")
        most = MAX_PACKET_BYTES - HEAD_BYTES - len(topic)
        with pytest.raises(LocalProtocolError, match=f"{most + 1} bytes are too many") as refused:
            client.publish(topic, bytes(most + 1))
        assert "send it in parts" in refused.value.hint
        client.publish(topic, bytes(most), wait=20)
        assert not any(isinstance(event, Disconnected) for event in watching.events)


def test_a_reading_over_the_limit_is_said_in_the_status(tmp_path: Path, pki: Pki, gateway: BrokerProcess) -> None:
    state = enrolled(tmp_path / "s", pki, port=gateway.port, name="large-reading")
    client = Client.from_folder(state)

    @client.every(3600, telemetry="picture")
    def picture() -> str:
        return "x" * 2 * MAX_PACKET_BYTES

    with client:
        eventually(lambda: status(state)[0].get("last_trouble"), "a trouble")
        found, code = status(state)
        assert (found["state"], code) == ("ok", 0)
        assert "2097152 bytes are too many" in found["last_trouble"]


def test_an_expired_request_told_with_a_time_that_is_no_time() -> None:
    told = b'{"error":"too late","clock":1' + b"0" * 400 + b',"expires":1}'
    assert _why(requests.EXPIRED, told) == f"{requests.EXPIRED}: too late"
