"""Several processes on one station at once, some of them killed: no id, serial number or CRL number twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.station import new_station

from birthmark.provisioning import audit_check
from birthmark.provisioning.crls import current_crl
from birthmark.provisioning.registry.model import State
from birthmark.provisioning.station import Station

SHARED_STATION = Path(__file__).parents[1] / "support" / "shared_station.py"
WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
IDS, WORKERS, KILLS = (600, 6, 100) if WHOLE else (32, 3, 3)
KILLED_AFTER = (0, 3, 1, 5, 2)
"""Lines that a process may say before it is killed."""


class Workers:
    """Processes at work; what each was promised is kept, also of those that were killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[subprocess.Popen[str]] = []
        self.promised: list[dict[str, Any]] = []

    def start(self) -> None:
        command = [sys.executable, str(SHARED_STATION), str(self._folder), str(len(self._running)), str(IDS)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._running.append(process)

    def kill_one_after(self, lines: int) -> None:
        process = self._running.pop(0)
        assert process.stdout is not None
        for _ in range(lines):
            self.promised.append(json.loads(process.stdout.readline() or "{}"))
        process.kill()
        self._collect(process)

    def finish(self) -> None:
        for process in self._running:
            self._collect(process)
            assert process.returncode == 0

    def _collect(self, process: subprocess.Popen[str]) -> None:
        said, failed = process.communicate(timeout=300)
        assert "Traceback" not in failed, failed
        whole = said[: said.rfind("\n") + 1]  # a kill may cut the last line
        self.promised += [json.loads(line) for line in whole.splitlines()]


@pytest.mark.proof
@pytest.mark.timeout(600)
def test_processes_at_once_with_kills_give_nothing_out_twice(tmp_path: Path) -> None:
    new_station(tmp_path / "station").close()
    workers = Workers(tmp_path)
    for _ in range(WORKERS):
        workers.start()
    for kill in range(KILLS):
        workers.kill_one_after(KILLED_AFTER[kill % len(KILLED_AFTER)])
        workers.start()
    workers.finish()
    promised = workers.promised
    made = [one for one in promised if "name" in one]
    for what in ("name", "number", "cert_serial"):
        values = [one[what] for one in made]
        assert len(values) == len(set(values)), f"twice: {what}"
    crls = {(one["issuer"], one["crl"], one["sha256"]) for one in promised if "crl" in one}
    assert len(crls) == len({crl[:2] for crl in crls}), "one number, two CRLs"
    assert len(crls) > IDS // 4

    station = Station.open(tmp_path / "station")
    with station.registry.view() as view:
        rows, revoked = view.rows(), {row.cert_serial for row in view.revoked()}
    by_name = {row.name: row for row in rows}
    for one in made:
        row = by_name[one["name"]]
        assert (row.number, row.cert_serial) == (one["number"], one["cert_serial"]), "promised, and not kept"
        assert row.state is State.ATTESTED
    assert all(by_name[one["revoked"]].is_revoked for one in promised if "revoked" in one)
    assert len([row for row in rows if row.name.startswith("sensor-")]) == IDS
    last = current_crl(station)
    assert last is not None
    assert last.current.number == max(number for _, number, _ in crls)
    assert last.cert_serials == revoked
    assert not audit_check.check(station.registry).problems
