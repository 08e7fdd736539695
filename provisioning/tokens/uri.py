"""The name of a key in a PKCS#11 token: a URI (RFC 7512).

    pkcs11:token=birthmark;object=issuing?module-path=/usr/lib/softhsm/libsofthsm2.so

Rules:

- A token is named by its label, and by serial number, model or manufacturer where that is not enough; a key by
  its label (`object`) or its `id`. Slots are not taken: their numbers change.
- A PIN never stands in it: `pin-value` is refused, and the error does not repeat it. `pin-source` names a file.
- What names the key is kept with the CA. Where the module and the PIN are is a matter of the machine:
  `module-path` and `pin-source` are not.
- An attribute that is not known is refused, as is one that comes twice: it may be what tells two keys apart.

Pure.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote_from_bytes, unquote_to_bytes

from birthmark.device.errors import ConfigurationError
from birthmark.device.escape import quoted

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEME: Final = "pkcs11:"
MAX_CHARACTERS: Final = 2048
_PATH: Final = frozenset({"token", "serial", "model", "manufacturer", "object", "id", "type"})
_QUERY: Final = frozenset({"module-path", "pin-source"})
_ONE: Final = re.compile(r"([A-Za-z0-9_-]+)=((?:[A-Za-z0-9._~:\[\]@!$'()*+,=&/?|-]|%[0-9A-Fa-f]{2})*)")
"""One attribute (RFC 7512 section 2.3); `&` in a path and `/?|` in a query do no harm in the other."""
_KEPT: Final = "-._~:[]@!$'()*+,=&"
_LIMITS: Final = {"token": 32, "serial": 16, "model": 16, "manufacturer": 32}
"""Octets that CK_TOKEN_INFO has for each."""
_EXAMPLE: Final = "for example: pkcs11:token=birthmark;object=issuing"


@dataclass(frozen=True, slots=True)
class TokenUri:
    """Which token, and which key in it; empty is what was not said."""

    token: str = ""
    serial: str = ""
    model: str = ""
    manufacturer: str = ""
    object: str = ""
    id: bytes = b""
    module_path: Path | None = None
    pin_path: Path | None = None

    @classmethod
    def parse(cls, text: str) -> TokenUri:
        """Read a URI that names a token at least.

        Raises:
            ConfigurationError: it is none, or has what is not taken here.
        """
        # Wherever it stands and however it is written, before anything could repeat it.
        if b"pin-value" in unquote_to_bytes(os.fsencode(text)).lower():
            raise ConfigurationError(
                "could not use the PKCS#11 URI: it has a PIN in it",
                hint="take it out and change that PIN; a prompt, a descriptor, the environment or a file gives it",
            )
        if len(text) > MAX_CHARACTERS or not text.isascii() or not text.lower().startswith(SCHEME):
            raise _refused(text, "it is no PKCS#11 URI", _EXAMPLE)
        path, _, query = text[len(SCHEME) :].partition("?")
        found = dict[str, bytes]()
        for name, value in (*_attributes(text, path, ";", _PATH), *_attributes(text, query, "&", _QUERY)):
            if name in found:
                raise _refused(text, f"{name} comes twice", _EXAMPLE)
            found[name] = value
        if found.pop("type", b"private") != b"private":
            raise _refused(text, "it does not name a private key", "leave `type` out, or give type=private")
        words = {name: _text(text, name, value) for name, value in found.items() if name != "id"}
        if not (words.get("token") or words.get("serial")):
            raise _refused(text, "it names no token", _EXAMPLE)
        module, pin = words.pop("module-path", ""), words.pop("pin-source", "")
        return cls(
            **words,
            id=found.get("id", b""),
            module_path=_path(text, "module-path", module),
            pin_path=_path(text, "pin-source", pin.removeprefix("file:")),
        )

    @property
    def key(self) -> TokenUri:
        """What names the key: without what is a matter of the machine."""
        return replace(self, module_path=None, pin_path=None)

    @property
    def label(self) -> str:
        """How people know the token."""
        return self.token or self.serial

    @property
    def listing(self) -> str:
        """The command that shows the keys in the token."""
        token = replace(self, object="", id=b"", pin_path=None)
        return f"birthmark ca token list --keys {shlex.quote(str(token))}"

    def __str__(self) -> str:
        """Return it as text that `parse` reads to the same."""
        path = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "id" and value:
                path.append("id=" + "".join(f"%{octet:02X}" for octet in value))
            elif isinstance(value, str) and value:
                path.append(f"{field.name}={quote_from_bytes(value.encode(), safe=_KEPT)}")
        query = [
            f"{name}={quote_from_bytes(str(value).encode(), safe=_KEPT.replace('&', '') + '/')}"
            for name, value in (("module-path", self.module_path), ("pin-source", self.pin_path))
            if value is not None
        ]
        return SCHEME + ";".join(path) + ("?" + "&".join(query) if query else "")


def _attributes(text: str, part: str, separator: str, known: frozenset[str]) -> Iterator[tuple[str, bytes]]:
    for one in part.split(separator) if part else ():
        match = _ONE.fullmatch(one)
        if match is None:
            raise _refused(text, f"{quoted(one, 40)} is no attribute", _EXAMPLE)
        if match[1] not in known:
            raise _refused(
                text, f"the attribute {match[1]} is not taken here", f"known: {', '.join(sorted(known))}"
            )
        yield match[1], unquote_to_bytes(match[2])


def _text(text: str, name: str, value: bytes) -> str:
    try:
        word = value.decode()
    except UnicodeDecodeError:
        raise _refused(text, f"{name} is not UTF-8", _EXAMPLE) from None
    if not word.isprintable():
        raise _refused(text, f"{name} is not printable", _EXAMPLE)
    if len(value) > _LIMITS.get(name, MAX_CHARACTERS):
        raise _refused(text, f"{name} is longer than {_LIMITS[name]} bytes", "no token has such a one")
    return word


def _path(text: str, name: str, word: str) -> Path | None:
    if word and not word.startswith("/"):
        raise _refused(text, f"{name} is no absolute path", f"for example: {name}=/path/to/file")
    return Path(word) if word else None


def _refused(text: str, cause: str, hint: str) -> ConfigurationError:
    return ConfigurationError(f"could not use the PKCS#11 URI {quoted(text, 120)}: {cause}", hint=hint)
