"""Whoever is killed in a renewal, and whenever: no device without an identity that is let in, no number twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.patience import PATIENCE_S
from support.renewal_stand import Stand
from support.renewing_client import SOON, Renewing, client
from support.waiting import eventually

from birthmark.device.backoff import RetryTimer
from birthmark.device.credentials import Credentials
from birthmark.device.errors import RefusedError
from birthmark.device.renewal import making
from birthmark.device.renewal.schedule import Pace
from birthmark.provisioning.registry.model import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.renewal_stand import Renewd

    from birthmark.device.agent.slots import Slot
    from birthmark.device.renewal.messages import RenewalRequest

KILLS = Path(__file__).parents[1] / "support" / "renewal_kills.py"
WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
DEVICE = """
import sys
from pathlib import Path
from support.renewing_client import Renewing, client_started
watching = Renewing()
with client_started(Path(sys.argv[1]), watching) as device:
    device.renew()
    watching.wait_for_state("renewed")
    print("renewed")
"""


@pytest.mark.proof
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("scenario", "stride", "at_least"), [("renew", 61, 7), ("retire", 41, 2)])
def test_a_kill_at_any_step_of_either_side(
    tmp_path: Path, scenario: str, stride: int, at_least: int, proven: Callable[[str], None]
) -> None:
    command = [sys.executable, str(KILLS), scenario, str(tmp_path), "1" if WHOLE else str(stride)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= at_least
    proven(f"killed at {int(done.stdout)} of its steps: one certificate in the end, and always one that is let in")


def check(stand: Stand, state: Path, name: str) -> None:
    """What the device holds is what the registry has as the live one; nothing else but the old one is valid."""
    held = Credentials.from_folder(state)
    live = stand.live(name)
    assert live.certificate_der == held.leaf_der
    rows = stand.rows(name)
    assert len({row.cert_serial for row in rows}) == len(rows)
    valid = [row for row in rows if not row.is_revoked and row.state is not State.VOID]
    assert len(valid) == 2, valid
    assert not any(row.is_open_renewal for row in rows)


def test_the_service_and_the_broker_are_killed_at_every_word(tmp_path: Path) -> None:
    """At each state that the device reports, one of the two dies and comes back."""
    with Stand(tmp_path) as stand:
        state, watching = stand.device(), Renewing()
        services = [stand.renewd()]
        try:
            with client(state, watching) as device:
                device.renew()
                watching.wait_for_state("asked")
                services[-1].kill()
                services.append(stand.renewd())
                watching.wait_for_state("granted")
                stand.kill_broker()
                stand.start_broker()
                watching.wait_for_state("confirming")
                services[-1].kill()
                services.append(stand.renewd())
                watching.wait_for_state("renewed")
                device.publish(device.telemetry("x"), b"1", wait=20)
            check(stand, state, "sensor-17")
        finally:
            for service in services:
                service.kill()


def test_the_gateway_is_killed_between_the_grant_and_the_confirmation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The confirmation goes out by the old certificate, which is to be retired: the device must not stay on it."""
    watching, held, go_on = Renewing(), threading.Event(), threading.Event()
    confirmation = making.confirmation

    def wait_s(shortest_s: float, _longest_s: float) -> float:
        if "failed" in watching.states:  # it has gone back to the old one
            held.set()
            assert go_on.wait(PATIENCE_S)
        return shortest_s

    with Stand(tmp_path) as stand, stand.renewd() as first:
        state = stand.device()

        def killed_before_it(slot: Slot) -> RenewalRequest:
            stand.kill_broker()  # the device is connected with the new one, and has not written a byte of this
            return confirmation(slot)

        monkeypatch.setattr(making, "confirmation", killed_before_it)
        retry = RetryTimer(wait_s, unreachable=SOON, refused=SOON)
        with client(state, watching, retry=retry, renewal_pace=Pace(PATIENCE_S, repeat=SOON)) as device:
            device.renew()
            assert held.wait(PATIENCE_S)
            first.kill()
            stand.start_broker()
            with stand.renewd():
                go_on.set()
                watching.wait_for_state("renewed")
                assert watching.states.count("confirming") == 1, "asked again, by the new one"
                check(stand, state, "sensor-17")
                stand.retire_now()
                device.publish(device.telemetry("x"), b"1", wait=PATIENCE_S)
        assert Credentials.from_folder(state).leaf_der == stand.live().certificate_der
        assert [row.is_revoked for row in stand.rows()] == [True, False]
        refused = [event for event in watching.events if getattr(event, "error", None).__class__ is RefusedError]
        assert not refused, "it went by what is retired"


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_a_device_that_is_killed_at_random_renews_in_the_end(
    stand: Stand, renewd: Renewd, proven: Callable[[str], None]
) -> None:
    draw = random.Random(7)
    devices = 20 if WHOLE else 1
    for number in range(devices):
        name = f"mortal-{number}"
        state = stand.device(name)
        command = [sys.executable, "-c", DEVICE, str(state)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        for _ in range(3):
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
            killer = threading.Timer(draw.uniform(0.2, 0.9), process.send_signal, [signal.SIGKILL])
            killer.start()
            process.communicate(timeout=PATIENCE_S)
            killer.cancel()
            held = Credentials.from_folder(state)
            row = next(row for row in stand.rows(name) if row.certificate_der == held.leaf_der)
            assert not row.is_revoked
        end = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert end.stdout == "renewed\n", end.stderr
        eventually(
            lambda name=name: not any(row.is_open_renewal for row in stand.rows(name)),  # type: ignore[misc]
            "an open renewal",
        )
    proven(f"{devices} devices killed three times each: at any moment an identity that stands, renewed in the end")


def test_two_services_at_once_give_one_certificate(stand: Stand, renewd: Renewd) -> None:
    with stand.renewd() as second:
        for number in range(3):
            name, watching = f"shared-{number}", Renewing()
            state = stand.device(name)
            with client(state, watching) as device:
                device.renew()
                watching.wait_for_state("renewed")
            check(stand, state, name)
        assert {line["event"] for line in (*renewd.lines, *second.lines)} >= {"issued", "confirmed"}
