"""`birthmark-device status`: one word, one sentence and one exit code for every state that a device can be in."""

from __future__ import annotations

import json
import os
import signal
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from support.device_command import DeviceCommand, needs_faketime, run
from support.device_folder import enrolled
from support.pki import Pki, now
from support.waiting import eventually
from support.watching import Watching

from birthmark.device import record
from birthmark.device.client import Client
from birthmark.device.clock import Clock
from birthmark.device.connection_checks import Check
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.errors import RefusedError, RemoteProtocolError, UnreachableError
from birthmark.device.events import (
    AttemptFailed,
    Connected,
    Disconnected,
    HandlerFailed,
    OutboxChanged,
    RenewalChanged,
)
from birthmark.device.outbox.outbox import OutboxState
from birthmark.device.record import RECORD_FILE, WRITES_AT_ONCE, Record, Recorder, read_record

if TYPE_CHECKING:
    from pathlib import Path

    from support.broker_stub import BrokerStub


def status(state: Path, **options: Any) -> tuple[dict[str, Any], int]:
    done = run("status", "--state", state, "--json", **options)
    assert done.stderr == ""
    return json.loads(done.stdout), done.returncode


def status_when(state: Path, word: str) -> tuple[dict[str, Any], int]:
    """Wait until the client has said so."""
    found: list[tuple[dict[str, Any], int]] = []

    def is_said() -> bool:
        found.append(status(state))
        return bool(found[-1][0]["state"] == word)

    eventually(is_said, f"{word}: {found[-1:]}")
    return found[-1]


def test_from_the_first_start_to_the_last(state: Path, broker: BrokerStub) -> None:
    before, code = status(state)
    assert (before["state"], before["client"], code) == ("not-running", "never ran", 4)
    assert (before["id"], before["storage"], before["clock_is_wrong"]) == ("sensor-1", "writable", False)
    with DeviceCommand("run", "--state", state, "--json") as device:
        device.wait_for("connected")
        said, code = status_when(state, "ok")
        assert code == 0
        assert said["summary"] == f"connected to 127.0.0.1:{broker.port}; nothing to be done"
        assert said["last_failure"] is None
        broker.connack = 5
        broker.drop()
        said, code = status_when(state, Check.NOT_AUTHORISED)
        assert code == 3
        assert "does not let us in (CONNACK 5): see in the gateway's log" in said["summary"]
        assert (said["client"], said["last_failure_check"]) == ("disconnected", "not-authorised")
        assert device.end(signal.SIGTERM) == 0
    said, code = status(state)
    assert (said["state"], said["client"], code) == ("not-running", "stopped", 4)
    assert said["last_connected_to"] == f"127.0.0.1:{broker.port}"
    assert said["last_failure_check"] == "not-authorised"
    assert (state / RECORD_FILE).stat().st_mode & 0o777 == 0o600


def test_unreachable_and_killed(tmp_path: Path, pki: Pki) -> None:
    state = enrolled(tmp_path / "s", pki, host="no-such-host.invalid")
    with DeviceCommand("run", "--state", state, "--json") as device:
        device.wait_for("unreachable")
        said, code = status_when(state, Check.HOST_NAME)
        assert code == 4
        assert "no-such-host.invalid is known: check the spelling" in said["summary"]
        device.process.kill()
        device.wait()
    said, code = status(state)
    assert (said["state"], said["client"], code) == ("not-running", "ended without a word", 4)


def test_for_a_person(state: Path) -> None:
    done = run("status", "--state", state)
    assert done.returncode == 4
    assert "state " in done.stdout
    assert "no client has run with this folder: start it" in done.stdout


def test_credentials_that_are_no_use_come_first(state: Path) -> None:
    (state / "active").write_bytes(b"-----BEGIN nonsense")
    said, code = status(state)
    assert (said["state"], code) == ("credentials", 1)
    assert "the board must be enrolled again" in said["summary"]
    assert said["storage"] == "writable"
    said, code = status(state / "nowhere")
    assert (said["state"], said["storage"], code) == ("credentials", "unknown", 1)


def test_a_certificate_that_has_ended(tmp_path: Path, pki: Pki) -> None:
    leaf = pki.issuing.issue(not_before=now() - timedelta(days=9), not_after=now() - timedelta(days=1))
    said, code = status(enrolled(tmp_path / "s", pki, leaf))
    assert (said["state"], said["valid"], said["days_left"], code) == ("certificate", "expired", -2, 1)
    assert "the certificate of sensor-1 is expired" in said["summary"]


@needs_faketime
def test_a_clock_that_is_wrong(state: Path) -> None:
    with DeviceCommand("run", "--state", state, "--json", at="1970-01-01 12:00:00") as device:
        device.wait_for("connected")
        status_when(state, "ok")
        said, code = status(state, at="1970-01-01 12:00:00")
        assert (said["state"], code, said["clock_is_wrong"], said["valid"]) == ("ok", 0, True, "now")
        assert said["clock"].startswith("1970-01-01")
        assert said["clock_was_before"] >= said["floor"][:10]
        assert device.end(signal.SIGTERM) == 0
    with DeviceCommand("run", "--state", state, "--json", at="2099-01-01 12:00:00") as device:
        device.wait_for("unreachable")
        said, code = status_when(state, Check.CLOCK)
        assert code == 4
        assert "by this clock it is 2099-01-01" in said["summary"]
        assert "the last time that is known for certain" in said["summary"]


