"""How the device answers: repeated requests, BUSY, NAK, foreign versions, echoes, silence."""

from __future__ import annotations

import secrets
import tracemalloc
from typing import TYPE_CHECKING

import cbor2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.agent_bench import HWID, Bench, reference_ca
from support.agent_vectors import vectors
from support.reference_station import (
    ABORT,
    ATTEST,
    BEGIN,
    BUSY,
    COMMIT,
    DATA,
    ERR,
    HELLO,
    KEYGEN,
    NAK,
    PREPARE,
    PROTO,
    STATE,
    VERSION,
    RefusedError,
    answers_in,
    frame,
    sha256,
)

if TYPE_CHECKING:
    from pathlib import Path

SID = 0x1A2B3C4D
TXN = b"t" * 16
BAD_RUN = b"\0a log line\0"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "state")


def _hello(seq: int, nonce: bytes = bytes(16), sid: int = SID) -> bytes:
    return frame(HELLO, seq, sid, cbor2.dumps({1: nonce, 2: [1, 1]}, canonical=True))


def _error(reply: bytes) -> dict[int, int]:
    [(type_, _, _, payload)] = answers_in(reply)
    assert type_ == ERR
    error: dict[int, int] = cbor2.loads(payload)
    return error


def test_answers_carry_the_sequence_and_session_of_the_request(bench: Bench) -> None:
    for seq, sid in ((1, SID), (0xFFFF, 0), (0x0100, 0xFFFFFFFF)):
        [(type_, answer_seq, answer_sid, _)] = answers_in(bench.send(_hello(seq, sid=sid)))
        assert (type_, answer_seq, answer_sid) == (HELLO | 0x80, seq, sid)


def test_the_same_request_gets_the_same_bytes_again(bench: Bench) -> None:
    request = frame(KEYGEN, 1, SID, cbor2.dumps({1: TXN}, canonical=True))
    first = bench.send(request)
    assert [answer[0] for answer in answers_in(first)] == [BUSY, KEYGEN | 0x80]
    again = bench.send(request)
    # An ECDSA signature is made anew each time: the same bytes can only be the kept ones. And no BUSY.
    assert [answer[0] for answer in answers_in(again)] == [KEYGEN | 0x80]
    assert first.endswith(again)


def test_another_request_under_a_kept_number_is_refused(bench: Bench) -> None:
    bench.send(_hello(5))
    assert _error(bench.send(_hello(5, nonce=b"x" * 16))) == {0: PROTO, 1: HELLO}
    assert _error(bench.send(frame(KEYGEN, 5, SID, cbor2.dumps({1: TXN}, canonical=True)))) == {
        0: PROTO,
        1: KEYGEN,
    }
    assert _error(bench.send(frame(DATA, 5, SID, bytes(5)))) == {0: PROTO, 1: DATA}
    assert bench.files() == {}
    # The kept answer stays, and another session has numbers of its own.
    assert [answer[0] for answer in answers_in(bench.send(_hello(5)))] == [HELLO | 0x80]
    assert [answer[0] for answer in answers_in(bench.send(_hello(5, b"x" * 16, sid=SID + 1)))] == [HELLO | 0x80]


def test_errors_are_kept_too(bench: Bench) -> None:
    attest = frame(ATTEST, 1, SID, cbor2.dumps({1: bytes(16)}, canonical=True))
    assert _error(bench.send(attest)) == {0: STATE, 1: ATTEST}
    bench.enrol()
    assert _error(bench.send(attest)) == {0: STATE, 1: ATTEST}
    junk = frame(0x2A, 2, SID, b"")
    assert bench.send(junk) == bench.send(junk) != b""
    assert _error(bench.send(frame(0x2B, 2, SID, b""))) == {0: PROTO, 1: 0x2B}


def test_eight_answers_are_kept(bench: Bench) -> None:
    for seq in range(1, 10):
        bench.send(_hello(seq, nonce=bytes([seq]) * 16))
    for seq in range(2, 10):
        assert _error(bench.send(_hello(seq))) == {0: PROTO, 1: HELLO}
    [(type_, _, _, payload)] = answers_in(bench.send(_hello(1)))
    assert type_ == HELLO | 0x80
    assert cbor2.loads(payload)[10] == bytes(16)


