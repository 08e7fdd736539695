from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.board_station import open_desk

if TYPE_CHECKING:
    from pathlib import Path

    from support.board_station import Desk


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return open_desk(tmp_path / "station")
