"""The words of the link: message types, error codes, device states, key modes, and the sizes of what is sent.

(docs/serial-protocol.md section 3)
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

TXN_BYTES: Final = 16
NONCE_BYTES: Final = 16
SHA256_BYTES: Final = 32
SCALAR_BYTES: Final = 32
BOOT_ID_BYTES: Final = 4
MIN_HWID_BYTES: Final = 4
MAX_HWID_BYTES: Final = 32
MAX_CSR_BYTES: Final = 512
MAX_TEXT_CHARACTERS: Final = 32


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
