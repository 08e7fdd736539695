"""`birthmark doctor` on real stations and a real gateway: locked, quick, and with nothing changed."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from support import mqtt_client as mqtt
from support.mqtt_client import RawClient, client_context
from support.station import PASSPHRASE, Clock, Command, enrolled_row, keyed_row, public_key_der
from support.station_broker import station_broker

from birthmark.device.messages import GatewayStatus
from birthmark.provisioning import gateway_look
from birthmark.provisioning.backup import back_up
from birthmark.provisioning.checkup import Level, gather
from birthmark.provisioning.checkup_census import Census
from birthmark.provisioning.checkup_rules import examine
from birthmark.provisioning.crl_delivery import deliver_crl
from birthmark.provisioning.crl_service import CrlService
from birthmark.provisioning.crl_store import current_crl
from birthmark.provisioning.crls import sign_and_store_crl
from birthmark.provisioning.gateway_look import Look, look_at
from birthmark.provisioning.gateway_policies import note_policies
from birthmark.provisioning.gateway_settings import Gateway
from birthmark.provisioning.issuing import issue_operator
from birthmark.provisioning.revocation import revoke
from birthmark.provisioning.settings_edit import add_gateway
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from pathlib import Path

    from birthmark.provisioning.checkup import Remark
    from birthmark.provisioning.registry.model import Row

LOST = x509.ReasonFlags.key_compromise


def said(station: Station, *, timeout_s: float | None = None) -> dict[str, tuple[Level, str]]:
    """What is not well, by check; of a station opened anew, without a passphrase."""
    locked = Station.open(station.folder, clock=station.clock)
    remarks: list[Remark] = examine(gather(locked, timeout_s=timeout_s))
    return {remark.check: (remark.level, remark.text) for remark in remarks if remark.level is not Level.WELL}


def key_of(station: Station, kind: str) -> Path:
    (path,) = (station.folder / "keys").glob(f"{kind}-*.key.pem")
    return path


def reopened(station: Station) -> Station:
    """The station with the gateways that were added since."""
    return Station.open(station.folder, passphrase=PASSPHRASE, clock=station.clock)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_station_has_its_root_key_and_that_is_all(living: Station) -> None:
    before = content(living.folder)
    assert said(living).keys() == {"root-key"}
    assert content(living.folder) == before


def test_an_audit_log_that_was_cut_or_edited_near_its_end_is_found(station: Station) -> None:
    sign_and_store_crl(station)
    log, broken = (
        station.registry.audit_path,
        (Level.BROKEN, "the audit log's last entries do not continue each other"),
    )
    whole = log.read_bytes()
    log.write_bytes(whole.replace(b'"subject":"root-ca"', b'"subject":"rooted-ca"', 1))
    assert said(station)["audit"] == broken
    log.write_bytes(whole)
    assert "audit" not in said(station)
    log.unlink()
    assert said(station)["audit"] == broken  # the registry puts the last entries back alone


def test_what_went_wrong_at_a_station_is_found(station: Station, clock: Clock, tmp_path: Path) -> None:
    enrolled_row(station, "sensor-1")
    keyed_row(station, "sensor-2")
    back_up(station, tmp_path / "backup.age", b"x", cost_log2=2)
    assert said(station).keys() == {"root-key"}
    clock.advance(hours=25)
    assert said(station)["stuck"] == (Level.SOON, "1 identity begun more than a day ago and not finished")
    key_of(station, "issuing").chmod(0o644)
    locked = Station.open(station.folder, clock=station.clock)
    (remark,) = [one for one in examine(gather(locked, timeout_s=None)) if one.check == "files" and one.hint]
    assert (remark.level, remark.hint) == (Level.BROKEN, f"chmod 0400 {key_of(station, 'issuing')}")
    key_of(station, "issuing").chmod(0o440)
    assert said(station)["files"][0] is Level.BROKEN
    revoke(station, "sensor-1", LOST)
    log = station.registry.audit_path
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    assert said(station)["audit"] == (
        Level.NOTE,
        "the audit log lacked entries at its end, and has been given them again",
    )
    assert "audit" not in said(station)
    clock.advance(days=31)
    assert said(station)["crls"] == (Level.BROKEN, "the CRL of the issuing CA has ended on 2026-06-04 13:00")
    assert said(station)["backup"][1].startswith("the last backup is 32 days old")
    station.crl_path.write_bytes(b"rubbish")
    assert said(station)["crls"] == (Level.BROKEN, "the CRL of the issuing CA is missing or damaged")
    clock.advance(days=-40)
    assert said(station)["clock"][0] is Level.BROKEN


def test_a_revocation_that_no_crl_carries_is_found(station: Station) -> None:
    row = enrolled_row(station, "sensor-1")
    with station.registry.transaction() as transaction:
        transaction.update(row.changed(revoked_at=station.clock(), revocation_reason="keyCompromise"))
    assert said(station)["crls"] == (
        Level.BROKEN,
        "1 revoked certificate not on the CRL of the issuing CA: still let in",
    )


def test_certificates_that_are_not_ours_or_not_their_rows_are_found(station: Station, clock: Clock) -> None:
    row = enrolled_row(station, "sensor-1")
    issuer = x509.load_der_x509_certificate(row.certificate_der or b"").extensions.get_extension_for_class(
        x509.AuthorityKeyIdentifier
    )
    key_id = (issuer.value.key_identifier or b"").hex()
    cases: dict[str, tuple[str, Row]] = {
        "": (key_id, row),
        "was issued by another CA": ("ab12", row),
        "has another serial number than its row": (key_id, row.changed(cert_serial=1)),
        "is for another key than its row's": (key_id, row.changed(public_key_der=public_key_der())),
        "cannot be read": (key_id, row.changed(certificate_der=b"rubbish")),
    }
    for trouble, (issued_by, changed) in cases.items():
        census = Census(clock(), frozenset({issued_by}))
        census.add(changed)
        found = {what: few.names for what, few in census.foreign.items()}
        assert found == ({trouble: [changed.name]} if trouble else {})


@pytest.fixture
def quiet(living: Station, tmp_path: Path) -> Station:
    """A station with nothing to be said about it."""
    key_of(living, "root").rename(tmp_path / "root.key.pem")
    return living


def test_a_gateway_is_looked_at_in_its_operators_name(
    quiet: Station, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = issue_operator(quiet, "alice", tmp_path)
    device = issue_operator(quiet, "billing", tmp_path, role="service-billing")
    with station_broker(tmp_path / "gateway", quiet) as broker:
        gateway = Gateway("localhost", host="127.0.0.1", port=broker.port, operator_path=operator.key_path)
        add_gateway(quiet.settings_path, gateway)
        nobody = Gateway("nobody", host="127.0.0.1", port=broker.port, operator_path=operator.key_path)
        back_up(quiet, tmp_path / "backup.age", b"x", cost_log2=2)
        assert said(quiet, timeout_s=30) == {}
        context = client_context(device.key_path, quiet.folder / "root.pem")
        with RawClient.connect(broker.port, context) as client:
            client.handshake(mqtt.connect("billing"))
            broker.stop()  # says all that it has seen
        broker.start()
        (look,) = look_at([gateway], anchors_path=quiet.folder / "root.pem", timeout_s=30)
        (nothing,) = look_at([nobody], anchors_path=quiet.folder / "root.pem", timeout_s=0.5)
        assert nothing.cause, "a gateway of another name has answered"
        assert nothing.status is None
        assert {sighting.id for sighting in look.sightings or ()} == {"alice", "billing"}
        assert look.status is not None
        assert look.status.online
        with monkeypatch.context() as bounded:
            bounded.setattr(gateway_look, "MAX_TOLD_BYTES", 100)
            (flood,) = look_at([gateway], anchors_path=quiet.folder / "root.pem", timeout_s=30)
        assert (flood.status, flood.sightings) == (None, None)
        assert "it is more than 100 bytes" in flood.cause
        revoked = device.row.changed(revoked_at=quiet.clock() - timedelta(hours=1), revocation_reason="superseded")
        with quiet.registry.transaction() as transaction:
            transaction.update(revoked)
        found = said(quiet, timeout_s=30)
        assert found["let-in"][1].startswith("localhost let billing in after its revocation")
        crls = revoke(quiet, "billing", LOST).crls
        number = crls.current.number
        assert said(quiet, timeout_s=30)["gateway-crls"] == (
            Level.BROKEN,
            f"localhost goes by CRL {number - 1} of the issuing CA, and {number} is current",
        )
        deliver_crl(reopened(quiet), crls, 30)
        assert "gateway-crls" not in said(quiet, timeout_s=30)
    assert said(quiet, timeout_s=0.2)["gateways"][0] is Level.SOON


def test_a_gateways_new_policy_is_put_on_record_once(birthmark: Command, quiet: Station, tmp_path: Path) -> None:
    operator = issue_operator(quiet, "alice", tmp_path)
    with station_broker(tmp_path / "gateway", quiet) as broker:
        gateway = Gateway("localhost", host="127.0.0.1", port=broker.port, operator_path=operator.key_path)
        add_gateway(quiet.settings_path, gateway)

        def told() -> list[dict[str, Any]]:
            birthmark("doctor", "--timeout", "30")
            return birthmark("audit", "show", "--action", "policy", "--json").records

        (first,) = told()
        assert told() == [first]
        (look,) = look_at([gateway], anchors_path=quiet.folder / "root.pem", timeout_s=30)
        assert look.status is not None
        assert first["subject"] == "localhost"
        assert first["details"]["sha256"] == look.status.policy_sha256
        assert first["details"]["by"] == "gateway localhost"
        with quiet.registry.transaction() as transaction:  # as if it had gone by another until now
            transaction.put_note("gateway-policy", "localhost", {"sha256": "0" * 64})
        said_so: list[str] = []
        service = CrlService(reopened(quiet), say=lambda name, *_, **__: said_so.append(name), timeout_s=30)
        service.turn()
        service.turn()
        assert said_so.count("policy") == 1
        changed = told()[1:]
        assert [entry["details"]["previous"] for entry in changed] == ["0" * 64]
        assert birthmark("gateway", "remove", "localhost").exit_code == 0
        with quiet.registry.view() as view:
            assert view.notes("gateway-policy") == {}


def test_a_word_that_is_no_policy_s_is_passed_over(station: Station) -> None:
    status = GatewayStatus(
        "gw", online=True, clock=0.0, crl_numbers={}, crl_next_update=0.0, policy_sha256="\x1b[2J", sessions=0
    )
    before = station.registry.audit_head()
    looks = [Look("gw", "gw:8883", status=status), Look("away", "away:8883", "no answer")]
    assert note_policies(station, looks) == []
    assert station.registry.audit_head() == before


def test_a_key_that_a_killed_rollover_left_is_found(quiet: Station) -> None:
    left = key_of(quiet, "issuing").with_name("issuing-00c0ffee.key.pem")
    left.write_bytes(key_of(quiet, "issuing").read_bytes())
    left.chmod(0o400)
    level, text = said(quiet)["files"]
    assert level is Level.SOON
    assert text == f"{left} is the key of no CA that the registry knows"


def test_a_gateway_that_is_away_or_not_asked_is_known_to_be_behind(quiet: Station, tmp_path: Path) -> None:
    operator = issue_operator(quiet, "alice", tmp_path)
    with station_broker(tmp_path / "gateway", quiet) as broker:
        add_gateway(
            quiet.settings_path,
            Gateway("localhost", host="127.0.0.1", port=broker.port, operator_path=operator.key_path),
        )
        deliver_crl(reopened(quiet), sign_and_store_crl(quiet), 30)
        assert "gateway-crls" not in said(quiet)
    enrolled_row(quiet, "sensor-1")
    revoke(quiet, "sensor-1", LOST)
    behind = (Level.BROKEN, "localhost confirmed CRL 2 of the issuing CA last, and 3 is current")
    assert said(quiet)["gateway-crls"] == behind
    away = said(quiet, timeout_s=5)
    assert (away["gateway-crls"], away["gateways"][0]) == (behind, Level.SOON)


def test_a_gateway_by_path_is_judged_by_its_receipt(quiet: Station, tmp_path: Path) -> None:
    with station_broker(tmp_path / "gateway", quiet) as broker:
        gateway = Gateway("localhost", crl_path=broker.folder / "crl.pem")
        add_gateway(quiet.settings_path, gateway)
        back_up(quiet, tmp_path / "backup.age", b"x", cost_log2=2)
        assert said(quiet, timeout_s=5)["gateways"][1] == "localhost: it never gave a receipt for a CRL"
        deliver_crl(reopened(quiet), sign_and_store_crl(quiet), 30)
        assert said(quiet, timeout_s=5) == {}
        enrolled_row(quiet, "sensor-1")
        crls = revoke(quiet, "sensor-1", LOST).crls
        assert said(quiet, timeout_s=5).keys() == {"gateway-crls"}
        deliver_crl(reopened(quiet), crls, 30)
        assert said(quiet, timeout_s=5) == {}


def test_the_command_needs_no_passphrase_and_its_exit_code_says_how_bad_it_is(
    birthmark: Command, quiet: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BIRTHMARK_PASSPHRASE")
    well = birthmark("doctor", "--offline")
    assert (well.exit_code, well.stderr) == (0, "")
    assert "the gateways were not looked at" in well.stdout
    enrolled_row(quiet, "sensor-1")
    soon = birthmark("doctor")
    assert soon.exit_code == 1
    assert "SOON    backup: this station was never backed up" in soon.stdout
    key_of(quiet, "issuing").unlink()
    broken = birthmark("doctor", "--json")
    assert broken.exit_code == 6
    assert broken.records[0]["level"] == "BROKEN"
    assert broken.records[-1] == {"verdict": "BROKEN", "exit_code": 6}
    crls = current_crl(quiet)
    assert crls is not None
    assert crls.current.number == 1, "a look has signed something"


def test_the_ports_are_still_looked_at_by_name(birthmark: Command) -> None:
    del birthmark
    from birthmark.provisioning.cli import parser

    parsed = parser().parse_args(["doctor", "ports", "--port", "/dev/ttyUSB0", "--json"])
    assert parsed.port == ["/dev/ttyUSB0"]
    assert parsed.handler.__name__ == "_ports"
