"""A device that does not wait long, and what its renewal came to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.renewal_stand import Renewd, Stand
from support.renewing import PaperDevice
from support.station import Clock, new_station

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from birthmark.provisioning.station import Station


@pytest.fixture(scope="session")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """Whoever kills its broker, or needs another clock, makes one of their own."""
    due = ("due", "clockless-due")
    with Stand(tmp_path_factory.mktemp("stand"), broker_toml=RENEWAL_LISTENER, early=EARLY, due=due) as stand:
        yield stand


@pytest.fixture(scope="session")
def renewd(stand: Stand) -> Iterator[Renewd]:
    """A renewal service that stays."""
    with stand.renewd() as renewd:
        yield renewd


EARLY = ("late", "late-and-lost", "nowhere")

RENEWAL_LISTENER = """
[renewal_listener]
listen = "127.0.0.1:PORT"
"""


@pytest.fixture
def clock() -> Clock:
    """That of `station`, for a test to move."""
    return Clock()


@pytest.fixture
def station(tmp_path: Path, clock: Clock) -> Station:
    """A new one, without a gateway."""
    return new_station(tmp_path / "station", clock)


@pytest.fixture
def device(station: Station) -> PaperDevice:
    """One that was made at `station`."""
    return PaperDevice.made(station)
