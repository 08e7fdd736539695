"""Who is let in by the certificate: the profile, and every way to miss it."""

from __future__ import annotations

import datetime as dt
import functools
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st
from support.pki import (
    BMP_STRING,
    CLIENT,
    ECDSA_SHA1_DER,
    ECDSA_SHA384_DER,
    PRINTABLE_STRING,
    SERVER,
    T61_STRING,
    UTF8_STRING,
    Authority,
    Issued,
    Pki,
    der,
    new_key,
    now,
    usage,
)

from birthmark.broker.peer import PeerRefusedError, Trust, check_peer
from birthmark.broker.trust import read_trust
from birthmark.device.errors import BirthmarkError, CredentialError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DAY = dt.timedelta(days=1)


@functools.cache
def pki() -> Pki:
    return Pki.create()


@functools.cache
def trust() -> Trust:
    return Trust.from_pem(pki().issuing.pem)


@functools.cache
def sensor() -> Issued:
    return pki().device()


def refusal(
    issued: Issued | bytes, *, when: dt.datetime | None = None, by: Trust | None = None
) -> PeerRefusedError:
    leaf_der = issued if isinstance(issued, bytes) else issued.der
    with pytest.raises(PeerRefusedError) as caught:
        check_peer(leaf_der, by or trust(), when or now())
    assert caught.value.message.startswith("could not let a peer in: ")
    assert caught.value.message.isascii()
    assert caught.value.message.isprintable()
    assert caught.value.hint
    return caught.value


def test_a_device_certificate_is_let_in() -> None:
    issued = pki().device("sensor-17", "camera")
    peer = check_peer(issued.der, trust(), now())
    assert (str(peer.device_id), str(peer.role), peer.is_service) == ("sensor-17", "camera", False)
    assert (peer.issuer, peer.cert_serial) == (pki().issuing.issuer_id, issued.cert_serial)
    assert peer.not_before == issued.certificate.not_valid_before_utc
    assert peer.not_after == issued.certificate.not_valid_after_utc


@pytest.mark.parametrize("role", ["operator", "Operator", "service-renewal"])
def test_a_reserved_role_is_a_service(role: str) -> None:
    assert check_peer(pki().device("alice", role).der, trust(), now()).is_service


def test_a_certificate_without_alternative_name_is_let_in() -> None:
    assert check_peer(pki().issuing.issue(san=None).der, trust(), now()).device_id.text == "sensor-1"


def test_a_printable_string_is_a_name_too() -> None:
    issued = pki().issuing.issue(cns=[(PRINTABLE_STRING, b"sensor-1")])
    assert check_peer(issued.der, trust(), now()).device_id.text == "sensor-1"


@pytest.mark.parametrize(
    "cn",
    [
        "+",
        "#",
        "a/b",
        "$SYS",
        "a\0b",
        "sensor-1\0.evil",
        "a\n",
        "sensor-1\n",
        " sensor-1",
        "",
        "x" * 64,
        "x" * 65,
        "x" * 1_000,
        "-a",
        "a-",
        "a.b",
        "a_b",
        "*",
        "\u202esensor-1",
        "sensor\u200b-1",
        "s\u0435nsor-1",
        "\uff53ensor-1",
        "sensor\u2010" + "1",
        "sensor-\u0661",
        "sensor-1,OU=operator",
        (UTF8_STRING, b"\xff\xfe"),
        (UTF8_STRING, b"\xed\xa0\x80"),
        (BMP_STRING, "a/b".encode("utf-16-be")),
        (BMP_STRING, b"\x00a\x00"),
        (T61_STRING, b"\xe9"),
        (0x03, b"\x00sensor-1"),
    ],
)
def test_a_name_outside_the_grammar(cn: str | tuple[int, bytes]) -> None:
    assert refusal(pki().issuing.issue(cns=[cn])).reason in ("name", "malformed")


def test_one_cn_exactly() -> None:
    assert refusal(pki().issuing.issue(cns=["sensor-1", "sensor-2"], san=None)).reason == "name"
    assert refusal(pki().issuing.issue(cns=["sensor-1", "sensor-1"])).reason == "name"
    name = x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sensor-1")]))
    assert refusal(pki().issuing.issue(cns=[], san=[name])).reason == "name"


def test_one_role_exactly() -> None:
    assert refusal(pki().issuing.issue(ous=[])).reason == "role"
    assert refusal(pki().issuing.issue(ous=["device", "operator"])).reason == "role"
    assert refusal(pki().issuing.issue(ous=["a b"])).reason == "role"
    assert refusal(pki().issuing.issue(ous=[""])).reason == "role"


