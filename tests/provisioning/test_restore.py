"""A station that is destroyed, and goes on elsewhere: nothing twice, nothing lost, and said what is not known."""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from support.station import CHEAP, PASSPHRASE, Clock, Command, enrolled_row, new_station
from support.station_broker import station_broker

from birthmark.device.errors import AuthorityError, BirthmarkError, ConfigurationError
from birthmark.provisioning import audit, audit_check, profile
from birthmark.provisioning.backup import back_up
from birthmark.provisioning.cas import Ca, CaKind, put_ca
from birthmark.provisioning.checkup import gather
from birthmark.provisioning.crl_store import crl_number_counter, current_crl, successor
from birthmark.provisioning.crls import sign_and_store_crl
from birthmark.provisioning.delivery import Outcome
from birthmark.provisioning.gateway_settings import Gateway
from birthmark.provisioning.gateways import deliver
from birthmark.provisioning.issuing import issue_operator
from birthmark.provisioning.keyfile import write_key
from birthmark.provisioning.registry.model import State
from birthmark.provisioning.restore import ROWS_JUMP, Restored, merge_crls, read_crls, restore
from birthmark.provisioning.revocation import revoke
from birthmark.provisioning.settings_edit import add_gateway
from birthmark.provisioning.station import Station, utc_now

if TYPE_CHECKING:
    from pathlib import Path

    from birthmark.provisioning.crl_store import CrlSet
    from birthmark.provisioning.registry.model import Row

SECRET = b"the backup's own passphrase"
LOST = x509.ReasonFlags.key_compromise


def backed_up(station: Station, path: Path) -> Path:
    back_up(station, path, SECRET, cost_log2=2)
    return path


def brought_back(backup: Path, folder: Path, *crls: Path, clock: Clock | None = None) -> Restored:
    return restore(
        backup, folder, backup_passphrase=SECRET, passphrase=PASSPHRASE, crls=crls, clock=clock or utc_now
    )


def rows(station: Station) -> list[Row]:
    with station.registry.view() as view:
        return view.rows()


def deliver_to_all(station: Station, crl: CrlSet) -> list[Outcome]:
    gateways = Station.open(station.folder).settings.gateways
    deliveries = deliver(
        gateways,
        crl,
        station.cas,
        successor=partial(successor, station),
        anchors_path=station.folder / "root.pem",
        timeout_s=30,
    )
    return [delivery.outcome for delivery in deliveries]


