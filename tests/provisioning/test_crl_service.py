"""The CRL service: fresh CRLs, gateways that come back, what is due, and an orderly end."""

from __future__ import annotations

import signal
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from support.station import PASSPHRASE, Clock, Command, enrolled_row, served_crls
from support.station_gateways import PathGateway, receipt_for

from birthmark.device.backoff import Backoff
from birthmark.provisioning import audit
from birthmark.provisioning.crl_service import LOOK_S, TROUBLE_S, CrlService
from birthmark.provisioning.crl_store import current_crl
from birthmark.provisioning.gateway_settings import Gateway
from birthmark.provisioning.registry.model import State
from birthmark.provisioning.retirement import note_retirement
from birthmark.provisioning.revocation import revoke
from birthmark.provisioning.settings_edit import add_gateway

if TYPE_CHECKING:
    from pathlib import Path

    from birthmark.provisioning.station import Station

LOST = x509.ReasonFlags.key_compromise


class Told:
    """What a service said."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, name: str, text: str, /, **facts: Any) -> None:
        assert text
        self.lines.append((name, facts))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.lines]


def service(station: Station, told: Told, *, every: timedelta | None = None) -> CrlService:
    return CrlService(station, say=told, every=every, timeout_s=0.2, retry=Backoff(0.001, 0.001))


def number(station: Station) -> int:
    crls = current_crl(station)
    assert crls is not None
    return crls.current.number


def gateway_at(station: Station, path: Path) -> Path:
    add_gateway(station.settings_path, Gateway("gateway-1", crl_path=path))
    return path


def test_a_crl_is_signed_anew_at_half_of_its_life_or_at_the_interval(station: Station, clock: Clock) -> None:
    told = Told()
    served = service(station, told)
    assert served.turn() == LOOK_S
    clock.advance(days=14)
    served.turn()
    assert (number(station), told.names) == (1, ["crl"])
    clock.advance(days=2)
    served.turn()
    assert number(station) == 2
    daily = service(station, Told(), every=timedelta(days=1))
    daily.turn()
    assert number(station) == 2
    clock.advance(days=1)
    daily.turn()
    assert number(station) == 3


def test_a_revocation_whose_command_was_killed_gets_its_crl(station: Station) -> None:
    row = enrolled_row(station, "sensor-1")
    service(station, Told()).turn()
    revoke(station, "sensor-1", LOST)
    station.crl_path.unlink()
    service(station, Told()).turn()
    crls = current_crl(station)
    assert crls is not None
    assert crls.cert_serials == {row.cert_serial}


def test_what_a_renewal_replaced_is_revoked_when_it_is_due(station: Station, clock: Clock) -> None:
    row = enrolled_row(station, "sensor-1")
    with station.registry.transaction() as transaction:
        note_retirement(transaction, row, clock.now + timedelta(hours=1))
    told = Told()
    served = service(station, told)
    served.turn()
    clock.advance(hours=2)
    served.turn()
    crls = current_crl(station)
    assert crls is not None
    assert crls.cert_serials == {row.cert_serial}
    assert told.names == ["crl", "retired", "crl"]


def test_a_gateway_that_is_away_gets_it_when_it_is_back(living: Station, tmp_path: Path) -> None:
    path = gateway_at(living, tmp_path / "gateway.crl")
    told = Told()
    served = service(living, told)
    for _ in range(4):
        assert served.turn() < LOOK_S
    assert told.names == ["crl", "delivery"], "told once, not at every attempt"
    entries = [entry for entry in audit.read(living.registry.audit_path) if entry["action"] == "deliver"]
    assert len(entries) == 1, "nor does the audit log grow with every attempt"
    with PathGateway(path, lambda crl: receipt_for(crl).to_bytes()):
        while served.turn() < LOOK_S:
            pass
    assert told.lines[-1][1]["outcome"] == "done"
    assert served.turn() == LOOK_S
    assert len(told.lines) == 3


def test_every_gateway_is_brought_a_new_crl_by_whomever_it_was_signed(living: Station, tmp_path: Path) -> None:
    path = gateway_at(living, tmp_path / "gateway.crl")
    enrolled_row(living, "sensor-1")
    told = Told()
    served = service(living, told)
    with PathGateway(path, lambda crl: receipt_for(crl).to_bytes()):
        while served.turn() < LOOK_S:
            pass
        revoke(living, "sensor-1", LOST)  # another command, which brings it nowhere
        while served.turn() < LOOK_S:
            pass
    assert path.read_bytes() == living.crl_path.read_bytes()
    assert [facts["crl_number"] for name, facts in told.lines if name == "delivery"][-1] == 2


def test_a_trouble_is_told_and_tried_again(station: Station) -> None:
    told = Told()
    served = service(station, told)
    settings = station.settings_path.read_bytes()
    station.settings_path.write_bytes(b"junk")
    assert served.turn() == TROUBLE_S
    station.settings_path.write_bytes(settings)
    assert served.turn() == LOOK_S
    assert told.names == ["trouble", "crl"]


def test_the_status_names_who_is_behind(birthmark: Command, living: Station, tmp_path: Path) -> None:
    path = gateway_at(living, tmp_path / "gateway.crl")
    answer = birthmark("crl", "status", "--json")
    assert (answer.exit_code, answer.records[0]["state"]) == (1, "behind")
    with PathGateway(path, lambda crl: receipt_for(crl).to_bytes()):
        assert birthmark("crl").exit_code == 0
    answer = birthmark("crl", "status", "--json")
    assert (answer.exit_code, answer.records[0]["state"]) == (0, "up to date")
    assert (answer.records[0]["confirmed"], answer.records[0]["current"]) == (2, 2)
    assert birthmark("gateway", "list", "--json").records[0]["crl"] == [2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_runs_until_it_is_stopped(living: Station, number: signal.Signals) -> None:
    row = enrolled_row(living, "sensor-1", state=State.ATTESTED)
    events, code = served_crls(living.folder, number, BIRTHMARK_PASSPHRASE=PASSPHRASE.decode())
    assert events == ["ready", "crl", "stopped"]
    assert code == (130 if number is signal.SIGINT else 0)
    assert not row.is_revoked


def test_a_wrong_passphrase_is_said_at_once(birthmark: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIRTHMARK_PASSPHRASE", "wrong")
    assert birthmark("crl", "serve").exit_code == 6
