"""What a client must know of a certificate to use it and to explain a refusal: names, validity, serial number.

X.509 as in RFC 5280 §4.1, DER as in X.690 §8 and §10, read with the standard library alone: loading `cryptography`
takes a small board longer than the TLS handshake does. Nothing is verified here, OpenSSL does that; what is said
here goes into messages, and into the client id, which the broker checks against the certificate by itself.

Rules: only definite lengths; every length is checked against what is there; any bytes in, `CredentialError` out.
"""

from __future__ import annotations

from datetime import UTC, datetime

from birthmark.device.errors import CredentialError
from birthmark.device.frozen import Frozen

_SEQUENCE, _SET, _INTEGER, _OID = 0x30, 0x31, 0x02, 0x06
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18
_VERSION = 0xA0
_COMMON_NAME = bytes.fromhex("550403")
_ORGANIZATIONAL_UNIT = bytes.fromhex("55040b")
_TEXT_CODECS = {0x0C: "utf-8", 0x13: "ascii", 0x14: "latin-1", 0x16: "ascii", 0x1E: "utf-16-be"}


class CertificateFacts(Frozen):
    """The fields of one certificate, unverified."""

    cert_serial: int
    common_names: tuple[str, ...]
    organizational_units: tuple[str, ...]
    not_before: datetime
    not_after: datetime

    def out_of_time_at(self, moment: datetime) -> str:
        """Say how `moment` lies outside the validity: `expired`, `not yet valid`, or nothing."""
        if moment < self.not_before:
            return "not yet valid"
        return "expired" if moment > self.not_after else ""


def certificate_facts(certificate_der: bytes) -> CertificateFacts:
    """Read a certificate.

    Raises:
        CredentialError: the bytes are no certificate.
    """
    try:
        return _certificate(certificate_der)
    except (ValueError, OverflowError) as error:
        raise CredentialError(f"could not read a certificate: {error}") from error


def _certificate(certificate_der: bytes) -> CertificateFacts:
    certificate = _Reader(certificate_der).child(_SEQUENCE)
    fields = certificate.child(_SEQUENCE)
    if fields.next_tag() == _VERSION:
        fields.take(_VERSION)
    cert_serial = int.from_bytes(fields.take(_INTEGER), "big", signed=True)
    fields.take(_SEQUENCE)  # signature algorithm
    fields.take(_SEQUENCE)  # issuer
    validity = fields.child(_SEQUENCE)
    not_before, not_after = _time(validity), _time(validity)
    names: dict[bytes, list[str]] = {_COMMON_NAME: [], _ORGANIZATIONAL_UNIT: []}
    subject = fields.child(_SEQUENCE)
    while not subject.at_end:
        relative = subject.child(_SET)
        while not relative.at_end:
            attribute = relative.child(_SEQUENCE)
            kind = attribute.take(_OID)
            tag = attribute.next_tag()
            value = attribute.take(tag)
            if kind in names:
                names[kind].append(_text(tag, value))
    return CertificateFacts(
        cert_serial=cert_serial,
        common_names=tuple(names[_COMMON_NAME]),
        organizational_units=tuple(names[_ORGANIZATIONAL_UNIT]),
        not_before=not_before,
        not_after=not_after,
    )


def _text(tag: int, value: bytes) -> str:
    codec = _TEXT_CODECS.get(tag)
    if codec is None:
        raise ValueError(f"a name of the unknown type {tag:#04x}")
    return value.decode(codec)


def _time(reader: _Reader) -> datetime:
    tag = reader.next_tag()
    if tag not in (_UTC_TIME, _GENERALIZED_TIME):
        raise ValueError("a validity that is no time")
    text = reader.take(tag).decode("ascii")
    # RFC 5280 §4.1.2.5: both forms end in seconds and Z; two-digit years are 1950 to 2049.
    digits = text.removesuffix("Z")
    if digits == text or not digits.isdecimal() or len(digits) != (12 if tag == _UTC_TIME else 14):
        raise ValueError("a time outside RFC 5280's form")
    if tag == _UTC_TIME:
        digits = ("20" if int(digits[:2]) < 50 else "19") + digits
    month, day, hour, minute, second = (int(digits[at : at + 2]) for at in range(4, 14, 2))
    return datetime(int(digits[:4]), month, day, hour, minute, second, tzinfo=UTC)


class _Reader:
    """A cursor over the elements of one DER value."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def at_end(self) -> bool:
        return self._position >= len(self._data)

    def next_tag(self) -> int:
        if self.at_end:
            raise ValueError("it ends too soon")
        return self._data[self._position]

    def child(self, tag: int) -> _Reader:
        return _Reader(self.take(tag))

    def take(self, tag: int) -> bytes:
        if self.next_tag() != tag:
            raise ValueError(f"{self.next_tag():#04x} where {tag:#04x} belongs")
        start, length = self._length(self._position + 1)
        if start + length > len(self._data):
            raise ValueError("it ends too soon")
        self._position = start + length
        return self._data[start : start + length]

    def _length(self, position: int) -> tuple[int, int]:
        if position >= len(self._data):
            raise ValueError("it ends too soon")
        first = self._data[position]
        if first < 0x80:
            return position + 1, first
        count = first & 0x7F
        if not 1 <= count <= 4 or position + 1 + count > len(self._data):
            raise ValueError("a length that does not fit")
        return position + 1 + count, int.from_bytes(self._data[position + 1 : position + 1 + count], "big")
