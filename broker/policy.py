"""Who may publish and subscribe what: one pure function decides, for the broker and for `policy explain`.

Rules:

- An identity gets the role of the first assignment that matches it: by a glob on its CN, a glob on the role that
  the CA signed into its OU, or both. If none matches, it may do nothing.
- An assignment reaches services (`operator`, `service-*`) only if its OU glob names them (`operator`,
  `service-...`), and the roles of these names are given by such an assignment only: no device becomes an
  operator by its name, and no operator a device by a `*`.
- A role has lists of what it may publish and subscribe, and lists of what it may not, which win. Entries are
  MQTT topic filters; a level `{id}` stands for the identity's own CN.
- A topic may be published if some entry matches it and no deny entry does.
- A subscription is allowed if *one* entry contains its filter (every topic that the filter can match is matched
  by that entry) and no deny entry overlaps it. A union of entries is not considered: `a/b` and `a/c` together
  allow neither `a/+` nor anything that only both cover. Ask for what the entry says, or for less.
- `withhold` is for what lies within a wider subscription: such topics are never delivered, a subscription to
  nothing else is refused, and a wider one is granted without them. It is the one way to a subscription of which
  not every topic is allowed, and has to be asked for.
- Each delivery is decided again, so that a policy that changes takes hold of old subscriptions too.
- `$...` is the broker's alone: it is never published by a client, and of it only `$SYS` can be subscribed, if an
  entry says `$SYS`. `$share/...` is refused (MQTT 3.1.1 has no shared subscriptions).
- So is what a gateway says of itself (its receipts, its status, ...): a station acts on it. No entry, however
  wide, lets a client publish there, but for another gateway's link (`service-gateway` in its certificate).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from birthmark.broker.filters import (
    TopicError,
    check_filter,
    check_topic,
    levels_contain,
    levels_match,
    levels_overlap,
)
from birthmark.device.errors import PolicyError
from birthmark.device.escape import quoted
from birthmark.device.identity import GATEWAY_ROLE
from birthmark.device.topics import is_said_by_gateway, renewal_answer, renewal_request

if TYPE_CHECKING:
    from birthmark.device.identity import DeviceId, Role

ID = "{id}"
MAX_REMEMBERED = 20_000
"""Identities whose rights a policy remembers: as many as may be connected by default; about 1 KB each."""
_GLOB = re.compile(r"[A-Za-z0-9._*?-]{1,64}")


class Action(StrEnum):
    """What a client asks for."""

    PUBLISH = "publish"
    SUBSCRIBE = "subscribe"


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer, and the rule that gave it, in words."""

    allowed: bool
    rule: str


