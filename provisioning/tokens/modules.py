"""PKCS#11 modules in this process: loaded, the tokens in them, and what tokens and keys say of themselves.

python-pkcs11 is an extra. It is imported here alone, when a token is used and no sooner.

Rules:

- All calls are made in one thread that does nothing else. Modules are initialised without locks of their own, and
  what they leave in a thread's state stays there: SoftHSM fails at OpenSSL engines and leaves that in the thread's
  queue of errors, where Python's `ssl` finds it at its next turn, and fails.
- PKCS#11 knows one login for each token and process; all who use a token in this process share it.
- In a child process everything begins anew: a module belongs to the process that initialised it.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from birthmark.device.errors import AuthorityError, MissingLibraryError
from birthmark.device.escape import escaped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from birthmark.provisioning.tokens.uri import TokenUri

T = TypeVar("T")
P256: Final = bytes.fromhex("06082a8648ce3d030107")
"""CKA_EC_PARAMS of P-256: its object identifier (DER)."""


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """What a token says of itself without a PIN. Texts are printable ASCII."""

    label: str
    serial: str
    model: str
    manufacturer: str
    has_pin: bool
    failed_before: bool
    """A wrong PIN was given since the last right one."""
    last_try: bool
    """One more wrong PIN, and it is locked."""
    locked: bool

    @property
    def state(self) -> str:
        """How its PIN stands, for people."""
        if self.locked:
            return "PIN locked"
        if self.last_try:
            return "one try left"
        if not self.has_pin:
            return "no PIN"
        return "a wrong PIN was given" if self.failed_before else "ready"


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """What a token says of a private key. What it does not say counts as what is worse."""

    label: str
    id: bytes
    is_p256: bool
    signs: bool
    sensitive: bool
    extractable: bool
    made_there: bool
    """Made in the token, and at no time anywhere else or in the clear."""

    @property
    def trouble(self) -> str:
        """Why it must not be a CA's key; empty if it may."""
        if not self.is_p256:
            return "it is no P-256 key"
        if not self.signs:
            return "it may not sign"
        if self.extractable or not self.sensitive:
            return "the token would give it away: it is extractable, or not sensitive"
        return ""


@dataclass(slots=True)
class Login:
    """An open session, logged in."""

    session: Any
    pin: bytes = field(repr=False)
    keys: dict[TokenUri, tuple[Any, bool]] = field(default_factory=dict)
    """Private keys that were found, and whether each wants the PIN with every signature."""


TokenName = tuple[str, bytes, str]
"""A token: module, serial number, label."""


class Process:
    """What this process has to do with tokens: PKCS#11 knows one login for each token and process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held for a piece of work that is several calls."""
        self.logins: dict[TokenName, Login] = {}
        self.refused: dict[TokenName, bytes] = {}
        """By token, the PIN that it did not take."""
        self.modules: set[str] = set()
        """Those that were loaded."""
        self.stale: set[str] = set()
        """Those that a parent process had loaded, and that are to begin anew before they are used."""
        self._thread: ThreadPoolExecutor | None = None

    def run(self, work: Callable[[], T]) -> T:
        """Do something with modules, in their thread; the caller is no such piece of work itself."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "birthmark-pkcs11")
        return self._thread.submit(work).result()

    def after_fork(self) -> None:
        """Begin anew in a child: sessions are the parent's, and another thread may have held the lock."""
        stale = self.stale | self.modules
        self.__init__()  # type: ignore[misc]
        self.stale = stale


PROCESS: Final = Process()
os.register_at_fork(after_in_child=PROCESS.after_fork)


def tokens_in(module: Path) -> list[TokenFacts]:
    """Return the tokens that a module has, without a PIN.

    Raises:
        AuthorityError: the module cannot be used.
        MissingLibraryError: python-pkcs11 is not installed.
    """
    with PROCESS.lock:
        pkcs11 = library()
        try:
            return PROCESS.run(lambda: [token_facts(token) for token in tokens(str(module))])
        except pkcs11.PKCS11Error as error:
            raise _unusable(str(module), error) from error


