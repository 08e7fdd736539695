"""What changes between two policies, in words: which role gains or loses what, and who gets another role. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from birthmark.broker.filters import contains, overlaps
from birthmark.broker.policy import ID, RoleRules, glob_matches
from birthmark.device.identity import GATEWAY_ROLE
from birthmark.device.topics import SAID_BY_GATEWAYS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from birthmark.broker.policy import Policy

_GRANTING = ("publish", "subscribe")
_LISTS = (*_GRANTING, "deny_publish", "deny_subscribe", "withhold")


@dataclass(frozen=True, slots=True)
class Change:
    """One difference: `+` is in the new policy only, `-` in the old one only."""

    sign: str
    where: str
    what: str
    effect: str = ""
    """On whoever has the role: `gains`, `loses`, or `covered`: another entry says the same or more."""

    def __str__(self) -> str:
        effect = f" ({self.effect})" if self.effect else ""
        return f"{self.sign} {self.where}: {self.what}{effect}"


def changes(old: Policy, new: Policy) -> list[Change]:
    """Return every difference that can change a decision; comments and the order of entries cannot."""
    found: list[Change] = []
    before = {role.name: role for role in old.roles}
    after = {role.name: role for role in new.roles}
    for name in sorted({*before, *after}):
        if name not in before:
            found.append(Change("+", "roles", name))
        if name not in after:
            found.append(Change("-", "roles", name))
        one, other = before.get(name, RoleRules(name)), after.get(name, RoleRules(name))
        for key in _LISTS:
            found += _entries("-", name, key, getattr(one, key), getattr(other, key))
            found += _entries("+", name, key, getattr(other, key), getattr(one, key))
    # The order of assignments decides, so they are compared as a sequence.
    if old.assignments != new.assignments:
        found += [
            Change("-", f"assignments[{number}]", f"{assignment} -> {assignment.role}")
            for number, assignment in enumerate(old.assignments, start=1)
            if number > len(new.assignments) or new.assignments[number - 1] != assignment
        ]
        found += [
            Change("+", f"assignments[{number}]", f"{assignment} -> {assignment.role}")
            for number, assignment in enumerate(new.assignments, start=1)
            if number > len(old.assignments) or old.assignments[number - 1] != assignment
        ]
    return found


def _entries(
    sign: str, role: str, key: str, there: tuple[str, ...], elsewhere: tuple[str, ...]
) -> Iterator[Change]:
    """Yield what is on a role's list `there` and not on the one `elsewhere`."""
    for entry in sorted({*there} - {*elsewhere}):
        effect = "gains" if (key in _GRANTING) == (sign == "+") else "loses"
        if any(contains(wider, entry) for wider in elsewhere):
            effect = "covered"
        yield Change(sign, f"roles.{role}.{key}", entry, effect)


def warnings(policy: Policy) -> list[str]:
    """Return what in a policy is allowed and yet probably not meant."""
    found = []
    used = {assignment.role for assignment in policy.assignments}
    found += [f"no assignment gives the role {role.name!r}" for role in policy.roles if role.name not in used]
    everyone: dict[bool, int] = {}
    for number, assignment in enumerate(policy.assignments, start=1):
        if (first := everyone.get(assignment.for_services)) is not None:
            found.append(f"assignment {number} is never reached: assignment {first} takes everyone before it")
        elif not assignment.for_services and {assignment.cn or "*", assignment.ou or "*"} == {"*"}:
            everyone[assignment.for_services] = number
    for role in policy.roles:
        for key in ("publish", "subscribe"):
            found += [
                f"roles.{role.name}.{key} has {entry!r}: everything that is not the broker's own"
                for entry in getattr(role, key)
                if entry in ("#", "+/#")
            ]
    return [*found, *_speaking_for_others(policy)]


def _speaking_for_others(policy: Policy) -> Iterator[str]:
    """Yield what lets the link of one gateway say what another says of itself; a tree of gateways needs that."""
    for role in policy.roles:
        links = [
            (each.cn or "*").lower()
            for each in policy.assignments
            if each.role == role.name and each.for_services and glob_matches(each.ou or "*", GATEWAY_ROLE)
        ]
        said = [f"gateway/+/{what}/#" for what in SAID_BY_GATEWAYS]
        said = [topics for topics in said if not any(contains(denied, topics) for denied in role.deny_publish)]
        for entry in role.publish:
            named = [level.lower() for level in entry.split("/")[1:2]]
            is_its_own = named == [ID] or {*links} == {*named}
            if links and not is_its_own and any(overlaps(entry.replace(ID, "+"), topics) for topics in said):
                yield (
                    f"roles.{role.name}.publish has {entry!r}: a gateway with this role may say what other"
                    f" gateways say of themselves (gateway/{ID}/... is its own alone)"
                )
