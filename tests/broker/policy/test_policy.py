"""The policy: who may do what, and that no identity reaches another's topics."""

from __future__ import annotations

from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from birthmark.broker.filters import matches
from birthmark.broker.policy import (
    Action,
    Assignment,
    Policy,
    RoleRules,
    decide,
    glob_matches,
)
from birthmark.broker.policy_file import parse_policy
from birthmark.device import topics
from birthmark.device.errors import PolicyError
from birthmark.device.identity import BrokerName, DeviceId, Role

DEFAULT = parse_policy(
    resources.files("birthmark.broker").joinpath("policy.default.toml").read_bytes(), "policy.default.toml"
)
DEVICE, OPERATOR, GATEWAY = Role("device"), Role("operator"), Role("service-gateway")
A = DeviceId("sensor-1")

ids = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9-]{0,8}[A-Za-z0-9])?", fullmatch=True).map(DeviceId)
roles = st.sampled_from(["device", "sensor", "camera", "OPERATORS", "service"]).map(Role)


def allowed(action: str, topic: str, *, who: DeviceId = A, role: Role = DEVICE, policy: Policy = DEFAULT) -> bool:
    return decide(policy, who, role, Action(action), topic).allowed


@pytest.mark.parametrize(
    ("action", "topic"),
    [
        ("publish", "devices/sensor-1/telemetry/temperature"),
        ("publish", "devices/sensor-1/status"),
        ("publish", "devices/sensor-1/replies/reboot"),
        ("publish", "devices/sensor-1/renewal/request"),
        ("publish", "devices/sensor-1/time/request"),
        ("subscribe", "devices/sensor-1/commands/#"),
        ("subscribe", "devices/sensor-1/commands/reboot"),
        ("subscribe", "devices/sensor-1/commands/+"),
        ("subscribe", "fleet/announcements/#"),
        ("subscribe", "devices/sensor-1/renewal/answer"),
        ("subscribe", "devices/sensor-1/time/answer"),
    ],
)
def test_a_device_may(action: str, topic: str) -> None:
    assert allowed(action, topic)


@pytest.mark.parametrize(
    ("action", "topic"),
    [
        ("publish", "devices/sensor-2/telemetry/temperature"),
        ("publish", "devices/SENSOR-1/telemetry/temperature"),
        ("publish", "devices/sensor-1"),
        ("publish", "devices/sensor-1/commands/reboot"),
        ("publish", "devices/sensor-1/status/x"),
        ("publish", "devices//telemetry/x"),
        ("publish", "devices/{id}/telemetry/x"),
        ("publish", "devices/+/telemetry/x"),
        ("publish", "fleet/announcements/all"),
        ("publish", "gateway/gw/crl"),
        ("publish", "$SYS/broker/version"),
        ("publish", ""),
        ("publish", "a\0b"),
        ("subscribe", "#"),
        ("subscribe", "+/#"),
        ("subscribe", "devices/#"),
        ("subscribe", "devices/+/commands/#"),
        ("subscribe", "devices/sensor-2/commands/#"),
        ("subscribe", "devices/sensor-1/#"),
        ("subscribe", "devices/sensor-1/+/reboot"),
        ("subscribe", "fleet/#"),
        ("subscribe", "$SYS/#"),
        ("subscribe", "$share/g/devices/sensor-1/commands/#"),
        ("subscribe", "gateway/gw/receipts"),
        ("subscribe", "a/#/b"),
    ],
)
def test_a_device_may_not(action: str, topic: str) -> None:
    assert not allowed(action, topic)


@pytest.mark.parametrize(
    ("action", "topic", "expected"),
    [
        ("subscribe", "devices/#", True),
        ("subscribe", "devices/+/telemetry/#", True),
        ("subscribe", "$SYS/#", True),
        ("subscribe", "gateway/+/receipts", True),
        ("publish", "devices/sensor-1/commands/reboot", True),
        ("publish", "gateway/gw-1/crl", True),
        ("subscribe", "#", False),
        ("subscribe", "$share/g/devices/#", False),
        ("publish", "$SYS/x", False),
        ("publish", "devices/sensor-1/telemetry/x", False),
        ("publish", "devices/sensor-1/renewal/request", False),
        ("publish", "devices/sensor-1/renewal/answer", False),
        ("publish", "gateway/gw-1/receipts", False),
    ],
)
def test_an_operator(action: str, topic: str, *, expected: bool) -> None:
    assert allowed(action, topic, who=DeviceId("alice"), role=OPERATOR) is expected


