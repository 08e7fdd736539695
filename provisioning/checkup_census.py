"""All rows of a registry, added up for `birthmark doctor`.

Rules:

- Rows are counted one after the other, and none is kept: of what is wrong a number and a few names are.
- What is known of an identity matters where a gateway saw it; so the gateways are asked first (`Seen`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from birthmark.provisioning.p256 import KEY_HEAD, POINT_OCTETS
from birthmark.provisioning.registry.model import Kind, Row, State

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from birthmark.device.messages import Sighting
    from birthmark.provisioning.gateway_look import Look

NAMED: Final = 5
"""How many of those that a remark is about it names."""
STUCK_AFTER: Final = timedelta(hours=24)
WEEK: Final = timedelta(days=7)
ENDING_WITHIN: Final = timedelta(days=30)
ENDING_PART: Final[Mapping[Kind, int]] = {Kind.DEVICE: 4, Kind.SERVICE: 3, Kind.BROKER: 3}
"""Of a short life the last third counts, or quarter, if that is less than `ENDING_WITHIN`. A gateway and `inspect`
go by a third; but a device begins to renew then, and one that does so in time is nothing to tell of."""
NEVER_AFTER: Final = timedelta(days=7)
"""How long a device that was made may take until it is online for the first time."""


@dataclass(slots=True)
class Few:
    """How many identities there are of some kind, and the names of the first ones."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Count a row."""
        self.count += 1
        if len(self.names) < NAMED:
            self.names.append(row.name)


@dataclass(frozen=True, slots=True)
class Seen:
    """Whom gateways saw."""

    cert_serials: frozenset[int] = frozenset()
    names: frozenset[str] = frozenset()
    """In lower case."""

    @classmethod
    def of(cls, looks: Iterable[Look]) -> Self:
        """Return whom these gateways saw."""
        sightings = [sighting for look in looks for sighting in look.sightings or ()]
        serials = frozenset(map(seen_serial, sightings))
        return cls(serials, frozenset(sighting.id.lower() for sighting in sightings))


def seen_serial(sighting: Sighting) -> int:
    """Return the serial number of the certificate that was seen; -1 if a gateway says none."""
    try:
        return int(sighting.cert_serial, 16)
    except ValueError:
        return -1


@dataclass(slots=True)
class Census:
    """All rows, added up."""

    now: datetime
    issuers: frozenset[str] = frozenset()
    """Key identifiers of the station's issuing CAs."""
    seen: Seen = field(default_factory=Seen)
    rows: int = 0
    in_use: Counter[Kind] = field(default_factory=Counter)
    """Certificates in use: ATTESTED, live, not revoked."""
    weeks: Counter[int] = field(default_factory=Counter)
    """Devices by the week in which their certificate ends: 0 is within seven days, -1 ended."""
    ended_devices: Few = field(default_factory=Few)
    """In use, but for their certificates, which have ended."""
    ending_devices: Few = field(default_factory=Few)
    """In use, and ending soon."""
    ending_services: list[tuple[Kind, str, datetime]] = field(default_factory=list)
    """Services and brokers in use, by name, and when they end or have ended, if that is soon."""
    stuck: Few = field(default_factory=Few)
    renewing: Few = field(default_factory=Few)
    """Renewals that their devices have not confirmed for a day."""
    never_connected: Few = field(default_factory=Few)
    """Devices in use that were made more than `NEVER_AFTER` ago, and that no gateway saw."""
    names_by_serial: dict[int, str] = field(default_factory=dict)
    """Of the certificates that were seen."""
    revoked_at: dict[int, datetime] = field(default_factory=dict)
    """Of the certificates that were seen."""
    odd_keys: Few = field(default_factory=Few)
    duplicate_keys: Few = field(default_factory=Few)
    foreign: defaultdict[str, Few] = field(default_factory=lambda: defaultdict(Few))
    """Rows whose certificate is not what it should be, by what is wrong with it."""
    _keys: set[int] = field(default_factory=set)
    """Hashes: with a million keys, two that differ share one once in ten million times."""

    def add(self, row: Row) -> None:
        """Count a row."""
        self.rows += 1
        if row.cert_serial is not None and row.cert_serial in self.seen.cert_serials:
            self.names_by_serial[row.cert_serial] = row.name
            if row.revoked_at is not None:
                self.revoked_at[row.cert_serial] = row.revoked_at
        self._look_at_key(row)
        if row.state not in (State.ATTESTED, State.VOID) and self.now - row.changed_at > STUCK_AFTER:
            (self.renewing if row.is_open_renewal else self.stuck).add(row)
        if row.state is not State.ATTESTED or not row.is_live or row.is_revoked or row.not_after is None:
            return
        self.in_use[row.kind] += 1
        left = row.not_after - self.now
        if row.kind is Kind.DEVICE:
            self._add_device(row, left)
        elif left < _soon(row):
            self.ending_services.append((row.kind, row.name, row.not_after))

    def _add_device(self, row: Row, left: timedelta) -> None:
        self.weeks[max(-1, left // WEEK)] += 1
        if left < _soon(row):
            (self.ended_devices if left < timedelta() else self.ending_devices).add(row)
        if self.now - row.changed_at > NEVER_AFTER and row.name_folded not in self.seen.names:
            self.never_connected.add(row)

    def _look_at_key(self, row: Row) -> None:
        key = row.public_key_der
        if key is None:
            return
        if len(key) != len(KEY_HEAD) + POINT_OCTETS or not key.startswith(KEY_HEAD):
            self.odd_keys.add(row)
        elif hash(key) in self._keys:
            self.duplicate_keys.add(row)
        self._keys.add(hash(key))
        if row.certificate_der is not None and row.state is not State.VOID:
            trouble = certificate_trouble(row, row.certificate_der, self.issuers)
            if trouble:
                self.foreign[trouble].add(row)


def _soon(row: Row) -> timedelta:
    """Return how long before the end of a row's certificate somebody should know."""
    if row.not_before is None or row.not_after is None:
        return ENDING_WITHIN
    return min(ENDING_WITHIN, (row.not_after - row.not_before) / ENDING_PART[row.kind])


def certificate_trouble(row: Row, certificate_der: bytes, issuers: frozenset[str]) -> str:
    """Say what is wrong with a row's certificate; empty if nothing is. Its signature is not checked here."""
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        authority = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
        key_der = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return "cannot be read"
    if certificate.serial_number != row.cert_serial:
        return "has another serial number than its row"
    if key_der != row.public_key_der:
        return "is for another key than its row's"
    if (authority.key_identifier or b"").hex() not in issuers:
        return "was issued by another CA"
    return ""
