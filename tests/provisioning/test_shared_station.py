"""Several processes on one station at once, some of them killed: no id, serial number or CRL number twice."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from support.postgres import running
from support.station import PASSPHRASE, new_station

from birthmark.device.errors import RegistryError
from birthmark.provisioning import audit_check
from birthmark.provisioning.crl_store import current_crl
from birthmark.provisioning.crls import up_to_date_crl
from birthmark.provisioning.fleet_policy import POLICY_VERSION, current_policy
from birthmark.provisioning.registry.model import State
from birthmark.provisioning.settings import RegistrySetting
from birthmark.provisioning.settings_edit import put_registry
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SHARED_STATION = Path(__file__).parents[1] / "support" / "shared_station.py"
WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
IDS, WORKERS, KILLS = (600, 6, 100) if WHOLE else (12, 3, 2)
KILLED_AFTER = (0, 3, 1, 5, 2)
"""Lines that a process may say before it is killed."""


class Workers:
    """Processes at work; what each was promised is kept, also of those that were killed.

    None outlives the block.
    """

    def __init__(self, folder: Path, stations: Sequence[str], ids: int) -> None:
        self._folder = folder
        self._failures = folder / "failures.txt"
        self._stations = itertools.cycle(stations)
        self._ids = str(ids)
        self._number = itertools.count()
        self._running: list[subprocess.Popen[str]] = []
        self.promised: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            with process:
                process.kill()

    def start(self) -> None:
        where = [str(self._folder), next(self._stations), str(next(self._number)), self._ids]
        command = [sys.executable, str(SHARED_STATION), *where]
        with self._failures.open("ab") as failures:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=failures, text=True)
        self._running.append(process)

    def kill_one_after(self, lines: int) -> None:
        process = self._running[0]
        assert process.stdout is not None
        for _ in range(lines):
            self.promised.append(json.loads(process.stdout.readline() or "{}"))
        process.kill()
        self._collect(process)
        del self._running[0]

    def finish(self) -> None:
        """Wait for everybody; whose registry failed under it is replaced by another one."""
        while self._running:
            process = self._running[-1]
            self._collect(process)
            del self._running[-1]
            if process.returncode == RegistryError.exit_code:
                self.start()
            else:
                assert process.returncode == 0

    def _collect(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        # As the lines before: `communicate` would pass over what is read already and not yet taken.
        with process.stdout:
            said = process.stdout.read()
        process.wait()
        failures = self._failures.read_text()
        assert "Traceback" not in failures, failures
        whole = said[: said.rfind("\n") + 1]  # a kill may cut the last line
        self.promised += [json.loads(line) for line in whole.splitlines()]


@pytest.mark.proof
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("registry", ["tinydb", "sqlite"])
def test_processes_at_once_with_kills_give_nothing_out_twice(
    tmp_path: Path, registry: str, proven: Callable[[str], None]
) -> None:
    new_station(tmp_path / "station", registry="sqlite:///registry.db" if registry == "sqlite" else "").close()
    with Workers(tmp_path, ["station"], IDS) as workers:
        for _ in range(WORKERS):
            workers.start()
        for kill in range(KILLS):
            workers.kill_one_after(KILLED_AFTER[kill % len(KILLED_AFTER)])
            workers.start()
        workers.finish()
    proven(check(tmp_path, ["station"], IDS, workers.promised))


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_stations_on_one_database_with_kills_and_restarts_give_nothing_out_twice(
    tmp_path: Path, proven: Callable[[str], None]
) -> None:
    with running(durable=True) as server:
        stations = ["station", "line-2", "line-3"]
        url = server.new_schema()
        new_station(tmp_path / "station", registry=url).close()
        for name in stations[1:]:
            not_shared = shutil.ignore_patterns("audit.jsonl", "*.lock")
            shutil.copytree(tmp_path / "station", tmp_path / name, ignore=not_shared)
            put_registry(tmp_path / name / "station.toml", RegistrySetting(url, log=name))
        with Workers(tmp_path, stations, IDS) as workers:
            for _ in range(WORKERS):
                workers.start()
            for kill in range(KILLS):
                workers.kill_one_after(KILLED_AFTER[kill % len(KILLED_AFTER)])
                if kill % 4 == 1:
                    server.restart()
                workers.start()
            workers.finish()
        proven(check(tmp_path, stations, IDS, workers.promised))


def check(folder: Path, names: Sequence[str], ids: int, promised: Sequence[dict[str, Any]]) -> str:
    """Check that everything that was promised is so, and nothing was given out twice; return how much it was."""
    made = [one for one in promised if "name" in one]
    for what in ("name", "number", "cert_serial"):
        values = [one[what] for one in made]
        assert len(values) == len(set(values)), f"twice: {what}"
    crls = {(one["issuer"], one["crl"], one["sha256"]) for one in promised if "crl" in one}
    assert len(crls) == len({crl[:2] for crl in crls}), "one number, two CRLs"
    assert len(crls) > ids // 8

    policies = {one["policy"]: one["text"] for one in promised if "policy" in one}
    assert policies
    assert len(policies) == len([one for one in promised if "policy" in one]), "one version, two policies"

    stations = [Station.open(folder / name, passphrase=PASSPHRASE) for name in names]
    with stations[0].registry.view() as view:
        last_policy = current_policy(view)
        assert last_policy is not None
        assert last_policy.version == view.counter(POLICY_VERSION) >= max(policies), "promised, and not kept"
        assert policies.get(last_policy.version, last_policy.text_sha256) == last_policy.text_sha256
        rows, revoked = view.rows(), {row.cert_serial for row in view.revoked()}
    by_name = {row.name: row for row in rows}
    for one in made:
        row = by_name[one["name"]]
        assert (row.number, row.cert_serial) == (one["number"], one["cert_serial"]), "promised, and not kept"
        assert row.state is State.ATTESTED
    assert all(by_name[one["revoked"]].is_revoked for one in promised if "revoked" in one)
    assert len([row for row in rows if row.name.startswith("sensor-")]) == ids
    last = [crl for station in stations if (crl := current_crl(station)) is not None]
    assert len(last) == len(stations)
    assert max(crl.current.number for crl in last) == max(number for _, number, _ in crls)
    # A folder's own CRL is behind until something is done there; then it lists what all have revoked.
    assert [up_to_date_crl(station).cert_serials for station in stations] == [revoked] * len(stations)
    for station in stations:
        assert not audit_check.check(station.registry).problems
        station.close()
    return (
        f"{WORKERS} processes at once, {KILLS} of them killed and replaced: {len(rows)} identities, {len(crls)} "
        f"CRLs, {len(policies)} policies, {len(revoked)} revocations; none twice, and what was promised is kept"
    )
