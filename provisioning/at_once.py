"""The same for several at once, where each may take its time: gateways that have to be reached.

Nothing waits for these threads when the process ends, as it would for those of an executor: who presses Ctrl-C is
not kept for as long as the slowest gateway may take.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MOST_AT_ONCE: Final = 32
T = TypeVar("T")
R = TypeVar("R")


def as_done(do: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[int, R]]:
    """Do something for each of these, and yield the place of each with what came of it, as it comes.

    Raises:
        Exception: the first that one of them raises.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, R | _Raised]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            try:
                place = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((place, do(items[place])))
            except Exception as error:  # noqa: BLE001 - it is for whoever waits
                done.put((place, _Raised(error)))

    for place in range(len(items)):
        todo.put(place)
    for _ in range(min(MOST_AT_ONCE, len(items))):
        threading.Thread(target=work, name="birthmark-at-once", daemon=True).start()
    for _ in items:
        place, outcome = done.get()
        if isinstance(outcome, _Raised):
            raise outcome.error
        yield place, outcome


def in_order(do: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Do something for each of these at once; return what came of it in their order, when all are done."""
    return [outcome for _, outcome in sorted(as_done(do, items), key=lambda one: one[0])]


class _Raised:
    def __init__(self, error: Exception) -> None:
        self.error = error
