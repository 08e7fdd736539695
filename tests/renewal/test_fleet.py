"""A whole fleet renewed at once, by its own clients, through a real gateway and a real renewal service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.renewal_stand import Stand

from birthmark.device.credentials import Credentials
from birthmark.provisioning.registry.model import State

if TYPE_CHECKING:
    from collections.abc import Callable

WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
COUNT = 1_000 if WHOLE else 20
PROCESSES = 2
FLEET = Path(__file__).parents[1] / "support" / "renewal_fleet.py"


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_a_fleet_is_renewed_in_one_go(tmp_path: Path, proven: Callable[[str], None]) -> None:
    with Stand(tmp_path) as stand:
        folders = stand.fleet(COUNT)
        with stand.renewd() as renewd:
            parts = [folders[number::PROCESSES] for number in range(PROCESSES)]
            fleet = [
                subprocess.Popen(
                    [sys.executable, str(FLEET), *map(str, part)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for part in parts
            ]
            try:
                for process in fleet:
                    assert process.stdout is not None
                    assert process.stdout.readline() == "connected\n"
                began = time.monotonic()
                for process in fleet:
                    assert process.stdin is not None
                    process.stdin.write("go\n")
                    process.stdin.flush()
                told = [json.loads(process.stdout.readline()) for process in fleet if process.stdout is not None]
                elapsed_s = time.monotonic() - began
                for process in fleet:
                    process.communicate(timeout=120)
            finally:
                for process in fleet:
                    process.kill()
            groups = [line for line in renewd.lines if line["event"] == "group"]
        troubles = [trouble for one in told for trouble in one["troubles"]]
        proven(
            f"{COUNT} devices renewed in {elapsed_s:.1f} s: {COUNT / elapsed_s:.0f}/s, "
            f"{len(groups)} groups of up to {max((one['requests'] for one in groups), default=1)} requests, "
            f"{len(troubles)} attempts had to be made again"
        )
        assert sum(one["renewed"] for one in told) == COUNT, troubles[:3]
        with stand.station.registry.view() as view:
            rows = [row for row in view.rows() if row.name.startswith("fleet-")]
        live = {row.name: row for row in rows if row.is_live}
        assert len({row.cert_serial for row in rows}) == len(rows)
        assert len(live) == COUNT
        for folder in folders:
            assert Credentials.from_folder(folder).leaf_der == live[folder.name].certificate_der
        valid = [row for row in rows if not row.is_revoked and row.state is not State.VOID]
        assert len(valid) == 2 * COUNT
