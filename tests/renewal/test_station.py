"""What the station grants and refuses in a renewal, and what the registry holds after it."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as rsa_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from support.renewing import PaperDevice, answer, csr, issued, new_key, renewed, sha256
from support.station import CHEAP, Clock

from birthmark.device.clock import Moment
from birthmark.device.errors import AuthorityError
from birthmark.device.identity import DeviceId
from birthmark.device.link.transcript import verify
from birthmark.device.renewal.anchors import verified_anchors
from birthmark.device.renewal.proofs import answer_transcript
from birthmark.provisioning import audit
from birthmark.provisioning.authority import Authority
from birthmark.provisioning.registry.model import State
from birthmark.provisioning.renewal import Asked, Renewals, _prover, open_renewals
from birthmark.provisioning.retirement import next_retirement_at, retire_due
from birthmark.provisioning.revocation import revoke
from birthmark.provisioning.rollover.anchors import PendingAnchors
from birthmark.provisioning.rollover.phases import activate
from birthmark.provisioning.rollover.starting import start_root
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from collections.abc import Sequence

    from birthmark.device.renewal.messages import RenewalAnswer
    from birthmark.provisioning.registry.interface import Transaction
    from birthmark.provisioning.registry.model import Row


def rows(station: Station, name: str = "sensor-17") -> list[Row]:
    with station.registry.view() as view:
        return view.named(name)


def live(station: Station) -> Row:
    with station.registry.view() as view:
        row = view.live_by_name("sensor-17")
    assert row is not None
    return row


def test_a_device_gets_a_certificate_for_its_new_key(station: Station, device: PaperDevice) -> None:
    asked = device.renew()
    answered = answer(station, asked)
    leaf = x509.load_der_x509_certificate(answered.leaf_der)
    assert answered.nonce == asked.request.nonce
    assert answered.chain_der == (station.authority.issuing_der,)
    assert leaf.public_key() == device.new_key.public_key()
    assert leaf.subject == x509.load_der_x509_certificate(device.leaf_der).subject
    leaf.verify_directly_issued_by(station.issuing)
    old, new = rows(station)
    assert (new.state, new.renews, new.hwid, new.txn) == (State.ISSUED, old.number, old.hwid, old.txn)
    assert new.bundle_sha256 == old.bundle_sha256, "HELLO shows the bundle of the enrollment"
    assert (old, live(station)) == (device.row, device.row), "until it is confirmed the old one stands as it was"


def test_a_confirmation_makes_the_new_row_stand_and_the_old_one_due(
    station: Station, device: PaperDevice, clock: Clock
) -> None:
    leaf_der = renewed(station, device)
    old, new = rows(station)
    assert (new.state, new.certificate_der, live(station)) == (State.ATTESTED, leaf_der, new)
    assert (old.state, old.replaced_by, old.is_revoked) == (State.ATTESTED, new.number, False)
    with station.registry.view() as view:
        assert next_retirement_at(view) == clock.now + timedelta(hours=24)
    clock.advance(hours=23)
    assert retire_due(station) == 0
    clock.advance(hours=1)
    assert retire_due(station) == 1
    assert retire_due(station) == 0
    old, new = rows(station)
    assert (old.revocation_reason, old.state, new.is_revoked) == ("superseded", State.ATTESTED, False)
    actions = [entry["action"] for entry in audit.read(station.registry.audit_path)]
    assert actions[-3:] == ["renew", "renewed", "revoke"]


def test_the_same_request_again_gets_the_same_certificate(station: Station, device: PaperDevice) -> None:
    first = answer(station, device.renew())
    again = answer(station, device.renew())
    assert first.leaf_der == again.leaf_der
    assert answer(station, device.confirm(first.leaf_der)).outcome == "confirmed"
    late = answer(station, device.renew())
    assert late.leaf_der == first.leaf_der, "its answer was lost: it was confirmed already"
    assert answer(station, device.confirm(first.leaf_der)).outcome == "confirmed"
    assert len(rows(station)) == 2


def test_a_row_that_was_keyed_when_the_service_died_is_signed_under_its_number(
    station: Station, device: PaperDevice
) -> None:
    renewals = Renewals(station)
    asked = device.renew()
    with station.registry.transaction() as transaction:
        row = renewals._keyed(transaction, asked, _prover(transaction, asked), station.authority)
    leaf = x509.load_der_x509_certificate(answer(station, device.renew()).leaf_der)
    assert leaf.serial_number == row.cert_serial
    assert len(rows(station)) == 2


def test_another_key_takes_the_place_of_one_that_was_never_confirmed(
    station: Station, device: PaperDevice
) -> None:
    lost = issued(station, device)
    device.new_key = new_key()
    leaf_der = issued(station, device)
    old, first, second = rows(station)
    assert (first.state, first.is_revoked, first.certificate_der) == (State.VOID, True, lost)
    assert second.state is State.ISSUED
    with station.registry.view() as view:
        assert open_renewals(view, old) == [second]
    assert answer(station, device.confirm(lost)).outcome == "refused"
    assert answer(station, device.confirm(leaf_der)).outcome == "confirmed"


def test_a_renewed_certificate_is_renewed_in_its_turn(station: Station, device: PaperDevice) -> None:
    renewed(station, device)
    renewed(station, device)
    first, second, third = rows(station)
    assert (first.replaced_by, second.replaced_by) == (second.number, third.number)
    assert live(station) == third
    assert len({row.cert_serial for row in (first, second, third)}) == 3


OTHER = DeviceId("sensor-18")


def wrong_requests(device: PaperDevice, other: PaperDevice) -> dict[str, tuple[Asked, str]]:
    good = device.renew()
    p384, rsa = generate_private_key(SECP384R1()), rsa_key(65537, 2048)
    tail = (x509.NameAttribute(NameOID.COMMON_NAME, "sensor-18"),)
    broken = bytearray(good.request.csr_der)
    broken[-1] ^= 1
    return {
        "on another's topic": (replace(good, device_id=OTHER), "not one of this device's"),
        "nobody's topic": (replace(good, device_id=DeviceId("nobody")), "not one of this device's"),
        "another's certificate": (device.renew(leaf_sha256=sha256(other.leaf_der)), "not one of this device's"),
        "signed by the new key": (device.renew(signer=device.new_key), "not signed by the key in use"),
        "signed by another's key": (device.renew(signer=other.key), "not signed by the key in use"),
        "another request below the signature": (
            replace(good, request=good.request.changed(csr_der=csr("sensor-17", new_key()))),
            "not signed by the key in use",
        ),
        "another nonce": (device.renew(nonce=b"n" * 16), "not signed by the key in use"),
        "other anchors": (device.renew(anchors_sha256=(b"a" * 32,)), "not signed by the key in use"),
        "a request for another name": (device.renew(csr_der=csr("sensor-18", new_key())), "subject"),
        "a request for two names": (device.renew(csr_der=csr("sensor-17", new_key(), more=tail)), "subject"),
        "a P-384 key": (device.renew(csr_der=csr("sensor-17", p384)), "not on P-256"),
        "an RSA key": (device.renew(csr_der=csr("sensor-17", rsa)), "512|not on P-256"),
        "a broken self-signature": (device.renew(csr_der=bytes(broken)), "self-signature|cannot be read"),
        "no request": (device.renew(csr_der=b"junk"), "cannot be read"),
        "the key in use once more": (device.renew(csr_der=csr("sensor-17", device.key)), "used before"),
        "another's key": (device.renew(csr_der=csr("sensor-17", other.key)), "used before"),
    }


@pytest.mark.parametrize(
    "which",
    [
        "on another's topic",
        "nobody's topic",
        "another's certificate",
        "signed by the new key",
        "signed by another's key",
        "another request below the signature",
        "another nonce",
        "other anchors",
        "a request for another name",
        "a request for two names",
        "a P-384 key",
        "an RSA key",
        "a broken self-signature",
        "no request",
        "the key in use once more",
        "another's key",
    ],
)
def test_nothing_is_signed_for(which: str, station: Station, device: PaperDevice) -> None:
    other = PaperDevice.made(station, "sensor-18")
    before = rows(station) + rows(station, "sensor-18")
    asked, cause = wrong_requests(device, other)[which]
    (answered,) = Renewals(station).answer([asked])
    assert answered.outcome == "refused"
    assert re.search(cause, answered.reason), answered.reason
    assert rows(station) + rows(station, "sensor-18") == before


def test_one_that_is_refused_spoils_nothing_for_the_others(station: Station, device: PaperDevice) -> None:
    others = [PaperDevice.made(station, f"other-{number}") for number in range(3)]
    asked = [others[0].renew(), device.renew(signer=device.new_key), others[1].renew(), others[2].renew()]
    assert [answered.outcome for answered in Renewals(station).answer(asked)] == [
        "issued",
        "refused",
        "issued",
        "issued",
    ]


def test_a_refusal_whose_group_failed_is_on_record_when_it_comes_again(
    station: Station, device: PaperDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = PaperDevice.made(station, "other")
    forged = device.renew(signer=device.new_key)
    renewals = Renewals(station)
    with monkeypatch.context() as defective:
        defective.setattr(renewals, "_keyed", lambda *_: int("a defect"))
        with pytest.raises(ValueError, match="a defect"):
            renewals.answer([forged, other.renew()])
    renewals.answer([forged])
    renewals.answer([forged])
    refusals = [entry for entry in audit.read(station.registry.audit_path) if entry["action"] == "refuse"]
    assert [entry["subject"] for entry in refusals] == [str(device.device_id)]


def test_the_same_device_twice_in_one_group_gets_one_certificate(station: Station, device: PaperDevice) -> None:
    first, again = Renewals(station).answer([device.renew(), device.renew()])
    assert first.leaf_der == again.leaf_der != b""


def test_two_keys_of_one_device_in_a_group_spoil_nothing_for_the_others(
    station: Station, device: PaperDevice
) -> None:
    other = PaperDevice.made(station, "sensor-18")
    first = device.renew()
    device.new_key = new_key()
    given_up, granted, others = Renewals(station).answer([first, device.renew(), other.renew()])
    assert (given_up.outcome, given_up.retry) == ("refused", True)
    assert is_sealed(given_up, station, device, device.leaf_der), "its device need not ask again with that key"
    assert (granted.outcome, others.outcome) == ("issued", "issued")
    leaf = x509.load_der_x509_certificate(granted.leaf_der)
    assert leaf.public_key() == device.new_key.public_key()
    assert [row.state for row in rows(station)] == [State.ATTESTED, State.VOID, State.ISSUED]


def test_what_another_service_has_signed_meanwhile_is_given_and_no_trouble(
    station: Station, device: PaperDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, sign, faster = PaperDevice.made(station, "sensor-18"), Authority.issue_device, list[bytes]()

    def late(authority: Authority, row: Row, *, now: datetime) -> bytes:
        if not faster and row.name == "sensor-17":
            faster.append(b"")
            faster[0] = answer(station, device.renew()).leaf_der
        return sign(authority, row, now=now)

    monkeypatch.setattr(Authority, "issue_device", late)
    mine, others = Renewals(station).answer([device.renew(), other.renew()])
    assert mine.leaf_der == faster[0] != b""
    assert others.outcome == "issued"


def test_a_clock_that_is_wrong_is_everybodys_trouble(station: Station, device: PaperDevice, clock: Clock) -> None:
    clock.advance(days=-30)
    with pytest.raises(AuthorityError, match="clock"):
        Renewals(station).answer([device.renew()])


@pytest.mark.parametrize("signer", ["old", "other"])
def test_only_the_new_key_confirms(signer: str, station: Station, device: PaperDevice) -> None:
    leaf_der = issued(station, device)
    key = device.key if signer == "old" else new_key()
    answered = answer(station, device.confirm(leaf_der, signer=key))
    assert (answered.outcome, live(station)) == ("refused", device.row)


def test_a_request_is_no_confirmation(station: Station, device: PaperDevice) -> None:
    leaf_der = issued(station, device)
    asked = device.renew(csr_der=csr("sensor-17", device.new_key), signer=device.new_key)
    forged = asked.request.changed(kind="confirm", csr_der=b"", leaf_sha256=sha256(leaf_der))
    assert answer(station, Asked(device.device_id, forged)).outcome == "refused"
    assert answer(station, device.confirm(device.leaf_der, signer=device.key)).outcome == "refused"


def test_the_old_certificate_renews_nothing_more(station: Station, device: PaperDevice) -> None:
    old = replace(device)
    renewed(station, device)
    answered = answer(station, replace(old, new_key=new_key()).renew())
    assert (answered.outcome, answered.retry) == ("refused", False)
    assert "renewed already" in answered.reason
    assert len(rows(station)) == 2


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_revoked_device_gets_nothing(moment: str, station: Station, device: PaperDevice) -> None:
    lost = x509.ReasonFlags.key_compromise
    leaf_der = b""
    if moment == "before":
        revoke(station, "sensor-17", lost)
        assert answer(station, device.renew()).outcome == "refused"
    elif moment == "between":
        leaf_der = issued(station, device)
        revoke(station, "sensor-17", lost)
        assert answer(station, device.confirm(leaf_der)).outcome == "refused"
        assert answer(station, device.renew()).outcome == "refused"
    else:
        leaf_der = renewed(station, device)
        revoke(station, "sensor-17", lost)
        assert answer(station, device.renew()).outcome == "refused"
    assert all(row.is_revoked for row in rows(station))
    assert not any(row.is_open_renewal for row in rows(station))


def test_revoked_while_it_is_being_signed_it_is_not_sent(
    station: Station, device: PaperDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign = Authority.issue_device

    def revoked_meanwhile(authority: Authority, row: Row, *, now: datetime) -> bytes:
        leaf_der = sign(authority, row, now=now)
        with station.registry.transaction() as transaction:
            renewed = transaction.row(device.row.number)
            assert renewed is not None
            transaction.update(renewed.changed(revoked_at=station.clock(), revocation_reason="keyCompromise"))
        return leaf_der

    monkeypatch.setattr(Authority, "issue_device", revoked_meanwhile)
    answered = answer(station, device.renew())
    assert (answered.outcome, answered.leaf_der) == ("refused", b"")
    assert all(row.is_revoked for row in rows(station)), "what was signed is on the next CRL"


def test_a_device_that_is_enrolled_anew_is_asked_to_wait(station: Station, device: PaperDevice) -> None:
    with station.registry.transaction() as transaction:
        transaction.insert(
            kind=device.row.kind,
            name=device.name,
            role="sensor",
            hwid=device.row.hwid,
            txn=bytes(16),
            replaces=device.row.number,
        )
    answered = answer(station, device.renew())
    assert (answered.outcome, answered.retry) == ("refused", True)


def test_an_expired_certificate_is_renewed_within_the_grace_only(
    station: Station, device: PaperDevice, clock: Clock
) -> None:
    assert device.row.not_after is not None
    clock.now = device.row.not_after + timedelta(days=30)
    issued(station, device)
    device.new_key = new_key()
    clock.now += timedelta(seconds=1)
    answered = answer(station, device.renew())
    assert (answered.outcome, answered.retry) == ("refused", False)
    assert "expired more than 30 days ago" in answered.reason


def test_a_device_begins_so_many_renewals_in_a_day(station: Station, device: PaperDevice, clock: Clock) -> None:
    for _ in range(10):
        device.new_key = new_key()
        issued(station, device)
        clock.advance(hours=1)
    device.new_key = new_key()
    answered = answer(station, device.renew())
    assert (answered.outcome, answered.retry) == ("refused", True)
    assert answered.retry_after_s == 14 * 3600 + 1
    clock.advance(hours=15)
    issued(station, device)


class NextAnchors:
    """A root is being replaced: whoever has not got both gets both."""

    def __init__(self, station: Station, anchors_der: tuple[bytes, ...]) -> None:
        self.station = station
        self.anchors_der = anchors_der
        self.confirmed: list[tuple[int, tuple[bytes, ...]]] = []

    def pending_anchors(self, row: Row, held_sha256: Sequence[bytes]) -> PendingAnchors | None:
        assert row.name == "sensor-17"
        if {sha256(each) for each in self.anchors_der} == set(held_sha256):
            return None
        authority = self.station.authority
        return PendingAnchors(self.anchors_der, authority.issuing_der, authority.sign_transcript)

    def confirmed_anchors(self, transaction: Transaction, row: Row, held_sha256: Sequence[bytes]) -> Row:
        assert transaction.row(row.number) == row
        self.confirmed.append((row.number, tuple(held_sha256)))
        return row


def test_new_anchors_come_with_the_certificate_and_are_confirmed_with_it(
    station: Station, device: PaperDevice, clock: Clock
) -> None:
    root_der = station.root.public_bytes(Encoding.DER)
    source = NextAnchors(station, (root_der, station.authority.issuing_der))
    renewals = Renewals(station, anchors=source)
    device.anchors_sha256 = (sha256(root_der),)
    asked = device.renew()
    (answered,) = renewals.answer([asked])
    assert answered.anchors is not None
    taken = verified_anchors(
        answered.anchors,
        device_id=device.device_id,
        nonce=asked.request.nonce,
        trusted_der=(root_der,),
        moment=Moment(clock.now),
    )
    device.anchors_sha256 = tuple(sha256(each) for each in taken)
    renewals.answer([device.confirm(answered.leaf_der)])
    assert source.confirmed == [(live(station).number, device.anchors_sha256)]
    device.has_renewed(answered.leaf_der)
    (later,) = renewals.answer([device.renew()])
    assert (later.outcome, later.anchors) == ("issued", None)


def test_the_new_key_is_the_one_that_is_certified(station: Station, device: PaperDevice) -> None:
    renewed(station, device)
    public = device.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert live(station).public_key_der == public


def test_who_is_refused_all_day_does_not_fill_the_audit_log(
    station: Station, device: PaperDevice, clock: Clock
) -> None:
    renewals = Renewals(station)
    for _ in range(30):
        renewals.answer([device.renew(signer=device.new_key)])
        clock.advance(minutes=10)
    refusals = [entry for entry in audit.read(station.registry.audit_path) if entry["action"] == "refuse"]
    assert len(refusals) == 5
    assert "not signed by the key in use" in refusals[0]["details"]["cause"]


def test_names_that_the_station_never_gave_leave_nothing_in_the_audit_log(
    station: Station, device: PaperDevice
) -> None:
    """A hostile gateway has as many as it likes."""
    renewals = Renewals(station)
    asked = [replace(device.renew(), device_id=DeviceId(f"nobody-{number}")) for number in range(20)]
    answered = renewals.answer([*asked, device.renew(signer=device.new_key)])
    assert [one.outcome for one in answered] == ["refused"] * 21
    refusals = [entry for entry in audit.read(station.registry.audit_path) if entry["action"] == "refuse"]
    assert [entry["subject"] for entry in refusals] == ["sensor-17"]
    assert list(renewals._told_at) == ["sensor-17"]


def is_sealed(answered: RenewalAnswer, station: Station, device: PaperDevice, leaf_der: bytes) -> bool:
    key = station.issuing.public_key()
    assert isinstance(key, EllipticCurvePublicKey)
    signed = answer_transcript(
        device.device_id, outcome=answered.outcome, nonce=answered.nonce, leaf_sha256=sha256(leaf_der)
    )
    return verify(key, answered.signature, signed)


def test_what_a_device_is_to_act_on_is_signed_for_whoever_has_proven_a_key(
    station: Station, device: PaperDevice
) -> None:
    assert answer(station, device.renew(signer=device.new_key)).signature == b"", "anybody could ask for it"
    assert answer(station, replace(device.renew(), device_id=DeviceId("nobody"))).signature == b""
    used = answer(station, device.renew(csr_der=csr("sensor-17", device.key)))
    assert (used.outcome, is_sealed(used, station, device, device.leaf_der)) == ("refused", True)
    leaf_der = issued(station, device)
    forged = answer(station, device.confirm(leaf_der, signer=device.key))
    assert (forged.outcome, forged.signature) == ("refused", b"")
    confirmed = answer(station, device.confirm(leaf_der))
    assert (confirmed.outcome, is_sealed(confirmed, station, device, leaf_der)) == ("confirmed", True)


def test_a_ca_whose_key_is_gone_costs_its_devices_the_signature_and_the_others_nothing(
    station: Station, device: PaperDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, leaf_der = PaperDevice.made(station, "sensor-18"), issued(station, device)
    old = station.authority
    start_root(station, None, derivation=CHEAP)
    activate(station, force=True)
    unlock = Station.authority_of

    def gone(station: Station, key_id: str) -> Authority:
        if key_id == old.key_id:
            raise AuthorityError("could not use the issuing CA's key: it is gone")
        return unlock(station, key_id)

    monkeypatch.setattr(Station, "authority_of", gone)
    used = csr("sensor-17", device.key)
    refused, again, granted = Renewals(station).answer([device.renew(csr_der=used), device.renew(), other.renew()])
    assert (refused.outcome, refused.signature) == ("refused", b"")
    assert (again.leaf_der, again.chain_der) == (leaf_der, (old.issuing_der,)), "its certificate is public"
    assert (granted.outcome, granted.chain_der) == ("issued", (station.authority.issuing_der,))


def test_a_request_made_with_a_renewed_certificate_confirms_it(
    station: Station, device: PaperDevice, clock: Clock
) -> None:
    """The registry was put back to before the confirmation; the device goes by the new one alone."""
    first = device.row
    leaf_der = issued(station, device)
    device.has_renewed(leaf_der)
    later = issued(station, device)
    old, new, next_one = rows(station)
    assert (old.number, old.replaced_by) == (first.number, new.number)
    assert (new.state, new.certificate_der, next_one.certificate_der) == (State.ATTESTED, leaf_der, later)
    assert next_one.renews == new.number
    with station.registry.view() as view:
        assert next_retirement_at(view) == clock.now + timedelta(hours=24)
    actions = [entry["action"] for entry in audit.read(station.registry.audit_path)]
    assert actions[-2:] == ["renewed", "renew"]


def test_what_took_its_place_is_given_also_when_the_old_one_is_revoked(
    station: Station, device: PaperDevice, clock: Clock
) -> None:
    leaf_der = issued(station, device)
    assert answer(station, device.confirm(leaf_der)).outcome == "confirmed"
    clock.advance(hours=25)
    assert retire_due(station) == 1
    assert answer(station, device.renew()).leaf_der == leaf_der
    device.new_key = new_key()
    assert answer(station, device.renew()).outcome == "refused"


def test_a_clock_that_went_back_has_nobody_wait_for_longer_than_a_day(
    station: Station, device: PaperDevice, clock: Clock
) -> None:
    """Whatever began in the time to come counts; it ends nothing for good."""
    for _ in range(10):
        device.new_key = new_key()
        issued(station, device)
    clock.advance(days=-300)
    device.new_key = new_key()
    answered = answer(station, device.renew())
    assert (answered.outcome, answered.retry, answered.retry_after_s) == ("refused", True, 86_400)
