"""Every request in every state: which check comes first, and that a refusal changes nothing stored."""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from support.agent_bench import HWID, Bench, reference_ca
from support.reference_station import (
    ABORT,
    ATTEST,
    AUTH,
    BEGIN,
    BUNDLE,
    COMMIT,
    DATA,
    HELLO,
    KEY,
    KEYGEN,
    LOCKED,
    MODE,
    PREPARE,
    PROTO,
    SHA,
    SIZE,
    STATE,
    TXN,
    UNLOCK,
    VERSION,
    ReferenceEnrollment,
    ReferenceStation,
    RefusedError,
    certificate,
    sha256,
)

from birthmark.device.agent.keys import P256_ORDER
from birthmark.device.link.messages import KeyMode

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OLD, NOW, OTHER = b"o" * 16, b"n" * 16, b"x" * 16
NONCE, HASH = b"N" * 16, b"H" * 32
SCALAR = (7).to_bytes(32, "big")
MAX_BUNDLE = 4096


@dataclass
class Scene:
    """A device in one state. `NOW` is the transaction that is open, `OLD` the one that is active."""

    bench: Bench
    bundle: bytes = b""
    old_bundle: bytes = b""
    station: ReferenceStation = field(init=False)

    def __post_init__(self) -> None:
        self.station = self.bench.station()

    def code(self, type_: int, fields: Any) -> int | None:
        """The code that a request is refused with, None if it is answered."""
        try:
            self.station.ask(type_, fields)
        except RefusedError as refusal:
            return refusal.code
        return None

    def key(self, scalar: bytes | None = None) -> None:
        key = self.station.keygen(NOW, scalar).public_key()
        self.bundle = reference_ca().bundle(key, "unit-new")

    def stage(self, end: int | None = None) -> None:
        self.station.begin(NOW, self.bundle)
        whole = len(self.bundle) if end is None else end
        for start in range(0, whole, 1024):
            self.station.data(start, self.bundle[start : min(start + 1024, whole)])


def blank(scene: Scene) -> None:
    """Nothing at all."""


def keyed(scene: Scene) -> None:
    scene.key()


def keyed_with_scalar(scene: Scene) -> None:
    scene.key(SCALAR)


def partly(scene: Scene) -> None:
    scene.key()
    scene.stage(100)


def staged(scene: Scene) -> None:
    scene.key()
    scene.stage()


def prepared(scene: Scene) -> None:
    staged(scene)
    scene.station.prepare(NOW, HWID, scene.bundle)


def locked(scene: Scene) -> None:
    enrollment = ReferenceEnrollment(reference_ca(), "unit-old", txn=OLD)
    enrollment.run(scene.station)
    scene.old_bundle = enrollment.bundle


def unlocked(scene: Scene) -> None:
    locked(scene)
    scene.station.unlock(reference_ca(), HWID, NOW)


def unlocked_keyed(scene: Scene) -> None:
    unlocked(scene)
    scene.key()


def unlocked_prepared(scene: Scene) -> None:
    unlocked(scene)
    prepared(scene)


def keygen(txn: bytes, scalar: bytes | None = None, *, supersede: bool = False) -> tuple[int, Any]:
    fields: dict[int, Any] = {1: txn}
    fields |= {2: scalar} if scalar is not None else {}
    fields |= {3: True} if supersede else {}
    return KEYGEN, lambda _: fields


def begin(txn: bytes, length: int = 1000, hash_: bytes = HASH) -> tuple[int, Any]:
    return BEGIN, lambda _: {1: txn, 2: length, 3: hash_}


def data(offset: int, length: int) -> tuple[int, Any]:
    return DATA, lambda _: struct.pack("<I", offset) + b"d" * length


def prepare(txn: bytes) -> tuple[int, Any]:
    return PREPARE, lambda _: {1: txn, 2: NONCE}


def commit(txn: bytes, hash_: bytes = HASH) -> tuple[int, Any]:
    return COMMIT, lambda _: {1: txn, 2: hash_}


