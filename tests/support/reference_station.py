"""A second implementation of the link, as a simple blocking station, from the text of the specification alone.

It shares no code with `birthmark.device.link`: frames, CBOR (by cbor2), transcripts and certificates are written
again here, plainly, so that the device is held against the text and not against itself. Not a good station: no
journal, no windows, no verdicts.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import secrets
import select
import struct
import time
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HELLO, KEYGEN, BEGIN, DATA, PREPARE, COMMIT, ATTEST, ABORT, UNLOCK = range(1, 10)
BUSY, NAK, ERR = 0xFD, 0xFE, 0xFF
LOCKED, TXN, SHA, KEY, STATE, SIZE, AUTH, PROTO, VERSION, STORE, MODE, BUNDLE = range(1, 13)

NOW = dt.datetime(2026, 11, 1, tzinfo=dt.UTC)
ISSUED_AT = int(NOW.timestamp())


# ---------------------------------------------------------------- frames


def stuff(raw: bytes) -> bytes:
    """COBS, the plain way: one byte after the other."""
    out, block = bytearray(), bytearray()
    for position, byte in enumerate(raw):
        if byte:
            block.append(byte)
        if not byte:
            out += bytes([len(block) + 1]) + block
            block.clear()
        elif len(block) == 254:
            out += b"\xff" + block
            block.clear()
            if position == len(raw) - 1:
                return bytes(out)
    return bytes(out + bytes([len(block) + 1]) + block)


def unstuff(run: bytes) -> bytes | None:
    """The reverse; None if it is no COBS."""
    out, rest = bytearray(), run
    while rest:
        code = rest[0]
        if code == 0 or code > len(rest) or 0 in rest[:code]:
            return None
        out += rest[1:code]
        rest = rest[code:]
        if code < 255 and rest:
            out.append(0)
    return bytes(out)


def frame(type_: int, seq: int, sid: int, payload: bytes, version: int = 1) -> bytes:
    """One frame with its delimiters."""
    body = struct.pack("<BBHI", version, type_, seq, sid) + payload
    return b"\0" + stuff(body + struct.pack("<I", zlib.crc32(body))) + b"\0"


def unframe(run: bytes) -> tuple[int, int, int, bytes] | None:
    """Type, seq, sid and payload of a version-1 frame."""
    raw = unstuff(run)
    if raw is None or len(raw) < 12 or zlib.crc32(raw[:-4]) != struct.unpack("<I", raw[-4:])[0]:
        return None
    version, type_, seq, sid = struct.unpack("<BBHI", raw[:8])
    return (type_, seq, sid, raw[8:-4]) if version == 1 else None


def answers_in(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Every frame in a piece of the stream that ends at a delimiter."""
    return [found for run in data.split(b"\0") if run and (found := unframe(run))]


def transcript(label: bytes, *parts: bytes) -> bytes:
    """Section 6."""
    return b"".join(struct.pack(">H", len(part)) + part for part in (label, *parts))


def sha256(data: bytes) -> bytes:
    """SHA-256."""
    return hashlib.sha256(data).digest()


# ---------------------------------------------------------------- a CA


class ReferenceCa:
    """A root and an issuing CA, and the bundles they make."""

    def __init__(self, name: str = "Reference") -> None:
        self.root_key, self.issuing_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        root, issuing = f"{name} Root", f"{name} Issuing"
        self.root_der = certificate(self.root_key.public_key(), root, self.root_key, root, is_ca=True)
        self.issuing_der = certificate(self.issuing_key.public_key(), issuing, self.root_key, root, is_ca=True)
        self.issuing_name = issuing

    def leaf(self, public_key: Any, cn: str, **options: Any) -> bytes:
        """A device certificate."""
        return certificate(public_key, cn, self.issuing_key, self.issuing_name, is_ca=False, **options)

    def bundle(self, public_key: Any, cn: str, **changes: Any) -> bytes:
        """A bundle; `changes` replace: leaf, issuing, anchors, host, port, id, role, keepalive, time."""
        config = {
            1: changes.get("host", "broker.example.net"),
            2: changes.get("port", 8883),
            3: changes.get("id", cn),
            4: changes.get("role", "sensor"),
        }
        if "keepalive" in changes:
            config[5] = changes["keepalive"]
        value = {
            1: changes["leaf"] if "leaf" in changes else self.leaf(public_key, cn),
            2: changes.get("issuing", [self.issuing_der]),
            3: changes.get("anchors", [self.root_der]),
            4: config,
            5: changes.get("time", ISSUED_AT),
        }
        return cbor2.dumps(value, canonical=True)


def certificate(
    public_key: Any,
    cn: str | list[str],
    issuer_key: ec.EllipticCurvePrivateKey,
    issuer_cn: str,
    *,
    is_ca: bool,
    days: tuple[int, int] = (-1, 365),
) -> bytes:
    """A certificate with the extensions that the link looks at."""
    names = [cn] if isinstance(cn, str) else cn
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer_cn)]))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + dt.timedelta(days=days[0]))
        .not_valid_after(NOW + dt.timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=not is_ca, key_cert_sign=is_ca, crl_sign=is_ca, **usage), critical=True
        )
        .sign(issuer_key, hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )


