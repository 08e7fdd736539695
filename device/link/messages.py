"""The messages of the link, one frozen dataclass each (docs/serial-protocol.md section 3).

Rules:

- Every message has a closed schema; the one exception is a HELLO answer, whose unknown keys are ignored.
- A message validates on construction, so one that exists can be sent; what arrives is read by `decode_request`
  at the device and by `decode_answer` at the station, which raise `MessageError` and nothing else.
- A private scalar is never part of a repr.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self, TypeAlias

from birthmark.device.errors import LocalProtocolError, RemoteProtocolError
from birthmark.device.link import cbor
from birthmark.device.link.frame import FROM_DEVICE, LINK_VERSION
from birthmark.device.link.schema import Field, SchemaError, bstr, is_true, printable, read_map, uint, write_map

if TYPE_CHECKING:
    from birthmark.device.link.cbor import Value

TXN_BYTES: Final = 16
NONCE_BYTES: Final = 16
SHA256_BYTES: Final = 32
SCALAR_BYTES: Final = 32
BOOT_ID_BYTES: Final = 4
MIN_HWID_BYTES: Final = 4
MAX_HWID_BYTES: Final = 32
MAX_CSR_BYTES: Final = 512
MAX_TEXT_CHARACTERS: Final = 32
_UINT32: Final = 2**32 - 1
_OFFSET_BYTES: Final = 4


class MessageError(RemoteProtocolError):
    """A payload that is no message of its type."""


class MessageType(IntEnum):
    """The type byte of a request; its answer has bit 7 set, or is one of the last three."""

    HELLO = 0x01
    KEYGEN = 0x02
    BEGIN = 0x03
    DATA = 0x04
    PREPARE = 0x05
    COMMIT = 0x06
    ATTEST = 0x07
    ABORT = 0x08
    UNLOCK = 0x09
    BUSY = 0xFD
    NAK = 0xFE
    ERR = 0xFF


class ErrorCode(IntEnum):
    """Why a device refuses a request. A code that is not here is a refusal, too."""

    LOCKED = 1
    TXN = 2
    SHA = 3
    KEY = 4
    STATE = 5
    SIZE = 6
    AUTH = 7
    PROTO = 8
    VERSION = 9
    STORE = 10
    MODE = 11
    BUNDLE = 12


class DeviceState(IntEnum):
    """What a device holds."""

    BLANK = 0
    PREPARED = 1
    LOCKED = 2


class KeyMode(IntFlag):
    """Where a device's key may come from."""

    ON_DEVICE = 1
    STATION = 2
    BOTH = 3


_TXN = bstr(TXN_BYTES)
_NONCE = bstr(NONCE_BYTES)
_SHA256 = bstr(SHA256_BYTES)
_SIGNATURE = bstr(8, 72)
_OFFSET = uint(0, _UINT32)


