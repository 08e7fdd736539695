"""What to do with a unit: the journal's decision table, docs/serial-protocol.md section 8.

Rules:

- The unit's live row says how far the station got, HELLO says how far the device got; the table's cell says how
  to go on. Nothing is sent to a unit before the cell is known.
- A device behind the journal is brought up to it. A device ahead of it (a restored backup, a clone, a foreign
  station) is put in quarantine: nothing is sent, a person decides.
- "Same lock" is state 2 with the row's transaction *and* bundle hash; any other state 2 is another lock.
- A unit that stands in the journal under another device id or role than the one asked for is refused.
- The lock of the row that this one replaces is opened by UNLOCK; then the first two columns hold.

What is durable with each state, before the next action on the wire or at the CA, is `DURABLE`; `transitions`
does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol

from birthmark.device.link.messages import DeviceState
from birthmark.provisioning.registry.model import KeyMode, State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from birthmark.device.identity import DeviceId, Role
    from birthmark.device.link.messages import HelloAnswer
    from birthmark.provisioning.registry.line import Quarantined
    from birthmark.provisioning.registry.model import Row


class Column(StrEnum):
    """How the device stands, as seen from a row: the table's columns."""

    APART = "not locked, nothing open or another transaction open"
    OPEN = "not locked, this transaction open"
    SAME_LOCK = "locked by this transaction with this bundle"
    OTHER_LOCK = "locked otherwise"


class Action(StrEnum):
    """What a cell of the table says."""

    RESERVE = "reserve, then KEYGEN"
    KEYGEN = "KEYGEN"
    SIGN = "KEYGEN; the same key is signed under the stored serial number, another one voids the row"
    BEGIN = "KEYGEN; the same key gets the stored bundle, another one voids the row"
    CONFIRM = "set COMMITTED, then ATTEST"
    ATTEST = "ATTEST"
    QUARANTINE = "refuse: the device is ahead of the journal"
    ERASED = "refuse: the device was made already, and has lost its identity since"
    DUPLICATE = "refuse: the device was made already"
    MISMATCH = "refuse: the journal has this device under another id or role"

    @property
    def refuses(self) -> bool:
        """Whether nothing more is sent to the unit."""
        return self in _REFUSALS

    @property
    def asks_for_key(self) -> bool:
        """Whether the next request is KEYGEN."""
        return self in _WITH_KEYGEN


_REFUSALS: Final = frozenset({Action.QUARANTINE, Action.ERASED, Action.DUPLICATE, Action.MISMATCH})
_WITH_KEYGEN: Final = frozenset({Action.RESERVE, Action.KEYGEN, Action.SIGN, Action.BEGIN})

TABLE: Final[Mapping[tuple[State | None, Column], Action]] = MappingProxyType(
    {
        (None, Column.APART): Action.RESERVE,
        (None, Column.OTHER_LOCK): Action.QUARANTINE,
        (State.RESERVED, Column.APART): Action.KEYGEN,
        (State.RESERVED, Column.OPEN): Action.KEYGEN,
        (State.RESERVED, Column.SAME_LOCK): Action.QUARANTINE,
        (State.RESERVED, Column.OTHER_LOCK): Action.QUARANTINE,
        (State.KEYED, Column.APART): Action.SIGN,
        (State.KEYED, Column.OPEN): Action.SIGN,
        (State.KEYED, Column.SAME_LOCK): Action.QUARANTINE,
        (State.KEYED, Column.OTHER_LOCK): Action.QUARANTINE,
        (State.ISSUED, Column.APART): Action.BEGIN,
        (State.ISSUED, Column.OPEN): Action.BEGIN,
        (State.ISSUED, Column.SAME_LOCK): Action.QUARANTINE,
        (State.ISSUED, Column.OTHER_LOCK): Action.QUARANTINE,
        (State.PREPARED, Column.APART): Action.BEGIN,
        (State.PREPARED, Column.OPEN): Action.BEGIN,
        (State.PREPARED, Column.SAME_LOCK): Action.CONFIRM,
        (State.PREPARED, Column.OTHER_LOCK): Action.QUARANTINE,
        (State.COMMITTED, Column.APART): Action.ERASED,
        (State.COMMITTED, Column.OPEN): Action.ERASED,
        (State.COMMITTED, Column.SAME_LOCK): Action.ATTEST,
        (State.COMMITTED, Column.OTHER_LOCK): Action.QUARANTINE,
        (State.ATTESTED, Column.APART): Action.ERASED,
        (State.ATTESTED, Column.OPEN): Action.ERASED,
        (State.ATTESTED, Column.SAME_LOCK): Action.DUPLICATE,
        (State.ATTESTED, Column.OTHER_LOCK): Action.QUARANTINE,
    }
)
"""A live row is never VOID; without a row no transaction of ours can be open or lock the device."""

