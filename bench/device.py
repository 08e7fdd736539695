"""The device's start: from a new process to CONNACK, and its memory, beside paho-mqtt alone.

Each is the shortest program that connects with a certificate; all speak to the same gateway, in turn. A device
keeps its presence, so birthmark has said PUBLISH by then as well. An enrolled one has a state folder and renews
its certificate by itself: it has read its slot, begun the renewal's thread and said SUBSCRIBE.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final

from bench.fleet_pki import HOST
from bench.peers import BIRTHMARK, Peer, peer
from bench.report import Figure
from birthmark.device.agent.slots import Slot, Slots
from birthmark.device.identity import DeviceId, Role
from birthmark.device.link.bundle import Bundle, BundleConfig
from birthmark.device.link.vocabulary import TXN_BYTES
from birthmark.device.pem import CERTIFICATE, read_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SECTION: Final = "The device"
PAHO: Final = "paho alone"
ENROLLED: Final = "birthmark, enrolled"
NAME: Final = "dev-000"
STARTS: Final = 5
"""In a round; a start is short, and the first ones read the programs from the disk."""
TIMEOUT_S: Final = 30.0
_SAY: Final = """
memory = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"ms": (time.monotonic() - float(sys.argv[1])) * 1e3, "mb": memory / 1024}), flush=True)
os._exit(0)
"""
_BIRTHMARK: Final = f"""
import json, os, sys, time
from birthmark.device.client import Client
from birthmark.device.credentials import BrokerAddress, Credentials
folder, name, port = sys.argv[2], sys.argv[3], int(sys.argv[4])
address = BrokerAddress("{HOST}", port)
client = Client(Credentials.from_files(f"{{folder}}/{{name}}.pem", f"{{folder}}/root.pem", address))
client.connect(10)
{_SAY}"""
_PAHO: Final = f"""
import json, os, sys, time
import paho.mqtt.client as paho
folder, name, port = sys.argv[2], sys.argv[3], int(sys.argv[4])
client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=name, clean_session=False)
client.tls_set(f"{{folder}}/root.pem", f"{{folder}}/{{name}}.pem", f"{{folder}}/{{name}}.pem")
client.connect("{HOST}", port)
while not client.is_connected():
    client.loop(1)
{_SAY}"""
_ENROLLED: Final = f"""
import json, os, sys, time
from birthmark.device.client import Client
client = Client.from_folder(sys.argv[2])
client.connect(10)
{_SAY}"""
PROGRAMS: Final = {PAHO: _PAHO, BIRTHMARK: _BIRTHMARK, ENROLLED: _ENROLLED}


def figures(folder: Path, rounds: int, say: Callable[[str], None]) -> Iterator[Figure]:
    """Start the programs in turn, `STARTS` times a round; a round's value is its median.

    `folder` has the certificate of `dev-000` (`FleetPki`).
    """
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    memory: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    with peer(BIRTHMARK, folder) as broker:
        folders = {PAHO: folder, BIRTHMARK: folder, ENROLLED: enrol(folder, broker)}
        for name, where in folders.items():
            start(name, where, broker)
        for number in range(rounds):
            say(f"start of a device, round {number + 1} of {rounds}")
            found = {name: [] for name in PROGRAMS}  # type: dict[str, list[dict[str, float]]]
            for _ in range(STARTS):
                for name, results in found.items():
                    results.append(start(name, folders[name], broker))
            for name, results in found.items():
                times[name].append(sorted(result["ms"] for result in results)[STARTS // 2])
                memory[name].append(sorted(result["mb"] for result in results)[STARTS // 2])
    yield Figure(SECTION, "a new process to CONNACK", "ms", times, reference=PAHO, at_most=1.25)
    more = {
        name: [ours - theirs for ours, theirs in zip(values, memory[PAHO], strict=True)]
        for name, values in memory.items()
        if name != PAHO
    }
    yield Figure(SECTION, "its memory by then", "MB", memory, reference=PAHO)
    yield Figure(SECTION, "memory beyond paho alone (goal: 6 at most)", "MB", more)


def enrol(folder: Path, broker: Peer) -> Path:
    """Return a state folder as an enrollment leaves it, for the certificate in `folder` and a broker."""
    blocks = read_blocks((folder / f"{NAME}.pem").read_bytes())
    key_der = next(der for label, der in blocks if label.endswith("PRIVATE KEY"))
    leaf_der, *issuing_der = (der for label, der in blocks if label == CERTIFICATE)
    bundle = Bundle(
        leaf_der=leaf_der,
        issuing_der=tuple(issuing_der),
        anchors_der=tuple(der for _, der in read_blocks((folder / "root.pem").read_bytes())),
        config=BundleConfig(HOST, broker.port, DeviceId(NAME), Role("sensor")),
        issued_at=int(time.time()),
    )
    slots = Slots(folder / "state")
    slots.recover()
    slots.store_prepared(Slot(bytes(TXN_BYTES), key_der, bundle))
    slots.commit()
    return slots.folder


def start(name: str, folder: Path, broker: Peer) -> dict[str, float]:
    """Start one program and return what it says: milliseconds (`ms`) and resident megabytes (`mb`).

    `folder` has its certificate; for an enrolled device it is what `enrol` returned.

    Raises:
        RuntimeError: it did not connect; with the last thing it said.
    """
    begun_s = time.monotonic()  # the same clock for every process of a machine
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS[name], str(begun_s), str(folder), NAME, str(broker.port)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        # An installed package has its bytecode beside it; here the warm-up's start writes it.
        env={name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
    )
    if done.returncode or not done.stdout:
        raise RuntimeError(f"{name} did not connect: {done.stderr.strip().rpartition(chr(10))[2]}")
    result: dict[str, float] = json.loads(done.stdout)
    return result
