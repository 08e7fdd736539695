"""The CAs of a station: which there are, which of them issue, and which have been retired.

Rules:

- The registry holds one record for each, its certificate included. What it says is changed in one transaction, so
  that a station killed in a rollover has the old CA or the new one in charge, never neither.
- One issuing CA at a time issues for clients (devices and services), and one for brokers: the two differ only
  while a root is being replaced, because a device checks a broker against the root that it holds.
- A CA that is not retired is trusted: an issuing CA by the gateways, a root by devices and services.
- The private key is in a file named by kind and key identifier, or in a PKCS#11 token, where a URI names it. The
  record of a retired CA stays, and so does its key: the lock of a device that was flashed under it opens to that
  CA alone (docs/serial-protocol.md section 6).
"""

from __future__ import annotations

import dataclasses
import re
from base64 import b64decode, b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from birthmark.device.errors import RegistryError
from birthmark.device.link.bundle import MAX_ANCHORS
from birthmark.provisioning import profile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from birthmark.provisioning.registry.interface import Transaction, View

TOPIC: Final = "ca"
"""Where the registry notes them; the key is the key identifier."""
SHORT: Final = 8
"""How much of a key identifier people are shown; a CA's name ends in as much of it."""
MAX_STANDING_ISSUING: Final = 8
"""Trusted at once; a gateway takes twice as many."""
MAX_STANDING_ROOTS: Final = MAX_ANCHORS
_KEY_ID: Final = re.compile("(?:[0-9a-f]{2}){8,64}")


class CaKind(StrEnum):
    """What a CA signs."""

    ROOT = "root"
    ISSUING = "issuing"


@dataclass(frozen=True, slots=True)
class Ca:
    """One CA.

    Raises:
        ValueError: the facts contradict each other.
    """

    key_id: str
    """Its subject key identifier in lower-case hex."""
    kind: CaKind
    certificate_der: bytes
    root: str
    """The key identifier of the root that it leads to; a root's own."""
    made_at: datetime
    clients: bool = False
    """Whether it issues the certificates of devices and services now."""
    brokers: bool = False
    """Whether it issues those of brokers now."""
    activated_at: datetime | None = None
    """When it began to issue; None while nothing was ever issued under it."""
    closed_at: datetime | None = None
    """When everything under it was revoked for good, on a last CRL; only retiring it can follow."""
    retired_at: datetime | None = None
    """When it ceased to be trusted."""
    lost_at: datetime | None = None
    """When its key was given up for lost: it signs nothing any more, and its last CRL stays as it is."""
    key_uri: str = ""
    """Which key in a PKCS#11 token is its own (RFC 7512); empty if its key is in a file."""

    def __post_init__(self) -> None:
        if not _KEY_ID.fullmatch(self.key_id) or not _KEY_ID.fullmatch(self.root):
            raise ValueError("a key identifier is not lower-case hex")
        if self.kind is CaKind.ROOT and (self.root != self.key_id or self.clients or self.brokers):
            raise ValueError("a root leads to itself, and issues nothing to anybody")
        if (self.clients or self.brokers) and (self.activated_at is None or self.closed_at is not None):
            raise ValueError("a CA that issues was activated, and is not closed")
        for moment in (self.made_at, self.activated_at, self.closed_at, self.retired_at, self.lost_at):
            if moment is not None and moment.tzinfo is None:
                raise ValueError("a time has no time zone")

    @property
    def short(self) -> str:
        """What people call it: the beginning of its key identifier."""
        return self.key_id[:SHORT]

    @property
    def is_standing(self) -> bool:
        """Whether it is trusted."""
        return self.retired_at is None

    @property
    def certificate(self) -> x509.Certificate:
        """Its certificate."""
        return x509.load_der_x509_certificate(self.certificate_der)

    @property
    def pem(self) -> bytes:
        """Its certificate as PEM."""
        return _pem(self.certificate_der)

    @property
    def phase(self) -> str:
        """Where it stands, in a word."""
        if self.retired_at is not None:
            return "retired"
        if self.closed_at is not None:
            return "closed"
        if self.kind is CaKind.ROOT:
            return "trusted"
        if self.clients and self.brokers:
            return "current"
        if self.clients or self.brokers:
            return "current for devices" if self.clients else "current for brokers"
        return "new" if self.activated_at is None else "old"

    @classmethod
    def made(cls, kind: CaKind, certificate: x509.Certificate, root: str, now: datetime, **facts: Any) -> Ca:
        """Return the record of a CA that has just been made; `root` is empty for a root."""
        key_id = profile.key_id(certificate).hex()
        der = certificate.public_bytes(Encoding.DER)
        return cls(key_id, kind, der, root or key_id, now, **facts)


