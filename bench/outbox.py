"""What an outbox costs: bytes written to the disk for each message (they wear an SD card), and messages a second.

The bytes are what the kernel counts for the process (`write_bytes` in /proc/self/io): pages that were written to
and synced, the log and what is folded back from it included. A filesystem in memory counts none: then there is no
figure.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.report import Figure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECTION: Final = "The device's outbox"
EACH: Final = "message"
KINDS: Final = {EACH: ("message", 200), "batch:200ms": ("batch:200ms", 2000)}
"""Durability and how many messages; they come one by one in the first, and without a pause in the second."""
PAYLOAD_BYTES: Final = 100
TIMEOUT_S: Final = 120.0
_PROGRAM: Final = """
import json, sys, time
from pathlib import Path
from birthmark.device.outbox.outbox import Outbox
from birthmark.device.outbox.settings import OutboxSettings

path, durability, count, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def written():
    facts = dict(line.split(": ") for line in open("/proc/self/io"))
    return int(facts["write_bytes"])

outbox = Outbox(
    OutboxSettings(durability=durability, drain_per_s=0), path, "dev-000", tell=lambda _: None, wake=lambda: None,
    send_from_memory=lambda _o, _a: None, now_s=time.time,
)
outbox.put("devices/dev-000/telemetry/t", b"", retain=False).wait_stored()
before, begun = written(), time.monotonic()
accepted = 0
for number in range(count):
    waiting = outbox.put("devices/dev-000/telemetry/t", bytes(size), retain=False)
    if durability == "message":
        waiting.wait_stored()
    for delivery in outbox.take():
        delivery.settle()
        accepted += 1
waiting.wait_stored()
seconds = time.monotonic() - begun
while accepted <= count:
    for delivery in outbox.take():
        delivery.settle()
        accepted += 1
outbox.close(60)
print(json.dumps({"bytes": (written() - before) / count, "rate": count / seconds}))
"""


def figures(rounds: int, say: Callable[[str], None]) -> Iterator[Figure]:
    """Store and remove messages of 100 bytes in both durabilities, in turn."""
    written: dict[str, list[float]] = {name: [] for name in KINDS}
    rates: dict[str, list[float]] = {name: [] for name in KINDS}
    for number in range(rounds):
        say(f"outbox, round {number + 1} of {rounds}")
        for name, (durability, count) in KINDS.items():
            result = stored(durability, count)
            rates[name].append(result["rate"])
            if result["bytes"]:
                written[name].append(result["bytes"])
    of = f"a message of {PAYLOAD_BYTES} bytes"
    yield Figure(SECTION, f"written to the disk for {of}", "bytes", written, ours="batch:200ms", reference=EACH)
    yield Figure(SECTION, "stored in a second", "messages", rates, ours="batch:200ms", reference=EACH)


def stored(durability: str, count: int) -> dict[str, float]:
    """Store `count` messages in a process of its own; bytes written for each, and how many a second.

    Raises:
        RuntimeError: it failed; with the last thing it said.
    """
    # Beside this file: where the programs are is a disk, and /tmp may be memory.
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, f"{folder}/outbox.db", durability, str(count), str(PAYLOAD_BYTES)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"the outbox failed: {done.stderr.strip().rpartition(chr(10))[2]}")
    result: dict[str, float] = json.loads(done.stdout)
    return result
