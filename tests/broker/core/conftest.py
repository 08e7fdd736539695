from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.mqtt_gateway import RunningGateway, running_gateway
from support.pki import Pki

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def pki() -> Pki:
    return Pki.create()


@pytest.fixture
def gateway(tmp_path: Path, pki: Pki) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path, pki) as running:
        yield running
