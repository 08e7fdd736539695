"""A PKCS#11 token that holds CAs' keys: found, opened with its PIN, made to sign.

Standard: PKCS #11 (OASIS). Signatures are by CKM_ECDSA on a digest, which every token has that knows P-256.

Rules:

- A key that is made here stays in the token: sensitive, not extractable, for signing only. A key that the token
  would give away is refused.
- A PIN that a token has refused is not tried again by this process, and the last try before a token locks itself
  is left to a person at a prompt: no service that is started again and again locks a token.
- Modules are called in a thread of their own (`modules`); a PIN is asked for in the caller's.
- The login is kept. Once a token was away it is opened anew; a signature that failed for that is tried once more.
- No PIN is in an error, and of what a module says the name of PKCS#11's return code alone.
"""

from __future__ import annotations

import hmac
import shlex
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey

from birthmark.device.errors import AuthorityError
from birthmark.device.escape import escaped
from birthmark.provisioning.tokens.key import TokenKey
from birthmark.provisioning.tokens.modules import (
    P256,
    PROCESS,
    KeyFacts,
    Login,
    TokenFacts,
    TokenName,
    attribute,
    key_facts,
    library,
    objects,
    token_facts,
    tokens,
    unload,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from birthmark.provisioning.tokens.uri import TokenUri

T = TypeVar("T")
_POINT: Final = bytes.fromhex("0441")
"""CKA_EC_POINT is an OCTET STRING (DER) of 65 octets; some tokens leave these two out."""
_ABSENT: Final = (
    "is it plugged in, and the module right? `birthmark ca token list --module {module}` shows which are"
)
_CAUSES: Final[dict[str, tuple[str, str]]] = {
    "TokenNotPresent": ("it is not there", _ABSENT),
    "TokenNotRecognised": ("it is not there", _ABSENT),
    "SlotIDInvalid": ("it is not there", _ABSENT),
    "DeviceRemoved": ("it was taken out", "put it back, then try again"),
    "DeviceError": ("it reports a fault", "take it out and put it back, then try again"),
    "PinExpired": ("its PIN has expired", "set a new one with the vendor's tool"),
    "PinLocked": ("its PIN is locked", "its security officer sets a new one, with the vendor's tool"),
    "UserPinNotInitialized": ("it has no PIN yet", "set one with the vendor's tool"),
    "TokenWriteProtected": ("it is write-protected", "use a token in which a key can be made"),
    "DeviceMemory": ("it is full", "remove what is not needed any more, with the vendor's tool"),
    "MechanismInvalid": ("it knows no ECDSA on P-256", "it cannot hold a CA's key of birthmark's"),
    "SessionCount": ("it takes no further session", "end the other programs that use it"),
    "ObjectHandleInvalid": ("its key is gone, or it was taken out", _ABSENT),
}
_WRONG_PIN: Final = frozenset({"PinIncorrect", "PinInvalid", "PinLenRange"})


@dataclass(frozen=True, slots=True)
class Pin:
    """How to get a token's PIN, once it is needed."""

    read: Callable[[], bytes]
    """Returns it; may ask somebody."""
    by_person: bool
    """Whether it is somebody at a prompt who gives it."""


class Token:
    """A token in a module; nothing happens before it is used.

    Args:
        uri: which.
        module: the PKCS#11 module, a shared library.
        pin: its PIN.
    """

    def __init__(self, uri: TokenUri, module: Path, pin: Pin) -> None:
        self._uri = uri
        self._module = str(module)
        self._pin = pin
        self._name: TokenName | None = None
        """Which token it is, once it has taken the PIN."""

    def facts(self) -> TokenFacts:
        """Look for it; takes no PIN.

        Raises:
            AuthorityError: it is not there, or the module cannot be used.
        """
        with self._said("find"):
            return PROCESS.run(lambda: token_facts(self._found()))

    def private_keys(self) -> list[KeyFacts]:
        """Return the private keys in it.

        Raises:
            AuthorityError: it cannot be opened.
        """
        with self._said("read"):
            return self._do(lambda login: [key_facts(key) for key in objects(login.session, "PRIVATE_KEY")])

    def key(self, uri: TokenUri, public_key: EllipticCurvePublicKey) -> TokenKey:
        """Return the key that the URI names, whose public half is known; it is looked for when it signs."""
        return TokenKey(uri, public_key, lambda digest: self._sign(uri, digest))

    def make_key(self, uri: TokenUri) -> TokenKey:
        """Make a P-256 key pair in the token, under the URI's label and id.

        Raises:
            AuthorityError: it cannot; nothing is left in the token.
        """
        with self._said("make a key in"):
            made = self._do(lambda _: self._generated(uri))
            try:
                return self._held(uri, *made)
            except BaseException:
                self.destroy_key(uri)
                raise

    def find_key(self, uri: TokenUri) -> TokenKey | None:
        """Return the key that the URI names, with its id; None if there is none.

        Raises:
            AuthorityError: the token cannot be opened, several keys fit, or this one must not be a CA's.
        """
        with self._said("look into"):
            seen = self._do(lambda login: self._seen(login, uri))
            return None if seen is None else self._held(replace(uri, id=seen[0].id), *seen)

    def destroy_key(self, uri: TokenUri) -> None:
        """Remove a key pair that was made for nothing, by its id; a trouble with that is passed over."""

        def destroy(login: Login) -> None:
            login.keys.clear()
            with self._writing() as session:
                for kind in ("PRIVATE_KEY", "PUBLIC_KEY"):
                    for one in objects(session, kind):
                        if _is_named(one, uri):
                            one.destroy()

        with suppress(AuthorityError), self._said("look into"):
            self._do(destroy)

    def _held(self, uri: TokenUri, facts: KeyFacts, point: bytes) -> TokenKey:
        """Return a key once its attributes are looked at, and it has signed."""
        if facts.trouble:
            raise AuthorityError(
                f"could not use the key {uri}: {facts.trouble}",
                hint="have the station make one, in a token that keeps it",
            )
        try:
            public_key = EllipticCurvePublicKey.from_encoded_point(SECP256R1(), point.removeprefix(_POINT))
        except ValueError as error:
            raise AuthorityError(f"could not use the key {uri}: its public half cannot be read") from error
        key = self.key(uri, public_key)
        key.prove()
        return key

    def _sign(self, uri: TokenUri, digest: bytes) -> bytes:
        with self._said("sign with") as pkcs11:
            try:
                return self._do(lambda login: _signature(login, uri, digest))
            except pkcs11.PKCS11Error:
                PROCESS.run(lambda: unload(self._module))  # it may have been away
                return self._do(lambda login: _signature(login, uri, digest))

    def _do(self, work: Callable[[Login], T]) -> T:
        """Open the token if need be, and do this with it, in the modules' thread."""
        login = self._login()
        return PROCESS.run(lambda: work(login))

    # What follows down to `_said` runs in the modules' thread; but for `_login`, which may ask for the PIN.

    def _generated(self, uri: TokenUri) -> tuple[KeyFacts, bytes]:
        pkcs11 = library()
        with self._writing() as session:
            public, private = session.generate_keypair(
                pkcs11.KeyType.EC,
                id=uri.id,
                label=uri.object,
                store=True,
                capabilities=pkcs11.MechanismFlag.SIGN | pkcs11.MechanismFlag.VERIFY,
                public_template={pkcs11.Attribute.EC_PARAMS: P256},
                private_template={
                    pkcs11.Attribute.PRIVATE: True,
                    pkcs11.Attribute.SENSITIVE: True,
                    pkcs11.Attribute.EXTRACTABLE: False,
                },
            )
            return key_facts(private), attribute(public, "EC_POINT") or b""

    def _seen(self, login: Login, uri: TokenUri) -> tuple[KeyFacts, bytes] | None:
        private = _only(login, uri)
        if private is None:
            return None
        facts = key_facts(private)
        publics = [one for one in objects(login.session, "PUBLIC_KEY") if attribute(one, "ID") == facts.id]
        if not facts.id or len(publics) != 1:
            raise AuthorityError(
                f"could not use the key {uri}: the token has no public key with its id",
                hint="have the station make one in the token",
            )
        return facts, attribute(publics[0], "EC_POINT") or b""

    def _found(self) -> Any:
        """Return the one token that the URI names."""
        uri, found = self._uri, []
        for token in tokens(self._module):
            own = (token.label, token.serial.decode("latin-1"), token.model, token.manufacturer_id)
            wanted = (uri.token, uri.serial, uri.model, uri.manufacturer)
            if all(want in ("", has) for want, has in zip(wanted, own, strict=True)):
                found.append(token)
        if len(found) == 1:
            return found[0]
        if not found:
            raise AuthorityError(f"could not find {self._shown}: it is not there", hint=self._hint(_ABSENT))
        serials = ", ".join(escaped(token.serial) for token in found)
        raise AuthorityError(
            f"could not find {self._shown}: {len(found)} have that name",
            hint=f"name its serial number, too, as in ;serial=...: {serials}",
        )

    def _login(self) -> Login:
        """Return the login to the token; the first one takes the PIN."""
        if self._name in PROCESS.logins:
            return PROCESS.logins[self._name]
        token = PROCESS.run(self._ready)
        name = (self._module, token.serial, token.label)
        pin = self._pin.read()
        login = PROCESS.logins.get(name)
        if login is None:
            login = Login(PROCESS.run(lambda: self._open(token, name, pin)), pin)
        elif not hmac.compare_digest(login.pin, pin):
            raise PROCESS.run(lambda: self._wrong_pin(token))
        self._name = name
        PROCESS.logins[name] = login
        return login

    def _ready(self) -> Any:
        """Return the token, if a PIN may be tried on it."""
        token = self._found()
        facts = token_facts(token)
        if facts.locked:
            cause, hint = _CAUSES["PinLocked"]
            raise AuthorityError(f"could not open {self._shown}: {cause}", hint=hint)
        if facts.last_try and not self._pin.by_person:
            raise AuthorityError(
                f"could not open {self._shown}: one more wrong PIN would lock it",
                hint="a person is to type it once, at a prompt: birthmark ca token check",
            )
        return token

    def _open(self, token: Any, name: TokenName, pin: bytes) -> Any:
        pkcs11 = library()

        if hmac.compare_digest(PROCESS.refused.get(name, b""), pin):
            raise self._wrong_pin(token)
        try:
            return token.open(user_pin=pin.decode())
        except UnicodeDecodeError:
            raise AuthorityError(f"could not open {self._shown}: the PIN is not UTF-8 text") from None
        except pkcs11.PKCS11Error as error:
            if type(error).__name__ not in _WRONG_PIN:
                raise
            PROCESS.refused[name] = pin
            raise self._wrong_pin(token) from None

    def _wrong_pin(self, token: Any) -> AuthorityError:
        facts = token_facts(token.slot.get_token())
        more = {"PIN locked": ", and it is locked now", "one try left": ", and one more would lock it"}
        return AuthorityError(
            f"could not open {self._shown}: the PIN is wrong{more.get(facts.state, '')}",
            hint="give the right one; this one is not tried again: a token locks itself after a few wrong ones",
        )

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        """Open a session that may write, logged in as the other one is."""
        session = self._found().open(rw=True)
        try:
            yield session
        finally:
            session.close()

    def _hint(self, text: str) -> str:
        return text.replace("{module}", shlex.quote(self._module))

    @property
    def _shown(self) -> str:
        return f"the token {escaped(self._uri.label)}"

    @contextmanager
    def _said(self, verb: str) -> Iterator[Any]:
        """Work with the token, alone, and say of what goes wrong which token it is."""
        with PROCESS.lock:
            pkcs11 = library()
            try:
                yield pkcs11
            except pkcs11.PKCS11Error as error:
                name = type(error).__name__
                cause, hint = _CAUSES.get(name, (f"it answers with {name}", _ABSENT))
                raise AuthorityError(f"could not {verb} {self._shown}: {cause}", hint=self._hint(hint)) from error


def _is_named(key: Any, uri: TokenUri) -> bool:
    return uri.object in ("", attribute(key, "LABEL")) and uri.id in (b"", attribute(key, "ID"))


def _only(login: Login, uri: TokenUri) -> Any:
    """Return the private key that a URI names, None if there is none."""
    found = [key for key in objects(login.session, "PRIVATE_KEY") if _is_named(key, uri)]
    if len(found) > 1:
        raise AuthorityError(
            f"could not use the key {uri}: the token has {len(found)} that fit",
            hint=f"name it by its id: `{uri.listing}` shows it",
        )
    return found[0] if found else None


def _signature(login: Login, uri: TokenUri, digest: bytes) -> bytes:
    pkcs11 = library()
    if uri not in login.keys:
        key = _only(login, uri)
        if key is None:
            raise AuthorityError(
                f"could not use the key {uri}: the token has no such key",
                hint=f"is it the right token? `{uri.listing}` shows what is in it",
            )
        login.keys[uri] = (key, bool(attribute(key, "ALWAYS_AUTHENTICATE")))
    key, always_pin = login.keys[uri]
    more = {"pin": login.pin.decode()} if always_pin else {}
    signature: bytes = key.sign(digest, mechanism=pkcs11.Mechanism.ECDSA, **more)
    return signature
