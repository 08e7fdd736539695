"""The certificates and CRLs against the profile, and against OpenSSL and pyca's verifier."""

from __future__ import annotations

import ipaddress
import secrets
import subprocess
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support.patience import PATIENCE_S

from birthmark.device.certificate_facts import certificate_facts
from birthmark.device.errors import AuthorityError, IdentityError
from birthmark.device.identity import DeviceId, Role
from birthmark.provisioning import p256, profile

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
SECOND = timedelta(seconds=1)


def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def serial() -> int:
    return profile.new_cert_serial(secrets.token_bytes)


@pytest.fixture(scope="module")
def root() -> profile.Issuer:
    private = key()
    return profile.Issuer(
        profile.root_certificate(private, organization="Acme", cert_serial=serial(), now=NOW), private
    )


@pytest.fixture(scope="module")
def issuing(root: profile.Issuer) -> profile.Issuer:
    private = key()
    certificate = profile.issuing_certificate(
        root, private.public_key(), organization="Acme", cert_serial=serial(), now=NOW
    )
    return profile.Issuer(certificate, private)


def device(issuing: profile.Issuer, **changes: Any) -> x509.Certificate:
    arguments: dict[str, Any] = {
        "organization": "Acme",
        "device_id": DeviceId("sensor-17"),
        "role": Role("sensor"),
        "public_key": key().public_key(),
        "cert_serial": serial(),
        "lifetime": 730 * DAY,
        "now": NOW,
        **changes,
    }
    return profile.device_certificate(issuing, **arguments)


def service(issuing: profile.Issuer, role: str = "operator") -> x509.Certificate:
    return profile.service_certificate(
        issuing,
        organization="Acme",
        service_id=DeviceId("alice"),
        role=Role(role),
        public_key=key().public_key(),
        cert_serial=serial(),
        lifetime=730 * DAY,
        now=NOW,
    )


def broker(issuing: profile.Issuer, *hosts: str) -> x509.Certificate:
    return profile.broker_certificate(
        issuing,
        organization="Acme",
        hosts=hosts,
        public_key=key().public_key(),
        cert_serial=serial(),
        lifetime=365 * DAY,
        now=NOW,
    )


def crl(issuer: profile.Issuer, *revoked: profile.Revoked, number: int = 1) -> x509.CertificateRevocationList:
    return profile.revocation_list(
        issuer, number=number, this_update=NOW, next_update=NOW + 30 * DAY, revoked=revoked
    )


def subject(certificate: x509.Certificate) -> list[tuple[str, str]]:
    return [(part.rfc4514_attribute_name, str(part.value)) for part in certificate.subject]


def extensions(certificate: x509.Certificate) -> dict[str, bool]:
    """The extensions by name, and whether they are critical."""
    return {type(each.value).__name__: each.critical for each in certificate.extensions}


END_ENTITY = {
    "BasicConstraints": True,
    "KeyUsage": True,
    "ExtendedKeyUsage": False,
    "SubjectAlternativeName": False,
    "SubjectKeyIdentifier": False,
    "AuthorityKeyIdentifier": False,
}


def test_a_device(issuing: profile.Issuer) -> None:
    certificate = device(issuing)
    assert subject(certificate) == [("O", "Acme"), ("OU", "sensor"), ("CN", "sensor-17")]
    assert extensions(certificate) == END_ENTITY
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sensor-17")]))]
    assert certificate.signature_algorithm_oid.dotted_string == "1.2.840.10045.4.3.2"  # ecdsa-with-SHA256
    assert 480 <= len(certificate.public_bytes(Encoding.DER)) <= 560
    facts = certificate_facts(certificate.public_bytes(Encoding.DER))
    assert facts.common_names == ("sensor-17",)
    assert facts.organizational_units == ("sensor",)


