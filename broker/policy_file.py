"""Reading `policy.toml`: TOML 1.0 into a `Policy`, or an error that names file, line and key.

    [roles.NAME]                    publish, subscribe, deny_publish, deny_subscribe, withhold = [ "filter", ... ]
    [[assignments]]                 role = "NAME", cn = "glob" and/or ou = "glob"

Rules: an unknown key, a wrong type, a bad filter or glob, a role that is not there, and a file that says nothing
are errors; the caller keeps the policy that it has.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from birthmark.broker.policy import ID, Action, Assignment, Policy, RoleRules, check_entry, check_glob
from birthmark.broker.toml_file import Table, parse_toml, read_toml
from birthmark.device.errors import IdentityError, PolicyError
from birthmark.device.escape import quoted
from birthmark.device.identity import Role

if TYPE_CHECKING:
    from pathlib import Path

_LISTS = ("publish", "subscribe", "deny_publish", "deny_subscribe", "withhold")
_INIT_HINT = "write one with `birthmark-broker init`"


def read_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        PolicyError: it is not there, or something in it cannot be used; file, line and key are named.
    """
    root, content = read_toml(path, PolicyError, missing_hint=_INIT_HINT)
    return _policy(root, content)


def parse_policy(content: bytes, where: str) -> Policy:
    """Parse a policy file's bytes; `where` names it in errors. Raises `PolicyError`."""
    return _policy(parse_toml(content, where, PolicyError), content)


def _policy(root: Table, content: bytes) -> Policy:
    root.only(("roles", "assignments"))
    table = root.table("roles")
    roles = tuple(_role(table, name) for name in table.keys())  # noqa: SIM118 - a Table is no mapping
    if not roles:
        raise root.complain(
            cause="it has no roles, so nobody could do anything",
            hint=f'a role is a table such as [roles.device] with publish = ["devices/{ID}/telemetry/#"]',
        )
    names = {role.name for role in roles}
    assignments = tuple(_assignment(item, names) for item in root.tables("assignments"))
    if not assignments:
        raise root.complain(
            cause="it has no assignments, so nobody would have a role",
            hint='an assignment is a table such as [[assignments]] with ou = "device" and role = "device"',
        )
    return Policy(roles, assignments, hashlib.sha256(content).hexdigest())


def _role(roles: Table, name: str) -> RoleRules:
    try:
        Role(name)
    except IdentityError as error:
        raise roles.complain(name, cause=error.message, hint=error.hint) from error
    table = roles.table(name)
    table.only(_LISTS)
    entries: dict[str, tuple[str, ...]] = {}
    for key in _LISTS:
        action = Action.PUBLISH if key.endswith("publish") else Action.SUBSCRIBE
        entries[key] = tuple(table.texts(key))
        for position, entry in enumerate(entries[key]):
            try:
                check_entry(entry, action)
            except PolicyError as error:
                raise table.complain(key, position, cause=error.message, hint=error.hint) from error
    return RoleRules(name, **entries)


def _assignment(table: Table, roles: set[str]) -> Assignment:
    table.only(("role", "cn", "ou"))
    role = table.text("role")
    if role not in roles:
        cause = f"there is no role {quoted(role, 64)}"
        raise table.complain("role", cause=cause, hint=f"roles here: {', '.join(sorted(roles))}")
    globs: dict[str, str | None] = {"cn": None, "ou": None}
    for key in globs:
        if key in table:
            globs[key] = table.text(key)
            try:
                check_glob(table.text(key))
            except PolicyError as error:
                raise table.complain(key, cause=error.message, hint=error.hint) from error
    try:
        return Assignment(role, **globs)
    except PolicyError as error:
        raise table.complain(cause=error.message, hint=error.hint) from error
