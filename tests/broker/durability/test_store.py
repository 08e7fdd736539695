"""The contract of the store: what `apply` returned from is there, whole; what it raised for is not."""

from __future__ import annotations

import sqlite3
import stat
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from birthmark.broker.peer import Peer
from birthmark.broker.records import (
    Changes,
    DeliveryRow,
    IncomingRow,
    MessageRow,
    RetainedRow,
    SessionRow,
    Stored,
    SubscriptionRow,
    peer_from_text,
    peer_text,
)
from birthmark.broker.store import FILE_NAME, Store, StoreError
from birthmark.device.errors import BirthmarkError, ConfigurationError, SystemFailureError
from birthmark.device.identity import DeviceId, Role

NUMBERS = st.integers(1, 5)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
ROWS: dict[str, st.SearchStrategy[Any]] = {
    "sessions": st.tuples(NUMBERS, st.none() | st.floats(0, 1e10)).map(
        lambda t: SessionRow(t[0], f"client-{t[0]}", "{}", t[1])
    ),
    "subscriptions": st.builds(SubscriptionRow, NUMBERS, TEXTS, st.integers(0, 2), st.booleans()),
    "messages": st.builds(MessageRow, NUMBERS, TEXTS, st.binary(max_size=20), st.integers(0, 2), st.booleans()),
    "deliveries": st.builds(
        DeliveryRow, NUMBERS, NUMBERS, NUMBERS, st.integers(1, 2), st.integers(0, 65_535), st.booleans()
    ),
    "incoming": st.builds(IncomingRow, NUMBERS, st.integers(1, 65_535)),
    "retained": st.builds(
        RetainedRow, TEXTS, st.binary(min_size=1, max_size=20), st.integers(0, 2), st.none() | st.just("{}")
    ),
}


def key_of(table: str, row: Any) -> Any:
    return row[:2] if table in ("subscriptions", "incoming") else row[0]


@st.composite
def _changes(draw: st.DrawFn) -> Changes:
    changes = Changes()
    for table, rows in ROWS.items():
        for row in draw(st.lists(rows, max_size=4)):
            getattr(changes, table)[key_of(table, row)] = row if draw(st.booleans()) else None
    return changes


CHANGES = _changes()


def as_tables(stored: Stored) -> dict[str, set[Any]]:
    return {field.name: set(getattr(stored, field.name)) for field in fields(stored)}


def opened(folder: Path) -> Store:
    return Store.open(folder / FILE_NAME)


def message(key: int, payload: bytes = b"x") -> Changes:
    return Changes(messages={key: MessageRow(key, "t", payload, 1, retain=False)})


@given(st.lists(st.tuples(CHANGES, st.booleans()), max_size=6))
@settings(max_examples=60, deadline=None)
def test_it_holds_the_last_word_on_each_key(steps: list[tuple[Changes, bool]]) -> None:
    """However changes are grouped, merged or interrupted by a restart."""
    model: dict[str, dict[Any, Any]] = {table: {} for table in ROWS}
    gathered = Changes()
    with TemporaryDirectory() as folder:
        store = opened(Path(folder))
        for changes, is_applied in steps:
            for table, held in model.items():
                held.update(getattr(changes, table))
            gathered.add(changes)
            if is_applied:
                store.apply(gathered)
                gathered = Changes()
                store.close()
                store = opened(Path(folder))
        store.apply(gathered)
        expected = {table: {row for row in held.values() if row is not None} for table, held in model.items()}
        assert as_tables(store.load()) == expected
        store.close()


def test_deliveries_come_back_in_their_order(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for key in (3, 1, 2):
        store.apply(Changes(deliveries={key: DeliveryRow(key, 1, 1, 1, 0, is_released=False)}))
    assert [row.key for row in store.load().deliveries] == [1, 2, 3]
    store.close()


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.apply(message(1))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o600}
    store.close()


def test_a_group_that_fails_is_not_there_at_all_and_may_be_tried_again(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.apply(message(1))
    (pages,) = store._database.execute("PRAGMA page_count").fetchone()
    store._database.execute(f"PRAGMA max_page_count={pages}")
    changes = message(2)
    changes.add(message(3, bytes(100_000)))
    with pytest.raises(StoreError, match="full") as caught:
        store.apply(changes)
    assert "make room" in caught.value.hint
    assert [row.key for row in store.load().messages] == [1]
    store._database.execute("PRAGMA max_page_count=1000000")
    store.apply(changes)
    assert [row.key for row in store.load().messages] == [1, 2, 3]
    store.close()


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.apply(message(1))
    with pytest.raises(SystemFailureError, match="locked") as caught:
        opened(tmp_path)
    assert "one broker at a time" in caught.value.hint
    first.close()
    opened(tmp_path).close()


def test_a_newer_version_is_refused_and_untouched(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.apply(message(1))
    store._database.execute("PRAGMA user_version=2")
    store.close()
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(ConfigurationError, match="version 2, this broker knows 1") as caught:
        opened(tmp_path)
    assert "newer" in caught.value.hint
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / FILE_NAME)
    database.execute("CREATE TABLE theirs (a)")
    database.close()
    with pytest.raises(ConfigurationError, match="another program"):
        opened(tmp_path)


@pytest.mark.parametrize("damage", ["header", "schema", "middle", "truncated"])
def test_a_damaged_file_is_refused_and_never_emptied(tmp_path: Path, damage: str) -> None:
    store = opened(tmp_path)
    for key in range(1, 60):
        store.apply(message(key, bytes([key]) * 3_000))
    store.close()
    path = tmp_path / FILE_NAME
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[:16] = b"not a database!!"
    elif damage == "schema":  # SQLite quotes what it finds there, which is no text any more
        assert b"CREATE TABLE retained" in content
        content = content.replace(b"CREATE TABLE retained", b"CREATE TABL\xff retained")
    elif damage == "middle":
        content[8_192 : len(content) - 4_096 : 512] = b"\xff" * len(range(8_192, len(content) - 4_096, 512))
    else:
        del content[len(content) // 2 :]
    path.write_bytes(content)
    with pytest.raises(SystemFailureError, match="damaged") as caught:
        opened(tmp_path)
    assert "backup" in caught.value.hint
    assert "***" not in caught.value.message, "SQLite's heading says nothing of what is wrong"
    assert path.read_bytes() == content


def test_a_folder_that_cannot_hold_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemFailureError, match="could not open the store"):
        Store.open(tmp_path / "missing" / FILE_NAME)


@given(st.text(max_size=60))
@settings(deadline=None)
def test_text_that_is_no_peer_is_a_value_error(text: str) -> None:
    try:
        peer_from_text(text)
    except ValueError:
        return
    raise AssertionError("any text was taken for a peer")


def test_a_peer_survives() -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    peer = Peer(
        DeviceId("s-1"),
        Role("operator"),
        is_service=True,
        issuer="ab" * 20,
        cert_serial=2**158 + 1,
        not_before=moment,
        not_after=moment,
    )
    assert peer_from_text(peer_text(peer)) == peer
    assert issubclass(StoreError, BirthmarkError)