@dataclass(frozen=True, slots=True)
class _Message:
    """A message whose payload is a map, as `FIELDS` say.

    Raises:
        LocalProtocolError: on construction with a value that may not be sent.
    """

    TYPE: ClassVar[MessageType]
    FIELDS: ClassVar[tuple[Field, ...]] = ()
    IGNORE_UNKNOWN: ClassVar[bool] = False

    def __post_init__(self) -> None:
        try:
            self._to_map()
        except SchemaError as error:
            raise LocalProtocolError(error.message) from None

    def to_payload(self) -> bytes:
        """Return the payload of the frame that carries this message."""
        return cbor.encode(self._to_map())

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Read a payload; raises `MessageError` if it is not this message."""
        try:
            attributes = read_map(
                cbor.decode(payload), cls.FIELDS, what=cls.__name__, ignore_unknown=cls.IGNORE_UNKNOWN
            )
            return cls._from_attributes(attributes)
        except (SchemaError, cbor.CborError, LocalProtocolError) as error:
            raise MessageError(error.message) from None

    @classmethod
    def _from_attributes(cls, attributes: dict[str, Any]) -> Self:
        return cls(**attributes)

    def _attributes(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in self.FIELDS if item.constant is None}

    def _to_map(self) -> dict[int, Value]:
        return write_map(self._attributes(), self.FIELDS, what=type(self).__name__)


def _version_range(value: Value) -> str:
    if not isinstance(value, list) or len(value) != 2:
        return "not a pair"
    if any(uint(1, 0xFF)(item) for item in value) or value[0] > value[1]:  # type: ignore[operator]
        return "no range of versions"
    return ""


@dataclass(frozen=True, slots=True)
class HelloRequest(_Message):
    """Who is there? With the versions that the station speaks."""

    nonce: bytes
    lowest: int = LINK_VERSION
    highest: int = LINK_VERSION

    TYPE = MessageType.HELLO
    FIELDS = (Field(1, "nonce", _NONCE), Field(2, "versions", _version_range))

    @classmethod
    def _from_attributes(cls, attributes: dict[str, Any]) -> Self:
        lowest, highest = attributes["versions"]
        return cls(attributes["nonce"], lowest, highest)

    def _attributes(self) -> dict[str, Any]:
        return {"nonce": self.nonce, "versions": [self.lowest, self.highest]}


@dataclass(frozen=True, slots=True)
class HelloAnswer(_Message):
    """What the device is and holds. Consistent in itself: see `_inconsistency`."""

    hwid: bytes
    model: str
    firmware: str
    state: DeviceState
    active_txn: bytes
    """Empty unless locked; so is the bundle's hash."""
    active_bundle_sha256: bytes
    max_frame_bytes: int
    """The longest encoded frame accepted."""
    max_bundle_bytes: int
    boot_id: bytes
    nonce: bytes
    open_txn: bytes
    """Of an enrollment under way, else empty."""
    prepared_bundle_sha256: bytes
    """Empty where nothing is prepared."""
    key_modes: KeyMode

    TYPE = MessageType.HELLO
    FIELDS = (
        Field(0, "version", uint(LINK_VERSION, LINK_VERSION), constant=LINK_VERSION),
        Field(1, "hwid", bstr(MIN_HWID_BYTES, MAX_HWID_BYTES)),
        Field(2, "model", printable(MAX_TEXT_CHARACTERS)),
        Field(3, "firmware", printable(MAX_TEXT_CHARACTERS)),
        Field(4, "state", uint(DeviceState.BLANK, DeviceState.LOCKED)),
        Field(5, "active_txn", bstr(TXN_BYTES, or_empty=True)),
        Field(6, "active_bundle_sha256", bstr(SHA256_BYTES, or_empty=True)),
        Field(7, "max_frame_bytes", uint(320, 0xFFFF)),
        Field(8, "max_bundle_bytes", uint(2048, 0xFFFF)),
        Field(9, "boot_id", bstr(BOOT_ID_BYTES)),
        Field(10, "nonce", _NONCE),
        Field(11, "open_txn", bstr(TXN_BYTES, or_empty=True)),
        Field(12, "prepared_bundle_sha256", bstr(SHA256_BYTES, or_empty=True)),
        Field(13, "key_modes", uint(KeyMode.ON_DEVICE, KeyMode.BOTH)),
    )
    IGNORE_UNKNOWN = True

    def __post_init__(self) -> None:
        # Not super(): a slotted dataclass is a second class, which the closure of super() does not know.
        _Message.__post_init__(self)
        if cause := self._inconsistency():
            raise LocalProtocolError(f"could not make HelloAnswer: {cause}")

    @classmethod
    def _from_attributes(cls, attributes: dict[str, Any]) -> Self:
        attributes["state"] = DeviceState(attributes["state"])
        attributes["key_modes"] = KeyMode(attributes["key_modes"])
        return cls(**attributes)

    def _attributes(self) -> dict[str, Any]:
        attributes = _Message._attributes(self)
        return attributes | {"state": int(self.state), "key_modes": int(self.key_modes)}

    def _inconsistency(self) -> str:
        locked = self.state is DeviceState.LOCKED
        if locked != bool(self.active_txn) or locked != bool(self.active_bundle_sha256):
            return "locked with no active transaction and bundle, or the reverse"
        if self.prepared_bundle_sha256 and not self.open_txn:
            return "a bundle is prepared, but no transaction is open"
        if not locked and (self.state is DeviceState.PREPARED) != bool(self.prepared_bundle_sha256):
            return "prepared without a bundle, or blank with one"
        return ""


