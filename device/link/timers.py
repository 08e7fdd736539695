"""Timers and retries of the link, by the names of docs/serial-protocol.md section 9, with their units."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from birthmark.device.link.vocabulary import MessageType

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_BAUD: Final = 115200

TURN_S: Final = 0.120
"""Device turnaround: P-256 work on a small core, a 16 ms USB latency timer, the scheduler."""
TYPICAL_ANSWER_BYTES: Final = 300
BITS_PER_BYTE: Final = 10
"""On the line: 8N1 adds a start and a stop bit."""
BACKOFF: Final = 1.5
WAIT_MAX_S: Final = 2.0
TRIES: Final = 8
"""Unanswered waits before a request is given up."""
HELLO_TRIES: Final = 7
STEP_CAP_S: Final = 8.0
"""Hard end of one request, whatever arrives."""
HELLO_CAP_S: Final = 5.0
BUSY_GRACE_S: Final[Mapping[MessageType, float]] = MappingProxyType(
    {MessageType.KEYGEN: 2.0, MessageType.PREPARE: 3.0, MessageType.COMMIT: 2.0, MessageType.ATTEST: 1.0}
)
"""BUSY moves the wait to now + this, never past the cap; `BUSY_GRACE_OTHER_S` for other requests."""
BUSY_GRACE_OTHER_S: Final = 0.5
BUSY_EVERY_S: Final = 1.0
"""How often a working device says so."""
NAKS: Final = 30
"""Repetitions of one request that NAKs or bad runs may cause."""
NAK_GAP_S: Final = 0.030
"""A burst of damage gets one NAK."""
CHUNK_BYTES: Final = 256
MAX_CHUNK_BYTES: Final = 1024
WINDOW: Final = 4
"""Chunks in flight."""
TRANSFER_ACK_BYTES: Final = 40
TRANSFER_STALL_S: Final = 8.0
"""A transfer ends after this without a growing offset, or this and 4 times the line time of the bundle."""
TRANSFER_LINE_TIMES: Final = 4
BEGINS: Final = 6
"""Restarts of a transfer after STATE or SHA."""
IDLE_S: Final = 30.0
"""Without a sound frame for this long, a device drops its staging."""
UNLOCK_NONCE_S: Final = 30.0
"""Age at which an UNLOCK nonce is no longer taken."""
UNLOCK_TRIES: Final = 3
REPLUG_S: Final = 15.0
"""Re-enumeration of a USB adapter and a reboot of the board."""


def wire_time_s(frame_bytes: int, baud: int) -> float:
    """Seconds that a request of `frame_bytes` and a typical answer take on the line."""
    return (frame_bytes + TYPICAL_ANSWER_BYTES) * BITS_PER_BYTE / baud


def first_wait_s(frame_bytes: int, baud: int) -> float:
    """Seconds to wait for an answer before the first repetition."""
    return wire_time_s(frame_bytes, baud) + TURN_S


def transfer_wait_s(chunk_frame_bytes: int, baud: int) -> float:
    """Seconds of a transfer without an acknowledgement before all chunks in flight are repeated."""
    line_bytes = WINDOW * chunk_frame_bytes + TRANSFER_ACK_BYTES
    return line_bytes * BITS_PER_BYTE / baud + TURN_S


def transfer_cap_s(bundle_bytes: int, baud: int) -> float:
    """Seconds after which a transfer ends, however it crawls."""
    return TRANSFER_STALL_S + TRANSFER_LINE_TIMES * bundle_bytes * BITS_PER_BYTE / baud