def test_data_is_never_kept(bench: Bench) -> None:
    station = bench.station()
    bundle = reference_ca().bundle(station.keygen(TXN).public_key(), "u")
    station.begin(TXN, bundle)
    chunks = [frame(DATA, 500, SID, at.to_bytes(4, "little") + bundle[at : at + 8]) for at in (0, 8, 16)]
    prefixes = [cbor2.loads(answers_in(bench.send(chunk))[0][3])[1] for chunk in (*chunks, chunks[0])]
    assert prefixes == [8, 16, 24, 24]
    assert len(bench.agent._kept) == 2


def test_a_reboot_forgets_the_answers(bench: Bench) -> None:
    first = cbor2.loads(answers_in(bench.send(_hello(1)))[0][3])
    bench.reboot()
    second = cbor2.loads(answers_in(bench.send(_hello(1)))[0][3])
    assert first.pop(9) != second.pop(9)
    assert first == second


@pytest.mark.parametrize(
    ("type_", "fields", "busy"),
    [
        (HELLO, {1: bytes(16), 2: [1, 1]}, False),
        (KEYGEN, {1: TXN}, True),
        (BEGIN, {1: TXN, 2: 9, 3: bytes(32)}, False),
        (PREPARE, {1: TXN, 2: bytes(16)}, True),
        (COMMIT, {1: TXN, 2: bytes(32)}, True),
        (ATTEST, {1: bytes(16)}, False),
        (ABORT, {1: TXN}, False),
    ],
)
def test_busy_goes_before_what_may_take_long(bench: Bench, type_: int, fields: object, *, busy: bool) -> None:
    answers = answers_in(bench.send(frame(type_, 3, SID, cbor2.dumps(fields, canonical=True))))
    assert (answers[0] == (BUSY, 3, SID, b"")) == busy
    assert len(answers) == 1 + busy


def test_busy_is_out_before_the_work_begins(bench: Bench) -> None:
    answers = bench.agent.receive(frame(KEYGEN, 1, SID, cbor2.dumps({1: TXN}, canonical=True)))
    busy = next(answers)
    assert answers_in(busy)[0][0] == BUSY
    assert bench.files() == {}
    assert bench.agent.busy() == busy
    assert answers_in(next(answers))[0][0] == KEYGEN | 0x80
    assert bench.files().keys() == {"pending"}
    assert bench.agent.busy() == b""


def test_work_that_is_given_up_is_not_done_and_can_be_asked_for_again(bench: Bench) -> None:
    request = frame(KEYGEN, 1, SID, cbor2.dumps({1: TXN}, canonical=True))
    answers = bench.agent.receive(request)
    next(answers)
    answers.close()  # as a driver does whose port is gone
    assert bench.agent.busy() == b""
    assert bench.files() == {}
    assert [answer[0] for answer in answers_in(bench.send(request))] == [BUSY, KEYGEN | 0x80]


def test_a_bad_run_gets_a_nak_but_one_in_30_ms(bench: Bench) -> None:
    nak = (NAK, 0, 0, b"")
    assert answers_in(bench.send(BAD_RUN)) == [nak]
    assert bench.send(BAD_RUN) == b""
    bench.clock.pass_s(0.029)
    assert bench.send(BAD_RUN * 5) == b""
    bench.clock.pass_s(0.002)
    assert answers_in(bench.send(BAD_RUN * 5)) == [nak]
    bench.clock.pass_s(1)
    # In the order of the line: the damage, then the sound request.
    assert [answer[0] for answer in answers_in(bench.send(BAD_RUN + _hello(1)))] == [NAK, HELLO | 0x80]
    bench.clock.pass_s(1)
    assert [answer[0] for answer in answers_in(bench.send(_hello(2) + BAD_RUN))] == [HELLO | 0x80, NAK]


