"""Twenty gateways as real processes below a real broker, three of them away: the table, a revocation, a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support import mqtt_client as mqtt
from support.mqtt_client import ConnectionEndedError, RawClient, client_context
from support.station import PASSPHRASE, Command, new_station
from support.waiting import eventually

from bench.fleet_stand import FleetStand, fleet_stand
from birthmark.provisioning.crl_store import current_crl
from birthmark.provisioning.issuing import issue_operator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from birthmark.provisioning.station import Station

NAMES = [f"g-{number:02}" for number in range(1, 21)]
AWAY = NAMES[3::8]
NOT_AUTHORIZED = 5
"""MQTT 3.1.1 §3.2.2.3."""
THERE = [name for name in NAMES if name not in AWAY]


@pytest.fixture
def station(tmp_path: Path) -> Station:
    return new_station(tmp_path / "station")


@pytest.fixture
def birthmark(station: Station, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("BIRTHMARK_PASSPHRASE", PASSPHRASE.decode())
    return Command(station.folder, capsys)


@pytest.fixture
def stand(station: Station, tmp_path: Path) -> Iterator[FleetStand]:
    with fleet_stand(tmp_path / "fleet", station, NAMES) as made:
        yield made


def rows(birthmark: Command) -> dict[str, dict[str, Any]]:
    answer = birthmark("gateways", "--json", "--timeout", "30")
    return {row["gateway"]: row for row in answer.records}


def wait_for(birthmark: Command, state: str, names: list[str]) -> None:
    """Wait until the table says so: a link comes and goes by itself."""
    eventually(
        lambda: {name for name, row in rows(birthmark).items() if row["state"] == state} == set(names),
        f"{names} are never {state}",
    )


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_a_fleet_with_three_of_twenty_away(
    stand: FleetStand, birthmark: Command, tmp_path: Path, proven: Callable[[str], None]
) -> None:
    billing = issue_operator(stand.station, "billing", tmp_path, role="service-billing")
    assert billing.row.cert_serial is not None
    context = client_context(billing.key_path, stand.station.root_path)
    stand.start(NAMES)
    wait_for(birthmark, "online", NAMES)
    assert birthmark("crl", "--timeout", "60").exit_code == 0
    assert birthmark("gateways", "--timeout", "30").exit_code == 0

    # Three lose their power; the identity is connected at one that does not, and is revoked.
    client = RawClient.connect(stand.gateways[THERE[5]].port, context)
    client.handshake(mqtt.connect("billing"))
    for name in AWAY:
        stand.gateways[name].kill()
    wait_for(birthmark, "away", AWAY)
    answer = birthmark("revoke", "billing", "--reason", "lost", "--timeout", "60", "--json")
    assert answer.exit_code == 1, answer
    told = {one["gateway"]: one for one in answer.records[0]["gateways"]}
    assert {name for name, one in told.items() if one["outcome"] == "PENDING"} == set(AWAY)
    assert {name for name, one in told.items() if one["outcome"] == "done"} == set(THERE)
    assert [one["id"] for one in told[THERE[5]]["closed"]] == ["billing"]
    assert all("down" in told[name]["cause"] for name in AWAY)
    with pytest.raises(ConnectionEndedError):
        client.read()
    client.close()

    # So it is with a policy.
    path = tmp_path / "policy.toml"
    path.write_text((stand.cloud.folder / "policy.toml").read_text() + "# for the whole fleet\n")
    answer = birthmark("policy", "publish", str(path), "--timeout", "60", "--json")
    assert answer.exit_code == 1, answer
    told = {one["gateway"]: one for one in answer.records[0]["gateways"]}
    assert {name for name, one in told.items() if one["outcome"] == "PENDING"} == set(AWAY), told
    table = rows(birthmark)
    assert {name for name, row in table.items() if not row["well"]} == set(AWAY)
    for name in AWAY:
        assert [crl["behind"] for crl in table[name]["crls"].values()] == [1]
        assert (table[name]["policy_version"], table[name]["policy_behind"]) == (0, 1)
        assert table[name]["last_heard"] is not None
    assert birthmark("gateways", "--timeout", "30").exit_code == 1

    # They come back by themselves, and let nobody in by what they had.
    current = current_crl(stand.station)
    assert current is not None
    stand.start(AWAY)
    for name in AWAY:
        refused = RawClient.connect(stand.gateways[name].port, context)
        refused.handshake(mqtt.connect("billing"), code=NOT_AUTHORIZED)
        refused.close()
    wait_for(birthmark, "online", NAMES)
    table = rows(birthmark)
    assert {row["policy_version"] for row in table.values()} == {1}
    assert {crl["number"] for row in table.values() for crl in row["crls"].values()} == {current.current.number}
    assert birthmark("gateways", "--timeout", "30").exit_code == 0
    assert birthmark("policy", "publish", "--timeout", "60").exit_code == 0
    proven(
        f"{len(THERE)} gateways took a revocation and a policy at once, {len(AWAY)} that were away by themselves"
    )
    assert birthmark("crl", "--timeout", "60").exit_code == 0
