"""What changes between two policies, in words: which entry, glob or role comes or goes. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from birthmark.broker.policy import RoleRules

if TYPE_CHECKING:
    from birthmark.broker.policy import Policy

_LISTS = ("publish", "subscribe", "deny_publish", "deny_subscribe", "withhold")


@dataclass(frozen=True, slots=True)
class Change:
    """One difference: `+` is in the new policy only, `-` in the old one only."""

    sign: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.sign} {self.where}: {self.what}"


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
            mine, theirs = set(getattr(one, key)), set(getattr(other, key))
            found += [Change("-", f"roles.{name}.{key}", entry) for entry in sorted(mine - theirs)]
            found += [Change("+", f"roles.{name}.{key}", entry) for entry in sorted(theirs - mine)]
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
    return found
