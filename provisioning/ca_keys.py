"""Where the keys of issuing CAs are: in files of the station (`keyfile`), or in a PKCS#11 token (`tokens`).

What signs does not know which: a key is an `EllipticCurvePrivateKey`. Only making and keeping one differ.

Rules:

- A key in a token is recorded with its CA by a URI that names token and key; module and PIN are the machine's.
- A key that is in the token already is not taken unasked: another station may sign with it. That of this root's
  interrupted attempt is known by its id, which begins like the root's, and by being no recorded CA's.
- What was made for nothing, because a later step failed, is removed from the token again.
"""

from __future__ import annotations

import os
import secrets
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.x509 import SubjectKeyIdentifier

from birthmark.device.errors import AuthorityError, ConfigurationError
from birthmark.device.escape import escaped
from birthmark.provisioning.encrypted_key import DEFAULT_DERIVATION, KeyDerivation
from birthmark.provisioning.keyfile import write_key
from birthmark.provisioning.passphrase import PIN_VARIABLE, PassphraseSource
from birthmark.provisioning.tokens.key import TokenKey

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from birthmark.provisioning.settings import TokenSettings
    from birthmark.provisioning.tokens.pkcs11 import Pin, Token
    from birthmark.provisioning.tokens.uri import TokenUri

MODULE_VARIABLE: Final = "BIRTHMARK_TOKEN_MODULE"
"""Names the module for one command, in the place of what the settings name."""
PIN_SOURCE: Final = PassphraseSource(variable=PIN_VARIABLE, prompt="PIN: ", option="--pin-fd", what="PIN")
_ROOT_OCTETS: Final = 8
_RANDOM_OCTETS: Final = 8


class TokenAccess:
    """How a station gets at its tokens: by which module, and where a PIN comes from.

    Args:
        settings: what the station's settings say, as they are now.
        pin: the PIN, or where to get it once it is needed.
        naming: how this command can be told the module, for hints, beside what all commands go by.
    """

    def __init__(
        self,
        settings: Callable[[], TokenSettings],
        pin: bytes | PassphraseSource,
        *,
        naming: str = "for a new key ?module-path=FILE in its URI",
    ) -> None:
        self._settings = settings
        self._naming = naming
        self._pin = pin
        self._pins: dict[str, bytes] = {}
        self._asking = threading.Lock()

    def module(self, uri: TokenUri | None = None) -> Path:
        """Return the PKCS#11 module to use.

        Raises:
            ConfigurationError: none is named.
        """
        named = (uri.module_path if uri else None) or os.environ.get(MODULE_VARIABLE) or self._settings().module
        if not named:
            raise ConfigurationError(
                "could not use a PKCS#11 token: its module is not known",
                hint=f"name it by {MODULE_VARIABLE}, or [token] in station.toml; {self._naming}",
            )
        return Path(named)

    def token(self, uri: TokenUri) -> Token:
        """Return a token; nothing happens before it is used.

        Raises:
            ConfigurationError: its module is not known.
        """
        from birthmark.provisioning.tokens.pkcs11 import Token  # noqa: PLC0415 - it costs time to import

        return Token(uri.key, self.module(uri), self._pin_of(uri))

    def _pin_of(self, uri: TokenUri) -> Pin:
        from birthmark.provisioning.tokens.pkcs11 import Pin  # noqa: PLC0415 - it costs time to import

        given = self._pin
        if isinstance(given, bytes):
            return Pin(lambda: given, by_person=False)
        path = uri.pin_path or self._settings().pin_path
        source = replace(given, path=path, prompt=f"PIN of the token {escaped(uri.label)}: ")
        # A descriptor is read once, whatever token it is for.
        name = "" if source.descriptor is not None else uri.label

        def read() -> bytes:
            with self._asking:
                if name not in self._pins:
                    self._pins[name] = source.read()
                return self._pins[name]

        return Pin(read, by_person=not source.is_given)


@dataclass(frozen=True, slots=True)
class TokenPlace:
    """Where in a token an issuing CA's key is to be.

    Raises:
        ConfigurationError: the URI names no key.
    """

    uri: TokenUri
    existing: bool = False
    """Whether it is there already."""

    def __post_init__(self) -> None:
        if not self.uri.object:
            raise ConfigurationError(
                f"could not use the key {self.uri}: it has no name",
                hint="name it, as in 'pkcs11:token=...;object=issuing'",
            )


