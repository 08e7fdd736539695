"""Several slots at once in one process: a thread each, one registry behind them, one person in front.

Rules:

- Slots share nothing but the journal and the source of ids; one that hangs or fails delays nobody.
- SIGINT, SIGTERM and SIGHUP stop all of them, each between two actions; a second signal says the same again.
  Their handler only puts a word into the queue of reports: setting an event takes a lock, and a handler that
  interrupts its holder (the handler of the signal before, say) would wait for that lock for ever.
- A defect in one slot's thread stops the line and is raised here: it is not a board's fault.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

from birthmark.provisioning.line.slot import Announced, Ended, Report, Slot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from types import FrameType

    from birthmark.provisioning.line.view import Display, Tally

_TICK_S: Final = 0.1
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_line(
    make: Callable[[Callable[[Report], None]], Sequence[Slot]],
    display: Display,
    tally: Tally,
    stop: threading.Event,
    beside: AbstractContextManager[object],
) -> None:
    """Run all slots until each is done, or until `stop`.

    Args:
        make: makes the slots, given what takes their reports.
        display: is shown every report, in this thread.
        tally: counts every attempt's end.
        stop: set once a signal has come while this runs.
        beside: is at work as long as the slots are; what it reports at its end is shown, too.
    """
    reports: SimpleQueue[Report | _Done | _Signal] = SimpleQueue()
    slots = make(reports.put)
    threads = [
        threading.Thread(target=_work, args=(slot, reports), name=f"slot-{slot.port.slot}") for slot in slots
    ]
    with _signals_into(reports):
        with beside:
            for thread in threads:
                thread.start()
            defects = _follow(reports, len(threads), display, tally, stop)
            for thread in threads:
                thread.join()
        while not reports.empty():  # a signal that came late, or the last word of `beside`
            last = reports.get()
            if isinstance(last, Announced):
                defects += _show(display, last)
    if defects:
        raise defects[0]
    display.close()


def _follow(
    reports: SimpleQueue[Report | _Done | _Signal],
    running: int,
    display: Display,
    tally: Tally,
    stop: threading.Event,
) -> list[BaseException]:
    """Show what is reported until so many slots are done; return what is no board's fault."""
    defects: list[BaseException] = []
    while running:
        report: Report | _Done | _Signal | None = None
        with suppress(Empty):
            report = reports.get(timeout=_TICK_S)
        if isinstance(report, _Done):
            running -= 1
            defects += [] if report.defect is None else [report.defect]
        elif not isinstance(report, _Signal):
            if isinstance(report, Ended):
                tally.add(report)
            defects += _show(display, report)
        if defects or isinstance(report, _Signal):
            stop.set()
    return defects


def _show(display: Display, report: Report | None) -> list[Exception]:
    """Show a report, or that time passes; return what was in the way: it is raised when the slots have stopped."""
    try:
        if report is not None:
            display.show(report)
        display.tick()
    except Exception as error:  # noqa: BLE001 - nobody sees us any more: `birthmark run ... | head`; or a defect
        return [error]
    return []


class _Done:
    """The last word of a slot's thread."""

    def __init__(self, defect: BaseException | None) -> None:
        self.defect = defect


class _Signal:
    """Somebody wishes the line to stop."""


def _work(slot: Slot, reports: SimpleQueue[Report | _Done | _Signal]) -> None:
    defect: BaseException | None = None
    try:
        slot.run()
    except BaseException as error:  # noqa: BLE001 - raised again in the line's own thread
        defect = error
    reports.put(_Done(defect))


@contextmanager
def _signals_into(reports: SimpleQueue[Report | _Done | _Signal]) -> Iterator[None]:
    """Let a signal put its word into `reports`, whose `put` is reentrant, for the block."""

    def note(_number: int, _frame: FrameType | None) -> None:
        reports.put(_Signal())

    kept = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
