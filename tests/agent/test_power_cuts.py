"""No half identity, whatever point the power goes at; and a full disk changes nothing."""

from __future__ import annotations

import secrets
from functools import partial
from typing import TYPE_CHECKING

import pytest
from support.agent_bench import HWID, Bench, reference_ca
from support.agent_faults import full_disk, run_with_power_cut, storage_calls
from support.reference_station import (
    ABORT,
    COMMIT,
    KEYGEN,
    PREPARE,
    STORE,
    UNLOCK,
    ReferenceEnrollment,
    RefusedError,
    sha256,
)

from birthmark.device.agent import keys
from birthmark.device.link.bundle import Bundle

if TYPE_CHECKING:
    from pathlib import Path

TXN, NEW = b"t" * 16, b"n" * 16
SCALAR = secrets.token_bytes(31).rjust(32, b"\0")
POINTS = 200
"""More than any of the runs below has."""


def _enrollment(txn: bytes = TXN, device_id: str = "unit-1", scalar: bytes = SCALAR) -> ReferenceEnrollment:
    """An enrollment whose key and bundle are known beforehand, as in the journal of a station that was there."""
    key = keys.key_of_scalar(scalar)
    assert key is not None
    return ReferenceEnrollment(
        reference_ca(),
        device_id,
        txn=txn,
        scalar=scalar,
        bundle=reference_ca().bundle(key.public_key(), device_id),
    )


def _run(bench: Bench, enrollment: ReferenceEnrollment) -> None:
    """Enrol by a bundle that was signed before: what runs in the child must be known to the parent."""
    station = bench.station()
    hello = station.hello()
    enrollment.hwid = hello[1]
    if hello[5] != enrollment.txn:
        station.keygen(enrollment.txn, enrollment.scalar)
        station.transfer(enrollment.txn, enrollment.bundle, chunk=1024)
        station.prepare(enrollment.txn, HWID, enrollment.bundle)
        station.commit(enrollment.txn, enrollment.bundle)
    station.attest(enrollment.txn, HWID, enrollment.bundle)


def _check_no_half(bench: Bench, *enrollments: ReferenceEnrollment) -> None:
    """After a boot: no temporary file, and the active slot, if there is one, is one of these and attests."""
    assert bench.files().keys() <= {"active", "pending", "prepared", "unlock"}
    station = bench.station()
    hello = station.hello()
    if hello[4] == 2:
        [active] = [enrollment for enrollment in enrollments if enrollment.txn == hello[5]]
        station.attest(active.txn, HWID, active.bundle)


@pytest.mark.parametrize("boot_cut", [0, 3])
def test_cut_at_every_point_of_an_enrollment(tmp_path: Path, boot_cut: int) -> None:
    enrollment = _enrollment()
    for point in range(1, POINTS):
        folder = tmp_path / str(point)
        folder.mkdir()

        def work(folder: Path = folder) -> None:
            _run(Bench(folder), enrollment)

        died = run_with_power_cut(work, point)
        if boot_cut:  # and once more while it recovers
            run_with_power_cut(partial(Bench, folder), boot_cut)
        bench = Bench(folder)
        _check_no_half(bench, enrollment)
        _run(bench, enrollment)
        assert bench.files().keys() == {"active"}
        if not died:
            break
    assert not died
    assert point > 20


def test_cut_at_every_point_of_a_new_enrollment(tmp_path: Path) -> None:
    old, new = _enrollment(), _enrollment(NEW, "unit-2", b"\x11" * 32)

    def begin(folder: Path) -> Bench:
        bench = Bench(folder)
        _run(bench, old)
        # A renewal of the old identity, which must not outlive it.
        (folder / "renewed").write_bytes((folder / "active").read_bytes())
        bench.station().unlock(reference_ca(), HWID, NEW)
        return bench

    for point in range(1, POINTS):
        folder = tmp_path / str(point)
        bench = begin(folder)
        died = run_with_power_cut(partial(_run, bench, new), point)
        bench.reboot()
        files = bench.files()
        active = bench.slots.active()
        assert active is not None
        assert ("renewed" in files) == (active.txn == old.txn)
        bench.folder.joinpath("renewed").unlink(missing_ok=True)
        _check_no_half(bench, old, new)
        if active.txn == old.txn:
            assert bench.station().hello()[11] == NEW
        _run(bench, new)
        assert bench.files().keys() == {"active"}
        if not died:
            break
    assert not died
    assert point > 20


def test_cut_at_every_point_of_a_superseding(tmp_path: Path) -> None:
    """A key may be replaced under one transaction: the slot prepared for the old key must go with it."""
    first, second = _enrollment(scalar=b"\x22" * 32), _enrollment(scalar=b"\x33" * 32)
    for point in range(1, POINTS):
        folder = tmp_path / str(point)
        bench = Bench(folder)
        station = bench.station()
        station.keygen(TXN, first.scalar)
        station.transfer(TXN, first.bundle)
        station.prepare(TXN, HWID, first.bundle)

        def work(bench: Bench = bench) -> None:
            bench.station().keygen(TXN, second.scalar, supersede=True)

        died = run_with_power_cut(work, point)
        bench.reboot()
        station = bench.station()
        hello = station.hello()
        pending = bench.slots.pending()
        assert pending is not None
        holds_first = keys.scalar_of_key(keys.key_from_der(pending.key_der)) == first.scalar
        assert (hello[4] == 1) == holds_first == ("prepared" in bench.files())
        station.keygen(TXN, second.scalar, supersede=True)
        station.transfer(TXN, second.bundle)
        station.prepare(TXN, HWID, second.bundle)
        station.commit(TXN, second.bundle)
        station.attest(TXN, HWID, second.bundle)
        if not died:
            break
    assert not died
    assert point > 4


