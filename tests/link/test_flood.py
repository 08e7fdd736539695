"""100 MB of random bytes (in `make proof`; a few in the suite): no frame, no growth, no error, at either end."""

from __future__ import annotations

import os
import random
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from support.agent_bench import Bench

from birthmark.device.link.frame import MAX_ENCODED, MAX_NOISE, Deframer
from birthmark.provisioning.enrollment.exchange import Line

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MEGABYTE = 1 << 20
MEGABYTES = 100 if os.environ.get("BIRTHMARK_PROOF") == "whole" else 2
FLAT_BYTES = 64 * 1024


def _flat(feed: Callable[[bytes], object]) -> str:
    """Feed random bytes, and hold that what is allocated neither grows nor peaks; return how much it was."""
    generator = random.Random(2)
    feed(generator.randbytes(MEGABYTE))
    peak_bytes = 0
    tracemalloc.start()
    try:
        for _ in range(MEGABYTES):
            flood = generator.randbytes(MEGABYTE)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            for start in range(0, MEGABYTE, 4096):
                feed(flood[start : start + 4096])
            peak_bytes = max(peak_bytes, tracemalloc.get_traced_memory()[1] - before)
            assert peak_bytes < FLAT_BYTES
            del flood
    finally:
        tracemalloc.stop()
    return f"{MEGABYTES} MB of random bytes, {peak_bytes / 1024:.1f} KB allocated at any time"


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_no_frame_is_found_in_random_bytes(proven: Callable[[str], None]) -> None:
    deframer = Deframer()

    def feed(data: bytes) -> None:
        assert deframer.feed(data) == []
        assert len(deframer.noise) <= MAX_NOISE + MAX_ENCODED

    proven(_flat(feed))
    assert deframer.received == (MEGABYTES + 1) * MEGABYTE
    assert deframer.bad > 2000 * MEGABYTES


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_a_station_is_flooded(proven: Callable[[str], None]) -> None:
    line = Line(clock=lambda: 0.0, sid=1, baud=115_200)

    def feed(data: bytes) -> None:
        assert line.feed(data) == []

    proven(_flat(feed))
    assert line.evidence.sound_frames == 0


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_a_device_is_flooded(tmp_path: Path, proven: Callable[[str], None]) -> None:
    bench = Bench(tmp_path / "state")

    def feed(data: bytes) -> None:
        bench.clock.pass_s(0.01)
        naks = bench.send(data)
        assert len(naks) < 40, "a NAK at most, however many runs were bad"

    proven(_flat(feed))
    assert bench.files() == {}