@pytest.mark.parametrize(
    "san",
    [
        [x509.DNSName("sensor-1")],
        [x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sensor-2")]))],
        [
            x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sensor-1")])),
            x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sensor-2")])),
        ],
        [x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "sensor-1")]))],
    ],
)
def test_an_alternative_name_that_says_something_else(san: list[x509.GeneralName]) -> None:
    assert refusal(pki().issuing.issue(san=san)).reason == "alt-name"


def test_a_ca_with_the_same_name_is_another_ca() -> None:
    assert pki().stranger.certificate.subject == pki().issuing.certificate.subject
    assert refusal(pki().stranger.device()).reason == "issuer"


def test_a_ca_with_the_same_name_that_claims_our_key() -> None:
    forged = pki().stranger.issue(authority_key_id=pki().issuing.ski)
    assert refusal(forged).reason == "signature"


def test_our_key_under_another_name() -> None:
    renamed = Authority.create("Other CA", parent=pki().root, key=pki().issuing.key)
    assert refusal(renamed.device()).reason == "issuer"


def test_an_issuing_ca_below_the_same_root_is_not_trusted() -> None:
    assert refusal(Authority.create("Second Issuing CA", parent=pki().root).device()).reason == "issuer"
    assert refusal(pki().root.device()).reason == "issuer"


def test_two_issuing_cas_are_trusted_during_a_rollover() -> None:
    second = Authority.create("Second Issuing CA", parent=pki().root)
    both = Trust.from_pem(pki().issuing.pem + second.pem)
    assert len(both) == 2
    assert check_peer(pki().device().der, both, now()).issuer == pki().issuing.issuer_id
    assert check_peer(second.device().der, both, now()).issuer == second.issuer_id


def test_an_expired_issuing_ca() -> None:
    old = Authority.create("Old CA", not_before=now() - 10 * DAY, not_after=now() - DAY)
    issued = old.issue(not_before=now() - 2 * DAY, not_after=now() + DAY)
    error = refusal(issued, by=Trust.from_pem(old.pem))
    assert error.reason == "issuer-validity"
    assert "CLOCK" in error.message


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda ca: ca.issue(authority_key_id=None), "issuer"),
        (lambda ca: ca.issue(authority_key_id=b"\0" * 20), "issuer"),
        (lambda ca: ca.issue(signer=new_key()), "signature"),
        (lambda ca: ca.issue(algorithm_der=ECDSA_SHA1_DER), "algorithm"),
        (lambda ca: ca.issue(algorithm_der=ECDSA_SHA384_DER), "algorithm"),
        (lambda ca: ca.issue(key=new_key("rsa")), "key"),
        (lambda ca: ca.issue(key=new_key("p384")), "key"),
        (lambda ca: ca.issue(usages=None), "ext-key-usage"),
        (lambda ca: ca.issue(usages=[SERVER]), "ext-key-usage"),
        (lambda ca: ca.issue(usages=[CLIENT, SERVER]), "ext-key-usage"),
        (lambda ca: ca.issue(usages=[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]), "ext-key-usage"),
        (lambda ca: ca.issue(is_ca=True), "ca"),
        (lambda ca: ca.issue(is_ca=None), "ca"),
        (lambda ca: ca.issue(has_key_usage=False), "key-usage"),
        (lambda ca: ca.issue(key_usage=usage("key_agreement")), "key-usage"),
        (lambda ca: ca.issue(key_usage=usage("digital_signature", "key_cert_sign")), "key-usage"),
        (
            lambda ca: ca.issue(
                extra=[(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.55555.1"), b"\5\0"), True)]
            ),
            "extension",
        ),
        (lambda ca: ca.issue(extra=[(x509.InhibitAnyPolicy(0), True)]), "extension"),
        (lambda ca: ca.server("sensor-1"), "role"),
    ],
)
def test_a_certificate_that_misses_the_profile(make: Callable[[Authority], Issued], reason: str) -> None:
    assert refusal(make(pki().issuing)).reason == reason


@pytest.mark.parametrize("content", ["00", "ff", "81" + "00" * 19, "01" + "00" * 20, "7f" + "ff" * 24])
def test_a_number_that_is_not_positive_or_too_long(content: str) -> None:
    issued = pki().issuing.issue(cert_serial_der=der(0x02, bytes.fromhex(content)))
    assert refusal(issued).reason in ("serial", "malformed")


def test_an_unknown_extension_that_is_not_critical_is_let_in() -> None:
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.55555.1"), b"\5\0")
    assert check_peer(pki().issuing.issue(extra=[(unknown, False)]).der, trust(), now())


