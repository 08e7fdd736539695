"""Writing DER (X.690 section 10): values with tag and length, and the dates of X.509. Without any library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from datetime import datetime

INTEGER, BIT_STRING, OCTET_STRING, OBJECT_ID, UTF8_STRING = 0x02, 0x03, 0x04, 0x06, 0x0C
SEQUENCE, SET = 0x30, 0x31
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18
_FIRST_GENERALIZED_YEAR: Final = 2050
"""From here on a date is a GeneralizedTime (RFC 5280 section 4.1.2.5)."""


def head(tag: int, length: int) -> bytes:
    """Return what stands before a value of so many octets: its tag and its length, in the shortest form."""
    if length < 0x80:
        return bytes((tag, length))
    octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(octets))) + octets


def tlv(tag: int, value: bytes) -> bytes:
    """Return a value with its tag and length."""
    return head(tag, len(value)) + value


def integer_octets(value: int) -> bytes:
    """Return the octets of an INTEGER that is not negative."""
    return value.to_bytes(value.bit_length() // 8 + 1, "big")


def time(moment: datetime) -> bytes:
    """Return a date of X.509: `moment` in UTC, to the second."""
    year = moment.year
    rest = (moment.month, moment.day, moment.hour, moment.minute, moment.second)
    if year < _FIRST_GENERALIZED_YEAR:
        return b"%c%c%02d%02d%02d%02d%02d%02dZ" % (_UTC_TIME, 13, year % 100, *rest)
    return b"%c%c%04d%02d%02d%02d%02d%02dZ" % (_GENERALIZED_TIME, 15, year, *rest)


def content(der: bytes) -> bytes:
    """Return what is in a value, without its tag and length."""
    return der[2 if der[1] < 0x80 else 2 + (der[1] & 0x7F) :]