def abort(txn: bytes) -> tuple[int, Any]:
    return ABORT, lambda _: {1: txn}


def challenge(txn: bytes) -> tuple[int, Any]:
    return UNLOCK, lambda _: {1: 1, 2: txn}


def proof(txn: bytes) -> tuple[int, Any]:
    return UNLOCK, lambda _: {1: 2, 2: txn, 3: HASH, 4: b"s" * 70}


ZERO, ORDER = bytes(32), P256_ORDER.to_bytes(32, "big")
right_begin = (BEGIN, lambda scene: {1: NOW, 2: len(scene.bundle), 3: sha256(scene.bundle)})
right_commit = (COMMIT, lambda scene: {1: NOW, 2: sha256(scene.bundle)})
old_commit = (COMMIT, lambda scene: {1: OLD, 2: sha256(scene.old_bundle)})
attest = (ATTEST, lambda _: {1: NONCE})
hello = (HELLO, lambda _: {1: NONCE, 2: [1, 1]})

TABLE: list[tuple[Any, tuple[int, Any], int | None]] = [
    (blank, hello, None),
    (blank, (HELLO, lambda _: {1: NONCE, 2: [1, 9]}), None),
    (blank, (HELLO, lambda _: {1: NONCE, 2: [2, 3]}), VERSION),
    (locked, (HELLO, lambda _: {1: NONCE, 2: [2, 2]}), VERSION),
    # KEYGEN: gate, (mode), scalar, pending
    (blank, keygen(NOW), None),
    (blank, keygen(NOW, supersede=True), None),
    (blank, keygen(NOW, ZERO), KEY),
    (blank, keygen(NOW, ORDER), KEY),
    (blank, keygen(NOW, (P256_ORDER - 1).to_bytes(32, "big")), None),
    (keyed, keygen(NOW), None),
    (keyed, keygen(OTHER), TXN),
    (keyed, keygen(OTHER, ZERO), KEY),
    (keyed, keygen(OTHER, supersede=True), None),
    (keyed, keygen(NOW, SCALAR), TXN),
    (keyed, keygen(NOW, SCALAR, supersede=True), None),
    (keyed_with_scalar, keygen(NOW, SCALAR), None),
    (keyed_with_scalar, keygen(NOW), None),
    (keyed_with_scalar, keygen(OTHER, SCALAR), TXN),
    (prepared, keygen(NOW), None),
    (prepared, keygen(OTHER), TXN),
    (locked, keygen(OLD), LOCKED),
    (locked, keygen(NOW), LOCKED),
    (locked, keygen(NOW, ZERO, supersede=True), LOCKED),
    (unlocked, keygen(OLD), LOCKED),
    (unlocked, keygen(OTHER), LOCKED),
    (unlocked, keygen(NOW), None),
    # BEGIN: gate, size, pending
    (blank, begin(NOW), STATE),
    (blank, begin(NOW, 0), SIZE),
    (blank, begin(NOW, MAX_BUNDLE + 1), SIZE),
    (blank, begin(NOW, 2**32 - 1), SIZE),
    (keyed, begin(NOW), None),
    (keyed, begin(NOW, MAX_BUNDLE), None),
    (keyed, begin(OTHER), TXN),
    (keyed, begin(OTHER, 0), SIZE),
    (locked, begin(NOW, 0), LOCKED),
    (locked, begin(OLD), LOCKED),
    (unlocked, begin(NOW), STATE),
    (unlocked, begin(NOW, 0), SIZE),
    (unlocked, begin(OLD), LOCKED),
    (prepared, right_begin, None),
    # DATA: form, staging, size
    (blank, (DATA, lambda _: b""), PROTO),
    (blank, (DATA, lambda _: bytes(4)), PROTO),
    (partly, (DATA, lambda _: bytes(4)), PROTO),
    (blank, data(0, 1), STATE),
    (blank, data(0, 1025), STATE),
    (keyed, data(0, 1), STATE),
    (prepared, data(0, 1), STATE),
    (locked, data(0, 1), STATE),
    (partly, data(0, 1024), None),
    (partly, data(0, 1025), SIZE),
    (partly, data(2**32 - 1, 1), SIZE),
    (partly, (DATA, lambda scene: struct.pack("<I", len(scene.bundle)) + b"d"), SIZE),
    (partly, (DATA, lambda scene: struct.pack("<I", len(scene.bundle) - 1) + b"d"), None),
    (partly, (DATA, lambda scene: struct.pack("<I", len(scene.bundle) - 1) + b"dd"), SIZE),
    # PREPARE: gate, pending, staging or prepared slot
    (blank, prepare(NOW), STATE),
    (keyed, prepare(NOW), STATE),
    (keyed, prepare(OTHER), TXN),
    (partly, prepare(NOW), STATE),
    (partly, prepare(OTHER), TXN),
    (staged, prepare(NOW), None),
    (prepared, prepare(NOW), None),
    (prepared, prepare(OTHER), TXN),
    (locked, prepare(OLD), LOCKED),
    (locked, prepare(NOW), LOCKED),
    (unlocked, prepare(NOW), STATE),
    (unlocked_prepared, prepare(NOW), None),
    (unlocked_prepared, prepare(OLD), LOCKED),
    # COMMIT: locked by it, gate, prepared slot, transaction, hash
    (blank, commit(NOW), STATE),
    (keyed, commit(NOW), STATE),
    (staged, right_commit, STATE),
    (prepared, commit(OTHER), TXN),
    (prepared, commit(NOW), SHA),
    (prepared, right_commit, None),
    (locked, old_commit, None),
    (locked, commit(OLD), SHA),
    (locked, commit(NOW), LOCKED),
    (unlocked, commit(NOW), STATE),
    (unlocked, old_commit, None),
    (unlocked_keyed, commit(NOW), STATE),
    (unlocked_prepared, commit(NOW), SHA),
    (unlocked_prepared, commit(OTHER), LOCKED),
    (unlocked_prepared, old_commit, None),
    (unlocked_prepared, right_commit, None),
    # ATTEST
    (blank, attest, STATE),
    (prepared, attest, STATE),
    (locked, attest, None),
    (unlocked_prepared, attest, None),
    # ABORT
    (blank, abort(NOW), None),
    (keyed, abort(NOW), None),
    (keyed, abort(OTHER), TXN),
    (prepared, abort(OTHER), TXN),
    (prepared, abort(NOW), None),
    (locked, abort(OLD), LOCKED),
    (locked, abort(NOW), None),
    (unlocked, abort(OLD), LOCKED),
    (unlocked, abort(OTHER), TXN),
    (unlocked, abort(NOW), None),
    (unlocked_prepared, abort(OTHER), TXN),
    (unlocked_prepared, abort(NOW), None),
    # UNLOCK: locked, transaction, then the proof
    (blank, challenge(NOW), STATE),
    (blank, proof(NOW), STATE),
    (prepared, challenge(NOW), STATE),
    (locked, challenge(OLD), TXN),
    (locked, challenge(NOW), None),
    (locked, proof(OLD), TXN),
    (locked, proof(NOW), AUTH),
    # no message at all
    (blank, (42, lambda _: {}), PROTO),
    (blank, (0, lambda _: {}), PROTO),
    (locked, (KEYGEN, lambda _: {1: b"short"}), PROTO),
    (locked, (COMMIT, lambda _: b"\xa1\x01\x5b" + b"\xff" * 8), PROTO),
    (blank, (HELLO, lambda _: {1: NONCE, 2: [1, 1], 3: 0}), PROTO),
]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(Bench(tmp_path / "state", max_bundle_bytes=MAX_BUNDLE))