@dataclass(frozen=True, slots=True)
class KeygenRequest(_Message):
    """Make a key, or take this one."""

    txn: bytes
    scalar: bytes | None = field(default=None, repr=False)
    supersede: bool = False

    TYPE = MessageType.KEYGEN
    FIELDS = (
        Field(1, "txn", _TXN),
        Field(2, "scalar", bstr(SCALAR_BYTES), optional=True),
        Field(3, "supersede", is_true, optional=True),
    )


@dataclass(frozen=True, slots=True)
class KeygenAnswer(_Message):
    """The PKCS#10 request for the pending key."""

    csr_der: bytes

    TYPE = MessageType.KEYGEN
    FIELDS = (Field(1, "csr_der", bstr(1, MAX_CSR_BYTES)),)


@dataclass(frozen=True, slots=True)
class BeginRequest(_Message):
    """A bundle of this length and hash follows."""

    txn: bytes
    length: int
    sha256: bytes

    TYPE = MessageType.BEGIN
    FIELDS = (Field(1, "txn", _TXN), Field(2, "length", _OFFSET), Field(3, "sha256", _SHA256))


@dataclass(frozen=True, slots=True)
class OffsetAnswer(_Message):
    """From where to send: the answer to BEGIN."""

    offset: int

    TYPE = MessageType.BEGIN
    FIELDS = (Field(1, "offset", _OFFSET),)


@dataclass(frozen=True, slots=True)
class Data:
    """A piece of the bundle; its payload is raw.

    A device takes chunks of up to `timers.MAX_CHUNK_BYTES`. A longer one is a message all the same, because it
    is refused as SIZE, and only where a transfer is open.
    """

    offset: int
    chunk: bytes = field(repr=False)

    TYPE: ClassVar = MessageType.DATA

    def __post_init__(self) -> None:
        if not self.chunk or not 0 <= self.offset <= _UINT32:
            raise LocalProtocolError("could not make Data: no bytes, or an offset above 2^32 - 1")

    def to_payload(self) -> bytes:
        """Return the payload: the offset as u32 little-endian, and the bytes."""
        return self.offset.to_bytes(_OFFSET_BYTES, "little") + self.chunk

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Read a payload; raises `MessageError` if it is shorter than an offset and one byte."""
        if len(payload) <= _OFFSET_BYTES:
            raise MessageError(f"could not read Data: {len(payload)} bytes are too few")
        return cls(int.from_bytes(payload[:_OFFSET_BYTES], "little"), payload[_OFFSET_BYTES:])


@dataclass(frozen=True, slots=True)
class DataAnswer(_Message):
    """The end of the gapless prefix, and which chunk this answers."""

    next_offset: int
    chunk_offset: int

    TYPE = MessageType.DATA
    FIELDS = (Field(1, "next_offset", _OFFSET), Field(2, "chunk_offset", _OFFSET))


@dataclass(frozen=True, slots=True)
class PrepareRequest(_Message):
    """Check the bundle, store it, and prove the key."""

    txn: bytes
    nonce: bytes

    TYPE = MessageType.PREPARE
    FIELDS = (Field(1, "txn", _TXN), Field(2, "nonce", _NONCE))


@dataclass(frozen=True, slots=True)
class PrepareAnswer(_Message):
    """The pending key's signature over what is prepared."""

    signature: bytes
    leaf_sha256: bytes
    bundle_sha256: bytes

    TYPE = MessageType.PREPARE
    FIELDS = (
        Field(1, "signature", _SIGNATURE),
        Field(2, "leaf_sha256", _SHA256),
        Field(3, "bundle_sha256", _SHA256),
    )


