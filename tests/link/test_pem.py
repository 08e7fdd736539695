"""PEM blocks: our reader against openssl's library, and text that is none."""

from __future__ import annotations

import contextlib
import ssl

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.agent_vectors import vectors

from birthmark.device.errors import CredentialError
from birthmark.device.pem import BUNDLE, CERTIFICATE, block, read_blocks

labels = st.sampled_from(["CERTIFICATE", "PRIVATE KEY", "X509 CRL", BUNDLE, "A-B C"])


@given(st.lists(st.tuples(labels, st.binary(max_size=300)), max_size=5))
def test_round_trip(blocks: list[tuple[str, bytes]]) -> None:
    text = b"".join(block(label, content) for label, content in blocks)
    assert read_blocks(text) == blocks
    assert read_blocks(text.replace(b"\n", b"\r\n")) == blocks
    assert all(len(line) <= 64 for line in text.splitlines())


def test_as_ssl_writes_and_reads_it() -> None:
    der = bytes.fromhex(vectors()["bundle"]["certificates"]["leaf"])
    assert ssl.PEM_cert_to_DER_cert(block(CERTIFICATE, der).decode()) == der
    assert read_blocks(ssl.DER_cert_to_PEM_cert(der).encode()) == [(CERTIFICATE, der)]


def test_text_around_the_blocks_is_ignored() -> None:
    text = b"subject=CN=x\n\n" + block("CERTIFICATE", b"one") + b"more -----BEGIN\n" + block("X", b"two") + b"end"
    assert read_blocks(text) == [("CERTIFICATE", b"one"), ("X", b"two")]
    assert read_blocks(b"") == []


@pytest.mark.parametrize(
    "text",
    [
        b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0",
        b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END CERTIFICATE-----\n",
        b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----BEGIN X-----\n-----END PRIVATE KEY-----\n",
        b"-----BEGIN PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nc2VjcmV0\n-----END PRIVATE KEY-----\n",
        b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0c\n-----END PRIVATE KEY-----\n",
        b"-----BEGIN PRIVATE KEY-----\nc2Vj=cmV0\n-----END PRIVATE KEY-----\n",
        b"-----BEGIN \xff-----\nc2VjcmV0\n-----END \xff-----\n",
        b"-----BEGIN -----\nc2VjcmV0\n-----END -----\n",
    ],
)
def test_what_is_no_block_is_refused_and_never_quoted(text: bytes) -> None:
    with pytest.raises(CredentialError) as refusal:
        read_blocks(text)
    assert "c2Vj" not in refusal.value.message
    assert refusal.value.__cause__ is None


def _read(text: bytes) -> list[tuple[str, bytes]] | str:
    try:
        return read_blocks(text)
    except CredentialError as error:
        return error.message


@given(
    st.lists(
        st.sampled_from(
            [b"-----BEGIN A-----", b"-----END A-----", b"-----BEGIN B-----", b"-----BEGIN A -----",
             b"-----END A -----", b"-----", b"AAAA", b"AAA=", b"AA=A", b"AAAAA", b" ",
             b"\n", b"\n", b"\n", b"\r\n", b"\xff"]
        ),
        max_size=9,
    ).map(b"".join)
)  # fmt: skip
@example(b"-----BEGIN A-----\nAAAA\n-----END A-----")
@example(b"-----BEGIN A-----\nAA AA\n-----END A-----\n")
@example(b"-----BEGIN A-----AAAA\n-----END A-----\n")
@example(b"-----BEGIN A-----\nAAAA-----END A-----\n")
@example(b"-----BEGIN A-----\nAAAAA\n-----END A-----\n")
@example(b"-----BEGIN A -----\nAAAA\n-----END A -----\n")
@example(b"-----BEGIN A-----\n-----END A-----\n")
def test_a_block_by_itself_is_read_as_it_is_among_others(text: bytes) -> None:
    alone, behind_text = _read(text), _read(b"text\n" + text)
    assert alone == behind_text


@given(st.binary(max_size=200) | st.lists(
    st.sampled_from([b"-----BEGIN A-----\n", b"-----END A-----\n", b"AAAA\n", b"A", b"-----BEGIN ", b"\r", b"\0"]),
    max_size=12).map(b"".join))  # fmt: skip
def test_any_bytes(text: bytes) -> None:
    with contextlib.suppress(CredentialError):
        read_blocks(text)
