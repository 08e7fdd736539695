"""Encrypted files: what age reads of ours, what we read of age's, and nothing but our error for anything else."""

from __future__ import annotations

import io
import os

import pyrage
import pytest
from hypothesis import given
from hypothesis import strategies as st

from birthmark.provisioning.age import CHUNK_BYTES, MAX_COST_LOG2, AgeError, Decrypting, Encrypting

CHEAP = 2
WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 200_000]


def sealed(content: bytes, passphrase: bytes = b"hello", *, piece: int = 10_007) -> bytes:
    file = io.BytesIO()
    encrypting = Encrypting(file, passphrase, cost_log2=CHEAP)
    for start in range(0, len(content), piece):
        encrypting.write(content[start : start + piece])
    encrypting.finish()
    return file.getvalue()


def opened(content: bytes, passphrase: bytes = b"hello") -> bytes:
    return Decrypting(io.BytesIO(content), passphrase).read()


@pytest.mark.parametrize("size", SIZES)
def test_age_reads_what_we_write_and_so_do_we(size: int) -> None:
    plain = os.urandom(size)
    file = sealed(plain)
    assert pyrage.passphrase.decrypt(file, "hello") == plain
    assert opened(file) == plain


@pytest.mark.proof
@pytest.mark.skipif(not WHOLE, reason="age itself takes seconds and half a gigabyte for a passphrase")
def test_we_read_what_age_writes() -> None:
    plain = os.urandom(70_000)
    assert opened(pyrage.passphrase.encrypt(plain, "hello")) == plain


def test_a_file_cut_anywhere_is_refused() -> None:
    file = sealed(os.urandom(2 * CHUNK_BYTES))
    head = file.index(b"---")
    places = [*range(head + 80), *range(head + 80, len(file), 4_999), len(file) - 1, len(file) - CHUNK_BYTES - 16]
    for place in places:
        with pytest.raises(AgeError):
            opened(file[:place])
    assert opened(file)


def test_a_file_changed_anywhere_is_refused() -> None:
    file = sealed(b"x" * 100)
    for place in range(len(file)):
        changed = bytearray(file)
        changed[place] ^= 1
        with pytest.raises(AgeError):
            opened(bytes(changed))
    with pytest.raises(AgeError):
        opened(file + b"\0")


def test_chunks_that_are_moved_left_out_or_of_another_file_are_refused() -> None:
    file = sealed(os.urandom(3 * CHUNK_BYTES))
    start = len(file) - 3 * (CHUNK_BYTES + 16)
    head, *chunks = file[:start], *(file[start + n * (CHUNK_BYTES + 16) :][: CHUNK_BYTES + 16] for n in range(3))
    for order in ((1, 0, 2), (0, 2), (0, 1), (0, 1, 1, 2), (2,)):
        with pytest.raises(AgeError, match="changed, or its end is missing"):
            opened(head + b"".join(chunks[n] for n in order))


def test_a_wrong_passphrase_says_so_and_an_empty_one_too() -> None:
    with pytest.raises(AgeError, match="the passphrase is wrong"):
        opened(sealed(b"x"), b"hell")
    with pytest.raises(AgeError, match="the passphrase is empty"):
        sealed(b"x", b"")


def test_a_file_cannot_ask_for_unbounded_work() -> None:
    file = sealed(b"x").replace(b" %d\n" % CHEAP, b" %d\n" % (MAX_COST_LOG2 + 1), 1)
    with pytest.raises(AgeError, match=r"asks for 2\^21 rounds"):
        opened(file)


def test_other_files_are_told_from_newer_ones() -> None:
    for other in (b"", b"rubbish", b"\x1f\x8b\x08" + bytes(100)):
        with pytest.raises(AgeError, match="it is no encrypted backup"):
            opened(other)
    with pytest.raises(AgeError, match="does not know"):
        opened(sealed(b"x").replace(b"/v1", b"/v2", 1))


@given(st.binary(max_size=300))
def test_any_bytes_give_only_our_error(content: bytes) -> None:
    for file in (content, b"age-encryption.org/v1\n" + content, b"age-encryption.org/v1\n-> scrypt " + content):
        with pytest.raises(AgeError):
            opened(file)
