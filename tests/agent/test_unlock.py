"""UNLOCK: who may have a locked device enrolled anew, and everybody else."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import cbor2
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from support.agent_bench import HWID, Bench, reference_ca
from support.reference_station import (
    AUTH,
    KEYGEN,
    LOCKED,
    STATE,
    TXN,
    UNLOCK,
    ReferenceEnrollment,
    ReferenceStation,
    RefusedError,
    certificate,
    sha256,
    transcript,
)

if TYPE_CHECKING:
    from pathlib import Path

NEW, OTHER = b"n" * 16, b"x" * 16


class Rig:
    """A locked device and a station that asks for its unlocking."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.enrollment = bench.enrol("unit-1", txn=b"o" * 16)
        self.station = bench.station()

    def nonce(self, new_txn: bytes = NEW) -> bytes:
        answer = self.station.ask(UNLOCK, {1: 1, 2: new_txn})
        assert answer[2] == self.enrollment.txn
        nonce: bytes = answer[1]
        return nonce

    def proof(self, given: bytes, **changes: Any) -> dict[int, Any]:
        ca = reference_ca()
        parts = {
            "label": b"BIRTHMARK-UNLOCK-1",
            "nonce": given,
            "hwid": HWID,
            "old": self.enrollment.txn,
            "new": NEW,
        }
        parts |= {name: value for name, value in changes.items() if name in parts}
        signed = transcript(*parts.values())
        signature = changes.get("key", ca.issuing_key).sign(signed, ec.ECDSA(hashes.SHA256()))
        return {
            1: 2,
            2: changes.get("sent_txn", NEW),
            3: sha256(changes.get("signer", ca.issuing_der)),
            4: changes.get("signature", signature),
        }

    def code(self, fields: dict[int, Any], station: ReferenceStation | None = None) -> int | None:
        try:
            answer = (station or self.station).ask(UNLOCK, fields)
        except RefusedError as refusal:
            return refusal.code
        assert answer == {1: NEW}
        return None

    def check_still_locked(self) -> None:
        """The old slot attests, and nothing is open."""
        assert self.bench.files().keys() == {"active"}
        station = self.bench.station()
        assert station.hello()[11] == b""
        with pytest.raises(RefusedError) as refusal:
            station.ask(KEYGEN, {1: NEW})
        assert refusal.value.code == LOCKED
        station.attest(self.enrollment.txn, HWID, self.enrollment.bundle)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(Bench(tmp_path / "state"))


def test_each_ca_of_the_bundle_may(rig: Rig) -> None:
    ca = reference_ca()
    for key, signer in ((ca.issuing_key, ca.issuing_der), (ca.root_key, ca.root_der)):
        assert rig.code(rig.proof(rig.nonce(), key=key, signer=signer)) is None
        assert rig.station.hello()[11] == NEW
        assert rig.station.abort(NEW) == 2
        rig.check_still_locked()


FIELDS_THAT_DIFFER: dict[str, dict[str, Any]] = {
    "another label": {"label": b"BIRTHMARK-ATTEST-1"},
    "another nonce": {"nonce": bytes(16)},
    "another unit": {"hwid": b"other hwid"},
    "another old transaction": {"old": OTHER},
    "another new transaction": {"new": OTHER},
    "swapped transactions": {"old": NEW, "new": b"o" * 16},
    "junk for a signature": {"signature": b"s" * 70},
}


@pytest.mark.parametrize("changes", FIELDS_THAT_DIFFER.values(), ids=FIELDS_THAT_DIFFER)
def test_a_signature_over_anything_else(rig: Rig, changes: dict[str, Any]) -> None:
    assert rig.code(rig.proof(rig.nonce(), **changes)) == AUTH
    rig.check_still_locked()


def test_a_rogue_ca(rig: Rig) -> None:
    rogue = reference_ca("Rogue")
    namesake = reference_ca("Reference of the same name")
    assert rig.code(rig.proof(rig.nonce(), key=rogue.issuing_key, signer=rogue.issuing_der)) == AUTH
    assert rig.code(rig.proof(rig.nonce(), key=namesake.issuing_key)) == AUTH
    rig.check_still_locked()


def test_the_leaf_as_signer(rig: Rig) -> None:
    active = rig.bench.slots.active()
    assert active is not None
    from birthmark.device.agent.keys import key_from_der

    key = key_from_der(active.key_der)
    assert rig.code(rig.proof(rig.nonce(), key=key, signer=active.bundle.leaf_der)) == AUTH
    rig.check_still_locked()


def test_no_nonce(rig: Rig) -> None:
    assert rig.code(rig.proof(bytes(16))) == AUTH
    rig.check_still_locked()


def test_a_proof_is_good_once(rig: Rig) -> None:
    proof = rig.proof(rig.nonce())
    assert rig.code(proof) is None
    rig.station.abort(NEW)
    assert rig.code(proof) == AUTH
    rig.check_still_locked()


def test_a_failed_proof_uses_up_the_nonce(rig: Rig) -> None:
    nonce = rig.nonce()
    assert rig.code(rig.proof(nonce, signature=b"s" * 70)) == AUTH
    assert rig.code(rig.proof(nonce)) == AUTH
    nonce = rig.nonce()
    assert rig.code(rig.proof(nonce, sent_txn=rig.enrollment.txn)) == TXN
    assert rig.code(rig.proof(nonce)) == AUTH
    rig.check_still_locked()


