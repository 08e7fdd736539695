"""The line as a pure machine: time and bytes in, bytes and time out."""

from __future__ import annotations

import math
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from birthmark.device.errors import ConfigurationError
from birthmark.firmware_sim.line import (
    MAX_QUEUED_BYTES,
    PACKET_BYTES,
    Chatter,
    Interruption,
    Line,
    LineFaults,
    log_line,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

BAUD = 115_200
BYTE_S = 10 / BAUD
LOREM = bytes(range(256)) * 4


def line(seed: int = 1, **faults: Any) -> Line:
    return Line(LineFaults(**faults), Random(seed))


def arrivals(line: Line, until_s: float) -> Iterator[tuple[float, bytes]]:
    """What arrives at the station, and when."""
    while (now_s := line.next_s()) <= until_s:
        delivery = line.take(now_s)
        if delivery.to_station:
            yield now_s, delivery.to_station


def test_a_perfect_line_takes_no_time() -> None:
    perfect = line()
    perfect.station_says(b"to the board", 5.0)
    perfect.board_says(b"to the station", 5.0)
    delivery = perfect.take(5.0)
    assert (delivery.to_board, delivery.to_station, delivery.unplug_s) == (
        b"to the board",
        b"to the station",
        None,
    )
    assert perfect.next_s() == math.inf
    assert LineFaults().is_perfect
    assert not LineFaults(baud=9600).is_perfect


def test_bytes_take_their_time_and_directions_do_not_share_it() -> None:
    slow = line(baud=BAUD)
    slow.station_says(LOREM, 1.0)
    slow.board_says(LOREM, 1.0)
    there = list(arrivals(slow, 9.0))
    assert b"".join(data for _, data in there) == LOREM
    assert there[-1][0] == pytest.approx(1.0 + len(LOREM) * BYTE_S)
    assert len(there) > 20, "as they come, not all at the end"
    slow.board_says(b"x", 1.0)
    assert slow.next_s() == pytest.approx(1.0 + (len(LOREM) + 1) * BYTE_S), "nothing overtakes"


@given(pieces=st.lists(st.binary(max_size=200), max_size=12), seed=st.integers(0, 99))
def test_without_damage_everything_arrives_in_order(pieces: list[bytes], seed: int) -> None:
    slow = line(seed, baud=9600, latency_s=0.016, stall=Interruption(1.0, 300))
    for number, piece in enumerate(pieces):
        slow.board_says(piece, number / 100)
    assert b"".join(data for _, data in arrivals(slow, 1e6)) == b"".join(pieces)
    assert slow.next_s() == math.inf


def test_the_latency_timer_holds_the_rest_of_a_packet() -> None:
    held = line(latency_s=0.016)
    held.board_says(bytes(PACKET_BYTES + 5), 1.0)
    assert list(arrivals(held, 9.0)) == [(1.0, bytes(PACKET_BYTES)), (pytest.approx(1.016), bytes(5))]
    held.station_says(b"the other way is not held", 2.0)
    assert held.take(2.0).to_board == b"the other way is not held"


@pytest.mark.parametrize(("name", "rate"), [("loss", 1e-3), ("loss", 0.05), ("flips", 1e-4), ("flips", 0.01)])
def test_damage_is_as_often_as_asked(name: str, rate: float) -> None:
    faults: dict[str, Any] = {name: rate}
    bad = line(**faults)
    total, size = 200_000, 1000
    arrived = bytearray()
    for number in range(total // size):
        bad.board_says(bytes(size), number)
        arrived += bad.take(number).to_station
    hits, chances = (total - len(arrived), total) if name == "loss" else (arrived.hex().count("1"), 8 * total)
    if name == "flips":
        hits = sum(byte.bit_count() for byte in arrived)
    deviation = math.sqrt(chances * rate)
    assert abs(hits - chances * rate) < 5 * deviation


def test_the_same_seed_gives_the_same_line() -> None:
    def heard(seed: int) -> bytes:
        bad = line(seed, loss=0.01, flips=0.001, chatter=Chatter(0.01, log_line, is_regular=False))
        bad.board_says(LOREM, 1.0)
        return bad.take(2.0).to_station

    assert heard(1) == heard(1) != heard(2)


def test_log_lines_fall_between_frames_and_inside_them() -> None:
    noisy = line(baud=BAUD, chatter=Chatter(0.02, lambda _: b"[log]"))
    assert noisy.take(1.0).to_station == b""
    noisy.board_says(b"." * 700, 1.03)
    heard = b"".join(data for _, data in arrivals(noisy, 1.2))
    assert heard.replace(b"[log]", b"") == b"." * 700
    assert heard.startswith(b"[log]."), "before"
    assert b".[log]." in heard, "inside"
    assert heard.endswith(b".[log]" + heard[heard.rindex(b".") + 6 :]), "after"
    assert 8 <= heard.count(b"[log]") <= 11


def test_a_board_that_chatters_without_pause_is_bounded() -> None:
    flood = line(chatter=Chatter(0.001, lambda _: bytes(4096)))
    flood.take(0.0)
    assert len(flood.take(1000.0).to_station) <= 4 * 4096
    slow = line(baud=300)
    for _ in range(40):
        slow.board_says(bytes(4096), 0.0)
    assert sum(len(data) for _, data in arrivals(slow, 1e9)) <= MAX_QUEUED_BYTES


def test_a_stall_delays_what_follows_and_loses_nothing() -> None:
    stalled = line(stall=Interruption(2.0, 10))
    stalled.station_says(b"0123456789", 1.0)
    assert stalled.take(1.0).to_board == b"0123456789"
    stalled.board_says(b"later", 1.0)
    assert stalled.take(2.9).to_station == b""
    assert stalled.take(3.0).to_station == b"later"
    stalled.board_says(b"at once again", 4.0)
    assert stalled.take(4.0).to_station == b"at once again"


def test_an_unplug_loses_what_follows_until_the_port_is_back() -> None:
    plugged = line(unplug=Interruption(2.0, 4))
    plugged.board_says(b"abcdefgh", 1.0)
    delivery = plugged.take(1.0)
    assert (delivery.to_station, delivery.unplug_s) == (b"abcd", 2.0)
    assert plugged.next_s() == math.inf
    plugged.board_says(b"lost", 2.0)
    assert plugged.take(2.5).to_station == b""
    plugged.replug()
    plugged.board_says(b"here", 3.0)
    delivery = plugged.take(3.0)
    assert (delivery.to_station, delivery.unplug_s) == (b"here", None)


@pytest.mark.parametrize(
    "faults",
    [
        {"baud": 0},
        {"baud": 20_000_000},
        {"loss": 1.1},
        {"loss": -0.1},
        {"flips": math.nan},
        {"latency_s": 11.0},
        {"stall": Interruption(-1.0)},
        {"unplug": Interruption(math.inf)},
    ],
)
def test_what_no_line_has(faults: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="out of range"):
        line(**faults)
