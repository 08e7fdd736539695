"""What gateways and the station say to each other, as values: JSON objects in UTF-8, one schema each.

Broker and station may not import each other, so it is defined here. What a device says of itself is in
`device.presence`.

Rules: a reader takes any object whose known keys have the right types, and ignores unknown keys (a newer
writer may add some); anything else is a `RemoteProtocolError`. Times are seconds since 1970 as a number.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from birthmark.device.escape import quoted
from birthmark.device.json_fields import Fields, dump

NONCE_BYTES = 16
MAX_VISIT = 2**53 - 1
"""The most that every reader of JSON keeps exactly (RFC 8259 section 6)."""
Outcome = Literal["installed", "current", "refused"]


@dataclass(frozen=True, slots=True)
class TimeRequest:
    """A device asks its gateway for the time, on `devices/{id}/time/request`."""

    nonce: bytes
    """16 octets, in lower-case hex in the message; new for each request."""

    def to_bytes(self) -> bytes:
        """Return the message's payload."""
        return dump({"nonce": self.nonce.hex()})

    @classmethod
    def from_bytes(cls, payload: bytes) -> TimeRequest:
        """Read a payload; raises `RemoteProtocolError` if it is no request for the time."""
        return cls(Fields("request for the time", payload).hex("nonce", length=NONCE_BYTES))


@dataclass(frozen=True, slots=True)
class TimeAnswer:
    """The gateway's clock when it read a request, on `devices/{id}/time/answer`; never retained."""

    nonce: bytes
    """The request's."""
    time: float

    def to_bytes(self) -> bytes:
        """Return the message's payload."""
        return dump({"nonce": self.nonce.hex(), "time": self.time})

    @classmethod
    def from_bytes(cls, payload: bytes) -> TimeAnswer:
        """Read a payload; raises `RemoteProtocolError` if it tells no time."""
        fields = Fields("telling of the time", payload)
        return cls(fields.hex("nonce", length=NONCE_BYTES), fields.number("time"))


@dataclass(frozen=True, slots=True)
class ClosedIdentity:
    """What a revocation did at one gateway to one identity that had a session there."""

    id: str
    cert_serial: str
    """In lower-case hex."""
    sessions_closed: int
    elapsed_ms: float
    """From the arrival of the CRL to the closing of the last of its connections."""
    will_suppressed: bool
    """Whether a last will was there, and was not sent."""
    queued_messages_purged: int
    retained_presence_purged: bool


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a gateway did with a CRL; on `gateway/{name}/receipts`, and as a file beside a CRL taken by path."""

    gateway: str
    outcome: Outcome
    """`current`: the very same CRL was installed already; `refused`: nothing changed, `reason` says why."""
    issuer: str
    """The issuing CA's subject key identifier, lower-case hex; empty if it could not be read."""
    crl_number: int
    """Of the CRL in force for that issuer after this (0: none)."""
    crl_sha256: str
    """Of the CRL that arrived, DER, in lower-case hex."""
    revoked_count: int
    """Certificates on the CRL in force for that issuer."""
    installed_at: float
    elapsed_ms: float
    """From the arrival of the CRL until every effect had happened."""
    closed: tuple[ClosedIdentity, ...] = ()
    reason: str = ""

    def to_bytes(self) -> bytes:
        """Return the message's payload."""
        return dump(asdict(self))

    @classmethod
    def from_bytes(cls, payload: bytes) -> Receipt:
        """Read a payload; raises `RemoteProtocolError` if it is no receipt."""
        fields = Fields("receipt", payload)
        return cls(
            gateway=fields.text("gateway"),
            outcome=outcome_in(fields),
            issuer=fields.text("issuer"),
            crl_number=fields.whole("crl_number"),
            crl_sha256=fields.text("crl_sha256"),
            revoked_count=fields.whole("revoked_count"),
            installed_at=fields.number("installed_at"),
            elapsed_ms=fields.number("elapsed_ms"),
            closed=tuple(_closed(item) for item in fields.objects("closed")),
            reason=fields.text("reason", default=""),
        )


@dataclass(frozen=True, slots=True)
class UpstreamState:
    """How a gateway stands with one of the brokers above it."""

    name: str
    connected: bool
    since: float
    """When it last changed, by the gateway's clock (0: it never was connected)."""
    server: str = ""
    """`host:port` of the one that it is connected to, or tried last."""
    spooled: int = 0
    """Messages that wait to go up."""
    reason: str = ""
    """Why it is not connected."""


