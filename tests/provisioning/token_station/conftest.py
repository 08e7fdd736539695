"""A station with its issuing key in a token, a copy of one founded before, and its command."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from support.softhsm import PIN, SoftHsm, running, with_a_token
from support.station import PASSPHRASE, Command
from support.token_station import TOKEN, found

from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from birthmark.provisioning.tokens.uri import TokenUri


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[SoftHsm, SoftHsm, Path]:
    """To be copied: SoftHSM with an empty token, the same with a station's key in it, and that station."""
    folder = tmp_path_factory.mktemp("made")
    empty = with_a_token(folder / "empty")
    for hsm in running(folder / "held", empty):
        found(folder / "station", hsm, TOKEN).close()
    return empty, hsm, folder / "station"


@pytest.fixture
def softhsm(
    made: tuple[SoftHsm, SoftHsm, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[SoftHsm]:
    """SoftHSM with the token LABEL: empty, or with the key of the station `held`."""
    empty, used, _ = made
    yield from running(tmp_path / "softhsm", used if "held" in request.fixturenames else empty)


@pytest.fixture
def token(softhsm: SoftHsm) -> TokenUri:
    del softhsm
    return TOKEN


@pytest.fixture
def held(softhsm: SoftHsm, made: tuple[SoftHsm, SoftHsm, Path], tmp_path: Path) -> Station:
    """A station whose issuing CA's key is in the token."""
    del softhsm
    folder = shutil.copytree(made[2], tmp_path / "station")
    return Station.open(folder, passphrase=PASSPHRASE, pin=PIN)


@pytest.fixture
def at_token(held: Station, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`birthmark` at that station, with passphrase and PIN in the environment."""
    monkeypatch.setenv("BIRTHMARK_PASSPHRASE", PASSPHRASE.decode())
    monkeypatch.setenv("BIRTHMARK_TOKEN_PIN", PIN.decode())
    return Command(held.folder, capsys)
