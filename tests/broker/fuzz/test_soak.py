"""A short soak: everything at once, a kill in between, and nothing that was acknowledged is lost."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from support.soak import Soak

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SECONDS = 120.0 if os.environ.get("BIRTHMARK_PROOF") == "whole" else 6.0


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_nothing_acknowledged_is_lost_and_nobody_revoked_stays(
    tmp_path: Path, proven: Callable[[str], None]
) -> None:
    soak = Soak(tmp_path, SECONDS, seed=7)
    soak.run()
    assert soak.failures == []
    summary = soak.summary()
    assert summary["lost"] == 0
    proven(
        f"{summary['acknowledged']:,} messages acknowledged in {summary['seconds']} s with "
        f"{summary['kills']} kills, {summary['policies']} policies and {summary['revocations']} "
        "revocations: none lost, nobody stayed"
    )
    for what in ("acknowledged", "kills", "policies", "revocations"):
        assert summary[what], f"the control: there were {what}"
    assert len(ET.fromstring(soak.report())) > 4, "the page is whole XML"  # noqa: S314 - our own