@dataclass(frozen=True, slots=True)
class RoleRules:
    """What a role may do. Every entry is a topic filter in which a level may be `{id}`.

    Raises:
        PolicyError: an entry is no such filter, or speaks of `$...`.
    """

    name: str
    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()
    deny_publish: tuple[str, ...] = ()
    deny_subscribe: tuple[str, ...] = ()
    withhold: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for entry in (*self.publish, *self.deny_publish):
            check_entry(entry, Action.PUBLISH)
        for entry in (*self.subscribe, *self.deny_subscribe, *self.withhold):
            check_entry(entry, Action.SUBSCRIBE)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which identities get a role: a glob on the CN, a glob on the OU, or both; `*` and `?` as in a shell.

    Raises:
        PolicyError: there is no glob, one is outside the grammar, or a reserved role is given without its OU.
    """

    role: str
    cn: str | None = None
    ou: str | None = None

    def __post_init__(self) -> None:
        if self.cn is None and self.ou is None:
            raise PolicyError("could not use an assignment: it has neither cn nor ou")
        for glob in (self.cn, self.ou):
            if glob is not None:
                check_glob(glob)
        if is_reserved(self.role) and not self.for_services:
            raise PolicyError(
                f"could not assign the role {quoted(self.role)}: it is reserved for services",
                hint=f"assign it by the signed role: ou = {quoted(self.role)}",
            )

    @property
    def for_services(self) -> bool:
        """Whether this assignment reaches services, and no device."""
        return self.ou is not None and is_reserved(self.ou)

    def reaches(self, device_id: DeviceId, role: Role) -> bool:
        """Whether this assignment matches an identity with this CN and this role in its OU."""
        if self.for_services != role.is_reserved:
            return False
        if self.cn is not None and not glob_matches(self.cn, device_id.text):
            return False
        return self.ou is None or glob_matches(self.ou, role.name)

    def __str__(self) -> str:
        globs = [f"{key} {glob!r}" for key, glob in (("cn", self.cn), ("ou", self.ou)) if glob is not None]
        return " and ".join(globs)


def is_reserved(role_or_glob: str) -> bool:
    """Whether a role of this name, or all that this glob matches, is for services alone."""
    folded = role_or_glob.lower()
    return folded == "operator" or folded.startswith("service-")


def check_entry(entry: str, action: Action) -> None:
    """Accept an entry of a role's list.

    Raises:
        PolicyError: it is no topic filter, `{id}` is not a level of its own, or it speaks of `$...`.
    """
    shown = quoted(entry, 80)
    for level in entry.split("/"):
        if level != ID and ("{" in level or "}" in level):
            raise PolicyError(
                f"could not use the entry {shown}: braces only as {ID}, a whole level between slashes",
                hint=f"for example devices/{ID}/telemetry/#",
            )
    try:
        check_filter(entry)
    except TopicError as error:
        raise PolicyError(error.message, hint="MQTT 3.1.1 section 4.7 has the grammar of topic filters") from error
    if entry.startswith("$") and (action is Action.PUBLISH or not _is_sys(entry)):
        raise PolicyError(
            f"could not use the entry {shown}: topics that begin with $ are the broker's alone",
            hint="only $SYS/... can be named, under subscribe",
        )


def check_glob(glob: str) -> None:
    """Accept a glob on a CN or an OU. Raises `PolicyError`."""
    if not _GLOB.fullmatch(glob):
        raise PolicyError(
            f"could not use the glob {quoted(glob, 80)}: it can match no name",
            hint="1 to 64 letters, digits, hyphens, dots and underscores; * for any run, ? for any one character",
        )


_Entries = tuple[tuple[str, list[str]], ...]


class Rights:
    """What one identity may do under one policy; made once, asked for every packet. It never changes.

    Args:
        device_id: who.
        rules: the rules of its role; None if no assignment matched.
        because: the assignment that gave the role, in words.
        is_gateway: whether it is the link of another gateway, which may speak for itself.
    """

    __slots__ = (
        "_because",
        "_deny_publish",
        "_deny_subscribe",
        "_id",
        "_is_gateway",
        "_name",
        "_publish",
        "_subscribe",
        "_withhold",
        "role",
    )

    def __init__(
        self, device_id: DeviceId, rules: RoleRules | None, because: str, *, is_gateway: bool = False
    ) -> None:
        self.role = rules.name if rules else None
        self._id = device_id
        self._is_gateway = is_gateway
        self._because = because
        self._name = f"role {rules.name!r}" if rules else "no role"
        own = str(device_id)
        self._publish = _levels(rules.publish if rules else (), own)
        self._subscribe = _levels(rules.subscribe if rules else (), own)
        self._deny_publish = _levels(rules.deny_publish if rules else (), own)
        self._deny_subscribe = _levels(rules.deny_subscribe if rules else (), own)
        self._withhold = _levels(rules.withhold if rules else (), own)

    def publish(self, topic: str) -> Decision:
        """Decide about publishing to a topic name (a will is published too)."""
        try:
            check_topic(topic)
        except TopicError as error:
            return Decision(allowed=False, rule=error.message)
        if topic.startswith("$"):
            return Decision(allowed=False, rule="topics that begin with $ are the broker's alone")
        if is_said_by_gateway(topic) and not self._is_gateway:
            return Decision(allowed=False, rule="what a gateway says of itself is the broker's alone")
        return self._topic(topic, self._publish, self._deny_publish, "publish")

    def will(self, topic: str) -> Decision:
        """Decide about a last will on a topic name."""
        return self.publish(topic)

    def subscribe(self, topic_filter: str) -> Decision:
        """Decide about subscribing to a topic filter."""
        try:
            check_filter(topic_filter)
        except TopicError as error:
            return Decision(allowed=False, rule=error.message)
        if topic_filter.startswith("$") and not _is_sys(topic_filter):
            return Decision(allowed=False, rule="topics that begin with $ are the broker's alone")
        if self.role is None:
            return Decision(allowed=False, rule=self._because)
        asked = topic_filter.split("/")
        for entry, levels in self._deny_subscribe:
            if levels_overlap(levels, asked):
                return self._denied(f"deny_subscribe {entry!r} overlaps it")
        withheld = next((entry for entry, levels in self._withhold if levels_contain(levels, asked)), None)
        if withheld is not None:
            return self._denied(f"withhold {withheld!r} contains it")
        for entry, levels in self._subscribe:
            if levels_contain(levels, asked):
                return self._granted(entry, asked)
        if any(levels_overlap(levels, asked) for _, levels in self._subscribe):
            return self._denied("no one subscribe entry contains all that it can match")
        return self._denied("no subscribe entry matches")

    def _granted(self, entry: str, asked: list[str]) -> Decision:
        if any(levels_overlap(withheld, asked) for _, withheld in self._withhold):
            return self._allowed(f"subscribe {entry!r} contains it, without what withhold lists")
        return self._allowed(f"subscribe {entry!r} contains it")

    def receive(self, topic: str) -> Decision:
        """Decide about delivering a message on a topic name to this identity."""
        if topic.startswith("$") and not _is_sys(topic):
            return Decision(allowed=False, rule="topics that begin with $ are the broker's alone")
        if self.role is not None:
            levels = topic.split("/")
            for entry, pattern in self._withhold:
                if levels_match(pattern, levels):
                    return self._denied(f"withhold {entry!r} matches")
        return self._topic(topic, self._subscribe, self._deny_subscribe, "subscribe")

    def _topic(self, topic: str, allow: _Entries, deny: _Entries, verb: str) -> Decision:
        if self.role is None:
            return Decision(allowed=False, rule=self._because)
        levels = topic.split("/")
        for entry, pattern in deny:
            if levels_match(pattern, levels):
                return self._denied(f"deny_{verb} {entry!r} matches")
        for entry, pattern in allow:
            if levels_match(pattern, levels):
                return self._allowed(f"{verb} {entry!r} matches")
        return self._denied(f"no {verb} entry matches")

    def _allowed(self, rule: str) -> Decision:
        return Decision(allowed=True, rule=f"{self._name} ({self._because}): {rule}")

    def _denied(self, rule: str) -> Decision:
        return Decision(allowed=False, rule=f"{self._name} ({self._because}): {rule}")


class RenewalRights(Rights):
    """What a policy leaves to a device that was let in to renew its certificate: its two renewal topics."""

    __slots__ = ("_answer", "_request")

    def __init__(
        self, device_id: DeviceId, rules: RoleRules | None, because: str, *, is_gateway: bool = False
    ) -> None:
        super().__init__(device_id, rules, because, is_gateway=is_gateway)
        self._request, self._answer = renewal_request(device_id), renewal_answer(device_id)

    def publish(self, topic: str) -> Decision:
        """Decide about publishing to a topic name."""
        return super().publish(topic) if topic == self._request else _RENEWAL_ONLY

    def will(self, topic: str) -> Decision:
        """Decide about a last will: there is none."""
        del topic
        return _RENEWAL_ONLY

    def subscribe(self, topic_filter: str) -> Decision:
        """Decide about subscribing to a topic filter."""
        return super().subscribe(topic_filter) if topic_filter == self._answer else _RENEWAL_ONLY

    def receive(self, topic: str) -> Decision:
        """Decide about delivering a message on a topic name."""
        return super().receive(topic) if topic == self._answer else _RENEWAL_ONLY


_RENEWAL_ONLY = Decision(allowed=False, rule="the renewal listener is for renewing a certificate only")


@dataclass(frozen=True)
class Policy:
    """Roles, and who has them.

    Raises:
        PolicyError: two roles have one name, or an assignment names a role that is not there.
    """

    roles: tuple[RoleRules, ...]
    assignments: tuple[Assignment, ...]
    sha256: str = ""
    """Of the file it was read from, lower-case hex."""

    def __post_init__(self) -> None:
        if len(self._by_name) != len(self.roles):
            raise PolicyError("could not use the policy: two roles have one name")
        for assignment in self.assignments:
            if assignment.role not in self._by_name:
                raise PolicyError(f"could not use the policy: there is no role {quoted(assignment.role)}")

    def rights(self, device_id: DeviceId, role: Role, *, for_renewal: bool = False) -> Rights:
        """Return what this identity may do; `role` is the one in its certificate.

        `for_renewal`: it was let in to renew its certificate, and for nothing else.
        """
        key = (device_id.text, role.name, for_renewal)
        rights = self._remembered.get(key)
        if rights is None:
            rights = self._work_out(device_id, role, for_renewal=for_renewal)
            if len(self._remembered) >= MAX_REMEMBERED:
                del self._remembered[next(iter(self._remembered))]
            self._remembered[key] = rights
        return rights

    def _work_out(self, device_id: DeviceId, role: Role, *, for_renewal: bool) -> Rights:
        kind = RenewalRights if for_renewal else Rights
        is_gateway = role.name.lower() == GATEWAY_ROLE
        for assignment, because in zip(self.assignments, self._because, strict=True):
            if assignment.reaches(device_id, role):
                return kind(device_id, self._by_name[assignment.role], because, is_gateway=is_gateway)
        return kind(device_id, None, f"no assignment matches cn {str(device_id)!r} and ou {role.name!r}")

    @cached_property
    def _remembered(self) -> dict[tuple[str, str, bool], Rights]:
        return {}

    @cached_property
    def _because(self) -> list[str]:
        return [f"assignment {number}, {each}" for number, each in enumerate(self.assignments, start=1)]

    @cached_property
    def _by_name(self) -> dict[str, RoleRules]:
        return {role.name: role for role in self.roles}


def decide(policy: Policy, device_id: DeviceId, role: Role, action: Action, topic_or_filter: str) -> Decision:
    """Decide whether an identity may publish to a topic name, or subscribe to a topic filter."""
    rights = policy.rights(device_id, role)
    if action is Action.PUBLISH:
        return rights.publish(topic_or_filter)
    return rights.subscribe(topic_or_filter)


def _levels(entries: tuple[str, ...], own: str) -> _Entries:
    return tuple(
        (entry, [own if level == ID else level for level in _split(entry)] if ID in entry else _split(entry))
        for entry in entries
    )


@lru_cache(maxsize=4096)
def _split(entry: str) -> list[str]:
    """Return an entry's levels, which all sessions share: nobody changes them."""
    return entry.split("/")


def glob_matches(glob: str, name: str) -> bool:
    """Return whether a glob matches a whole name, without regard to case (names are compared that way).

    Linear in practice and quadratic at worst: only the last `*` is ever tried again.
    """
    glob, name = glob.lower(), name.lower()
    at_glob = at_name = 0
    star = resume = -1
    while at_name < len(name):
        if at_glob < len(glob) and glob[at_glob] == "*":
            star, resume = at_glob, at_name
            at_glob += 1
        elif at_glob < len(glob) and glob[at_glob] in ("?", name[at_name]):
            at_glob += 1
            at_name += 1
        elif star >= 0:
            resume += 1
            at_glob, at_name = star + 1, resume
        else:
            return False
    return all(character == "*" for character in glob[at_glob:])


def _is_sys(topic_or_filter: str) -> bool:
    return topic_or_filter == "$SYS" or topic_or_filter.startswith("$SYS/")
