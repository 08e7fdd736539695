"""What the registry keeps for a line, and that a share of a transaction can be undone without a trace."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.station import NOON, Clock

from birthmark.device.errors import ConfigurationError, RegistryError
from birthmark.provisioning.registry.content import META, META_ID, empty_tables
from birthmark.provisioning.registry.interface import DuplicateError
from birthmark.provisioning.registry.line import Batch, Quarantined
from birthmark.provisioning.registry.model import Kind, State
from birthmark.provisioning.registry.place import REGISTRY_FILE
from birthmark.provisioning.registry.storage import TransactionStorage
from birthmark.provisioning.registry.tiny import TinyRegistry
from birthmark.provisioning.registry.tiny_transaction import TinyTransaction

if TYPE_CHECKING:
    from pathlib import Path

UNIT = Quarantined(b"12345678", NOON, "sensor-1", "is odd", bytes(16))


@pytest.fixture
def registry(tmp_path: Path) -> TinyRegistry:
    return TinyRegistry.create(tmp_path / "registry", clock=Clock(), actor="test@host")


def test_a_batch_comes_back_as_it_was_stored(registry: TinyRegistry) -> None:
    with registry.transaction() as transaction:
        transaction.put_batch(Batch("W47", NOON))
    with registry.view() as view:
        assert (view.batches(), view.open_batch()) == ([Batch("W47", NOON)], Batch("W47", NOON))
    with registry.transaction() as transaction:
        transaction.put_batch(Batch("w47", NOON, NOON))
        transaction.put_batch(Batch("W48", NOON))
    with registry.view() as view:
        assert view.batches() == [Batch("w47", NOON, NOON), Batch("W48", NOON)]
        assert view.open_batch() == Batch("W48", NOON)


@pytest.mark.parametrize("name", ["", "a b", "-a", "a" * 65, "a/b", "\x1b"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(ConfigurationError):
        Batch(name, NOON)


def test_a_unit_is_in_quarantine_once_and_then_not(registry: TinyRegistry) -> None:
    again = replace(UNIT, reason="is odd in another way")
    with registry.transaction() as transaction:
        transaction.quarantine(UNIT)
        transaction.quarantine(replace(UNIT, hwid=b"other-one", name=""))
        transaction.quarantine(again)
    with registry.view() as view:
        assert view.quarantined() == [again, replace(UNIT, hwid=b"other-one", name="")]
    with registry.transaction() as transaction:
        assert transaction.clear_quarantine(UNIT.hwid)
        assert not transaction.clear_quarantine(UNIT.hwid)
        transaction.quarantine(UNIT)
    with registry.view() as view:
        assert [unit.hwid for unit in view.quarantined()] == [b"other-one", UNIT.hwid]


def test_a_registry_from_before_batches_has_none(registry: TinyRegistry) -> None:
    with registry.view() as view:
        assert (view.batches(), view.open_batch(), view.quarantined()) == ([], None, [])


def test_a_damaged_entry_is_said_and_not_guessed(registry: TinyRegistry, tmp_path: Path) -> None:
    with registry.transaction() as transaction:
        transaction.put_batch(Batch("W47", NOON))
        transaction.quarantine(UNIT)
    path = tmp_path / "registry" / REGISTRY_FILE
    tables = json.loads(path.read_text())
    tables["batches"]["1"]["opened_at"] = "yesterday"
    tables["quarantine"]["1"]["hwid"] = 3
    path.write_text(json.dumps(tables))
    with TinyRegistry(path.parent, clock=Clock(), actor="test@host").view() as view:
        with pytest.raises(RegistryError, match="could not read a batch"):
            view.batches()
        with pytest.raises(RegistryError, match="could not read a unit in quarantine"):
            view.quarantined()


class _Shares:
    """Changes to a transaction, chosen by number."""

    def __init__(self) -> None:
        tables = empty_tables()
        self.storage = TransactionStorage(tables, writable=True)
        self.transaction = TinyTransaction(self.storage, Clock(), "test@host")

    def do(self, what: int, which: int) -> None:
        transaction = self.transaction
        match what:
            case 0:
                hwid = bytes([which]) * 8
                transaction.insert(kind=Kind.DEVICE, name=f"n-{which}", role="sensor", hwid=hwid, txn=bytes(16))
            case 1 if (row := transaction.row(which)) is not None:
                transaction.update(row.changed(state=State.VOID, void_reason="test"))
            case 2:
                transaction.set_counter("c", transaction.counter("c") + which)
            case 3:
                transaction.record("act", f"n-{which}")
            case 4:
                transaction.put_batch(Batch(f"b{which}", NOON, NOON if which % 2 else None))
            case 5:
                transaction.quarantine(replace(UNIT, hwid=bytes([which]) * 8))
            case 6:
                transaction.clear_quarantine(bytes([which]) * 8)

    def content(self) -> dict[str, Any]:
        # A table that was made and emptied again is as good as none.
        return {name: copy.deepcopy(table) for name, table in self.storage.tables.items() if table}


class _UndoneError(Exception):
    pass


CHANGES = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(CHANGES, CHANGES, CHANGES)
def test_what_is_rolled_back_leaves_nothing(
    before: list[tuple[int, int]], undone: list[tuple[int, int]], after: list[tuple[int, int]]
) -> None:
    with_undone, without = _Shares(), _Shares()
    for shares in (with_undone, without):
        _apply(shares, before)
    was_changed, content = with_undone.transaction.changed, with_undone.content()
    with suppress(_UndoneError), with_undone.transaction.apart():
        _apply(with_undone, undone)
        raise _UndoneError
    assert with_undone.content() == content
    assert with_undone.transaction.changed == was_changed
    for shares in (with_undone, without):
        _apply(shares, after)
        shares.transaction.finish()
    assert with_undone.content() == without.content()
    assert with_undone.storage.tables[META][str(META_ID)] == without.storage.tables[META][str(META_ID)]


def _apply(shares: _Shares, changes: list[tuple[int, int]]) -> None:
    for what, which in changes:
        try:
            shares.do(what, which)
        except DuplicateError:
            continue
