"""The ACL of an exported Mosquitto at size: how large it is, and what it costs Mosquitto to start and to reload.

`python -m support.engine_size` in tests/ prints the table of docs/engines.md: processor time, median of rounds.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from support import mqtt_client as mqtt
from support.engine_bench import NOT_THERE
from support.ports import steady_port
from support.programs import program
from support.repository import ROOT

from birthmark.broker.export_roster import Roster
from birthmark.broker.mosquitto_files import acl
from birthmark.broker.peer import Peer
from birthmark.broker.policy_file import parse_policy
from birthmark.device.identity import DeviceId, Role

if TYPE_CHECKING:
    from birthmark.broker.policy import Policy

ROUNDS = 3
SIZES = (100, 1_000, 3_000, 10_000)
PATIENCE_S = 600.0
"""How long Mosquitto may say nothing: it reads its files before it serves anybody."""


def default_policy() -> Policy:
    """What `birthmark-broker init` writes, without what Mosquitto cannot do."""
    lines = (ROOT / "broker" / "policy.default.toml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not any(entry in line for entry in NOT_THERE)]
    return parse_policy("".join(kept).encode(), "policy.toml")


def devices(count: int) -> Roster:
    now = datetime.now(UTC)
    end = now + timedelta(days=1)
    names = [f"sensor-{number:05}" for number in range(count)]
    peers = {
        f"CN={name},OU=sensor,O=Acme": Peer(
            DeviceId(name),
            Role("sensor"),
            is_service=False,
            issuer="",
            cert_serial=1,
            not_before=now,
            not_after=end,
        )
        for name in names
    }
    return Roster(peers, 0, 0)


def cpu_of_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    assert any(words in line for line in process.stderr), f"it ended before {words!r}"


def measured(policy: Policy, count: int, folder: Path) -> dict[str, float]:
    """Start Mosquitto with the ACL of so many devices, and have it reload."""
    began_s = time.process_time()
    content = acl(policy, devices(count))
    found = {"ACL, made, s": time.process_time() - began_s, "ACL, MB": len(content) / 1e6}
    (folder / "acl").write_text(content)
    port = steady_port()
    conf = f"user root\nlog_dest stderr\nlistener {port} 127.0.0.1\nallow_anonymous true\nacl_file {folder}/acl\n"
    (folder / "mosquitto.conf").write_text(conf)
    process = subprocess.Popen(
        [program("mosquitto"), "-c", folder / "mosquitto.conf"], stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            wait_for(process, "running")
            found["start, s"] = started_s = cpu_of_s(process.pid)
            process.send_signal(signal.SIGHUP)
            wait_for(process, "Reloading config")
            with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
                client.sendall(mqtt.connect("x"))
                assert client.recv(4) == bytes(mqtt.packet(*mqtt.connack(0)))  # when everything has been read
            found["reload, s"] = cpu_of_s(process.pid) - started_s
            found["resident, MB"] = resident_mb(process.pid)
        finally:
            process.kill()
    return found


def main() -> None:
    policy = default_policy()
    found: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            for size in SIZES:
                for what, value in measured(policy, size, Path(folder)).items():
                    found[what, size].append(value)
    for what in dict.fromkeys(what for what, _ in found):
        cells = [f"{statistics.median(found[what, size]):.2f}" for size in SIZES]
        print(f"| {what} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
