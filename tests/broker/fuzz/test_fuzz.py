"""What a client with a good certificate can do by saying anything at all: end its own connection, and no more."""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING

import pytest
from support.mqtt_canary import singing
from support.mqtt_fuzz import PacketFuzzer, say
from support.mqtt_world import process_world
from support.pki import Pki
from support.vitals import Vitals, wait_for_descriptors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.mqtt_world import ProcessWorld

WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
SEEDS, PACKETS = ((1, 2, 3, 4, 5), 20_000) if WHOLE else ((6,), 2_000)
MAX_GROWTH_BYTES = 50 * 1_048_576
MAX_LOG_BYTES_A_MINUTE = 65_536
"""Of lines a minute an identity has so many, however much it says; as much once more for what is said at first."""
BURST = 20


def storm(world: ProcessWorld, name: str, seed: int, count: int) -> int:
    """Say so many packets, on each connection as long as the gateway bears it; return how many it took."""
    chance = random.Random(seed)
    fuzzer = PacketFuzzer(chance, name)
    context = world.context(name)
    said = connections = 0
    while said < count:
        client = world.open(context)
        connections += 1
        is_heard = say(client.tls, fuzzer.connect())
        while is_heard and said < count:
            burst = min(chance.randrange(1, BURST), count - said)
            said += burst
            is_heard = say(client.tls, b"".join(fuzzer.packet() for _ in range(burst)))
        client.close()
        world.clients.remove(client)
    return connections


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_no_packet_harms_the_gateway(tmp_path: Path, proven: Callable[[str], None]) -> None:
    with process_world(tmp_path, Pki.create()) as world:
        pid = world.broker.process.pid
        canary = world.client("canary")
        quiet = Vitals.of(pid)
        storm(world, "fuzz", 0, 200)  # so that what is made once is there
        wait_for_descriptors(pid, quiet.descriptors)
        before = Vitals.of(pid)
        began_s = time.monotonic()
        with singing(canary, "canary") as song:
            connections = [storm(world, "fuzz", seed, PACKETS) for seed in SEEDS]
        assert all(count > PACKETS // 200 for count in connections), "the control: it does break the protocol"
        wait_for_descriptors(pid, before.descriptors)
        assert Vitals.of(pid).resident_bytes - before.resident_bytes < MAX_GROWTH_BYTES
        status = world.status()
        assert status.counters["defects"] == 0
        assert status.counters["malformed"] > 0
        assert status.counters["publishes_denied"] > 0
        minutes = (time.monotonic() - began_s) / 60
        logged_bytes = sum(len(str(record)) for record in world.broker.log)
        assert logged_bytes < MAX_LOG_BYTES_A_MINUTE * (1 + minutes)
        assert song.count
        proven(
            f"{len(SEEDS) * PACKETS:,} packets over {sum(connections):,} connections: no defect, and "
            f"{song.count:,} messages of a bystander went through meanwhile, the slowest "
            f"in {song.latest_s:.2f} s"
        )
