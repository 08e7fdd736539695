"""The messages of the link, one frozen dataclass each, and how they are read (docs/serial-protocol.md section 3).

Rules:

- Every message has a closed schema; the one exception is a HELLO answer, whose unknown keys are ignored.
- A message validates on construction, so one that exists can be sent; what arrives is read by `decode_request`
  at the device and by `decode_answer` at the station, which raise `MessageError` and nothing else.
- A private scalar is never part of a repr.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from birthmark.device.link import cbor
from birthmark.device.link.answers import (
    AbortAnswer,
    AttestAnswer,
    BusyAnswer,
    CommitAnswer,
    DataAnswer,
    ErrAnswer,
    HelloAnswer,
    KeygenAnswer,
    NakAnswer,
    OffsetAnswer,
    PrepareAnswer,
    UnlockChallengeAnswer,
    UnlockProofAnswer,
)
from birthmark.device.link.frame import FROM_DEVICE
from birthmark.device.link.message_base import MessageError
from birthmark.device.link.requests import (
    AbortRequest,
    AttestRequest,
    BeginRequest,
    CommitRequest,
    Data,
    HelloRequest,
    KeygenRequest,
    PrepareRequest,
    UnlockChallengeRequest,
    UnlockProofRequest,
)
from birthmark.device.link.vocabulary import (
    BOOT_ID_BYTES,
    MAX_CSR_BYTES,
    MAX_HWID_BYTES,
    MAX_TEXT_CHARACTERS,
    MIN_HWID_BYTES,
    NONCE_BYTES,
    SCALAR_BYTES,
    SHA256_BYTES,
    TXN_BYTES,
    DeviceState,
    ErrorCode,
    KeyMode,
    MessageType,
)

__all__ = [
    "decode_request",
    "decode_answer",
    "Request",
    "Answer",
    "MessageError",
    "HelloRequest",
    "KeygenRequest",
    "BeginRequest",
    "Data",
    "PrepareRequest",
    "CommitRequest",
    "AttestRequest",
    "AbortRequest",
    "UnlockChallengeRequest",
    "UnlockProofRequest",
    "HelloAnswer",
    "KeygenAnswer",
    "OffsetAnswer",
    "DataAnswer",
    "PrepareAnswer",
    "CommitAnswer",
    "AttestAnswer",
    "AbortAnswer",
    "UnlockChallengeAnswer",
    "UnlockProofAnswer",
    "ErrAnswer",
    "BusyAnswer",
    "NakAnswer",
    "BOOT_ID_BYTES",
    "MAX_CSR_BYTES",
    "MAX_HWID_BYTES",
    "MAX_TEXT_CHARACTERS",
    "MIN_HWID_BYTES",
    "NONCE_BYTES",
    "SCALAR_BYTES",
    "SHA256_BYTES",
    "TXN_BYTES",
    "DeviceState",
    "ErrorCode",
    "KeyMode",
    "MessageType",
]

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
