"""One row of the registry: a unit, a service or a broker, and how far its enrollment has come.

Rules (docs/serial-protocol.md section 8):

- A row moves forward through the states only, and from any of them to VOID, which is final.
- KEYED and later hold the public key and the certificate's serial number, so that both are durable before the
  certificate is signed; ISSUED and later hold the certificate.
- What is once known of a certificate never changes: its key, its serial number, its bytes, its revocation.
- A renewal is a row of its own, with the hwid, txn and bundle hash of the row that it renews. It holds neither
  name nor hwid until it is ATTESTED: a unit with a renewal under way is the made unit that it was before.
- A row never holds a private key.

A row is a tuple: registries make, change and compare them by the ten thousand, and an object with as many fields
takes several times as long for each of these.
"""

from __future__ import annotations

import re
from enum import StrEnum
from functools import lru_cache
from itertools import compress
from operator import ne
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from birthmark.device.identity import BrokerName, DeviceId, Role

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

HWID_OCTETS: Final = range(4, 33)
TXN_OCTETS: Final = 16
SHA256_OCTETS: Final = 32
_KEY_ID: Final = re.compile("(?:[0-9a-f]{2}){1,64}")
CERT_SERIAL_MAX: Final = 1 << 159
"""A serial number is a positive integer of at most 20 octets, the first bit clear (RFC 5280 section 4.1.2.2)."""


REASON_NAMES: Final = frozenset(
    {
        "unspecified",
        "keyCompromise",
        "cACompromise",
        "affiliationChanged",
        "superseded",
        "cessationOfOperation",
        "certificateHold",
        "privilegeWithdrawn",
        "aACompromise",
    }
)
"""What a CRL may give as the reason of a revocation (RFC 5280 section 5.3.1)."""


class Kind(StrEnum):
    """Whose certificate a row is about."""

    DEVICE = "device"
    SERVICE = "service"
    BROKER = "broker"


class State(StrEnum):
    """How far the enrollment has come; each state is durable before the next action on the wire or at the CA."""

    RESERVED = "RESERVED"
    KEYED = "KEYED"
    ISSUED = "ISSUED"
    PREPARED = "PREPARED"
    COMMITTED = "COMMITTED"
    ATTESTED = "ATTESTED"
    VOID = "VOID"

    def reached(self, other: State) -> bool:
        """Whether a row in this state has passed through `other`; never for VOID, whose past is not known."""
        return self is not State.VOID and _ORDER[self] >= _ORDER[other]


_ON_THE_LINE: Final = frozenset({State.RESERVED, State.PREPARED, State.COMMITTED})
"""Where only a board on a serial line comes to; one that is issued from a request may be without a hwid."""
_ORDER: Final = {state: order for order, state in enumerate(State)}


class KeyMode(StrEnum):
    """Who made the device's key pair."""

    ON_DEVICE = "on-device"
    STATION = "station"


# What thousands of rows have in common is checked once for all.
@lru_cache(256)
def _check_role(kind: Kind, role: str) -> None:
    if kind is Kind.BROKER:
        if role:
            raise ValueError("a broker holds no role")
    elif Role(role).is_reserved != (kind is Kind.SERVICE):
        raise ValueError(f"a {kind} may not hold the role {role}")


@lru_cache(256)
def _check_key_ids(issuer: str, anchors: str) -> None:
    for key_id in (issuer, *anchors.split(" ")):
        if key_id and not _KEY_ID.fullmatch(key_id):
            raise ValueError("the key identifier of a CA is not lower-case hex")


