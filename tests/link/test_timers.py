"""The timers by their names in section 9, and the sums that are made of them."""

from __future__ import annotations

import pytest

from birthmark.device.link import timers
from birthmark.device.link.messages import MessageType


def test_the_table_of_section_9() -> None:
    assert (timers.TURN_S, timers.BACKOFF, timers.WAIT_MAX_S) == (0.120, 1.5, 2.0)
    assert (timers.TRIES, timers.HELLO_TRIES) == (8, 7)
    assert (timers.STEP_CAP_S, timers.HELLO_CAP_S) == (8.0, 5.0)
    assert timers.BUSY_GRACE_S == {
        MessageType.KEYGEN: 2,
        MessageType.PREPARE: 3,
        MessageType.COMMIT: 2,
        MessageType.ATTEST: 1,
    }
    assert timers.BUSY_GRACE_OTHER_S == 0.5
    assert (timers.NAKS, timers.NAK_GAP_S) == (30, 0.030)
    assert (timers.CHUNK_BYTES, timers.WINDOW) == (256, 4)
    assert (timers.BEGINS, timers.IDLE_S, timers.REPLUG_S) == (6, 30, 15)


def test_the_sums() -> None:
    assert timers.wire_time_s(276, 115200) == pytest.approx(0.05)
    assert timers.first_wait_s(276, 115200) == pytest.approx(0.17)
    assert timers.transfer_wait_s(278, 115200) == pytest.approx((4 * 278 + 40) * 10 / 115200 + 0.12)
    assert timers.transfer_cap_s(11520, 115200) == pytest.approx(12.0)
