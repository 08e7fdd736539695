"""What of `policy.toml` and `broker.toml` Mosquitto 2.0 cannot do: every reason, with its line. Pure.

Rules (each seen on Mosquitto 2.0.11; docs/engines.md has the matrix):

- Mosquitto decides about each publish and each delivery by an ACL, and about a subscription or a will never: it
  grants them, and nothing comes of what the ACL does not allow. Nobody learns more by that, so it is no refusal.
- A `deny` of its ACL takes reading and writing both. A policy that denies one of them, where the role has the
  other, cannot be said.
- What a gateway takes for itself (a CRL, a question for the time) or says of itself has nobody behind it there.
  A role that may publish such a topic could speak to devices and stations in the gateway's place.
- A limit that it has no setting for is refused at every value, except at the one that asks for nothing.
- A setting that nobody has thought about here is refused: a gateway may learn what an export does not know of
  yet.
- A refusal about the policy is final: change the policy that is exported. One about the engine has a name, and
  who knows what it means may accept it by that name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from birthmark.broker.config import Durability, OnDenied, QueueFull
from birthmark.broker.filters import contains, overlaps
from birthmark.broker.policy import ID
from birthmark.device.identity import GATEWAY_ROLE
from birthmark.device.topics import is_said_by_gateway

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from birthmark.broker.config import BrokerSettings, Limits
    from birthmark.broker.policy import Policy, RoleRules
    from birthmark.broker.toml_file import Table

POLICY = "policy"
"""The code of what cannot be accepted."""
GATEWAY_TOPICS = {
    "gateway/+/receipts/#": "a station takes what is said here for a gateway's own word",
    "gateway/+/policy-receipts/#": "a station takes what is said here for a gateway's own word",
    "gateway/+/status/#": "a station takes what is said here for a gateway's own word",
    "gateway/+/seen/#": "a station takes what is said here for a gateway's own word",
    "gateway/+/crl-in-force/#": "a station takes what is said here for a gateway's own word",
    "gateway/+/crl": "a gateway installs the CRL that is sent here; Mosquitto would install nothing",
    "devices/+/time/request": "a gateway answers this itself; Mosquitto would show it to every reader",
}
"""What no client may publish on another engine, and why."""
_MAX_LEVELS = 200
_HOUR_S = 3_600
_ENGINE = {
    "revocation": (
        (
            "a revoked device's connection stays open, though after `reload` it can neither say nor hear anything;"
            " nobody is told that it is gone, and no receipt tells the station that the CRL is in force"
        ),
        "after a revocation run `reload`; restart Mosquitto where the connection itself must end",
    ),
    "profile": (
        "of a certificate its issuer, dates, purpose, CRL and subject are checked, not the rest of the profile",
        "issue from these CAs by birthmark only",
    ),
}
"""What the engine does not do, whatever the files say: the reason, and what to do about it."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """One thing that the engine cannot do."""

    code: str
    """By which it can be accepted; `POLICY`: it cannot."""
    reason: str
    """With the file, the line and the key that ask for it."""
    remedy: str


def refusals(settings: BrokerSettings, config: Table, policy: Policy, rules: Table) -> list[Refusal]:
    """Return every reason why an export would be weaker than the gateway; none: it is not.

    Args:
        settings: the gateway's.
        config: the table that they were read from.
        policy: the gateway's.
        rules: the table that it was read from.
    """
    roles, links = rules.table("roles"), _of_links(policy)
    found = [each for role in policy.roles for each in _of_role(role, roles.table(role.name), role.name in links)]
    found += _unknown(config)
    found += _of_settings(settings, config)
    found += _of_limits(settings.limits, config.table("limits"))
    found += [Refusal(code, f"whatever the files say: {why}", remedy) for code, (why, remedy) in _ENGINE.items()]
    return found


def needed_denials(role: RoleRules) -> tuple[list[str], list[str]]:
    """Return the entries of a role that take something away: from publishing, and from what is delivered."""
    return (
        [entry for entry in role.deny_publish if any(_meet(entry, wide) for wide in role.publish)],
        [
            entry
            for entry in (*role.deny_subscribe, *role.withhold)
            if any(_meet(entry, wide) for wide in role.subscribe)
        ],
    )


def _meet(one: str, other: str) -> bool:
    """Whether two entries overlap for some identity."""
    return overlaps(one.replace(ID, "+"), other.replace(ID, "+"))


def _of_links(policy: Policy) -> set[str]:
    """Return the roles that nobody has but the links of other gateways, which may speak for themselves."""
    others = {each.role for each in policy.assignments if (each.ou or "").lower() != GATEWAY_ROLE}
    return {role.name for role in policy.roles} - others


def _of_role(role: RoleRules, table: Table, is_of_links: bool) -> Iterator[Refusal]:
    for key in ("publish", "subscribe", "deny_publish", "deny_subscribe", "withhold"):
        for position, entry in enumerate(getattr(role, key)):
            if cause := _unwritable(entry):
                yield _refusal(POLICY, table, (key, position), cause, "name the topic otherwise")
    for position, entry in enumerate(role.publish):
        for topic, why in GATEWAY_TOPICS.items():
            if is_of_links and is_said_by_gateway(topic):
                continue
            denied = any(contains(each, entry) or contains(each, topic) for each in role.deny_publish)
            if _meet(entry, topic) and not denied:
                cause = f"it lets the role publish {topic}: {why}"
                yield _refusal(POLICY, table, ("publish", position), cause, "take it out of the policy to export")
                break
    less_said, less_heard = needed_denials(role)
    yield from _one_sided(role, table, ("deny_publish",), less_said, ("subscribe", "receive"))
    yield from _one_sided(role, table, ("deny_subscribe", "withhold"), less_heard, ("publish", "publish"))


def _one_sided(
    role: RoleRules, table: Table, keys: Sequence[str], needed: list[str], other: tuple[str, str]
) -> Iterator[Refusal]:
    """Yield each denial that would take from the other side something that the role has there."""
    grants, verb = other
    gone = role.deny_publish if grants == "publish" else (*role.deny_subscribe, *role.withhold)
    for key in keys:
        for position, entry in enumerate(getattr(role, key)):
            taken = [
                wide
                for wide in getattr(role, grants)
                if _meet(entry, wide) and not any(contains(each, entry) or contains(each, wide) for each in gone)
            ]
            if entry in needed and taken:
                cause = f"a deny of Mosquitto is for both ways, and the role may {verb} by {taken[0]!r}"
                yield _refusal(
                    POLICY, table, (key, position), cause, "deny both ways, or allow only what is meant"
                )


def _unwritable(entry: str) -> str:
    if entry != entry.strip() or any(ord(character) < 0x20 or ord(character) == 0x7F for character in entry):
        return "an ACL file cannot have spaces at an end of a topic, nor control characters in it"
    if entry.count("/") >= _MAX_LEVELS:
        return f"Mosquitto takes {_MAX_LEVELS} levels of a topic at most"
    return ""


_KNOWN = {
    "": (
        *("name", "listen", "credentials", "clients_ca", "crl", "policy", "data_folder"),
        *("on_denied", "durability", "limits", "revocation", "renewal_listener"),
    ),
    "revocation": ("grace_days", "fail_closed", "max_crl_bytes", "watch_interval_s"),
}
"""The keys, by table, that are translated, refused below, or of no meaning elsewhere."""


def _unknown(config: Table) -> Iterator[Refusal]:
    for name, known in _KNOWN.items():
        table = config.table(name) if name else config
        for key in table.keys():  # noqa: SIM118 - a Table is no mapping
            if key not in known:
                cause, todo = "an export does not know it", "take it out of the file to export"
                if key == "upstream":
                    cause = "a bridge of Mosquitto's knows no fleet, and does not keep circles out"
                    todo = "export from a copy without it, in a folder of its own (docs/engines.md)"
                yield _refusal(POLICY, table, (key,), cause, todo)


def _of_settings(settings: BrokerSettings, config: Table) -> Iterator[Refusal]:
    if settings.durability is Durability.ACKNOWLEDGED:
        cause = "Mosquitto acknowledges before anything is on disk, and saves once a second at best"
        yield _refusal("durability", config, ("durability",), cause, 'durability = "periodic" or "none"')
    if settings.on_denied is OnDenied.DISCONNECT:
        cause = "Mosquitto drops a message that is denied, and keeps the client"
        yield _refusal("on-denied", config, ("on_denied",), cause, 'on_denied = "drop"')
    if not settings.revocation.fail_closed:
        cause = "Mosquitto lets nobody in, without any grace, once a CRL has expired"
        yield _refusal(
            "crl-grace",
            config.table("revocation"),
            ("fail_closed",),
            cause,
            "fail_closed = true",
        )
    if settings.renewal_listener is not None:
        cause = "Mosquitto cannot let in a certificate that has expired, to renew it and for nothing else"
        yield _refusal("renewal", config, ("renewal_listener",), cause, "keep a gateway for that; take this out")


def _of_limits(limits: Limits, table: Table) -> Iterator[Refusal]:
    if limits.queue_full is not QueueFull.DROP_NEWEST:
        cause = "Mosquitto drops the message that finds no room"
        yield _refusal("queue-full", table, ("queue_full",), cause, 'queue_full = "drop_newest"')
    for key in ("max_messages_per_s", "max_bytes_per_s"):
        if getattr(limits, key):
            yield _refusal("rates", table, (key,), "Mosquitto holds nobody to a rate", f"{key} = 0")
    if limits.max_connections_per_address < limits.max_connections:
        cause = "Mosquitto does not count connections by address"
        remedy = f"max_connections_per_address = {limits.max_connections}, and a firewall that counts"
        yield _refusal("limits", table, ("max_connections_per_address",), cause, remedy)
    if limits.session_expiry_s % _HOUR_S:
        cause = "Mosquitto takes whole hours"
        yield _refusal("limits", table, ("session_expiry_s",), cause, "a multiple of 3600")
    for code, keys in _WITHOUT_SETTING.items():
        for key in keys:
            cause = f"Mosquitto has no such limit ({getattr(limits, key)} here)"
            yield _refusal(code, table, (key,), cause, f"accept it by its name, {code}")


_WITHOUT_SETTING = {
    "keepalive": ("max_keepalive_s",),
    "timeouts": ("handshake_timeout_s", "connect_timeout_s", "stall_timeout_s"),
    "limits": (
        "max_subscriptions",
        "max_queued_bytes_total",
        "max_sessions",
        "max_retained_messages",
        "max_retained_bytes",
        "max_retained_messages_per_client",
        "max_retained_bytes_per_client",
    ),
}
CODES = tuple(
    sorted(
        {"durability", "on-denied", "crl-grace", "renewal", "queue-full", "rates", *_ENGINE, *_WITHOUT_SETTING},
    )
)
"""By which a refusal can be accepted."""


def _refusal(code: str, table: Table, key: tuple[str | int, ...], cause: str, remedy: str) -> Refusal:
    where = "" if str(key[0]) in table else " (the default)"
    complaint = table.complain(*key, cause=f"{cause}{where}")
    return Refusal(code, complaint.message.removeprefix("could not use "), remedy)
