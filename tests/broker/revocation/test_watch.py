"""When a watched file has changed, and when it has come to rest."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from birthmark.broker.watch import Watch, WatchedFiles
from birthmark.device.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


async def nothing() -> None:
    """What is done about a change is another test's matter."""


def watched(*paths: Path) -> WatchedFiles:
    return WatchedFiles(paths, nothing)


def test_no_change_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("1")
    files = watched(path)
    assert not files.has_changed()
    assert not files.has_changed()


def test_a_file_that_is_replaced_is_taken_at_once_and_once(tmp_path: Path) -> None:
    path, new = tmp_path / "a", tmp_path / "b"
    path.write_text("1")
    files = watched(path)
    new.write_text("1")
    new.replace(path)
    assert files.has_changed()
    assert not files.has_changed()


def test_a_file_written_in_place_is_taken_when_it_rests(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("1")
    files = watched(path)
    with path.open("a") as writer:
        for _ in range(3):
            writer.write("more")
            writer.flush()
            assert not files.has_changed()
    assert files.has_changed()
    assert not files.has_changed()


def test_a_file_that_vanishes_is_no_change_and_one_that_appears_is(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("1")
    files = watched(path)
    path.unlink()
    for _ in range(3):
        assert not files.has_changed()
    path.write_text("1")
    assert files.has_changed()


def test_a_file_that_vanishes_is_said_to_be_gone_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("1")
    files = watched(path)
    path.unlink()
    for _ in range(3):
        files.has_changed()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{path} is gone" in caplog.text
    path.write_text("1")
    files.has_changed()
    path.unlink()
    files.has_changed()
    assert len(caplog.records) == 2


def test_a_file_that_cannot_be_used_is_reported_with_its_hint_if_there_is_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for hint, end in (("do better", "stays (do better)"), ("", "stays")):

        async def refuse(hint: str = hint) -> None:
            raise ConfigurationError("could not use it: no", hint)

        caplog.clear()
        asyncio.run(WatchedFiles([tmp_path / "a"], refuse).take())
        record: Any = caplog.records[0]
        assert record.getMessage() == f"could not use it: no; what was in force {end}"
        assert record.fields["event"] == "file_refused"
        assert record.fields["path"] == str(tmp_path / "a")


def test_a_file_that_was_never_there_appears(tmp_path: Path) -> None:
    files = watched(tmp_path / "a")
    assert not files.has_changed()
    (tmp_path / "a").write_text("1")
    assert files.has_changed()


def test_one_of_several_is_enough(tmp_path: Path) -> None:
    one, other, new = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    one.write_text("1")
    other.write_text("1")
    files = watched(one, other)
    new.write_text("2")
    new.replace(other)
    assert files.has_changed()


def test_what_changes_is_taken_whatever_became_of_the_last_one_and_all_is_when_asked(tmp_path: Path) -> None:
    async def watch() -> None:
        taken: asyncio.Queue[str] = asyncio.Queue()
        paths = [tmp_path / name for name in ("a", "b")]

        async def take(name: str) -> None:
            await taken.put(name)
            if name == "a":
                raise ZeroDivisionError

        for path in paths:
            path.write_text("1")
        watch = Watch([WatchedFiles((path,), partial(take, path.name)) for path in paths], 0.02)
        running = asyncio.create_task(watch.run())
        for path in paths:
            new = tmp_path / "new"
            new.write_text("2")
            new.replace(path)
            assert await taken.get() == path.name
        watch.take_all()
        assert [await taken.get(), await taken.get()] == ["a", "b"]
        running.cancel()
        await asyncio.wait([running])
        assert taken.empty()

    asyncio.run(watch())
