"""The certificates of a benchmark: one CA, one broker, any number of devices and operators, and a CRL.

The same files serve every broker that is measured. Made by the station's own profile, so that handshakes are
as large as in the field.
"""

from __future__ import annotations

import secrets
import ssl
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from birthmark.device.identity import DeviceId, Role
from birthmark.device.pem import CRL, block
from birthmark.provisioning import profile

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

HOST = "127.0.0.1"
LIFETIME = timedelta(days=30)
REVOKED = 100
"""How many certificates, that nobody has, are on the CRL."""


class FleetPki:
    """A folder with `server.pem`, `clients-ca.pem`, `chain.pem`, `crl.pem`, and one `NAME.pem` for each client.

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._now = datetime.now(UTC).replace(microsecond=0)
        root_key, issuing_key = generate_private_key(SECP256R1()), generate_private_key(SECP256R1())
        self._root = profile.root_certificate(
            root_key, organization="Bench", cert_serial=_cert_serial(), now=self._now
        )
        issuing = profile.issuing_certificate(
            profile.Issuer(self._root, root_key),
            issuing_key.public_key(),
            organization="Bench",
            cert_serial=_cert_serial(),
            now=self._now,
        )
        self._issuer = profile.Issuer(issuing, issuing_key)
        server_key = generate_private_key(SECP256R1())
        server = profile.broker_certificate(
            self._issuer,
            organization="Bench",
            hosts=["localhost", HOST],
            public_key=server_key.public_key(),
            cert_serial=_cert_serial(),
            lifetime=LIFETIME,
            now=self._now,
        )
        self._write("server.pem", server_key, server)
        (folder / "clients-ca.pem").write_bytes(_pem(issuing))
        (folder / "chain.pem").write_bytes(_pem(issuing) + _pem(self._root))
        (folder / "root.pem").write_bytes(_pem(self._root))
        (folder / "crl.pem").write_bytes(self.new_crl(1, [_cert_serial() for _ in range(REVOKED)]))

    def new_crl(self, number: int, cert_serials: Iterable[int]) -> bytes:
        """Sign a CRL (PEM) that lists these; each number is dated a second later."""
        listed = [profile.Revoked(each, self._now, x509.ReasonFlags.key_compromise) for each in cert_serials]
        this_update = self._now - timedelta(hours=1) + timedelta(seconds=number)
        next_update = self._now + LIFETIME
        return block(
            CRL,
            profile.revocation_list_der(
                self._issuer, number=number, this_update=this_update, next_update=next_update, revoked=listed
            ),
        )

    def client(self, name: str, role: str = "sensor") -> Path:
        """Return the file with the key and the chain of a client, made now if it is not there."""
        path = self.folder / f"{name}.pem"
        if not path.exists():
            key, is_service = generate_private_key(SECP256R1()), Role(role).is_reserved
            make = profile.service_certificate if is_service else profile.device_certificate
            who = {"service_id" if is_service else "device_id": DeviceId(name)}
            certificate = make(
                self._issuer,
                organization="Bench",
                role=Role(role),
                public_key=key.public_key(),
                cert_serial=_cert_serial(),
                lifetime=LIFETIME,
                now=self._now,
                **who,
            )
            self._write(path.name, key, certificate)
        return path

    def _write(self, name: str, key: EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            + _pem(certificate)
            + _pem(self._issuer.certificate)
        )


def client_context(folder: Path, identity: Path) -> ssl.SSLContext:
    """Return the TLS context of a client of the benchmark."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / "root.pem")
    context.load_cert_chain(identity)
    return context


def _cert_serial() -> int:
    return profile.new_cert_serial(secrets.token_bytes)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)
