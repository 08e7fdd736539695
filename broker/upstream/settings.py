"""The `[[upstream]]` tables of `broker.toml`.

Rules: as for all of that file (`broker/config.py`); and no topic may go up and come down again (`mapping.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from birthmark.broker.filters import MAX_TOPIC_BYTES, TopicError, check_filter, check_topic
from birthmark.broker.packets import MAX_REMAINING_LENGTH
from birthmark.broker.upstream.mapping import Mapping, Passage
from birthmark.device.credentials import BrokerAddress
from birthmark.device.errors import ConfigurationError, IdentityError
from birthmark.device.escape import quoted
from birthmark.device.identity import DeviceId

if TYPE_CHECKING:
    from pathlib import Path

    from birthmark.broker.toml_file import Table
    from birthmark.device.identity import BrokerName

SCHEME = "mqtts://"
MAX_CLIENT_ID_CHARACTERS = 128
UPSTREAM_KEYS = (
    "name",
    "servers",
    "credentials",
    "ca",
    "client_id",
    "keepalive_s",
    "prefix",
    "up",
    "down",
    "down_shared",
    "fleet",
    "catch_up_s",
    "transit",
    "spool_messages",
    "spool_bytes",
    "spool_full",
    "max_inflight",
    "max_topic_bytes",
    "max_payload_bytes",
    "longest_wait_s",
)
FLEET_DOWN = ("fleet/crl/+", "fleet/policy", "gateway/+/seen/+")
"""What a gateway that is one of a fleet hears from the upstream."""
FLEET_UP = ("status", "receipts", "policy-receipts", "seen/+", "crl-in-force/+")
"""What it says there of itself, on `gateway/{name}/...`."""


class SpoolFull(StrEnum):
    """What gives way when the spool is full."""

    HOLD = "hold"
    """Nothing: clients that publish what should go up are not read from until there is room."""
    DROP_OLDEST = "drop_oldest"
    """The message that has waited longest."""
    DROP_NEWEST = "drop_newest"
    """The message that finds no room."""


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """One upstream."""

    name: DeviceId
    """One word for it, in logs, alarms and `$SYS`."""
    servers: tuple[BrokerAddress, ...]
    """Tried in turn; the one that works is stayed with."""
    credentials_path: Path
    """Key, client certificate and chain, one PEM file."""
    ca_path: Path
    """Who may have signed the upstream's certificate, PEM."""
    mapping: Mapping
    """What goes up and what comes down."""
    client_id: str = ""
    """Empty: the certificate's CN."""
    keepalive_s: int = 30
    fleet: bool = False
    """Whether the gateways of a fleet know of each other through it."""
    catch_up_s: float = 10.0
    """With `fleet`: how long at most the upstream is waited for at the start, before anybody is let in."""
    transit: bool = False
    """Whether what other gateways publish here goes on up."""
    spool_messages: int = 100_000
    spool_bytes: int = 67_108_864
    spool_full: SpoolFull = SpoolFull.HOLD
    max_inflight: int = 1_000
    """Messages on their way up, unacknowledged."""
    max_payload_bytes: int = MAX_REMAINING_LENGTH
    """Of a message that goes up; a longer one is dropped. The longest topic is the mapping's."""
    longest_wait_s: float = 30.0
    """Between two attempts to connect."""


def read_upstreams(root: Table, folder: Path, gateway: BrokerName) -> tuple[UpstreamSettings, ...]:
    """Read the `[[upstream]]` tables.

    Args:
        root: of the file.
        folder: what relative paths are relative to.
        gateway: this gateway's name.

    Raises:
        ConfigurationError: something in them cannot be used; file, line and key are named.
    """
    found: dict[str, UpstreamSettings] = {}
    for table in root.tables("upstream"):
        upstream = _upstream(table, folder, str(gateway))
        if upstream.name.folded in found:
            raise table.complain("name", cause=f"there is another upstream {upstream.name}")
        found[upstream.name.folded] = upstream
    return tuple(found.values())