REPLACEABLE: Final = frozenset({Action.DUPLICATE, Action.ERASED})
"""The refusals that a supervisor may turn into a new row: behind UNLOCK, or in the place of the lost identity."""

UNLOCKABLE: Final = frozenset({State.RESERVED, State.KEYED, State.ISSUED, State.PREPARED})
"""The rows under footnote 1: another lock is opened by UNLOCK if it is that of the row being replaced."""

DURABLE: Final[Mapping[State, tuple[str, ...]]] = MappingProxyType(
    {
        State.RESERVED: ("name", "hwid", "txn"),
        State.KEYED: ("public_key_der", "cert_serial"),
        State.ISSUED: ("certificate_der", "bundle", "bundle_sha256"),
        State.PREPARED: (),
        State.COMMITTED: (),
        State.ATTESTED: (),
        State.VOID: ("void_reason",),
    }
)
"""The fields that are on disk once a row is in this state. RESERVED precedes KEYGEN, KEYED the signing, ISSUED
BEGIN, PREPARED COMMIT, COMMITTED ATTEST, ATTESTED the release, and VOID a new row for the same unit."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the operator asked for."""

    device_id: DeviceId
    role: Role | None = None
    """None: the role that the journal has for the unit, or the station's default for a new one."""
    key_mode: KeyMode | None = None
    """None: the mode that the journal has for the unit, or on-device for a new one."""

    replaces_reason: str = ""
    """Set by a supervisor who lets a made unit be made again: the RFC 5280 reason's name under which the
    certificate that it has is revoked then."""
    label: str = ""
    """What its label says beside its id: lines `name: value`."""

    def mode_for(self, row: Row | None) -> KeyMode:
        """Return the key mode that holds for a unit with this row."""
        return self.key_mode or (row.key_mode if row else None) or KeyMode.ON_DEVICE


@dataclass(frozen=True, slots=True)
class Decision:
    """How to go on with a unit."""

    action: Action
    supersede: bool = False
    """Whether KEYGEN drops what is open on the device."""
    unlock: bool = False
    """Whether UNLOCK comes first (footnote 1)."""
    fresh_txn: bool = False
    """Whether a new row comes before everything: the other key mode was asked for, and a device answers for the
    pending key of a transaction, whoever made it."""
    reason: str = ""
    """For a refusal: what the device is, to follow `the device on this port`."""


class Journal(Protocol):
    """The registry and the CA, as one enrollment uses them. What a call returns is durable."""

    def standing(self, hwid: bytes) -> tuple[Row | None, Row | None]:
        """Return the unit's live row and, if that row is to replace another one, the other one."""

    def reserve(self, hwid: bytes, wish: Wish) -> Row:
        """Make a row in RESERVED with a fresh transaction.

        Raises:
            DuplicateError: the device id or the hwid belongs to another live row.
        """

    def key(self, row: Row, public_key_der: bytes) -> Row:
        """Move a row to KEYED: with the verified request's key, and the serial number to sign under.

        Raises:
            DuplicateError: another row has this key.
        """

    def issue(self, row: Row) -> Row:
        """Sign the certificate of a row in KEYED and move the row to ISSUED, with certificate and bundle."""

    def advance(self, row: Row, state: State) -> Row:
        """Move a row forward to PREPARED, COMMITTED or ATTESTED."""

    def replace(self, row: Row, action: Action, wish: Wish) -> Row:
        """Make a new row in RESERVED for a unit that is made already, as a supervisor wishes.

        For DUPLICATE, it is to replace `row`, which stands until the new one is ATTESTED; for ERASED, `row` is
        VOID and revoked at once.
        """

    def quarantined(self, hwid: bytes) -> Quarantined | None:
        """Return the unit as it was put in quarantine, if it was and no person has cleared it."""

    def quarantine(self, unit: HelloAnswer, name: str, reason: str) -> None:
        """Put a unit in quarantine, with the name that the journal has for it, if it has one."""

    def restart(self, row: Row, reason: str, key_mode: KeyMode) -> Row:
        """Make a row VOID, and a new one in RESERVED in its place, with a fresh transaction."""

    def sign_unlock(self, row: Row, old_txn: bytes, signed: bytes) -> tuple[bytes, bytes]:
        """Return the SHA-256 of the signing CA's certificate and its signature over an UNLOCK transcript.

        The CA is the one that the unit of `row` holds since it was flashed under `old_txn`.
        """