@settings(max_examples=60, deadline=None)
@given(
    name=st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", fullmatch=True),
    role=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", fullmatch=True),
    organization=st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=200),
    cert_serial=st.integers(1 << 119, (1 << 159) - 1),
    age=st.timedeltas(SECOND, 6000 * DAY),
    lifetime=st.timedeltas(2 * DAY, 9000 * DAY),
)
@example(name="a", role="a", organization="\u00e4" * 70, cert_serial=1 << 119, age=SECOND, lifetime=2 * DAY).via(
    "a subject whose length takes more than one octet"
)
def test_every_octet_is_what_cryptography_makes_of_it(
    *, name: str, role: str, organization: str, cert_serial: int, age: timedelta, lifetime: timedelta
) -> None:
    founded = NOW + 8000 * DAY  # so that the dates are on both sides of 2050, where their encoding changes
    now, lifetime = founded + age, timedelta(seconds=lifetime // SECOND)
    ca_key, client_key = key(), key().public_key()
    ca_certificate = profile.root_certificate(ca_key, organization=organization, cert_serial=serial(), now=founded)
    ca = profile.Issuer(ca_certificate, ca_key)
    is_service = Role(role).is_reserved
    named: dict[str, Any] = {"service_id" if is_service else "device_id": DeviceId(name)}
    make = profile.service_certificate if is_service else profile.device_certificate
    ours = make(
        ca,
        organization=organization,
        role=Role(role),
        public_key=client_key,
        cert_serial=cert_serial,
        lifetime=lifetime,
        now=now,
        **named,
    )
    common_name = x509.NameAttribute(NameOID.COMMON_NAME, name)
    subject = [
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
        common_name,
    ]
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign",
         "crl_sign", "encipher_only", "decipher_only"), False
    )  # fmt: skip
    ca_key_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    not_before = max(now.replace(microsecond=0) - DAY, ca.certificate.not_valid_before_utc)
    theirs = (
        x509.CertificateBuilder(ca.certificate.subject, x509.Name(subject), client_key, cert_serial)
        .not_valid_before(not_before)
        .not_valid_after(min(not_before + lifetime, ca.certificate.not_valid_after_utc) - SECOND)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DirectoryName(x509.Name([common_name]))]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(client_key), critical=False)
        .add_extension(ca_key_id, critical=False)
        .sign(ca_key, SHA256())
    )
    assert ours.tbs_certificate_bytes == theirs.tbs_certificate_bytes
    ours.verify_directly_issued_by(ca.certificate)
    assert x509.load_der_x509_certificate(ours.public_bytes(Encoding.DER)) == ours


def test_no_certificate_is_made_for_another_curve(issuing: profile.Issuer) -> None:
    with pytest.raises(AuthorityError, match="P-256"):
        device(issuing, public_key=ec.generate_private_key(ec.SECP384R1()).public_key())


def test_a_device_is_valid_since_yesterday_and_for_two_years(issuing: profile.Issuer) -> None:
    later = NOW + 10 * DAY
    certificate = device(issuing, now=later + timedelta(microseconds=5))
    assert certificate.not_valid_before_utc == later - DAY
    # RFC 5280 counts both ends: the last second is the one before.
    assert certificate.not_valid_after_utc == later - DAY + 730 * DAY - SECOND


def test_nothing_is_valid_before_or_after_its_issuer(issuing: profile.Issuer) -> None:
    ca = issuing.certificate
    certificate = device(issuing, now=ca.not_valid_before_utc + timedelta(hours=1), lifetime=3650 * 2 * DAY)
    assert certificate.not_valid_before_utc == ca.not_valid_before_utc
    assert certificate.not_valid_after_utc == ca.not_valid_after_utc - SECOND


def test_an_issuer_at_its_end_signs_nothing(issuing: profile.Issuer) -> None:
    with pytest.raises(AuthorityError, match="the CA that issues ended on"):
        device(issuing, now=issuing.certificate.not_valid_after_utc)


def test_a_lifetime_that_is_over_at_issue_is_named_as_what_is_wrong(issuing: profile.Issuer) -> None:
    now = issuing.certificate.not_valid_before_utc + 2 * DAY
    with pytest.raises(AuthorityError, match="would have ended on") as caught:
        device(issuing, now=now, lifetime=DAY)
    assert "longer lifetime" in (caught.value.hint or "")


