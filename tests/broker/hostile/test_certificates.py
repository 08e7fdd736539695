"""Certificates that must not get anybody in, each shown to a real gateway by a real client.

The control beside each: a server that goes by less (`support.lax_server`) takes the same client with the same
certificate, so it is the gateway that refuses, and not a client that could not have done it anyway.
"""

from __future__ import annotations

import base64
import datetime as dt
import ssl
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support import mqtt_client as mqtt
from support.lax_server import EVERY_SUITE, READY, openssl_client
from support.mqtt_client import client_context
from support.mqtt_world import replace
from support.pki import (
    ECDSA_SHA1_DER,
    SERVER,
    Authority,
    Issued,
    Pki,
    crl_pem,
    der,
    new_key,
    now,
    usage,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.lax_server import LaxServer
    from support.mqtt_world import ProcessWorld

DAY = dt.timedelta(days=1)
COMMON_NAME = x509.NameOID.COMMON_NAME


def _self_signed(_: Pki) -> Issued:
    own = Authority.create("sensor-1", is_ca=False)
    return Issued(own.key, own.der)


def _by_a_leaf(pki: Pki) -> Issued:
    leaf = pki.device("sensor-9")
    return Authority(leaf.key, leaf.der, pki.issuing).issue()


HOSTILE: dict[str, Callable[[Pki], Issued]] = {
    "self-signed": _self_signed,
    "signed by a leaf": _by_a_leaf,
    "another CA of the same name": lambda pki: pki.stranger.device(),
    "another CA that claims our key": lambda pki: pki.stranger.issue(authority_key_id=pki.issuing.ski),
    "the root": lambda pki: pki.root.device(),
    "another CA below the root": lambda pki: Authority.create("Second", parent=pki.root).device(),
    "forged signature": lambda pki: pki.issuing.issue(signer=new_key()),
    "expired": lambda pki: pki.issuing.issue(not_before=now() - 3 * DAY, not_after=now() - DAY),
    "not yet valid": lambda pki: pki.issuing.issue(not_before=now() + DAY),
    "server only": lambda pki: pki.issuing.issue(usages=[SERVER]),
    "no extended key usage": lambda pki: pki.issuing.issue(usages=None),
    "CA": lambda pki: pki.issuing.issue(is_ca=True),
    "may sign certificates": lambda pki: pki.issuing.issue(key_usage=usage("digital_signature", "key_cert_sign")),
    "no key identifier": lambda pki: pki.issuing.issue(authority_key_id=None),
    "unknown critical extension": lambda pki: pki.issuing.issue(
        extra=[(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.55555.1"), b"\5\0"), True)]
    ),
    "RSA-2048": lambda pki: pki.issuing.issue(key=new_key("rsa")),
    "RSA-1024": lambda pki: pki.issuing.issue(
        key=rsa.generate_private_key(public_exponent=65_537, key_size=1_024)  # noqa: S505 - it must be refused
    ),
    "P-384": lambda pki: pki.issuing.issue(key=new_key("p384")),
    "SHA-1": lambda pki: pki.issuing.issue(algorithm_der=ECDSA_SHA1_DER),
    "CN: plus": lambda pki: pki.issuing.issue(cns=["+"]),
    "CN: hash": lambda pki: pki.issuing.issue(cns=["#"]),
    "CN: slash": lambda pki: pki.issuing.issue(cns=["a/b"]),
    "CN: dollar": lambda pki: pki.issuing.issue(cns=["$SYS"]),
    "CN: dollar inside": lambda pki: pki.issuing.issue(cns=["sensor$1"]),
    "CN: NUL at the end": lambda pki: pki.issuing.issue(cns=["sensor-1\0"]),
    "CN: NUL inside": lambda pki: pki.issuing.issue(cns=["sensor-1\0.example"]),
    "CN: newline": lambda pki: pki.issuing.issue(cns=["sensor-1\n"]),
    "CN: space": lambda pki: pki.issuing.issue(cns=["sensor-1 "]),
    "CN: colon": lambda pki: pki.issuing.issue(cns=["sensor-1:x"]),
    "CN: empty": lambda pki: pki.issuing.issue(cns=[""]),
    "CN: 64 characters": lambda pki: pki.issuing.issue(cns=["x" * 64]),
    "CN: 65 characters": lambda pki: pki.issuing.issue(cns=["x" * 65]),
    "CN: right-to-left override": lambda pki: pki.issuing.issue(cns=["\u202esensor-1"]),
    "CN: right-to-left mark": lambda pki: pki.issuing.issue(cns=["sensor-1\u200f"]),
    "CN: zero-width joiner": lambda pki: pki.issuing.issue(cns=["sensor\u200d-1"]),
    "CN: Cyrillic letter": lambda pki: pki.issuing.issue(cns=["s\u0435nsor-1"]),
    "CN: full-width digit": lambda pki: pki.issuing.issue(cns=["sensor-\uff11"]),
    "CN: non-breaking hyphen": lambda pki: pki.issuing.issue(cns=["sensor\u20111"]),
    "CN: two": lambda pki: pki.issuing.issue(cns=["sensor-1", "sensor-2"], san=None),
    "CN: in the SAN alone": lambda pki: pki.issuing.issue(
        cns=[], san=[x509.DirectoryName(x509.Name([x509.NameAttribute(COMMON_NAME, "sensor-1")]))]
    ),
    "role: none": lambda pki: pki.issuing.issue(ous=[]),
    "role: two": lambda pki: pki.issuing.issue(ous=["device", "operator"]),
}
NAMES = {
    "CN: plus": "+",
    "CN: hash": "#",
    "CN: slash": "a/b",
    "CN: dollar": "$SYS",
    "CN: dollar inside": "sensor$1",
    "CN: space": "sensor-1 ",
    "CN: colon": "sensor-1:x",
    "CN: 64 characters": "x" * 64,
    "CN: 65 characters": "x" * 65,
    "CN: two": "sensor-2",
}
"""What else a client with that certificate may call itself: its own CN."""


def able_context(world: ProcessWorld, pem: bytes, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    """A client that can do whatever OpenSSL can."""
    path = world.folder / "hostile.pem"
    path.write_bytes(pem)
    context = client_context(None, world.folder / "root.pem", version=version)
    context.set_ciphers(EVERY_SUITE)
    context.load_cert_chain(path)
    return context


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_certificate_gets_nobody_in(world: ProcessWorld, lax: LaxServer, what: str) -> None:
    issued = HOSTILE[what](world.pki)
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = able_context(world, issued.pem, version)
        assert lax.was_shown_a_certificate(context), "the control: this client gets through"
        for client_id in {"sensor-1", NAMES.get(what, "")}:
            assert world.answer(context, mqtt.connect(client_id)) in (None, 5)
    assert world.lets_in(able_context(world, world.pki.device().pem)), "the control: a good one gets in"


def test_the_log_is_ascii_whatever_a_certificate_says(world: ProcessWorld) -> None:
    issued = world.pki.issuing.issue(cns=["\x1b[31m\u202eevil"])
    assert world.answer(able_context(world, issued.pem), mqtt.connect("sensor-1")) == 5
    said = world.broker.wait_for_log("evil")
    assert said["message"].isascii()
    assert said["message"].isprintable()
    assert said["event"] == "peer_refused"


def test_no_certificate_gets_nobody_in(world: ProcessWorld, lax: LaxServer) -> None:
    context = client_context(None, world.folder / "root.pem")
    assert lax.accepts(context)
    assert not world.lets_in(context)


def _sec1_pem(private: ec.EllipticCurvePrivateKey, public: ec.EllipticCurvePublicKey) -> bytes:
    """A key file (RFC 5915) whose public part is another key's: OpenSSL goes by it when it compares."""
    scalar = private.private_numbers().private_value.to_bytes(32)
    point = public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    p256 = bytes.fromhex("06082a8648ce3d030107")
    key_der = der(
        0x30, der(0x02, b"\1") + der(0x04, scalar) + der(0xA0, p256) + der(0xA1, der(0x03, b"\0" + point))
    )
    return b"-----BEGIN EC PRIVATE KEY-----\n" + base64.encodebytes(key_der) + b"-----END EC PRIVATE KEY-----\n"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_certificate_without_its_key_gets_nobody_in(world: ProcessWorld, version: ssl.TLSVersion) -> None:
    """A certificate is no secret: whoever copied one has not copied the identity."""
    victim, thief = world.pki.device(), new_key()
    assert isinstance(victim.key, ec.EllipticCurvePrivateKey)
    assert isinstance(thief, ec.EllipticCurvePrivateKey)
    certificates = victim.pem[victim.pem.index(b"-----BEGIN CERT") :]
    own = _sec1_pem(victim.key, victim.key.public_key())
    stolen = _sec1_pem(thief, victim.key.public_key())
    assert not world.lets_in(able_context(world, stolen + certificates, version))
    assert world.lets_in(able_context(world, own + certificates, version)), "the control: with its key it does"


def test_a_key_on_p192_gets_nobody_in(world: ProcessWorld, lax: LaxServer) -> None:
    """Only TLS 1.2 can show such a certificate, and only a client that offers the curve."""
    key = ec.generate_private_key(ec.SECP192R1())
    hostile, good = world.pki.issuing.issue(key=key), world.pki.device()
    accepted = b"\x20\x02\0\0"

    def says(port: int, issued: Issued, what: bytes, until: bytes) -> bytes:
        path = issued.write(world.folder / "s_client.pem")
        options = ("-tls1_2", "-groups", "P-256:P-192", "-cipher", EVERY_SUITE)
        credentials = ("-cert", path, "-key", path, "-cert_chain", path)
        return openssl_client(port, *options, *credentials, steps=[(READY, what)], until=until)

    assert b"cba" in says(lax.port, hostile, b"abc\n", b"cba"), "the control: this client gets through"
    assert accepted not in says(world.port, hostile, mqtt.connect("sensor-1"), accepted)
    answer = says(world.port, good, mqtt.connect("sensor-1"), accepted)
    assert accepted in answer, "the control: with a key on P-256 it does"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_revoked_certificate_gets_nobody_in_not_with_an_old_ticket_either(
    world: ProcessWorld, version: ssl.TLSVersion
) -> None:
    lost = world.pki.device("lost")
    context = world.context_of(lost, version=version)
    with world.open(context).handshake(mqtt.connect("lost")) as client:
        client.ping()  # the session ticket has arrived
        session = client.tls.session
    with world.open(context, session=session).handshake(mqtt.connect("lost")) as client:
        assert client.tls.session_reused, "the control: the ticket is good"
        client.ping()
        session = client.tls.session

    (in_force,) = world.status().crl_numbers.values()
    crl_der = world.pki.issuing.crl([lost.cert_serial], number=in_force + 1)
    replace(world.folder / "crl.pem", crl_pem(crl_der))
    world.broker.wait_for_log(f"CRL {in_force + 1} from")

    assert world.answer(context, mqtt.connect("lost"), session=session) == 5
    assert world.answer(context, mqtt.connect("lost")) == 5
    assert world.lets_in(world.context("sensor-1"))
