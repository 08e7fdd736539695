"""A test PKI that can make good certificates and CRLs, and every kind of bad one.

    pki = Pki.create()
    good = pki.device("sensor-1")
    evil = pki.issuing.issue(cns=["a/b"], ous=["device"], usages=None)
    crl = pki.issuing.crl([good.cert_serial], number=7)

`cryptography`'s builder refuses the worst names, so the subject is written here in DER and the result signed
again: whatever OpenSSL would accept from a careless CA can be made.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH
SERVER = ExtendedKeyUsageOID.SERVER_AUTH

UTF8_STRING, PRINTABLE_STRING, T61_STRING, BMP_STRING = 0x0C, 0x13, 0x14, 0x1E
_OID_CN, _OID_O, _OID_OU = b"\x55\x04\x03", b"\x55\x04\x0a", b"\x55\x04\x0b"
ECDSA_SHA256_DER = bytes.fromhex("300a06082a8648ce3d040302")
ECDSA_SHA1_DER = bytes.fromhex("300906072a8648ce3d0401")
ECDSA_SHA384_DER = bytes.fromhex("300a06082a8648ce3d040303")


def now() -> dt.datetime:
    """The current second, aware."""
    return dt.datetime.now(dt.UTC).replace(microsecond=0)


def new_key(kind: Literal["p256", "p384", "rsa"] = "p256") -> Key:
    if kind == "rsa":
        return rsa.generate_private_key(public_exponent=65_537, key_size=2_048)
    return ec.generate_private_key(ec.SECP384R1() if kind == "p384" else ec.SECP256R1())


def key_pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@dataclass(frozen=True)
class Issued:
    """A certificate with its key and the chain above it (no root)."""

    key: Key
    der: bytes
    chain: tuple[Authority, ...] = ()

    @property
    def certificate(self) -> x509.Certificate:
        return x509.load_der_x509_certificate(self.der)

    @property
    def cert_serial(self) -> int:
        return self.certificate.serial_number

    @property
    def pem(self) -> bytes:
        """Key, leaf and chain in one PEM text, as `load_cert_chain` takes it."""
        return key_pem(self.key) + pem_of(self.der) + b"".join(ca.pem for ca in self.chain)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.pem)
        path.chmod(0o600)
        return path


@dataclass(frozen=True)
class Authority:
    """A CA: issues what it is told to, right or wrong."""

    key: Key
    der: bytes
    parent: Authority | None = field(default=None, repr=False)

    @classmethod
    def create(
        cls,
        name: str = "Test Issuing CA",
        *,
        parent: Authority | None = None,
        key: Key | None = None,
        is_ca: bool = True,
        key_usage: x509.KeyUsage | None = None,
        with_ski: bool = True,
        not_before: dt.datetime | None = None,
        not_after: dt.datetime | None = None,
    ) -> Authority:
        key = key or new_key()
        subject = x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test"), x509.NameAttribute(NameOID.COMMON_NAME, name)]
        )
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(parent.certificate.subject if parent else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before or now() - dt.timedelta(days=400))
            .not_valid_after(not_after or now() + dt.timedelta(days=3_240))
            .add_extension(
                x509.BasicConstraints(ca=is_ca, path_length=0 if parent and is_ca else None), critical=True
            )
            .add_extension(key_usage or usage("key_cert_sign", "crl_sign"), critical=True)
        )
        if with_ski:
            builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)  # noqa: FBT003
        if parent:
            builder = builder.add_extension(aki(parent.ski), critical=False)
        certificate = builder.sign(parent.key if parent else key, hashes.SHA256())
        return cls(key, certificate.public_bytes(serialization.Encoding.DER), parent)

    @property
    def certificate(self) -> x509.Certificate:
        return x509.load_der_x509_certificate(self.der)

    @property
    def pem(self) -> bytes:
        return pem_of(self.der)

    @property
    def ski(self) -> bytes:
        return x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()).digest

    @property
    def issuer_id(self) -> str:
        """The subject key identifier in lower-case hex."""
        return self.ski.hex()

    def issue(
        self,
        *,
        cns: Sequence[str | tuple[int, bytes]] = ("sensor-1",),
        ous: Sequence[str] = ("device",),
        organization: str = "Test",
        key: Key | None = None,
        not_before: dt.datetime | None = None,
        not_after: dt.datetime | None = None,
        usages: Sequence[x509.ObjectIdentifier] | None = (CLIENT,),
        is_ca: bool | None = False,
        key_usage: x509.KeyUsage | None = None,
        has_key_usage: bool = True,
        san: Sequence[x509.GeneralName] | Literal["profile"] | None = "profile",
        authority_key_id: bytes | Literal["profile"] | None = "profile",
        extra: Iterable[tuple[x509.ExtensionType, bool]] = (),
        cert_serial: int | None = None,
        cert_serial_der: bytes | None = None,
        algorithm_der: bytes = ECDSA_SHA256_DER,
        signer: Key | None = None,
    ) -> Issued:
        """Issue a certificate; every default follows the device profile.

        A CN may be text (written as UTF8String) or `(tag, content)` for another ASN.1 type; `cert_serial_der` is a
        whole INTEGER, for numbers that the builder refuses.
        """
        key = key or new_key()
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(cert_serial or (1 << 152) | secrets.randbits(151))
            .not_valid_before(not_before or now() - dt.timedelta(days=1))
            .not_valid_after(not_after or now() + dt.timedelta(days=729))
        )
        if is_ca is not None:
            builder = builder.add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        if has_key_usage:
            builder = builder.add_extension(key_usage or usage("digital_signature"), critical=True)
        if usages is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        builder = builder.add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
        )
        if authority_key_id is not None:
            key_id = self.ski if authority_key_id == "profile" else authority_key_id
            builder = builder.add_extension(aki(key_id), critical=False)
        names = _profile_san(cns) if san == "profile" else san
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        for extension, critical in extra:
            builder = builder.add_extension(extension, critical)
        draft = builder.sign(new_key(), hashes.SHA256()).public_bytes(serialization.Encoding.DER)
        attributes = [_attribute(_OID_O, organization)]
        attributes += [_attribute(_OID_OU, ou) for ou in ous]
        attributes += [_attribute(_OID_CN, cn) for cn in cns]
        fields = der_children(der_content(der_children(der_content(draft))[0]))
        fields[1] = cert_serial_der or fields[1]
        fields[2] = algorithm_der
        fields[5] = der(0x30, b"".join(attributes))
        return Issued(key, _signed(fields, algorithm_der, signer or self.key), self.chain)

    @property
    def chain(self) -> tuple[Authority, ...]:
        """What is sent along with a leaf: this CA and those above it, without the root."""
        return (self, *self.parent.chain) if self.parent else ()

    def device(self, name: str = "sensor-1", role: str = "device") -> Issued:
        return self.issue(cns=[name], ous=[role])

    def server(
        self, *hosts: str, not_before: dt.datetime | None = None, not_after: dt.datetime | None = None
    ) -> Issued:
        """A broker's certificate for these DNS names and addresses."""
        return self.issue(
            cns=[hosts[0]],
            ous=[],
            usages=[SERVER],
            san=[_host(host) for host in hosts],
            key_usage=None,
            not_before=not_before,
            not_after=not_after,
        )

    def crl(
        self,
        revoked: Iterable[int] = (),
        *,
        number: int | None = 1,
        this_update: dt.datetime | None = None,
        next_update: dt.datetime | None = None,
        extra: Iterable[tuple[x509.ExtensionType, bool]] = (),
        entry_extra: Iterable[tuple[x509.ExtensionType, bool]] = (),
        signer: Key | None = None,
        issuer: x509.Name | None = None,
        authority_key_id: bytes | Literal["profile"] | None = "profile",
    ) -> bytes:
        """Sign a CRL (DER); every default follows the profile."""
        when = this_update or now() - dt.timedelta(hours=1)
        entries = []
        for cert_serial in revoked:
            entry = x509.RevokedCertificateBuilder(cert_serial, when)
            for extension, critical in entry_extra:
                entry = entry.add_extension(extension, critical)
            entries.append(entry.build())
        # All at once: adding them one by one is quadratic.
        builder = x509.CertificateRevocationListBuilder(
            issuer or self.certificate.subject,
            when,
            next_update or now() + dt.timedelta(days=30),
            revoked_certificates=entries,
        )
        if authority_key_id is not None:
            key_id = self.ski if authority_key_id == "profile" else authority_key_id
            builder = builder.add_extension(aki(key_id), critical=False)
        if number is not None:
            builder = builder.add_extension(x509.CRLNumber(number), critical=False)
        for extension, critical in extra:
            builder = builder.add_extension(extension, critical)
        return builder.sign(signer or self.key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


@dataclass(frozen=True)
class Pki:
    """A root, an issuing CA below it, and a stranger that calls its issuing CA by the same name."""

    root: Authority
    issuing: Authority
    stranger: Authority

    @classmethod
    def create(cls) -> Pki:
        root = Authority.create("Test Root CA")
        issuing = Authority.create("Test Issuing CA", parent=root)
        stranger = Authority.create("Test Issuing CA", parent=Authority.create("Test Root CA"))
        return cls(root, issuing, stranger)

    def device(self, name: str = "sensor-1", role: str = "device") -> Issued:
        return self.issuing.device(name, role)

    def operator(self, name: str = "alice") -> Issued:
        return self.issuing.device(name, "operator")

    def write_broker_files(
        self, folder: Path, *hosts: str, revoked: Iterable[int] = (), crl_number: int = 1
    ) -> None:
        """Write `server.pem`, `clients-ca.pem`, `crl.pem` and `root.pem` (what clients trust) to `folder`."""
        self.issuing.server(*(hosts or ("localhost", "127.0.0.1"))).write(folder / "server.pem")
        (folder / "clients-ca.pem").write_bytes(self.issuing.pem)
        (folder / "root.pem").write_bytes(self.root.pem)
        (folder / "crl.pem").write_bytes(crl_pem(self.issuing.crl(revoked, number=crl_number)))


def usage(*bits: str) -> x509.KeyUsage:
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: name in bits for name in names})