def test_the_roots_and_the_issuing_ca(root: profile.Issuer, issuing: profile.Issuer) -> None:
    for issuer, path_length in ((root, None), (issuing, 0)):
        constraints = issuer.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical
        assert constraints.value == x509.BasicConstraints(ca=True, path_length=path_length)
        usage = issuer.certificate.extensions.get_extension_for_class(x509.KeyUsage)
        assert usage.critical
        assert usage.value.key_cert_sign
        assert usage.value.crl_sign
        assert not usage.value.digital_signature
    assert "AuthorityKeyIdentifier" in extensions(issuing.certificate)
    assert "ExtendedKeyUsage" not in extensions(root.certificate) | extensions(issuing.certificate)
    years = (root.certificate.not_valid_after_utc - root.certificate.not_valid_before_utc) / (365.25 * DAY)
    assert round(years) == 20


def test_every_subject_is_distinct(root: profile.Issuer, issuing: profile.Issuer) -> None:
    other = key()
    again = profile.root_certificate(other, organization="Acme", cert_serial=serial(), now=NOW)
    certificates = [root.certificate, issuing.certificate, again, device(issuing), service(issuing)]
    assert len({certificate.subject for certificate in certificates}) == len(certificates)


def test_a_broker(issuing: profile.Issuer) -> None:
    certificate = broker(issuing, "gateway-1.example.com", "192.0.2.7", "2001:db8::7", "localhost")
    assert subject(certificate) == [("O", "Acme"), ("CN", "gateway-1.example.com")]
    assert extensions(certificate) == END_ENTITY
    assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.SERVER_AUTH
    ]
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["gateway-1.example.com", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("192.0.2.7"),
        ipaddress.ip_address("2001:db8::7"),
    ]


@pytest.mark.parametrize(
    "host", ["", "*", "*.example.com", "a b", "a/b", "ex\u00e4mple", "-a.example", "a..b", "a_b", "x" * 64, "a\0"]
)
def test_what_is_no_host_names_no_broker(issuing: profile.Issuer, host: str) -> None:
    with pytest.raises(IdentityError) as caught:
        broker(issuing, "localhost", host)
    assert caught.value.message.isprintable()
    with pytest.raises(IdentityError):
        broker(issuing)


@pytest.mark.parametrize("role", ["operator", "service-billing", "Operator"])
def test_reserved_roles_are_for_services(issuing: profile.Issuer, role: str) -> None:
    with pytest.raises(IdentityError, match="reserved"):
        device(issuing, role=Role(role))
    assert ("OU", role) in subject(service(issuing, role))


def test_a_service_has_no_devices_role(issuing: profile.Issuer) -> None:
    with pytest.raises(IdentityError, match="device's"):
        service(issuing, "sensor")


@given(st.binary(min_size=20, max_size=20))
def test_serial_numbers_have_twenty_octets_and_are_positive(drawn: bytes) -> None:
    number = profile.new_cert_serial(lambda _count: drawn)
    assert number.bit_length() == 159
    assert number & ((1 << 158) - 1) == int.from_bytes(drawn, "big") & ((1 << 158) - 1)


@pytest.mark.parametrize("number", [0, 1, -5, (1 << 119) - 1, 1 << 159, 1 << 200])
def test_other_serial_numbers_are_refused(issuing: profile.Issuer, number: int) -> None:
    with pytest.raises(AuthorityError, match="serial number"):
        device(issuing, cert_serial=number)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_what_is_no_key_is_refused(junk: bytes) -> None:
    with pytest.raises(AuthorityError):
        profile.parse_public_key(junk)


def test_other_keys_are_refused() -> None:
    others: list[ec.EllipticCurvePublicKey | rsa.RSAPublicKey] = [
        ec.generate_private_key(ec.SECP384R1()).public_key(),
        rsa.generate_private_key(65537, 2048).public_key(),
    ]
    for other in others:
        with pytest.raises(AuthorityError, match="P-256"):
            profile.parse_public_key(other.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2**256 - 2**225))
