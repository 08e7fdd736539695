"""A scripted board: the device's side of the link, honest by default, lying where a test wants it to.

    board = Board(hwid=b"\\x01\\x02\\x03\\x04")
    board.lies[MessageType.PREPARE] = lambda answer: replace(answer, leaf_sha256=bytes(32))

It keeps its own small state instead of the device's agent, because it has to be able to break every rule.
Everything is in memory: `reboot` forgets what a reboot forgets.
"""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from birthmark.device.link import messages as m
from birthmark.device.link.bundle import Bundle
from birthmark.device.link.frame import FROM_DEVICE, Deframer, Frame
from birthmark.device.link.messages import DeviceState, ErrorCode, MessageType
from birthmark.device.link.transcript import Label, sign, transcript

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class Slot:
    txn: bytes
    key: ec.EllipticCurvePrivateKey
    bundle: bytes = b""

    @property
    def bundle_sha256(self) -> bytes:
        return hashlib.sha256(self.bundle).digest()

    @property
    def leaf_sha256(self) -> bytes:
        return hashlib.sha256(Bundle.from_bytes(self.bundle).leaf_der).digest()


class BoardRefusalError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def csr_for(key: Any, name: str, algorithm: Any = None) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return bytes(builder.sign(key, algorithm or hashes.SHA256()).public_bytes(Encoding.DER))


def _same_key(one: ec.EllipticCurvePrivateKey, other: ec.EllipticCurvePrivateKey) -> bool:
    return one.public_key() == other.public_key()


