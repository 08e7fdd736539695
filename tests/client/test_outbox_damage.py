"""An outbox whose file is damaged, or that meets a defect: what can be read goes out, and nobody is held up."""

from __future__ import annotations

import contextlib
import sqlite3
from itertools import islice
from typing import TYPE_CHECKING

import pytest
from support.outbox_alone import TOPIC, outbox_at, put, stored, take_all
from support.patience import PATIENCE_S
from support.waiting import eventually

from birthmark.device.errors import SystemFailureError
from birthmark.device.outbox import outbox as module
from birthmark.device.outbox.database import Database, DatabaseUnfitError, salvaged
from birthmark.device.outbox.outbox import IN_FLIGHT

if TYPE_CHECKING:
    from pathlib import Path


def test_a_file_that_is_none_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "o.db"
    path.write_bytes(b"this is no database " * 1000)
    with outbox_at(path) as (outbox, told):
        put(outbox, "one")
    assert [event.state for event in told] == ["set-aside"]
    assert stored(path) == ["one"]
    assert (tmp_path / "o.db.damaged").read_bytes().startswith(b"this is no database")


@pytest.mark.parametrize(
    ("of", "by", "left"),
    [
        (b"telemetry", b"tele\xedetry", 2),  # no UTF-8: Python's own error, without a code of SQLite's
        (b"devices", b"devi#es", 2),  # a filter, at which the sender would stumble
        (b"NOT NULL", b"NOT \xceULL", 0),  # SQLite quotes it, and Python cannot read that
    ],
    ids=["text", "topic", "schema"],
)
def test_one_damaged_byte_keeps_nothing_else_from_going_out(
    tmp_path: Path, of: bytes, by: bytes, left: int
) -> None:
    path = tmp_path / "o.db"
    with outbox_at(path) as (outbox, _):
        for text in ("one", "two", "three"):
            put(outbox, text)
    content = path.read_bytes()
    path.write_bytes(content.replace(of, by, 1))
    with outbox_at(path) as (outbox, told):
        put(outbox, "four")
        taken = take_all(outbox, left + 1)
    assert taken[-1] == "four"
    assert len(taken) == left + 1
    assert set(taken[:-1]) <= {"one", "two", "three"}
    assert "set-aside" in [event.state for event in told]


def test_damaged_messages_cost_none_beside_or_between_them(tmp_path: Path) -> None:
    path = tmp_path / "o.db"
    with outbox_at(path) as (outbox, _):
        for text in ("one", "two", "three", "four"):
            put(outbox, text)
    content = bytearray(path.read_bytes())
    for text in ("two", "four"):
        # The octet before a record's values is the last one's type (https://sqlite.org/fileformat2.html#record_format).
        content[content.index(f"{TOPIC}{text}".encode()) - 1] ^= 1
    path.write_bytes(content)
    with outbox_at(path) as (outbox, _):
        put(outbox, "five")
        assert take_all(outbox, 3) == ["one", "three", "five"]


@pytest.mark.parametrize(
    "value",
    ["payload = 'two'", "payload = 300", "topic = CAST(topic AS BLOB)", "priority = 9e999"],
)
def test_a_value_of_another_type_is_damage(tmp_path: Path, value: str) -> None:
    """One bit makes a BLOB of a text, or a number of four bytes: it would go out as another message."""
    path = tmp_path / "o.db"
    with outbox_at(path) as (outbox, _):
        for text in ("one", "two", "three"):
            put(outbox, text)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"UPDATE messages SET {value} WHERE seq = 2")  # noqa: S608
    with outbox_at(path) as (outbox, told):
        put(outbox, "four")
        assert take_all(outbox, 3) == ["one", "three", "four"]
    assert "message 2 is none" in "".join(event.detail for event in told)


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("UPDATE facts SET value = 'abc' WHERE name = 'reserved'", "reserved"),
        ("INSERT INTO facts VALUES ('dropped', x'01')", "dropped"),
        ("UPDATE facts SET value = NULL WHERE name = 'owner'", "owner"),
        ("UPDATE messages SET size = 9e999 WHERE seq = 2", "a size"),
    ],
    ids=["reserved", "dropped", "owner", "size"],
)
def test_a_damaged_value_beside_the_messages_costs_none_of_them(tmp_path: Path, statement: str, what: str) -> None:
    path = tmp_path / "o.db"
    with outbox_at(path) as (outbox, _):
        for text in ("one", "two", "three"):
            put(outbox, text)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)
    with outbox_at(path) as (outbox, told):
        put(outbox, "four")
        assert take_all(outbox, 4) == ["one", "two", "three", "four"]
    assert told[0].state == "set-aside"
    assert f"it is damaged ({what} is not what it was)" in told[0].detail


