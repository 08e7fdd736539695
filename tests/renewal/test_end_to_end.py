"""Station, gateway, renewal service and device, each as it is run: a certificate is renewed, and used."""

from __future__ import annotations

import json
import signal
import stat
import time
from typing import TYPE_CHECKING

from cryptography import x509
from support.device_command import DeviceCommand, needs_faketime, run
from support.ports import steady_port
from support.renewing_client import Renewing, client, client_started, device_command
from support.waiting import eventually

from birthmark.device.client import Client
from birthmark.device.clock import FLOOR_FILE
from birthmark.device.credentials import Credentials
from birthmark.device.events import AttemptFailed, Connected, Disconnected, RenewalChanged
from birthmark.provisioning import audit
from birthmark.provisioning.registry.model import State
from birthmark.provisioning.revocation import revoke

if TYPE_CHECKING:
    from support.renewal_stand import Renewd, Stand


def test_a_running_client_renews_and_goes_on_with_the_new_certificate(stand: Stand) -> None:
    state, watching = stand.device(), Renewing()
    before = Credentials.from_folder(state)
    with stand.renewd() as renewd, client(state, watching) as device:
        device.publish(device.telemetry("before"), b"1", wait=20)
        device.renew()
        watching.wait_for_state("renewed")
        device.publish(device.telemetry("after"), b"2", wait=20)
        assert watching.states == ["asked", "granted", "trying", "confirming", "renewed"]
        assert not any(isinstance(event, Disconnected) for event in watching.events)
        assert device.credentials.leaf_der != before.leaf_der
        assert device.credentials == Credentials.from_folder(state)
        renewd.wait_for("confirmed")
        assert renewd.kill(signal.SIGTERM) == 0
        assert renewd.lines[-1]["event"] == "stopped"
    told = [
        one
        for one in audit.read(stand.station.registry.audit_path)
        if one["action"].startswith("renew") and one["subject"] == str(device.device_id)
    ]
    assert [one["action"] for one in told] == ["renew", "renewed"]
    assert {one["details"]["by"] for one in told} == {str(device.device_id)}
    assert {one["details"]["via"] for one in told} == {f"{before.broker.host}:{before.broker.port}"}
    after = Credentials.from_folder(state)
    assert after.pem_path.name == "renewed"
    assert stat.S_IMODE(after.pem_path.stat().st_mode) == 0o600
    assert sorted(path.name for path in state.iterdir()) == [
        "active",
        "clock",
        "renewal.lock",
        "renewed",
        "status",
    ]
    assert (state / "active").read_bytes() != after.pem_path.read_bytes()
    assert stand.live().certificate_der == after.leaf_der
    old, new = stand.rows()
    assert (old.state, new.state, old.is_revoked) == (State.ATTESTED, State.ATTESTED, False)
    with client(state, watching := Renewing()) as device:
        assert device.credentials.leaf_der == after.leaf_der
        assert watching.wait_for(Connected).client_id == "sensor-17"


def test_what_is_due_is_renewed_without_being_asked(stand: Stand, renewd: Renewd) -> None:
    state, watching = stand.early_device("due"), Renewing()
    with client(state, watching):
        watching.wait_for_state("renewed")
    assert Credentials.from_folder(state).pem_path.name == "renewed"


@needs_faketime
def test_a_clock_in_1970_keeps_nobody_from_renewing(stand: Stand, renewd: Renewd) -> None:
    """Nor from finding out that it is time to: the floor says so, once a connection has brought it up to date."""
    state = stand.device("clockless")
    done = run("renew", "--state", state, "--json", at="1970-01-01 12:00:00")
    assert (done.returncode, done.stderr) == (0, "")
    assert Credentials.from_folder(state).pem_path.name == "renewed"
    due = stand.early_device("clockless-due")
    (due / FLOOR_FILE).write_text(json.dumps({"floor": int(time.time()) - 60}))
    with DeviceCommand("run", "--state", due, "--json", at="1970-01-01 12:00:00") as device:
        device.wait_for("renewal", lambda record: record["state"] == "renewed")
        assert device.end(signal.SIGTERM) == 0


def test_what_is_not_due_is_left_alone(stand: Stand, renewd: Renewd) -> None:
    state, watching = stand.device("young"), Renewing()
    with client(state, watching) as device:
        device.publish(device.telemetry("x"), b"1", wait=20)
    assert watching.states == []
    assert len(stand.rows("young")) == 1