@dataclass
class Board:
    hwid: bytes = bytes.fromhex("a1b2c3d4e5f60718293a4b5c")
    key_modes: m.KeyMode = m.KeyMode.BOTH
    max_frame_bytes: int = 1400
    max_bundle_bytes: int = 16384
    pending: Slot | None = None
    prepared: Slot | None = None
    active: Slot | None = None
    unlocked: bytes = b""
    staging: bytearray | None = None
    staged: set[int] = field(default_factory=set)
    staging_of: tuple[bytes, int, bytes] = (b"", 0, b"")
    lies: dict[MessageType, Callable[[Any], Any]] = field(default_factory=dict)
    """Turns an honest answer into what is sent: another message, raw bytes for the line, or None for silence."""
    busy: int = 0
    """How many BUSY frames precede each answer."""
    requests: list[Frame] = field(default_factory=list)
    keys_made: int = 0
    boots: int = 1

    def __post_init__(self) -> None:
        self._deframer = Deframer()
        self._cache: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    def reboot(self) -> None:
        self.boots += 1
        self.staging = None
        self._deframer = Deframer()
        self._cache.clear()

    def receive(self, data: bytes) -> bytes:
        bad = self._deframer.bad
        out = b""
        for frame in self._deframer.feed(data):
            if not frame.type & FROM_DEVICE:
                self.requests.append(frame)
                out += self._answered(frame)
        if self._deframer.bad > bad:
            out += Frame(MessageType.NAK, 0, 0, b"").to_bytes()
        return out

    def count(self, kind: MessageType) -> int:
        """How many different requests of this kind arrived."""
        return len({frame.seq for frame in self.requests if frame.type == kind})

    def _answered(self, frame: Frame) -> bytes:
        known = self._cache.get((frame.sid, frame.seq))
        if known is not None:
            return known
        kind = MessageType(frame.type)
        try:
            answer = self._honest(m.decode_request(frame.type, frame.payload))
        except BoardRefusalError as refusal:
            answer = m.ErrAnswer(refusal.code, kind)
        if kind in self.lies:
            answer = self.lies[kind](answer)
        busy = Frame(MessageType.BUSY, frame.seq, frame.sid, b"").to_bytes() * self.busy
        if answer is None:
            return busy
        sent = answer if isinstance(answer, bytes) else self._framed(answer, frame)
        if kind is not MessageType.DATA:
            self._cache[frame.sid, frame.seq] = sent
            while len(self._cache) > 8:
                self._cache.popitem(last=False)
        return busy + sent

    def _framed(self, answer: Any, request: Frame) -> bytes:
        if isinstance(answer, Frame):
            return answer.to_bytes()
        kind = MessageType.ERR if isinstance(answer, m.ErrAnswer) else request.type | FROM_DEVICE
        return Frame(kind, request.seq, request.sid, answer.to_payload()).to_bytes()

    def _honest(self, request: m.Request) -> Any:
        match request:
            case m.HelloRequest():
                return self._hello(request)
            case m.KeygenRequest():
                return self._keygen(request)
            case m.BeginRequest():
                return self._begin(request)
            case m.Data():
                return self._data(request)
            case m.PrepareRequest():
                return self._prepare(request)
            case m.CommitRequest():
                return self._commit(request)
            case m.AttestRequest():
                return self._attest(request)
        raise BoardRefusalError(ErrorCode.PROTO)

    def _hello(self, request: m.HelloRequest) -> m.HelloAnswer:
        locked = self.active is not None
        state = DeviceState.LOCKED if locked else DeviceState.PREPARED if self.prepared else DeviceState.BLANK
        return m.HelloAnswer(
            hwid=self.hwid,
            model="gw100",
            firmware="1.0.0",
            state=state,
            active_txn=self.active.txn if self.active else b"",
            active_bundle_sha256=self.active.bundle_sha256 if self.active else b"",
            max_frame_bytes=self.max_frame_bytes,
            max_bundle_bytes=self.max_bundle_bytes,
            boot_id=self.boots.to_bytes(4, "big"),
            nonce=request.nonce,
            open_txn=self.pending.txn if self.pending else b"",
            prepared_bundle_sha256=self.prepared.bundle_sha256 if self.prepared else b"",
            key_modes=self.key_modes,
        )

    def _gate(self, txn: bytes) -> None:
        if self.active is not None and txn != self.unlocked:
            raise BoardRefusalError(ErrorCode.LOCKED)

    def _keygen(self, request: m.KeygenRequest) -> m.KeygenAnswer:
        self._gate(request.txn)
        pending = self.pending
        same = pending is not None and pending.txn == request.txn
        wanted = m.KeyMode.STATION if request.scalar else m.KeyMode.ON_DEVICE
        if not (same and request.scalar is None) and not self.key_modes & wanted:
            raise BoardRefusalError(ErrorCode.MODE)
        given = None
        if request.scalar is not None:
            given = ec.derive_private_key(int.from_bytes(request.scalar, "big"), ec.SECP256R1())
        if not (same and pending is not None and (given is None or _same_key(given, pending.key))):
            if pending is not None and not request.supersede:
                raise BoardRefusalError(ErrorCode.TXN)
            self.keys_made += 1
            pending = Slot(request.txn, given or ec.generate_private_key(ec.SECP256R1()))
            self.pending, self.prepared, self.staging = pending, None, None
        assert pending is not None
        return m.KeygenAnswer(csr_for(pending.key, self.hwid.hex()))

    def _begin(self, request: m.BeginRequest) -> m.OffsetAnswer:
        self._gate(request.txn)
        if not 0 < request.length <= self.max_bundle_bytes:
            raise BoardRefusalError(ErrorCode.SIZE)
        self._check_pending(request.txn)
        if self.prepared and self.prepared.bundle_sha256 == request.sha256:
            return m.OffsetAnswer(request.length)
        this = (request.txn, request.length, request.sha256)
        if self.staging is None or self.staging_of != this:
            self.staging, self.staged, self.staging_of = bytearray(request.length), set(), this
        return m.OffsetAnswer(self._prefix())

    def _check_pending(self, txn: bytes) -> Slot:
        if self.pending is None:
            raise BoardRefusalError(ErrorCode.STATE)
        if self.pending.txn != txn:
            raise BoardRefusalError(ErrorCode.TXN)
        return self.pending

    def _prefix(self) -> int:
        assert self.staging is not None
        missing = set(range(len(self.staging))) - self.staged
        return min(missing) if missing else len(self.staging)

    def _data(self, request: m.Data) -> m.DataAnswer:
        if self.staging is None:
            raise BoardRefusalError(ErrorCode.STATE)
        end = request.offset + len(request.chunk)
        if end > len(self.staging):
            raise BoardRefusalError(ErrorCode.SIZE)
        self.staging[request.offset : end] = request.chunk
        self.staged |= set(range(request.offset, end))
        return m.DataAnswer(self._prefix(), request.offset)

    def _prepare(self, request: m.PrepareRequest) -> m.PrepareAnswer:
        self._gate(request.txn)
        pending = self._check_pending(request.txn)
        if self.staging is not None:
            if self._prefix() != len(self.staging):
                raise BoardRefusalError(ErrorCode.STATE)
            bundle = bytes(self.staging)
            if hashlib.sha256(bundle).digest() != self.staging_of[2]:
                raise BoardRefusalError(ErrorCode.SHA)
            self.prepared, self.staging = Slot(pending.txn, pending.key, bundle), None
        if self.prepared is None:
            raise BoardRefusalError(ErrorCode.STATE)
        return m.PrepareAnswer(
            self._proof(Label.PREPARE, request.nonce, self.prepared),
            self.prepared.leaf_sha256,
            self.prepared.bundle_sha256,
        )

    def _commit(self, request: m.CommitRequest) -> m.CommitAnswer:
        if self.active is None or self.active.txn != request.txn:
            self._gate(request.txn)
            if self.prepared is None:
                raise BoardRefusalError(ErrorCode.STATE)
            self.active, self.prepared, self.pending = self.prepared, None, None
        return m.CommitAnswer()

    def _attest(self, request: m.AttestRequest) -> m.AttestAnswer:
        if self.active is None:
            raise BoardRefusalError(ErrorCode.STATE)
        return m.AttestAnswer(
            self._proof(Label.ATTEST, request.nonce, self.active),
            self.active.leaf_sha256,
            self.active.txn,
            self.active.bundle_sha256,
        )

    def _proof(self, label: Label, nonce: bytes, slot: Slot) -> bytes:
        parts = (nonce, self.hwid, slot.txn, slot.leaf_sha256, slot.bundle_sha256)
        return sign(slot.key, transcript(label, *parts))


class Noise:
    """What a bad line does to bytes, by a seeded source."""

    def __init__(self, seed: int, *, loss: float = 0.0, flips: float = 0.0) -> None:
        self._random = random.Random(seed)
        self._loss = loss
        self._flips = flips

    def __call__(self, data: bytes) -> bytes:
        out = bytearray()
        for byte in data:
            if self._random.random() < self._loss:
                continue
            value = byte
            for bit in range(8):
                if self._random.random() < self._flips:
                    value ^= 1 << bit
            out.append(value)
        return bytes(out)
