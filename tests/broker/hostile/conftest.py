from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.lax_server import LaxServer, lax_server
from support.mqtt_world import ProcessWorld, process_world
from support.pki import Pki

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def pki() -> Pki:
    return Pki.create()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[ProcessWorld]:
    """One broker for the tests of a module."""
    with process_world(tmp_path_factory.mktemp("gateway"), pki) as running:
        yield running


@pytest.fixture(scope="module")
def lax(world: ProcessWorld) -> Iterator[LaxServer]:
    with lax_server(world.folder) as running:
        yield running