class _Fields(NamedTuple):
    number: int
    """The row's own number, from 1, never used again."""
    kind: Kind
    name: str
    """Device id, service name or broker name: the certificate's CN."""
    role: str
    """The role in the certificate's OU; empty for a broker."""
    state: State
    created_at: datetime
    changed_at: datetime
    key_mode: KeyMode | None = None
    hwid: bytes | None = None
    txn: bytes | None = None
    public_key_der: bytes | None = None
    """SubjectPublicKeyInfo, DER."""
    cert_serial: int | None = None
    issuer: str = ""
    """The issuing CA that signs, or signed, its certificate: its subject key identifier in lower-case hex. Set
    together with the serial number."""
    anchors: str = ""
    """The roots that its holder is known to trust: their key identifiers, between spaces."""
    certificate_der: bytes | None = None
    bundle: bytes | None = None
    """Kept until ATTESTED, then dropped; its hash stays."""
    bundle_sha256: bytes | None = None
    replaces: int | None = None
    """The number of the row that this one is to replace."""
    replaced_by: int | None = None
    """The number of the row that is replacing, or has replaced, this one."""
    renews: int | None = None
    """The number of the row whose certificate this one's is to follow, for the same board and enrollment."""
    replaces_reason: str = ""
    """The RFC 5280 reason's name under which the certificate of the replaced row is to be revoked."""
    batch: str = ""
    """The batch it is made in; empty for none."""
    label: str = ""
    """What its label says beside its id: lines `name: value`."""
    void_reason: str = ""
    not_before: datetime | None = None
    not_after: datetime | None = None
    revoked_at: datetime | None = None
    revocation_reason: str = ""
    """The RFC 5280 reason's name, such as `keyCompromise`; empty while not revoked."""


_PLACES: Final = {name: place for place, name in enumerate(_Fields._fields)}


class Row(_Fields):
    """One enrollment, with everything that the station remembers of it.

    Raises:
        ValueError: a field contradicts another one or has the wrong size.
        IdentityError: the name or the role is outside its grammar.
    """

    __slots__ = ()

    if not TYPE_CHECKING:  # type checkers know the signature: that of the fields

        def __new__(cls, *values: Any, **named: Any) -> Self:
            """Make a row, and check it."""
            row = super().__new__(cls, *values, **named)
            row._check_identity()
            row._check_sizes()
            row._check_state()
            return row

    @property
    def name_folded(self) -> str:
        """The form in which names are compared, across devices, services and brokers."""
        return self.name.lower()

    @property
    def is_live(self) -> bool:
        """Whether this row holds its name and hwid: neither VOID, nor being replaced, nor a renewal under way."""
        return self.state is not State.VOID and self.replaced_by is None and not self.is_open_renewal

    @property
    def is_open_renewal(self) -> bool:
        """Whether this row is a renewal that its device has not confirmed yet."""
        return self.renews is not None and self.state not in {State.ATTESTED, State.VOID}

    @property
    def is_revoked(self) -> bool:
        """Whether its certificate is, or is to be, on the CRL."""
        return self.revoked_at is not None

    def changed(self, **fields: Any) -> Row:
        """Return this row with other content in some fields; it is checked as a new one."""
        return Row(*self._content_with(fields))

    def certified(
        self,
        certificate_der: bytes,
        state: State,
        *,
        anchors: str,
        not_before: datetime,
        not_after: datetime,
    ) -> Row:
        """Return this row with its certificate, in the state that it is in with it.

        Args:
            certificate_der: what was signed for it.
            state: ISSUED, or ATTESTED for one that has to prove nothing more.
            anchors: the roots that its holder is known to trust, as a row has them.
            not_before: when the certificate begins.
            not_after: when it ends.

        Raises:
            ValueError: a field contradicts another one.
        """
        certified = self._with(
            state=state,
            certificate_der=certificate_der,
            anchors=anchors,
            not_before=not_before,
            not_after=not_after,
        )
        certified._check_sizes()
        certified._check_state()
        return certified

    def stamped(self, *, number: int, created_at: datetime, changed_at: datetime, bundle: bytes | None) -> Row:
        """Return this row as the registry stores it: with what is the registry's to give, and nothing else new.

        Nothing of that contradicts another field, so nothing is checked again.
        """
        return self._with(number=number, created_at=created_at, changed_at=changed_at, bundle=bundle)

    def _with(self, **fields: object) -> Row:
        """Return this row with other content in some fields, unchecked: thousands are changed at once."""
        return tuple.__new__(Row, self._content_with(fields))

    def _content_with(self, fields: Mapping[str, object]) -> list[Any]:
        content: list[Any] = list(self)
        for name, value in fields.items():
            content[_PLACES[name]] = value
        return content

    def _check_identity(self) -> None:
        if self.number < 1:
            raise ValueError(f"row number {self.number} is not positive")
        (BrokerName if self.kind is Kind.BROKER else DeviceId)(self.name)
        _check_role(self.kind, self.role)

    def _check_sizes(self) -> None:
        _check_key_ids(self.issuer, self.anchors)
        if self.hwid is not None and len(self.hwid) not in HWID_OCTETS:
            raise ValueError("the hwid is not 4 to 32 octets long")
        if self.txn is not None and len(self.txn) != TXN_OCTETS:
            raise ValueError("the txn is not 16 octets long")
        if self.bundle_sha256 is not None and len(self.bundle_sha256) != SHA256_OCTETS:
            raise ValueError("the bundle hash is not 32 octets long")
        if self.cert_serial is not None and not 0 < self.cert_serial < CERT_SERIAL_MAX:
            raise ValueError("the certificate's serial number is out of range")
        for name in ("created_at", "changed_at", "not_before", "not_after", "revoked_at"):
            moment = getattr(self, name)
            if moment is not None and moment.tzinfo is None:
                raise ValueError(f"{name} has no time zone")

    def _check_state(self) -> None:
        if (self.public_key_der is None or self.cert_serial is None) and self.state.reached(State.KEYED):
            raise ValueError(f"a row in {self.state} needs a public key and a serial number")
        if self.certificate_der is None and self.state.reached(State.ISSUED):
            raise ValueError(f"a row in {self.state} needs its certificate")
        if self.kind is Kind.DEVICE and self.txn is None:
            raise ValueError("a device's row needs a txn")
        if self.kind is Kind.DEVICE and self.hwid is None and self.state in _ON_THE_LINE:
            raise ValueError(f"a device's row in {self.state} needs a hwid")
        if bool(self.void_reason) != (self.state is State.VOID):
            raise ValueError("a row has a void reason exactly when it is VOID")
        if self.is_revoked != bool(self.revocation_reason):
            raise ValueError("a revocation needs a time and a reason")
        for reason in (self.revocation_reason, self.replaces_reason):
            if reason and reason not in REASON_NAMES:
                raise ValueError(f"{reason!r:.30} is no reason of RFC 5280")
        if self.is_revoked and self.cert_serial is None:
            raise ValueError("only a certificate with a serial number can be revoked")


