"""A device that is killed at any moment, and a gateway that is killed as well: nothing that was stored is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from support.broker_process import BrokerProcess
from support.device_folder import enrolled
from support.patience import PATIENCE_S
from support.pki import Pki
from support.waiting import eventually
from support.watching import Watching

from birthmark.device.backoff import Backoff, RetryTimer
from birthmark.device.client import Client
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.events import Connected

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from birthmark.device.received import Message

WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
KILLS = 200 if WHOLE else 4
EVERY = 8 if WHOLE else 2
"""The gateway is killed with each so many-th kill of the device."""
AT_ONCE = Backoff(0.02, 0.1)
TOPIC = "devices/sensor-1/telemetry/count"

_PUBLISHER = """
import os, sys
from birthmark.device.backoff import Backoff, RetryTimer
from birthmark.device.client import Client
from birthmark.device.outbox.settings import OutboxSettings

state, topic, first, durability, until = sys.argv[1:]
soon = Backoff(0.02, 0.1)
client = Client.from_folder(
    state, renewal=False, retry=RetryTimer(unreachable=soon, refused=soon),
    outbox=OutboxSettings(drain_per_s=0, durability=durability),
)
client.start()
number = int(first)
while until == "killed":
    client.publish(topic, str(number))
    os.write(1, b"%d\\n" % number)      # acknowledged: from here on it may not be lost
    number += 1
client.publish(topic, "last", wait=60)
client.stop()
"""


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_nothing_that_was_stored_is_lost_and_the_order_is_kept(
    tmp_path: Path, proven: Callable[[str], None]
) -> None:
    draw = random.Random(11)
    pki = Pki.create()
    anchors = tmp_path / "ca.pem"
    anchors.write_bytes(pki.root.pem)
    identity = pki.operator("alice").write(tmp_path / "alice.pem")
    got: list[bytes] = []

    def take(message: Message) -> None:
        got.append(message.payload)

    with BrokerProcess(tmp_path / "gw", pki) as broker:
        watching = Watching()
        alice = Client(
            Credentials.from_files(identity, anchors, BrokerAddress("127.0.0.1", broker.port)),
            clean_session=False,
            retry=RetryTimer(unreachable=AT_ONCE, refused=AT_ONCE),
            observe=watching,
        )
        state = enrolled(tmp_path / "state", pki, port=broker.port)
        first, acknowledged, connections = 0, 0, 1
        with alice:
            alice.subscribe("devices/sensor-1/telemetry/#", take, wait=PATIENCE_S)
            for kill in range(KILLS):
                durability = "message" if kill % 2 else "batch:20ms"
                after = draw.randrange(0, 40)
                if kill % EVERY == EVERY - 1:
                    cutter = threading.Timer(draw.uniform(0.1, 0.4), broker.process.kill)
                    cutter.start()
                    last = run_and_kill(state, first, durability, after, draw.uniform(0, 0.3))
                    cutter.join()
                    broker.stop(signal.SIGKILL)
                    broker.start()
                    connections += 1
                    watching.wait_for(Connected, connections)
                else:
                    last = run_and_kill(state, first, durability, after, draw.uniform(0, 0.1))
                if last is not None:
                    first, acknowledged = last + 1, last + 1
            done = publisher(state, first, "message", "drained")
            _, errors = done.communicate(timeout=90)
            assert (done.returncode, errors) == (0, b"")
            eventually(lambda: b"last" in got, "the last one")
    numbers = list(dict.fromkeys(got))
    assert numbers.pop() == b"last"
    assert acknowledged > KILLS
    missing = {str(number).encode() for number in range(acknowledged)} - set(numbers)
    assert not missing
    assert numbers == sorted(numbers, key=int)
    proven(
        f"{KILLS} kills of the device, {connections - 1} of the gateway, {acknowledged:,} messages stored: "
        f"none lost, all in order, {len(got) - len(numbers) - 1} delivered again"
    )


def publisher(state: Path, first: int, durability: str, until: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _PUBLISHER, state, TOPIC, str(first), durability, until],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run_and_kill(state: Path, first: int, durability: str, after: int, more_s: float) -> int | None:
    """Kill a publisher at a random moment after so many acknowledgements; return the last that it gave."""
    process = publisher(state, first, durability, "killed")
    assert process.stdout is not None
    seen = b"".join(process.stdout.readline() for _ in range(after))
    if more_s:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(more_s)
    process.kill()
    # As the lines before: `communicate` would pass over what is read already and not yet taken.
    rest = process.stdout.read()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert not errors, errors
    process.communicate()
    whole = [line for line in (seen + rest).split(b"\n")[:-1] if line]
    return int(whole[-1]) if whole else None
