"""The station's machine against a scripted board, in virtual time."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st
from support.board import Board, Noise, csr_for
from support.board_line import UnpluggedError, VirtualLine
from support.board_station import open_desk

from birthmark.device.errors import BirthmarkError, EnrollmentRefusedError
from birthmark.device.link import cbor
from birthmark.device.link import messages as m
from birthmark.device.link.bundle import Bundle, check_bundle
from birthmark.device.link.frame import FROM_DEVICE, Frame
from birthmark.device.link.messages import ErrorCode, MessageType
from birthmark.provisioning.enrollment.enrol import ProofError, Reached, Step, Stored, UnitRefusedError
from birthmark.provisioning.enrollment.exchange import DeviceRefusalError, MalformedAnswerError, NoAnswerError
from birthmark.provisioning.enrollment.journal import Action
from birthmark.provisioning.enrollment.signing_request import RequestRefusedError
from birthmark.provisioning.registry.interface import DuplicateError
from birthmark.provisioning.registry.model import KeyMode, State

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.board_station import Desk

MODES = pytest.mark.parametrize("keys", list(KeyMode))


@MODES
def test_a_blank_board_is_enrolled(desk: Desk, keys: KeyMode) -> None:
    board = Board()
    seen: list[object] = []
    row = desk.enrol(VirtualLine(board), keys=keys, watch=seen.append)

    assert row.state is State.ATTESTED
    assert (row.name, row.role, row.hwid, row.key_mode) == ("sensor-17", "sensor", board.hwid, keys)
    assert board.active is not None
    assert row.txn == board.active.txn
    bundle = Bundle.from_bytes(board.active.bundle)
    assert bundle.leaf_der == row.certificate_der
    assert hashlib.sha256(board.active.bundle).digest() == row.bundle_sha256
    check_bundle(bundle, board.active.key.public_key())
    assert (bundle.config.host, bundle.config.port, bundle.config.keepalive_s) == (
        "gateway-1.example.com",
        8883,
        60,
    )
    certificate = x509.load_der_x509_certificate(row.certificate_der or b"")
    assert certificate.serial_number == row.cert_serial
    assert desk.authority.signed == [row.cert_serial]
    assert row.bundle is None, "the bundle's bytes are dropped once the device attests"

    states = [effect.row.state for effect in seen if isinstance(effect, Stored)]
    assert states == [state for state in State if state is not State.VOID]
    steps = [effect.step for effect in seen if isinstance(effect, Reached)]
    assert steps == [step for step in Step if step is not Step.UNLOCK]


def test_each_state_is_durable_before_the_next_action(desk: Desk) -> None:
    """What a second process would read from the disk when a request reaches the board."""
    before: dict[int, State] = {}

    class Watched(Board):
        def receive(self, data: bytes) -> bytes:
            answer = super().receive(data)
            rows = desk.rows()
            if rows:
                before.setdefault(self.requests[-1].type, rows[-1].state)
            return answer

    desk.enrol(VirtualLine(Watched()))
    assert before == {
        MessageType.KEYGEN: State.RESERVED,
        MessageType.BEGIN: State.ISSUED,
        MessageType.DATA: State.ISSUED,
        MessageType.PREPARE: State.ISSUED,
        MessageType.COMMIT: State.PREPARED,
        MessageType.ATTEST: State.COMMITTED,
    }


@MODES
def test_it_resumes_from_every_state_and_every_answer(desk: Desk, keys: KeyMode) -> None:
    """The station is gone after each transition and each answer; the next run ends with the same certificate."""
    interesting = [*(s for s in State if s is not State.VOID), *(s for s in Step if s is not Step.UNLOCK)]

    class GoneError(Exception):
        pass

    for number, point in enumerate(interesting):
        board = Board(hwid=number.to_bytes(4, "big"))
        device_id = f"unit-{number}"

        def stop(effect: object, point: object = point) -> None:
            if isinstance(effect, Stored) and effect.row.state is point:
                raise GoneError
            if isinstance(effect, Reached) and effect.step is point:
                raise GoneError

        with pytest.raises(GoneError):
            desk.enrol(VirtualLine(board), device_id, keys=keys, watch=stop)
        before = [row for row in desk.rows() if row.name == device_id]
        if point is State.ATTESTED:
            with pytest.raises(UnitRefusedError) as refused:
                desk.enrol(VirtualLine(board), device_id, keys=keys)
            assert refused.value.action is Action.DUPLICATE
            continue
        after = desk.enrol(VirtualLine(board), device_id, keys=keys)
        assert after.state is State.ATTESTED, point
        rows = [row for row in desk.rows() if row.name == device_id]
        assert [row.number for row in rows] == [after.number], point
        if before and before[0].cert_serial is not None:
            assert after.cert_serial == before[0].cert_serial, point
        assert board.active is not None
        assert Bundle.from_bytes(board.active.bundle).leaf_der == after.certificate_der
    assert len(set(desk.authority.signed)) == len(interesting)


@MODES
def test_a_reboot_of_the_board_at_every_request(desk: Desk, keys: KeyMode) -> None:
    for number, kind in enumerate([t for t in MessageType if t < MessageType.ABORT]):
        board = Board(hwid=number.to_bytes(4, "big"))
        done: list[bool] = []

        def reboot(answer: Any, board: Board = board, done: list[bool] = done) -> Any:
            if done:
                return answer
            done.append(True)
            board.reboot()
            return None

        board.lies[kind] = reboot
        row = desk.enrol(VirtualLine(board), f"unit-{number}", keys=keys)
        assert done
        assert row.state is State.ATTESTED


@pytest.mark.parametrize("how", ["clean", "byte by byte", "loss", "flips", "busy", "log lines"])
def test_bad_lines(desk: Desk, how: str) -> None:
    for number in range(4):
        board = Board(hwid=number.to_bytes(4, "big"))
        line = VirtualLine(board)
        if how == "byte by byte":
            line.byte_by_byte = True
        elif how == "loss":
            line.to_board, line.to_station = Noise(2 * number, loss=1e-3), Noise(2 * number + 1, loss=1e-3)
        elif how == "flips":
            line.to_board, line.to_station = Noise(2 * number, flips=1e-4), Noise(2 * number + 1, flips=1e-4)
        elif how == "busy":
            board.busy = 3
        elif how == "log lines":
            line.to_station = lambda data: b"[I] app: tick\r\n" + data + b"[I] app: tock\r\n"
        for _ in range(4):
            try:
                row = desk.enrol(line, f"unit-{number}")
                break
            except NoAnswerError:
                continue
        assert row.state is State.ATTESTED
    assert len(desk.authority.signed) == 4, "one certificate a unit"


def test_the_cable_falls_out_anywhere(desk: Desk) -> None:
    for number, after_bytes in enumerate(range(20, 2800, 131)):
        board = Board(hwid=number.to_bytes(4, "big"))
        line = VirtualLine(board, unplug_after_bytes=after_bytes)
        try:
            row = desk.enrol(line, f"unit-{number}")
        except UnpluggedError:
            assert board.active is None or board.active.txn in {r.txn for r in desk.rows()}
            row = desk.enrol(VirtualLine(board), f"unit-{number}")
        assert row.state is State.ATTESTED
    assert len(desk.authority.signed) == len(desk.rows())


class TestRefusals:
    """What the table refuses, with nothing sent after HELLO and no row changed."""

    def refused(self, desk: Desk, board: Board, action: Action, device_id: str = "sensor-17") -> None:
        rows, signed = desk.rows(), list(desk.authority.signed)
        board.requests.clear()
        with pytest.raises(UnitRefusedError) as caught:
            desk.enrol(VirtualLine(board), device_id)
        assert caught.value.action is action
        assert caught.value.exit_code == 3
        assert caught.value.hint
        assert {frame.type for frame in board.requests} == {MessageType.HELLO}
        assert (desk.rows(), desk.authority.signed) == (rows, signed)

    def test_a_made_unit_is_a_duplicate(self, desk: Desk) -> None:
        board = Board()
        desk.enrol(VirtualLine(board))
        self.refused(desk, board, Action.DUPLICATE)

    def test_a_made_unit_that_is_revoked_is_not_called_sound(self, desk: Desk) -> None:
        board = Board()
        row = desk.enrol(VirtualLine(board))
        with desk.registry.transaction() as transaction:
            transaction.update(row.changed(revoked_at=datetime.now(UTC), revocation_reason="keyCompromise"))
        with pytest.raises(UnitRefusedError, match="which is revoked") as caught:
            desk.enrol(VirtualLine(board))
        assert caught.value.action is Action.DUPLICATE
        assert "put the device aside" in caught.value.hint
        assert "nothing is wrong" not in caught.value.hint

    def test_a_wiped_unit_is_erased(self, desk: Desk) -> None:
        board = Board()
        desk.enrol(VirtualLine(board))
        self.refused(desk, Board(hwid=board.hwid), Action.ERASED)

    def test_a_foreign_unit_is_quarantined(self, desk: Desk) -> None:
        board = Board()
        desk.enrol(VirtualLine(board))
        board.hwid = b"another hwid"
        self.refused(desk, board, Action.QUARANTINE, "sensor-18")

    def test_another_id_for_the_same_unit_is_a_mismatch(self, desk: Desk) -> None:
        board = Board()
        desk.enrol(VirtualLine(board))
        self.refused(desk, board, Action.MISMATCH, "sensor-18")

    def test_one_id_on_two_units(self, desk: Desk) -> None:
        desk.enrol(VirtualLine(Board()))
        second = Board(hwid=b"second")
        with pytest.raises(DuplicateError) as caught:
            desk.enrol(VirtualLine(second), "SENSOR-17")
        assert caught.value.field == "name"
        assert second.count(MessageType.KEYGEN) == 0
        assert len(desk.rows()) == 1

    def test_one_key_on_two_units(self, desk: Desk) -> None:
        first = Board()
        desk.enrol(VirtualLine(first))
        assert first.active is not None
        stolen, second = first.active.key, Board(hwid=b"second")
        second.lies[MessageType.KEYGEN] = lambda _: m.KeygenAnswer(csr_for(stolen, b"second".hex()))
        with pytest.raises(DuplicateError) as caught:
            desk.enrol(VirtualLine(second), "sensor-18")
        assert caught.value.field == "public_key"
        assert len(desk.authority.signed) == 1
        assert desk.states() == [State.ATTESTED, State.RESERVED]

    def test_the_board_is_swapped_between_two_runs(self, desk: Desk) -> None:
        first, second = Board(), Board(hwid=b"second")
        first.lies[MessageType.COMMIT] = lambda _: None
        with pytest.raises(NoAnswerError):
            desk.enrol(VirtualLine(first))
        with pytest.raises(DuplicateError):
            desk.enrol(VirtualLine(second))
        assert second.keys_made == 0
        first.lies.clear()
        assert desk.enrol(VirtualLine(first)).state is State.ATTESTED


class TestKeyModes:
    @pytest.mark.parametrize(
        ("offered", "asked"),
        [(m.KeyMode.ON_DEVICE, KeyMode.STATION), (m.KeyMode.STATION, KeyMode.ON_DEVICE)],
    )
    def test_a_mode_not_offered_is_refused_before_reserving(
        self, desk: Desk, offered: m.KeyMode, asked: KeyMode
    ) -> None:
        board = Board(key_modes=offered)
        with pytest.raises(EnrollmentRefusedError, match="does not offer"):
            desk.enrol(VirtualLine(board), keys=asked)
        assert desk.rows() == []
        other = KeyMode.ON_DEVICE if asked is KeyMode.STATION else KeyMode.STATION
        assert desk.enrol(VirtualLine(board), keys=other).state is State.ATTESTED

    def test_no_private_key_over_a_network_port(self, desk: Desk) -> None:
        board = Board()
        with pytest.raises(EnrollmentRefusedError, match="network"):
            desk.enrol(VirtualLine(board), keys=KeyMode.STATION, is_local=False)
        assert desk.rows() == []
        assert board.count(MessageType.KEYGEN) == 0
        assert desk.enrol(VirtualLine(board), is_local=False).state is State.ATTESTED

    def test_the_scalar_is_in_one_frame_and_nowhere_else(self, desk: Desk) -> None:
        board, line = Board(), VirtualLine()
        line.board = board
        seen: list[object] = []
        desk.enrol(line, keys=KeyMode.STATION, watch=seen.append)
        assert board.active is not None
        scalar = board.active.key.private_numbers().private_value.to_bytes(32, "big")
        carrying = [f for f in board.requests if scalar in f.payload]
        assert {frame.type for frame in carrying} == {MessageType.KEYGEN}
        text = repr(seen) + repr(desk.rows()) + desk.registry.audit_path.read_text()
        for path in desk.registry.audit_path.parent.rglob("*"):
            text += path.read_bytes().hex() if path.is_file() else ""
        for form in (scalar.hex(), repr(scalar), str(int.from_bytes(scalar, "big"))):
            assert form not in text

    def test_a_device_that_keeps_its_own_key_in_station_mode(self, desk: Desk) -> None:
        board = Board()
        own = ec.generate_private_key(ec.SECP256R1())
        board.lies[MessageType.KEYGEN] = lambda _: m.KeygenAnswer(csr_for(own, board.hwid.hex()))
        with pytest.raises(ProofError, match="another key"):
            desk.enrol(VirtualLine(board), keys=KeyMode.STATION)
        assert desk.states() == [State.RESERVED]
        assert desk.authority.signed == []

    @MODES
    def test_changing_the_mode_before_the_key_is_known(self, desk: Desk, keys: KeyMode) -> None:
        """The key of the first run, whoever made it, is not certified by the second."""
        board = Board()
        keygen_answers = iter([None] * 8)
        board.lies[MessageType.KEYGEN] = lambda _: next(keygen_answers)
        with pytest.raises(NoAnswerError):
            desk.enrol(VirtualLine(board), keys=keys)
        assert board.pending is not None
        first_key = board.pending.key
        board.lies.clear()
        other = KeyMode.ON_DEVICE if keys is KeyMode.STATION else KeyMode.STATION
        row = desk.enrol(VirtualLine(board), keys=other)
        assert row.key_mode is other
        assert board.active is not None
        assert board.active.key != first_key
        assert desk.states() == [State.VOID, State.ATTESTED]

    @MODES
    @pytest.mark.parametrize("state", [State.KEYED, State.ISSUED, State.PREPARED])
    def test_a_lost_key_voids_the_row_and_starts_again(self, desk: Desk, keys: KeyMode, state: State) -> None:
        offered = m.KeyMode.STATION if keys is KeyMode.STATION else m.KeyMode.BOTH
        board = Board(key_modes=offered)
        stop_after(desk, board, state, keys=keys)
        first = desk.rows()[0]
        board = Board(hwid=board.hwid, key_modes=offered)
        row = desk.enrol(VirtualLine(board), keys=keys)
        void, made = desk.rows()
        assert (void.state, made.state) == (State.VOID, State.ATTESTED)
        assert void.is_revoked, "it may have been signed just before"
        assert row.cert_serial != first.cert_serial
        assert row.txn != first.txn


def stop_after(desk: Desk, board: Board, state: State, **how: Any) -> None:
    class GoneError(Exception):
        pass

    def stop(effect: object) -> None:
        if isinstance(effect, Stored) and effect.row.state is state:
            raise GoneError

    with pytest.raises(GoneError):
        desk.enrol(VirtualLine(board), watch=stop, **how)


def other_key_csr(hwid: bytes, how: str) -> bytes:
    good = ec.generate_private_key(ec.SECP256R1())
    match how:
        case "rsa":
            return csr_for(rsa.generate_private_key(65537, 2048), hwid.hex())[:512]
        case "small rsa":
            return csr_for(rsa.generate_private_key(65537, 1024), hwid.hex())  # noqa: S505 - it must fit
        case "p384":
            return csr_for(ec.generate_private_key(ec.SECP384R1()), hwid.hex())
        case "sha384":
            return csr_for(good, hwid.hex(), hashes.SHA384())
        case "broken signature":
            csr = bytearray(csr_for(good, hwid.hex()))
            csr[-1] ^= 1
            return bytes(csr)
        case "other name":
            return csr_for(good, "sensor-17")
        case "upper case":
            return csr_for(good, hwid.hex().upper())
        case "trailing":
            return csr_for(good, hwid.hex()) + b"\0"
        case "garbage":
            return secrets.token_bytes(200)
        case _:
            return b"\x30"


@pytest.mark.parametrize(
    "how",
    [
        "rsa",
        "small rsa",
        "p384",
        "sha384",
        "broken signature",
        "other name",
        "upper case",
        "trailing",
        "garbage",
        "x",
    ],
)
def test_bad_requests_are_refused_in_reserved(desk: Desk, how: str) -> None:
    board = Board()
    board.lies[MessageType.KEYGEN] = lambda _: m.KeygenAnswer(other_key_csr(board.hwid, how))
    with pytest.raises(RequestRefusedError):
        desk.enrol(VirtualLine(board))
    assert desk.states() == [State.RESERVED]
    assert desk.authority.signed == []
    board.lies.clear()
    assert desk.enrol(VirtualLine(board)).state is State.ATTESTED


@pytest.mark.parametrize("second", [x509.NameOID.COMMON_NAME, x509.NameOID.ORGANIZATION_NAME])
def test_a_request_with_two_names_is_refused(desk: Desk, second: x509.ObjectIdentifier) -> None:
    board = Board()
    names = [x509.NameAttribute(oid, board.hwid.hex()) for oid in (x509.NameOID.COMMON_NAME, second)]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
    der = builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).public_bytes(Encoding.DER)
    board.lies[MessageType.KEYGEN] = lambda _: m.KeygenAnswer(der)
    with pytest.raises(RequestRefusedError, match="subject"):
        desk.enrol(VirtualLine(board))
    assert desk.authority.signed == []


def raw(kind: MessageType, payload: bytes) -> Callable[[Board], Callable[[Any], Any]]:
    """A lie of bytes that are no message, under the right numbers."""

    def for_board(board: Board) -> Callable[[Any], Any]:
        return lambda _: Frame(kind | FROM_DEVICE, board.requests[-1].seq, board.requests[-1].sid, payload)

    return for_board


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xa0",
        b"\xff",
        b"\x81" * 1000,
        bytes.fromhex("a1015affffffff"),
        bytes.fromhex("a10143010203") + b"\0",
        bytes.fromhex("bf0141ff"),
        cbor.encode({1: b"x" * 513}),
        cbor.encode({1: b"x", 2: 1}),
        cbor.encode({1: "text"}),
    ],
    ids=[
        "empty",
        "no key",
        "break",
        "nested",
        "huge",
        "trailing",
        "indefinite",
        "oversize",
        "unknown key",
        "type",
    ],
)
def test_malformed_payloads_are_refused_at_once(desk: Desk, payload: bytes) -> None:
    board = Board()
    board.lies[MessageType.KEYGEN] = raw(MessageType.KEYGEN, payload)(board)
    line = VirtualLine(board)
    begun = line.now_s
    with pytest.raises(MalformedAnswerError):
        desk.enrol(line)
    assert line.now_s - begun < 1
    assert desk.states() == [State.RESERVED]


ANSWERED = [kind for kind in MessageType if kind < MessageType.ABORT]
FURTHEST = {
    MessageType.HELLO: None,
    MessageType.KEYGEN: State.RESERVED,
    MessageType.BEGIN: State.ISSUED,
    MessageType.DATA: State.ISSUED,
    MessageType.PREPARE: State.ISSUED,
    MessageType.COMMIT: State.PREPARED,
    MessageType.ATTEST: State.COMMITTED,
}


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(ANSWERED), payload=st.binary(max_size=200), is_error=st.booleans())
def test_no_made_up_answer_moves_the_journal(
    tmp_path_factory: pytest.TempPathFactory, kind: MessageType, payload: bytes, *, is_error: bool
) -> None:
    desk = open_desk(tmp_path_factory.mktemp("lies") / "station")
    board = Board()

    def lie(_: object) -> Frame:
        request = board.requests[-1]
        return Frame(MessageType.ERR if is_error else kind | FROM_DEVICE, request.seq, request.sid, payload)

    board.lies[kind] = lie
    with pytest.raises(BirthmarkError):
        desk.enrol(VirtualLine(board))
    furthest = FURTHEST[kind]
    assert desk.states() == ([furthest] if furthest else [])


@pytest.mark.parametrize(
    "lie",
    [
        lambda _: lambda answer: replace(answer, nonce=bytes(16)),
        raw(MessageType.HELLO, b"\xa0"),
        lambda _: lambda _: m.OffsetAnswer(0),
    ],
    ids=["other nonce", "no keys", "another message"],
)
def test_a_lying_hello_leaves_nothing(desk: Desk, lie: Any) -> None:
    board = Board()
    board.lies[MessageType.HELLO] = lie(board)
    with pytest.raises(MalformedAnswerError):
        desk.enrol(VirtualLine(board))
    assert desk.rows() == []
    assert board.count(MessageType.KEYGEN) == 0


@pytest.mark.parametrize("changes", [{2: "\x1b[2Jevil"}, {4: 2}, {5: b"T" * 16}, {12: b"s" * 32}, {1: b"x" * 33}])
def test_an_inconsistent_hello_is_refused_and_never_shown_raw(desk: Desk, changes: dict[int, Any]) -> None:
    board = Board()

    def lie(answer: m.HelloAnswer) -> Frame:
        fields = cbor.decode(answer.to_payload())
        assert isinstance(fields, dict)
        request = board.requests[-1]
        return Frame(MessageType.HELLO | FROM_DEVICE, request.seq, request.sid, cbor.encode(fields | changes))

    board.lies[MessageType.HELLO] = lie
    with pytest.raises(MalformedAnswerError) as caught:
        desk.enrol(VirtualLine(board))
    assert "\x1b" not in caught.value.message
    assert desk.rows() == []


class TestBadProofs:
    def slot_lies(self, board: Board, kind: MessageType, how: str) -> None:
        other = ec.generate_private_key(ec.SECP256R1())
        old_nonce = bytes(16)

        def lie(answer: Any) -> Any:
            slot = board.prepared if kind is MessageType.PREPARE else board.active
            assert slot is not None
            match how:
                case "other key":
                    genuine, slot.key = slot.key, other
                    sent = board._honest(m.decode_request(kind, board.requests[-1].payload))
                    slot.key = genuine
                    return sent
                case "old nonce":
                    request = (
                        m.PrepareRequest(slot.txn, old_nonce)
                        if kind is MessageType.PREPARE
                        else m.AttestRequest(old_nonce)
                    )
                    return board._honest(request)
                case "other leaf":
                    return replace(answer, leaf_sha256=bytes(32))
                case "other bundle":
                    return replace(answer, bundle_sha256=bytes(32))
                case "other txn":
                    return replace(answer, txn=bytes(16))
                case _:
                    return replace(answer, signature=b"\x30" + bytes(40))

        board.lies[kind] = lie

    @pytest.mark.parametrize("how", ["other key", "old nonce", "other leaf", "other bundle", "junk"])
    def test_prepare(self, desk: Desk, how: str) -> None:
        board = Board()
        self.slot_lies(board, MessageType.PREPARE, how)
        with pytest.raises(ProofError):
            desk.enrol(VirtualLine(board))
        assert desk.states() == [State.ISSUED]
        assert board.count(MessageType.COMMIT) == 0

    @pytest.mark.parametrize("how", ["other key", "old nonce", "other leaf", "other bundle", "other txn", "junk"])
    def test_attest(self, desk: Desk, how: str) -> None:
        board = Board()
        self.slot_lies(board, MessageType.ATTEST, how)
        for _ in range(2):
            with pytest.raises(ProofError):
                desk.enrol(VirtualLine(board))
            assert desk.states() == [State.COMMITTED]

    def test_a_lock_that_was_never_stored(self, desk: Desk) -> None:
        board = Board()
        board.lies[MessageType.ATTEST] = lambda _: m.ErrAnswer(ErrorCode.STATE, MessageType.ATTEST)
        with pytest.raises(DeviceRefusalError):
            desk.enrol(VirtualLine(board))
        assert desk.states() == [State.COMMITTED]
        with pytest.raises(UnitRefusedError) as caught:
            desk.enrol(VirtualLine(Board(hwid=board.hwid)))
        assert caught.value.action is Action.ERASED


@pytest.mark.parametrize("code", [*ErrorCode, 99])
def test_every_error_code_is_a_refusal_with_a_hint(desk: Desk, code: int) -> None:
    board = Board()
    board.lies[MessageType.KEYGEN] = lambda _: m.ErrAnswer(code, MessageType.KEYGEN)
    with pytest.raises(DeviceRefusalError) as caught:
        desk.enrol(VirtualLine(board))
    assert caught.value.code == code
    assert caught.value.hint
    assert desk.states() == [State.RESERVED]


def test_a_row_that_another_station_changed_stops_this_one(desk: Desk) -> None:
    board = Board()

    def meddle(effect: object) -> None:
        if isinstance(effect, Reached) and effect.step is Step.KEYGEN:
            with desk.registry.transaction() as transaction:
                row = transaction.rows()[-1]
                transaction.update(row.changed(state=State.VOID, void_reason="a person decided"))

    with pytest.raises(EnrollmentRefusedError, match="another station"):
        desk.enrol(VirtualLine(board), watch=meddle)
    assert desk.states() == [State.VOID]
    assert desk.authority.signed == []


def test_a_bundle_longer_than_the_device_takes(desk: Desk) -> None:
    board = Board(max_bundle_bytes=2048)
    desk.authority.anchors_der = (bytes(2000),)
    with pytest.raises(EnrollmentRefusedError, match="bundles of 2048 bytes"):
        desk.enrol(VirtualLine(board))
    assert board.count(MessageType.BEGIN) == 0
    assert desk.states() == [State.ISSUED]
