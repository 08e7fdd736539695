"""A station on a disk that is mounted read-only, such as evidence: what reads works, and nothing else does."""

from __future__ import annotations

import shutil
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from support.mounts import mounted
from support.patience import PATIENCE_S
from support.station import PASSPHRASE, Command, enrolled_row, new_station

from birthmark.device.errors import RegistryError
from birthmark.provisioning import audit_check
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VERDICTS = 20


@pytest.fixture(params=["", "sqlite:///registry.db"], ids=["tinydb", "sqlite"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Station:
    """Return a station with a device, on a disk that can be written."""
    station = new_station(tmp_path / "station", registry=request.param)
    enrolled_row(station, "sensor-17")
    return station


@pytest.fixture
def read_only(written: Station, tmp_path: Path) -> Iterator[Station]:
    """Return the same station, by a second mount of its folder that is read-only."""
    written.close()
    with mounted("--bind", "-o", "ro", str(written.folder), at=tmp_path / "mounted") as folder:
        station = Station.open(folder, passphrase=PASSPHRASE, clock=written.clock)
        yield station
        station.close()


@pytest.fixture
def birthmark(read_only: Station, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(read_only.folder, capsys)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("locks", [True, False], ids=["with-locks", "without-locks"])
def test_what_only_reads_works(birthmark: Command, written: Station, *, locks: bool) -> None:
    if not locks:  # as a copy may be that was made with care for what matters
        for lock in written.folder.glob("*.lock"):
            lock.unlink()
    before = content(written.folder)
    for line in ("list", "show sensor-17", "audit show", "audit verify", "crl status", "ca show"):
        answer = birthmark(*line.split())
        assert answer.exit_code == 0, answer
    broken = [each for each in birthmark("doctor", "--offline", "--json").records if each.get("level") == "BROKEN"]
    assert [each["check"] for each in broken] == ["disk"], broken
    assert content(written.folder) == before


def test_what_writes_is_refused_and_changes_nothing(
    birthmark: Command, written: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIRTHMARK_PASSPHRASE", PASSPHRASE.decode())
    before = content(written.folder)
    for line in ("revoke sensor-17 --reason lost", "crl", "registry export", "audit export --out /dev/null"):
        answer = birthmark(*line.split())
        assert answer.exit_code in (5, 6), answer
        assert "ead-only" in answer.stderr or "readonly" in answer.stderr, answer
    assert content(written.folder) == before


def test_a_log_that_was_cut_is_found(birthmark: Command, written: Station) -> None:
    log = written.registry.audit_path
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]))
    answer = birthmark("audit", "verify")
    assert answer.exit_code == 6
    assert "its end was cut" in answer.stdout


def test_half_a_write_is_not_seen_where_the_disk_can_be_written_from_elsewhere(
    written: Station, read_only: Station
) -> None:
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            with written.registry.transaction() as transaction:
                transaction.record("unlock", "issuing-ca")

    writer = threading.Thread(target=write)
    writer.start()
    seen: set[int] = set()
    deadline = time.monotonic() + PATIENCE_S
    try:
        while len(seen) < VERDICTS and time.monotonic() < deadline:
            with suppress(RegistryError):  # SQLite's file changed while it was read: no verdict is no wrong one
                verdict = audit_check.check(read_only.registry)
                assert not verdict.problems, verdict
                seen.add(verdict.entries)
    finally:
        stop.set()
        writer.join()
    assert len(seen) == VERDICTS


@pytest.mark.parametrize("written", ["sqlite:///registry.db"], indirect=True, ids=["sqlite"])
def test_a_view_of_sqlites_file_in_which_it_was_written_to_is_none(written: Station, read_only: Station) -> None:
    open_view = read_only.registry.view()
    assert open_view.__enter__().live_by_name("sensor-17")
    enrolled_row(written, "sensor-18")
    with pytest.raises(RegistryError, match="written to meanwhile"):
        open_view.__exit__(None, None, None)
    with read_only.registry.view() as view:
        assert view.live_by_name("sensor-18")


@pytest.mark.parametrize("written", ["sqlite:///registry.db"], indirect=True, ids=["sqlite"])
def test_what_a_killed_station_left_beside_sqlites_file_is_read(written: Station, tmp_path: Path) -> None:
    with written.registry.held_open():
        enrolled_row(written, "sensor-18")
        assert (written.folder / "registry.db-wal").stat().st_size
        shutil.copytree(written.folder, tmp_path / "copy")
    with mounted("--bind", "-o", "ro", str(tmp_path / "copy"), at=tmp_path / "seized") as folder:
        station = Station.open(folder)
        with station.registry.view() as view:
            assert view.live_by_name("sensor-18")
        assert not audit_check.check(station.registry).problems
        station.close()
