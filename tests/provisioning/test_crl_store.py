"""Where CRLs are kept: several stations on one registry, each with a file, and the newest CRL for all of them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from support.station import PASSPHRASE, enrolled_row, new_station
from support.station_gateways import PathGateway, receipt_for

from birthmark.device.backoff import Backoff
from birthmark.provisioning import audit
from birthmark.provisioning.crl_commands import status
from birthmark.provisioning.crl_delivery import deliver_crl
from birthmark.provisioning.crl_service import CrlService
from birthmark.provisioning.crl_store import TOPIC, CrlSet, current_crl, last_number, newest_crls, read_crl_file
from birthmark.provisioning.crls import sign_and_store_crl, stale_crls, up_to_date_crl
from birthmark.provisioning.delivery import Outcome
from birthmark.provisioning.gateway_settings import Gateway
from birthmark.provisioning.migration import migrate
from birthmark.provisioning.registry.opening import setting_from
from birthmark.provisioning.revocation import revoke
from birthmark.provisioning.settings import RegistrySetting
from birthmark.provisioning.settings_edit import add_gateway, put_registry
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from birthmark.provisioning.authority import Authority

LOST = x509.ReasonFlags.key_compromise


@pytest.fixture(params=["sqlite", "postgresql"])
def stations(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Station, Station]]:
    """Two stations on one database."""
    url = f"sqlite:///{tmp_path}/registry.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").new_schema()
    first = new_station(tmp_path / "line-1", registry=url)
    not_shared = shutil.ignore_patterns("audit.jsonl", "*.lock")
    shutil.copytree(tmp_path / "line-1", tmp_path / "line-2", ignore=not_shared)
    put_registry(tmp_path / "line-2" / "station.toml", RegistrySetting(url, log="line-2"))
    second = Station.open(tmp_path / "line-2", passphrase=PASSPHRASE)
    yield first, second
    first.close()
    second.close()


def in_file(station: Station) -> list[str]:
    return [crl.sha256 for crl in read_crl_file(station.crl_path, station.cas.issuing)]


def shas(crls: CrlSet) -> list[str]:
    return [crl.sha256 for crl in crls.crls]


def last(station: Station) -> int:
    with station.registry.view() as view:
        return last_number(view, station.cas.for_clients)


def test_what_one_station_signs_is_the_others_crl_too(stations: tuple[Station, Station]) -> None:
    first, second = stations
    row = enrolled_row(first, "sensor-1")
    signed = revoke(first, "sensor-1", LOST).crls
    assert in_file(second) != shas(signed)
    assert shas(up_to_date_crl(second)) == in_file(second) == shas(signed), "fetched, and not signed another time"
    assert last(second) == signed.current.number
    signed = sign_and_store_crl(second)
    seen = current_crl(first)
    assert seen is not None
    assert shas(seen) == shas(signed), "also without a passphrase"
    assert seen.cert_serials == {row.cert_serial}


def test_services_at_both_stations_agree_and_do_not_sign_against_each_other(
    stations: tuple[Station, Station], tmp_path: Path
) -> None:
    path = tmp_path / "gateway.crl"
    for station in stations:
        add_gateway(station.settings_path, Gateway("gateway-1", crl_path=path))
    said: list[dict[str, Any]] = []

    def say(name: str, _text: str, /, **facts: Any) -> None:
        said.append({"name": name, **facts})

    retry = Backoff(0.001, 0.001)
    services = [CrlService(station, say=say, timeout_s=10, retry=retry) for station in stations]
    brought: list[bytes] = []

    def answer(crl: bytes) -> bytes:
        brought.append(crl)
        return receipt_for(crl).to_bytes()

    with PathGateway(path, answer):
        revoked = sign_and_store_crl(stations[1])
        for _ in range(3):
            for service in services:
                service.turn()
    assert last(stations[0]) == revoked.current.number
    assert brought == [revoked.current.der]
    assert [one["outcome"] for one in said if one["name"] == "delivery"] == ["done"]
    for station in stations:
        assert [row["state"] for row in status(station)] == ["up to date"]


def test_of_two_that_sign_at_once_the_later_one_holds_for_both(
    stations: tuple[Station, Station], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = stations
    unlocked = first.authority_of
    later: list[CrlSet] = []

    def overtaken(key_id: str) -> Authority:
        """The number is taken, and nothing signed yet."""
        if not later:
            later.append(sign_and_store_crl(second))
        return unlocked(key_id)

    row = enrolled_row(first, "sensor-1")
    monkeypatch.setattr(first, "authority_of", overtaken)
    crls = revoke(first, "sensor-1", LOST).crls
    assert shas(crls) == in_file(first) == shas(later[0])
    assert crls.cert_serials == {row.cert_serial}
    assert stale_crls(first)[0] == stale_crls(second)[0] == []


def test_a_number_that_nobody_signed_has_the_next_one_signed(
    stations: tuple[Station, Station], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = stations

    def killed(_key_id: str) -> Authority:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(first, "authority_of", killed)
        with pytest.raises(KeyboardInterrupt):
            sign_and_store_crl(first)
    crls = up_to_date_crl(second)
    assert crls.current.number == last(first)
    assert shas(up_to_date_crl(first)) == shas(crls)


def test_a_delivery_that_another_station_overtakes_brings_the_newer_crl(
    stations: tuple[Station, Station], tmp_path: Path
) -> None:
    first, second = stations
    path = tmp_path / "gateway.crl"
    older = up_to_date_crl(first)
    newer = sign_and_store_crl(second)
    with PathGateway(path, lambda crl: receipt_for(crl).to_bytes()):
        (delivery,) = deliver_crl(first, older, 10, gateways=[Gateway("gateway-1", crl_path=path)])
    assert delivery.outcome is Outcome.DONE
    assert path.read_bytes() == newer.pem


@pytest.mark.parametrize("note", [{"number": 99, "der": "bm90IGEgQ1JM"}, {"der": 7}, {}])
def test_a_damaged_note_is_no_crl(stations: tuple[Station, Station], note: dict[str, Any]) -> None:
    first, second = stations
    sign_and_store_crl(first)
    key_id = first.cas.for_clients.key_id
    with first.registry.transaction() as transaction:
        transaction.put_note(TOPIC, key_id, note)
    crls = up_to_date_crl(second)
    assert crls.current.number == 3
    assert shas(up_to_date_crl(first)) == shas(crls)


def test_a_file_of_before_that_was_put_back_is_never_brought_anywhere(station: Station, tmp_path: Path) -> None:
    enrolled_row(station, "sensor-1")
    old = station.crl_path.read_bytes()
    sign_and_store_crl(station)
    station.crl_path.write_bytes(old)
    crls = up_to_date_crl(station)
    assert crls.current.number == last(station) == 3
    assert station.crl_path.read_bytes() == crls.pem
    path = tmp_path / "gateway.crl"
    add_gateway(station.settings_path, Gateway("gateway-1", crl_path=path))
    station.crl_path.write_bytes(old)
    CrlService(station, say=lambda *_, **__: None, timeout_s=0.1).turn()
    assert [crl.number for crl in read_crl_file(path, station.cas.issuing)] == [4]


def test_a_registry_that_is_in_a_database_no_longer_keeps_no_crls(tmp_path: Path) -> None:
    station = new_station(tmp_path / "station", registry="sqlite:///registry.db")
    before = sign_and_store_crl(station)
    migrate(station, setting_from("tinydb"), tell=lambda *_: None)
    station = Station.open(station.folder, passphrase=PASSPHRASE)
    assert shas(up_to_date_crl(station)) == shas(before)
    sign_and_store_crl(station)
    with station.registry.view() as view:
        assert view.notes(TOPIC) == {}
        assert [crl.number for crl in newest_crls(station, view, station.cas.issuing).values()] == [3]
    entries = [entry for entry in audit.read(station.registry.audit_path) if entry["action"] == "crl"]
    assert [entry["details"]["number"] for entry in entries if entry["subject"] == "issuing-ca"] == [1, 2, 3]
