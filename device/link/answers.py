"""What a device answers (docs/serial-protocol.md section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from birthmark.device.errors import LocalProtocolError
from birthmark.device.link.frame import LINK_VERSION
from birthmark.device.link.message_base import (
    EmptyMessage,
    Message,
    is_nonce,
    is_offset,
    is_sha256,
    is_signature,
    is_txn,
)
from birthmark.device.link.schema import Field, bstr, printable, uint
from birthmark.device.link.vocabulary import (
    BOOT_ID_BYTES,
    MAX_CSR_BYTES,
    MAX_HWID_BYTES,
    MAX_TEXT_CHARACTERS,
    MIN_HWID_BYTES,
    SHA256_BYTES,
    TXN_BYTES,
    DeviceState,
    ErrorCode,
    KeyMode,
    MessageType,
)


@dataclass(frozen=True, slots=True)
class HelloAnswer(Message):
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
        Field(10, "nonce", is_nonce),
        Field(11, "open_txn", bstr(TXN_BYTES, or_empty=True)),
        Field(12, "prepared_bundle_sha256", bstr(SHA256_BYTES, or_empty=True)),
        Field(13, "key_modes", uint(KeyMode.ON_DEVICE, KeyMode.BOTH)),
    )
    IGNORE_UNKNOWN = True

    def __post_init__(self) -> None:
        # Not super(): a slotted dataclass is a second class, which the closure of super() does not know.
        Message.__post_init__(self)
        if cause := self._inconsistency():
            raise LocalProtocolError(f"could not make HelloAnswer: {cause}")

    @classmethod
    def _from_attributes(cls, attributes: dict[str, Any]) -> Self:
        attributes["state"] = DeviceState(attributes["state"])
        attributes["key_modes"] = KeyMode(attributes["key_modes"])
        return cls(**attributes)

    def _attributes(self) -> dict[str, Any]:
        attributes = Message._attributes(self)
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
class KeygenAnswer(Message):
    """The PKCS#10 request for the pending key."""

    csr_der: bytes

    TYPE = MessageType.KEYGEN
    FIELDS = (Field(1, "csr_der", bstr(1, MAX_CSR_BYTES)),)


@dataclass(frozen=True, slots=True)
class OffsetAnswer(Message):
    """From where to send: the answer to BEGIN."""

    offset: int

    TYPE = MessageType.BEGIN
    FIELDS = (Field(1, "offset", is_offset),)


@dataclass(frozen=True, slots=True)
class DataAnswer(Message):
    """The end of the gapless prefix, and which chunk this answers."""

    next_offset: int
    chunk_offset: int

    TYPE = MessageType.DATA
    FIELDS = (Field(1, "next_offset", is_offset), Field(2, "chunk_offset", is_offset))


@dataclass(frozen=True, slots=True)
class PrepareAnswer(Message):
    """The pending key's signature over what is prepared."""

    signature: bytes
    leaf_sha256: bytes
    bundle_sha256: bytes

    TYPE = MessageType.PREPARE
    FIELDS = (
        Field(1, "signature", is_signature),
        Field(2, "leaf_sha256", is_sha256),
        Field(3, "bundle_sha256", is_sha256),
    )


@dataclass(frozen=True, slots=True)
class CommitAnswer(Message):
    """The device is locked."""

    TYPE = MessageType.COMMIT
    FIELDS = (Field(1, "state", uint(DeviceState.LOCKED, DeviceState.LOCKED), constant=int(DeviceState.LOCKED)),)


@dataclass(frozen=True, slots=True)
class AttestAnswer(Message):
    """The active key's signature over what is active."""

    signature: bytes
    leaf_sha256: bytes
    txn: bytes
    bundle_sha256: bytes

    TYPE = MessageType.ATTEST
    FIELDS = (
        Field(1, "signature", is_signature),
        Field(2, "leaf_sha256", is_sha256),
        Field(3, "txn", is_txn),
        Field(4, "bundle_sha256", is_sha256),
    )


@dataclass(frozen=True, slots=True)
class AbortAnswer(Message):
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
class UnlockChallengeAnswer(Message):
    """UNLOCK, phase 1: the nonce, and the transaction to be replaced."""

    nonce: bytes
    old_txn: bytes

    TYPE = MessageType.UNLOCK
    FIELDS = (Field(1, "nonce", is_nonce), Field(2, "old_txn", is_txn))


@dataclass(frozen=True, slots=True)
class UnlockProofAnswer(Message):
    """UNLOCK, phase 2: the new transaction may be enrolled."""

    new_txn: bytes

    TYPE = MessageType.UNLOCK
    FIELDS = (Field(1, "new_txn", is_txn),)


@dataclass(frozen=True, slots=True)
class ErrAnswer(Message):
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
class BusyAnswer(EmptyMessage):
    """The device is working on this request."""

    TYPE = MessageType.BUSY


@dataclass(frozen=True, slots=True)
class NakAnswer(EmptyMessage):
    """The device saw a bad run."""

    TYPE = MessageType.NAK
