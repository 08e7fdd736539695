"""PEM text (RFC 7468): blocks of a label and DER, without any cryptography library.

Rules:

- What stands outside the blocks is explanatory text and ignored (RFC 7468 §2).
- Inside a block only base64 is allowed: an encapsulated header (`Proc-Type`, an encrypted legacy key) is refused.
- No error ever quotes the text: it may be a private key.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final

from birthmark.device.errors import CredentialError

PRIVATE_KEY: Final = "PRIVATE KEY"
CERTIFICATE: Final = "CERTIFICATE"
CERTIFICATE_REQUEST: Final = "CERTIFICATE REQUEST"
CRL: Final = "X509 CRL"
BUNDLE: Final = "BIRTHMARK BUNDLE"
TRANSACTION: Final = "BIRTHMARK TRANSACTION"

_LABEL = re.compile(rb"[!-,.-~](?:[-\x20]?[!-,.-~])*")  # RFC 7468 §3
_BEGIN = re.compile(rb"-----BEGIN ([^\r\n]*)-----")
_LINE_CHARACTERS = 64


def block(label: str, der: bytes) -> bytes:
    """Return one PEM block, in lines of 64 characters, with a final newline."""
    text = base64.b64encode(der)
    lines = [text[start : start + _LINE_CHARACTERS] for start in range(0, len(text), _LINE_CHARACTERS)]
    name = label.encode("ascii")
    return b"\n".join([b"-----BEGIN %b-----" % name, *lines, b"-----END %b-----" % name, b""])


def read_blocks(text: bytes) -> list[tuple[str, bytes]]:
    """Return every block of `text` as (label, content), in their order; an empty list where there is none.

    Raises:
        CredentialError: a block is not closed, is closed by another label, or holds more than base64.
    """
    only = _only_block(text)
    if only is not None:
        return [only]
    blocks: list[tuple[str, bytes]] = []
    label: bytes | None = None
    end = b""
    content: list[bytes] = []
    for line in text.splitlines():
        stripped = line.strip()
        if label is None:
            begin = _BEGIN.fullmatch(stripped)
            if begin is not None:
                label = _label(begin[1])
                end = b"-----END %b-----" % label
                content = []
        elif stripped == end:
            blocks.append((label.decode("ascii"), _decoded(b"".join(content))))
            label = None
        else:
            content.append(stripped)
    if label is not None:
        raise CredentialError("could not read PEM text: a block is not closed", hint="is the file cut short?")
    return blocks


def _only_block(text: bytes) -> tuple[str, bytes] | None:
    """Return the block of a text that is one and as most are written; None if it has to be read line by line."""
    parts = text.split(b"-----")
    if len(parts) != 5 or parts[0] or parts[4] not in (b"\n", b""):
        return None
    _, begin, content, end, _ = parts
    label = begin.removeprefix(b"BEGIN ")
    if begin == label or end != b"END " + label or not _LABEL.fullmatch(label):
        return None
    if not content.startswith(b"\n") or not content.endswith(b"\n"):
        return None
    try:
        return label.decode("ascii"), binascii.a2b_base64(content.replace(b"\n", b""), strict_mode=True)
    except binascii.Error:
        return None


def _label(found: bytes) -> bytes:
    if not _LABEL.fullmatch(found):
        raise CredentialError("could not read PEM text: a block has no proper label")
    return found


def _decoded(content: bytes) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error:
        # Without the cause: the error may quote what it could not decode.
        raise CredentialError("could not read PEM text: a block holds more than base64") from None
