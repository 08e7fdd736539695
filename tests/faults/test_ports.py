"""Ports without a board, and hostile boards, on real ptys by the real clock: an end, a name for it, and no trace.

All of one kind at the same time: each takes seconds, as the caps of the link say.
"""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING

import pytest
from support.fault_bench import Ended, check_no_half, enrol_each

from birthmark.device.link.messages import ErrorCode
from birthmark.firmware_sim.impostors import IMPOSTORS
from birthmark.firmware_sim.lies import LIES
from birthmark.provisioning.enrollment.enrol import ProofError, UnitRefusedError
from birthmark.provisioning.enrollment.exchange import DeviceRefusalError, MalformedAnswerError, NoAnswerError
from birthmark.provisioning.enrollment.journal import Action
from birthmark.provisioning.enrollment.signing_request import RequestRefusedError
from birthmark.provisioning.enrollment.verdict import Verdict
from birthmark.provisioning.registry.model import State

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.board_station import Desk

    from birthmark.provisioning.registry.model import Row

WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
FLAT_KIB = 48 * 1024

VERDICTS = {
    "silence": Verdict.SILENT,
    "echo": Verdict.ECHO,
    "login": Verdict.CONSOLE,
    "shell": Verdict.CONSOLE,
    "bootloader": Verdict.BOOTLOADER,
    "wrong-baud": Verdict.BAUD,
    "text-flood": Verdict.NOISE,
    "random-flood": Verdict.BAUD,
    "zero-flood": Verdict.NOISE,
}
NEVER_ANSWERS = [
    "busy",
    "nak",
    "silent",
    "wrong-sid",
    "wrong-seq",
    "wrong-version",
    "wrong-crc",
    "oversize",
    "dribble",
]
AT_ONCE = {name: MalformedAnswerError for name in LIES if name.startswith(("cbor-", "hello-"))} | {
    "hello-lock": UnitRefusedError
}
BAD_REQUESTS = [name for name in LIES if name.startswith("csr-")]
BAD_TRANSFERS = ["offset-past", "offset-back", "refuse"]
BAD_PROOFS = ["prove-key", "prove-nonce", "prove-leaf", "prove-bundle", "prove-junk"]
BAD_ATTESTS = [*(f"{name}@attest" for name in BAD_PROOFS), "prove-txn", *(["silent@attest"] if WHOLE else [])]


def _hostile(
    desk: Desk, tmp_path: Path, lies: list[str], *, limit_s: float
) -> dict[str, tuple[Ended, Row | None]]:
    """Enrol boards with these lies; each fails with words that a terminal can be shown, and in time."""
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended = enrol_each(desk, tmp_path, [f"hostile={lie}" for lie in lies])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < FLAT_KIB, (
        "boards and stations together"
    )
    rows = {row.name: row for row in desk.rows()}
    for fault, one in ended.items():
        assert one.error is not None, f"{fault} was enrolled"
        assert (one.error.message + one.error.hint).isprintable(), fault
        assert one.error.hint, fault
        _check_time(one, limit_s)
        check_no_half(desk, one.folder)
    assert State.ATTESTED not in desk.states()
    numbered = {lie: f"unit-{number}" for number, lie in enumerate(lies)}
    return {lie: (ended[f"hostile={lie}"], rows.get(numbered[lie])) for lie in lies}


def _ended(done: dict[str, tuple[Ended, Row | None]]) -> str:
    longest_s = max(ended.elapsed_s for ended, _ in done.values())
    return f"{len(done)} hostile boards at once, none enrolled; the last attempt ended after {longest_s:.1f} s"


def _check_time(ended: Ended, limit_s: float) -> None:
    """Hold an end to its seconds, in the whole proof alone: in the suite, other tests take this one's time."""
    if WHOLE:
        assert ended.elapsed_s < limit_s


