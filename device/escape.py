r"""Untrusted text made fit for a terminal or a log.

Whatever a device, a client or a peer's certificate says passes through here before it is shown: control
characters, escape sequences, direction marks and everything else outside printable ASCII become `\xNN`,
`\uNNNN` or `\UNNNNNNNN`.
"""

from __future__ import annotations

import re

_UNFIT = re.compile(r"[^ -\[\]-~]")
"""Whatever is not printable ASCII, and the backslash."""


def escaped(text: str | bytes, limit: int = 256) -> str:
    """Return `text` in printable ASCII, at most `limit` input characters of it, `...` marking a cut.

    A backslash is doubled, so that the result is unambiguous.
    """
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    cut = len(text) > limit
    shown = _UNFIT.sub(_shown, text[:limit])
    return shown + "..." if cut else shown


def quoted(text: str | bytes, limit: int = 256) -> str:
    """Return `text` as `escaped` does, between single quotes; a quote within is escaped, too. A cut shows behind.

    This, and not the `repr` of what is escaped already, which would double its backslashes.
    """
    within = escaped(text[:limit], limit).replace("'", "\\'")
    return f"'{within}'..." if len(text) > limit else f"'{within}'"


def _shown(unfit: re.Match[str]) -> str:
    code = ord(unfit[0])
    if code == 0x5C:
        return "\\\\"
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