def column(row: Row | None, hello: HelloAnswer) -> Column:
    """Return the column of the table that `hello` puts the device in, as seen from `row`."""
    if hello.state is DeviceState.LOCKED:
        same = row is not None and (row.txn, row.bundle_sha256) == (hello.active_txn, hello.active_bundle_sha256)
        return Column.SAME_LOCK if same else Column.OTHER_LOCK
    return _unlocked_column(row, hello)


def decide(row: Row | None, hello: HelloAnswer, wish: Wish, replaced: Row | None = None) -> Decision:
    """Decide after HELLO how to go on with a unit.

    Args:
        row: the unit's live row, if there is one: neither VOID nor being replaced.
        hello: the device's own word, already checked for consistency.
        wish: what the operator asked for.
        replaced: the row that `row` is to replace, if it is to replace one.
    """
    where = column(row, hello)
    if row is not None:
        # The role is part of what a supervisor may change.
        may_change = bool(wish.replaces_reason) and TABLE[row.state, where] in REPLACEABLE
        mismatch = _mismatch(row, wish, with_role=not may_change)
        if mismatch:
            return Decision(Action.MISMATCH, reason=mismatch)
    unlock = where is Column.OTHER_LOCK and _may_unlock(row, hello, replaced)
    if unlock:
        where = _unlocked_column(row, hello)
    action = TABLE[row.state if row else None, where]
    if action.refuses:
        return Decision(action, reason=_reason(action, row, hello))
    mode = wish.mode_for(row)
    fresh_txn = action is Action.KEYGEN and row is not None and row.key_mode is not mode
    if fresh_txn or where is Column.APART:
        supersede = bool(hello.open_txn)
    else:
        # The pending key is ours. The scalar of a run before is gone, so only a fresh one can be answered for.
        supersede = action is Action.KEYGEN and mode is KeyMode.STATION
    return Decision(action, supersede=supersede and action.asks_for_key, unlock=unlock, fresh_txn=fresh_txn)


def _unlocked_column(row: Row | None, hello: HelloAnswer) -> Column:
    this_open = row is not None and bool(hello.open_txn) and hello.open_txn == row.txn
    return Column.OPEN if this_open else Column.APART


def _may_unlock(row: Row | None, hello: HelloAnswer, replaced: Row | None) -> bool:
    return (
        row is not None
        and replaced is not None
        and row.state in UNLOCKABLE
        and row.replaces == replaced.number
        and (replaced.txn, replaced.bundle_sha256) == (hello.active_txn, hello.active_bundle_sha256)
    )


def _mismatch(row: Row, wish: Wish, *, with_role: bool) -> str:
    if row.name_folded != wish.device_id.folded:
        return f"is {row.name} in the journal, not {wish.device_id}"
    if with_role and wish.role is not None and row.role != wish.role.name:
        return f"is {row.name} in the role {row.role} in the journal, not {wish.role}"
    return ""


def _reason(action: Action, row: Row | None, hello: HelloAnswer) -> str:
    lock = hello.active_txn.hex()
    if action is Action.ERASED and row is not None:
        return f"was made as {row.name} and has lost that identity since"
    if action is Action.DUPLICATE and row is not None:
        revoked = ", which is revoked" if row.is_revoked else ""
        return f"is {row.name} already, with the certificate {row.cert_serial:x}{revoked}"
    if row is None:
        return f"is locked by a transaction that this station does not know ({lock})"
    return f"is locked by {lock}, but the journal has {row.name} in {row.state} with {_txn_text(row)}"


def _txn_text(row: Row) -> str:
    return row.txn.hex() if row.txn else "no transaction"
