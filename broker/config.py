"""The broker's settings, read from `broker.toml`.

Rules: a key that is not known here is an error, and so is a value out of bounds; an error names file, line and
key. A relative path is relative to the folder of the file that holds it, never to the working directory.
Reading settings opens no other file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from birthmark.broker.toml_file import Table, read_toml
from birthmark.broker.upstream.settings import UpstreamSettings, read_upstreams
from birthmark.device.errors import ConfigurationError, IdentityError, UsageError
from birthmark.device.escape import quoted
from birthmark.device.identity import BrokerName
from birthmark.device.renewal.messages import MAX_GRACE_DAYS

DEFAULT_LISTEN = "0.0.0.0:8883"
DEFAULT_RENEWAL_LISTEN = "0.0.0.0:8884"
"""The port after the default one: where a device looks for it."""
DEFAULT_RENEWAL_GRACE_DAYS = 30.0
C = TypeVar("C", bound=StrEnum)

INIT_HINT = "write one with `birthmark-broker init`"


class OnDenied(StrEnum):
    """What becomes of a client whose PUBLISH the policy denies (MQTT 3.1.1 has no refusal for it)."""

    DROP = "drop"
    """The message is dropped and logged; with QoS 1 or 2 it is acknowledged (§3.3.5 allows both)."""
    DISCONNECT = "disconnect"
    """The connection is closed."""


class Durability(StrEnum):
    """What an acknowledgement promises about retained messages and persistent sessions."""

    ACKNOWLEDGED = "acknowledged"
    """It is on disk: it survives a crash and a power cut."""
    PERIODIC = "periodic"
    """It is in memory: a crash costs about the last second, a stop nothing."""
    NONE = "none"
    """It is in memory alone, and gone with the broker."""


class QueueFull(StrEnum):
    """What gives way when a message of QoS 1 or 2 finds its session's queue full."""

    DROP_OLDEST = "drop_oldest"
    """The message that has waited longest."""
    DROP_NEWEST = "drop_newest"
    """The message that finds no room."""
    DISCONNECT = "disconnect"
    """The message that finds no room; and a client that is connected and does not keep up is disconnected."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client, and all of them together, may use of the gateway."""

    max_packet_bytes: int = 1_048_576
    """The remaining length of one MQTT packet; a larger one closes its connection."""
    max_connections: int = 20_000
    max_connections_per_address: int = 10_000
    """From one IPv4 address, or one IPv6 network of 64 bits: half, so that nobody takes all from one place."""
    handshake_timeout_s: float = 10.0
    """From the TCP connection to the end of the TLS handshake."""
    connect_timeout_s: float = 10.0
    """From the end of the TLS handshake to the whole CONNECT packet."""
    max_keepalive_s: int = 3_600
    """A client that asks for a longer keepalive, or for none, is held to this one."""
    stall_timeout_s: float = 30.0
    """A client whose socket takes nothing for this long, while something waits for it, is cut off."""
    max_messages_per_s: int = 0
    """PUBLISHes of one identity; a faster one is read from more slowly. 0: any number."""
    max_bytes_per_s: int = 0
    """Bytes of one identity, likewise."""
    max_subscriptions: int = 200
    """Filters of one session."""
    max_inflight: int = 64
    """Messages of QoS 1 and 2 on their way to one client, not acknowledged yet."""
    max_queued_messages: int = 1_000
    """Messages waiting for one session, connected or not."""
    max_queued_bytes: int = 4_194_304
    """Those together, and what is buffered for the socket of a slow client."""
    queue_full: QueueFull = QueueFull.DROP_OLDEST
    """What gives way beyond either."""
    max_queued_bytes_total: int = 268_435_456
    """What waits for all sessions together; beyond it, every queue is full."""
    max_sessions: int = 100_000
    """Sessions kept, connected or not."""
    session_expiry_s: int = 604_800
    """A session whose client does not come back for this long is forgotten."""
    max_retained_messages: int = 100_000
    max_retained_bytes: int = 67_108_864
    max_retained_messages_per_client: int = 10_000
    """Of those, published by one identity."""
    max_retained_bytes_per_client: int = 16_777_216
    shutdown_timeout_s: float = 1.0
    """What a stop grants clients to take what is on its way to them. More changes nothing (`stream.LINGER_S`)."""