class KeyMaker(Protocol):
    """Makes the key of an issuing CA, and keeps it."""

    def make(self, root: bytes, taken: Collection[str]) -> EllipticCurvePrivateKey:
        """Make it.

        Args:
            root: the key identifier of the root that is to sign its certificate.
            taken: the key identifiers of the CAs that are known already, in lower-case hex.

        Raises:
            AuthorityError: it cannot be made.
        """

    def uri_of(self, key: EllipticCurvePrivateKey) -> str:
        """Return what is to be recorded of where the key is."""

    def keep(self, key: EllipticCurvePrivateKey, path: Path) -> None:
        """Have it durable; `path` is for one in a file."""

    def drop(self, key: EllipticCurvePrivateKey) -> None:
        """Remove what was made for nothing."""


@dataclass(frozen=True, slots=True)
class FileKeys:
    """Makes keys that are kept in files of the station."""

    passphrase: Callable[[], bytes]
    derivation: KeyDerivation = DEFAULT_DERIVATION

    def make(self, root: bytes, taken: Collection[str]) -> EllipticCurvePrivateKey:
        """Make a key in memory, once the passphrase is there."""
        del root, taken
        self.passphrase()
        return generate_private_key(SECP256R1())

    def uri_of(self, key: EllipticCurvePrivateKey) -> str:
        """Return nothing: a file is found by the CA's name."""
        del key
        return ""

    def keep(self, key: EllipticCurvePrivateKey, path: Path) -> None:
        """Write it, encrypted."""
        write_key(path, key, self.passphrase(), self.derivation)

    def drop(self, key: EllipticCurvePrivateKey) -> None:
        """Do nothing: it was in memory, or is in a file that the next attempt clears away."""


class TokenKeys:
    """Makes keys in a token, or takes one that is there.

    Args:
        access: to the token.
        place: token and key.

    Raises:
        ConfigurationError: the module is not known.
    """

    def __init__(self, access: TokenAccess, place: TokenPlace) -> None:
        self._token = access.token(place.uri)
        self._uri = place.uri.key
        self._shown_by = place.uri.listing
        self._existing = place.existing
        self._made: set[TokenUri] = set()

    def make(self, root: bytes, taken: Collection[str]) -> EllipticCurvePrivateKey:
        """Make a key in the token, or take the one that is there."""
        found = self._token.find_key(self._uri)
        if found is not None:
            self._check_taken(found, taken)
            if self._existing or found.uri.id.startswith(root[:_ROOT_OCTETS]):
                return found
            raise AuthorityError(
                f"could not make the key {self._uri}: the token has one of that name",
                hint="choose another name; or, if it was made for this and nobody signs with it: --existing-key",
            )
        if self._existing:
            raise AuthorityError(
                f"could not use the key {self._uri}: the token has no such key",
                hint=f"`{self._shown_by}` shows its keys; without --existing-key one is made",
            )
        own_id = self._uri.id or root[:_ROOT_OCTETS] + secrets.token_bytes(_RANDOM_OCTETS)
        key = self._token.make_key(replace(self._uri, id=own_id))
        self._made.add(key.uri)
        return key

    def _check_taken(self, key: TokenKey, taken: Collection[str]) -> None:
        key_id = SubjectKeyIdentifier.from_public_key(key.public_key()).digest.hex()
        if key_id in taken:
            raise AuthorityError(
                f"could not use the key {self._uri}: it is that of the CA {key_id[:8]} already",
                hint="a CA has a key of its own: choose another name, as in object=issuing-2",
            )

    def uri_of(self, key: EllipticCurvePrivateKey) -> str:
        """Return its URI."""
        return str(key.uri) if isinstance(key, TokenKey) else ""

    def keep(self, key: EllipticCurvePrivateKey, path: Path) -> None:
        """Do nothing: it is in the token."""

    def drop(self, key: EllipticCurvePrivateKey) -> None:
        """Remove it from the token, if it was made here."""
        if isinstance(key, TokenKey) and key.uri in self._made:
            self._token.destroy_key(key.uri)


@contextmanager
def undone(keys: KeyMaker) -> Iterator[list[EllipticCurvePrivateKey]]:
    """Remove the keys that were put into the list again, if what they were made for fails."""
    made: list[EllipticCurvePrivateKey] = []
    try:
        yield made
    except BaseException:
        for key in made:
            keys.drop(key)
        raise