@dataclass(frozen=True, slots=True)
class CommitRequest(_Message):
    """Make the prepared slot the active one."""

    txn: bytes
    bundle_sha256: bytes

    TYPE = MessageType.COMMIT
    FIELDS = (Field(1, "txn", _TXN), Field(2, "bundle_sha256", _SHA256))


@dataclass(frozen=True, slots=True)
class CommitAnswer(_Message):
    """The device is locked."""

    TYPE = MessageType.COMMIT
    FIELDS = (Field(1, "state", uint(DeviceState.LOCKED, DeviceState.LOCKED), constant=int(DeviceState.LOCKED)),)


@dataclass(frozen=True, slots=True)
class AttestRequest(_Message):
    """Prove the active key."""

    nonce: bytes

    TYPE = MessageType.ATTEST
    FIELDS = (Field(1, "nonce", _NONCE),)


@dataclass(frozen=True, slots=True)
class AttestAnswer(_Message):
    """The active key's signature over what is active."""

    signature: bytes
    leaf_sha256: bytes
    txn: bytes
    bundle_sha256: bytes

    TYPE = MessageType.ATTEST
    FIELDS = (
        Field(1, "signature", _SIGNATURE),
        Field(2, "leaf_sha256", _SHA256),
        Field(3, "txn", _TXN),
        Field(4, "bundle_sha256", _SHA256),
    )


@dataclass(frozen=True, slots=True)
class AbortRequest(_Message):
    """Drop what is open."""

    txn: bytes

    TYPE = MessageType.ABORT
    FIELDS = (Field(1, "txn", _TXN),)


@dataclass(frozen=True, slots=True)
class AbortAnswer(_Message):
    """The state afterwards."""

    state: DeviceState

    TYPE = MessageType.ABORT
    FIELDS = (Field(1, "state", uint(DeviceState.BLANK, DeviceState.LOCKED)),)

    @classmethod
    def _from_attributes(cls, attributes: dict[str, Any]) -> Self:
        return cls(DeviceState(attributes["state"]))

    def _attributes(self) -> dict[str, Any]:
        return {"state": int(self.state)}


@dataclass(frozen=True, slots=True)
class UnlockChallengeRequest(_Message):
    """UNLOCK, phase 1: ask a locked device for a nonce."""

    new_txn: bytes

    TYPE = MessageType.UNLOCK
    FIELDS = (Field(1, "phase", uint(1, 1), constant=1), Field(2, "new_txn", _TXN))


@dataclass(frozen=True, slots=True)
class UnlockChallengeAnswer(_Message):
    """UNLOCK, phase 1: the nonce, and the transaction to be replaced."""

    nonce: bytes
    old_txn: bytes

    TYPE = MessageType.UNLOCK
    FIELDS = (Field(1, "nonce", _NONCE), Field(2, "old_txn", _TXN))


@dataclass(frozen=True, slots=True)
class UnlockProofRequest(_Message):
    """UNLOCK, phase 2: a CA's signature over the nonce."""

    new_txn: bytes
    signer_sha256: bytes
    """Of the signer's certificate."""
    signature: bytes

    TYPE = MessageType.UNLOCK
    FIELDS = (
        Field(1, "phase", uint(2, 2), constant=2),
        Field(2, "new_txn", _TXN),
        Field(3, "signer_sha256", _SHA256),
        Field(4, "signature", _SIGNATURE),
    )


@dataclass(frozen=True, slots=True)
class UnlockProofAnswer(_Message):
    """UNLOCK, phase 2: the new transaction may be enrolled."""

    new_txn: bytes

    TYPE = MessageType.UNLOCK
    FIELDS = (Field(1, "new_txn", _TXN),)


@dataclass(frozen=True, slots=True)
class ErrAnswer(_Message):
    """A refusal. Codes outside `ErrorCode` are allowed: a later device may have more."""

    code: int
    request_type: int

    TYPE = MessageType.ERR
    FIELDS = (Field(0, "code", uint(1, 0xFF)), Field(1, "request_type", uint(0, 0xFF)))

    @property
    def name(self) -> str:
        """The code's name, or its number where it has none here."""
        return ErrorCode(self.code).name if self.code in set(ErrorCode) else str(self.code)


