"""Who gains and who loses what from one policy to another."""

from __future__ import annotations

import pytest

from birthmark.broker.policy import Assignment, Policy, RoleRules
from birthmark.broker.policy_diff import changes, warnings


def policy(**lists: tuple[str, ...]) -> Policy:
    return Policy((RoleRules("r", **lists),), (Assignment("r", cn="*"),))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({}, {"publish": ("a/b",)}, ["+ roles.r.publish: a/b (gains)"]),
        ({"subscribe": ("a/#",)}, {}, ["- roles.r.subscribe: a/# (loses)"]),
        ({}, {"deny_publish": ("a",)}, ["+ roles.r.deny_publish: a (loses)"]),
        ({"deny_subscribe": ("a",)}, {}, ["- roles.r.deny_subscribe: a (gains)"]),
        ({}, {"withhold": ("devices/{id}/x",)}, ["+ roles.r.withhold: devices/{id}/x (loses)"]),
        ({"publish": ("a/+",)}, {"publish": ("a/+", "a/b")}, ["+ roles.r.publish: a/b (covered)"]),
        ({"publish": ("a/#", "a/{id}")}, {"publish": ("a/#",)}, ["- roles.r.publish: a/{id} (covered)"]),
        (
            {"publish": ("a/+",)},
            {"publish": ("a/#",)},
            ["- roles.r.publish: a/+ (covered)", "+ roles.r.publish: a/# (gains)"],
        ),
        ({"publish": ("a", "b")}, {"publish": ("b", "a")}, []),
    ],
)
def test_what_each_change_does(
    old: dict[str, tuple[str, ...]], new: dict[str, tuple[str, ...]], expected: list[str]
) -> None:
    assert [str(change) for change in changes(policy(**old), policy(**new))] == expected


@pytest.mark.parametrize(
    ("entry", "ou", "cn", "denied", "is_named"),
    [
        ("gateway/#", "service-gateway", None, (), True),
        ("gateway/+/status", "Service-*", None, (), True),
        ("+/+/seen/{id}", "service-gateway", None, (), True),
        ("gateway/paris/receipts", "service-gateway", "*", (), True),
        ("gateway/paris/receipts", "service-gateway", "oslo", (), True),
        ("gateway/paris/receipts", "service-gateway", "Paris", (), False),
        ("gateway/{id}/#", "service-gateway", None, (), False),
        ("gateway/+/crl", "service-gateway", None, (), False),
        ("devices/#", "service-gateway", None, (), False),
        ("gateway/#", "operator", None, (), False),
        ("gateway/#", "service-renewal", None, (), False),
        ("gateway/#", "service-gateway", None, ("gateway/#",), False),
        ("gateway/#", "service-gateway", None, ("gateway/+/status",), True),
    ],
)
def test_what_lets_a_gateway_speak_for_others_is_warned_of(
    entry: str, ou: str, cn: str | None, denied: tuple[str, ...], is_named: bool
) -> None:
    rules = RoleRules("r", publish=(entry,), deny_publish=denied)
    found = warnings(Policy((rules,), (Assignment("r", cn=cn, ou=ou),)))
    assert [f"roles.r.publish has {entry!r}: a gateway" in warning for warning in found] == [True] * is_named
