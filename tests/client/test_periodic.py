"""What is done every so often: in time, without drift, one at a time."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

import pytest
from support.patience import PATIENCE_S

from birthmark.device.errors import LocalProtocolError
from birthmark.device.periodic import Periodic, next_due

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from birthmark.device.publication import Payload


class Stage:
    """Runs the jobs when the test says so."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.published: list[tuple[str, Payload]] = []
        self.failed: list[tuple[str, Exception]] = []
        self.periodic = Periodic(
            self.jobs.put,
            lambda topic, payload: self.published.append((topic, payload)),
            lambda name, error: self.failed.append((name, error)),
        )

    def run_next(self) -> None:
        self.jobs.get(timeout=PATIENCE_S)()


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.periodic.stop()


def test_it_goes_on_whatever_happens(stage: Stage) -> None:
    values: list[Payload | None] = [b"1", None, b"3"]

    def reading() -> Payload | None:
        if not values:
            raise ValueError("no more")
        return values.pop(0)

    stage.periodic.add(0.001, reading, topic="devices/a/telemetry/t")
    stage.periodic.start()
    for _ in range(5):
        stage.run_next()
    assert stage.published == [("devices/a/telemetry/t", b"1"), ("devices/a/telemetry/t", b"3")]
    assert [(name, str(error)) for name, error in stage.failed] == [("reading", "no more")] * 2


def test_runs_do_not_pile_up(stage: Stage) -> None:
    others = threading.Semaphore(0)
    stage.periodic.add(0.001, lambda: None)  # its run is taken by nobody for a while

    def other() -> None:
        others.release()

    stage.periodic.start()
    first = stage.jobs.get(timeout=PATIENCE_S)
    stage.periodic.add(0.001, other)  # one that was added after the start
    for _ in range(20):  # twenty intervals later ...
        stage.run_next()
    assert others.acquire(timeout=PATIENCE_S)
    assert not others._value < 19, "... no second run of the first one was queued"
    first()


def test_a_stop_ends_it(stage: Stage) -> None:
    stage.periodic.add(0.001, lambda: None)
    stage.periodic.start()
    stage.run_next()
    stage.periodic.stop()
    while not stage.jobs.empty():
        stage.jobs.get()()
    assert stage.jobs.empty()
    assert "birthmark-periodic" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("now", "due"),
    [(100.0, 110.0), (109.9, 110.0), (110.0, 120.0), (137.0, 140.0), (1e6, 1e6 + 10)],
)
def test_times_stay_on_their_grid(now: float, due: float) -> None:
    assert next_due(100.0, 10.0, now) == pytest.approx(due)


@pytest.mark.parametrize("interval_s", [0, -1, 0.0001, 1e9, float("nan"), float("inf")])
def test_intervals_that_make_no_sense(stage: Stage, interval_s: float) -> None:
    with pytest.raises(LocalProtocolError, match="the interval is from"):
        stage.periodic.add(interval_s, lambda: None)


@pytest.mark.parametrize("delay_s", [-1, 1e9, float("nan"), float("inf")])
def test_delays_that_make_no_sense(stage: Stage, delay_s: float) -> None:
    with pytest.raises(LocalProtocolError, match="the delay is from"):
        stage.periodic.add(1.0, lambda: None, delay_s=delay_s)