# ---------------------------------------------------------------- a line


class Line(Protocol):
    """A way to the device."""

    def send(self, data: bytes) -> None:
        """Write it all."""

    def receive(self, timeout_s: float) -> bytes:
        """What has come, at the latest after `timeout_s`; empty if nothing has."""


class FdLine:
    """A tty, a pty or a socket."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def send(self, data: bytes) -> None:
        """Write it all."""
        while data:
            select.select([], [self.fd], [])
            data = data[os.write(self.fd, data) :]

    def receive(self, timeout_s: float) -> bytes:
        """What has come."""
        ready, _, _ = select.select([self.fd], [], [], timeout_s)
        return os.read(self.fd, 4096) if ready else b""


class DirectLine:
    """A device in the same thread: a function that turns bytes into what it sends."""

    def __init__(self, receive: Callable[[bytes], Iterator[bytes]]) -> None:
        self._device = receive
        self._waiting = bytearray()

    def send(self, data: bytes) -> None:
        """Let the device answer."""
        for answer in self._device(data):
            self._waiting += answer

    def receive(self, timeout_s: float) -> bytes:  # noqa: ARG002 - it has answered already
        """What it sent since."""
        came = bytes(self._waiting)
        self._waiting.clear()
        return came


# ---------------------------------------------------------------- the station


class RefusedError(Exception):
    """The device answered ERR."""

    def __init__(self, code: int, request: int) -> None:
        super().__init__(f"error {code} to request {request}")
        self.code = code


class NoAnswerError(Exception):
    """The device did not answer."""


@dataclass
class ReferenceStation:
    """One opened port.

    Attributes:
        seen: the type of every frame that came for the last request, in order.
        answered: called after each request that was answered.
    """

    line: Line
    sid: int = field(default_factory=lambda: secrets.randbits(32))
    seq: int = 0
    limit_s: float = 10.0
    first_wait_s: float = 0.4
    seen: list[int] = field(default_factory=list)
    answered: Callable[[], None] = lambda: None
    _stream: bytearray = field(default_factory=bytearray)

    def ask(self, type_: int, fields: Any) -> Any:
        """Send a request, repeat it until it is answered, and return the answer's decoded payload."""
        self.seq = self.seq % 0xFFFF + 1
        payload = fields if isinstance(fields, bytes) else cbor2.dumps(fields, canonical=True)
        request = frame(type_, self.seq, self.sid, payload)
        self.seen = []
        ends = time.monotonic() + self.limit_s
        wait_s = self.first_wait_s
        while time.monotonic() < ends:
            self.line.send(request)
            waits_until = time.monotonic() + wait_s
            while (answer := self._next(type_, waits_until)) is not None:
                if answer == BUSY:
                    waits_until = time.monotonic() + 3
                    continue
                self.answered()
                return answer
            wait_s = min(wait_s * 1.5, 2.0)
        raise NoAnswerError(f"request {type_}")

    def _next(self, type_: int, until: float) -> Any:
        while True:
            while b"\0" in self._stream:
                end = self._stream.index(0)
                run = bytes(self._stream[:end])
                del self._stream[: end + 1]
                found = unframe(run) if run else None
                if found is None:
                    continue
                self.seen.append(found[0])
                if found[0] == NAK or found[1:3] != (self.seq, self.sid):
                    continue
                if found[0] == BUSY:
                    return BUSY
                if found[0] == ERR:
                    error = cbor2.loads(found[3])
                    assert error[1] == type_
                    raise RefusedError(error[0], type_)
                if found[0] == type_ | 0x80:
                    return cbor2.loads(found[3])
            left_s = until - time.monotonic()
            came = self.line.receive(max(left_s, 0))
            if not came:
                return None
            self._stream += came

    def hello(self) -> dict[int, Any]:
        """HELLO, its consistency checked."""
        nonce = secrets.token_bytes(16)
        answer: dict[int, Any] = self.ask(HELLO, {1: nonce, 2: [1, 1]})
        assert answer[0] == 1
        assert answer[10] == nonce
        assert (answer[4] == 2) == bool(answer[5]) == bool(answer[6])
        assert answer[11] or not answer[12]
        assert (answer[4] != 1) or answer[12]
        assert (answer[4] != 0) or not answer[12]
        return answer

    def keygen(
        self, txn: bytes, scalar: bytes | None = None, *, supersede: bool = False
    ) -> x509.CertificateSigningRequest:
        """KEYGEN, its request verified."""
        fields: dict[int, Any] = {1: txn}
        if scalar is not None:
            fields[2] = scalar
        if supersede:
            fields[3] = True
        answer = self.ask(KEYGEN, fields)
        request = x509.load_der_x509_csr(answer[1])
        assert request.is_signature_valid
        assert len(request.extensions) == 0
        return request

    def begin(self, txn: bytes, bundle: bytes) -> int:
        """BEGIN."""
        offset: int = self.ask(BEGIN, {1: txn, 2: len(bundle), 3: sha256(bundle)})[1]
        return offset

    def data(self, offset: int, chunk: bytes) -> dict[int, int]:
        """DATA."""
        answer: dict[int, int] = self.ask(DATA, struct.pack("<I", offset) + chunk)
        assert answer[2] == offset
        return answer

    def transfer(self, txn: bytes, bundle: bytes, chunk: int = 256) -> None:
        """BEGIN and as many DATA as it takes."""
        offset = self.begin(txn, bundle)
        while offset < len(bundle):
            offset = self.data(offset, bundle[offset : offset + chunk])[1]
        assert offset == len(bundle)

    def prepare(self, txn: bytes, hwid: bytes, bundle: bytes) -> None:
        """PREPARE, its signature verified."""
        nonce = secrets.token_bytes(16)
        answer = self.ask(PREPARE, {1: txn, 2: nonce})
        leaf_der = cbor2.loads(bundle)[1]
        assert answer[2] == sha256(leaf_der)
        assert answer[3] == sha256(bundle)
        check_signature(
            leaf_der, answer[1], transcript(b"BIRTHMARK-PREPARE-1", nonce, hwid, txn, answer[2], answer[3])
        )

    def commit(self, txn: bytes, bundle: bytes) -> None:
        """COMMIT."""
        assert self.ask(COMMIT, {1: txn, 2: sha256(bundle)}) == {1: 2}

    def attest(self, txn: bytes, hwid: bytes, bundle: bytes) -> None:
        """ATTEST, its signature verified."""
        nonce = secrets.token_bytes(16)
        answer = self.ask(ATTEST, {1: nonce})
        leaf_der = cbor2.loads(bundle)[1]
        assert (answer[2], answer[3], answer[4]) == (sha256(leaf_der), txn, sha256(bundle))
        check_signature(
            leaf_der, answer[1], transcript(b"BIRTHMARK-ATTEST-1", nonce, hwid, txn, answer[2], answer[4])
        )

    def abort(self, txn: bytes) -> int:
        """ABORT."""
        state: int = self.ask(ABORT, {1: txn})[1]
        return state

    def unlock(self, ca: ReferenceCa, hwid: bytes, new_txn: bytes) -> None:
        """UNLOCK, both phases, signed by the issuing CA."""
        challenge = self.ask(UNLOCK, {1: 1, 2: new_txn})
        signed = transcript(b"BIRTHMARK-UNLOCK-1", challenge[1], hwid, challenge[2], new_txn)
        proof = {
            1: 2,
            2: new_txn,
            3: sha256(ca.issuing_der),
            4: ca.issuing_key.sign(signed, ec.ECDSA(hashes.SHA256())),
        }
        assert self.ask(UNLOCK, proof) == {1: new_txn}