def test_a_defect_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(module, "RETRY_DISK_S", 0.05)
    with outbox_at(tmp_path / "o.db") as (outbox, told):
        put(outbox, "one")
        with monkeypatch.context() as broken:
            broken.setattr(Database, "page", defect)
            broken.setattr(Database, "add", defect)
            with pytest.raises(SystemFailureError, match="a defect: ZeroDivisionError"):
                outbox.put(TOPIC, "two", retain=False).wait_stored(PATIENCE_S)
        eventually(lambda: not outbox.state().failing, "the disk to be tried again")
        put(outbox, "three")
        assert take_all(outbox, 2) == ["one", "three"]
    assert [event.state for event in told][:2] == ["failing", "working"]


def test_a_defect_that_stays_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts: list[object] = []

    def defect(path: Path, *_: object, **__: object) -> None:
        attempts.append(path)
        raise ZeroDivisionError

    monkeypatch.setattr(module, "RETRY_DISK_S", 0.01)
    monkeypatch.setattr(module, "open_file", defect)
    with outbox_at(tmp_path / "o.db") as (outbox, told):
        outbox.start()
        eventually(lambda: len(attempts) > 3, "the disk to be tried again and again")
    assert [record.getMessage() for record in caplog.records] == [f"a defect in the outbox {tmp_path / 'o.db'}"]
    assert [event.state for event in told] == ["failing"]


def test_a_file_that_turns_out_to_be_damaged_later_is_replaced_and_no_number_comes_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged() -> None:
        raise DatabaseUnfitError("it is damaged (a page)")

    with outbox_at(tmp_path / "o.db", drain_per_s=0) as (outbox, told):
        ids = [put(outbox, str(number)) for number in range(60)]
        first = [delivery.outgoing.payload.decode() for delivery in outbox.take()]
        assert first == list(map(str, range(IN_FLIGHT)))
        monkeypatch.setattr(outbox._database, "writing", damaged)
        ids += [put(outbox, str(number)) for number in range(60, 70)]
        assert [event.state for event in told] == ["set-aside"]
        assert "60 messages could still be read, and go out" in told[0].detail
        assert outbox.state().messages == 70
    assert len(set(ids)) == 70
    assert stored(tmp_path / "o.db") == list(map(str, range(70)))


def test_what_comes_after_a_file_of_which_nothing_is_left_goes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers go on where they were: what is below those that were sent would never be looked for."""

    def unfit() -> None:
        raise DatabaseUnfitError("it is of another version", ".other-version")

    with outbox_at(tmp_path / "o.db", drain_per_s=0) as (outbox, told):
        sent: list[str] = []

        def has_sent(count: int) -> bool:
            for delivery in outbox.take():
                sent.append(delivery.outgoing.payload.decode())
                delivery.settle()
            return len(sent) == count

        ids = [put(outbox, str(number)) for number in range(3)]
        eventually(lambda: has_sent(3), "the first three")
        monkeypatch.setattr(outbox._database, "writing", unfit)
        ids += [put(outbox, str(number)) for number in range(3, 6)]
        assert [event.state for event in told] == ["set-aside"]
        eventually(lambda: has_sent(6), "the others")
    assert sent == list(map(str, range(6)))
    numbers = [int(one.partition("-")[2]) for one in ids]
    assert numbers == sorted(set(numbers))


def test_where_the_order_of_messages_is_damaged_the_look_through_them_ends(tmp_path: Path) -> None:
    path = tmp_path / "o.db"
    with outbox_at(path) as (outbox, _):
        for text in ("one", "two", "three", "four", "five"):
            put(outbox, text)
    content = bytearray(path.read_bytes())
    # A cell begins with its length and its number, and then comes its record, which begins with the length of its
    # head (https://sqlite.org/fileformat2.html#b_tree_pages): each of one octet here.
    values = content.index(f"{TOPIC}two".encode())
    head = next(at for at in reversed(range(values)) if content[at] == values - at)
    assert content[head - 1] == 2
    content[head - 1] = 1
    path.write_bytes(content)
    pieces = list(islice(salvaged(path), 10))
    assert [row.payload for piece in pieces for row in piece] == [b"one", b"five", b"four", b"three"]
