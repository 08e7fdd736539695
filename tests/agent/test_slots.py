"""The records: what a boot keeps of every combination, the lock, the hardware id, damage."""

from __future__ import annotations

import os
import stat
from itertools import product
from typing import TYPE_CHECKING

import pytest
from support.agent_bench import HWID, Bench, reference_ca

from birthmark.device import pem
from birthmark.device.agent import keys
from birthmark.device.agent.enrollment import Board
from birthmark.device.agent.machine import Agent
from birthmark.device.agent.slots import PendingKey, Slot, Slots, StoreError
from birthmark.device.errors import CredentialError, LocalProtocolError, SystemFailureError
from birthmark.device.link.bundle import Bundle
from birthmark.device.link.messages import KeyMode

if TYPE_CHECKING:
    from pathlib import Path

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16


def _slot(txn: bytes, scalar: int = 7) -> Slot:
    key = keys.key_of_scalar(scalar.to_bytes(32, "big"))
    assert key is not None
    bundle = reference_ca().bundle(key.public_key(), "unit-1")
    return Slot(txn, keys.key_to_der(key), Bundle.from_bytes(bundle))


SLOTS = {txn: _slot(txn) for txn in (A, B, C)}
OTHER_KEY = _slot(B, scalar=8)


def _pending_pem(slot: Slot) -> bytes:
    return pem.block(pem.PRIVATE_KEY, slot.key_der) + pem.block(pem.TRANSACTION, slot.txn)


def _fill(folder: Path, **records: bytes) -> Slots:
    folder.mkdir(exist_ok=True)
    for name, content in records.items():
        (folder / name).write_bytes(content)
    return Slots(folder)


def test_every_combination_at_boot(tmp_path: Path) -> None:
    """The rules of section 7, said once more: what stays is what they say, whatever was there."""
    choices = (None, A, B, C)
    for number, (active, unlock, pending, prepared) in enumerate(product((None, A), choices, choices, choices)):
        folder = tmp_path / str(number)
        records = {}
        if active:
            records["active"] = SLOTS[active].to_pem()
        if unlock:
            records["unlock"] = pem.block(pem.TRANSACTION, unlock)
        if pending:
            records["pending"] = _pending_pem(SLOTS[pending])
        if prepared:
            records["prepared"] = SLOTS[prepared].to_pem()
        slots = _fill(folder, **records)
        slots.recover()
        kept = {path.name for path in folder.iterdir()}
        keep_unlock = bool(active and unlock and unlock != active)
        keep_pending = bool(pending and (not active or (keep_unlock and pending == unlock)))
        keep_prepared = bool(prepared and keep_pending and prepared == pending)
        expected = {
            name
            for name, keep in [
                ("active", active),
                ("unlock", keep_unlock),
                ("pending", keep_pending),
                ("prepared", keep_prepared),
            ]
            if keep
        }
        assert kept == expected, records.keys()
        # What does not count was not there before the boot either.
        before = _fill(tmp_path / f"{number}-unrecovered", **records)
        assert (before.pending() is not None) == keep_pending
        assert (before.prepared() is not None) == keep_prepared
        assert (before.unlocked_txn() is not None) == keep_unlock


def test_a_slot_prepared_for_another_key_goes(tmp_path: Path) -> None:
    slots = _fill(tmp_path / "s", pending=_pending_pem(OTHER_KEY), prepared=SLOTS[B].to_pem())
    slots.recover()
    assert slots.prepared() is None
    assert {path.name for path in slots.folder.iterdir()} == {"pending"}


@pytest.mark.parametrize("name", ["pending", "prepared", "unlock", "renewed"])
@pytest.mark.parametrize(
    "content", [b"", b"junk", b"-----BEGIN PRIVATE KEY-----\nAAAA"], ids=["empty", "junk", "pem"]
)
def test_a_damaged_record_goes_and_the_identity_stays(tmp_path: Path, name: str, content: bytes) -> None:
    slots = _fill(tmp_path / "s", active=SLOTS[A].to_pem(), **{name: content})
    slots.recover()
    assert {path.name for path in slots.folder.iterdir()} == {"active"}
    assert slots.active() == SLOTS[A]