def test_a_repeated_frame_is_not_a_second_try(rig: Rig) -> None:
    from support.reference_station import answers_in, frame

    proof = cbor2.dumps(rig.proof(rig.nonce()), canonical=True)
    request = frame(UNLOCK, 900, rig.station.sid, proof)
    first = rig.bench.send(request)
    assert answers_in(first)[0][0] == UNLOCK | 0x80
    assert rig.bench.send(request) == first


def test_another_session(rig: Rig) -> None:
    nonce = rig.nonce()
    assert rig.code(rig.proof(nonce), rig.bench.station()) == AUTH
    rig.check_still_locked()


def test_another_new_transaction_than_asked_for(rig: Rig) -> None:
    assert rig.code(rig.proof(rig.nonce(OTHER))) == AUTH
    rig.check_still_locked()


def test_after_a_reboot(rig: Rig) -> None:
    nonce = rig.nonce()
    rig.bench.reboot()
    assert rig.code(rig.proof(nonce)) == AUTH
    rig.check_still_locked()


@pytest.mark.parametrize(("age_s", "expected"), [(29.9, None), (30.0, AUTH)])
def test_the_age_of_the_nonce(rig: Rig, age_s: float, expected: int | None) -> None:
    nonce = rig.nonce()
    rig.bench.clock.pass_s(age_s)
    assert rig.code(rig.proof(nonce)) == expected


def test_only_the_last_nonce_counts(rig: Rig) -> None:
    first, second = rig.nonce(), rig.nonce()
    assert first != second
    assert rig.code(rig.proof(first)) == AUTH
    assert rig.code(rig.proof(second)) == AUTH


def test_abort_forgets_the_nonce(rig: Rig) -> None:
    nonce = rig.nonce()
    assert rig.station.abort(NEW) == 2
    assert rig.code(rig.proof(nonce)) == AUTH


def test_a_ca_key_that_is_not_on_p256(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "state")
    ca, station, txn = reference_ca(), bench.station(), secrets.token_bytes(16)
    rsa_key = rsa.generate_private_key(65537, 2048)
    other_curve_key = ec.generate_private_key(ec.SECP256K1())  # its signatures are as short
    anchors = [
        certificate(rsa_key.public_key(), "RSA", ca.root_key, "Reference Root", is_ca=True),
        certificate(other_curve_key.public_key(), "Other curve", ca.root_key, "Reference Root", is_ca=True),
    ]
    bundle = ca.bundle(station.keygen(txn).public_key(), "u", anchors=anchors)
    station.transfer(txn, bundle)
    station.prepare(txn, HWID, bundle)
    station.commit(txn, bundle)
    for signer in anchors:
        answer = station.ask(UNLOCK, {1: 1, 2: NEW})
        signed = transcript(b"BIRTHMARK-UNLOCK-1", answer[1], HWID, txn, NEW)
        signature = other_curve_key.sign(signed, ec.ECDSA(hashes.SHA256()))
        with pytest.raises(RefusedError) as refusal:
            station.ask(UNLOCK, {1: 2, 2: NEW, 3: sha256(signer), 4: signature})
        assert refusal.value.code == AUTH


def test_unlocking_anew_drops_the_other_enrollment(rig: Rig) -> None:
    assert rig.code(rig.proof(rig.nonce())) is None
    rig.station.keygen(NEW)
    # The same transaction again (its answer was lost): its key stays.
    assert rig.code(rig.proof(rig.nonce())) is None
    assert rig.bench.files().keys() == {"active", "unlock", "pending"}
    rig.station.begin(NEW, b"a bundle")
    rig.station.unlock(reference_ca(), HWID, OTHER)
    with pytest.raises(RefusedError) as refusal:
        rig.station.data(0, b"a")
    assert refusal.value.code == STATE
    hello = rig.station.hello()
    assert (hello[4], hello[11], hello[12]) == (2, OTHER, b"")
    assert rig.bench.files().keys() == {"active", "unlock"}
    with pytest.raises(RefusedError) as refusal:
        rig.station.keygen(NEW)
    assert refusal.value.code == LOCKED


@pytest.mark.parametrize("cut_after", ["unlock", "keygen", "transfer", "prepare", "commit"])
def test_a_power_cut_in_a_new_enrollment(rig: Rig, cut_after: str) -> None:
    class CutError(Exception):
        pass

    def cut(step: str) -> None:
        if step == cut_after:
            raise CutError

    new = ReferenceEnrollment(reference_ca(), "unit-2", txn=NEW)
    rig.station.unlock(reference_ca(), HWID, NEW)
    if cut_after != "unlock":
        with pytest.raises(CutError):
            new.run(rig.station, cut)
    rig.bench.reboot()
    station = rig.bench.station()
    if cut_after == "commit":
        station.attest(NEW, HWID, new.bundle)
    else:
        station.attest(rig.enrollment.txn, HWID, rig.enrollment.bundle)
        assert station.hello()[11] == NEW
    new.run(station)
    assert new.certificates_signed == 1
    assert rig.bench.files().keys() == {"active"}


def test_the_old_ca_cannot_unlock_the_new_identity(rig: Rig) -> None:
    rig.station.unlock(reference_ca(), HWID, NEW)
    new = ReferenceEnrollment(reference_ca("Successor"), "unit-2", txn=NEW)
    new.run(rig.station)
    with pytest.raises(RefusedError) as refusal:
        rig.station.unlock(reference_ca(), HWID, OTHER)
    assert refusal.value.code == AUTH
    rig.station.unlock(reference_ca("Successor"), HWID, OTHER)
