from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.mqtt_gateway import RunningGateway, running_gateway
from support.pki import Pki
from support.upstreams import POLICY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def pki() -> Pki:
    return Pki.create()


@pytest.fixture
def above(tmp_path: Path, pki: Pki) -> Iterator[RunningGateway]:
    """The broker above."""
    folder = tmp_path / "above"
    folder.mkdir()
    with running_gateway(folder, pki, policy_toml=POLICY) as running:
        yield running