@pytest.mark.parametrize(
    ("state", "request_", "expected"),
    [pytest.param(*row, id=f"{row[0].__name__}-{row[1][0]}-{i}-{row[2]}") for i, row in enumerate(TABLE)],
)
def test_the_first_check_that_fails(
    scene: Scene, state: Callable[[Scene], None], request_: tuple[int, Any], expected: int | None
) -> None:
    state(scene)
    before, hello_before = scene.bench.files(), scene.station.hello()
    type_, fields = request_
    assert scene.code(type_, fields(scene)) == expected
    if expected is not None:
        after = scene.station.hello()
        del hello_before[10], after[10]
        assert after == hello_before
        assert scene.bench.files() == before
    if scene.old_bundle and not (type_ == COMMIT and expected is None):
        scene.station.attest(OLD, HWID, scene.old_bundle)


@pytest.mark.parametrize(
    ("modes", "state", "request_", "expected"),
    [
        (KeyMode.ON_DEVICE, blank, keygen(NOW, SCALAR), MODE),
        (KeyMode.ON_DEVICE, blank, keygen(NOW, ZERO), MODE),
        (KeyMode.ON_DEVICE, keyed, keygen(OTHER, SCALAR), MODE),
        (KeyMode.ON_DEVICE, locked, keygen(NOW, SCALAR), LOCKED),
        (KeyMode.STATION, blank, keygen(NOW), MODE),
        (KeyMode.STATION, blank, keygen(NOW, supersede=True), MODE),
        (KeyMode.STATION, keyed_with_scalar, keygen(OTHER), MODE),
        (KeyMode.STATION, keyed_with_scalar, keygen(OTHER, supersede=True), MODE),
        # Without a scalar a pending key of the same transaction answers in any mode.
        (KeyMode.STATION, keyed_with_scalar, keygen(NOW), None),
    ],
)
def test_key_modes(
    tmp_path: Path,
    modes: KeyMode,
    state: Callable[[Scene], None],
    request_: tuple[int, Any],
    expected: int | None,
) -> None:
    scene = Scene(Bench(tmp_path / "state", key_modes=modes))
    state(scene)
    type_, fields = request_
    assert scene.code(type_, fields(scene)) == expected