def test_an_oversize_run_gets_none(bench: Bench) -> None:
    assert bench.send(b"\0" + b"x" * 1401 + b"\0") == b""
    assert bench.send(b"x" * 100_000) == b""
    assert bench.send(b"\0" * 100_000) == b""
    assert answers_in(bench.send(_hello(1)))[0][0] == HELLO | 0x80


@pytest.mark.parametrize("version", [0, 2, 255])
def test_a_frame_of_another_version(bench: Bench, version: int) -> None:
    request = frame(HELLO, 7, SID, b"whatever", version=version)
    assert answers_in(bench.send(request)) == [(ERR, 7, SID, cbor2.dumps({0: VERSION, 1: HELLO}, canonical=True))]
    # It used up no number.
    assert answers_in(bench.send(_hello(7)))[0][0] == HELLO | 0x80


def test_its_own_echo_is_ignored(bench: Bench) -> None:
    echo = bench.send(_hello(1))
    assert bench.send(echo) == b""
    assert bench.send(frame(ERR, 1, SID, b"\xa0") + frame(0x80, 1, SID, b"", version=2)) == b""


def test_a_silent_line_costs_the_transfer_but_not_the_key(bench: Bench) -> None:
    station = bench.station()
    bundle = reference_ca().bundle(station.keygen(TXN).public_key(), "u")
    station.begin(TXN, bundle)
    station.data(0, bundle[:100])
    bench.clock.pass_s(29.9)
    assert station.begin(TXN, bundle) == 100
    bench.clock.pass_s(29.9)
    bench.send(BAD_RUN)  # no sound frame
    bench.clock.pass_s(0.2)
    with pytest.raises(RefusedError) as refusal:
        station.data(100, bundle[100:200])
    assert refusal.value.code == STATE
    assert station.begin(TXN, bundle) == 0
    station.transfer(TXN, bundle)
    station.prepare(TXN, HWID, bundle)
    bench.clock.pass_s(3600)
    station.commit(TXN, bundle)


def test_requests_of_the_vectors_are_understood_however_they_are_cut(bench: Bench) -> None:
    requests = [bytes.fromhex(e["encoded"]) for e in vectors()["frames"] if e["from"] == "station"]
    stream = b"".join(requests)
    whole = [answer[:3] for answer in answers_in(bench.send(stream))]
    assert len([answer for answer in whole if answer[0] != BUSY]) == len(requests)
    other = Bench(bench.folder.with_name("other"))
    cut = b"".join(other.send(stream[i : i + 1]) for i in range(len(stream)))
    assert [answer[:3] for answer in answers_in(cut)] == whole


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.binary(max_size=50) | st.tuples(st.integers(0, 255), st.binary(max_size=60)), max_size=6))
def test_any_bytes_are_survived(bench: Bench, parts: list[bytes | tuple[int, bytes]]) -> None:
    data = b"".join(
        part if isinstance(part, bytes) else frame(part[0], secrets.randbelow(65536), SID, part[1])
        for part in parts
    )
    answers_in(bench.send(b"\0" + data + b"\0"))
    bench.clock.pass_s(1)
    assert answers_in(bench.send(_hello(secrets.randbelow(65536), sid=secrets.randbits(32))))[0][0] == HELLO | 0x80


def test_a_flood_leaves_memory_flat(bench: Bench) -> None:
    enrollment = bench.enrol()
    noise = secrets.token_bytes(4096)
    attacks = [frame(type_, 1, SID, b"\xa1\x01\x5b" + b"\xff" * 8) for type_ in range(1, 10)]
    tracemalloc.start()
    try:
        for round_ in range(64):
            bench.send(noise)
            for attack in attacks:
                bench.send(attack)
            if round_ == 8:
                settled = tracemalloc.get_traced_memory()[0]
        assert tracemalloc.get_traced_memory()[0] - settled < 64 * 1024
        assert tracemalloc.get_traced_memory()[1] < 1024 * 1024
    finally:
        tracemalloc.stop()
    bench.station().attest(enrollment.txn, HWID, enrollment.bundle)
    assert bench.station().hello()[6] == sha256(enrollment.bundle)
