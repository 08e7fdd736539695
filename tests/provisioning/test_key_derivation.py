"""The key of a CA's key file, derived ahead: the time alone changes, never what is decided."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st
from support.patience import PATIENCE_S
from support.station import CHEAP, PASSPHRASE, enrolled_row

from birthmark.device.errors import AuthorityError
from birthmark.device.pem import block
from birthmark.provisioning import crl_template, crls, entry, key_derivation, passphrase
from birthmark.provisioning.crls import read_ahead, sign_and_store_crl
from birthmark.provisioning.encrypted_key import LABEL, EncryptedKey, KeyDerivation
from birthmark.provisioning.founding import found_station
from birthmark.provisioning.keyfile import encrypted_pem, read_key, replace_key
from birthmark.provisioning.passphrase import PassphraseSource
from birthmark.provisioning.revocation import revoke
from birthmark.provisioning.rollover.phases import activate
from birthmark.provisioning.rollover.starting import RootKey, start_issuing
from birthmark.provisioning.settings import Settings
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from pathlib import Path

KEY = ec.generate_private_key(ec.SECP256R1())


class Derivations:
    """Which thread has derived a key, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: list[threading.Thread] = []
        derive = KeyDerivation.derive

        def noted(derivation: KeyDerivation, passphrase: bytes, salt: bytes) -> bytes:
            self.threads.append(threading.current_thread())
            return derive(derivation, passphrase, salt)

        monkeypatch.setattr(KeyDerivation, "derive", noted)

    @property
    def count(self) -> int:
        return len(self.threads)


@pytest.fixture
def derivations(monkeypatch: pytest.MonkeyPatch) -> Derivations:
    monkeypatch.setenv("BIRTHMARK_PASSPHRASE", PASSPHRASE.decode())
    monkeypatch.setattr(key_derivation, "_under_way", {})
    monkeypatch.setattr(passphrase, "_early", {})
    return Derivations(monkeypatch)


def key_path(station: Station) -> Path:
    return station.key_path(station.cas.for_clients)


def test_what_is_derived_ahead_is_taken_and_not_derived_again(station: Station, derivations: Derivations) -> None:
    key_derivation.derive_ahead(station.folder)
    assert station.authority.key_id == station.cas.for_clients.key_id
    assert derivations.count == 1
    assert derivations.threads[0] is not threading.main_thread()
    read_key(key_path(station), PASSPHRASE, whose="the CA")
    assert derivations.count == 2, "it was kept beyond its one use"


def test_what_a_crl_lists_is_made_ready_while_a_key_is_derived_and_not_without(
    station: Station, derivations: Derivations, monkeypatch: pytest.MonkeyPatch
) -> None:
    del derivations
    rows = [enrolled_row(station, name) for name in ("sensor-1", "sensor-2")]
    revoke(station, "sensor-1", x509.ReasonFlags.superseded)
    crl_template.entry.cache_clear()
    read_ahead(station)
    assert crl_template.entry.cache_info().currsize == 0
    derive, go_on = KeyDerivation.derive, threading.Event()

    def waiting(derivation: KeyDerivation, passphrase: bytes, salt: bytes) -> bytes:
        assert go_on.wait(PATIENCE_S)
        return derive(derivation, passphrase, salt)

    monkeypatch.setattr(KeyDerivation, "derive", waiting)
    key_derivation.derive_ahead(station.folder)
    with monkeypatch.context() as small:
        small.setattr(crls, "REVOKED_AT_HAND", 0)
        read_ahead(station)
    assert crl_template.entry.cache_info().currsize == 0, "they would not be at hand any more when they are needed"
    read_ahead(station)
    assert crl_template.entry.cache_info().currsize == 1
    with station.registry.transaction() as transaction:  # by somebody else, meanwhile
        transaction.update(rows[1].changed(revoked_at=station.clock(), revocation_reason="superseded"))
    go_on.set()
    opened = Station.open(station.folder, passphrase=PASSPHRASE, clock=station.clock)
    assert sign_and_store_crl(opened).cert_serials == {row.cert_serial for row in rows}
    assert crl_template.entry.cache_info().misses == 2