def test_keygen_answers_for_the_pending_key(scene: Scene) -> None:
    first = scene.station.keygen(NOW).public_key()
    scene.bench.reboot()
    assert scene.station.keygen(NOW).public_key() == first
    assert scene.station.keygen(NOW, supersede=True).public_key() == first
    given = ec.derive_private_key(7, ec.SECP256R1()).public_key()
    assert scene.station.keygen(NOW, SCALAR, supersede=True).public_key() == given
    assert scene.station.keygen(OTHER, supersede=True).public_key() not in (first, given)
    assert scene.station.hello()[11] == OTHER


def test_superseding_drops_the_prepared_slot_and_the_transfer(scene: Scene) -> None:
    prepared(scene)
    scene.station.keygen(NOW, SCALAR, supersede=True)
    assert scene.station.hello()[4] == 0
    assert scene.bench.files().keys() == {"pending"}
    assert scene.code(PREPARE, {1: NOW, 2: NONCE}) == STATE
    scene.bundle = reference_ca().bundle(ec.derive_private_key(7, ec.SECP256R1()).public_key(), "unit-new")
    scene.stage(100)
    scene.station.keygen(OTHER, supersede=True)
    assert scene.code(DATA, struct.pack("<I", 0) + b"d") == STATE


def test_begin_resumes_or_starts_anew(scene: Scene) -> None:
    partly(scene)
    assert scene.station.begin(NOW, scene.bundle) == 100
    assert scene.station.begin(NOW, scene.bundle + b"x") == 0
    assert scene.station.begin(NOW, scene.bundle) == 0


def test_begin_of_the_prepared_bundle_sends_nothing(scene: Scene) -> None:
    prepared(scene)
    scene.bench.reboot()
    assert scene.station.begin(NOW, scene.bundle) == len(scene.bundle)
    scene.station.prepare(NOW, HWID, scene.bundle)
    # Another transfer begins and is left behind: the prepared slot is still what PREPARE is about.
    assert scene.station.begin(NOW, scene.bundle + b"x") == 0
    assert scene.station.begin(NOW, scene.bundle) == len(scene.bundle)
    scene.station.prepare(NOW, HWID, scene.bundle)
    scene.station.commit(NOW, scene.bundle)


