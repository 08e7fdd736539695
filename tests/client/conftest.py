"""What the tests of the client share: a PKI, two brokers, one that does as told and the real one, a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.broker_process import BrokerProcess
from support.broker_stub import BrokerStub
from support.device_folder import enrolled
from support.pki import Pki

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def pki() -> Pki:
    return Pki.create()


@pytest.fixture
def broker(pki: Pki) -> Iterator[BrokerStub]:
    """A broker that does what the test says."""
    with BrokerStub(pki) as stub:
        yield stub


@pytest.fixture
def state(tmp_path: Path, pki: Pki, broker: BrokerStub) -> Path:
    """The state folder of a device that was enrolled for that one."""
    return enrolled(tmp_path / "state", pki, port=broker.port, keepalive_s=77)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[BrokerProcess]:
    """The real one, as a process; for the tests of one file."""
    with BrokerProcess(tmp_path_factory.mktemp("gateway"), pki) as process:
        yield process