REVOKED_AT_HAND: Final = 1 << 14
"""Of so many revoked certificates, what was read and made of them is kept: a CRL has the same ones again."""


class RevokedCertificate(NamedTuple):
    """What a CRL needs to know of a row whose certificate is revoked; a fleet has many of these."""

    number: int
    """The row's."""
    cert_serial: int
    issuer: str
    not_after: datetime | None
    revoked_at: datetime
    revocation_reason: str

    def checked(self) -> Self:
        """Return this, as it was read; raises `ValueError` if a field has the wrong size, or is no reason."""
        if not 0 < self.cert_serial < CERT_SERIAL_MAX:
            raise ValueError("the certificate's serial number is out of range")
        if self.revocation_reason not in REASON_NAMES:
            raise ValueError(f"{self.revocation_reason!r:.30} is no reason of RFC 5280")
        return self


_ONCE_SET: Final = frozenset(
    {
        "public_key_der",
        "cert_serial",
        "issuer",
        "certificate_der",
        "bundle_sha256",
        "not_before",
        "not_after",
        "revoked_at",
        "hwid",
        "txn",
        "replaces",
    }
)
_FIXED: Final = frozenset({"number", "kind", "name", "role", "created_at", "replaces_reason", "batch", "renews"})


def check_change(old: Row, new: Row) -> None:
    """Check that `new` may follow `old` as the content of one row.

    This also catches a writer that holds a stale row: it would undo a revocation or a VOID that somebody
    else has made durable in the meantime.

    Raises:
        ValueError: a state that goes back, or a fact that may not change and does.
    """
    if old.state is State.VOID and new.state is not State.VOID:
        raise ValueError(f"row {old.number} is VOID for good ({old.void_reason})")
    if new.state is not State.VOID and not new.state.reached(old.state):
        raise ValueError(f"row {old.number} may not go back from {old.state} to {new.state}")
    for name in compress(Row._fields, map(ne, old, new)):
        if name in _FIXED or (name in _ONCE_SET and getattr(old, name) not in (None, "")):
            raise ValueError(f"{name} of row {old.number} may not change")
