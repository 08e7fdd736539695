"""What TLS the gateway speaks: 1.2 and 1.3, AEAD, forward secrecy; nothing that a scanner would note."""

from __future__ import annotations

import ssl
import warnings
from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.lax_server import EVERY_SUITE, READY, openssl_client
from support.mqtt_client import client_context

from birthmark.broker.tls import TLS12_SUITES

if TYPE_CHECKING:
    from pathlib import Path

    from support.lax_server import LaxServer
    from support.mqtt_world import ProcessWorld

TLS12, TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
ACCEPTED = b"\x20\x02\0\0"


@pytest.fixture(scope="module")
def credentials(world: ProcessWorld) -> Path:
    return world.pki.device().write(world.folder / "device.pem")


def able_context(world: ProcessWorld, credentials: Path, suites: str = EVERY_SUITE) -> ssl.SSLContext:
    context = client_context(None, world.folder / "root.pem")
    context.set_ciphers(suites)
    context.load_cert_chain(credentials)
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_no_version_before_1_2(
    world: ProcessWorld, lax: LaxServer, credentials: Path, version: ssl.TLSVersion
) -> None:
    context = able_context(world, credentials)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    assert lax.was_shown_a_certificate(context), "the control: this client gets through"
    assert not world.lets_in(context)


def test_of_tls_1_2_only_the_suites_with_aead_and_forward_secrecy(
    world: ProcessWorld, lax: LaxServer, credentials: Path
) -> None:
    every = able_context(world, credentials)
    every.maximum_version = TLS12
    names = {suite["name"] for suite in every.get_ciphers() if not suite["name"].startswith("TLS_")}
    taken, possible = set(), set()
    for name in names:
        context = able_context(world, credentials, f"{name}:@SECLEVEL=0")
        context.maximum_version = TLS12
        if lax.accepts(context):
            possible.add(name)
        if world.lets_in(context):
            taken.add(name)
    assert taken == set(TLS12_SUITES.split(":"))
    assert {"ECDHE-ECDSA-AES128-SHA256", "ECDHE-ECDSA-AES256-SHA"} <= possible, "the control: CBC is possible"
    assert not any(word in name for name in taken for word in ("SHA384-", "CBC", "RC4", "DES", "NULL"))


@pytest.mark.parametrize("version", [TLS12, TLS13])
def test_no_compression_and_a_suite_with_aead(
    world: ProcessWorld, credentials: Path, version: ssl.TLSVersion
) -> None:
    context = able_context(world, credentials)
    context.options &= ~ssl.OP_NO_COMPRESSION
    context.minimum_version = context.maximum_version = version
    with world.open(context).handshake(mqtt.connect("sensor-1")) as client:
        assert client.tls.compression() is None
        suite = client.tls.cipher()
    assert suite is not None
    assert any(word in suite[0] for word in ("GCM", "CHACHA20"))


def test_no_renegotiation(world: ProcessWorld, lax: LaxServer, credentials: Path) -> None:
    """It has cost servers dearly: a handshake for a byte, and data of before it taken for data of after it."""
    options = ("-tls1_2", "-cert", credentials, "-key", credentials, "-cert_chain", credentials)
    possible = openssl_client(
        lax.port, *options, steps=[(READY, b"R\n"), (b"RENEGOTIATING", b"abc\n")], until=b"cba"
    )
    assert b"RENEGOTIATING" in possible
    assert b"cba" in possible, "the control: where it is allowed, it works"
    refused = openssl_client(world.port, *options, steps=[(READY, b"R\n")], until=b"no renegotiation")
    assert b"RENEGOTIATING" in refused
    assert b"no renegotiation" in refused
    accepted = openssl_client(world.port, *options, steps=[(READY, mqtt.connect("sensor-1"))], until=ACCEPTED)
    assert ACCEPTED in accepted, "the control: without, the same client gets in"


def test_new_keys_on_tls_1_3_disturb_nobody(world: ProcessWorld, credentials: Path) -> None:
    """What TLS 1.3 has instead of renegotiation (RFC 8446 §4.6.3), asked of both sides."""
    options = ("-tls1_3", "-cert", credentials, "-key", credentials, "-cert_chain", credentials)
    steps = [(READY, b"K\n"), (b"KEYUPDATE", mqtt.connect("sensor-1"))]
    assert ACCEPTED in openssl_client(world.port, *options, steps=steps, until=ACCEPTED)
