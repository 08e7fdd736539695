"""Keys in a PKCS#11 token, with SoftHSM: what they sign, what is refused, what is said when something fails."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from support.patience import PATIENCE_S
from support.pki import Pki
from support.softhsm import LABEL, PIN, WRONG_PIN, SoftHsm, running, with_a_token

from birthmark.device.errors import AuthorityError, ConfigurationError
from birthmark.provisioning.rollover.starting import RootKey
from birthmark.provisioning.tokens import pkcs11
from birthmark.provisioning.tokens.modules import PROCESS, Login, TokenFacts, key_facts, token_facts, tokens_in
from birthmark.provisioning.tokens.pkcs11 import Pin, Token
from birthmark.provisioning.tokens.uri import TokenUri

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from birthmark.provisioning.tokens.key import TokenKey

ALGORITHM = ECDSA(SHA256())
ID = bytes(range(16))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SoftHsm:
    return with_a_token(tmp_path_factory.mktemp("softhsm"))


@pytest.fixture
def softhsm(made: SoftHsm, tmp_path: Path) -> Iterator[SoftHsm]:
    """SoftHSM with one empty token."""
    yield from running(tmp_path / "softhsm", made)


@pytest.fixture
def uri(softhsm: SoftHsm) -> TokenUri:
    """A key that does not exist yet."""
    del softhsm
    return TokenUri(LABEL, object="issuing", id=ID)


@pytest.fixture
def key(softhsm: SoftHsm, uri: TokenUri) -> TokenKey:
    return softhsm.token(uri).make_key(uri)


def signs(key: TokenKey) -> bool:
    key.public_key().verify(key.sign(b"data", ALGORITHM), b"data", ALGORITHM)
    return True


def raw_key(session: Any, *, ec_params: bytes | None = None, **private: bool) -> None:
    """Make a key as birthmark would not."""
    import pkcs11
    from pkcs11.util.ec import encode_named_curve_parameters

    session.generate_keypair(
        pkcs11.KeyType.EC,
        id=ID,
        label="issuing",
        store=True,
        capabilities=pkcs11.MechanismFlag.SIGN | pkcs11.MechanismFlag.VERIFY,
        public_template={pkcs11.Attribute.EC_PARAMS: ec_params or encode_named_curve_parameters("secp256r1")},
        private_template={pkcs11.Attribute[name]: value for name, value in private.items()},
    )


class Flawed:
    """What python-pkcs11 gives, but for what a test has it say."""

    def __init__(self, real: Any, **flaws: Any) -> None:
        self._real, self._flaws = real, flaws

    def __getattr__(self, name: str) -> Any:
        return self._flaws[name] if name in self._flaws else getattr(self._real, name)


# A key that was made here


def test_a_key_made_in_a_token_signs_and_stays_there(softhsm: SoftHsm, uri: TokenUri, key: TokenKey) -> None:
    import pkcs11

    assert signs(key)
    assert key.uri == uri
    assert repr(key) == f"TokenKey({uri})"
    (facts,) = softhsm.token(uri).private_keys()
    assert (facts.trouble, facts.made_there, facts.label, facts.id) == ("", True, "issuing", ID)
    session = softhsm.raw_session(uri.token)
    (private,) = session.get_objects({pkcs11.Attribute.CLASS: pkcs11.ObjectClass.PRIVATE_KEY})
    with pytest.raises(pkcs11.AttributeSensitive):
        _ = private[pkcs11.Attribute.VALUE]
    for name, value in (("SENSITIVE", True), ("EXTRACTABLE", False), ("SIGN", True), ("DERIVE", False)):
        assert private[pkcs11.Attribute[name]] is value, name


def test_the_key_does_nothing_but_sign(key: TokenKey) -> None:
    for use in (
        key.private_numbers,
        lambda: key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        lambda: key.exchange(None, key.public_key()),  # type: ignore[arg-type]
    ):
        with pytest.raises(AuthorityError, match="it stays in its token"):
            use()
    with pytest.raises(TypeError):
        key.sign(b"", ECDSA(SHA384()))
    assert copy.deepcopy(key) is key
    assert copy.copy(key) is key
    assert (key.key_size, key.curve.name) == (256, "secp256r1")


def test_a_new_process_finds_the_key(softhsm: SoftHsm, uri: TokenUri, key: TokenKey) -> None:
    public_key = key.public_key()
    softhsm.forget()

    assert signs(softhsm.token(uri).key(uri, public_key))
    found = softhsm.token(uri).find_key(replace(uri, id=b""))
    assert found is not None
    assert (found.uri, found.public_key()) == (uri, public_key)
    assert softhsm.token(uri).find_key(replace(uri, object="other")) is None


def test_what_was_made_for_nothing_is_removed(softhsm: SoftHsm, uri: TokenUri, key: TokenKey) -> None:
    token = softhsm.token(uri)
    other = token.make_key(replace(uri, object="other", id=b"\x07"))

    token.destroy_key(other.uri)

    assert [facts.id for facts in token.private_keys()] == [ID]
    assert signs(key)
    with pytest.raises(AuthorityError, match="has no such key"):
        other.sign(b"", ALGORITHM)
    softhsm.token(uri, WRONG_PIN).destroy_key(uri)  # cannot, and does not raise
    assert signs(key)


def test_a_key_that_does_not_do_as_it_is_told_is_not_left_in_the_token(
    softhsm: SoftHsm, uri: TokenUri, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = key_facts
    monkeypatch.setattr(pkcs11, "key_facts", lambda key: replace(real(key), extractable=True))

    with pytest.raises(AuthorityError, match="the token would give it away"):
        softhsm.token(uri).make_key(uri)

    assert softhsm.token(uri).private_keys() == []


def test_several_threads_share_a_login(softhsm: SoftHsm, key: TokenKey, uri: TokenUri) -> None:
    keys = [key, softhsm.token(uri).key(uri, key.public_key())]
    failed: list[BaseException] = []

    def sign(number: int) -> None:
        try:
            for _ in range(25):
                assert signs(keys[number % 2])
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is told by the test's own thread
            failed.append(error)

    threads = [threading.Thread(target=sign, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


SIGN_THEN_TLS = """
import ssl, sys
from pathlib import Path
from birthmark.provisioning.tokens.pkcs11 import Pin, Token
from birthmark.provisioning.tokens.uri import TokenUri
_, uri, module, pin, anchors = sys.argv
uri = TokenUri.parse(uri)
Token(uri, Path(module), Pin(pin.encode, by_person=False)).find_key(uri).prove()
ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=bytes.fromhex(anchors))
"""


def test_what_a_module_leaves_behind_does_not_reach_tls(softhsm: SoftHsm, uri: TokenUri, key: TokenKey) -> None:
    """SoftHSM leaves errors in its thread's OpenSSL queue, once a process, which `ssl` takes for its own."""
    del key
    arguments = [str(uri), str(softhsm.module), PIN.decode(), Pki.create().root.der.hex()]
    done = subprocess.run([sys.executable, "-c", SIGN_THEN_TLS, *arguments], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


FORKING = """
import os, sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.hazmat.primitives.hashes import SHA256
from birthmark.provisioning.tokens.modules import PROCESS
from birthmark.provisioning.tokens.pkcs11 import Pin, Token
from birthmark.provisioning.tokens.uri import TokenUri

module, label, pin = sys.argv[1:]
uri = TokenUri(label, object="issuing", id=bytes(range(16)))
key = Token(uri, Path(module), Pin(lambda: pin.encode(), by_person=False)).find_key(uri)

def sign():
    key.public_key().verify(key.sign(b"data", ECDSA(SHA256())), b"data", ECDSA(SHA256()))

sign()
child = os.fork()
if child == 0:
    assert (PROCESS.logins, PROCESS.stale) == ({}, {module}), (PROCESS.logins, PROCESS.stale)
    sign()
    assert not PROCESS.stale
    print("the child has signed", flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
sign()
print("the parent has signed again")
"""


def test_a_child_process_opens_the_token_anew(softhsm: SoftHsm, uri: TokenUri, key: TokenKey) -> None:
    # In a process of its own: what forks should have no threads but the token's.
    assert signs(key)
    command = [sys.executable, "-c", FORKING, str(softhsm.module), uri.token, PIN.decode()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.stdout.splitlines() == ["the child has signed", "the parent has signed again"], done.stderr


def test_a_key_that_wants_the_pin_with_every_signature_gets_it(softhsm: SoftHsm, uri: TokenUri) -> None:
    raw_key(softhsm.raw_session(uri.token), EXTRACTABLE=False, SENSITIVE=True, ALWAYS_AUTHENTICATE=True)
    softhsm.forget()

    found = softhsm.token(uri).find_key(uri)

    assert found is not None
    assert signs(found)
    assert signs(found)


# Keys that must not be a CA's


@pytest.mark.parametrize(
    ("attributes", "cause"),
    [
        ({"EXTRACTABLE": True, "SENSITIVE": True}, "the token would give it away"),
        ({"EXTRACTABLE": False, "SENSITIVE": False}, "the token would give it away"),
        ({"EXTRACTABLE": False, "SENSITIVE": True, "SIGN": False}, "it may not sign"),
        ({"ec_params": bytes.fromhex("06052b81040022"), "EXTRACTABLE": False, "SENSITIVE": True}, "no P-256 key"),
    ],
)
def test_a_key_that_the_token_would_give_away_is_refused(
    softhsm: SoftHsm, uri: TokenUri, attributes: dict[str, Any], cause: str
) -> None:
    raw_key(softhsm.raw_session(uri.token), **attributes)
    softhsm.forget()

    with pytest.raises(AuthorityError, match=cause):
        softhsm.token(uri).find_key(uri)


def test_a_key_that_was_brought_into_the_token_is_known_for_it(softhsm: SoftHsm, uri: TokenUri) -> None:
    import pkcs11
    from pkcs11.util.ec import decode_ec_private_key, decode_ec_public_key

    own = generate_private_key(SECP256R1())
    session = softhsm.raw_session(uri.token)
    kept = {pkcs11.Attribute.TOKEN: True, pkcs11.Attribute.LABEL: "issuing", pkcs11.Attribute.ID: ID}
    plain = own.private_bytes(Encoding.DER, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    hidden = {pkcs11.Attribute.SENSITIVE: True, pkcs11.Attribute.EXTRACTABLE: False, pkcs11.Attribute.SIGN: True}
    session.create_object({**decode_ec_private_key(plain), **kept, **hidden})
    public = own.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    session.create_object({**decode_ec_public_key(public), **kept})
    softhsm.forget()

    (facts,) = softhsm.token(uri).private_keys()
    assert (facts.trouble, facts.made_there) == ("", False)
    found = softhsm.token(uri).find_key(uri)
    assert found is not None
    assert signs(found)


def test_another_key_under_the_same_name_is_found_out(softhsm: SoftHsm, uri: TokenUri, key: TokenKey) -> None:
    import pkcs11

    session = softhsm.raw_session(uri.token)
    for old in session.get_objects({pkcs11.Attribute.ID: ID}):
        old.destroy()
    raw_key(session, EXTRACTABLE=False, SENSITIVE=True)
    softhsm.forget()

    with pytest.raises(AuthorityError, match="its signatures are another key's"):
        key.prove()
    with pytest.raises(InvalidSignature):
        signs(key)


def test_keys_of_one_name_are_told_apart_by_their_ids(softhsm: SoftHsm, uri: TokenUri, key: TokenKey) -> None:
    softhsm.token(uri).make_key(replace(uri, id=b"\x07"))

    with pytest.raises(AuthorityError, match="the token has 2 that fit"):
        softhsm.token(uri).find_key(replace(uri, id=b""))
    found = softhsm.token(uri).find_key(uri)
    assert found is not None
    assert found.public_key() == key.public_key()


def test_a_key_with_another_ones_public_half_is_refused(softhsm: SoftHsm, uri: TokenUri, key: TokenKey) -> None:
    import pkcs11
    from pkcs11.util.ec import decode_ec_public_key

    assert signs(key)
    session = softhsm.raw_session(uri.token)
    for old in session.get_objects({pkcs11.Attribute.CLASS: pkcs11.ObjectClass.PUBLIC_KEY}):
        old.destroy()
    other = generate_private_key(SECP256R1()).public_key()
    der = other.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    named = {pkcs11.Attribute.TOKEN: True, pkcs11.Attribute.LABEL: "issuing", pkcs11.Attribute.ID: ID}
    session.create_object({**decode_ec_public_key(der), **named})
    softhsm.forget()

    with pytest.raises(AuthorityError, match="its signatures are another key's"):
        softhsm.token(uri).find_key(uri)


def test_a_key_without_its_public_half_is_refused(softhsm: SoftHsm, uri: TokenUri, key: TokenKey) -> None:
    import pkcs11

    for old in softhsm.raw_session(uri.token).get_objects({pkcs11.Attribute.CLASS: pkcs11.ObjectClass.PUBLIC_KEY}):
        old.destroy()
    softhsm.forget()

    with pytest.raises(AuthorityError, match="the token has no public key with its id"):
        softhsm.token(uri).find_key(uri)
    assert signs(key), "where the certificate has the public half, it is not needed"


# PINs


def test_a_pin_that_was_refused_is_not_tried_again(softhsm: SoftHsm, uri: TokenUri, key: TokenKey) -> None:
    softhsm.forget()
    tries: list[object] = []
    token = softhsm.token(uri, WRONG_PIN)
    found = token._found()

    def counted(**said: Any) -> Any:
        tries.append(said)
        return found.open(**said)

    flawed = Flawed(found, open=counted)
    token._found = lambda: flawed  # type: ignore[method-assign]

    for _ in range(3):
        with pytest.raises(AuthorityError, match="the PIN is wrong") as refused:
            token.private_keys()
        assert WRONG_PIN.decode() not in refused.value.message + refused.value.hint
        assert refused.value.__cause__ is None
    assert len(tries) == 1
    assert softhsm.token(uri).facts().failed_before
    assert softhsm.token(uri).private_keys(), "the right one is taken all the same"
    assert not softhsm.token(uri).facts().failed_before


def test_who_shares_a_login_must_know_its_pin(softhsm: SoftHsm, uri: TokenUri, key: TokenKey) -> None:
    assert signs(key)
    with pytest.raises(AuthorityError, match="the PIN is wrong"):
        softhsm.token(uri, WRONG_PIN).private_keys()
    assert signs(key)


def test_the_last_try_is_left_to_a_person(
    softhsm: SoftHsm, uri: TokenUri, key: TokenKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    softhsm.forget()
    real = token_facts
    monkeypatch.setattr(pkcs11, "token_facts", lambda token: replace(real(token), last_try=True))

    with pytest.raises(AuthorityError, match="one more wrong PIN would lock it") as refused:
        softhsm.token(uri).private_keys()
    assert "a person" in refused.value.hint
    assert softhsm.token(uri, by_person=True).private_keys()


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        ("PinLocked", "its PIN is locked"),
        ("PinExpired", "its PIN has expired"),
        ("UserPinNotInitialized", "it has no PIN yet"),
        ("TokenNotPresent", "it is not there"),
        ("DeviceRemoved", "it was taken out"),
        ("GeneralError", "it answers with GeneralError"),
    ],
)
def test_why_a_token_does_not_open_is_said(softhsm: SoftHsm, uri: TokenUri, error: str, cause: str) -> None:
    import pkcs11

    def fail(**_said: object) -> None:
        raise getattr(pkcs11, error)

    token = softhsm.token(uri)
    flawed = Flawed(token._found(), open=fail)
    token._found = lambda: flawed  # type: ignore[method-assign]

    with pytest.raises(AuthorityError, match=cause) as refused:
        token.private_keys()
    assert refused.value.message.startswith(f"could not read the token {uri.token}: ")
    assert refused.value.hint


def test_a_locked_token_is_not_tried(softhsm: SoftHsm, uri: TokenUri, monkeypatch: pytest.MonkeyPatch) -> None:
    real = token_facts
    monkeypatch.setattr(pkcs11, "token_facts", lambda token: replace(real(token), locked=True))

    with pytest.raises(AuthorityError, match="its PIN is locked"):
        softhsm.token(uri, by_person=True).private_keys()
    assert not real(softhsm.token(uri)._found()).failed_before


def test_a_pin_that_is_no_text_is_refused(softhsm: SoftHsm, uri: TokenUri) -> None:
    with pytest.raises(AuthorityError, match="the PIN is not UTF-8 text"):
        softhsm.token(uri, b"\xff\xfe12").private_keys()


def test_what_holds_a_pin_or_a_passphrase_does_not_show_it() -> None:
    assert "135790" not in repr(Login(None, b"135790")) + repr(RootKey(b"135790"))


def test_the_state_of_a_pin_in_a_word() -> None:
    facts = TokenFacts("a", "1", "m", "v", has_pin=True, failed_before=False, last_try=False, locked=False)

    assert facts.state == "ready"
    assert replace(facts, failed_before=True).state == "a wrong PIN was given"
    assert replace(facts, failed_before=True, last_try=True).state == "one try left"
    assert replace(facts, failed_before=True, locked=True).state == "PIN locked"
    assert replace(facts, has_pin=False).state == "no PIN"


# Tokens and modules that are not there


def test_a_token_that_is_taken_out_is_missed_and_used_again(softhsm: SoftHsm, key: TokenKey) -> None:
    assert signs(key)
    softhsm.take_out()
    try:
        for _ in range(2):
            with pytest.raises(AuthorityError) as refused:
                signs(key)
            assert refused.value.hint
    finally:
        softhsm.put_back()
    assert signs(key)


def test_a_session_that_was_lost_is_opened_anew(softhsm: SoftHsm, uri: TokenUri, key: TokenKey) -> None:
    assert signs(key)
    for login in PROCESS.logins.values():
        login.session.close()
    assert signs(key)


def test_a_token_that_is_not_there(softhsm: SoftHsm) -> None:
    with pytest.raises(AuthorityError, match="could not find the token nobody: it is not there") as refused:
        softhsm.token(TokenUri("nobody")).facts()
    assert "birthmark ca token list" in refused.value.hint


def test_two_tokens_of_one_name_are_told_apart_by_their_serial_numbers(softhsm: SoftHsm) -> None:
    uri = softhsm.new_token("twin")
    softhsm.new_token("twin")

    serials = [facts.serial for facts in tokens_in(softhsm.module) if facts.label == "twin"]

    with pytest.raises(AuthorityError, match="2 have that name") as refused:
        softhsm.token(uri).facts()
    assert all(serial in refused.value.hint for serial in serials)
    for serial in serials:
        assert softhsm.token(replace(uri, serial=serial)).facts().serial == serial


@pytest.mark.parametrize("content", [None, b"junk"])
def test_a_module_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "module.so"
    if content:
        path.write_bytes(content)

    with pytest.raises(AuthorityError, match=r"could not use the PKCS#11 module .*module\.so: ") as refused:
        tokens_in(path)
    assert refused.value.message.count(str(path)) == 1
    with pytest.raises(AuthorityError, match="could not use the PKCS#11 module"):
        Token(TokenUri("a"), path, Pin(lambda: PIN, by_person=False)).facts()


def test_without_the_library_the_error_says_how_to_install_it(
    softhsm: SoftHsm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pkcs11", None)

    with pytest.raises(ConfigurationError, match="python-pkcs11 is missing") as refused:
        softhsm.token(TokenUri("a")).facts()
    assert refused.value.hint == "pip install 'birthmark[hsm]'"
    monkeypatch.undo()