@dataclass(frozen=True, slots=True)
class GatewayStatus:
    """A gateway's own state, retained on `gateway/{name}/status`."""

    gateway: str
    online: bool
    clock: float
    """By the gateway's clock, when it was said."""
    crl_numbers: dict[str, int]
    """The number of the CRL in force, by issuing CA's subject key identifier in lower-case hex."""
    crl_next_update: float
    """The earliest nextUpdate among them (0: none)."""
    policy_sha256: str
    """Of the text of the policy in force."""
    sessions: int
    """Connected sessions."""
    alarms: tuple[str, ...] = ()
    """What needs a person: `crl-due` (past half its life), `crl-expired`, `crl-refusing` (nobody gets in)."""
    counters: dict[str, int] = field(default_factory=dict)
    """What the gateway has counted since it started."""
    policy_version: int = 0
    """Of the fleet's policy (`fleet_policy.SignedPolicy`) that is in force (0: it goes by a policy of its own)."""
    upstreams: tuple[UpstreamState, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the message's payload."""
        return dump(asdict(self))

    @classmethod
    def from_bytes(cls, payload: bytes) -> GatewayStatus:
        """Read a payload; raises `RemoteProtocolError` if it is no gateway status."""
        fields = Fields("gateway status", payload)
        return cls(
            gateway=fields.text("gateway"),
            online=fields.boolean("online"),
            clock=fields.number("clock"),
            crl_numbers=fields.counts("crl_numbers"),
            crl_next_update=fields.number("crl_next_update"),
            policy_sha256=fields.text("policy_sha256"),
            sessions=fields.whole("sessions"),
            alarms=fields.texts("alarms"),
            counters=fields.counts("counters", default={}),
            policy_version=fields.whole("policy_version", default=0),
            upstreams=tuple(_upstream(item) for item in fields.objects("upstreams")),
        )


@dataclass(frozen=True, slots=True)
class AddressSeen:
    """One address that a certificate was used from, and when: the first and the last time that is known."""

    address: str
    first_seen: float
    last_seen: float


@dataclass(frozen=True, slots=True)
class Sighting:
    """When and from where a gateway saw one identity, retained on `gateway/{name}/seen/{id}`.

    Said when the certificate or the address changes, at most once a minute, and else once a day: `last_seen` may
    be a day late.
    """

    id: str
    cert_serial: str
    """Of the certificate that it used last, in lower-case hex."""
    first_seen: float
    """Of the identity, with whatever certificate."""
    last_seen: float
    addresses: tuple[AddressSeen, ...] = ()
    """Where that certificate was used from: a few of the last, the most recent at the end."""
    visit: int = 0
    """Counts an identity's moves between the gateways of a fleet: the highest is where it is (0: not counted)."""
    moved_to: str = ""
    """The gateway that it has gone to from here, as far as this one knows; empty if it was last seen here."""

    def to_bytes(self) -> bytes:
        """Return the message's payload."""
        return dump(asdict(self))

    @classmethod
    def from_bytes(cls, payload: bytes) -> Sighting:
        """Read a payload; raises `RemoteProtocolError` if it is no sighting."""
        fields = Fields("sighting", payload)
        return cls(
            id=fields.text("id"),
            cert_serial=fields.text("cert_serial"),
            first_seen=fields.number("first_seen"),
            last_seen=fields.number("last_seen"),
            addresses=tuple(
                AddressSeen(item.text("address"), item.number("first_seen"), item.number("last_seen"))
                for item in fields.objects("addresses")
            ),
            visit=fields.whole("visit", default=0, most=MAX_VISIT),
            moved_to=fields.text("moved_to", default=""),
        )


def _upstream(item: Fields) -> UpstreamState:
    return UpstreamState(
        name=item.text("name"),
        connected=item.boolean("connected"),
        since=item.number("since"),
        server=item.text("server", default=""),
        spooled=item.whole("spooled", default=0),
        reason=item.text("reason", default=""),
    )


def outcome_in(fields: Fields) -> Outcome:
    """Return the outcome that a receipt tells; raises `RemoteProtocolError` if there is no such one."""
    told = fields.text("outcome")
    outcome: Outcome | None = next((known for known in get_args(Outcome) if known == told), None)
    if outcome is None:
        raise fields.error(f"unknown outcome {quoted(told)}")
    return outcome


def _closed(item: Fields) -> ClosedIdentity:
    return ClosedIdentity(
        id=item.text("id"),
        cert_serial=item.text("cert_serial"),
        sessions_closed=item.whole("sessions_closed"),
        elapsed_ms=item.number("elapsed_ms"),
        will_suppressed=item.boolean("will_suppressed"),
        queued_messages_purged=item.whole("queued_messages_purged"),
        retained_presence_purged=item.boolean("retained_presence_purged"),
    )
