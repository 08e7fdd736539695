"""Who gains and who loses what from one policy to another."""

from __future__ import annotations

import pytest

from birthmark.broker.policy import Assignment, Policy, RoleRules
from birthmark.broker.policy_diff import changes


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
