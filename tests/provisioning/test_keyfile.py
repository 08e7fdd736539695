"""CA keys in files: encrypted, readable by OpenSSL, refused in every wrong case."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from support.patience import PATIENCE_S
from support.station import CHEAP, PASSPHRASE

from birthmark.device.errors import AuthorityError
from birthmark.device.pem import block, read_blocks
from birthmark.provisioning.encrypted_key import DEFAULT_DERIVATION, LABEL
from birthmark.provisioning.keyfile import encrypted_pem, read_key, write_key

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize("passphrase", [PASSPHRASE, b"x", "pässword \N{KEY}".encode(), b"y" * 1000])
def test_a_key_comes_back_and_openssl_can_read_it(
    tmp_path: Path, key: ec.EllipticCurvePrivateKey, passphrase: bytes
) -> None:
    path = tmp_path / "ca.key.pem"
    write_key(path, key, passphrase, CHEAP)
    assert path.stat().st_mode & 0o777 == 0o400
    assert read_key(path, passphrase, whose="the CA").private_numbers() == key.private_numbers()
    command = ["openssl", "pkey", "-in", str(path), "-passin", "stdin", "-pubout"]
    done = subprocess.run(command, input=passphrase + b"\n", capture_output=True, timeout=PATIENCE_S, check=True)
    assert done.stdout == key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_the_real_derivation_is_strong_and_openssl_reads_it(
    tmp_path: Path, key: ec.EllipticCurvePrivateKey
) -> None:
    path = tmp_path / "ca.key.pem"
    write_key(path, key, PASSPHRASE)
    command = ["openssl", "asn1parse", "-in", str(path)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout
    assert "1.3.6.1.4.1.11591.4.11" in shown or "scrypt" in shown
    numbers = [int(number, 16) for number in re.findall(r"INTEGER\s+:([0-9A-F]+)", shown)]
    assert numbers == [DEFAULT_DERIVATION.cost, DEFAULT_DERIVATION.block_size, DEFAULT_DERIVATION.parallelism]
    # OWASP: at 32 MiB, at least N = 2^15, r = 8, p = 3; memory is 128 N r octets.
    assert 2**14 * 8 < numbers[0] * numbers[1] <= 2**15 * 8
    assert numbers[0] * numbers[1] * numbers[2] >= 2**15 * 8 * 3
    command = ["openssl", "pkey", "-in", str(path), "-passin", "stdin", "-noout"]
    subprocess.run(command, input=PASSPHRASE + b"\n", timeout=PATIENCE_S, check=True)


def test_the_key_itself_is_not_in_the_file(key: ec.EllipticCurvePrivateKey) -> None:
    plain = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    one, two = encrypted_pem(key, PASSPHRASE, CHEAP), encrypted_pem(key, PASSPHRASE, CHEAP)
    assert one != two  # salt and IV are fresh
    assert plain not in one


@pytest.mark.parametrize("wrong", [b"wrong", PASSPHRASE + b" ", PASSPHRASE[:-1], b"\0"])
def test_a_wrong_passphrase_is_said_to_be_wrong(
    tmp_path: Path, key: ec.EllipticCurvePrivateKey, wrong: bytes
) -> None:
    path = tmp_path / "ca.key.pem"
    write_key(path, key, PASSPHRASE, CHEAP)
    with pytest.raises(AuthorityError, match=r"the issuing CA's key .*passphrase is wrong") as caught:
        read_key(path, wrong, whose="the issuing CA")
    assert caught.value.exit_code == 6
    assert wrong.decode() not in caught.value.hint or len(wrong) < 3
    assert PASSPHRASE.decode() not in str(caught.value)


def test_an_empty_passphrase_is_refused(tmp_path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    path = tmp_path / "ca.key.pem"
    with pytest.raises(AuthorityError, match="empty"):
        write_key(path, key, b"", CHEAP)
    assert not path.exists()
    write_key(path, key, PASSPHRASE, CHEAP)
    with pytest.raises(AuthorityError):
        read_key(path, b"", whose="the CA")


def test_a_missing_key_says_that_it_may_have_been_moved(tmp_path: Path) -> None:
    with pytest.raises(AuthorityError, match="not there") as caught:
        read_key(tmp_path / "none.pem", PASSPHRASE, whose="the root CA")
    assert "bring it back" in caught.value.hint
    with pytest.raises(AuthorityError, match="it is a folder"):
        read_key(tmp_path, PASSPHRASE, whose="the CA")


@pytest.mark.parametrize("mode", [0o440, 0o404, 0o644, 0o600 | 0o020])
def test_a_key_that_others_can_touch_is_refused(
    tmp_path: Path, key: ec.EllipticCurvePrivateKey, mode: int
) -> None:
    path = tmp_path / "ca.key.pem"
    write_key(path, key, PASSPHRASE, CHEAP)
    path.chmod(mode)
    with pytest.raises(AuthorityError, match="other users") as caught:
        read_key(path, PASSPHRASE, whose="the CA")
    assert "chmod 400" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"hello", b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n", b"\xff" * 100])
def test_a_damaged_key_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ca.key.pem"
    path.write_bytes(content)
    path.chmod(0o400)
    with pytest.raises(AuthorityError):
        read_key(path, PASSPHRASE, whose="the CA")


def test_no_flipped_bit_makes_another_key_of_it_or_anything_but_a_clear_error(
    tmp_path: Path, key: ec.EllipticCurvePrivateKey
) -> None:
    path, said = tmp_path / "ca.key.pem", 0
    ((_, der),) = read_blocks(encrypted_pem(key, PASSPHRASE, CHEAP))
    path.touch(mode=0o600)
    for place in range(len(der)):
        for bit in range(8):
            damaged = bytearray(der)
            damaged[place] ^= 1 << bit
            path.write_bytes(block(LABEL, bytes(damaged)))
            try:
                assert read_key(path, PASSPHRASE, whose="the CA").private_numbers() == key.private_numbers()
            except AuthorityError:
                said += 1
    assert said > len(der)


def test_keys_of_another_kind_are_refused(tmp_path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    path = tmp_path / "ca.key.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o400)
    with pytest.raises(AuthorityError, match="no encrypted private key"):
        read_key(path, PASSPHRASE, whose="the CA")
    other = ec.generate_private_key(ec.SECP384R1())
    path.chmod(0o600)
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(PASSPHRASE)))
    with pytest.raises(AuthorityError, match="P-256"):
        read_key(path, PASSPHRASE, whose="the CA")


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AuthorityError):
        read_key(tmp_path / "file" / "key.pem", PASSPHRASE, whose="the CA")
