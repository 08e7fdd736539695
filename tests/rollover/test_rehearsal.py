"""A rehearsal: an issuing CA and then a root replaced under a fleet that is online."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support.renewal_stand import Stand
from support.renewing_client import Renewing, client
from support.station import CHEAP, PASSPHRASE, Command
from support.waiting import eventually

from birthmark.device.client import Client
from birthmark.device.credentials import Credentials
from birthmark.device.errors import ConnectionFailedError
from birthmark.provisioning.gateway_settings import Gateway
from birthmark.provisioning.registry.model import Kind, State
from birthmark.provisioning.rollover.starting import start_issuing, start_root
from birthmark.provisioning.settings_edit import add_gateway

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.renewal_stand import Renewd

WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
COUNT = 100 if WHOLE else 3


class Fleet:
    """Devices that are online, and what they were before."""

    def __init__(self, stand: Stand, running: ExitStack) -> None:
        self.stand = stand
        self.folders = stand.fleet(COUNT)
        self.watching = [Renewing() for _ in self.folders]
        self.clients = [client(folder, one) for folder, one in zip(self.folders, self.watching, strict=True)]
        for one in self.clients:
            one.start()
            running.callback(one.stop)
        self.are_online()
        self._renewals = 0

    def are_online(self) -> None:
        """Every device is connected, and the gateway takes what it says."""
        for one in self.clients:
            eventually(lambda one=one: one.is_connected, "a device is not online")  # type: ignore[misc]
            one.publish(one.telemetry("t"), b"1", wait=20)

    def renew(self) -> None:
        self._renewals += 1
        for one in self.clients:
            one.renew()
        for watching in self.watching:
            watching.wait_for_state("renewed", self._renewals)

    def kept(self, folder: Path) -> Path:
        """Keep what the first device is now."""
        return shutil.copytree(self.folders[0], folder)

    def anchors(self) -> list[int]:
        return [len(Credentials.from_folder(folder).anchors_der) for folder in self.folders]


def issued_anew(stand: Stand, birthmark: Command, renewd: Renewd, *, broker: bool) -> Renewd:
    """Issue to services (and to the broker) again, and start the renewal service with it."""
    renewd.kill()
    for name, role in (("renewd", "service-renewal"), ("alice", "operator")):
        answer = birthmark("issue-operator", name, "--role", role, "--renew", "--out", stand.folder)
        assert answer.exit_code == 0, answer.stderr
    if broker:
        answer = birthmark("issue-broker", "localhost", "127.0.0.1", "--renew", "--out", stand.crl_path.parent)
        assert answer.exit_code == 0, answer.stderr
    return stand.renewd().__enter__()


def is_let_in(folder: Path) -> bool:
    old = Client.from_folder(folder)
    try:
        old.connect(timeout_s=20)
    except ConnectionFailedError:
        return False
    finally:
        old.stop()
    return True


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_nobody_drops_out_when_an_issuing_ca_and_then_a_root_are_replaced(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    proven: Callable[[str], None],
) -> None:
    monkeypatch.setenv("BIRTHMARK_PASSPHRASE", PASSPHRASE.decode())
    monkeypatch.delenv("BIRTHMARK_ROOT_PASSPHRASE", raising=False)
    for step in (start_issuing, start_root):
        monkeypatch.setitem(step.__kwdefaults__ or {}, "derivation", CHEAP)
    with Stand(tmp_path) as stand, ExitStack() as running:
        birthmark = Command(stand.station.folder, capsys)
        clients_ca = stand.crl_path.with_name("clients-ca.pem")
        add_gateway(stand.station.settings_path, Gateway("localhost", stand.crl_path, clients_ca_path=clients_ca))
        fleet = Fleet(stand, running)
        renewd = stand.renewd().__enter__()
        running.callback(lambda: renewd.kill())  # noqa: PLW0108 - the one of then
        first = stand.station.cas.for_clients

        # An issuing CA.
        old_device = fleet.kept(tmp_path / "old")
        assert birthmark("ca", "rollover", "activate").exit_code == 3
        started = birthmark("ca", "rollover", "start", "issuing", "--json")
        assert started.exit_code == 0, (started.stdout, started.stderr)
        again = birthmark("ca", "rollover", "start", "issuing", "--json")
        assert again.records[0]["ca"] == started.records[0]["ca"]
        assert birthmark("ca", "rollover", "activate").exit_code == 0
        second = stand.station.cas.for_clients
        assert second.key_id == started.records[0]["ca"]
        assert second.root == first.root
        refused = birthmark("ca", "rollover", "retire", "issuing")
        assert refused.exit_code == 3
        assert f"{COUNT} devices, 2 services, 1 broker still go by it" in refused.stderr
        fleet.are_online()
        fleet.renew()
        renewd = issued_anew(stand, birthmark, renewd, broker=True)
        assert is_let_in(old_device)
        retired = birthmark("ca", "rollover", "retire", "issuing")
        assert retired.exit_code == 0, (retired.stdout, retired.stderr)
        fleet.are_online()
        assert not is_let_in(old_device)

        # A root.
        old_device = fleet.kept(tmp_path / "older")
        started = birthmark("ca", "rollover", "start", "root", "--json")
        assert started.exit_code == 0, (started.stdout, started.stderr)
        assert birthmark("ca", "rollover", "activate").exit_code == 0
        third = stand.station.cas.for_clients
        assert third.root != first.root
        refused = birthmark("ca", "rollover", "activate", "--brokers")
        assert refused.exit_code == 3
        assert f"{COUNT + 2} do not hold its root yet" in refused.stderr
        assert birthmark("ca", "rollover", "retire", "root").exit_code == 3
        renewd = issued_anew(stand, birthmark, renewd, broker=False)
        fleet.renew()
        assert fleet.anchors() == [2] * COUNT
        assert birthmark("ca", "rollover", "activate", "--brokers").exit_code == 0
        assert birthmark("ca", "rollover", "retire", "root").exit_code == 3, "the broker presents the old chain"
        renewd = issued_anew(stand, birthmark, renewd, broker=True)
        stand.kill_broker()  # everybody has to look at the new chain
        stand.start_broker()
        fleet.are_online()
        rows = {row["ca"]: row for row in birthmark("ca", "rollover", "status", "--json").records}
        assert (rows[second.short]["devices"], rows[third.short]["devices"]) == (0, COUNT)
        assert rows[third.root[:8]]["distrusting"] == []
        retired = birthmark("ca", "rollover", "retire", "root")
        assert retired.exit_code == 0, (retired.stdout, retired.stderr)
        fleet.are_online()
        assert not is_let_in(old_device)

        # The old root leaves the devices with their next renewal.
        fleet.renew()
        assert fleet.anchors() == [1] * COUNT
        fleet.are_online()
        with stand.station.registry.view() as view:
            live = [row for row in view.rows(kind=Kind.DEVICE, states={State.ATTESTED}) if row.is_live]
        assert {(row.issuer, row.anchors) for row in live} == {(third.key_id, third.root)}
        assert birthmark("audit", "verify").exit_code == 0
        assert [ca.phase for ca in stand.station.cas].count("retired") == 3
        proven(f"{COUNT} devices online throughout, renewed three times each; three CAs retired")
