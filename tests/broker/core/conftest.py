from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.mqtt_gateway import RunningGateway, running_gateway
from support.pki import Pki

from birthmark.broker.event_loop import VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def pki() -> Pki:
    return Pki.create()


@pytest.fixture(params=["uvloop", "asyncio"])
def event_loop_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of the core runs on both event loops."""
    name: str = request.param
    monkeypatch.setenv(VARIABLE, name)
    if name == "uvloop":
        pytest.importorskip("uvloop")
    return name


@pytest.fixture
def gateway(event_loop_name: str, tmp_path: Path, pki: Pki) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path, pki) as running:
        yield running
