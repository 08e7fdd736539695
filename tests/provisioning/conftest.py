"""A station for each test that asks for one, and its command."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.station import PASSPHRASE, Clock, Command, new_station

if TYPE_CHECKING:
    from pathlib import Path

    from birthmark.provisioning.station import Station


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def station(tmp_path: Path, clock: Clock) -> Station:
    """A station whose clock stands at noon of a day in May."""
    return new_station(tmp_path / "station", clock)


@pytest.fixture
def living(tmp_path: Path) -> Station:
    """A station on the real clock, for what is checked against the real time."""
    return new_station(tmp_path / "living")


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