def test_a_file_that_was_replaced_meanwhile_is_read_as_it_is_now(
    station: Station, derivations: Derivations
) -> None:
    path, other = key_path(station), b"another one"
    key = read_key(path, PASSPHRASE, whose="the CA")
    key_derivation.derive_ahead(station.folder)
    replace_key(path, key, PASSPHRASE, CHEAP)  # under the same passphrase, with another salt
    assert read_key(path, PASSPHRASE, whose="the CA").private_numbers() == key.private_numbers()
    key_derivation.derive_ahead(station.folder)
    replace_key(path, key, other, CHEAP)
    with pytest.raises(AuthorityError, match="passphrase is wrong"):
        read_key(path, PASSPHRASE, whose="the CA")
    assert read_key(path, other, whose="the CA").private_numbers() == key.private_numbers()


@pytest.mark.parametrize(
    "none",
    [KeyDerivation(cost=15), KeyDerivation(cost=1 << 70, block_size=0)],
    ids=["no-power-of-two", "no-number-of-64-bits"],
)
def test_a_derivation_that_fails_is_left_to_whoever_needs_the_key(
    station: Station, derivations: Derivations, none: KeyDerivation
) -> None:
    path = key_path(station)
    damaged = EncryptedKey(none, bytes(16), bytes(16), bytes(144))
    path.chmod(0o600)
    path.write_bytes(damaged.pem)
    path.chmod(0o400)
    key_derivation.derive_ahead(station.folder)
    with pytest.raises(AuthorityError, match="the file is damaged"):
        station.authority  # noqa: B018
    assert derivations.count == 2