def test_the_clock_is_named_with_both_times() -> None:
    issued = pki().issuing.issue(not_before=now() - DAY, not_after=now() + DAY)
    for when, reason in ((now() - 2 * DAY, "not-yet-valid"), (now() + 2 * DAY, "expired")):
        error = refusal(issued, when=when)
        assert error.reason == reason
        assert "CLOCK" in error.message
        assert f"{when:%Y-%m-%dT%H:%M:%SZ}" in error.message
        assert "clock" in error.hint
    assert refusal(issued, when=dt.datetime(1970, 1, 1, tzinfo=dt.UTC)).reason == "not-yet-valid"


def test_both_ends_of_the_validity_count() -> None:
    issued = pki().device()
    for when in (issued.certificate.not_valid_before_utc, issued.certificate.not_valid_after_utc):
        assert check_peer(issued.der, trust(), when)


def test_one_without_an_end_is_let_in_to_renew_as_well() -> None:
    """Its end is the last second of the year 9999 (RFC 5280 §4.1.2.5, IEEE 802.1AR); no grace goes past that."""
    issued = pki().issuing.issue(not_after=dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC))
    assert check_peer(issued.der, trust(), now())
    assert check_peer(issued.der, trust(), now(), expired_by=30 * DAY).for_renewal


@pytest.mark.parametrize("content", [b"", b"0", b"\x30\x80", b"\x30\x82\xff\xff", b"x" * 100, b"\0" * 5_000])
def test_what_is_no_certificate(content: bytes) -> None:
    assert refusal(content).reason == "malformed"


def test_a_certificate_cut_short_anywhere() -> None:
    whole = pki().device().der
    for end in range(len(whole)):
        assert refusal(whole[:end]).reason == "malformed"
    assert refusal(whole + b"\0").reason == "malformed"


def test_a_signature_with_unused_bits_is_refused() -> None:
    # One whose last bit is 0 could be said to be one bit shorter, which changes nothing that is signed.
    leaf = next(der for _ in range(100) if not (der := pki().device().der)[-1] & 1)
    signature = x509.load_der_x509_certificate(leaf).signature
    shorter = leaf[: -len(signature) - 1] + b"\1" + signature
    assert x509.load_der_x509_certificate(shorter).signature == signature
    assert refusal(shorter).reason == "malformed"


@given(st.integers(0, 400), st.integers(1, 255), st.booleans())
def test_a_damaged_certificate_is_refused_and_nothing_else_happens(at: int, flip: int, signed: bool) -> None:
    """Damage within the signed part, with the old signature and with a new one that fits."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from support.pki import der_children, der_content

    tbs, algorithm, signature = der_children(der_content(sensor().der))
    at %= len(tbs)
    tbs = tbs[:at] + bytes([tbs[at] ^ flip]) + tbs[at + 1 :]
    key = pki().issuing.key
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    if signed:
        signature = der(0x03, b"\0" + key.sign(tbs, ec.ECDSA(SHA256())))
    try:
        check_peer(der(0x30, tbs + algorithm + signature), trust(), now())
    except PeerRefusedError as error:
        assert error.reason  # noqa: PT017 - only this error, and it has a code
    else:
        assert signed


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_with_our_own_error(content: bytes) -> None:
    with pytest.raises(PeerRefusedError):
        check_peer(content, trust(), now())


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: b"", "no PEM certificates"),
        (lambda: b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "no PEM certificates"),
        (lambda: Authority.create(is_ca=False).pem, "it is no CA"),
        (lambda: Authority.create(key=new_key("rsa")).pem, "not on P-256"),
        (lambda: Authority.create(key=new_key("p384")).pem, "not on P-256"),
        (lambda: Authority.create(key_usage=usage("key_cert_sign")).pem, "lacks keyCertSign or cRLSign"),
        (lambda: Authority.create(with_ski=False).pem, "it has no subjectKeyIdentifier"),
        (
            lambda: pki().issuing.pem + Authority.create("Other", key=pki().issuing.key).pem,
            "another certificate in the file has the same key",
        ),
    ],
)
def test_what_cannot_be_an_issuing_ca(make: Callable[[], bytes], expected: str) -> None:
    with pytest.raises(CredentialError) as caught:
        Trust.from_pem(make())
    assert expected in caught.value.message
    assert caught.value.hint


def test_a_file_without_issuing_cas_is_named(tmp_path: Path) -> None:
    path = tmp_path / "clients-ca.pem"
    path.write_text("garbage")
    with pytest.raises(CredentialError, match=r"clients-ca\.pem") as caught:
        read_trust(path)
    assert caught.value.hint


def test_the_same_ca_twice_is_one() -> None:
    assert len(Trust.from_pem(pki().issuing.pem * 2)) == 1


def test_every_refusal_is_a_birthmark_error() -> None:
    assert isinstance(refusal(b""), BirthmarkError)