def _upstream(table: Table, folder: Path, gateway: str) -> UpstreamSettings:
    table.only(UPSTREAM_KEYS)
    try:
        name = DeviceId(table.text("name"))
    except IdentityError as error:
        raise table.complain(
            "name", cause="it is no word of letters, digits and hyphens", hint=error.hint
        ) from error
    client_id = table.text("client_id", "")
    if len(client_id) > MAX_CLIENT_ID_CHARACTERS or not client_id.isprintable():
        raise table.complain("client_id", cause=f"it has at most {MAX_CLIENT_ID_CHARACTERS} printable characters")
    fleet = table.boolean("fleet", default=False)
    return UpstreamSettings(
        name=name,
        servers=_servers(table),
        credentials_path=_path(table, folder, "credentials"),
        ca_path=_path(table, folder, "ca"),
        mapping=_mapping(table, gateway, fleet=fleet),
        client_id=client_id,
        keepalive_s=table.whole("keepalive_s", 30, least=1, most=3_600),
        fleet=fleet,
        catch_up_s=table.number("catch_up_s", 10.0, least=0, most=60),
        transit=table.boolean("transit", default=False),
        spool_messages=table.whole("spool_messages", 100_000, least=16, most=10_000_000),
        spool_bytes=table.whole("spool_bytes", 67_108_864, least=65_536, most=2**40),
        spool_full=_spool_full(table),
        max_inflight=table.whole("max_inflight", 1_000, least=1, most=65_000),
        max_payload_bytes=table.whole(
            "max_payload_bytes", MAX_REMAINING_LENGTH, least=16, most=MAX_REMAINING_LENGTH
        ),
        longest_wait_s=table.number("longest_wait_s", 30.0, least=0.1, most=3_600),
    )


def _servers(table: Table) -> tuple[BrokerAddress, ...]:
    servers = []
    for position, text in enumerate(table.texts("servers")):
        if not text.startswith(SCHEME):
            cause = f"{quoted(text, 80)} does not begin with {SCHEME}"
            raise table.complain("servers", position, cause=cause, hint=f'such as "{SCHEME}mq1.example.com:8883"')
        try:
            servers.append(BrokerAddress.parse(text.removeprefix(SCHEME)))
        except ConfigurationError as error:
            raise table.complain("servers", position, cause=error.message, hint=error.hint) from error
    if not servers:
        raise table.complain("servers", cause="there is none", hint=f'such as ["{SCHEME}mq1.example.com:8883"]')
    return tuple(servers)


def _path(table: Table, folder: Path, key: str) -> Path:
    text = table.text(key)
    if not text or "\0" in text:
        raise table.complain(key, cause="it must be the path of a file")
    return folder / text


def _spool_full(table: Table) -> SpoolFull:
    text = table.text("spool_full", SpoolFull.HOLD)
    try:
        return SpoolFull(text)
    except ValueError as error:
        choices = ", ".join(repr(str(choice)) for choice in SpoolFull)
        raise table.complain("spool_full", cause=f"{quoted(text, 32)} is none of {choices}") from error


def _mapping(table: Table, gateway: str, *, fleet: bool) -> Mapping:
    prefix = table.text("prefix", "")
    if prefix:
        try:
            check_topic(prefix)
        except TopicError as error:
            raise table.complain("prefix", cause=error.message) from error
        if not prefix.endswith("/") or prefix.startswith("$"):
            raise table.complain(
                "prefix", cause="it ends in a slash and does not begin with $, as sites/berlin/ does"
            )
    up = [Passage(found, prefix) for found in _filters(table, "up")]
    down = [Passage(found, prefix) for found in _filters(table, "down")]
    down += [Passage(found) for found in _filters(table, "down_shared")]
    if fleet:
        up += [Passage(f"gateway/{gateway}/{what}") for what in FLEET_UP]
        down += [Passage(found) for found in FLEET_DOWN]
    if not up and not down:
        raise table.complain(cause="nothing goes up and nothing comes down", hint='such as up = ["devices/#"]')
    max_topic_bytes = table.whole("max_topic_bytes", MAX_TOPIC_BYTES, least=16, most=MAX_TOPIC_BYTES)
    mapping = Mapping(gateway, tuple(up), tuple(down), max_topic_bytes)
    loop = mapping.loop()
    if loop is not None:
        goes_up, comes_down = (quoted(passage.remote, 80) for passage in loop)
        raise table.complain(
            "up",
            cause=f"{goes_up}, which goes up, and {comes_down}, which comes down, have topics in common there:"
            " what this gateway sends up would come back to it, and nothing tells it from what others send",
            hint="make one of them narrower, or give this gateway a prefix of its own",
        )
    return mapping


def _filters(table: Table, key: str) -> list[str]:
    found = table.texts(key)
    for position, topic_filter in enumerate(found):
        try:
            check_filter(topic_filter)
        except TopicError as error:
            raise table.complain(key, position, cause=error.message) from error
        if topic_filter.startswith("$"):
            raise table.complain(key, position, cause="topics that begin with $ are each broker's own")
    return found
