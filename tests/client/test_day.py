"""A day of a device in fast motion: a message a second, commands, connections that come and go; memory stays flat.

86,400 messages in the whole proof, 2,400 in the suite. The device is a process of its own, on a real gateway; what
it holds is the kernel's word (`/proc/PID/status`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.device_folder import enrolled
from support.loopback_proxy import LoopbackProxy
from support.patience import PATIENCE_S
from support.vitals import Vitals

from birthmark.device.client import Client
from birthmark.device.credentials import BrokerAddress, Credentials

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.broker_process import BrokerProcess
    from support.pki import Pki

WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
ROUND = 600 if WHOLE else 400
"""Messages between two losses of the connection, and between two commands."""
WARM_UP = 12 if WHOLE else 6
ROUNDS = 86_400 // ROUND if WHOLE else 6
PAYLOAD_BYTES = 1024
MAX_GROWTH_BYTES = (512 if WHOLE else 1024) * 1024
"""In the suite less than half of the payloads that go by; in the whole proof 6 bytes a message, half a TLS session
a loss."""


_DEVICE = """
import json, sys
from birthmark.device.backoff import Backoff, RetryTimer
from birthmark.device.client import Client
from birthmark.device.outbox.settings import OutboxSettings

state, kept, size = sys.argv[1], sys.argv[2] == "outbox", int(sys.argv[3])
soon = Backoff(0.02, 0.1)
client = Client.from_folder(
    state, renewal=False, retry=RetryTimer(unreachable=soon, refused=soon),
    outbox=OutboxSettings(drain_per_s=0, durability="batch:5ms", message_id="id") if kept else None,
)

@client.command("reading")
def reading(command):
    return {"seen": command.json()["number"]}

@client.every(0.05, telemetry="pulse")
def pulse():
    return {"beat": 1}

client.connect(20)
client.publish(client.telemetry("ready"), wait=60)  # by then the broker has our SUBSCRIBE, too
print("online", flush=True)
filler = "." * (size - 32)
for line in sys.stdin:
    waiting = []
    for number in range(int(line)):
        payload = {"celsius": number / 10, ".": filler}
        waiting.append(client.publish(client.telemetry("temperature"), payload, defer=kept))
        if len(waiting) == 100:
            for one in waiting:
                one.wait(90)
            waiting = []
    print("done", flush=True)
client.stop()
"""


@pytest.mark.proof
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kept", ["memory", "outbox"])
def test_memory_stays_flat(
    tmp_path: Path, pki: Pki, gateway: BrokerProcess, kept: str, proven: Callable[[str], None]
) -> None:
    name = f"day-{kept}"
    anchors = tmp_path / "ca.pem"
    anchors.write_bytes(pki.root.pem)
    identity = pki.operator("alice").write(tmp_path / "alice.pem")
    operator = Credentials.from_files(identity, anchors, BrokerAddress("127.0.0.1", gateway.port))
    with LoopbackProxy(gateway.port) as network, Client(operator) as alice:
        state = enrolled(tmp_path / "state", pki, port=network.port, name=name)
        command = [sys.executable, "-W", "error", "-c", _DEVICE, str(state), kept, str(PAYLOAD_BYTES)]
        held: list[Vitals] = []
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as device:
            assert device.stdin is not None
            assert device.stdout is not None
            assert device.stdout.readline() == "online\n"
            for number in range(WARM_UP + ROUNDS):
                device.stdin.write(f"{ROUND}\n")
                device.stdin.flush()
                seen = alice.request(name, "reading", {"number": number}, timeout_s=PATIENCE_S).json()
                assert seen == {"seen": number}
                assert device.stdout.readline() == "done\n", "it ended"
                held.append(Vitals.of(device.pid))
                network.cut_all()
            device.stdin.close()
            assert device.wait(PATIENCE_S) == 0
    assert network.connections > ROUNDS, "the connection was to be lost again and again"
    first, last = held[WARM_UP - 1], held[-1]
    grown_kb = (last.resident_bytes - first.resident_bytes) / 1024
    proven(
        f"{ROUNDS * ROUND:,} messages of {PAYLOAD_BYTES} bytes and {network.connections} connections: "
        f"from {first.resident_bytes / 2**20:.1f} MB by {grown_kb:+.0f} KB"
    )
    assert last.resident_bytes - first.resident_bytes < MAX_GROWTH_BYTES, [one.resident_bytes for one in held]
    assert last.descriptors <= first.descriptors + 2, "an outbox's file, a connection that is just made"