def test_cut_at_every_point_of_unlock_and_abort(tmp_path: Path) -> None:
    old, other = _enrollment(), _enrollment(b"x" * 16, "unit-3", b"\x44" * 32)

    def work(bench: Bench) -> None:
        station = bench.station()
        station.unlock(reference_ca(), HWID, NEW)
        station.abort(NEW)

    for point in range(1, POINTS):
        bench = Bench(tmp_path / str(point))
        _run(bench, old)
        station = bench.station()
        station.unlock(reference_ca(), HWID, other.txn)
        station.keygen(other.txn, other.scalar)
        station.transfer(other.txn, other.bundle)
        station.prepare(other.txn, HWID, other.bundle)
        died = run_with_power_cut(partial(work, bench), point)
        bench.reboot()
        _check_no_half(bench, old)
        assert bench.station().hello()[11] in (other.txn, NEW, b"")
        work(bench)
        assert bench.files().keys() == {"active"}
        if not died:
            break
    assert not died
    assert point > 4


def test_what_is_answered_is_durable(tmp_path: Path) -> None:
    """Each request's calls end in the sync of the folder, and no rename comes before its file's sync."""
    bench = Bench(tmp_path / "state")
    station, enrollment = bench.station(), _enrollment()
    written = ["open", "fchmod", "write", "flush", "fsync", "flush", "replace", "open", "fsync"]

    def changing(calls: list[str]) -> list[str]:
        first = calls.index("fchmod") - 1 if "fchmod" in calls else calls.index("replace")
        return calls[first:]

    keygen = changing(storage_calls(lambda: station.keygen(TXN, SCALAR)))
    assert [call for call in keygen if call != "flush"][:7] == [call for call in written if call != "flush"]
    station.transfer(TXN, enrollment.bundle)
    prepare = changing(storage_calls(lambda: station.prepare(TXN, HWID, enrollment.bundle)))
    assert [call for call in prepare if call not in ("flush", "open")] == [
        call for call in written if call not in ("flush", "open")
    ]
    commit = changing(storage_calls(lambda: station.commit(TXN, enrollment.bundle)))
    assert commit[:3] == ["replace", "open", "fsync"]
    assert set(commit[3:]) <= {"unlink", "open", "fsync"}
    assert "write" not in commit
    # A repeated COMMIT makes sure once more: the first answer may have been STORE, after the rename.
    again = storage_calls(lambda: station.commit(TXN, enrollment.bundle))
    assert again[-2:] == ["open", "fsync"]


def test_a_full_disk_at_keygen(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "state")
    station = bench.station()
    with full_disk(), pytest.raises(RefusedError) as refusal:
        station.keygen(TXN)
    assert refusal.value.code == STORE
    assert bench.files() == {}
    assert station.hello()[4] == 0
    bench.enrol()


def test_a_full_disk_at_a_superseding_keygen(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "state")
    station, enrollment = bench.station(), _enrollment()
    station.keygen(TXN, SCALAR)
    station.transfer(TXN, enrollment.bundle)
    station.prepare(TXN, HWID, enrollment.bundle)
    before = bench.files()
    with full_disk(), pytest.raises(RefusedError) as refusal:
        station.ask(KEYGEN, {1: NEW, 3: True})
    assert refusal.value.code == STORE
    assert bench.files() == before
    station.commit(TXN, enrollment.bundle)


def test_a_full_disk_at_prepare_and_none_at_commit(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "state")
    station, enrollment = bench.station(), _enrollment()
    station.keygen(TXN, SCALAR)
    station.transfer(TXN, enrollment.bundle)
    before, hello = bench.files(), station.hello()
    with full_disk(), pytest.raises(RefusedError) as refusal:
        station.ask(PREPARE, {1: TXN, 2: bytes(16)})
    assert refusal.value.code == STORE
    assert bench.files() == before
    assert station.hello()[4] == hello[4] == 0
    # What was transferred is still there.
    station.prepare(TXN, HWID, enrollment.bundle)
    with full_disk():
        station.commit(TXN, enrollment.bundle)
        station.attest(TXN, HWID, enrollment.bundle)
    assert bench.files().keys() == {"active"}


def test_a_full_disk_at_unlock(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "state")
    enrollment = bench.enrol()
    station = bench.station()
    with full_disk(), pytest.raises(RefusedError) as refusal:
        station.unlock(reference_ca(), HWID, NEW)
    assert refusal.value.code == STORE
    assert bench.files().keys() == {"active"}
    assert station.ask(ABORT, {1: NEW}) == {1: 2}
    station.unlock(reference_ca(), HWID, NEW)
    assert station.ask(COMMIT, {1: enrollment.txn, 2: sha256(enrollment.bundle)}) == {1: 2}


def test_a_damaged_active_slot_is_never_a_blank_device(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "state")
    enrollment = bench.enrol()
    path = bench.folder / "active"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    station = bench.station()
    for request in (station.hello, lambda: station.keygen(NEW), lambda: station.ask(UNLOCK, {1: 1, 2: NEW})):
        with pytest.raises(RefusedError) as refusal:
            request()
        assert refusal.value.code == STORE
    path.write_bytes(whole)
    station.attest(enrollment.txn, HWID, enrollment.bundle)
    assert Bundle.from_bytes(enrollment.bundle).to_bytes() == enrollment.bundle
