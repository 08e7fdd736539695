"""The decision table of docs/serial-protocol.md section 8, cell by cell."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from birthmark.device.identity import DeviceId, Role
from birthmark.device.link import messages as m
from birthmark.device.link.messages import DeviceState
from birthmark.provisioning.enrollment.journal import (
    DURABLE,
    TABLE,
    UNLOCKABLE,
    Action,
    Column,
    Decision,
    Wish,
    column,
    decide,
)
from birthmark.provisioning.registry.model import KeyMode, Kind, Row, State

HWID = bytes(range(8))
TXN, OTHER_TXN, OLD_TXN = b"T" * 16, b"O" * 16, b"P" * 16
SHA, OTHER_SHA, OLD_SHA = b"s" * 32, b"o" * 32, b"p" * 32
NOW = datetime(2026, 1, 2, tzinfo=UTC)
WISH = Wish(DeviceId("sensor-17"))
LIVE = [state for state in State if state is not State.VOID]


def a_row(state: State, **changes: Any) -> Row:
    facts: dict[str, Any] = {
        "number": 2,
        "kind": Kind.DEVICE,
        "name": "sensor-17",
        "role": "sensor",
        "state": state,
        "created_at": NOW,
        "changed_at": NOW,
        "key_mode": KeyMode.ON_DEVICE,
        "hwid": HWID,
        "txn": TXN,
    }
    if state.reached(State.KEYED):
        facts |= {"public_key_der": b"key", "cert_serial": 77}
    if state.reached(State.ISSUED):
        facts |= {"certificate_der": b"leaf", "bundle": b"bundle", "bundle_sha256": SHA}
    return Row(**facts | changes)


def a_hello(
    *, lock: tuple[bytes, bytes] | None = None, open_txn: bytes = b"", prepared: bytes = b""
) -> m.HelloAnswer:
    state = DeviceState.LOCKED if lock else DeviceState.PREPARED if prepared else DeviceState.BLANK
    txn, sha = lock or (b"", b"")
    return m.HelloAnswer(
        hwid=HWID,
        model="gw100",
        firmware="1.0.0",
        state=state,
        active_txn=txn,
        active_bundle_sha256=sha,
        max_frame_bytes=1400,
        max_bundle_bytes=16384,
        boot_id=b"boot",
        nonce=b"n" * 16,
        open_txn=open_txn,
        prepared_bundle_sha256=prepared,
        key_modes=m.KeyMode.BOTH,
    )


NOTHING_OPEN = a_hello()
OTHER_OPEN = a_hello(open_txn=OTHER_TXN)
OTHER_PREPARED = a_hello(open_txn=OTHER_TXN, prepared=OTHER_SHA)
THIS_OPEN = a_hello(open_txn=TXN)
THIS_PREPARED = a_hello(open_txn=TXN, prepared=SHA)
SAME_LOCK = a_hello(lock=(TXN, SHA))
OTHER_LOCK = a_hello(lock=(OTHER_TXN, OTHER_SHA))
SAME_TXN_OTHER_BUNDLE = a_hello(lock=(TXN, OTHER_SHA))
OTHER_TXN_SAME_BUNDLE = a_hello(lock=(OTHER_TXN, SHA))
OLD_LOCK = a_hello(lock=(OLD_TXN, OLD_SHA))

KEYGEN, SIGN, BEGIN = Decision(Action.KEYGEN), Decision(Action.SIGN), Decision(Action.BEGIN)


def superseding(decision: Decision) -> Decision:
    return replace(decision, supersede=True)


CELLS: list[tuple[str, State | None, m.HelloAnswer, Decision | Action]] = [
    ("no row, blank", None, NOTHING_OPEN, Decision(Action.RESERVE)),
    ("no row, other open", None, OTHER_OPEN, superseding(Decision(Action.RESERVE))),
    ("no row, other prepared", None, OTHER_PREPARED, superseding(Decision(Action.RESERVE))),
    ("no row, locked", None, OTHER_LOCK, Action.QUARANTINE),
    ("RESERVED, blank", State.RESERVED, NOTHING_OPEN, KEYGEN),
    ("RESERVED, other open", State.RESERVED, OTHER_OPEN, superseding(KEYGEN)),
    ("RESERVED, other prepared", State.RESERVED, OTHER_PREPARED, superseding(KEYGEN)),
    ("RESERVED, this open", State.RESERVED, THIS_OPEN, KEYGEN),
    ("RESERVED, locked by its txn", State.RESERVED, SAME_LOCK, Action.QUARANTINE),
    ("RESERVED, other lock", State.RESERVED, OTHER_LOCK, Action.QUARANTINE),
    ("KEYED, blank", State.KEYED, NOTHING_OPEN, SIGN),
    ("KEYED, other open", State.KEYED, OTHER_OPEN, superseding(SIGN)),
    ("KEYED, this open", State.KEYED, THIS_OPEN, SIGN),
    ("KEYED, locked by its txn", State.KEYED, SAME_LOCK, Action.QUARANTINE),
    ("KEYED, other lock", State.KEYED, OTHER_LOCK, Action.QUARANTINE),
    ("ISSUED, blank", State.ISSUED, NOTHING_OPEN, BEGIN),
    ("ISSUED, other open", State.ISSUED, OTHER_OPEN, superseding(BEGIN)),
    ("ISSUED, this open", State.ISSUED, THIS_OPEN, BEGIN),
    ("ISSUED, this prepared", State.ISSUED, THIS_PREPARED, BEGIN),
    ("ISSUED, same lock", State.ISSUED, SAME_LOCK, Action.QUARANTINE),
    ("ISSUED, other lock", State.ISSUED, OTHER_LOCK, Action.QUARANTINE),
    ("PREPARED, blank", State.PREPARED, NOTHING_OPEN, BEGIN),
    ("PREPARED, other open", State.PREPARED, OTHER_OPEN, superseding(BEGIN)),
    ("PREPARED, this open", State.PREPARED, THIS_OPEN, BEGIN),
    ("PREPARED, this prepared", State.PREPARED, THIS_PREPARED, BEGIN),
    ("PREPARED, same lock", State.PREPARED, SAME_LOCK, Decision(Action.CONFIRM)),
    ("PREPARED, other lock", State.PREPARED, OTHER_LOCK, Action.QUARANTINE),
    ("PREPARED, same txn, other bundle", State.PREPARED, SAME_TXN_OTHER_BUNDLE, Action.QUARANTINE),
    ("PREPARED, other txn, same bundle", State.PREPARED, OTHER_TXN_SAME_BUNDLE, Action.QUARANTINE),
    ("COMMITTED, blank", State.COMMITTED, NOTHING_OPEN, Action.ERASED),
    ("COMMITTED, other open", State.COMMITTED, OTHER_OPEN, Action.ERASED),
    ("COMMITTED, this open", State.COMMITTED, THIS_OPEN, Action.ERASED),
    ("COMMITTED, this prepared", State.COMMITTED, THIS_PREPARED, Action.ERASED),
    ("COMMITTED, same lock", State.COMMITTED, SAME_LOCK, Decision(Action.ATTEST)),
    ("COMMITTED, other lock", State.COMMITTED, OTHER_LOCK, Action.QUARANTINE),
    ("COMMITTED, same txn, other bundle", State.COMMITTED, SAME_TXN_OTHER_BUNDLE, Action.QUARANTINE),
    ("ATTESTED, blank", State.ATTESTED, NOTHING_OPEN, Action.ERASED),
    ("ATTESTED, other open", State.ATTESTED, OTHER_OPEN, Action.ERASED),
    ("ATTESTED, this open", State.ATTESTED, THIS_OPEN, Action.ERASED),
    ("ATTESTED, same lock", State.ATTESTED, SAME_LOCK, Action.DUPLICATE),
    ("ATTESTED, other lock", State.ATTESTED, OTHER_LOCK, Action.QUARANTINE),
    ("ATTESTED, same txn, other bundle", State.ATTESTED, SAME_TXN_OTHER_BUNDLE, Action.QUARANTINE),
]


@pytest.mark.parametrize(
    ("state", "hello", "expected"), [cell[1:] for cell in CELLS], ids=[cell[0] for cell in CELLS]
)
def test_every_cell(state: State | None, hello: m.HelloAnswer, expected: Decision | Action) -> None:
    row = a_row(state) if state else None
    decision = decide(row, hello, WISH)
    if isinstance(expected, Action):
        assert decision.action is expected
        assert expected.refuses
        assert decision.reason
        assert not decision.supersede
    else:
        assert decision == expected
        assert not decision.action.refuses


def test_the_table_has_every_live_state_in_every_column() -> None:
    expected = {(state, where) for state in LIVE for where in Column} | {
        (None, Column.APART),
        (None, Column.OTHER_LOCK),
    }
    assert set(TABLE) == expected
    visited = {(state, column(a_row(state) if state else None, hello)) for _, state, hello, _ in CELLS}
    # Before ISSUED no bundle hash exists that a lock could have in common with the row.
    assert visited == expected - {(State.RESERVED, Column.SAME_LOCK), (State.KEYED, Column.SAME_LOCK)}
    assert TABLE[State.RESERVED, Column.SAME_LOCK] is TABLE[State.KEYED, Column.SAME_LOCK] is Action.QUARANTINE


@pytest.mark.parametrize("hello", [NOTHING_OPEN, OTHER_OPEN, THIS_OPEN, SAME_LOCK, OTHER_LOCK])
@pytest.mark.parametrize("state", LIVE)
def test_another_id_asked_for_is_a_mismatch_in_every_cell(state: State, hello: m.HelloAnswer) -> None:
    decision = decide(a_row(state), hello, Wish(DeviceId("sensor-18")))
    assert decision.action is Action.MISMATCH
    assert "sensor-17" in decision.reason
    assert "sensor-18" in decision.reason


def test_the_same_id_in_other_case_is_the_same_id() -> None:
    assert decide(a_row(State.RESERVED), NOTHING_OPEN, Wish(DeviceId("SENSOR-17"))) == KEYGEN


def test_another_role_asked_for_is_a_mismatch_and_none_is_not() -> None:
    row = a_row(State.ISSUED)
    assert decide(row, THIS_OPEN, Wish(DeviceId("sensor-17"), Role("meter"))).action is Action.MISMATCH
    assert decide(row, THIS_OPEN, Wish(DeviceId("sensor-17"), Role("sensor"))) == BEGIN


class TestStationMode:
    WISH = Wish(DeviceId("sensor-17"), key_mode=KeyMode.STATION)

    def test_a_resumed_reservation_supersedes_its_own_key(self) -> None:
        row = a_row(State.RESERVED, key_mode=KeyMode.STATION)
        assert decide(row, THIS_OPEN, self.WISH) == superseding(KEYGEN)
        assert decide(row, THIS_OPEN, WISH) == superseding(KEYGEN), "the row's mode holds where none is asked for"
        assert decide(row, NOTHING_OPEN, self.WISH) == KEYGEN

    @pytest.mark.parametrize(
        ("state", "expected"), [(State.KEYED, SIGN), (State.ISSUED, BEGIN), (State.PREPARED, BEGIN)]
    )
    def test_from_keyed_on_the_key_stays(self, state: State, expected: Decision) -> None:
        assert decide(a_row(state, key_mode=KeyMode.STATION), THIS_OPEN, self.WISH) == expected

    def test_the_other_mode_needs_a_fresh_transaction(self) -> None:
        """Without a scalar, a device answers for the pending key of a transaction, whoever made it."""
        made_here = a_row(State.RESERVED, key_mode=KeyMode.STATION)
        on_device = Wish(DeviceId("sensor-17"), key_mode=KeyMode.ON_DEVICE)
        expected = Decision(Action.KEYGEN, supersede=True, fresh_txn=True)
        assert decide(made_here, THIS_OPEN, on_device) == expected
        assert decide(a_row(State.RESERVED), THIS_OPEN, self.WISH) == expected
        assert decide(made_here, NOTHING_OPEN, on_device) == replace(expected, supersede=False)


class TestReplacing:
    """Footnote 1: the lock of the row that this one replaces is opened by UNLOCK."""

    OLD = a_row(
        State.ATTESTED,
        number=1,
        txn=OLD_TXN,
        bundle=None,
        bundle_sha256=OLD_SHA,
        replaced_by=2,
        public_key_der=b"old key",
        cert_serial=66,
    )

    @pytest.mark.parametrize(
        ("state", "expected"),
        [(State.RESERVED, KEYGEN), (State.KEYED, SIGN), (State.ISSUED, BEGIN), (State.PREPARED, BEGIN)],
    )
    def test_unlock_then_as_in_the_first_two_columns(self, state: State, expected: Decision) -> None:
        row = a_row(state, replaces=1)
        assert decide(row, OLD_LOCK, WISH, self.OLD) == replace(expected, unlock=True)
        other_open = a_hello(lock=(OLD_TXN, OLD_SHA), open_txn=OTHER_TXN)
        assert decide(row, other_open, WISH, self.OLD) == replace(expected, unlock=True, supersede=True)
        this_open = a_hello(lock=(OLD_TXN, OLD_SHA), open_txn=TXN)
        assert decide(row, this_open, WISH, self.OLD) == replace(expected, unlock=True)

    @pytest.mark.parametrize("state", sorted(set(LIVE) - UNLOCKABLE))
    def test_not_from_committed_on(self, state: State) -> None:
        assert decide(a_row(state, replaces=1), OLD_LOCK, WISH, self.OLD).action is Action.QUARANTINE

    @pytest.mark.parametrize("state", sorted(UNLOCKABLE))
    def test_no_other_lock(self, state: State) -> None:
        row = a_row(state, replaces=1)
        for lock in ((OLD_TXN, OTHER_SHA), (OTHER_TXN, OLD_SHA), (OTHER_TXN, OTHER_SHA)):
            assert decide(row, a_hello(lock=lock), WISH, self.OLD).action is Action.QUARANTINE
        assert decide(row, OLD_LOCK, WISH, None).action is Action.QUARANTINE
        assert decide(a_row(state), OLD_LOCK, WISH, self.OLD).action is Action.QUARANTINE

    def test_its_own_lock_is_confirmed(self) -> None:
        assert decide(a_row(State.PREPARED, replaces=1), SAME_LOCK, WISH, self.OLD).action is Action.CONFIRM


def test_what_is_durable_is_what_the_registry_demands() -> None:
    """A row in a state without what is durable with it cannot even be made."""
    for state in (State.RESERVED, State.KEYED, State.ISSUED):
        # A row that was issued from a request, without a board, has a state of a board's row and no hwid.
        not_demanded = {"name", "bundle", "bundle_sha256"} | ({"hwid"} if state is not State.RESERVED else set())
        for field in set(DURABLE[state]) - not_demanded:
            with pytest.raises(ValueError, match="needs"):
                a_row(state, **{field: None})
    with pytest.raises(ValueError, match="void reason"):
        a_row(State.VOID)
