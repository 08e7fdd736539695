"""A device's side of a renewal on paper: its keys, and the requests that it signs, rightly or wrongly."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from birthmark.device.identity import DeviceId
from birthmark.device.link.transcript import sign
from birthmark.device.renewal.messages import RenewalRequest
from birthmark.device.renewal.proofs import confirm_transcript, request_transcript
from birthmark.provisioning.authority import with_certificate
from birthmark.provisioning.registry.model import Kind, Row, State
from birthmark.provisioning.renewal import Asked, Renewals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from birthmark.device.renewal.messages import RenewalAnswer
    from birthmark.provisioning.station import Station


def new_key() -> EllipticCurvePrivateKey:
    return generate_private_key(SECP256R1())


def csr(name: str, key: Any, *, more: tuple[x509.NameAttribute[str], ...] = ()) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name), *more])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def sha256(content: bytes) -> bytes:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(content)
    return digest.finalize()


@dataclass
class PaperDevice:
    """A device that was made at a station, and signs what it is told to."""

    name: str
    key: EllipticCurvePrivateKey
    leaf_der: bytes
    row: Row
    new_key: EllipticCurvePrivateKey = field(default_factory=new_key)
    anchors_sha256: tuple[bytes, ...] = ()

    @classmethod
    def made(cls, station: Station, name: str = "sensor-17") -> PaperDevice:
        """Bring a device to ATTESTED, as an enrollment does."""
        (device,) = cls.made_all(station, [name])
        return device

    @classmethod
    def made_all(cls, station: Station, names: Sequence[str]) -> list[PaperDevice]:
        """Bring many devices to ATTESTED, in few writes."""
        authority, keys, rows = station.authority, [new_key() for _ in names], []
        with station.registry.transaction() as transaction:
            for name, key in zip(names, keys, strict=True):
                public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
                row = transaction.insert(
                    kind=Kind.DEVICE,
                    name=name,
                    role="sensor",
                    state=State.KEYED,
                    hwid=sha256(name.encode())[:8],
                    txn=secrets.token_bytes(16),
                    public_key_der=public,
                    cert_serial=authority.new_cert_serial(),
                    issuer=authority.key_id,
                )
                rows.append(row)
        leaves = [authority.issue_device(row, now=station.clock()) for row in rows]
        made = []
        with station.registry.transaction() as transaction:
            for key, row, leaf_der in zip(keys, rows, leaves, strict=True):
                issued = with_certificate(row, leaf_der, anchors="")
                stored = transaction.update(issued.changed(state=State.ATTESTED, bundle_sha256=sha256(b"bundle")))
                made.append(cls(row.name, key, leaf_der, stored))
        return made

    @property
    def device_id(self) -> DeviceId:
        return DeviceId(self.name)

    def renew(self, *, csr_der: bytes | None = None, signer: Any = None, **wrong: Any) -> Asked:
        """Ask for a certificate; every default is right. `wrong` changes the request after it was signed."""
        request_der = csr_der if csr_der is not None else csr(self.name, self.new_key)
        nonce, leaf_sha256 = secrets.token_bytes(16), sha256(self.leaf_der)
        signed = request_transcript(
            self.device_id,
            nonce=nonce,
            leaf_sha256=leaf_sha256,
            csr_der=request_der,
            anchors_sha256=self.anchors_sha256,
        )
        signature = sign(cast("EllipticCurvePrivateKey", signer or self.key), signed)
        request = RenewalRequest("renew", nonce, leaf_sha256, self.anchors_sha256, signature, request_der)
        return Asked(self.device_id, request.changed(**wrong))

    def confirm(self, leaf_der: bytes, *, signer: Any = None, **wrong: Any) -> Asked:
        """Say that the new certificate works."""
        nonce, leaf_sha256 = secrets.token_bytes(16), sha256(leaf_der)
        signed = confirm_transcript(
            self.device_id, nonce=nonce, leaf_sha256=leaf_sha256, anchors_sha256=self.anchors_sha256
        )
        signature = sign(cast("EllipticCurvePrivateKey", signer or self.new_key), signed)
        request = RenewalRequest("confirm", nonce, leaf_sha256, self.anchors_sha256, signature)
        return Asked(self.device_id, request.changed(**wrong))

    def has_renewed(self, leaf_der: bytes) -> None:
        """Go by the new certificate from now on."""
        self.key, self.leaf_der, self.new_key = self.new_key, leaf_der, new_key()


def answer(station: Station, asked: Asked) -> RenewalAnswer:
    (answered,) = Renewals(station).answer([asked])
    return answered


def issued(station: Station, device: PaperDevice) -> bytes:
    answered = answer(station, device.renew())
    assert answered.outcome == "issued", answered.reason
    return answered.leaf_der


def renewed(station: Station, device: PaperDevice) -> bytes:
    leaf_der = issued(station, device)
    assert answer(station, device.confirm(leaf_der)).outcome == "confirmed"
    device.has_renewed(leaf_der)
    return leaf_der