@pytest.mark.parametrize(
    "why", ["no station", "no passphrase", "two keys, no certificates", "another form", "unreadable"]
)
def test_where_it_is_not_clear_nothing_is_begun(
    why: str, station: Station, derivations: Derivations, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, path = station.folder, key_path(station)
    if why == "no station":
        folder = tmp_path / "none"
    elif why == "no passphrase":
        monkeypatch.delenv("BIRTHMARK_PASSPHRASE")
    elif why == "two keys, no certificates":
        shutil.copy(path, path.with_name("issuing-00000000.key.pem"))
        (folder / "issuing.pem").unlink()
    else:
        path.unlink()
        path.mkdir() if why == "unreadable" else path.write_text("-----BEGIN NONSENSE-----")
    key_derivation.derive_ahead(folder)
    assert not key_derivation._under_way
    assert not derivations.count


@pytest.mark.parametrize(
    ("words", "begins"),
    [
        ("revoke sensor-1 --reason lost", True),
        ("crl --timeout 60", True),
        ("issue --from a.csv --out b", True),
        ("crl --json serve", False),
        ("crl status", False),
        ("revoke --help", False),
        ("revoke sensor-1 --reason lost --passphrase-fd three", False),
        ("crl --root --passphrase-fd 3 --root-passphrase-fd 3", False),
        ("crl --passphrase-fd 3 --pin-fd 3", False),
        ("revoke --station", False),
        ("show sensor-1", False),
        ("audit verify", False),
    ],
)
def test_which_commands_begin_with_it(
    words: str, begins: bool, station: Station, derivations: Derivations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIRTHMARK_STATION", str(station.folder))
    entry.parser(words.split())
    assert bool(key_derivation._under_way) is begins


def descriptor_with(content: bytes) -> int:
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    return reader


def test_a_passphrase_on_a_descriptor_is_read_ahead_and_once(
    station: Station, derivations: Derivations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BIRTHMARK_PASSPHRASE")
    reader = descriptor_with(PASSPHRASE + b"\n")
    entry.parser(["crl", "--station", str(station.folder), "--passphrase-fd", str(reader)])
    source = PassphraseSource(descriptor=reader)
    assert Station.open(station.folder, passphrase=source).authority.key_id == station.cas.for_clients.key_id
    assert derivations.count == 1
    assert derivations.threads[0] is not threading.main_thread()
    assert not passphrase._early
    with pytest.raises(AuthorityError, match="it is empty"):
        source.read()
    os.close(reader)


@pytest.mark.parametrize("wrong", ["closed", "empty", "another"])
def test_what_is_wrong_with_a_descriptor_is_said_when_the_key_is_needed(
    wrong: str, station: Station, derivations: Derivations
) -> None:
    reader = descriptor_with({"closed": b"", "empty": b"\n", "another": b"another"}[wrong])
    if wrong == "closed":
        os.close(reader)
    entry.parser(["crl", "--station", str(station.folder), "--passphrase-fd", str(reader)])
    causes = {
        "closed": f"could not read the passphrase from descriptor {reader}",
        "empty": "it is empty",
        "another": "the passphrase is wrong",
    }
    opened = Station.open(station.folder, passphrase=PassphraseSource(descriptor=reader))
    with pytest.raises(AuthorityError, match=causes[wrong]):
        opened.authority  # noqa: B018
    if wrong != "closed":
        os.close(reader)


def test_it_is_told_whether_one_is_under_way_while_another_thread_takes_one(
    station: Station, derivations: Derivations, monkeypatch: pytest.MonkeyPatch
) -> None:
    del derivations
    start_issuing(station, lambda: RootKey(PASSPHRASE), derivation=CHEAP)
    station.publish_certificates()
    key_derivation.derive_ahead(station.folder, every=True)
    first, second = key_derivation._under_way
    for ahead in key_derivation._under_way.values():
        ahead.join()

    def taken_meanwhile(ahead: threading.Thread) -> bool:
        del ahead
        key_derivation._under_way.pop(first, None)
        return False

    monkeypatch.setattr(key_derivation._Derivation, "is_alive", taken_meanwhile)
    assert not key_derivation.is_under_way()
    assert list(key_derivation._under_way) == [second]


def test_of_several_keys_those_of_trusted_cas_are_derived(station: Station, derivations: Derivations) -> None:
    old = station.cas.for_clients
    start_issuing(station, lambda: RootKey(PASSPHRASE), derivation=CHEAP)
    activate(station, force=True)
    new = station.cas.for_clients
    shutil.copy(station.key_path(old), station.key_path(old).with_name("issuing-00000000.key.pem"))  # not trusted
    station.publish_certificates()
    derivations.threads.clear()
    key_derivation.derive_ahead(station.folder)
    (only,) = key_derivation._under_way
    assert only.pem == station.key_path(new).read_bytes()
    key_derivation._under_way.clear()
    key_derivation.derive_ahead(station.folder, every=True)
    begun = [key.pem for key in key_derivation._under_way]
    assert begun == [station.key_path(ca).read_bytes() for ca in (new, old)]


def test_the_option_names_the_station(station: Station, derivations: Derivations, tmp_path: Path) -> None:
    entry.parser(["crl", f"--station={tmp_path / 'none'}"])
    assert not key_derivation._under_way
    entry.parser(["crl", "--station", str(station.folder)])
    assert key_derivation._under_way


def test_a_command_that_fails_meanwhile_ends_as_ever(tmp_path: Path) -> None:
    found_station(tmp_path / "station", Settings("Acme"), passphrase=PASSPHRASE).close()
    words = ["revoke", "nobody", "--reason", "lost", "--station", str(tmp_path / "station")]
    command = [sys.executable, "-m", "birthmark.provisioning", *words]
    environment = {**os.environ, "BIRTHMARK_PASSPHRASE": PASSPHRASE.decode()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert done.returncode == 6
    assert done.stderr.splitlines() == [
        "error: could not revoke nobody: there is no such identity",
        "hint: list them with `birthmark list`",
    ]


def test_the_word_of_an_unlocking_is_not_lost_with_a_transaction(station: Station) -> None:
    def told() -> int:
        return station.registry.audit_path.read_text().count('"action":"unlock"')

    before, key_id = told(), station.cas.for_clients.key_id
    station.check_key(key_id)
    assert told() == before, "nothing was signed yet"
    with pytest.raises(ZeroDivisionError), station.signing():
        raise ZeroDivisionError
    assert told() == before
    with station.signing() as transaction:
        transaction.record("crl", "issuing-ca")
    assert told() == before + 1
    assert station.authority.key_id == key_id
    with station.signing() as transaction:
        transaction.record("crl", "issuing-ca")
    assert told() == before + 1


def test_a_key_is_not_given_out_before_its_word_is_in_the_log(station: Station) -> None:
    station.check_key(station.cas.for_clients.key_id)
    log = station.registry.audit_path
    before = log.read_text().count('"action":"unlock"')
    station.authority.sign_transcript(b"anything")
    assert log.read_text().count('"action":"unlock"') == before + 1


# --- the form ----------------------------------------------------------------------------------------------------


@given(
    cost=st.integers(1, 1 << 40), size=st.integers(1, 1 << 20), lanes=st.integers(1, 1 << 20), sealed=st.binary()
)
def test_what_is_written_is_read(cost: int, size: int, lanes: int, sealed: bytes) -> None:
    key = EncryptedKey(KeyDerivation(cost, size, lanes), bytes(16), bytes(range(16)), sealed)
    found = EncryptedKey.from_pem(key.pem)
    assert found == (key if len(key.der) <= 1024 else None)


@given(st.binary(max_size=300))
def test_any_bytes_are_none(content: bytes) -> None:
    assert EncryptedKey.from_pem(content) is None
    assert EncryptedKey.from_pem(block(LABEL, content)) is None


@given(place=st.integers(0, 10_000), octet=st.integers(0, 255), cut=st.integers(0, 10_000))
def test_a_changed_file_is_another_key_or_none(place: int, octet: int, cut: int) -> None:
    der = bytearray(EncryptedKey(CHEAP, b"s" * 16, b"i" * 16, b"c" * 144).der)
    der[place % len(der)] = octet
    changed = bytes(der[: len(der) - cut % 20])
    found = EncryptedKey.from_pem(block(LABEL, changed))
    assert found is None or found.der == changed


@pytest.mark.parametrize(
    "form",
    [
        ["-scrypt"],
        ["-scrypt", "-scrypt_N", "32", "-scrypt_p", "2"],
        ["-v2", "aes-256-cbc"],
        ["-v2", "aes-128-cbc"],
    ],
)
def test_what_openssl_has_encrypted_is_opened_too(form: list[str], tmp_path: Path) -> None:
    plain = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    command = ["openssl", "pkcs8", "-topk8", *form, "-passout", f"pass:{PASSPHRASE.decode()}"]
    done = subprocess.run(command, input=plain, capture_output=True, check=True, timeout=30)
    path = tmp_path / "ca.key.pem"
    path.write_bytes(done.stdout)
    path.chmod(0o400)
    assert read_key(path, PASSPHRASE, whose="the CA").private_numbers() == KEY.private_numbers()
    with pytest.raises(AuthorityError, match="passphrase is wrong"):
        read_key(path, b"wrong", whose="the CA")


@pytest.mark.parametrize(
    "derivation",
    [
        KeyDerivation(cost=3),
        KeyDerivation(cost=1 << 17, block_size=1),
        KeyDerivation(cost=1 << 24),
        KeyDerivation(cost=2, block_size=1, parallelism=1 << 40),
    ],
    ids=["no power of two", "too large for its blocks", "too much memory", "too many lanes"],
)
def test_a_derivation_that_there_is_none_of_is_refused(derivation: KeyDerivation, tmp_path: Path) -> None:
    path = tmp_path / "ca.key.pem"
    path.write_bytes(EncryptedKey(derivation, bytes(16), bytes(16), bytes(144)).pem)
    path.chmod(0o400)
    with pytest.raises(AuthorityError, match="passphrase is wrong, or the file is damaged"):
        read_key(path, PASSPHRASE, whose="the CA")


def test_the_reader_agrees_with_cryptography() -> None:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    pem = encrypted_pem(KEY, PASSPHRASE, CHEAP)
    key = load_pem_private_key(pem, PASSPHRASE)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.private_numbers() == KEY.private_numbers()
    assert EncryptedKey.from_pem(pem) is not None
