"""Revocations and the CRLs that carry them."""

from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography import x509
from support.station import NOON, PASSPHRASE, Clock, enrolled_row, keyed_row

from birthmark.device.errors import AuthorityError, RegistryError
from birthmark.provisioning import audit, crls
from birthmark.provisioning.crl_store import current_crl
from birthmark.provisioning.crls import (
    clock_trouble,
    sign_and_store_crl,
    sign_root_crl,
    stale_crls,
    up_to_date_crl,
)
from birthmark.provisioning.issuing import issue_broker, issue_operator
from birthmark.provisioning.registry.model import Kind, State
from birthmark.provisioning.revocation import REASONS, parse_reason, revoke
from birthmark.provisioning.station import Station

LOST = x509.ReasonFlags.key_compromise


def actions(station: Station) -> list[tuple[str, str]]:
    return [(entry["action"], entry["subject"]) for entry in audit.read(station.registry.audit_path)]


def test_a_revoked_device_is_on_the_next_crl(station: Station, clock: Clock) -> None:
    row, other = enrolled_row(station, "sensor-1"), enrolled_row(station, "sensor-2")
    first = current_crl(station)
    clock.advance(minutes=5)
    done = revoke(station, "SENSOR-1", LOST, word="lost")
    assert done.newly == 1
    assert done.crls.cert_serials == {row.cert_serial}
    assert first is not None
    assert done.crls.current.number == first.current.number + 1
    assert done.crls.current.this_update == clock.now - timedelta(hours=1)
    assert done.crls.next_update == clock.now + timedelta(days=30)
    crl = x509.load_pem_x509_crl(station.crl_path.read_bytes())
    entry = crl.get_revoked_certificate_by_serial_number(row.cert_serial or 0)
    assert entry is not None
    assert entry.revocation_date_utc == clock.now
    assert crl.get_revoked_certificate_by_serial_number(other.cert_serial or 0) is None
    with station.registry.view() as view:
        stored = view.row(row.number)
    assert stored is not None
    assert (stored.revoked_at, stored.revocation_reason, stored.state) == (
        clock.now,
        "keyCompromise",
        State.ATTESTED,
    )
    assert actions(station)[-2:] == [("revoke", "sensor-1"), ("crl", "issuing-ca")]


def test_revoking_again_changes_nothing(station: Station, clock: Clock) -> None:
    enrolled_row(station, "sensor-1")
    first = revoke(station, "sensor-1", LOST)
    before = actions(station)
    clock.advance(days=1)
    again = revoke(station, "sensor-1", x509.ReasonFlags.superseded)
    assert again.newly == 0
    assert again.crls == first.crls
    assert again.rows[0].revocation_reason == "keyCompromise"
    assert actions(station) == before


def test_revoking_again_needs_no_passphrase(station: Station) -> None:
    enrolled_row(station, "sensor-1")
    first = revoke(station, "sensor-1", LOST)
    locked = Station.open(station.folder, passphrase=b"wrong", clock=station.clock)
    assert revoke(locked, "sensor-1", LOST).crls == first.crls