def aki(key_id: bytes) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier(key_id, None, None)


def pem_of(certificate_der: bytes) -> bytes:
    return x509.load_der_x509_certificate(certificate_der).public_bytes(serialization.Encoding.PEM)


def crl_pem(crl_der: bytes) -> bytes:
    return x509.load_der_x509_crl(crl_der).public_bytes(serialization.Encoding.PEM)


def der(tag: int, content: bytes) -> bytes:
    """One tag-length-value."""
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes((tag, 0x80 | len(length))) + length + content


def der_children(content: bytes) -> list[bytes]:
    """The encodings, header included, that follow each other in `content`."""
    children, at = [], 0
    while at < len(content):
        end = at + sum(_header(content, at))
        children.append(content[at:end])
        at = end
    return children


def der_content(encoding: bytes) -> bytes:
    return encoding[_header(encoding, 0)[0] :]


def _header(data: bytes, at: int) -> tuple[int, int]:
    if data[at + 1] < 0x80:
        return 2, data[at + 1]
    count = data[at + 1] & 0x7F
    return 2 + count, int.from_bytes(data[at + 2 : at + 2 + count])


def _attribute(oid: bytes, value: str | tuple[int, bytes]) -> bytes:
    tag, content = (UTF8_STRING, value.encode()) if isinstance(value, str) else value
    return der(0x31, der(0x30, der(0x06, oid) + der(tag, content)))


def _profile_san(cns: Sequence[str | tuple[int, bytes]]) -> list[x509.GeneralName] | None:
    first = cns[0] if cns else ""
    if not isinstance(first, str) or not first or len(first) > 64:
        return None
    return [x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, first)]))]


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _signed(fields: list[bytes], algorithm_der: bytes, signer: Key) -> bytes:
    tbs = der(0x30, b"".join(fields))
    digest: hashes.HashAlgorithm = hashes.SHA256()
    if algorithm_der == ECDSA_SHA1_DER:
        digest = hashes.SHA1()  # noqa: S303 - a certificate that must be refused
    elif algorithm_der == ECDSA_SHA384_DER:
        digest = hashes.SHA384()
    if isinstance(signer, rsa.RSAPrivateKey):
        signature = signer.sign(tbs, padding.PKCS1v15(), digest)
    else:
        signature = signer.sign(tbs, ec.ECDSA(digest))
    return der(0x30, tbs + algorithm_der + der(0x03, b"\0" + signature))