@dataclass(frozen=True, slots=True)
class RevocationSettings:
    """How the broker treats its CRLs."""

    grace_days: float = 14.0
    """How long after its nextUpdate an expired CRL still lets in what it does not list."""
    fail_closed: bool = False
    """With an expired CRL, refuse everyone at once, without grace."""
    max_crl_bytes: int = 67_108_864
    """200,000 entries have 7.8 MB."""
    watch_interval_s: float = 0.1
    """How often the CRL, the policy and the credentials are looked at for a change."""


@dataclass(frozen=True, slots=True)
class RenewalListener:
    """A second port, for devices whose certificates have expired: there they can renew them, and nothing else."""

    host: str
    port: int
    """0: any free one."""
    grace: timedelta
    """How long after its end a certificate is still let in there."""


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """Everything that `broker.toml` says. Paths are absolute."""

    name: BrokerName
    """The gateway's name, the `{name}` of its topics and receipts."""
    listen_host: str
    listen_port: int
    """0: any free port."""
    credentials_path: Path
    """The broker's own key, certificate and chain, one PEM file."""
    clients_ca_path: Path
    """The trusted issuing CAs of the clients, PEM."""
    crl_path: Path
    """The watched CRL file; a receipt is written beside it."""
    policy_path: Path
    data_folder: Path
    """What the broker keeps over a restart: installed CRLs, sessions, retained messages."""
    on_denied: OnDenied = OnDenied.DROP
    durability: Durability = Durability.ACKNOWLEDGED
    limits: Limits = field(default_factory=Limits)
    revocation: RevocationSettings = field(default_factory=RevocationSettings)
    renewal_listener: RenewalListener | None = None
    """Off unless the file has its table."""
    upstreams: tuple[UpstreamSettings, ...] = ()
    path: Path | None = None
    """The file these settings come from."""

    @property
    def receipt_path(self) -> Path:
        """Where the receipt for the watched CRL file goes."""
        return self.crl_path.with_name(self.crl_path.name + ".receipt")


def read_settings(path: Path) -> BrokerSettings:
    """Read `broker.toml`.

    Raises:
        ConfigurationError: it is not there, or something in it cannot be used; file, line and key are named.
    """
    root, _ = read_toml(path, ConfigurationError, missing_hint=INIT_HINT)
    root.only(
        (
            "name",
            "listen",
            "credentials",
            "clients_ca",
            "crl",
            "policy",
            "data_folder",
            "on_denied",
            "durability",
            "limits",
            "revocation",
            "renewal_listener",
            "upstream",
        )
    )
    try:
        name = BrokerName(root.text("name"))
    except IdentityError as error:
        raise root.complain("name", cause=error.message, hint=error.hint) from error
    host, port = _listen(root)
    folder = path.absolute().parent
    return BrokerSettings(
        name=name,
        listen_host=host,
        listen_port=port,
        credentials_path=_path(root, folder, "credentials", "server.pem"),
        clients_ca_path=_path(root, folder, "clients_ca", "clients-ca.pem"),
        crl_path=_path(root, folder, "crl", "crl.pem"),
        policy_path=_path(root, folder, "policy", "policy.toml"),
        data_folder=_path(root, folder, "data_folder", "data"),
        on_denied=_choice(root, "on_denied", OnDenied.DROP),
        durability=_choice(root, "durability", Durability.ACKNOWLEDGED),
        limits=_limits(root.table("limits")),
        revocation=_revocation(root.table("revocation")),
        renewal_listener=_renewal_listener(root) if root.has("renewal_listener") else None,
        upstreams=read_upstreams(root, folder, name),
        path=path.absolute(),
    )


def parse_listen(text: str) -> tuple[str, int]:
    """Split `host:port`; an IPv6 address stands in square brackets. Raises `ValueError` with the cause."""
    host, colon, port_text = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("an IPv6 address stands in square brackets: [::]:8883")
    if not colon or not host:
        raise ValueError("it must be host:port, such as 0.0.0.0:8883")
    if not (port_text.isascii() and port_text.isdigit() and int(port_text) <= 65_535):
        raise ValueError("the port must be a number from 0 to 65535")
    return host, int(port_text)


