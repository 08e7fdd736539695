"""A station for each test that asks for one, a copy of one founded before, and its command."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from support.station import PASSPHRASE, Clock, Command, new_station

from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stations to be copied, founded once: `noon`, by the clock of `station`, and `living`."""
    folder = tmp_path_factory.mktemp("founded")
    new_station(folder / "noon", Clock()).close()
    new_station(folder / "living").close()
    return folder


@pytest.fixture
def station(founded: Path, tmp_path: Path, clock: Clock) -> Station:
    """A station whose clock stands at noon of a day in May."""
    folder = shutil.copytree(founded / "noon", tmp_path / "station")
    return Station.open(folder, passphrase=PASSPHRASE, clock=clock)


@pytest.fixture
def living(founded: Path, tmp_path: Path) -> Station:
    """A station on the real clock, for what is checked against the real time."""
    return Station.open(shutil.copytree(founded / "living", tmp_path / "living"), passphrase=PASSPHRASE)


@pytest.fixture
def birthmark(
    living: Station, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    """The command `birthmark`, with the passphrase in the environment, run in an empty folder."""
    monkeypatch.setenv("BIRTHMARK_PASSPHRASE", PASSPHRASE.decode())
    monkeypatch.delenv("BIRTHMARK_ROOT_PASSPHRASE", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return Command(living.folder, capsys)
