"""An independent station enrols the device, in both key modes, and what is left on the device is right."""

from __future__ import annotations

import hashlib
import secrets
import ssl
import stat
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from support.agent_bench import HWID, Bench, reference_ca
from support.reference_station import BUSY, KEYGEN, ReferenceEnrollment, RefusedError, sha256

from birthmark.device.agent.keys import P256_ORDER
from birthmark.device.credentials import Credentials
from birthmark.device.link.messages import KeyMode
from birthmark.device.pem import read_blocks

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "state")


def _scalar() -> bytes:
    return (1 + secrets.randbelow(P256_ORDER - 1)).to_bytes(32, "big")


@pytest.mark.parametrize("mode", ["on-device", "station"])
def test_enrols_in_both_key_modes(bench: Bench, mode: str) -> None:
    scalar = _scalar() if mode == "station" else None
    enrollment = bench.enrol("sensor-17", scalar=scalar)
    assert enrollment.certificates_signed == 1
    assert bench.files().keys() == {"active"}
    assert [step.name for step in bench.steps] == ["key_made", "prepared", "enrolled"]
    assert bench.steps[-1].device_id == "sensor-17"
    hello = bench.station().hello()
    assert (hello[4], hello[5], hello[6]) == (2, enrollment.txn, sha256(enrollment.bundle))
    assert (hello[11], hello[12]) == (b"", b"")


def test_states_on_the_way(bench: Bench) -> None:
    station, txn = bench.station(), secrets.token_bytes(16)
    assert station.hello()[4] == 0
    request = station.keygen(txn)
    assert station.seen == [BUSY, KEYGEN | 0x80]
    hello = station.hello()
    assert (hello[4], hello[11], hello[12]) == (0, txn, b"")
    bundle = reference_ca().bundle(request.public_key(), "unit-1")
    station.transfer(txn, bundle, chunk=1024)
    station.prepare(txn, HWID, bundle)
    hello = station.hello()
    assert (hello[4], hello[11], hello[12]) == (1, txn, sha256(bundle))
    assert bench.files().keys() == {"pending", "prepared"}
    station.commit(txn, bundle)
    station.attest(txn, HWID, bundle)
    assert station.hello()[4] == 2


def test_the_active_slot_is_what_ssl_reads(bench: Bench) -> None:
    enrollment = bench.enrol("sensor-17")
    path = bench.folder / "active"
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(path)
    assert [label for label, _ in read_blocks(path.read_bytes())] == [
        "PRIVATE KEY",
        "CERTIFICATE",
        "CERTIFICATE",
        "BIRTHMARK BUNDLE",
        "BIRTHMARK TRANSACTION",
    ]
    blocks = dict(read_blocks(path.read_bytes()))
    assert blocks["BIRTHMARK BUNDLE"] == enrollment.bundle
    assert blocks["BIRTHMARK TRANSACTION"] == enrollment.txn
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(bench.folder.stat().st_mode) == 0o700


def test_the_active_slot_is_what_the_client_reads(bench: Bench) -> None:
    bench.enrol("sensor-17")
    credentials = Credentials.from_folder(bench.folder)
    assert str(credentials.device_id) == "sensor-17"
    assert (credentials.broker.host, credentials.broker.port) == ("broker.example.net", 8883)
    assert credentials.anchors_der == (reference_ca().root_der,)


def test_the_stations_scalar_is_in_one_file_only(bench: Bench) -> None:
    scalar = _scalar()
    enrollment = ReferenceEnrollment(reference_ca(), "unit-1", scalar=scalar)
    enrollment.run(bench.station())
    holders = []
    for path in bench.folder.iterdir():
        text = path.read_bytes()
        assert scalar not in text
        assert scalar.hex().encode() not in text
        if any(scalar in content for _, content in read_blocks(text)):
            holders.append(path.name)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert holders == ["active"]
    kept = repr(bench.agent._kept) + repr(bench.steps)
    assert scalar.hex() not in kept
    assert repr(scalar)[2:-1] not in kept


def test_the_request_names_the_hardware_and_nothing_else(bench: Bench) -> None:
    request = bench.station().keygen(secrets.token_bytes(16))
    assert request.subject.rfc4514_string() == f"CN={HWID.hex()}"
    key = request.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    assert request.signature_hash_algorithm is not None
    assert request.signature_hash_algorithm.name == "sha256"


@pytest.mark.parametrize("length", [4, 32])
def test_the_longest_and_the_shortest_hardware_id(tmp_path: Path, length: int) -> None:
    bench = Bench(tmp_path / "state", hwid=b"\xab" * length)
    enrollment = bench.enrol()
    assert enrollment.hwid == b"\xab" * length


def test_the_same_device_enrols_again_after_every_reboot(bench: Bench) -> None:
    enrollment = ReferenceEnrollment(reference_ca(), "unit-1")

    class CutError(Exception):
        pass

    for step in ("hello", "keygen", "transfer", "prepare", "commit"):

        def cut(reached: str, at: str = step) -> None:
            if reached == at:
                raise CutError

        with pytest.raises(CutError):
            enrollment.run(bench.station(), cut)
        bench.reboot()
    enrollment.run(bench.station())
    assert enrollment.certificates_signed == 1
    assert bench.files().keys() == {"active"}


def test_unlock_gives_a_new_identity_and_the_old_one_works_until_then(bench: Bench) -> None:
    old = bench.enrol("unit-1")
    (bench.folder / "renewed").write_bytes((bench.folder / "active").read_bytes())
    new = ReferenceEnrollment(reference_ca(), "unit-2")
    station = bench.station()
    with pytest.raises(RefusedError) as refusal:
        station.keygen(new.txn)
    assert refusal.value.code == 1
    station.unlock(reference_ca(), HWID, new.txn)
    hello = station.hello()
    assert (hello[4], hello[5], hello[11]) == (2, old.txn, new.txn)
    checked = []

    def old_still_attests(step: str) -> None:
        if step in ("hello", "keygen", "transfer", "prepare"):
            bench.station().attest(old.txn, HWID, old.bundle)
            checked.append(step)

    new.run(station, old_still_attests)
    assert checked == ["hello", "keygen", "transfer", "prepare"]
    assert bench.files().keys() == {"active"}
    assert station.hello()[5] == new.txn
    with pytest.raises(RefusedError):
        station.keygen(old.txn)


def test_a_board_that_offers_one_key_mode(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "state", key_modes=KeyMode.STATION)
    assert bench.station().hello()[13] == 2
    enrollment = bench.enrol(scalar=_scalar())
    leaf = x509.load_der_x509_certificate(bench.slots.active().bundle.leaf_der)  # type: ignore[union-attr]
    assert leaf.public_key() == enrollment.public_key
    assert hashlib.sha256(enrollment.bundle).digest() == bench.slots.active().bundle_sha256  # type: ignore[union-attr]