def _listen(root: Table, default: str = DEFAULT_LISTEN) -> tuple[str, int]:
    try:
        return parse_listen(root.text("listen", default))
    except ValueError as error:
        raise root.complain("listen", cause=str(error)) from error


def _path(root: Table, folder: Path, key: str, default: str) -> Path:
    text = root.text(key, default)
    if not text or "\0" in text:
        raise root.complain(key, cause="it must be the path of a file or folder")
    return folder / Path(text).expanduser()


def _choice(table: Table, key: str, default: C) -> C:
    text = table.text(key, default)
    try:
        return type(default)(text)
    except ValueError as error:
        choices = ", ".join(repr(str(choice)) for choice in type(default))
        raise table.complain(key, cause=f"{quoted(text, 32)} is none of {choices}") from error


# The least and the most of each limit: the least still lets a stock client work, the most still fits a gateway.
_LIMIT_BOUNDS: dict[str, tuple[int, int]] = {
    "max_packet_bytes": (1_024, 268_435_455),
    "max_connections": (1, 1_000_000),
    "max_connections_per_address": (1, 1_000_000),
    "max_messages_per_s": (0, 10_000_000),
    "max_bytes_per_s": (0, 2**40),
    "max_keepalive_s": (1, 65_535),
    "max_subscriptions": (1, 100_000),
    "max_inflight": (1, 65_535),
    "max_queued_messages": (1, 10_000_000),
    "max_queued_bytes": (1_024, 2**40),
    "max_queued_bytes_total": (1_024, 2**40),
    "max_sessions": (1, 10_000_000),
    "session_expiry_s": (1, 10 * 365 * 86_400),
    "max_retained_messages": (1, 10_000_000),
    "max_retained_bytes": (1_024, 2**40),
    "max_retained_messages_per_client": (1, 10_000_000),
    "max_retained_bytes_per_client": (1_024, 2**40),
}
_TIMEOUT_BOUNDS: dict[str, tuple[float, float]] = {
    "handshake_timeout_s": (0.1, 300),
    "connect_timeout_s": (0.1, 300),
    "stall_timeout_s": (0.1, 3_600),
    "shutdown_timeout_s": (0.0, 60),
}


def _limits(table: Table) -> Limits:
    table.only((*_LIMIT_BOUNDS, *_TIMEOUT_BOUNDS, "queue_full"))
    defaults = Limits()
    whole: dict[str, Any] = {
        key: table.whole(key, getattr(defaults, key), least=least, most=most)
        for key, (least, most) in _LIMIT_BOUNDS.items()
    }
    timeouts: dict[str, Any] = {
        key: table.number(key, getattr(defaults, key), least=least, most=most)
        for key, (least, most) in _TIMEOUT_BOUNDS.items()
    }
    return Limits(**whole, **timeouts, queue_full=_choice(table, "queue_full", defaults.queue_full))


def _revocation(table: Table) -> RevocationSettings:
    table.only(("grace_days", "fail_closed", "max_crl_bytes", "watch_interval_s"))
    defaults = RevocationSettings()
    return RevocationSettings(
        grace_days=table.number("grace_days", defaults.grace_days, least=0, most=3_650),
        fail_closed=table.boolean("fail_closed", default=defaults.fail_closed),
        max_crl_bytes=table.whole("max_crl_bytes", defaults.max_crl_bytes, least=1_024, most=2**31),
        watch_interval_s=table.number("watch_interval_s", defaults.watch_interval_s, least=0.02, most=3_600),
    )


def _renewal_listener(root: Table) -> RenewalListener:
    table = root.table("renewal_listener")
    table.only(("listen", "grace_days"))
    host, port = _listen(table, DEFAULT_RENEWAL_LISTEN)
    grace_days = table.number("grace_days", DEFAULT_RENEWAL_GRACE_DAYS, least=0.01, most=MAX_GRACE_DAYS)
    return RenewalListener(host, port, timedelta(days=grace_days))


def override_listen(text: str) -> tuple[str, int]:
    """Parse `--listen` of the command line.

    Raises:
        UsageError: it is no `host:port`.
    """
    try:
        return parse_listen(text)
    except ValueError as error:
        raise UsageError(f"could not use --listen {quoted(text, 80)}: {error}") from error