@pytest.mark.parametrize(
    ("action", "topic", "expected"),
    [
        ("subscribe", "devices/+/renewal/request", True),
        ("publish", "devices/sensor-1/renewal/answer", True),
        ("subscribe", "devices/#", False),
        ("subscribe", "devices/+/renewal/answer", False),
        ("subscribe", "devices/+/telemetry/#", False),
        ("subscribe", "gateway/+/receipts", False),
        ("publish", "devices/sensor-1/renewal/request", False),
        ("publish", "devices/sensor-1/commands/reboot", False),
        ("publish", "devices/sensor-1/status", False),
        ("publish", "gateway/gw-1/crl", False),
        ("publish", "fleet/announcements/x", False),
    ],
)
def test_the_renewal_service_renews_and_does_nothing_else(action: str, topic: str, *, expected: bool) -> None:
    assert allowed(action, topic, who=DeviceId("renewd"), role=Role("service-renewal")) is expected


SAID = ("receipts", "policy-receipts", "status", "seen/sensor-1", "crl-in-force/ab")


@pytest.mark.parametrize("what", SAID)
def test_no_entry_however_wide_lets_a_client_speak_for_a_gateway_but_another_gateways_link(what: str) -> None:
    wide = (
        RoleRules("device", publish=("#",)),
        RoleRules("operator", publish=("gateway/+/#",)),
        RoleRules("service-x", publish=("#",)),
        RoleRules("service-gateway", publish=("#",)),
    )
    names = ("operator", "service-x", "service-gateway")
    given = Policy(wide, (*(Assignment(name, ou=name) for name in names), Assignment("device", cn="*")))
    for name in ("device", "operator", "service-x"):
        assert not allowed("publish", f"gateway/gw-1/{what}", role=Role(name), policy=given)
        assert allowed("publish", "gateway/gw-1/crl", role=Role(name), policy=given), "the entry is wide"
    assert allowed("publish", f"gateway/gw-1/{what}", role=GATEWAY, policy=given)


@pytest.mark.parametrize("what", SAID)
def test_by_the_default_policy_a_gateway_speaks_for_itself_alone(what: str) -> None:
    for name, expected in ((A, True), ("gw-1", False)):
        topic = f"gateway/{name}/{what}"
        assert allowed("publish", topic, who=A, role=GATEWAY) is expected
    for topic in ("devices/sensor-9/commands/reboot", "fleet/policy", "fleet/crl/ab", f"gateway/{A}/crl"):
        assert not allowed("publish", topic, who=A, role=GATEWAY)


@given(ids, ids, roles, st.sampled_from(["telemetry/x", "status", "replies/a/b", "commands/x", "time/answer", ""]))
def test_no_device_touches_anothers_topics(one: DeviceId, other: DeviceId, role: Role, rest: str) -> None:
    if one.text == other.text:
        return
    topic = f"devices/{other}/{rest}"
    assert not allowed("publish", topic, who=one, role=role)
    assert not DEFAULT.rights(one, role).receive(topic).allowed


_level = st.sampled_from(
    ["devices", "sensor-1", "sensor-2", "+", "commands", "telemetry", "status", "x", "", "fleet"]
)


@given(st.lists(_level, min_size=1, max_size=5), st.booleans())
def test_a_subscription_that_is_allowed_matches_no_topic_of_another(levels: list[str], more: bool) -> None:
    topic_filter = "/".join([*levels, "#"] if more else levels)
    if not topic_filter or not allowed("subscribe", topic_filter):
        return
    for rest in ("commands/x", "telemetry/x", "status", "renewal/answer", "x", "commands"):
        assert not matches(topic_filter, f"devices/sensor-2/{rest}")


@given(st.lists(_level, min_size=1, max_size=5), st.lists(_level, min_size=1, max_size=5))
def test_whatever_an_allowed_subscription_matches_may_be_delivered(f: list[str], t: list[str]) -> None:
    topic_filter, topic = "/".join(f), "/".join(t)
    if "+" in topic or not topic or not topic_filter or not allowed("subscribe", topic_filter):
        return
    if matches(topic_filter, topic):
        assert DEFAULT.rights(A, DEVICE).receive(topic).allowed


@given(ids, st.text(max_size=40))
def test_any_text_gets_an_answer(who: DeviceId, text: str) -> None:
    for action in Action:
        decision = decide(DEFAULT, who, DEVICE, action, text)
        assert decision.rule
        assert decision.rule.isascii()
    DEFAULT.rights(who, DEVICE).receive(text)


