"""The rules of `birthmark inspect`: what is right passes, and each rule finds what is wrong on purpose."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import example, given
from hypothesis import strategies as st
from support.pki import (
    CLIENT,
    ECDSA_SHA384_DER,
    SERVER,
    Authority,
    Pki,
    crl_pem,
    new_key,
    now,
    usage,
)

from birthmark.device.errors import CredentialError
from birthmark.device.pem import block
from birthmark.provisioning.inspection.certificate_rules import EVERY, IDENTITY, ROLE, SELF_SIGNATURE
from birthmark.provisioning.inspection.crl_rules import CRL_RULES, REQUEST_RULES
from birthmark.provisioning.inspection.model import Claim, Severity
from birthmark.provisioning.inspection.reading import Inspected, facts_of, inspect, read_objects

if TYPE_CHECKING:
    from collections.abc import Callable

DAY = dt.timedelta(days=1)
PKI = Pki.create()
ISSUING = PKI.issuing
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")
DNS = x509.SubjectAlternativeName([x509.DNSName("localhost")])


def looked_at(der: bytes) -> Inspected:
    (what,) = read_objects(der)
    return inspect(1, what, now())


def device(**wrong: Any) -> bytes:
    return ISSUING.issue(**wrong).der


def broker(*hosts: str, **wrong: Any) -> bytes:
    if not wrong:
        return ISSUING.server(*hosts).der
    names = wrong.pop("san", [x509.DNSName(host) for host in hosts])
    return ISSUING.issue(cns=[hosts[0]], ous=[], usages=[SERVER], san=names, **wrong).der


def ca_with(extensions: list[tuple[x509.ExtensionType, bool]]) -> bytes:
    """An issuing CA with just these extensions."""
    subject = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test"), x509.NameAttribute(NameOID.COMMON_NAME, "CA x")]
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(PKI.root.certificate.subject)
        .public_key(new_key().public_key())
        .serial_number(1 << 150)
        .not_valid_before(now() - DAY)
        .not_valid_after(now() + 3650 * DAY)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(PKI.root.key, hashes.SHA256()).public_bytes(Encoding.DER)


CA_BASIC = (x509.BasicConstraints(ca=True, path_length=0), True)
CA_USAGE = (usage("key_cert_sign", "crl_sign"), True)
CA_SKI = (x509.SubjectKeyIdentifier(bytes(20)), False)
CA_AKI = (x509.AuthorityKeyIdentifier(PKI.root.ski, None, None), False)


def request(*cns: str, key: Any = None, algorithm: Any = None, extensions: bool = False) -> bytes:
    names = [x509.NameAttribute(NameOID.COMMON_NAME, cn) for cn in cns]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
    if extensions:
        builder = builder.add_extension(DNS, critical=False)
    return builder.sign(key or new_key(), algorithm or hashes.SHA256()).public_bytes(Encoding.DER)


def tampered(der: bytes) -> bytes:
    """With another last octet of its signature."""
    return der[:-1] + bytes([der[-1] ^ 1])


def broker_with_ou() -> bytes:
    return ISSUING.issue(cns=["localhost"], ous=["sensor"], usages=[SERVER], san=[x509.DNSName("localhost")]).der


def self_issued_leaf() -> bytes:
    key = new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sensor-1")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1 << 150)
        .not_valid_before(now())
        .not_valid_after(now() + DAY)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


RIGHT: dict[Claim, Callable[[], bytes]] = {
    Claim.DEVICE: lambda: PKI.device().der,
    Claim.SERVICE: lambda: PKI.operator().der,
    Claim.BROKER: lambda: broker("localhost", "127.0.0.1"),
    Claim.ISSUING: lambda: ISSUING.der,
    Claim.ROOT: lambda: PKI.root.der,
    Claim.CRL: lambda: ISSUING.crl([5], number=7),
    Claim.REQUEST: lambda: request("sensor-1"),
}


@pytest.mark.parametrize("claim", list(Claim))
def test_what_is_right_is_clean_and_known_for_what_it_is(claim: Claim) -> None:
    inspected = looked_at(RIGHT[claim]())

    assert inspected.claim is claim
    # The test PKI's CAs have numbers of their own.
    assert [finding for finding in inspected.findings if finding.rule != "serial-number"] == []


ERROR, WARNING, NOTICE = Severity.ERROR, Severity.WARNING, Severity.NOTICE
WRONG: list[tuple[str, Severity, Callable[[], bytes]]] = [
    ("extensions", ERROR, lambda: device(extra=[(UNKNOWN, True)])),
    ("extensions", NOTICE, lambda: device(extra=[(UNKNOWN, False)])),
    ("signature-algorithm", ERROR, lambda: device(algorithm_der=ECDSA_SHA384_DER)),
    ("key", ERROR, lambda: device(key=new_key("p384"))),
    ("key", ERROR, lambda: device(key=new_key("rsa"))),
    ("serial-number", ERROR, lambda: device(cert_serial_der=b"\x02\x01\x00")),
    ("serial-number", ERROR, lambda: device(cert_serial_der=b"\x02\x01\x91")),
    ("serial-number", ERROR, lambda: device(cert_serial_der=b"\x02\x15\x01" + bytes(20))),
    ("serial-number", WARNING, lambda: device(cert_serial=7)),
    ("subject", ERROR, lambda: device(cns=["sensor-1", "sensor-2"])),
    ("subject", WARNING, lambda: device(ous=["a", "b"])),
    ("subject", WARNING, broker_with_ou),
    ("identity", ERROR, lambda: device(cns=["a/b"])),
    ("identity", ERROR, lambda: device(cns=["+"])),
    ("identity", ERROR, lambda: device(cns=["a\0b"])),
    ("identity", ERROR, lambda: broker("bad host", san=[x509.DNSName("localhost")])),
    ("role", ERROR, lambda: device(ous=["a role"])),
    ("issuer-name", ERROR, self_issued_leaf),
    ("validity", ERROR, lambda: device(not_before=now(), not_after=now())),
    ("validity", WARNING, lambda: device(not_before=now() - 9 * DAY, not_after=now() - DAY)),
    ("validity", WARNING, lambda: device(not_before=now() + DAY)),
    ("validity", NOTICE, lambda: device(not_before=now() - 300 * DAY, not_after=now() + 20 * DAY)),
    ("validity", WARNING, lambda: device(not_after=now() + 3700 * DAY)),
    ("basic-constraints", ERROR, lambda: device(is_ca=None)),
    ("basic-constraints", ERROR, lambda: device(key_usage=usage("key_cert_sign"))),
    (
        "basic-constraints",
        WARNING,
        lambda: ca_with([(x509.BasicConstraints(ca=True, path_length=3), True), CA_USAGE, CA_SKI, CA_AKI]),
    ),
    ("basic-constraints", WARNING, lambda: ca_with([(CA_BASIC[0], False), CA_USAGE, CA_SKI, CA_AKI])),
    ("key-usage", ERROR, lambda: device(has_key_usage=False)),
    ("key-usage", WARNING, lambda: device(key_usage=usage("digital_signature", "key_agreement"))),
    ("key-usage", ERROR, lambda: device(key_usage=usage("key_agreement"))),
    ("key-usage", WARNING, lambda: ca_with([CA_BASIC, (CA_USAGE[0], False), CA_SKI, CA_AKI])),
    ("extended-key-usage", ERROR, lambda: device(usages=None)),
    ("extended-key-usage", ERROR, lambda: device(usages=[CLIENT, SERVER])),
    (
        "extended-key-usage",
        WARNING,
        lambda: ca_with([CA_BASIC, CA_USAGE, CA_SKI, CA_AKI, (x509.ExtendedKeyUsage([CLIENT]), False)]),
    ),
    ("subject-key-identifier", ERROR, lambda: ca_with([CA_BASIC, CA_USAGE, CA_AKI])),
    ("subject-key-identifier", WARNING, lambda: ca_with([CA_BASIC, CA_USAGE, (CA_SKI[0], True), CA_AKI])),
    ("authority-key-identifier", ERROR, lambda: device(authority_key_id=None)),
    ("authority-key-identifier", WARNING, lambda: ca_with([CA_BASIC, CA_USAGE, CA_SKI, (CA_AKI[0], True)])),
    ("subject-alt-name", WARNING, lambda: device(san=None)),
    ("subject-alt-name", ERROR, lambda: device(san=[x509.DNSName("localhost")])),
    ("subject-alt-name", ERROR, lambda: broker("localhost", san=None)),
    ("subject-alt-name", ERROR, lambda: broker("gw.example.com", san=[x509.DNSName("*.example.com")])),
    ("subject-alt-name", ERROR, lambda: broker("gw.example.com", san=[x509.DNSName("other.example.com")])),
    (
        "subject-alt-name",
        WARNING,
        lambda: broker("localhost", san=[x509.DNSName("localhost"), x509.RFC822Name("a@example.com")]),
    ),
    ("subject-alt-name", WARNING, lambda: ca_with([CA_BASIC, CA_USAGE, CA_SKI, CA_AKI, (DNS, False)])),
    ("signature", ERROR, lambda: tampered(PKI.root.der)),
    ("signature-algorithm", ERROR, lambda: crl(algorithm=hashes.SHA384())),
    ("next-update", NOTICE, lambda: ISSUING.crl([], next_update=now() + 400 * DAY)),
    ("extensions", ERROR, lambda: ISSUING.crl([], extra=[(x509.DeltaCRLIndicator(1), True)])),
    ("extensions", ERROR, lambda: ISSUING.crl([], extra=[(UNKNOWN, True)])),
    ("authority-key-identifier", ERROR, lambda: ISSUING.crl([], authority_key_id=None)),
    ("crl-number", ERROR, lambda: ISSUING.crl([], number=None)),
    ("crl-number", WARNING, lambda: ISSUING.crl([], number=None, extra=[(x509.CRLNumber(3), True)])),
    ("next-update", WARNING, lambda: ISSUING.crl([], this_update=now() - 9 * DAY, next_update=now() - DAY)),
    ("next-update", NOTICE, lambda: ISSUING.crl([], this_update=now() - 9 * DAY, next_update=now() + DAY)),
    ("this-update", WARNING, lambda: ISSUING.crl([], this_update=now() + DAY, next_update=now() + 30 * DAY)),
    ("entries", ERROR, lambda: ISSUING.crl([5, 5])),
    ("entries", ERROR, lambda: ISSUING.crl([5], entry_extra=[(UNKNOWN, True)])),
    ("entries", ERROR, lambda: ISSUING.crl([5], entry_extra=[(reason("remove_from_crl"), False)])),
    ("entries", WARNING, lambda: ISSUING.crl([5], entry_extra=[(reason("unspecified"), False)])),
    ("entries", WARNING, lambda: ISSUING.crl([5], this_update=now() + DAY, next_update=now() + 30 * DAY)),
    ("signature", ERROR, lambda: tampered(request("sensor-1"))),
    ("signature-algorithm", ERROR, lambda: request("sensor-1", algorithm=hashes.SHA384())),
    ("key", ERROR, lambda: request("sensor-1", key=new_key("p384"))),
    ("identity", WARNING, lambda: request("sensor-1", "sensor-2")),
    ("identity", WARNING, lambda: request("a/b")),
    ("extensions", NOTICE, lambda: request("sensor-1", extensions=True)),
]


def reason(word: str) -> x509.CRLReason:
    return x509.CRLReason(x509.ReasonFlags[word])


def crl(algorithm: hashes.SHA384) -> bytes:
    builder = x509.CertificateRevocationListBuilder(PKI.root.certificate.subject, now(), now() + DAY)
    assert isinstance(PKI.root.key, ec.EllipticCurvePrivateKey)
    return builder.sign(PKI.root.key, algorithm).public_bytes(Encoding.DER)


@pytest.mark.parametrize(("rule", "severity", "build"), WRONG)
def test_each_rule_finds_what_is_wrong_on_purpose(
    rule: str, severity: Severity, build: Callable[[], bytes]
) -> None:
    inspected = looked_at(build())

    assert severity in {finding.severity for finding in inspected.findings if finding.rule == rule}, (
        inspected.findings
    )
    assert inspected.is_clean is all(finding.severity is NOTICE for finding in inspected.findings)
    assert facts_of(inspected)["profile"] == inspected.claim.value


def test_a_version_1_certificate_is_found() -> None:
    # The draft of a certificate without its version and its extensions: what openssl made by default for years.
    from support.pki import der, der_children, der_content

    fields = der_children(der_content(der_children(der_content(PKI.device().der))[0]))
    tbs = der(0x30, b"".join(fields[1:7]))
    algorithm, signature = der_children(der_content(PKI.device().der))[1:]

    rules = {finding.rule for finding in looked_at(der(0x30, tbs + algorithm + signature)).findings}

    assert {"version", "basic-constraints", "key-usage", "extended-key-usage"} <= rules


def test_every_rule_has_a_wrong_one_here() -> None:
    rules = {rule.name for rule in (*EVERY, IDENTITY, ROLE, SELF_SIGNATURE, *CRL_RULES, *REQUEST_RULES)}

    assert rules <= {rule for rule, _, _ in WRONG} | {"version"}


def test_a_file_may_hold_several_and_a_key_is_passed_over() -> None:
    issued = PKI.device()

    found = read_objects(issued.pem + crl_pem(ISSUING.crl([])))

    kinds = [type(one).__name__ for one in found]
    assert kinds == ["Certificate"] * (1 + len(issued.chain)) + ["CertificateRevocationList"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"hello",
        block("PRIVATE KEY", b"secret"),
        block("CERTIFICATE", b"no"),
        block("X509 CRL", b"\x30\0"),
    ],
)
def test_what_is_none_is_refused_without_a_word_of_it(content: bytes) -> None:
    with pytest.raises(CredentialError) as caught:
        read_objects(content)

    assert "secret" not in caught.value.message


SEEDS = [build() for build in RIGHT.values()]


def sound(content: bytes) -> None:
    try:
        objects = read_objects(content)
    except CredentialError:
        return
    for what in objects:
        inspected = inspect(1, what, now())
        texts = [str(value) for value in facts_of(inspected).values()]
        texts += [text for finding in inspected.findings for text in finding.record().values()]
        assert all(text.isascii() and text.isprintable() for text in texts), texts


@given(st.binary(max_size=400))
@example(b"-----BEGIN CERTIFICATE-----\n")
def test_any_bytes_lead_to_a_verdict_or_to_our_own_error(content: bytes) -> None:
    sound(content)
    sound(block("CERTIFICATE", content) + block("X509 CRL", content))


@given(
    st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), max_size=4), st.data()
)
def test_a_damaged_one_leads_to_a_verdict_or_to_our_own_error(
    seed: bytes, edits: list[tuple[int, int]], data: st.DataObject
) -> None:
    damaged = bytearray(seed)
    for at, value in edits:
        damaged[at % len(damaged)] = value
    sound(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]) if not edits else bytes(damaged))


def test_an_authority_without_a_key_id_is_no_way_around_the_issuer() -> None:
    bare = Authority.create("Test Issuing CA", parent=PKI.root, with_ski=False)

    assert "subject-key-identifier" in {finding.rule for finding in looked_at(bare.der).findings}
