"""What each request does at the device, in the order of its checks (docs/serial-protocol.md sections 3, 5, 6).

No I/O but the records; the clock and the randomness are passed in. A request that is refused raises `Refusal`
and has changed nothing but what its own rules say (a failed bundle drops the staging, an UNLOCK proof uses up
the nonce).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, assert_never

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from birthmark.device.agent import keys
from birthmark.device.agent.slots import PendingKey, Slot, Slots
from birthmark.device.agent.staging import Staging
from birthmark.device.errors import LocalProtocolError
from birthmark.device.link.bundle import MAX_BUNDLE_BYTES, Bundle, BundleRefusedError, check_bundle
from birthmark.device.link.chain import is_ca
from birthmark.device.link.frame import LINK_VERSION, MAX_ENCODED
from birthmark.device.link.messages import (
    BOOT_ID_BYTES,
    NONCE_BYTES,
    AbortAnswer,
    AbortRequest,
    Answer,
    AttestAnswer,
    AttestRequest,
    BeginRequest,
    CommitAnswer,
    CommitRequest,
    Data,
    DataAnswer,
    DeviceState,
    ErrorCode,
    HelloAnswer,
    HelloRequest,
    KeygenAnswer,
    KeygenRequest,
    KeyMode,
    OffsetAnswer,
    PrepareAnswer,
    PrepareRequest,
    Request,
    UnlockChallengeAnswer,
    UnlockChallengeRequest,
    UnlockProofAnswer,
    UnlockProofRequest,
)
from birthmark.device.link.timers import MAX_CHUNK_BYTES, UNLOCK_NONCE_S
from birthmark.device.link.transcript import Label, sign, transcript, verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.device.agent.keys import PrivateKey


class Refusal(Exception):  # noqa: N818 - an answer of the protocol, not an error of ours
    """The device answers ERR with this code."""

    def __init__(self, code: ErrorCode) -> None:
        super().__init__(code.name)
        self.code = code


@dataclass(frozen=True, slots=True)
class Board:
    """What a HELLO says of the device and no request changes.

    Raises:
        LocalProtocolError: a value that HELLO could not carry.
    """

    hwid: bytes
    model: str
    firmware: str
    key_modes: KeyMode = KeyMode.BOTH
    max_bundle_bytes: int = MAX_BUNDLE_BYTES

    def __post_init__(self) -> None:
        HelloAnswer(
            hwid=self.hwid,
            model=self.model,
            firmware=self.firmware,
            state=DeviceState.BLANK,
            active_txn=b"",
            active_bundle_sha256=b"",
            max_frame_bytes=MAX_ENCODED,
            max_bundle_bytes=self.max_bundle_bytes,
            boot_id=bytes(BOOT_ID_BYTES),
            nonce=bytes(NONCE_BYTES),
            open_txn=b"",
            prepared_bundle_sha256=b"",
            key_modes=self.key_modes,
        )
        if self.max_bundle_bytes > MAX_BUNDLE_BYTES:
            raise LocalProtocolError(f"could not offer bundles of more than {MAX_BUNDLE_BYTES} bytes")


@dataclass(frozen=True, slots=True)
class Step:
    """Something that a request achieved, for whoever watches the device."""

    name: str
    """`key_made`, `prepared`, `enrolled`, `unlocked`, `aborted` or `refused`."""
    txn: bytes | None = None
    device_id: str | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Challenge:
    """An UNLOCK nonce that was given out."""

    nonce: bytes
    sid: int
    new_txn: bytes
    given_at: float


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Everything of the outside world that the device depends on."""

    clock: Callable[[], float]
    """Monotonic seconds."""
    random_bytes: Callable[[int], bytes]
    make_key: Callable[[], PrivateKey] = keys.make_key
    watch: Callable[[Step], None] = field(default=lambda _step: None)


_MODE_NEEDED: Final = {True: KeyMode.STATION, False: KeyMode.ON_DEVICE}