@pytest.mark.parametrize(
    "content",
    [b"", b"junk", SLOTS[A].to_pem()[:-200], SLOTS[A].to_pem() * 2],
    ids=["empty", "junk", "cut short", "twice"],
)
def test_a_damaged_active_slot_stops_the_boot_and_is_kept(tmp_path: Path, content: bytes) -> None:
    slots = _fill(tmp_path / "s", active=content)
    with pytest.raises(CredentialError) as damage:
        Agent(slots, Board(HWID, "m", "f"))
    assert "active" in damage.value.message
    assert "BEGIN" not in damage.value.message
    assert (slots.folder / "active").read_bytes() == content


def test_a_renewal_stays_with_its_identity(tmp_path: Path) -> None:
    slots = _fill(tmp_path / "s", active=SLOTS[A].to_pem(), renewed=SLOTS[A].to_pem())
    slots.recover()
    assert (slots.folder / "renewed").exists()
    (slots.folder / "active").write_bytes(SLOTS[B].to_pem())
    slots.recover()
    assert not (slots.folder / "renewed").exists()


def test_leftovers_go(tmp_path: Path) -> None:
    slots = _fill(tmp_path / "s", active=SLOTS[A].to_pem(), **{".pending.0a1b.part": b"half"})
    slots.recover()
    assert {path.name for path in slots.folder.iterdir()} == {"active"}


def test_records_come_back_as_they_were_stored(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "s")
    slots.recover()
    assert (slots.pending(), slots.prepared(), slots.active(), slots.unlocked_txn()) == (None,) * 4
    slots.store_pending(PendingKey(B, SLOTS[B].key_der))
    assert slots.pending() == PendingKey(B, SLOTS[B].key_der)
    slots.store_prepared(SLOTS[B])
    assert slots.prepared() == SLOTS[B]
    slots.commit()
    assert slots.active() == SLOTS[B]
    slots.store_unlocked(C)
    assert slots.unlocked_txn() == C
    for path in slots.folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        bench = Bench(tmp_path / "s")
        bench.enrol()
    finally:
        os.umask(before)
    assert stat.S_IMODE(bench.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((bench.folder / "active").stat().st_mode) == 0o600


def test_no_repr_shows_a_key() -> None:
    for record in (SLOTS[A], PendingKey(A, SLOTS[A].key_der)):
        assert repr(SLOTS[A].key_der)[2:-1] not in repr(record)
        assert SLOTS[A].key_der.hex() not in repr(record)


def test_one_agent_a_folder(tmp_path: Path) -> None:
    first, second = Slots(tmp_path / "s"), Slots(tmp_path / "s")
    with first.exclusive():
        with pytest.raises(SystemFailureError) as refusal, second.exclusive():
            pass
        assert "another agent" in refusal.value.message
    with second.exclusive():
        assert list(second.folder.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError) as refusal:
        Slots(tmp_path / "file" / "s").recover()
    assert "Not a directory" in refusal.value.message


def test_the_random_hardware_id_is_made_once(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "s")
    made = slots.kept_hwid(os.urandom, 16)
    assert len(made) == 16
    assert slots.kept_hwid(os.urandom, 16) == made
    assert (slots.folder / "hwid").read_text() == made.hex() + "\n"
    slots.recover()
    assert slots.kept_hwid(os.urandom, 16) == made


@pytest.mark.parametrize("content", [b"", b"abc", b"zz" * 8, b"ab" * 33, "ü".encode()])
def test_a_damaged_hardware_id_is_not_replaced(tmp_path: Path, content: bytes) -> None:
    slots = _fill(tmp_path / "s", hwid=content)
    with pytest.raises(CredentialError):
        slots.kept_hwid(os.urandom, 16)
    assert (slots.folder / "hwid").read_bytes() == content


@pytest.mark.parametrize(
    "board",
    [
        (b"abc", "m", "f", 3, 16384),
        (bytes(33), "m", "f", 3, 16384),
        (HWID, "", "f", 3, 16384),
        (HWID, "m" * 33, "f", 3, 16384),
        (HWID, "m", "f\n", 3, 16384),
        (HWID, "m", "f", 0, 16384),
        (HWID, "m", "f", 3, 2047),
        (HWID, "m", "f", 3, 16385),
    ],
)
def test_a_board_that_hello_could_not_describe(board: tuple[bytes, str, str, int, int]) -> None:
    hwid, model, firmware, modes, max_bundle_bytes = board
    with pytest.raises(LocalProtocolError):
        Board(hwid, model, firmware, KeyMode(modes), max_bundle_bytes)
