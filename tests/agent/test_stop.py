from __future__ import annotations

import select
import signal
import threading

import pytest
from support.patience import PATIENCE_S

from birthmark.device.agent.stop import Stop, stop_on_signals


@pytest.fixture(autouse=True)
def in_the_main_thread() -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals are the main thread's")


def is_readable(stop: Stop, timeout_s: float = 0) -> bool:
    return bool(select.select([stop], [], [], timeout_s)[0])


def test_a_stop_is_readable_once_it_is_set() -> None:
    stop = Stop()
    assert (stop.is_set, is_readable(stop)) == (False, False)
    stop.set()
    stop.set()
    assert (stop.is_set, is_readable(stop), stop.signals) == (True, True, set())
    stop.close()


def test_a_signal_sets_it_and_is_told() -> None:
    with stop_on_signals(signal.SIGUSR1) as stop:
        signal.raise_signal(signal.SIGUSR1)
        assert (stop.is_set, is_readable(stop), stop.signals) == (True, True, {signal.SIGUSR1})


def test_a_signal_is_seen_even_while_python_runs_no_handler() -> None:
    seen: list[bool] = []
    looked = threading.Event()

    def another_thread() -> None:
        # It lands on this thread, so it does not interrupt the main one: that runs the handler when it next runs.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        seen.append(is_readable(stop, 10))
        looked.set()

    with stop_on_signals(signal.SIGUSR1) as stop:
        thread = threading.Thread(target=another_thread)
        thread.start()
        assert looked.wait(PATIENCE_S)
        thread.join()
        assert seen == [True]
        assert stop.is_set


def test_what_was_before_is_put_back() -> None:
    handler, descriptor = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    with stop_on_signals():
        assert signal.getsignal(signal.SIGTERM) is not handler
    assert signal.getsignal(signal.SIGTERM) is handler
    assert signal.set_wakeup_fd(descriptor) == descriptor
