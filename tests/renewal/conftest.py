"""A device that does not wait long, and what its renewal came to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.renewal_stand import Renewd, Stand

if TYPE_CHECKING:
    from collections.abc import Iterator


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