def test_renewed_twice_it_has_one_slot_and_three_rows(stand: Stand, renewd: Renewd) -> None:
    state, watching = stand.device("twice"), Renewing()
    with client(state, watching) as device:
        for count in (1, 2):
            device.renew()
            watching.wait_for_state("renewed", count)
    assert stand.live("twice").certificate_der == Credentials.from_folder(state).leaf_der
    assert [row.state for row in stand.rows("twice")] == [State.ATTESTED] * 3


def test_asked_by_the_station_it_renews(stand: Stand, renewd: Renewd) -> None:
    """Online and offline: the gateway keeps the word for a device that is away."""
    here, away = stand.device("asked-1"), stand.device("asked-2")
    with client(away, Renewing()):
        pass
    watching, back = Renewing(), Renewing()
    with client(here, watching):
        asked = stand.birthmark("renew", "asked-*", "--spread", "0", "--json")
        assert (asked.returncode, json.loads(asked.stdout)["asked"]) == (0, ["asked-1", "asked-2"]), asked.stderr
        watching.wait_for_state("renewed")
        with client(away, back):
            back.wait_for_state("renewed")


def test_an_expired_device_renews_on_the_listener_for_that(stand: Stand, renewd: Renewd) -> None:
    """Its certificate has expired for the gateway: only the renewal listener lets it in."""
    state, watching = stand.early_device("late"), Renewing()
    with client_started(state, watching, renewal_port=stand.renewal_port) as device:
        watching.wait_for_state("renewed")
        device.publish(device.telemetry("x"), b"1", wait=20)
    failed = next(event for event in watching.events if isinstance(event, AttemptFailed))
    assert (failed.error.check, failed.renews) == ("expired", True)
    assert watching.states == ["asked", "granted", "trying", "confirming", "renewed"]
    assert stand.live("late").certificate_der == Credentials.from_folder(state).leaf_der


def test_an_expired_device_that_is_revoked_is_told_so_on_the_listener_for_that(stand: Stand) -> None:
    """That it has expired is why it comes there: it would be no answer."""
    state, watching = stand.early_device("late-and-lost"), Renewing()
    revoke(stand.station, "late-and-lost", x509.ReasonFlags.key_compromise)
    stand.bring_crl()
    with client_started(state, watching, renewal_port=stand.renewal_port):
        watching.wait_for_state("failed")
    failed = next(
        event for event in watching.events if isinstance(event, RenewalChanged) and event.state == "failed"
    )
    assert f"localhost:{stand.renewal_port}" in failed.detail
    assert "revoked, or expired for too long" in failed.detail
    assert "reflash" in failed.detail


def test_where_there_is_no_listener_for_what_has_expired_that_is_said(stand: Stand) -> None:
    watching, state = Renewing(), stand.early_device("nowhere")
    port = steady_port()
    with client_started(state, watching, renewal_port=port):
        watching.wait_for_state("failed")
    changes = [event for event in watching.events if isinstance(event, RenewalChanged)]
    why = next(change.detail for change in changes if change.state == "failed")
    assert f"localhost:{port}" in why
    assert "[renewal_listener]" in why


def test_a_revoked_device_gets_nowhere_and_keeps_what_it_has(stand: Stand, renewd: Renewd) -> None:
    state, watching = stand.device("lost"), Renewing()
    with client(state, watching) as device:
        revoke(stand.station, "lost", x509.ReasonFlags.key_compromise)  # the gateways do not know it yet
        device.renew()
        watching.wait_for_state("refused")
        refusal = renewd.wait_for("refused", id="lost")
        assert "revoked" in refusal["reason"]
    assert sorted(path.name for path in state.iterdir()) == ["active", "clock", "renewal.lock", "status"]


def test_one_client_renews_and_the_command_says_so(stand: Stand, renewd: Renewd) -> None:
    state = stand.device("busy")
    with client(state, Renewing()) as device:
        device.publish(device.telemetry("x"), b"1", wait=20)
        refused = device_command("renew", "--state", state)
        assert refused.returncode == 5
        assert "another client with this identity is running" in refused.stderr
    done = device_command("renew", "--state", state, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(device_command("show", "--state", state, "--json").stdout)
    assert (shown["slot"], shown["renewal"]) == ("renewed", "none under way")


def test_the_command_leaves_commands_to_the_device(stand: Stand, renewd: Renewd) -> None:
    state, got = stand.device("patient"), []
    with client(state, Renewing()) as device:
        device.command("reboot")(lambda command: got.append(command.payload))
        device.publish(device.telemetry("x"), b"1", wait=20)
    stand.send_command("patient", "reboot", b"now")
    assert device_command("renew", "--state", state).returncode == 0
    back = Client.from_folder(state)
    back.command("reboot")(lambda command: got.append(command.payload))
    with back:
        eventually(lambda: got == [b"now"], f"the command; there is {got}")
