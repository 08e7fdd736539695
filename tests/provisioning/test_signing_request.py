"""A certification request: what is read from its octets is what cryptography reads, and nothing else is taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from birthmark.provisioning.enrollment import signing_request
from birthmark.provisioning.enrollment.signing_request import RequestRefusedError, requested_key

if TYPE_CHECKING:
    from collections.abc import Sequence

KEY = ec.generate_private_key(ec.SECP256R1())
SPKI = KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
CN, ORGANIZATION = NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME
UTF8, PRINTABLE = _ASN1Type.UTF8String, _ASN1Type.PrintableString


def named(*attributes: x509.NameAttribute[str]) -> x509.Name:
    return x509.Name(attributes)


def cn(name: str, kind: _ASN1Type = UTF8) -> x509.NameAttribute[str]:
    return x509.NameAttribute(CN, name, _type=kind)


def request(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey = KEY,
    algorithm: SHA256 | SHA384 | None = None,
    extensions: Sequence[x509.ExtensionType] = (),
) -> bytes:
    builder = x509.CertificateSigningRequestBuilder(subject)
    for each in extensions:
        builder = builder.add_extension(each, critical=False)
    return builder.sign(key, algorithm or SHA256()).public_bytes(Encoding.DER)


@given(
    name=st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", fullmatch=True),
    kind=st.sampled_from([UTF8, PRINTABLE]),
    hosts=st.lists(st.just("a.example.com"), max_size=2),
)
def test_the_key_of_a_good_request(name: str, kind: _ASN1Type, hosts: list[str]) -> None:
    extensions = [x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts])] if hosts else []
    assert requested_key(request(named(cn(name, kind)), extensions=extensions), name) == SPKI


def test_the_usual_request_needs_no_closer_look(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = x509.load_der_x509_csr(request(named(cn("pump-1"))))
    assert signing_request._usual_key(usual.tbs_certrequest_bytes, "pump-1") == SPKI
    other = x509.load_der_x509_csr(request(named(cn("pump-1", PRINTABLE))))
    assert signing_request._usual_key(other.tbs_certrequest_bytes, "pump-1") == b""


@pytest.mark.parametrize(
    "subject",
    [
        named(cn("pump-2")),
        named(cn("pump-11")),
        named(cn("pump-")),
        named(cn("PUMP-1")),
        named(cn("pump-1"), cn("pump-1")),
        named(cn("pump-1"), x509.NameAttribute(ORGANIZATION, "Acme")),
        named(x509.NameAttribute(ORGANIZATION, "pump-1")),
        named(),
    ],
    ids=str,
)
def test_any_other_subject_is_refused(subject: x509.Name) -> None:
    with pytest.raises(RequestRefusedError, match="its subject is not exactly CN = pump-1"):
        requested_key(request(subject), "pump-1")


def test_another_key_or_signature_is_refused() -> None:
    with pytest.raises(RequestRefusedError, match="P-256"):
        requested_key(request(named(cn("pump-1")), ec.generate_private_key(ec.SECP384R1())), "pump-1")
    with pytest.raises(RequestRefusedError, match="SHA-256"):
        requested_key(request(named(cn("pump-1")), algorithm=SHA384()), "pump-1")


def test_a_signature_with_unused_bits_is_refused() -> None:
    # One whose last bit is 0 could be said to be one bit shorter, which changes nothing that is signed.
    der = next(der for _ in range(100) if not (der := request(named(cn("pump-1"))))[-1] & 1)
    signature = x509.load_der_x509_csr(der).signature
    shorter = der[: -len(signature) - 1] + b"\1" + signature
    assert x509.load_der_x509_csr(shorter).signature == signature
    with pytest.raises(RequestRefusedError, match="its signature is damaged"):
        requested_key(shorter, "pump-1")


@given(place=st.integers(0, 1000), bit=st.integers(0, 7))
def test_a_request_with_a_bit_turned_is_refused(place: int, bit: int) -> None:
    der = bytearray(request(named(cn("pump-1"))))
    der[place % len(der)] ^= 1 << bit
    with pytest.raises(RequestRefusedError):
        requested_key(bytes(der), "pump-1")