@lru_cache(64)
def _pem(certificate_der: bytes) -> bytes:
    """Return a CA's certificate as PEM: each of thousands of devices gets it in its chain."""
    return x509.load_der_x509_certificate(certificate_der).public_bytes(Encoding.PEM)


class Cas:
    """All CAs of a station, the oldest first."""

    def __init__(self, cas: tuple[Ca, ...]) -> None:
        self._cas = cas

    def __iter__(self) -> Iterator[Ca]:
        return iter(self._cas)

    def get(self, key_id: str) -> Ca:
        """Return the CA with this key identifier; raises `RegistryError` if there is none."""
        for ca in self._cas:
            if ca.key_id == key_id:
                return ca
        raise RegistryError(
            f"could not find the CA {key_id[:SHORT] or '(none)'}: the registry does not know it",
            hint="restore the registry from a backup, together with the audit log",
        )

    @property
    def roots(self) -> tuple[Ca, ...]:
        """The roots that are trusted, that of the clients' issuing CA first."""
        own = self.for_clients.root
        standing = [ca for ca in self._cas if ca.kind is CaKind.ROOT and ca.is_standing]
        return tuple(sorted(standing, key=lambda ca: ca.key_id != own))

    @property
    def issuing(self) -> tuple[Ca, ...]:
        """The issuing CAs that are trusted, the one that issues for clients first."""
        standing = [ca for ca in self._cas if ca.kind is CaKind.ISSUING and ca.is_standing]
        return tuple(sorted(standing, key=lambda ca: not ca.clients))

    @property
    def signing(self) -> tuple[Ca, ...]:
        """The issuing CAs that are trusted and whose keys are not lost: those that sign their CRLs."""
        return tuple(ca for ca in self.issuing if ca.lost_at is None)

    @cached_property
    def for_clients(self) -> Ca:
        """The issuing CA of devices and services."""
        return self._one("clients", [ca for ca in self._cas if ca.clients])

    @cached_property
    def for_brokers(self) -> Ca:
        """The issuing CA of brokers."""
        return self._one("brokers", [ca for ca in self._cas if ca.brokers])

    @staticmethod
    def _one(whose: str, found: list[Ca]) -> Ca:
        if len(found) != 1:
            raise RegistryError(
                f"could not read the registry: it names {len(found)} issuing CAs for {whose}",
                hint="restore it from a backup, together with the audit log",
            )
        return found[0]


def read_cas(view: View) -> Cas:
    """Return the CAs that the registry knows.

    Raises:
        RegistryError: what it notes of one is damaged.
    """
    try:
        return Cas(tuple(_from_note(key_id, note) for key_id, note in view.notes(TOPIC).items()))
    except (KeyError, TypeError, ValueError) as error:
        raise RegistryError(
            f"could not read the registry: what it notes of a CA is damaged ({error})",
            hint="restore it from a backup, together with the audit log",
        ) from error


def put_ca(transaction: Transaction, ca: Ca) -> None:
    """Note a CA, in the place of what was noted of it."""
    note: dict[str, Any] = {}
    for field in dataclasses.fields(Ca):
        value = getattr(ca, field.name)
        if isinstance(value, bytes):
            value = b64encode(value).decode()
        elif isinstance(value, datetime):
            value = value.astimezone(UTC).isoformat()
        if value not in (None, False, ""):
            note[field.name] = value
    transaction.put_note(TOPIC, ca.key_id, note)


def _from_note(key_id: str, note: dict[str, Any]) -> Ca:
    times = ("made_at", "activated_at", "closed_at", "retired_at", "lost_at")
    facts: dict[str, Any] = {name: datetime.fromisoformat(note[name]) for name in times if name in note}
    certificate_der = b64decode(note["certificate_der"], validate=True)
    if note["key_id"] != key_id or profile.key_id(x509.load_der_x509_certificate(certificate_der)).hex() != key_id:
        raise ValueError("its certificate is another one's")
    return Ca(
        key_id=key_id,
        kind=CaKind(note["kind"]),
        certificate_der=certificate_der,
        root=note["root"],
        clients=note.get("clients") is True,
        brokers=note.get("brokers") is True,
        key_uri=note.get("key_uri", ""),
        **facts,
    )
