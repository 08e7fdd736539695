"""What all messages of the link have in common: a closed schema, checked on construction and on reading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from birthmark.device.errors import LocalProtocolError, RemoteProtocolError
from birthmark.device.link import cbor
from birthmark.device.link.schema import Field, SchemaError, bstr, read_map, uint, write_map
from birthmark.device.link.vocabulary import NONCE_BYTES, SHA256_BYTES, TXN_BYTES

if TYPE_CHECKING:
    from birthmark.device.link.cbor import Value
    from birthmark.device.link.vocabulary import MessageType

MAX_UINT32: Final = 2**32 - 1

is_txn = bstr(TXN_BYTES)
is_nonce = bstr(NONCE_BYTES)
is_sha256 = bstr(SHA256_BYTES)
is_signature = bstr(8, 72)
is_offset = uint(0, MAX_UINT32)


class MessageError(RemoteProtocolError):
    """A payload that is no message of its type."""


@dataclass(frozen=True, slots=True)
class Message:
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


@dataclass(frozen=True, slots=True)
class EmptyMessage:
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