def test_a_key_is_told_by_its_octets_as_cryptography_tells_it(scalar: int) -> None:
    public_key = ec.derive_private_key(scalar, ec.SECP256R1()).public_key()
    der = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    point = public_key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    assert p256.point_of(der) == profile.public_point(der) == point


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 90), change=st.integers(1, 255))
def test_a_changed_key_is_refused(place: int, change: int) -> None:
    assume(place != 26 or change not in (2, 3))  # the same point in its hybrid form
    der = bytearray(key().public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    der[place] ^= change
    assert p256.point_of(bytes(der)) is None
    with pytest.raises(AuthorityError):
        profile.public_point(bytes(der))


@pytest.mark.parametrize(
    "point",
    [
        b"",
        b"\4",
        b"\4" + bytes(64),
        b"\4" + b"\xff" * 64,
        b"\4" + p256._P.to_bytes(32, "big") + bytes(32),
        b"\4" + bytes(65),
    ],
    ids=["none", "no coordinates", "zero", "large", "p", "long"],
)
def test_what_is_no_point_of_the_curve_is_refused(point: bytes) -> None:
    assert p256.point_of(p256.KEY_HEAD + point) is None
    with pytest.raises(AuthorityError):
        profile.public_point(p256.KEY_HEAD + point)


def test_coordinates_are_below_the_field_prime() -> None:
    # A small x has a second way to be written in 32 octets, x + p: one key would be two.
    x = next(x for x in range(200) if pow(x**3 - 3 * x + p256._B, (p256._P - 1) // 2, p256._P) == 1)
    y = pow(x**3 - 3 * x + p256._B, (p256._P + 1) // 4, p256._P)
    octets = y.to_bytes(32, "big")
    assert p256.point_of(p256.KEY_HEAD + b"\4" + x.to_bytes(32, "big") + octets) is not None
    assert p256.point_of(p256.KEY_HEAD + b"\4" + (x + p256._P).to_bytes(32, "big") + octets) is None


def test_a_key_in_another_form_is_read_all_the_same() -> None:
    public_key = key().public_key()
    compressed = public_key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    der = bytes.fromhex("3039301306072a8648ce3d020106082a8648ce3d030107032200") + compressed
    assert p256.point_of(der) is None
    assert profile.public_point(der) == public_key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def test_key_and_certificate_must_belong_together(root: profile.Issuer) -> None:
    with pytest.raises(AuthorityError, match="belong together"):
        profile.Issuer(root.certificate, key())


def test_a_crl(issuing: profile.Issuer) -> None:
    lost, retired, plain = serial(), serial(), serial()
    revoked = [
        profile.Revoked(lost, NOW, x509.ReasonFlags.key_compromise),
        profile.Revoked(retired, NOW - DAY, x509.ReasonFlags.cessation_of_operation),
        profile.Revoked(plain, NOW, x509.ReasonFlags.unspecified),
    ]
    signed = crl(issuing, *revoked, number=(1 << 64) + 3)
    assert signed.is_signature_valid(issuing.private_key.public_key())
    assert signed.issuer == issuing.certificate.subject
    assert signed.last_update_utc == NOW
    assert signed.next_update_utc == NOW + 30 * DAY
    assert signed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == (1 << 64) + 3
    identifier = signed.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    assert identifier == profile.key_id(issuing.certificate)
    reasons = {}
    for entry in signed:
        found = [each.value.reason for each in entry.extensions if isinstance(each.value, x509.CRLReason)]
        reasons[entry.serial_number] = found
        assert entry.revocation_date_utc <= NOW
    assert reasons == {
        lost: [x509.ReasonFlags.key_compromise],
        retired: [x509.ReasonFlags.cessation_of_operation],
        plain: [],  # RFC 5280 section 5.3.1: `unspecified` is left out
    }


MOMENTS = st.timedeltas(0 * DAY, 365 * 7000 * DAY).map(lambda age: datetime(1950, 1, 1, tzinfo=UTC) + age)


@given(
    number=st.integers(1, (1 << 158) - 1),
    organization=st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=200),
    update=MOMENTS,
    revoked=st.lists(
        st.tuples(
            st.integers(1, (1 << 159) - 1),
            MOMENTS,
            st.sampled_from([each for each in x509.ReasonFlags if each is not x509.ReasonFlags.remove_from_crl]),
        ),
        max_size=40,
    ),
)
def test_every_octet_of_a_crl_is_what_cryptography_makes_of_it(
    number: int,
    organization: str,
    update: datetime,
    revoked: list[tuple[int, datetime, x509.ReasonFlags]],
) -> None:
    ca_key = key()
    certificate = profile.root_certificate(ca_key, organization=organization, cert_serial=serial(), now=NOW)
    ours = profile.revocation_list(
        profile.Issuer(certificate, ca_key),
        number=number,
        this_update=update,
        next_update=update + 30 * DAY,
        revoked=[profile.Revoked(*each) for each in revoked],
    )
    last = update.replace(microsecond=0, tzinfo=None)
    theirs = (
        x509.CertificateRevocationListBuilder(certificate.subject)
        .last_update(last)
        .next_update(last + 30 * DAY)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .add_extension(x509.CRLNumber(number), critical=False)
    )
    for cert_serial, at, reason in revoked:
        entry = x509.RevokedCertificateBuilder(cert_serial, at.replace(microsecond=0, tzinfo=None))
        if reason is not x509.ReasonFlags.unspecified:
            entry = entry.add_extension(x509.CRLReason(reason), critical=False)
        theirs = theirs.add_revoked_certificate(entry.build())
    signed = theirs.sign(ca_key, SHA256())
    assert ours.tbs_certlist_bytes == signed.tbs_certlist_bytes
    assert ours.is_signature_valid(ca_key.public_key())
    assert len(ours) == len(revoked)


def test_a_long_crl_is_built_at_once(issuing: profile.Issuer) -> None:
    revoked = [profile.Revoked((1 << 158) + each, NOW, x509.ReasonFlags.superseded) for each in range(20_000)]
    assert len(crl(issuing, *revoked)) == 20_000


def test_openssl_agrees(tmp_path: Path, root: profile.Issuer, issuing: profile.Issuer) -> None:
    gone = device(issuing, device_id=DeviceId("gone"))
    revoked = profile.Revoked(gone.serial_number, NOW, x509.ReasonFlags.key_compromise)
    files = {
        "root.pem": root.certificate.public_bytes(Encoding.PEM),
        "issuing.pem": issuing.certificate.public_bytes(Encoding.PEM),
        "crls.pem": crl(root).public_bytes(Encoding.PEM) + crl(issuing, revoked).public_bytes(Encoding.PEM),
        "device.pem": device(issuing).public_bytes(Encoding.PEM),
        "service.pem": service(issuing).public_bytes(Encoding.PEM),
        "broker.pem": broker(issuing, "localhost", "127.0.0.1").public_bytes(Encoding.PEM),
        "gone.pem": gone.public_bytes(Encoding.PEM),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)

    def verify(name: str, *options: str) -> tuple[int, str]:
        command = ["openssl", "verify", "-x509_strict", "-crl_check_all", "-CAfile", "root.pem"]
        command += ["-CRLfile", "crls.pem", "-untrusted", "issuing.pem", *options, name]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        return done.returncode, done.stdout + done.stderr

    assert verify("device.pem", "-purpose", "sslclient")[0] == 0
    assert verify("service.pem", "-purpose", "sslclient")[0] == 0
    assert verify("broker.pem", "-purpose", "sslserver", "-verify_hostname", "localhost")[0] == 0
    assert verify("broker.pem", "-purpose", "sslserver", "-verify_ip", "127.0.0.1")[0] == 0
    assert verify("broker.pem", "-purpose", "sslclient")[0] != 0
    assert verify("device.pem", "-purpose", "sslserver")[0] != 0
    code, text = verify("gone.pem", "-purpose", "sslclient")
    assert code != 0
    assert "certificate revoked" in text


def test_pyca_agrees(root: profile.Issuer, issuing: profile.Issuer) -> None:
    builder = verification.PolicyBuilder().store(verification.Store([root.certificate])).time(NOW)
    verified = builder.build_client_verifier().verify(device(issuing), [issuing.certificate])
    assert verified.chain[-1] == root.certificate
    server = builder.build_server_verifier(x509.DNSName("localhost"))
    assert server.verify(broker(issuing, "localhost"), [issuing.certificate])
    with pytest.raises(verification.VerificationError):
        server.verify(device(issuing), [issuing.certificate])