@pytest.mark.proof
def test_no_device_is_named_for_what_it_is(desk: Desk, tmp_path: Path, proven: Callable[[str], None]) -> None:
    assert set(VERDICTS) == set(IMPOSTORS)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended = enrol_each(desk, tmp_path, [f"instead={name}" for name in VERDICTS])
    for name, verdict in VERDICTS.items():
        one = ended[f"instead={name}"]
        assert isinstance(one.error, NoAnswerError), name
        assert (one.error.verdict, one.error.message.isprintable()) == (verdict, True), name
        _check_time(one, 6.0)
    longest_s = max(one.elapsed_s for one in ended.values())
    proven(
        f"{len(ended)} ports without a board at once: the right verdict for each, the last after {longest_s:.1f} s"
    )
    assert desk.rows() == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < FLAT_KIB


@pytest.mark.proof
def test_no_answer_ends_by_the_cap(desk: Desk, tmp_path: Path, proven: Callable[[str], None]) -> None:
    done = _hostile(desk, tmp_path, NEVER_ANSWERS, limit_s=6.0)
    proven(_ended(done))
    for lie, (ended, row) in done.items():
        assert isinstance(ended.error, NoAnswerError), lie
        assert row is None, lie
    assert desk.rows() == []


def test_what_breaks_the_protocol_is_refused_at_once(desk: Desk, tmp_path: Path) -> None:
    for lie, (ended, row) in _hostile(desk, tmp_path, list(AT_ONCE), limit_s=6.0).items():
        assert isinstance(ended.error, AT_ONCE[lie]), lie
        assert row is None, lie
        if isinstance(ended.error, UnitRefusedError):
            assert ended.error.action is Action.QUARANTINE


def test_bad_requests_sign_nothing(desk: Desk, tmp_path: Path) -> None:
    for lie, (ended, row) in _hostile(desk, tmp_path, BAD_REQUESTS, limit_s=8.0).items():
        assert isinstance(ended.error, RequestRefusedError | MalformedAnswerError), lie
        assert row is not None
        assert row.state is State.RESERVED, lie
    assert desk.authority.signed == []


@pytest.mark.proof
def test_bad_transfers_end_in_issued(desk: Desk, tmp_path: Path, proven: Callable[[str], None]) -> None:
    done = _hostile(desk, tmp_path, BAD_TRANSFERS, limit_s=10.0)
    proven(_ended(done))
    for lie, (_, row) in done.items():
        assert row is not None
        assert row.state is State.ISSUED, lie


def test_bad_proofs_stay_in_issued(desk: Desk, tmp_path: Path) -> None:
    for lie, (ended, row) in _hostile(desk, tmp_path, BAD_PROOFS, limit_s=8.0).items():
        assert isinstance(ended.error, ProofError), lie
        assert row is not None
        assert row.state is State.ISSUED, lie


@pytest.mark.proof
def test_bad_attestations_stay_in_committed(desk: Desk, tmp_path: Path, proven: Callable[[str], None]) -> None:
    done = _hostile(desk, tmp_path, BAD_ATTESTS, limit_s=9.0)
    proven(_ended(done))
    for lie, (ended, row) in done.items():
        assert isinstance(ended.error, ProofError | NoAnswerError), lie
        assert row is not None
        assert row.state is State.COMMITTED, lie


def test_a_lock_that_was_never_stored(desk: Desk, tmp_path: Path) -> None:
    ended, row = _hostile(desk, tmp_path, ["commit-nothing"], limit_s=8.0)["commit-nothing"]
    assert isinstance(ended.error, DeviceRefusalError)
    assert ended.error.code == ErrorCode.STATE
    assert row is not None
    assert row.state is State.COMMITTED


def test_every_lie_is_told_somewhere() -> None:
    told = {*NEVER_ANSWERS, *AT_ONCE, *BAD_REQUESTS, *BAD_TRANSFERS, *BAD_PROOFS, "prove-txn", "commit-nothing"}
    assert told == set(LIES)
