"""A whole line as the documentation shows it: `birthmark-sim fixture`, then `birthmark run` on its file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from support.patience import PATIENCE_S

from birthmark.provisioning.encrypted_key import KeyDerivation
from birthmark.provisioning.founding import found_station
from birthmark.provisioning.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

CHEAP = KeyDerivation(cost=2, block_size=8, parallelism=1)
FAULTS = ["baud=921600", "latency=16", "2:foreign", "3:hostile=prove-key", "4:reboot=data"]


def test_a_fixture_by_hand(tmp_path: Path) -> None:
    station = tmp_path / "station"
    found_station(station, Settings(organization="Acme"), passphrase=b"secret", derivation=CHEAP).close()
    command = [sys.executable, "-m", "birthmark.firmware_sim", "fixture", "--slots", "4", "--json"]
    simulator = subprocess.Popen(
        [*command, "--state", str(tmp_path / "fixture"), "--faults", *FAULTS], stdout=subprocess.PIPE, text=True
    )
    with simulator:
        assert simulator.stdout is not None
        events = [json.loads(simulator.stdout.readline()) for _ in range(5)]
        assert sorted(event["event"] for event in events) == ["fixture", "ready", "ready", "ready", "ready"]
        ran = subprocess.run(
            [
                *[sys.executable, "-m", "birthmark.provisioning", "run", "--ports", events[0]["path"], "--json"],
                *["--template", "sensor-{n:05}", "--broker", "gateway-1.example.com:8883"],
            ],
            env={**os.environ, "BIRTHMARK_PASSPHRASE": "secret", "BIRTHMARK_STATION": str(station)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        simulator.send_signal(signal.SIGTERM)
    assert simulator.returncode == 0
    records = [json.loads(line) for line in ran.stdout.splitlines()]
    results = {record["slot"]: record["result"] for record in records if "result" in record and "slot" in record}
    assert results == {"1": "PASS", "2": "FAIL", "3": "FAIL", "4": "PASS"}, ran.stderr