def test_data_in_any_order_with_overlaps_and_repeats(scene: Scene) -> None:
    keyed(scene)
    scene.station.begin(NOW, scene.bundle)
    end = len(scene.bundle)
    pieces = [(500, 700), (0, 10), (600, 900), (5, 200), (0, 10), (900, end), (200, 500)]
    prefixes = [0, 10, 10, 200, 200, 200, end]
    for (start, stop), prefix in zip(pieces, prefixes, strict=True):
        assert scene.station.data(start, scene.bundle[start:stop]) == {1: prefix, 2: start}
    scene.station.prepare(NOW, HWID, scene.bundle)


def test_a_wrong_hash_and_a_bad_bundle_drop_the_transfer(scene: Scene) -> None:
    keyed(scene)
    scene.station.begin(NOW, scene.bundle)
    scene.station.data(0, bytes(1024))
    scene.station.data(len(scene.bundle) - 1024, bytes(1024))
    assert scene.code(PREPARE, {1: NOW, 2: NONCE}) == SHA
    assert scene.station.begin(NOW, scene.bundle) == 0
    other = reference_ca().bundle(ec.generate_private_key(ec.SECP256R1()).public_key(), "unit-new")
    for bad, expected in ((b"junk" * 100, BUNDLE), (other, KEY)):
        scene.station.transfer(NOW, bad)
        assert scene.code(PREPARE, {1: NOW, 2: NONCE}) == expected
        assert scene.code(PREPARE, {1: NOW, 2: NONCE}) == STATE
        assert scene.station.begin(NOW, bad) == 0
    scene.station.transfer(NOW, scene.bundle)
    scene.station.prepare(NOW, HWID, scene.bundle)


def test_a_failed_transfer_leaves_the_prepared_slot(scene: Scene) -> None:
    prepared(scene)
    scene.station.transfer(NOW, b"junk" * 100)
    assert scene.code(PREPARE, {1: NOW, 2: NONCE}) == BUNDLE
    scene.station.prepare(NOW, HWID, scene.bundle)
    scene.station.commit(NOW, scene.bundle)


def test_a_new_bundle_replaces_the_prepared_one(scene: Scene) -> None:
    prepared(scene)
    first = scene.bundle
    key = scene.station.keygen(NOW).public_key()
    scene.bundle = reference_ca().bundle(key, "unit-new", port=1883)
    scene.station.transfer(NOW, scene.bundle)
    scene.station.prepare(NOW, HWID, scene.bundle)
    assert scene.code(COMMIT, {1: NOW, 2: sha256(first)}) == SHA
    scene.station.commit(NOW, scene.bundle)


def test_abort_leads_back(scene: Scene) -> None:
    prepared(scene)
    assert scene.station.abort(NOW) == 0
    assert scene.station.abort(NOW) == 0
    assert scene.bench.files() == {}
    locked(scene)
    scene.station.unlock(reference_ca(), HWID, NOW)
    prepared(scene)
    assert scene.station.abort(NOW) == 2
    assert scene.bench.files().keys() == {"active"}
    assert scene.code(KEYGEN, {1: NOW}) == LOCKED