def test_what_waits_in_the_outbox(state: Path, broker: BrokerStub) -> None:
    (state / "device.toml").write_text("[outbox]\n")
    broker.acknowledges = False
    with DeviceCommand("run", "--state", state, "--json", "--simulate", "--interval", "0.01") as device:
        device.wait_for("connected")
        device.wait_for("not_published")
        assert device.end(signal.SIGTERM) == 0
    said, _ = status(state)
    assert said["outbox_messages"] >= 1
    assert said["outbox_bytes"] > said["outbox_messages"] * 20
    assert (said["outbox_dropped"], said["outbox_failing"]) == (0, None)
    assert said["outbox_as_of"] >= said["client_since"][:10]


def test_an_outbox_that_fails_is_the_state(tmp_path: Path, pki: Pki) -> None:
    state = enrolled(tmp_path / "s", pki)
    found = [OutboxState(3, 300, 0)]
    recorder = Recorder(state, Clock(), outbox=lambda: found[0])
    recorder.started()
    recorder.take(met(Clock()))
    assert status(state)[0]["state"] == "ok"
    found[0] = OutboxState(3, 300, 1, "the disk is full")
    recorder.take(OutboxChanged("failing", "could not store: the disk is full"))
    said, code = status(state)
    assert (said["state"], code, said["outbox_failing"]) == ("outbox", 5, "the disk is full")
    assert said["last_trouble"] == "could not store: the disk is full"
    recorder.stopped()


def test_it_says_nothing_secret(state: Path, broker: BrokerStub) -> None:
    with Client.from_folder(state) as client:
        client.publish(client.telemetry("x"), b"1", wait=20)
    text = (state / RECORD_FILE).read_text() + run("status", "--state", state, "--json").stdout
    key = (state / "active").read_bytes().split(b"-----")[2].strip().decode()
    assert "PRIVATE" not in text
    assert not any(line in text for line in key.splitlines())


# --- the record -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\0" * 100, b'{"state": 1}', b'{"state":"connected","process":{"id":-1}}', b"x" * 100_000],
)
def test_a_damaged_record_says_nothing(state: Path, content: bytes) -> None:
    (state / RECORD_FILE).write_bytes(content)
    assert read_record(state) is None
    said, code = status(state)
    assert (said["client"], code) == ("never ran", 4)


class Times:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


BROKER = BrokerAddress("gw")
LOST = Disconnected(UnreachableError("lost", "h", Check.CLOSED), 1.0, 1.0)


def met(clock: Clock) -> Connected:
    return Connected(BROKER, "sensor-1", "TLSv1.3", False, False, clock.moment())  # noqa: FBT003


def test_what_is_recorded(tmp_path: Path) -> None:
    clock = Clock()
    recorder = Recorder(tmp_path, clock)
    recorder.started()
    found = read_record(tmp_path)
    assert found is not None
    assert (found.state, found.process[0], found.is_running) == ("connecting", os.getpid(), True)
    recorder.take(met(clock))
    recorder.take(RenewalChanged("renewed", "until 2030"))
    recorder.take(LOST)
    refused = RefusedError("no", "why", Check.REVOKED)
    recorder.take(AttemptFailed(refused, 5.0))
    found = read_record(tmp_path)
    assert found is not None
    assert found.failure is not None
    assert (found.failure.check, found.failure.refused, found.renewal) == ("revoked", True, "renewed: until 2030")
    assert Record.from_bytes(found.to_bytes()) == found
    recorder.stopped()
    found = read_record(tmp_path)
    assert found is not None
    assert (found.state, found.is_running) == ("stopped", False)
    with pytest.raises(RemoteProtocolError):
        Record.from_bytes(b"{}")


def test_a_network_that_comes_and_goes_does_not_wear_out_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[Path] = []
    monkeypatch.setattr(record, "write_durably", lambda path, _content: writes.append(path))
    times, clock = Times(), Clock()
    recorder = Recorder(tmp_path, clock, elapsed_s=times)
    for _ in range(600):  # an hour of it
        times.s += 6
        recorder.take(met(clock))
        recorder.take(LOST)
        recorder.take(AttemptFailed(LOST.error, 1.0))  # the same again is no news
    # The minute's timer has not run here: what comes later is written by it, and at the end.
    assert len(writes) == WRITES_AT_ONCE
    recorder.stopped()
    recorder.stopped()
    assert len(writes) == WRITES_AT_ONCE + 1


def test_the_same_trouble_again_is_no_news(tmp_path: Path) -> None:
    """A reading that fails every second would have the card written to every minute."""
    times = [now()]
    recorder = Recorder(tmp_path, Clock(system=lambda: times[0]))
    recorder.take(HandlerFailed("reading", ValueError("a")))
    before = read_record(tmp_path)
    times[0] += timedelta(hours=1)
    recorder.take(HandlerFailed("reading", ValueError("b")))
    assert read_record(tmp_path) == before
    recorder.take(HandlerFailed("another", ValueError("b")))
    found = read_record(tmp_path)
    assert found is not None
    assert (found.trouble_at, "another" in found.trouble) == (times[0].timestamp(), True)


def test_the_same_failure_again_is_no_news(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, Clock())
    failed = AttemptFailed(UnreachableError("nobody", "h", Check.NETWORK), 1.0)
    recorder.take(failed)
    before = (tmp_path / RECORD_FILE).stat().st_ino
    for _ in range(10):
        recorder.take(failed)
    assert (tmp_path / RECORD_FILE).stat().st_ino == before
    recorder.take(AttemptFailed(UnreachableError("no name", "h", Check.HOST_NAME), 1.0))
    found = read_record(tmp_path)
    assert found is not None
    assert found.failure is not None
    assert found.failure.check == "host-name"


def test_a_client_for_a_while_leaves_no_record(state: Path, broker: BrokerStub) -> None:
    """Nor does one without presence: it is a command's, and not the device's."""
    watching = Watching()
    with Client(Credentials.from_folder(state), presence=False, observe=watching):
        watching.wait_for(Connected)
    assert not (state / RECORD_FILE).exists()