@dataclass(frozen=True, slots=True)
class _Empty:
    """A message without a payload."""

    TYPE: ClassVar[MessageType]

    def to_payload(self) -> bytes:
        """Return no bytes."""
        return b""

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Read a payload; raises `MessageError` if there is one."""
        if payload:
            raise MessageError(f"could not read {cls.__name__}: its payload is not empty")
        return cls()


@dataclass(frozen=True, slots=True)
class BusyAnswer(_Empty):
    """The device is working on this request."""

    TYPE = MessageType.BUSY


@dataclass(frozen=True, slots=True)
class NakAnswer(_Empty):
    """The device saw a bad run."""

    TYPE = MessageType.NAK


Request: TypeAlias = (
    HelloRequest
    | KeygenRequest
    | BeginRequest
    | Data
    | PrepareRequest
    | CommitRequest
    | AttestRequest
    | AbortRequest
    | UnlockChallengeRequest
    | UnlockProofRequest
)
Answer: TypeAlias = (
    HelloAnswer
    | KeygenAnswer
    | OffsetAnswer
    | DataAnswer
    | PrepareAnswer
    | CommitAnswer
    | AttestAnswer
    | AbortAnswer
    | UnlockChallengeAnswer
    | UnlockProofAnswer
    | ErrAnswer
    | BusyAnswer
    | NakAnswer
)

_REQUESTS: Final[dict[int, type[Request]]] = {
    kind.TYPE: kind
    for kind in (
        HelloRequest,
        KeygenRequest,
        BeginRequest,
        Data,
        PrepareRequest,
        CommitRequest,
        AttestRequest,
        AbortRequest,
    )
}
_ANSWERS: Final[dict[int, type[Answer]]] = {
    MessageType.ERR: ErrAnswer,
    MessageType.BUSY: BusyAnswer,
    MessageType.NAK: NakAnswer,
} | {
    kind.TYPE | FROM_DEVICE: kind
    for kind in (
        HelloAnswer,
        KeygenAnswer,
        OffsetAnswer,
        DataAnswer,
        PrepareAnswer,
        CommitAnswer,
        AttestAnswer,
        AbortAnswer,
    )
}
_UNLOCK_ANSWER: Final = MessageType.UNLOCK | FROM_DEVICE
_UNLOCK_ANSWERS: Final[dict[int | None, type[UnlockChallengeAnswer | UnlockProofAnswer]]] = {
    1: UnlockChallengeAnswer,
    2: UnlockProofAnswer,
}


def decode_request(type: int, payload: bytes) -> Request:  # noqa: A002 - the wire calls it so
    """Read what a station sent.

    Raises:
        MessageError: an unknown type, or a payload against its schema.
    """
    if type == MessageType.UNLOCK:
        return _decode_unlock(payload)
    if type not in _REQUESTS:
        raise MessageError(f"could not read a request: unknown type {type:#04x}")
    return _REQUESTS[type].from_payload(payload)


def decode_answer(type: int, payload: bytes, *, phase: int | None = None) -> Answer:  # noqa: A002
    """Read what a device sent; `phase` is that of the UNLOCK request that it answers (1 or 2).

    Raises:
        MessageError: an unknown type, an answer to UNLOCK that was not asked for, or a payload against its schema.
    """
    if type == _UNLOCK_ANSWER and phase in _UNLOCK_ANSWERS:
        return _UNLOCK_ANSWERS[phase].from_payload(payload)
    if type not in _ANSWERS:
        raise MessageError(f"could not read an answer: unknown type {type:#04x}")
    return _ANSWERS[type].from_payload(payload)


def _decode_unlock(payload: bytes) -> UnlockChallengeRequest | UnlockProofRequest:
    try:
        value = cbor.decode(payload)
    except cbor.CborError as error:
        raise MessageError(error.message) from None
    if isinstance(value, dict) and value.get(1) == 2:
        return UnlockProofRequest.from_payload(payload)
    return UnlockChallengeRequest.from_payload(payload)
