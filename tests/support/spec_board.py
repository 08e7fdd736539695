"""A board by somebody else: the serial specification read from its text, sharing no code with birthmark.

Blocking, on a pty, on-device and station keys, no storage: what it holds, it holds in memory. It proves that
`birthmark flash` works with any implementation of docs/serial-protocol.md, not only with its own.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import select
import struct
import threading
import tty
import zlib
from dataclasses import dataclass, field
from typing import Any, Self

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from support.patience import PATIENCE_S


def cobs_encode(raw: bytes) -> bytes:
    out = bytearray()
    block = bytearray()
    for position, byte in enumerate(raw):
        if byte:
            block.append(byte)
            if len(block) == 254:
                out += b"\xff" + block
                block.clear()
                if position == len(raw) - 1:
                    return bytes(out)
        else:
            out += bytes([len(block) + 1]) + block
            block.clear()
    return bytes(out + bytes([len(block) + 1]) + block)


def cobs_decode(encoded: bytes) -> bytes:
    out = bytearray()
    position = 0
    while position < len(encoded):
        code = encoded[position]
        block = encoded[position + 1 : position + code]
        if code == 0 or len(block) != code - 1 or 0 in block:
            raise ValueError("not COBS")
        out += block
        position += code
        if code != 255 and position < len(encoded):
            out.append(0)
    return bytes(out)


@dataclass
class SpecBoard:
    """One board on the master side of a pty; `port` is what the station opens."""

    hwid: bytes = field(default_factory=lambda: secrets.token_bytes(8))
    modes: int = 3
    port: str = ""
    state: int = 0
    key: ec.EllipticCurvePrivateKey | None = None
    txn: bytes = b""
    staged: bytearray = field(default_factory=bytearray)
    have: set[int] = field(default_factory=set)
    length: int = 0
    sha256: bytes = b""
    prepared: bytes = b""
    active: bytes = b""
    active_txn: bytes = b""
    log: list[int] = field(default_factory=list)
    boot: bytes = field(default_factory=lambda: secrets.token_bytes(4))

    def __post_init__(self) -> None:
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)  # a fresh pty echoes; its own end stays open, so that no hangup is seen
        self.port = os.ttyname(self._slave)
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._wake_write, b"x")
        self._thread.join(PATIENCE_S)
        for descriptor in (self._master, self._slave, self._wake_read, self._wake_write):
            os.close(descriptor)

    @property
    def leaf(self) -> x509.Certificate:
        return x509.load_der_x509_certificate(cbor2.loads(self.active)[1])

    def _run(self) -> None:
        buffer = b""
        while True:
            ready, _, _ = select.select([self._master, self._wake_read], [], [])
            if self._wake_read in ready:
                return
            *runs, buffer = (buffer + os.read(self._master, 4096)).split(b"\0")
            for run in runs:
                self._frame(run)

    def _frame(self, run: bytes) -> None:
        try:
            raw = cobs_decode(run)
        except ValueError:
            return
        if len(raw) < 12 or zlib.crc32(raw[:-4]) != struct.unpack("<I", raw[-4:])[0]:
            return
        version, kind, seq, sid = struct.unpack_from("<BBHI", raw)
        if version != 1 or kind & 0x80:
            return
        self.log.append(kind)
        answer = self._answer(kind, raw[8:-4])
        if isinstance(answer, int):
            self._send(0xFF, seq, sid, cbor2.dumps({0: answer, 1: kind}))
        else:
            self._send(kind | 0x80, seq, sid, cbor2.dumps(answer))

    def _send(self, kind: int, seq: int, sid: int, payload: bytes) -> None:
        raw = struct.pack("<BBHI", 1, kind, seq, sid) + payload
        os.write(self._master, b"\0" + cobs_encode(raw + struct.pack("<I", zlib.crc32(raw))) + b"\0")

    def _answer(self, kind: int, payload: bytes) -> dict[int, Any] | int:
        if kind == 4:
            return self._data(payload)
        fields: dict[int, Any] = cbor2.loads(payload)
        handler = {
            1: self._hello,
            2: self._keygen,
            3: self._begin,
            5: self._prepare,
            6: self._commit,
            7: self._attest,
        }
        return handler[kind](fields) if kind in handler else 8

    def _hello(self, fields: dict[int, Any]) -> dict[int, Any] | int:
        return {
            0: 1, 1: self.hwid, 2: "other-board", 3: "9.9", 4: self.state,
            5: self.active_txn, 6: hashlib.sha256(self.active).digest() if self.active else b"",
            7: 1400, 8: 16384, 9: self.boot, 10: fields[1],
            11: self.txn if self.state < 2 else b"",
            12: hashlib.sha256(self.prepared).digest() if self.prepared and self.state < 2 else b"",
            13: self.modes,
        }  # fmt: skip

    def _keygen(self, fields: dict[int, Any]) -> dict[int, Any] | int:
        if self.state == 2:
            return 1
        scalar = fields.get(2)
        if self.txn and self.txn != fields[1] and not fields.get(3):
            return 2
        if self.key is None or self.txn != fields[1] or scalar is not None:
            curve = ec.SECP256R1()
            self.key = (
                ec.derive_private_key(int.from_bytes(scalar), curve) if scalar else ec.generate_private_key(curve)
            )
            self.txn, self.prepared, self.state = fields[1], b"", 0
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.hwid.hex())])
        csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(self.key, hashes.SHA256())
        return {1: csr.public_bytes(serialization.Encoding.DER)}

    def _begin(self, fields: dict[int, Any]) -> dict[int, Any] | int:
        if fields[1] != self.txn:
            return 2
        if self.prepared and hashlib.sha256(self.prepared).digest() == fields[3]:
            return {1: len(self.prepared)}
        self.length, self.sha256 = fields[2], fields[3]
        self.staged, self.have = bytearray(self.length), set()
        return {1: 0}

    def _data(self, payload: bytes) -> dict[int, Any] | int:
        (offset,) = struct.unpack_from("<I", payload)
        chunk = payload[4:]
        if offset + len(chunk) > self.length:
            return 6
        self.staged[offset : offset + len(chunk)] = chunk
        self.have.update(range(offset, offset + len(chunk)))
        prefix = next((i for i in range(self.length) if i not in self.have), self.length)
        return {1: prefix, 2: offset}

    def _sign(self, label: bytes, nonce: bytes, txn: bytes, bundle: bytes) -> tuple[bytes, bytes, bytes]:
        assert self.key is not None
        leaf = hashlib.sha256(cbor2.loads(bundle)[1]).digest()
        whole = hashlib.sha256(bundle).digest()
        parts = (label, nonce, self.hwid, txn, leaf, whole)
        message = b"".join(struct.pack(">H", len(part)) + part for part in parts)
        return self.key.sign(message, ec.ECDSA(hashes.SHA256())), leaf, whole

    def _prepare(self, fields: dict[int, Any]) -> dict[int, Any] | int:
        if not self.prepared:
            if len(self.have) != self.length or not self.length:
                return 5
            if hashlib.sha256(self.staged).digest() != self.sha256:
                return 3
            self.prepared, self.state = bytes(self.staged), 1
        signature, leaf, whole = self._sign(b"BIRTHMARK-PREPARE-1", fields[2], self.txn, self.prepared)
        return {1: signature, 2: leaf, 3: whole}

    def _commit(self, fields: dict[int, Any]) -> dict[int, Any] | int:
        if self.state != 2:
            if not self.prepared:
                return 5
            if fields[2] != hashlib.sha256(self.prepared).digest():
                return 3
            self.active, self.active_txn, self.state = self.prepared, self.txn, 2
        return {1: 2}

    def _attest(self, fields: dict[int, Any]) -> dict[int, Any] | int:
        if self.state != 2:
            return 5
        signature, leaf, whole = self._sign(b"BIRTHMARK-ATTEST-1", fields[1], self.active_txn, self.active)
        return {1: signature, 2: leaf, 3: self.active_txn, 4: whole}
