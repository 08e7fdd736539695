"""Who is at the other end: a peer's certificate, held against the whole profile after every handshake.

TLS has verified the chain when a session was new. A resumed session skips that (its expiry, a removed trust
anchor), so this check is made at every connect and relies on nothing that OpenSSL said.

Rules (RFC 5280, and docs/certificate-profile.md):

- The issuer is one of the trusted issuing CAs: its subject, its key identifier (AKI = SKI) and its signature.
- The subject has one CN, a `DeviceId`, and one OU, a `Role`; a reserved role makes the peer a service.
- Key and signature: P-256, ecdsa-with-SHA256. Version 3; notBefore <= now <= notAfter, for the issuer as well.
- basicConstraints CA:FALSE, keyUsage digitalSignature alone, extKeyUsage clientAuth alone: all present.
- A subjectAltName, if any, is one directoryName with that same CN. An unknown critical extension is refused.

Every refusal has a short `reason` (for logs and counters), a message and a hint; one that a wrong clock can
explain says CLOCK and both times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from birthmark.device.errors import CredentialError, RefusedError

if TYPE_CHECKING:
    from datetime import datetime

    from birthmark.device.identity import DeviceId, Role


class PeerRefusedError(RefusedError):
    """A peer's certificate is not let in.

    Args:
        reason: a short code, such as `expired` or `name`; stable, for counters and tests.
        message: what is wrong with it, for the gateway's operator.
        hint: what to do about it.
    """

    def __init__(self, reason: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer that has proven who it is."""

    device_id: DeviceId
    role: Role
    is_service: bool
    issuer: str
    """The issuing CA's subject key identifier, lower-case hex."""
    cert_serial: int
    not_before: datetime
    not_after: datetime


class Trust:
    """The trusted issuing CAs of the clients, from `clients-ca.pem`.

    `from_pem(pem: bytes) -> Trust` raises `CredentialError`; `issuers` is their key identifiers in hex.
    """

    @classmethod
    def from_pem(cls, pem: bytes) -> Trust:
        """Read PEM certificates; raises `CredentialError` where one cannot be an issuing CA."""
        raise CredentialError("could not read the issuing CAs: not written yet")


def check_peer(leaf_der: bytes, trust: Trust, now: datetime) -> Peer:
    """Return who the certificate says the peer is; raises `PeerRefusedError`. `now` is aware."""
    raise PeerRefusedError("unwritten", "could not check the peer: not written yet")
