"""An upstream of several servers, each of which retains for itself: what is brought, seen and missed."""

from __future__ import annotations

import queue
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from support.patience import PATIENCE_S
from support.programs import needs
from support.station_upstream import Fleet, Mosquitto, PlayedGateway, fleet

from birthmark.device.backoff import Backoff
from birthmark.device.client import Client
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.provisioning import audit
from birthmark.provisioning.crl_delivery import deliver_crl
from birthmark.provisioning.crl_service import LOOK_S, CrlService
from birthmark.provisioning.crl_store import current_crl
from birthmark.provisioning.crls import sign_and_store_crl
from birthmark.provisioning.delivery import Outcome
from birthmark.provisioning.gateway_look import look_at
from birthmark.provisioning.gateway_settings import Upstream
from birthmark.provisioning.settings_edit import add_upstream, remove_upstream

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.station import Command

    from birthmark.provisioning.crl_store import StoredCrl
    from birthmark.provisioning.delivery import Delivery
    from birthmark.provisioning.gateway_look import Look
    from birthmark.provisioning.station import Station

pytestmark = needs("mosquitto")
SHORT_S = 4.0


@dataclass
class Pair:
    """`cloud`, of two servers: as with the nodes of a RabbitMQ, neither retains what the other does."""

    fleet: Fleet
    servers: tuple[Mosquitto, Mosquitto]

    @property
    def station(self) -> Station:
        return self.fleet.station

    def played(self, name: str, server: int, **options: object) -> PlayedGateway:
        gateway = self.fleet.played(name, **options)
        gateway.port = self.servers[server].port
        return gateway

    def bring(self) -> dict[str, Delivery]:
        crls = current_crl(self.station)
        assert crls is not None
        return {one.gateway: one for one in deliver_crl(self.station, crls, PATIENCE_S)}

    def looks(self, timeout_s: float = PATIENCE_S) -> dict[str, Look]:
        settings = self.station.settings
        found = look_at(
            settings.gateways,
            anchors_path=self.station.root_path,
            timeout_s=timeout_s,
            upstreams=settings.upstreams,
            sightings=False,
        )
        return {look.name: look for look in found}

    def held(self, server: int, crl: StoredCrl) -> bytes:
        """What a server retains for a CA; empty: nothing."""
        found: queue.Queue[bytes] = queue.Queue()
        address = BrokerAddress("localhost", self.servers[server].port)
        credentials = Credentials.from_files(self.fleet.folder / "alice.pem", self.station.root_path, address)
        with Client(credentials, client_suffix="test") as client:
            client.subscribe(
                f"fleet/crl/{crl.issuer}", lambda message: found.put(message.payload), wait=PATIENCE_S
            )
            client.subscribe("fleet/none", lambda _: None, wait=PATIENCE_S)
            client.wait_for_callbacks(PATIENCE_S)
            return b"" if found.empty() else found.get()


@pytest.fixture
def pair(living: Station, tmp_path: Path) -> Iterator[Pair]:
    with fleet(tmp_path / "cloud", living) as made:
        folder = tmp_path / "second"
        folder.mkdir()
        second = Mosquitto(folder, living, "second.example")
        second.start()
        servers = tuple(BrokerAddress("127.0.0.1", each.port) for each in (made.upstream, second))
        remove_upstream(living.settings_path, "cloud")
        add_upstream(living.settings_path, Upstream("cloud", servers, tmp_path / "cloud" / "alice.pem"))
        made.add("g-1", "g-2")
        try:
            yield Pair(made, (made.upstream, second))
        finally:
            second.stop()


def test_each_server_is_brought_it_and_a_gateway_may_be_at_any(pair: Pair) -> None:
    crl = sign_and_store_crl(pair.station).current
    with pair.played("g-1", 0), pair.played("g-2", 1):
        assert {look.cause for look in pair.looks().values()} == {""}
        done = pair.bring()
    assert [(one.outcome, one.missed) for one in done.values()] == [(Outcome.DONE, ())] * 2
    assert [pair.held(server, crl) for server in (0, 1)] == [crl.der] * 2


def test_what_was_installed_once_is_told_so_though_it_came_from_each_server(pair: Pair) -> None:
    """In a cluster a gateway hears what is published at every node, and answers to each."""
    sign_and_store_crl(pair.station)
    with pair.played("g-2", 1), pair.played("g-1", 0), pair.played("g-1", 1):
        done = pair.bring()
    assert done["g-1"].receipts[0].outcome == "installed"


def test_a_server_that_is_down_is_named_and_brought_it_when_it_is_back(pair: Pair, birthmark: Command) -> None:
    with pair.played("g-1", 0), pair.played("g-2", 0):
        pair.servers[1].stop()
        answer = birthmark("crl")
        assert answer.exit_code == 0, answer
        assert f"cloud was not brought it at 127.0.0.1:{pair.servers[1].port}: " in answer.stderr
        assert "`birthmark crl` tries again" in answer.stderr
        (missed,) = birthmark("crl", "--json").records[0]["gateways"][0]["missed"]
        assert str(pair.servers[1].port) in missed
        pair.servers[1].start()
        done = pair.bring()
        crls = current_crl(pair.station)
        assert crls is not None
        assert [one.missed for one in done.values()] == [(), ()]
        assert [pair.held(server, crls.current) for server in (0, 1)] == [crls.current.der] * 2


def test_the_service_goes_on_until_every_server_has_it(pair: Pair) -> None:
    told: list[tuple[str, bool]] = []
    service = CrlService(
        pair.station,
        say=lambda name, _text, **facts: told.append((name, "missed" in facts)),
        timeout_s=PATIENCE_S,
        retry=Backoff(0.001, 0.001),
    )
    with pair.played("g-1", 0), pair.played("g-2", 0):
        pair.servers[1].stop()
        for _ in range(3):
            assert service.turn() < LOOK_S
        assert [one for one in told if one[0] == "delivery"] == [("delivery", True)] * 2, "said once for each"
        pair.servers[1].start()
        while service.turn() < LOOK_S:
            pass
        crls = current_crl(pair.station)
        assert crls is not None
        assert pair.held(1, crls.current) == crls.current.der
    entries = [entry for entry in audit.read(pair.station.registry.audit_path) if entry["action"] == "deliver"]
    assert len(entries) == 2, "what is so still is not put on record again"


def test_the_newest_status_counts_wherever_it_is_held(pair: Pair) -> None:
    gateway = pair.played("g-1", 0)
    with gateway, pair.played("g-2", 1):
        gateway.leave()  # its last will stays at the first server
        gateway.port = pair.servers[1].port
        gateway.come()
        look = pair.looks()["g-1"]
        assert look.status is not None
        assert look.status.online
        sign_and_store_crl(pair.station)
        assert pair.bring()["g-1"].outcome is Outcome.DONE


def test_one_that_no_server_knows_may_be_at_the_one_that_is_missed(pair: Pair) -> None:
    with pair.played("g-1", 0):
        cause = pair.looks(SHORT_S)["g-2"].cause
        assert cause == "cloud knows nothing of it: has it a link there, with fleet = true?"
        pair.servers[1].stop()
        cause = pair.looks(SHORT_S)["g-2"].cause
        pair.servers[1].start()
    assert cause == f"cloud knows nothing of it, and could not be reached at 127.0.0.1:{pair.servers[1].port}"


def test_none_that_can_be_reached_is_an_error_for_each_gateway(pair: Pair) -> None:
    for server in pair.servers:
        server.stop()
    causes = [look.cause for look in pair.looks(SHORT_S).values()]
    for server in pair.servers:
        server.start()
    assert all("could not connect" in cause for cause in causes), causes
