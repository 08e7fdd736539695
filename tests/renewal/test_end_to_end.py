"""Station, gateway, renewal service and device, each as it is run: a certificate is renewed, and used."""

from __future__ import annotations

import signal
import stat
from typing import TYPE_CHECKING

import pytest
from support.renewal_stand import Stand
from support.watching import Watching, eventually

from birthmark.device.backoff import Backoff, RetryTimer
from birthmark.device.client import Client
from birthmark.device.credentials import Credentials
from birthmark.device.events import Connected, Disconnected, RenewalChanged
from birthmark.device.renewal.schedule import Pace
from birthmark.provisioning.registry.model import State

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SOON = Backoff(0.05, 0.2)
QUICK = Pace(answered_within_s=2.0, repeat=SOON, refused_wait_s=0.5)


class Renewing(Watching):
    """An observer that knows the states of a renewal."""

    @property
    def states(self) -> list[str]:
        return [event.state for event in self.events if isinstance(event, RenewalChanged)]

    def wait_for_state(self, state: str, count: int = 1) -> None:
        eventually(lambda: self.states.count(state) >= count, f"{state}; these happened: {self.events}")


def client(state: Path, watching: Watching) -> Client:
    retry = RetryTimer(unreachable=SOON, refused=SOON)
    return Client.from_folder(state, observe=watching, retry=retry, renewal_pace=QUICK)


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with Stand(tmp_path_factory.mktemp("stand")) as stand:
        yield stand


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
        renewd.wait_for("confirmed")
        assert renewd.kill(signal.SIGTERM) == 0
        assert renewd.lines[-1]["event"] == "stopped"
    after = Credentials.from_folder(state)
    assert after.pem_path.name == "renewed"
    assert stat.S_IMODE(after.pem_path.stat().st_mode) == 0o600
    assert sorted(path.name for path in state.iterdir()) == ["active", "renewal.lock", "renewed"]
    assert (state / "active").read_bytes() != after.pem_path.read_bytes()
    assert stand.live().certificate_der == after.leaf_der
    old, new = stand.rows()
    assert (old.state, new.state, old.is_revoked) == (State.ATTESTED, State.ATTESTED, False)
    with client(state, watching := Renewing()) as device:
        assert device.credentials.leaf_der == after.leaf_der
        assert watching.wait_for(Connected).client_id == "sensor-17"