def policy(*assignments: Assignment, **lists: tuple[str, ...]) -> Policy:
    return Policy((RoleRules("r", **lists),), assignments or (Assignment("r", cn="*"),))


def test_deny_wins_over_allow() -> None:
    one = policy(publish=("a/#",), deny_publish=("a/secret/#",))
    assert allowed("publish", "a/b", policy=one)
    denied = decide(one, A, DEVICE, Action.PUBLISH, "a/secret/x")
    assert not denied.allowed
    assert "deny_publish 'a/secret/#'" in denied.rule


def test_a_subscription_that_overlaps_a_deny_is_refused_and_so_is_the_delivery() -> None:
    one = policy(subscribe=("a/#",), deny_subscribe=("a/secret/+",))
    assert not allowed("subscribe", "a/#", policy=one)
    assert not allowed("subscribe", "a/+/x", policy=one)
    assert allowed("subscribe", "a/open/#", policy=one)
    assert not one.rights(A, DEVICE).receive("a/secret/x").allowed
    assert one.rights(A, DEVICE).receive("a/secret").allowed


def test_what_is_withheld_is_never_delivered_and_a_wider_subscription_is_granted_without_it() -> None:
    rules = policy(Assignment("r", cn="*"), subscribe=("#",), withhold=("devices/{id}/secret/#", "a/b"))
    for refused in ("a/b", "devices/sensor-1/secret", "devices/sensor-1/secret/x", "devices/sensor-1/secret/+/#"):
        assert not allowed("subscribe", refused, policy=rules)
        assert "withhold" in decide(rules, A, DEVICE, Action.SUBSCRIBE, refused).rule
    for wider in ("#", "+/+", "a/+", "devices/#", "devices/sensor-1/+/#"):
        decision = decide(rules, A, DEVICE, Action.SUBSCRIBE, wider)
        assert decision.allowed
        assert decision.rule.endswith("subscribe '#' contains it, without what withhold lists")
    assert decide(rules, A, DEVICE, Action.SUBSCRIBE, "a/c").rule.endswith("subscribe '#' contains it")
    for hidden in ("a/b", "devices/sensor-1/secret", "devices/sensor-1/secret/x/y"):
        assert not rules.rights(A, DEVICE).receive(hidden).allowed
    for seen in ("a/c", "a/b/c", "devices/sensor-2/secret/x"):
        assert rules.rights(A, DEVICE).receive(seen).allowed
    assert allowed("publish", "a/b", policy=policy(Assignment("r", cn="*"), publish=("#",), withhold=("a/b",)))


@given(st.lists(_level, min_size=1, max_size=4), st.lists(_level, min_size=1, max_size=4))
def test_nothing_withheld_comes_through_any_subscription(hidden: list[str], f: list[str]) -> None:
    """Whatever is granted, and granted means that something of it may come, unless all of it is withheld."""
    entry, asked = "/".join(hidden), "/".join(f)
    if not entry or not asked:
        return
    rules = policy(Assignment("r", cn="*"), subscribe=("#",), withhold=(entry,))
    topic = asked.replace("+", "x")
    may_receive = rules.rights(A, DEVICE).receive(topic).allowed
    assert may_receive is not matches(entry, topic)
    if may_receive:
        assert allowed("subscribe", asked, policy=rules)


def test_a_union_of_entries_allows_no_more_than_each_of_them() -> None:
    one = policy(subscribe=("a", "a/+/#"))
    assert not allowed("subscribe", "a/#", policy=one)


def test_a_deny_with_the_own_id() -> None:
    one = policy(subscribe=("devices/#",), deny_subscribe=("devices/{id}/#",))
    assert not allowed("subscribe", "devices/#", policy=one)
    assert allowed("subscribe", "devices/sensor-2/#", policy=one)


def test_nobody_matched_gets_nothing() -> None:
    one = policy(Assignment("r", cn="camera-*"), publish=("#",), subscribe=("#",))
    decision = decide(one, A, DEVICE, Action.PUBLISH, "a")
    assert decision.rule == "no assignment matches cn 'sensor-1' and ou 'device'"
    assert not decision.allowed
    assert allowed("publish", "a", who=DeviceId("CAMERA-7"), policy=one)


def test_the_first_assignment_that_matches_wins() -> None:
    silent, loud = RoleRules("silent"), RoleRules("loud", publish=("#",))
    one = Policy((silent, loud), (Assignment("silent", cn="sensor-?"), Assignment("loud", ou="device")))
    assert not allowed("publish", "a", policy=one)
    assert allowed("publish", "a", who=DeviceId("sensor-10"), policy=one)
    assert not allowed("publish", "a", who=DeviceId("sensor-10"), role=Role("camera"), policy=one)