@dataclass
class ReferenceEnrollment:
    """One unit's enrollment, as a station would keep it in its journal: run it again after any crash."""

    ca: ReferenceCa
    device_id: str
    txn: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    scalar: bytes | None = None
    """For the key mode `station`."""
    public_key: Any = None
    bundle: bytes = b""
    certificates_signed: int = 0
    hwid: bytes = b""

    def run(self, station: ReferenceStation, after: Callable[[str], None] = lambda _step: None) -> None:
        """Go on from where the device is, to a verified ATTEST; `after` is told each step that was answered."""
        hello = station.hello()
        self.hwid = hello[1]
        after("hello")
        if hello[4] == 2 and hello[5] == self.txn:
            assert hello[6] == sha256(self.bundle)
        else:
            self._enrol(station, after)
        station.attest(self.txn, self.hwid, self.bundle)
        after("attest")

    def _enrol(self, station: ReferenceStation, after: Callable[[str], None]) -> None:
        scalar = self.scalar if self.public_key is None else None
        request = station.keygen(self.txn, scalar)
        assert request.subject.rfc4514_string() == f"CN={self.hwid.hex()}"
        after("keygen")
        if self.public_key is None:
            self.public_key = request.public_key()
            if self.scalar is not None:
                given = ec.derive_private_key(int.from_bytes(self.scalar, "big"), ec.SECP256R1())
                assert self.public_key == given.public_key()
            self.bundle = self.ca.bundle(self.public_key, self.device_id)
            self.certificates_signed += 1
        assert request.public_key() == self.public_key
        station.transfer(self.txn, self.bundle)
        after("transfer")
        station.prepare(self.txn, self.hwid, self.bundle)
        after("prepare")
        station.commit(self.txn, self.bundle)
        after("commit")


def check_signature(leaf_der: bytes, signature: bytes, signed: bytes) -> None:
    """Raise unless the leaf's key made the signature."""
    key = x509.load_der_x509_certificate(leaf_der).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(signature, signed, ec.ECDSA(hashes.SHA256()))
