"""Frames on the serial line, and how a receiver finds them (docs/serial-protocol.md section 1).

    00 | COBS( ver u8 | type u8 | seq u16 LE | sid u32 LE | payload | crc u32 LE ) | 00

Rules:

- A run between two zeros that is not COBS, is too short or fails its CRC-32 is *bad*: counted and kept as noise.
- A run of more than 1400 bytes is *oversize*: counted, and dropped up to the next zero without being buffered.
- The receiver holds at most one run and the last 4096 bytes of noise, never raises, and finds the same frames
  however the stream is cut.
- Frames of every version are found; what to do with a foreign version is the caller's to decide.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import Final

from birthmark.device.errors import LocalProtocolError
from birthmark.device.link import cobs

LINK_VERSION: Final = 1
MAX_ENCODED: Final = 1400
"""Longest run between two delimiters, in bytes."""
MAX_PAYLOAD: Final = 1382
"""Longest payload, in bytes: it fits whatever it contains."""
MAX_NOISE: Final = 4096
FROM_DEVICE: Final = 0x80
"""Bit 7 of the type: set in what a device sends."""

_HEAD = struct.Struct("<BBHI")
_CRC = struct.Struct("<I")
_MIN_RAW = _HEAD.size + _CRC.size


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. Its payload is not shown in its repr: that of a KEYGEN may hold a private key.

    Raises:
        LocalProtocolError: a field does not fit the wire.
    """

    type: int
    seq: int
    sid: int
    payload: bytes = field(repr=False)
    version: int = LINK_VERSION

    def __post_init__(self) -> None:
        for name, value, highest in (
            ("type", self.type, 0xFF),
            ("seq", self.seq, 0xFFFF),
            ("sid", self.sid, 0xFFFF_FFFF),
            ("version", self.version, 0xFF),
        ):
            if not 0 <= value <= highest:
                raise LocalProtocolError(f"could not make a frame: {name} {value} is not in 0..{highest}")

    def to_bytes(self) -> bytes:
        """Return the frame as it goes on the line, with both delimiters.

        Raises:
            LocalProtocolError: the payload is longer than a frame may be.
        """
        if len(self.payload) > MAX_PAYLOAD:
            raise LocalProtocolError(
                f"could not send {len(self.payload)} bytes: a payload is at most {MAX_PAYLOAD}"
            )
        body = _HEAD.pack(self.version, self.type, self.seq, self.sid) + self.payload
        return b"\0" + cobs.encode(body + _CRC.pack(zlib.crc32(body))) + b"\0"

    @classmethod
    def from_run(cls, run: bytes) -> Frame:
        """Read the bytes between two delimiters.

        Raises:
            cobs.FramingError: they are no frame.
        """
        raw = cobs.decode(run)
        if len(raw) < _MIN_RAW:
            raise cobs.FramingError(f"could not read a frame: {len(raw)} bytes are too few")
        body = raw[: -_CRC.size]
        if zlib.crc32(body) != _CRC.unpack(raw[-_CRC.size :])[0]:
            raise cobs.FramingError("could not read a frame: the checksum differs")
        version, type_, seq, sid = _HEAD.unpack_from(body)
        return cls(type=type_, seq=seq, sid=sid, payload=body[_HEAD.size :], version=version)


class Deframer:
    """Finds the frames in a stream of bytes.

    Attributes:
        bad: runs so far that were no frame.
        oversize: runs so far that were too long to be one.
        received: bytes so far, delimiters included.
    """

    def __init__(self) -> None:
        self.bad = 0
        self.oversize = 0
        self.received = 0
        self._run = bytearray()
        self._in_oversize = False
        self._noise = bytearray()

    @property
    def noise(self) -> bytes:
        """The last 4096 bytes that were no frame, those of a run still open included."""
        return bytes(self._noise + self._run)[-MAX_NOISE:]

    def forget_noise(self) -> None:
        """Drop the noise so far; a run still open stays, since it may become a frame."""
        self._noise.clear()

    def feed(self, data: bytes) -> list[Frame]:
        """Take what the line brought and return the frames that it completed. Never raises."""
        self.received += len(data)
        frames: list[Frame] = []
        start = 0
        while (end := data.find(0, start)) >= 0:
            self._extend(data[start:end])
            frame = self._close()
            if frame is not None:
                frames.append(frame)
            start = end + 1
        self._extend(data[start:])
        return frames

    def _extend(self, piece: bytes) -> None:
        if not self._in_oversize and len(self._run) + len(piece) > MAX_ENCODED:
            self._in_oversize = True
            self.oversize += 1
            self._keep(self._run)
            self._run.clear()
        if self._in_oversize:
            self._keep(piece)
        else:
            self._run += piece

    def _close(self) -> Frame | None:
        if self._in_oversize:
            self._in_oversize = False
            return None
        if not self._run:
            return None
        run = bytes(self._run)
        self._run.clear()
        try:
            return Frame.from_run(run)
        except cobs.FramingError:
            self.bad += 1
            self._keep(run)
            return None

    def _keep(self, piece: bytes | bytearray) -> None:
        self._noise += piece[-MAX_NOISE:]
        del self._noise[:-MAX_NOISE]
