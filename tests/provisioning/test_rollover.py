"""The phases of a rollover: what each refuses, what it changes, and what two CAs mean for the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.hazmat.primitives.hashes import SHA256
from support.station import CHEAP, PASSPHRASE, enrolled_row, issue, keyed_row
from support.station_gateways import receipt_for

from birthmark.device.errors import AuthorityError
from birthmark.provisioning import audit
from birthmark.provisioning.cas import CaKind
from birthmark.provisioning.crls import sign_and_store_crl, up_to_date_crl
from birthmark.provisioning.delivery import Delivery, Outcome
from birthmark.provisioning.enrollment.bundles import BrokerAddress
from birthmark.provisioning.gateway_receipts import note_deliveries
from birthmark.provisioning.gateway_settings import Gateway
from birthmark.provisioning.issuing import issue_broker, issue_operator
from birthmark.provisioning.key_custody import give_up_key
from birthmark.provisioning.one_unit import journal_of
from birthmark.provisioning.revocation import lost_row, mark_revoked, revoke, revoke_certificate
from birthmark.provisioning.rollover import starting
from birthmark.provisioning.rollover.anchors import StationAnchors
from birthmark.provisioning.rollover.census import take_census
from birthmark.provisioning.rollover.phases import (
    RolloverRefusedError,
    activate,
    activate_for_brokers,
    close_old,
    retire_closed,
)
from birthmark.provisioning.rollover.starting import RootKey
from birthmark.provisioning.rollover_commands import status
from birthmark.provisioning.settings_edit import add_gateway
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from pathlib import Path

    from support.station import Clock

    from birthmark.provisioning.cas import Ca

LOST = x509.ReasonFlags.key_compromise


def start_issuing(station: Station, **root: object) -> Ca:
    held = RootKey(PASSPHRASE, **root)  # type: ignore[arg-type]
    return starting.start_issuing(station, lambda: held, derivation=CHEAP)


def start_root(station: Station) -> Ca:
    return starting.start_root(station, None, derivation=CHEAP)


def confirmed(station: Station, *but: str) -> None:
    """Note that the gateway has confirmed every CRL, but for those of some CAs."""
    crls = up_to_date_crl(station)
    receipts = [replace(receipt_for(crl.der), issuer=crl.issuer) for crl in crls.crls if crl.issuer not in but]
    delivery = Delivery("gateway-1", Outcome.DONE, "", tuple(receipts), but)
    with station.registry.transaction() as transaction:
        note_deliveries(transaction, [delivery], crls, station.clock())


def with_gateway(station: Station) -> Station:
    add_gateway(station.settings_path, Gateway("gateway-1", crl_path=station.folder / "gateway.crl"))
    return Station.open(station.folder, passphrase=PASSPHRASE, clock=station.clock)


def test_each_ca_s_crl_lists_what_that_ca_issued(station: Station) -> None:
    old = enrolled_row(station, "old")
    new_ca = start_issuing(station)
    activate(station, force=True)
    new = enrolled_row(station, "new")
    assert (old.issuer == new.issuer, new.issuer) == (False, new_ca.key_id)
    first = revoke(station, "old", LOST).crls
    assert [crl.cert_serials for crl in first.crls] == [frozenset(), {old.cert_serial}]
    second = revoke(station, "new", LOST).crls
    assert [crl.cert_serials for crl in second.crls] == [{new.cert_serial}, {old.cert_serial}]
    assert second.crls[1] == first.crls[1], "nothing changed for it"
    blocks = x509.load_pem_x509_crl(station.crl_path.read_bytes())
    assert blocks.is_signature_valid(station.issuing.public_key())  # type: ignore[arg-type]
    certificate = x509.load_der_x509_certificate(new.certificate_der or b"")
    certificate.verify_directly_issued_by(station.issuing)


def test_a_revocation_brings_the_other_ca_s_crl_up_to_date_as_well(station: Station) -> None:
    old = enrolled_row(station, "old")
    start_issuing(station)
    activate(station, force=True)
    new = enrolled_row(station, "new")
    with station.registry.transaction() as transaction:  # whoever did this was killed before the CRL
        transaction.update(old.changed(revoked_at=station.clock(), revocation_reason="superseded"))
    crls = revoke(station, "new", LOST).crls
    assert [crl.cert_serials for crl in crls.crls] == [{new.cert_serial}, {old.cert_serial}]


def test_what_has_no_ca_is_on_every_crl(station: Station) -> None:
    enrolled_row(station, "old")
    start_issuing(station)
    activate(station, force=True)
    unknown = 0x5A << 152
    assert [crl.cert_serials for crl in revoke_certificate(station, unknown, LOST).crls.crls] == [{unknown}] * 2
    with station.registry.transaction() as transaction:
        row = lost_row(transaction, unknown + 1)
    crls = revoke(station, row.name, LOST).crls
    assert [crl.cert_serials for crl in crls.crls] == [{unknown, unknown + 1}] * 2


def test_numbers_rise_for_each_ca_by_itself(station: Station) -> None:
    for _ in range(3):
        sign_and_store_crl(station)
    start_issuing(station)
    crls = up_to_date_crl(station)
    assert {crl.number for crl in crls.crls} == {4, 1}


def test_starting_again_makes_nothing_twice(station: Station) -> None:
    first = start_issuing(station)
    assert start_issuing(station) == first
    assert len(list(station.cas)) == 3
    with pytest.raises(RolloverRefusedError, match="an issuing CA is being replaced"):
        start_root(station)


def test_a_root_s_key_that_is_away_or_locked(station: Station, tmp_path: Path) -> None:
    away = tmp_path / "safe.pem"
    station.key_path(station.cas.roots[0]).rename(away)
    with pytest.raises(AuthorityError, match="not there") as missing:
        start_issuing(station)
    assert "--root-key" in missing.value.hint
    with pytest.raises(AuthorityError, match="passphrase is wrong"):
        starting.start_issuing(station, lambda: RootKey(b"wrong", away), derivation=CHEAP)
    assert len(list(station.cas)) == 2
    assert start_issuing(station, path=away).root == station.cas.roots[0].key_id


def test_nothing_is_activated_that_a_gateway_would_turn_away(station: Station) -> None:
    new = start_issuing(station)
    with pytest.raises(RolloverRefusedError, match="no gateway is configured"):
        activate(station)
    station = with_gateway(station)
    with pytest.raises(RolloverRefusedError, match="gateway-1 would turn away"):
        activate(station)
    confirmed(station, new.key_id)
    with pytest.raises(RolloverRefusedError, match="gateway-1 would turn away"):
        activate(station)
    confirmed(station)
    assert activate(station).phase == "current"
    with pytest.raises(RolloverRefusedError, match="none was started"):
        activate(station)


def test_a_row_that_was_keyed_before_is_signed_by_the_ca_of_then(station: Station) -> None:
    row = keyed_row(station, "sensor-1")
    start_issuing(station)
    activate(station, force=True)
    old = station.cas.get(row.issuer).certificate
    x509.load_der_x509_certificate(issue(station, row)).verify_directly_issued_by(old)
    with pytest.raises(AuthorityError, match="is not the issuing CA's"):
        station.authority.issue_device(row, now=station.clock())


def test_a_lock_opens_to_the_ca_that_its_device_was_flashed_under(station: Station) -> None:
    flashed = enrolled_row(station, "sensor-1")
    start_issuing(station)
    activate(station, force=True)
    journal = journal_of(station, BrokerAddress("localhost", 8883))
    assert flashed.txn is not None
    signer_sha256, signature = journal.sign_unlock(flashed, flashed.txn, b"transcript")
    old = station.cas.get(flashed.issuer).certificate
    assert signer_sha256 == old.fingerprint(SHA256())
    old.public_key().verify(signature, b"transcript", ECDSA(SHA256()))  # type: ignore[union-attr, call-arg, arg-type]


def test_retiring_is_refused_while_somebody_goes_by_it(station: Station) -> None:
    for number in range(7):
        enrolled_row(station, f"sensor-{number}")
    start_issuing(station)
    with pytest.raises(RolloverRefusedError, match="there is none"):
        close_old(station, CaKind.ISSUING)
    activate(station, force=True)
    with pytest.raises(RolloverRefusedError, match=r"7 devices still go by it: sensor-0.*and 2 more"):
        close_old(station, CaKind.ISSUING)
    told = {record["phase"]: record.get("used_by") for record in status(station)}
    assert told == {"trusted": None, "current": None, "old": [f"sensor-{number}" for number in range(7)]}
    for number in range(6):
        with station.registry.transaction() as transaction:
            row = transaction.named(f"sensor-{number}")[0]
            mark_revoked(transaction, row, x509.ReasonFlags.superseded, word="test", now=station.clock())
    with pytest.raises(RolloverRefusedError, match="1 device still goes by it: sensor-6"):
        close_old(station, CaKind.ISSUING)
    with station.registry.view() as view:
        assert len(view.revoked()) == 6


def test_the_last_crl_lists_all_and_lasts_as_long_as_its_ca(station: Station, clock: Clock) -> None:
    row = enrolled_row(station, "sensor-1")
    station = with_gateway(station)
    start_issuing(station)
    confirmed(station)
    activate(station)
    closed = close_old(station, CaKind.ISSUING, force=True)
    confirmed_crl = up_to_date_crl(station)
    with pytest.raises(RolloverRefusedError, match="not confirmed by gateway-1"):
        retire_closed(station, closed)
    last = confirmed_crl.crls[1]
    assert last.cert_serials == {row.cert_serial}
    assert last.next_update == closed[0].certificate.not_valid_after_utc
    clock.advance(days=400)
    assert up_to_date_crl(station).crls[1] == last, "nothing more will be said of it"
    confirmed(station)
    (retired,) = retire_closed(station, closed)
    assert retired.phase == "retired"
    crls = sign_and_store_crl(station)
    assert [crl.issuer for crl in crls.crls] == [station.cas.for_clients.key_id]
    station.publish_certificates()
    issuing = x509.load_pem_x509_certificates((station.folder / "issuing.pem").read_bytes())
    assert issuing == [station.issuing]


def test_a_closed_ca_signs_no_certificate(station: Station) -> None:
    row = keyed_row(station, "late")
    start_issuing(station)
    activate(station, force=True)
    close_old(station, CaKind.ISSUING, force=True)
    with pytest.raises(AuthorityError):
        issue(station, row)
    with station.registry.view() as view:
        assert [one.number for one in view.revoked()] == [row.number], "it may have been signed before a crash"


def test_brokers_change_to_a_new_root_last(station: Station, tmp_path: Path) -> None:
    old_root = station.cas.for_clients.root
    device = enrolled_row(station, "sensor-1")
    issue_operator(station, "alice", tmp_path)
    new = start_root(station)
    assert activate(station, force=True).phase == "current for devices"
    broker = issue_broker(station, ["gateway-1"], tmp_path / "gateway-1")
    assert station.cas.get(broker.row.issuer).root == old_root
    flashed = enrolled_row(station, "sensor-2")
    assert flashed.anchors.split(" ") == [new.root, old_root], "both, from the new one's start on"
    with pytest.raises(RolloverRefusedError, match="2 do not hold its root yet: alice, sensor-1"):
        activate_for_brokers(station)
    with pytest.raises(RolloverRefusedError, match="there is none"):
        close_old(station, CaKind.ROOT)
    issue_operator(station, "alice", tmp_path, renew=True)
    assert len(x509.load_pem_x509_certificates((tmp_path / "ca.pem").read_bytes())) == 2
    with station.registry.transaction() as transaction:
        transaction.update(device.changed(anchors=f"{new.root} {old_root}"))
    assert activate_for_brokers(station).phase == "current"
    renewed = issue_broker(station, ["gateway-1"], tmp_path / "gateway-1", renew=True)
    assert renewed.row.issuer == new.key_id
    with pytest.raises(RolloverRefusedError, match="1 device still goes by it: sensor-1"):
        close_old(station, CaKind.ROOT)


def test_a_ca_whose_key_is_lost_vouches_for_no_anchors(station: Station) -> None:
    row = enrolled_row(station, "sensor-1")
    (old_root,) = (ca for ca in station.cas if ca.kind is CaKind.ROOT)
    lost, other = station.cas.for_clients, start_issuing(station)
    activate(station, force=True)
    give_up_key(station, lost.short)
    start_root(station)
    activate(station, force=True)
    assert [ca.key_id for ca in station.cas.issuing[1:]] == [lost.key_id, other.key_id], "the lost one comes first"

    held = x509.load_der_x509_certificate(old_root.certificate_der).fingerprint(SHA256())
    pending = StationAnchors(station).pending_anchors(row, [held])

    assert pending is not None
    assert pending.signer_der == other.certificate_der


def test_anchors_are_vouched_for_by_a_ca_that_the_device_trusts(station: Station) -> None:
    row = enrolled_row(station, "sensor-1")
    anchors = StationAnchors(station)
    (old_root,) = (ca for ca in station.cas if ca.kind is CaKind.ROOT)
    old_issuing = station.cas.for_clients

    def sha256(ca: Ca) -> bytes:
        return x509.load_der_x509_certificate(ca.certificate_der).fingerprint(SHA256())

    assert anchors.pending_anchors(row, [sha256(old_root)]) is None
    new = start_root(station)
    activate(station, force=True)
    new_root = station.cas.get(new.root)
    pending = anchors.pending_anchors(row, [sha256(old_root)])
    assert pending is not None
    assert pending.anchors_der == (new_root.certificate_der, old_root.certificate_der)
    assert pending.signer_der == old_issuing.certificate_der
    assert anchors.pending_anchors(row, [sha256(old_root), sha256(new_root)]) is None
    assert anchors.pending_anchors(row, [bytes(32)]) is None, "it trusts nobody of ours"


def test_what_was_done_is_in_the_audit_log(station: Station) -> None:
    start_root(station)
    activate(station, force=True)
    activate_for_brokers(station)
    closed = close_old(station, CaKind.ROOT)
    retire_closed(station, closed)
    actions = [entry["action"] for entry in audit.read(station.registry.audit_path)]
    phases = [action for action in actions if action.startswith("ca-")]
    counts = {action: phases.count(action) for action in phases}
    assert counts == {"ca-start": 2, "ca-activate": 1, "ca-activate-brokers": 1, "ca-close": 2, "ca-retire": 2}


def test_what_a_revoked_certificate_has_replaced_is_not_in_use(station: Station) -> None:
    old, new, alone = (enrolled_row(station, f"sensor-{number}") for number in (1, 2, 3))
    with station.registry.transaction() as transaction:
        old = transaction.update(old.changed(replaced_by=new.number))
        transaction.update(new.changed(revoked_at=station.clock(), revocation_reason="superseded"))
    with station.registry.view() as view:
        census = take_census(station, view)
    assert census.in_use == {alone.issuer: [alone]}
    assert census.still_valid == {old.issuer: [old]}
