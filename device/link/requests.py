"""What a station asks (docs/serial-protocol.md section 3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from birthmark.device.errors import LocalProtocolError
from birthmark.device.link.frame import LINK_VERSION
from birthmark.device.link.message_base import (
    MAX_UINT32,
    Message,
    MessageError,
    is_nonce,
    is_offset,
    is_sha256,
    is_signature,
    is_txn,
)
from birthmark.device.link.schema import Field, bstr, is_true, uint
from birthmark.device.link.vocabulary import SCALAR_BYTES, MessageType

if TYPE_CHECKING:
    from birthmark.device.link.cbor import Value

_OFFSET_BYTES: Final = 4


def _version_range(value: Value) -> str:
    if not isinstance(value, list) or len(value) != 2:
        return "not a pair"
    if any(uint(1, 0xFF)(item) for item in value) or value[0] > value[1]:  # type: ignore[operator]
        return "no range of versions"
    return ""


@dataclass(frozen=True, slots=True)
class HelloRequest(Message):
    """Who is there? With the versions that the station speaks."""

    nonce: bytes
    lowest: int = LINK_VERSION
    highest: int = LINK_VERSION

    TYPE = MessageType.HELLO
    FIELDS = (Field(1, "nonce", is_nonce), Field(2, "versions", _version_range))

    @classmethod
    def _from_attributes(cls, attributes: dict[str, Any]) -> Self:
        lowest, highest = attributes["versions"]
        return cls(attributes["nonce"], lowest, highest)

    def _attributes(self) -> dict[str, Any]:
        return {"nonce": self.nonce, "versions": [self.lowest, self.highest]}


@dataclass(frozen=True, slots=True)
class KeygenRequest(Message):
    """Make a key, or take this one."""

    txn: bytes
    scalar: bytes | None = field(default=None, repr=False)
    supersede: bool = False

    TYPE = MessageType.KEYGEN
    FIELDS = (
        Field(1, "txn", is_txn),
        Field(2, "scalar", bstr(SCALAR_BYTES), optional=True),
        Field(3, "supersede", is_true, optional=True),
    )


@dataclass(frozen=True, slots=True)
class BeginRequest(Message):
    """A bundle of this length and hash follows."""

    txn: bytes
    length: int
    sha256: bytes

    TYPE = MessageType.BEGIN
    FIELDS = (Field(1, "txn", is_txn), Field(2, "length", is_offset), Field(3, "sha256", is_sha256))


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
        if not self.chunk or not 0 <= self.offset <= MAX_UINT32:
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
class PrepareRequest(Message):
    """Check the bundle, store it, and prove the key."""

    txn: bytes
    nonce: bytes

    TYPE = MessageType.PREPARE
    FIELDS = (Field(1, "txn", is_txn), Field(2, "nonce", is_nonce))


@dataclass(frozen=True, slots=True)
class CommitRequest(Message):
    """Make the prepared slot the active one."""

    txn: bytes
    bundle_sha256: bytes

    TYPE = MessageType.COMMIT
    FIELDS = (Field(1, "txn", is_txn), Field(2, "bundle_sha256", is_sha256))


@dataclass(frozen=True, slots=True)
class AttestRequest(Message):
    """Prove the active key."""

    nonce: bytes

    TYPE = MessageType.ATTEST
    FIELDS = (Field(1, "nonce", is_nonce),)


@dataclass(frozen=True, slots=True)
class AbortRequest(Message):
    """Drop what is open."""

    txn: bytes

    TYPE = MessageType.ABORT
    FIELDS = (Field(1, "txn", is_txn),)


@dataclass(frozen=True, slots=True)
class UnlockChallengeRequest(Message):
    """UNLOCK, phase 1: ask a locked device for a nonce."""

    new_txn: bytes

    TYPE = MessageType.UNLOCK
    FIELDS = (Field(1, "phase", uint(1, 1), constant=1), Field(2, "new_txn", is_txn))


@dataclass(frozen=True, slots=True)
class UnlockProofRequest(Message):
    """UNLOCK, phase 2: a CA's signature over the nonce."""

    new_txn: bytes
    signer_sha256: bytes
    """Of the signer's certificate."""
    signature: bytes

    TYPE = MessageType.UNLOCK
    FIELDS = (
        Field(1, "phase", uint(2, 2), constant=2),
        Field(2, "new_txn", is_txn),
        Field(3, "signer_sha256", is_sha256),
        Field(4, "signature", is_signature),
    )