def library() -> Any:
    """Return python-pkcs11.

    Raises:
        MissingLibraryError: it is not installed.
    """
    try:
        import pkcs11  # noqa: PLC0415 - an extra, and only where a token is used
    except ImportError as error:
        raise MissingLibraryError(
            "could not use a PKCS#11 token: the library python-pkcs11 is missing",
            hint="pip install 'birthmark[hsm]'",
        ) from error
    return pkcs11


def _loaded(module: str) -> Any:
    pkcs11 = library()
    if module in PROCESS.stale:
        PROCESS.stale.discard(module)
        unload(module)
    PROCESS.modules.add(module)
    try:
        return pkcs11.lib(module)
    except pkcs11.PKCS11Error as error:
        raise _unusable(module, error) from error


def _unusable(module: str, error: Exception) -> AuthorityError:
    # What is not a return code is python-pkcs11's own text, which ends in the system's reason for not loading it.
    said = str(error).rpartition(f"{module}: ")[2]
    cause = escaped(said) if "loading" in str(error) else f"it answers with {type(error).__name__}"
    return AuthorityError(
        f"could not use the PKCS#11 module {escaped(module)}: {cause}",
        hint="is it the right file, and set up? (SoftHSM finds its tokens by SOFTHSM2_CONF)",
    )


def unload(module: str) -> None:
    """Have the module begin anew when it is used next: it looks for its tokens then; every login in it ends."""
    pkcs11 = library()
    for name in [name for name in PROCESS.logins if name[0] == module]:
        del PROCESS.logins[name]
    with suppress(pkcs11.PKCS11Error):
        pkcs11.lib(module).finalize()


def tokens(module: str) -> Iterator[Any]:
    """Yield the tokens that are set up."""
    pkcs11 = library()
    for slot in _loaded(module).get_slots(token_present=True):
        with suppress(pkcs11.TokenNotPresent, pkcs11.TokenNotRecognised, UnicodeDecodeError):
            token = slot.get_token()
            if token.flags & pkcs11.TokenFlag.TOKEN_INITIALIZED:
                yield token


def objects(session: Any, kind: str) -> list[Any]:
    """Return the EC keys that a session sees; `kind` is PRIVATE_KEY or PUBLIC_KEY."""
    pkcs11 = library()
    attributes = {
        pkcs11.Attribute.CLASS: pkcs11.ObjectClass[kind],
        pkcs11.Attribute.KEY_TYPE: pkcs11.KeyType.EC,
    }
    return list(session.get_objects(attributes))


def attribute(key: Any, name: str) -> Any:
    """Return what a token says of a key; None if it does not say."""
    pkcs11 = library()
    try:
        return key[pkcs11.Attribute[name]]
    except (pkcs11.AttributeTypeInvalid, pkcs11.AttributeSensitive, pkcs11.FunctionFailed):
        return None


def key_facts(key: Any) -> KeyFacts:
    """Return what a token says of a private key."""
    return KeyFacts(
        label=escaped(attribute(key, "LABEL") or ""),
        id=attribute(key, "ID") or b"",
        is_p256=attribute(key, "EC_PARAMS") == P256,
        signs=attribute(key, "SIGN") is True,
        sensitive=attribute(key, "SENSITIVE") is True,
        extractable=attribute(key, "EXTRACTABLE") is not False,
        made_there=all(
            attribute(key, name) is True for name in ("LOCAL", "ALWAYS_SENSITIVE", "NEVER_EXTRACTABLE")
        ),
    )


def token_facts(token: Any) -> TokenFacts:
    """Return what a token says of itself."""
    flags = {flag.name for flag in library().TokenFlag if flag in token.flags}
    return TokenFacts(
        label=escaped(token.label),
        serial=escaped(token.serial),
        model=escaped(token.model),
        manufacturer=escaped(token.manufacturer_id),
        has_pin="USER_PIN_INITIALIZED" in flags,
        failed_before="USER_PIN_COUNT_LOW" in flags,
        last_try="USER_PIN_FINAL_TRY" in flags,
        locked="USER_PIN_LOCKED" in flags,
    )