BAD_BUNDLES: list[tuple[str, Callable[[Any], bytes], int]] = [
    ("another key", lambda _: reference_ca().bundle(reference_ca().root_key.public_key(), "u"), KEY),
    ("another CN", lambda key: reference_ca().bundle(key, "unit-1", id="unit-2"), BUNDLE),
    (
        "two CNs",
        lambda key: reference_ca().bundle(
            key,
            "unit-1",
            leaf=certificate(
                key, ["unit-1", "unit-2"], reference_ca().issuing_key, "Reference Issuing", is_ca=False
            ),
        ),
        BUNDLE,
    ),
    ("a CA of the same name", lambda key: _foreign_issuer(key), BUNDLE),  # noqa: PLW0108 - defined below
    ("issuing CAs of a foreign chain", lambda key: reference_ca().bundle(
        key, "u", issuing=[reference_ca("Foreign").issuing_der]), BUNDLE),
    ("the leaf itself as an anchor", lambda key: reference_ca().bundle(
        key, "u", anchors=[reference_ca().leaf(key, "u")]), BUNDLE),
    ("expired at issue", lambda key: reference_ca().bundle(
        key, "u", leaf=reference_ca().leaf(key, "u", days=(-20, -10))), BUNDLE),
    ("a reserved role", lambda key: reference_ca().bundle(key, "u", role="operator"), BUNDLE),
    ("another reserved role", lambda key: reference_ca().bundle(key, "u", role="Service-x"), BUNDLE),
    ("host with a slash", lambda key: reference_ca().bundle(key, "u", host="a/b"), BUNDLE),
    ("keepalive 0", lambda key: reference_ca().bundle(key, "u", keepalive=0), BUNDLE),
    ("junk for a leaf", lambda key: reference_ca().bundle(key, "u", leaf=b"\x30\x03\x02\x01\x01"), BUNDLE),
    ("junk for an anchor", lambda key: reference_ca().bundle(key, "u", anchors=[b"\x30\x80"]), BUNDLE),
    ("not canonical", lambda key: b"\xbf" + reference_ca().bundle(key, "u")[1:] + b"\xff", BUNDLE),
    ("an array", lambda _: cbor2.dumps([1, 2, 3]), BUNDLE),
]  # fmt: skip


def _foreign_issuer(key: Any) -> bytes:
    ca = reference_ca()
    leaf = certificate(key, "unit-1", ec.generate_private_key(ec.SECP256R1()), ca.issuing_name, is_ca=False)
    return ca.bundle(key, "unit-1", leaf=leaf, issuing=[], anchors=[ca.issuing_der])


@pytest.mark.parametrize(("make", "expected"), [pytest.param(*row[1:], id=row[0]) for row in BAD_BUNDLES])
@pytest.mark.parametrize("state", [blank, unlocked])
def test_bad_bundles_are_refused(
    scene: Scene, state: Callable[[Scene], None], make: Callable[[Any], bytes], expected: int
) -> None:
    state(scene)
    key = scene.station.keygen(NOW).public_key()
    before = scene.bench.files()
    bundle = make(key)
    scene.station.transfer(NOW, bundle)
    assert scene.code(PREPARE, {1: NOW, 2: NONCE}) == expected
    assert scene.bench.files() == before
    assert scene.code(COMMIT, {1: NOW, 2: sha256(bundle)}) == STATE


@pytest.mark.parametrize("case", ["no issuing", "other root", "three issuing"])
def test_good_bundles_are_taken(scene: Scene, case: str) -> None:
    ca = reference_ca()
    key = scene.station.keygen(NOW).public_key()
    bundle = {
        "no issuing": lambda: ca.bundle(key, "u", issuing=[], anchors=[ca.issuing_der, ca.root_der], keepalive=60),
        # No anchor carries the leaf's issuer's name: the brokers may trust another root.
        "other root": lambda: ca.bundle(key, "u", issuing=[], anchors=[reference_ca("Foreign").root_der]),
        "three issuing": lambda: ca.bundle(key, "u", issuing=[ca.issuing_der, ca.root_der, ca.root_der]),
    }[case]()
    scene.station.transfer(NOW, bundle)
    scene.station.prepare(NOW, HWID, bundle)
    scene.station.commit(NOW, bundle)
    scene.station.attest(NOW, HWID, bundle)


def test_random_requests_never_change_a_locked_device(scene: Scene) -> None:
    locked(scene)
    before = scene.bench.files()
    for type_ in range(128):
        for payload in (b"", b"\xa0", secrets.token_bytes(40), cbor2.dumps({1: OLD, 2: HASH}, canonical=True)):
            scene.code(type_, payload)
    assert scene.bench.files() == before
    scene.station.attest(OLD, HWID, scene.old_bundle)