def test_the_default_policy_fits_the_topic_scheme() -> None:
    assert allowed("publish", topics.telemetry(A, "temperature"))
    assert allowed("publish", topics.status(A))
    assert allowed("publish", topics.reply(A, "reboot"))
    assert allowed("subscribe", topics.commands(A))
    assert allowed("subscribe", topics.ANNOUNCEMENTS)
    gateway, alice = BrokerName("gateway-1.example.com"), DeviceId("alice")
    assert allowed("publish", topics.command(A, "reboot"), who=alice, role=OPERATOR)
    assert allowed("publish", topics.gateway_crl(gateway), who=alice, role=OPERATOR)
    assert allowed("subscribe", topics.gateway_receipts(gateway), who=alice, role=OPERATOR)
    assert allowed("subscribe", topics.gateway_status(gateway), who=alice, role=OPERATOR)
    # The CRL is for the gateway: not even an operator reads it from the broker.
    assert not allowed("subscribe", topics.gateway_crl(gateway), who=alice, role=OPERATOR)


def test_a_star_never_reaches_a_service_and_a_device_never_becomes_one() -> None:
    one = policy(Assignment("r", cn="*", ou="*"), publish=("#",))
    assert not allowed("publish", "a", role=OPERATOR, policy=one)
    with pytest.raises(PolicyError, match="reserved for services"):
        Assignment("operator", cn="*")
    with pytest.raises(PolicyError, match="reserved for services"):
        Assignment("service-x", ou="*")
    assert not allowed("publish", "gateway/g/crl", who=DeviceId("operator"))


def test_rights_that_are_kept_answer_as_decide_does() -> None:
    rights = DEFAULT.rights(A, DEVICE)
    assert rights.role == "device"
    assert rights.publish("devices/sensor-1/status") == decide(
        DEFAULT, A, DEVICE, Action.PUBLISH, "devices/sensor-1/status"
    )
    assert rights.receive("devices/sensor-1/commands/x").allowed


def test_rights_are_those_of_the_identity_the_role_and_the_listener_under_this_policy_alone() -> None:
    rights = DEFAULT.rights(A, DEVICE)
    assert DEFAULT.rights(DeviceId("sensor-1"), Role("device")) is rights, "the control: they are remembered"
    topic = "devices/sensor-1/status"
    assert rights.publish(topic).allowed
    assert not DEFAULT.rights(DeviceId("sensor-2"), DEVICE).publish(topic).allowed
    assert not DEFAULT.rights(A, Role("service-x")).publish(topic).allowed
    assert not DEFAULT.rights(A, DEVICE, for_renewal=True).publish(topic).allowed
    assert not Policy((), ()).rights(A, DEVICE).publish(topic).allowed


def test_a_policy_remembers_no_more_identities_than_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("birthmark.broker.policy.MAX_REMEMBERED", 2)
    policy = Policy((RoleRules("all", publish=("#",)),), (Assignment("all", cn="*"),))
    first, second, third = (DeviceId(f"sensor-{number}") for number in (1, 2, 3))
    rights = [policy.rights(each, DEVICE) for each in (first, second, third)]
    assert policy.rights(second, DEVICE) is rights[1]
    assert policy.rights(third, DEVICE) is rights[2]
    assert policy.rights(first, DEVICE) is not rights[0], "it made room"


@pytest.mark.parametrize(
    ("glob", "name", "expected"),
    [
        ("*", "a", True),
        ("a*", "A", True),
        ("*-1", "sensor-1", True),
        ("s*r-?", "sensor-1", True),
        ("s*r-?", "sensor-10", False),
        ("sensor", "sensor-1", False),
        ("?", "", False),
        ("a**b", "ab", True),
    ],
)
def test_globs(glob: str, name: str, *, expected: bool) -> None:
    assert glob_matches(glob, name) is expected


@given(st.text("ab*?", min_size=1, max_size=8), st.text("ab", max_size=8))
def test_globs_match_as_the_shells_do(glob: str, name: str) -> None:
    import fnmatch

    assert glob_matches(glob, name) is fnmatch.fnmatchcase(name, glob)


def test_a_glob_of_many_stars_is_quick() -> None:
    assert not glob_matches("*a" * 32, "a" * 31 + "-" * 32)