def test_revoking_again_mends_a_crl_that_is_gone_or_damaged_or_old(station: Station, clock: Clock) -> None:
    row = enrolled_row(station, "sensor-1")
    number = revoke(station, "sensor-1", LOST).crls.current.number
    for damage in (b"", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"):
        station.crl_path.write_bytes(damage)
        crl = revoke(station, "sensor-1", LOST).crls
        number += 1
        assert crl.current.number == number
        assert crl.cert_serials == {row.cert_serial}
    station.crl_path.unlink()
    assert revoke(station, "sensor-1", LOST).crls.current.number == number + 1
    clock.advance(days=31)
    assert revoke(station, "sensor-1", LOST).crls.next_update > clock.now


def test_a_wrong_passphrase_revokes_nothing(station: Station) -> None:
    enrolled_row(station, "sensor-1")
    before = station.crl_path.read_bytes()
    locked = Station.open(station.folder, passphrase=b"wrong", clock=station.clock)
    with pytest.raises(AuthorityError, match="passphrase"):
        revoke(locked, "sensor-1", LOST)
    with station.registry.view() as view:
        assert view.revoked() == []
    assert station.crl_path.read_bytes() == before


def test_crls_rise_strictly_even_within_a_second(station: Station) -> None:
    crls = [sign_and_store_crl(station) for _ in range(4)]
    assert [crl.current.number for crl in crls] == [2, 3, 4, 5]
    updates = [crl.current.this_update for crl in crls]
    assert updates == sorted(set(updates))
    assert current_crl(station) == crls[-1]
    assert updates[0] == NOON - timedelta(hours=1) + timedelta(seconds=1)


def test_a_clock_that_went_far_back_stops_no_revocation(station: Station, clock: Clock) -> None:
    enrolled_row(station, "sensor-1")
    clock.advance(days=10)
    number = sign_and_store_crl(station).current.number
    assert clock_trouble(station) == ""
    clock.advance(days=-9)
    done = revoke(station, "sensor-1", LOST)
    assert done.newly == 1
    assert done.crls.current.number == number + 1
    assert done.crls.current.this_update == clock.now - timedelta(hours=1)
    assert "clock" in clock_trouble(station)
    clock.advance(days=9)
    assert sign_and_store_crl(station).current.number == number + 2
    assert clock_trouble(station) == ""


def test_a_revocation_stands_though_no_crl_can_be_signed(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = enrolled_row(station, "sensor-1")

    def fails(*_: object) -> None:
        raise AuthorityError("could not sign a CRL")

    with monkeypatch.context() as broken:
        broken.setattr(crls, "_plan", fails)
        with pytest.raises(AuthorityError):
            revoke(station, "sensor-1", LOST)
    with station.registry.view() as view:
        assert [revoked.number for revoked in view.revoked()] == [row.number]
    assert row.cert_serial in sign_and_store_crl(station).cert_serials


def test_more_crls_in_an_hour_than_it_has_seconds(station: Station, clock: Clock) -> None:
    sign_and_store_crl(station)
    with station.registry.transaction() as transaction:
        transaction.set_counter(f"crl_this_update {station.authority.key_id}", int(clock.now.timestamp()))
    one, two = sign_and_store_crl(station), sign_and_store_crl(station)
    assert (one.current.this_update, two.current.this_update) == (clock.now, clock.now)
    assert two.current.number == one.current.number + 1
    assert clock_trouble(station) == ""


def test_every_certificate_of_a_name_is_revoked(station: Station) -> None:
    old = enrolled_row(station, "sensor-1")
    with station.registry.transaction() as transaction:
        new = transaction.insert(
            kind=Kind.DEVICE, name="sensor-1", role="sensor", hwid=old.hwid, txn=bytes(16), replaces=old.number
        )
        new = transaction.update(
            new.changed(
                state=State.KEYED, public_key_der=b"other", cert_serial=station.authority.new_cert_serial()
            )
        )
    done = revoke(station, "sensor-1", LOST)
    assert done.newly == 2
    assert done.crls.cert_serials == {old.cert_serial, new.cert_serial}


def test_an_unfinished_enrollment_is_void_with_its_revocation(station: Station) -> None:
    row = keyed_row(station, "sensor-1")  # its certificate may have been signed just before a crash
    revoke(station, "sensor-1", LOST, word="lost")
    with station.registry.view() as view:
        stored = view.row(row.number)
        assert view.live_by_name("sensor-1") is None
    assert stored is not None
    assert (stored.state, stored.void_reason) == (State.VOID, "revoked: lost")


def test_a_revoked_service_gives_up_its_name_and_a_device_does_not(station: Station) -> None:
    issue_operator(station, "alice", station.folder.parent / "out")
    enrolled_row(station, "sensor-1")
    revoke(station, "alice", LOST)
    revoke(station, "sensor-1", LOST)
    with station.registry.view() as view:
        assert view.live_by_name("alice") is None
        assert view.live_by_name("sensor-1") is not None
    issue_operator(station, "alice", station.folder.parent / "again")


def test_unknown_and_uncertified_names(station: Station) -> None:
    with pytest.raises(RegistryError, match="no such identity"):
        revoke(station, "nobody", LOST)
    with pytest.raises(RegistryError, match="no such identity") as caught:
        revoke(station, "\x1b[31m", LOST)
    assert caught.value.message.isprintable()
    with station.registry.transaction() as transaction:
        transaction.insert(kind=Kind.DEVICE, name="sensor-1", role="sensor", hwid=b"1234", txn=bytes(16))
    with pytest.raises(RegistryError, match="no certificate yet"):
        revoke(station, "sensor-1", LOST)


def test_a_gateway_is_given_a_crl_with_half_of_its_life_left(station: Station, clock: Clock) -> None:
    first = up_to_date_crl(station)
    clock.advance(days=14)
    assert up_to_date_crl(station) == first
    clock.advance(days=2)
    issue_broker(station, ["localhost"], station.folder.parent / "gateway")
    given = x509.load_pem_x509_crl((station.folder.parent / "gateway" / "crl.pem").read_bytes())
    assert given.next_update_utc == clock.now + timedelta(days=30)
    row = enrolled_row(station, "sensor-1")
    with station.registry.transaction() as transaction:
        transaction.update(row.changed(revoked_at=station.clock(), revocation_reason="superseded"))
    assert up_to_date_crl(station).cert_serials == {row.cert_serial}


def test_a_revocation_that_was_not_signed_is_on_the_next_crl(station: Station) -> None:
    row = enrolled_row(station, "sensor-1")
    with station.registry.transaction() as transaction:
        transaction.update(row.changed(revoked_at=station.clock(), revocation_reason="superseded"))
    assert sign_and_store_crl(station).cert_serials == {row.cert_serial}


def test_a_crl_of_another_ca_is_not_taken_for_ours(station: Station, living: Station) -> None:
    station.crl_path.write_bytes(living.crl_path.read_bytes())
    assert current_crl(station) is None


@pytest.mark.parametrize("word", [*REASONS, "LOST", "keycompromise"])
def test_every_reason_is_one_of_rfc_5280(station: Station, word: str) -> None:
    reason = parse_reason(word)
    assert reason is not None
    enrolled_row(station, "sensor-1")
    crl = revoke(station, "sensor-1", reason, word=word).crls
    entry = next(iter(x509.load_der_x509_crl(crl.current.der)))
    found = [each.value.reason for each in entry.extensions if isinstance(each.value, x509.CRLReason)]
    assert found == ([] if reason is x509.ReasonFlags.unspecified else [reason])


@pytest.mark.parametrize("word", ["", "los", "certificateHold", "removeFromCRL", "cACompromise"])
def test_other_reasons_are_none(word: str) -> None:
    assert parse_reason(word) is None


def test_the_roots_crl(station: Station, clock: Clock) -> None:
    key_path = station.folder.parent / "safe.pem"
    station.key_path(station.cas.roots[0]).rename(key_path)
    with pytest.raises(AuthorityError, match=r"root CA's key .* not there"):
        station.root_issuer(PASSPHRASE)
    clock.advance(days=300)
    sign_root_crl(station, station.root_issuer(PASSPHRASE, key_path))
    crl = x509.load_pem_x509_crl((station.folder / "root-crl.pem").read_bytes())
    assert crl.issuer == station.root.subject
    assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 2
    assert crl.next_update_utc == clock.now + timedelta(days=365)


def test_leftovers_of_a_killed_signing_are_removed(station: Station) -> None:
    leftover = station.folder / ".crl.pem.0badf00d.part"
    leftover.write_bytes(b"half")
    sign_and_store_crl(station)
    assert not leftover.exists()


def test_expired_entries_leave_the_crl_after_their_margin(station: Station, clock: Clock) -> None:
    row, other = enrolled_row(station, "sensor-1"), enrolled_row(station, "sensor-2")
    revoke(station, "sensor-1", LOST)
    revoke(station, "sensor-2", LOST)
    assert row.not_after is not None
    both = {row.cert_serial, other.cert_serial}
    clock.now = row.not_after + timedelta(days=89)
    assert sign_and_store_crl(station).cert_serials == both, "a gateway may still renew it"
    clock.advance(days=2)
    assert sign_and_store_crl(station).cert_serials == set()
    assert sign_and_store_crl(station).cert_serials == set(), "nor does it come back"
    assert stale_crls(station)[0] == []


def test_an_expired_entry_was_on_a_crl_issued_after_its_end(station: Station, clock: Clock) -> None:
    row = enrolled_row(station, "sensor-1")
    revoke(station, "sensor-1", LOST)
    assert row.not_after is not None
    clock.now = row.not_after + timedelta(days=400)  # the station was off for long
    assert sign_and_store_crl(station).cert_serials == {row.cert_serial}
    assert sign_and_store_crl(station).cert_serials == set()


def test_what_is_revoked_after_its_end_is_on_a_crl_as_well(station: Station, clock: Clock) -> None:
    row = enrolled_row(station, "sensor-1")
    assert row.not_after is not None
    clock.now = row.not_after + timedelta(days=200)
    sign_and_store_crl(station)
    clock.advance(days=1)
    assert revoke(station, "sensor-1", LOST).crls.cert_serials == {row.cert_serial}
    clock.advance(days=1)
    assert sign_and_store_crl(station).cert_serials == {row.cert_serial}
    clock.advance(days=1)
    assert sign_and_store_crl(station).cert_serials == set()


def test_a_clock_that_is_wrong_for_once_drops_nothing_for_good(station: Station, clock: Clock) -> None:
    row = enrolled_row(station, "sensor-1")
    revoke(station, "sensor-1", LOST)
    then = clock.now
    assert row.not_after is not None
    clock.now = row.not_after + timedelta(days=400)
    for _ in range(2):
        sign_and_store_crl(station)
    clock.now = then + timedelta(days=1)
    assert sign_and_store_crl(station).cert_serials == {row.cert_serial}