class Enrollment:
    """The device's state machine. Its state is the records, and in RAM the staging and the UNLOCK nonce."""

    def __init__(self, slots: Slots, board: Board, surroundings: Surroundings) -> None:
        self._slots = slots
        self._board = board
        self._outside = surroundings
        self._boot_id = surroundings.random_bytes(BOOT_ID_BYTES)
        self._staging: Staging | None = None
        self._challenge: _Challenge | None = None

    @property
    def state(self) -> DeviceState:
        """What HELLO reports."""
        if self._slots.active() is not None:
            return DeviceState.LOCKED
        return DeviceState.BLANK if self._slots.prepared() is None else DeviceState.PREPARED

    def drop_staging(self) -> None:
        """Forget a transfer under way: nothing sound came for too long."""
        self._staging = None

    def answer(self, request: Request, sid: int) -> Answer:  # noqa: C901 - one arm a request
        """Do what `request` asks, in session `sid`.

        Raises:
            Refusal: the device refuses it.
            StoreError: it could not be stored.
        """
        match request:
            case HelloRequest():
                return self._hello(request)
            case KeygenRequest():
                return self._keygen(request)
            case BeginRequest():
                return self._begin(request)
            case Data():
                return self._data(request)
            case PrepareRequest():
                return self._prepare(request)
            case CommitRequest():
                return self._commit(request)
            case AttestRequest():
                return self._attest(request)
            case AbortRequest():
                return self._abort(request)
            case UnlockChallengeRequest():
                return self._unlock_challenge(request, sid)
            case UnlockProofRequest():
                return self._unlock_proof(request, sid)
        assert_never(request)

    def _hello(self, request: HelloRequest) -> HelloAnswer:
        if not request.lowest <= LINK_VERSION <= request.highest:
            raise Refusal(ErrorCode.VERSION)
        active, prepared = self._slots.active(), self._slots.prepared()
        return HelloAnswer(
            hwid=self._board.hwid,
            model=self._board.model,
            firmware=self._board.firmware,
            state=self.state,
            active_txn=active.txn if active else b"",
            active_bundle_sha256=active.bundle_sha256 if active else b"",
            max_frame_bytes=MAX_ENCODED,
            max_bundle_bytes=self._board.max_bundle_bytes,
            boot_id=self._boot_id,
            nonce=request.nonce,
            open_txn=self._open_txn() or b"",
            prepared_bundle_sha256=prepared.bundle_sha256 if prepared else b"",
            key_modes=self._board.key_modes,
        )

    def _keygen(self, request: KeygenRequest) -> KeygenAnswer:
        self._gate(request.txn)
        pending = self._slots.pending()
        own = pending is not None and pending.txn == request.txn
        mode = _MODE_NEEDED[request.scalar is not None]
        if mode not in self._board.key_modes and not (own and request.scalar is None):
            raise Refusal(ErrorCode.MODE)
        given = keys.key_of_scalar(request.scalar) if request.scalar is not None else None
        if request.scalar is not None and given is None:
            raise Refusal(ErrorCode.KEY)
        if pending is not None:
            pending_key = keys.key_from_der(pending.key_der)
            if own and request.scalar in (None, keys.scalar_of_key(pending_key)):
                return KeygenAnswer(keys.signing_request(pending_key, self._board.hwid.hex()))
            if not request.supersede:
                raise Refusal(ErrorCode.TXN)
        key = given or self._outside.make_key()
        answer = KeygenAnswer(keys.signing_request(key, self._board.hwid.hex()))
        self._slots.store_pending(PendingKey(request.txn, keys.key_to_der(key)))
        self._staging = None
        self._outside.watch(Step("key_made", request.txn))
        return answer

    def _begin(self, request: BeginRequest) -> OffsetAnswer:
        self._gate(request.txn)
        if not 1 <= request.length <= self._board.max_bundle_bytes:
            raise Refusal(ErrorCode.SIZE)
        self._pending_of(request.txn)
        prepared = self._slots.prepared()
        if prepared is not None and prepared.is_of(request.length, request.sha256):
            self._staging = None  # PREPARE is about the prepared slot again
            return OffsetAnswer(request.length)
        if self._staging is None or not self._staging.is_for(request.txn, request.length, request.sha256):
            self._staging = Staging(request.txn, request.length, request.sha256)
        return OffsetAnswer(self._staging.next_offset)

    def _data(self, request: Data) -> DataAnswer:
        if self._staging is None:
            raise Refusal(ErrorCode.STATE)
        if len(request.chunk) > MAX_CHUNK_BYTES or not self._staging.fits(request.offset, request.chunk):
            raise Refusal(ErrorCode.SIZE)
        self._staging.put(request.offset, request.chunk)
        return DataAnswer(self._staging.next_offset, request.offset)

    def _prepare(self, request: PrepareRequest) -> PrepareAnswer:
        self._gate(request.txn)
        pending = self._pending_of(request.txn)
        if self._staging is not None:
            slot = self._check_staging(self._staging, pending)
            self._slots.store_prepared(slot)
            self._staging = None
            self._outside.watch(Step("prepared", slot.txn, str(slot.bundle.config.device_id)))
        else:
            prepared = self._slots.prepared()
            if prepared is None:
                raise Refusal(ErrorCode.STATE)
            slot = prepared
        signature = self._sign(Label.PREPARE, request.nonce, slot)
        return PrepareAnswer(signature, slot.leaf_sha256, slot.bundle_sha256)

    def _check_staging(self, staging: Staging, pending: PendingKey) -> Slot:
        if staging.txn != pending.txn or not staging.is_complete:
            raise Refusal(ErrorCode.STATE)
        self._staging = None  # a bundle that fails is dropped
        if not staging.matches:
            raise Refusal(ErrorCode.SHA)
        try:
            bundle = Bundle.from_bytes(staging.to_bytes())
            check_bundle(bundle, keys.key_from_der(pending.key_der).public_key())
        except BundleRefusedError as error:
            raise Refusal(error.code) from error
        self._staging = staging
        return Slot(pending.txn, pending.key_der, bundle)

    def _commit(self, request: CommitRequest) -> CommitAnswer:
        active = self._slots.active()
        if active is not None and active.txn == request.txn:
            if active.bundle_sha256 != request.bundle_sha256:
                raise Refusal(ErrorCode.SHA)
            self._slots.confirm()
            return CommitAnswer()
        self._gate(request.txn)
        prepared = self._slots.prepared()
        if prepared is None:
            raise Refusal(ErrorCode.STATE)
        if prepared.txn != request.txn:
            raise Refusal(ErrorCode.TXN)
        if prepared.bundle_sha256 != request.bundle_sha256:
            raise Refusal(ErrorCode.SHA)
        self._slots.commit()
        self._staging = None
        self._challenge = None
        self._outside.watch(Step("enrolled", prepared.txn, str(prepared.bundle.config.device_id)))
        return CommitAnswer()

    def _attest(self, request: AttestRequest) -> AttestAnswer:
        active = self._locked()
        signature = self._sign(Label.ATTEST, request.nonce, active)
        return AttestAnswer(signature, active.leaf_sha256, active.txn, active.bundle_sha256)

    def _abort(self, request: AbortRequest) -> AbortAnswer:
        active = self._slots.active()
        if active is not None and active.txn == request.txn:
            raise Refusal(ErrorCode.LOCKED)
        open_txn = self._open_txn()
        if open_txn is not None and open_txn != request.txn:
            raise Refusal(ErrorCode.TXN)
        if open_txn is not None:
            self._slots.drop_open()
            self._outside.watch(Step("aborted", request.txn))
        self._staging = None
        if self._challenge is not None and self._challenge.new_txn == request.txn:
            self._challenge = None
        return AbortAnswer(self.state)

    def _unlock_challenge(self, request: UnlockChallengeRequest, sid: int) -> UnlockChallengeAnswer:
        active = self._locked()
        if request.new_txn == active.txn:
            raise Refusal(ErrorCode.TXN)
        nonce = self._outside.random_bytes(NONCE_BYTES)
        self._challenge = _Challenge(nonce, sid, request.new_txn, self._outside.clock())
        return UnlockChallengeAnswer(nonce, active.txn)

    def _unlock_proof(self, request: UnlockProofRequest, sid: int) -> UnlockProofAnswer:
        challenge, self._challenge = self._challenge, None  # used up, whatever comes of it
        active = self._locked()
        if request.new_txn == active.txn:
            raise Refusal(ErrorCode.TXN)
        if challenge is None or (challenge.sid, challenge.new_txn) != (sid, request.new_txn):
            raise Refusal(ErrorCode.AUTH)
        if self._outside.clock() - challenge.given_at >= UNLOCK_NONCE_S:
            raise Refusal(ErrorCode.AUTH)
        signer = _signer(active.bundle, request.signer_sha256)
        signed = transcript(Label.UNLOCK, challenge.nonce, self._board.hwid, active.txn, request.new_txn)
        if signer is None or not verify(signer, request.signature, signed):
            raise Refusal(ErrorCode.AUTH)
        self._slots.store_unlocked(request.new_txn)
        if self._staging is not None and self._staging.txn != request.new_txn:
            self._staging = None
        self._outside.watch(Step("unlocked", request.new_txn))
        return UnlockProofAnswer(request.new_txn)

    def _gate(self, txn: bytes) -> None:
        if self._slots.active() is not None and txn != self._slots.unlocked_txn():
            raise Refusal(ErrorCode.LOCKED)

    def _locked(self) -> Slot:
        active = self._slots.active()
        if active is None:
            raise Refusal(ErrorCode.STATE)
        return active

    def _pending_of(self, txn: bytes) -> PendingKey:
        pending = self._slots.pending()
        if pending is None:
            raise Refusal(ErrorCode.STATE)
        if pending.txn != txn:
            raise Refusal(ErrorCode.TXN)
        return pending

    def _open_txn(self) -> bytes | None:
        pending = self._slots.pending()
        return self._slots.unlocked_txn() if pending is None else pending.txn

    def _sign(self, label: Label, nonce: bytes, slot: Slot) -> bytes:
        signed = transcript(label, nonce, self._board.hwid, slot.txn, slot.leaf_sha256, slot.bundle_sha256)
        return sign(keys.key_from_der(slot.key_der), signed)


def _signer(bundle: Bundle, sha256: bytes) -> ec.EllipticCurvePublicKey | None:
    """The key of the bundle's CA certificate with this hash, if there is one and it is on P-256."""
    for der in (*bundle.issuing_der, *bundle.anchors_der):
        if hashlib.sha256(der).digest() != sha256:
            continue
        certificate = x509.load_der_x509_certificate(der)  # it parsed at PREPARE
        key = certificate.public_key()
        if is_ca(certificate) and isinstance(key, ec.EllipticCurvePublicKey):
            return key if isinstance(key.curve, ec.SECP256R1) else None
    return None
