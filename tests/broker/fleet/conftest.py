"""The CA of these tests: made once, as making it is slower than using it."""

from __future__ import annotations

import pytest
from support.pki import Pki


@pytest.fixture(scope="session")
def pki() -> Pki:
    return Pki.create()