def test_a_destroyed_station_goes_on_and_repeats_nothing(living: Station, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        enrolled_row(living, f"sensor-{number}")
    with station_broker(tmp_path / "gateway", living) as broker:
        crl_path = broker.folder / "crl.pem"
        add_gateway(living.settings_path, Gateway("localhost", crl_path=crl_path))
        revoke(living, "sensor-1", LOST)
        backup = backed_up(living, tmp_path / "backup.age")
        # What the backup does not know: a device made, two revocations, CRLs up to some number.
        late = enrolled_row(living, "late")
        issue_operator(living, "late-alice", tmp_path)
        revoke(living, "sensor-2", LOST)
        held = revoke(living, "late", LOST).crls
        assert deliver_to_all(living, held) == [Outcome.DONE]
        used_serials = {row.cert_serial for row in rows(living)}
        used_numbers = {row.number for row in rows(living)}
        lost_log = [entry["hash"] for entry in audit.read(living.registry.audit_path)]
        shutil.rmtree(living.folder)

        restored = brought_back(backup, tmp_path / "elsewhere")
        station = restored.station
        assert [(merged.source, merged.number, merged.newly) for merged in restored.merged] == [
            ("localhost", held.current.number, 2)
        ]
        assert restored.crls.cert_serials == held.cert_serials
        assert restored.crls.current.number > held.current.number
        assert restored.crls.current.this_update > held.current.this_update
        assert deliver_to_all(station, restored.crls) == [Outcome.DONE]
        fresh = [enrolled_row(station, f"fresh-{number}") for number in range(3)]
        fresh.append(issue_operator(station, "bob", tmp_path).row)
        assert not used_serials & {row.cert_serial for row in fresh}
        assert not used_numbers & {row.number for row in fresh}
        newer = revoke(station, "fresh-1", LOST).crls
        assert newer.cert_serials == {*held.cert_serials, fresh[1].cert_serial}
        assert deliver_to_all(station, newer) == [Outcome.DONE]
    with station.registry.view() as view:
        stand_in = view.by_cert_serial(late.cert_serial or 0)
        assert stand_in is not None
        assert stand_in.number not in used_numbers
        assert (stand_in.name, stand_in.state) == (f"lost-{late.cert_serial:x}", State.VOID)
        sensor = view.live_by_name("sensor-2")
        assert sensor is not None
        assert (sensor.state, sensor.revocation_reason) == (State.ATTESTED, LOST.value)
    entries = list(audit.read(station.registry.audit_path))
    assert not audit_check.check(station.registry).problems
    marked = next(entry for entry in entries if entry["action"] == "restore")
    forked = [entry["hash"] for entry in entries if entry["seq"] >= marked["seq"]]
    assert not set(forked) & set(lost_log), "the lost station's entries and ours cannot be told apart"
    assert stat.S_IMODE((station.key_path(station.cas.for_clients)).stat().st_mode) == 0o400
    assert stat.S_IMODE(station.folder.stat().st_mode) == 0o700


def test_a_gateway_that_is_reached_by_mqtt_gives_its_crl_back(living: Station, tmp_path: Path) -> None:
    operator = issue_operator(living, "alice", tmp_path)
    enrolled_row(living, "sensor-1")
    with station_broker(tmp_path / "gateway", living) as broker:
        gateway = Gateway("localhost", host="127.0.0.1", port=broker.port, operator_path=operator.key_path)
        add_gateway(living.settings_path, gateway)
        backup = backed_up(living, tmp_path / "backup.age")
        held = revoke(living, "sensor-1", LOST).crls
        assert deliver_to_all(living, held) == [Outcome.DONE]
        shutil.rmtree(living.folder)
        restored = brought_back(backup, tmp_path / "elsewhere")
        assert [(one.source, one.newly, one.cause) for one in restored.merged] == [("localhost", 1, "")]
        assert restored.crls.cert_serials == held.cert_serials
        assert deliver_to_all(restored.station, restored.crls) == [Outcome.DONE]


def test_a_backup_restored_twice_repeats_no_crl_number(living: Station, tmp_path: Path) -> None:
    backup = backed_up(living, tmp_path / "backup.age")
    clock = Clock(living.clock())
    first = brought_back(backup, tmp_path / "one", clock=clock)
    used = {first.crls.current.number, *(sign_and_store_crl(first.station).current.number for _ in range(5))}
    clock.advance(minutes=1)
    second = brought_back(backup, tmp_path / "two", clock=clock)
    assert second.crls.current.number > max(used)


def test_what_cannot_be_known_is_said_and_taken_over_later(
    birthmark: Command, living: Station, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIRTHMARK_BACKUP_PASSPHRASE", SECRET.decode())
    enrolled_row(living, "sensor-1")
    far = Gateway("far", host="far.example.com", operator_path=tmp_path / "alice.pem")
    for gateway in (far, Gateway("gone", crl_path=tmp_path / "unmounted" / "crl.pem")):
        add_gateway(living.settings_path, gateway)
    backup = backed_up(living, tmp_path / "backup.age")
    held = revoke(living, "sensor-1", LOST).crls
    copy = tmp_path / "far.crl"
    copy.write_bytes(held.current.der)  # a gateway keeps PEM or DER: both are read
    shutil.rmtree(living.folder)

    answer = birthmark("restore", backup, "--to", tmp_path / "to", "--json")
    assert answer.exit_code == 1
    (record,) = answer.records
    assert [merged["newly_revoked"] for merged in record["merged"]] == [0, 0]
    assert all(merged["cause"] for merged in record["merged"])
    warnings = [json.loads(line)["warning"] for line in answer.stderr.splitlines()]
    assert any("the operator's file for the gateway far is not here" in warning for warning in warnings)
    assert sum("holds is not known" in warning for warning in warnings) == 2

    later = Command(tmp_path / "to", birthmark._capsys)
    assert not later("show", "sensor-1", "--json").records[0]["revoked"]
    merged = later("restore", "--crl", copy, "--json")
    assert (merged.exit_code, merged.stderr) == (0, "")
    assert merged.records[0]["merged"][0]["newly_revoked"] == 1
    assert later("show", "sensor-1", "--json").records[0]["revoked"] == "keyCompromise"
    crl = current_crl(Station.open(tmp_path / "to"))
    assert crl is not None
    assert crl.cert_serials == held.cert_serials
    assert crl.current.number > record["crl_number"]
    again = later("restore", "--crl", copy)
    number, issuer = held.current.number, held.current.issuer
    assert f"CRL {number} of {issuer[:8]}, 0 revocations that were not known here" in again.stdout


def test_a_number_above_ours_is_taken_over(living: Station, tmp_path: Path) -> None:
    crl = sign_and_store_crl(living)
    backup = backed_up(living, tmp_path / "backup.age")
    with living.registry.transaction() as transaction:
        transaction.set_counter(crl_number_counter(crl.current.issuer), 1 << 62)
    high = sign_and_store_crl(living)
    assert high.current.number > crl.current.number
    restored = brought_back(backup, tmp_path / "to", high.path)
    assert restored.crls.current.number > high.current.number


def test_a_folder_with_something_in_it_is_refused_and_left_alone(living: Station, tmp_path: Path) -> None:
    backup = backed_up(living, tmp_path / "backup.age")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "mine").touch()
    with pytest.raises(ConfigurationError, match="there is something already"):
        brought_back(backup, tmp_path / "to")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["mine"]


def test_nothing_is_left_when_the_ca_cannot_be_unlocked_or_a_crl_is_foreign(
    living: Station, tmp_path: Path
) -> None:
    backup = backed_up(living, tmp_path / "backup.age")
    foreign = new_station(tmp_path / "other").crl_path
    attempts = {
        "the passphrase is wrong": (b"wrong", (), AuthorityError),
        "this station's CA did not sign it": (PASSPHRASE, (foreign,), ConfigurationError),
        "it is no CRL": (PASSPHRASE, (backup,), ConfigurationError),
        "No such file": (PASSPHRASE, (tmp_path / "none",), ConfigurationError),
    }
    for cause, (passphrase, crls, kind) in attempts.items():
        with pytest.raises(kind, match=cause):
            restore(backup, tmp_path / "to", backup_passphrase=SECRET, passphrase=passphrase, crls=crls)
        assert not list(tmp_path.glob("*to*"))
    with pytest.raises(ConfigurationError, match="did not sign it"):
        merge_crls(living, [foreign])


def test_keys_that_do_not_fit_their_certificate_are_refused(living: Station, tmp_path: Path) -> None:
    other = new_station(tmp_path / "other")
    key = living.key_path(living.cas.for_clients)
    key.unlink()
    shutil.copy(other.key_path(other.cas.for_clients), key)
    with pytest.raises(AuthorityError, match="do not belong together"):
        brought_back(backed_up(living, tmp_path / "backup.age"), tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_station_without_its_root_key_is_backed_up_and_restored(living: Station, tmp_path: Path) -> None:
    root_key = living.key_path(living.cas.roots[0])
    root_key.rename(tmp_path / "root.key.pem")
    restored = brought_back(backed_up(living, tmp_path / "backup.age"), tmp_path / "to")
    assert not restored.station.key_path(restored.station.cas.roots[0]).exists()
    assert issue_operator(restored.station, "alice", tmp_path).row.state is State.ATTESTED


def test_a_clock_that_stands_before_the_backup_stops_issuing(
    station: Station, tmp_path: Path, clock: Clock
) -> None:
    backup = backed_up(station, tmp_path / "backup.age")
    early = Clock(clock.now)
    early.advance(hours=-1)
    restored = brought_back(backup, tmp_path / "to", clock=early)
    with pytest.raises(AuthorityError, match="before the last issuance"):
        issue_operator(restored.station, "alice", tmp_path)
    early.advance(hours=2)
    assert issue_operator(restored.station, "bob", tmp_path).row.state is State.ATTESTED


def test_a_backup_of_before_a_clock_was_ahead_issues_at_once(
    station: Station, tmp_path: Path, clock: Clock
) -> None:
    """As docs/recovery.md says: nothing else brings a station back to the time as it is."""
    backup = backed_up(station, tmp_path / "backup.age")
    clock.advance(days=365)
    issue_operator(station, "alice", tmp_path)
    clock.advance(days=-364)
    with pytest.raises(AuthorityError, match="before the last issuance") as refused:
        issue_operator(station, "bob", tmp_path)
    assert "docs/recovery.md" in refused.value.hint
    restored = brought_back(backup, tmp_path / "to", clock=clock)
    assert issue_operator(restored.station, "bob", tmp_path).row.state is State.ATTESTED


def test_row_numbers_go_on_far_above(living: Station, tmp_path: Path) -> None:
    last = enrolled_row(living, "sensor-1").number
    restored = brought_back(backed_up(living, tmp_path / "backup.age"), tmp_path / "to")
    assert enrolled_row(restored.station, "sensor-2").number == last + ROWS_JUMP + 1


def test_a_crl_is_read_whole_or_not(living: Station, tmp_path: Path) -> None:
    enrolled_row(living, "sensor-1")
    path = tmp_path / "crl.der"
    crl = revoke(living, "sensor-1", LOST).crls
    path.write_bytes(crl.current.der)
    (known,) = read_crls(path, living.cas)
    assert (known.number, [entry[0] for entry in known.entries]) == (
        crl.current.number,
        list(crl.cert_serials),
    )
    for end in range(0, len(crl.current.der), 7):
        path.write_bytes(crl.current.der[:end])
        with pytest.raises(BirthmarkError, match="could not use the CRL"):
            read_crls(path, living.cas)


def test_it_needs_a_place_and_something_to_restore(birthmark: Command, tmp_path: Path) -> None:
    for words, cause in (((tmp_path / "x",), "no place is named"), ((), "no backup is named")):
        answer = birthmark("restore", *words)
        assert answer.exit_code == 2
        assert cause in answer.stderr


def test_a_certificate_that_is_not_known_is_revoked_by_its_serial_number(
    birthmark: Command, living: Station
) -> None:
    unknown = 0x5A0C9D8E7F60514233241506F7E8D9CA
    answer = birthmark("revoke", "--cert-serial", f"{unknown:x}", "--reason", "lost", "--json")
    assert answer.exit_code == 0
    assert answer.records[0]["revoked"] == f"lost-{unknown:x}"
    crls = current_crl(living)
    assert crls is not None
    assert crls.cert_serials == {unknown}
    again = birthmark("revoke", "--cert-serial", f"{unknown:X}", "--reason", "lost")
    assert "it was before" in again.stdout
    row = enrolled_row(living, "sensor-1")
    one = birthmark("revoke", "--cert-serial", f"{row.cert_serial:x}", "--reason", "superseded", "--json")
    assert one.records[0]["revoked"] == "sensor-1"
    assert len(rows(living)) == 2
    for wrong in ("5a", "0", f"{1 << 159:x}", "5a" * 30):
        refused = birthmark("revoke", "--cert-serial", wrong, "--reason", "lost")
        assert refused.exit_code == 6
        assert "no serial number of a station's" in refused.stderr
    for wrong in ("rubbish", f"-{unknown:x}", f"{unknown:x}_5a", " 5a", "0x", ""):
        refused = birthmark("revoke", f"--cert-serial={wrong}", "--reason", "lost")
        assert (refused.exit_code, "no serial number in hex" in refused.stderr) == (2, True)
    assert birthmark("revoke", "--reason", "lost").exit_code == 2
    assert len(rows(living)) == 2


def with_a_newer_ca(station: Station) -> tuple[Ca, Ca]:
    """Put a new issuing CA in charge of clients; return the old one and the new one."""
    old = station.cas.for_clients
    root = station.root_issuer(PASSPHRASE)
    key, now = generate_private_key(SECP256R1()), station.clock()
    certificate = profile.issuing_certificate(
        root, key.public_key(), organization="Acme", cert_serial=profile.new_cert_serial(os.urandom), now=now
    )
    new = Ca.made(CaKind.ISSUING, certificate, old.root, now, activated_at=now, clients=True)
    write_key(station.key_path(new), key, PASSPHRASE, CHEAP)
    with station.registry.transaction() as transaction:
        put_ca(transaction, replace(old, clients=False))
        put_ca(transaction, new)
    sign_and_store_crl(station)
    return old, new


def test_with_several_cas_each_goes_on_from_its_own_crl(living: Station, tmp_path: Path) -> None:
    enrolled_row(living, "of-the-old")
    old, new = with_a_newer_ca(living)
    enrolled_row(living, "of-the-new")
    backup = backed_up(living, tmp_path / "backup.age")
    late = enrolled_row(living, "late")
    for name in ("of-the-old", "of-the-new", "late"):
        held = revoke(living, name, LOST).crls
    copy = tmp_path / "gateway.crl.pem"
    copy.write_bytes(held.pem)
    shutil.rmtree(living.folder)

    restored = brought_back(backup, tmp_path / "to", copy)
    assert [merged.newly for merged in restored.merged] == [2, 1]
    before = {crl.issuer: crl for crl in held.crls}
    after = {crl.issuer: crl for crl in restored.crls.crls}
    assert before.keys() == after.keys() == {old.key_id, new.key_id}
    for key_id, crl in after.items():
        assert crl.cert_serials == before[key_id].cert_serials
        assert crl.number > before[key_id].number
        assert restored.station.authority_of(key_id).key_id == key_id
    with restored.station.registry.view() as view:
        row = view.by_cert_serial(late.cert_serial or 0)
    assert row is not None
    assert row.issuer == new.key_id
    assert gather(restored.station, timeout_s=None).census.rows == 3


def test_a_key_of_a_ca_that_only_signs_its_crl_is_checked_too(living: Station, tmp_path: Path) -> None:
    old, _ = with_a_newer_ca(living)
    living.key_path(old).unlink()
    with pytest.raises(AuthorityError, match="it is not there"):
        brought_back(backed_up(living, tmp_path / "backup.age"), tmp_path / "to")
    assert not (tmp_path / "to").exists()
