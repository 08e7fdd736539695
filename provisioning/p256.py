"""A public key on P-256 as its octets (SEC 1 section 2.3.4; RFC 5480), without any library.

A key that is only written into a certificate need not become an object of cryptography's for it, and back: that
takes several times as long as this look at its octets, and thousands of certificates are signed at once.
"""

from __future__ import annotations

from typing import Final

KEY_HEAD: Final = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200")
"""A SubjectPublicKeyInfo (DER) up to its point, which is uncompressed."""
POINT_OCTETS: Final = 65
UNCOMPRESSED: Final = b"\x04"
"""What an uncompressed point begins with, before its two coordinates."""
_COORDINATE_OCTETS: Final = 32
# The curve y^2 = x^3 - 3x + b over the integers modulo p: NIST SP 800-186 section 3.2.1.3.
_P: Final = 2**256 - 2**224 + 2**192 + 2**96 - 1
_B: Final = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B


def point_of(public_key_der: bytes) -> bytes | None:
    """Return the point of a SubjectPublicKeyInfo in its usual form, if it is on the curve; else None.

    None is not a refusal: there are other ways to write a key, which a library reads.
    """
    point = public_key_der[len(KEY_HEAD) :]
    if not public_key_der.startswith(KEY_HEAD) or len(point) != POINT_OCTETS or point[:1] != UNCOMPRESSED:
        return None
    x = int.from_bytes(point[1 : 1 + _COORDINATE_OCTETS], "big")
    y = int.from_bytes(point[1 + _COORDINATE_OCTETS :], "big")
    on_curve = x < _P and y < _P and (y * y - (x * x - 3) * x - _B) % _P == 0
    return point if on_curve else None
