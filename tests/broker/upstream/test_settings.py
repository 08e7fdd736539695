"""`[[upstream]]` as it is read, and the loops that it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.upstreams import upstream_toml, upstreams

from birthmark.broker.filters import matches
from birthmark.broker.upstream.mapping import Mapping, Passage
from birthmark.broker.upstream.settings import SpoolFull, UpstreamSettings
from birthmark.device.errors import ConfigurationError

FOLDER = Path("/etc/birthmark")


def read(**changes: Any) -> UpstreamSettings:
    (found,) = upstreams(FOLDER, upstream_toml("gw-1", 8883, **changes), gateway="berlin")
    return found


def test_what_is_not_said_has_its_default() -> None:
    found = read(longest_wait_s=None)
    assert [str(server) for server in found.servers] == ["127.0.0.1:8883"]
    assert found.credentials_path == FOLDER / "gw-1.pem"
    assert (found.client_id, found.keepalive_s, found.longest_wait_s) == ("", 30, 30.0)
    assert (found.spool_messages, found.spool_bytes, found.spool_full) == (100_000, 67_108_864, SpoolFull.HOLD)
    assert not found.fleet
    assert not found.transit


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a b"}, "no word of letters"),
        ({"name": "$x"}, "no word of letters"),
        ({"servers": []}, "there is none"),
        ({"servers": ["mqtt://a:1883"]}, "does not begin with mqtts://"),
        ({"servers": ["mqtts://a:99999"]}, "is not from 1 to 65535"),
        ({"credentials": ""}, "the path of a file"),
        ({"ca": None}, "the key 'ca' is missing"),
        ({"keepalive_s": 0}, "from 1 to 3600"),
        ({"prefix": "sites/berlin"}, "ends in a slash"),
        ({"prefix": "sites/+/"}, "wildcard"),
        ({"prefix": "$sites/"}, "does not begin with $"),
        ({"up": ["a/#/b"]}, "# may only be the last level"),
        ({"up": ["$SYS/#"]}, "each broker's own"),
        ({"up": [], "down": [], "down_shared": []}, "nothing goes up and nothing comes down"),
        ({"spool_full": "burst"}, "none of 'hold', 'drop_oldest', 'drop_newest'"),
        ({"spool_messages": 1}, "from 16"),
        ({"spools": 1}, "unknown key"),
    ],
)
def test_what_cannot_be_used_is_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=r"could not use broker\.toml, line \d+, upstream\[1\]") as caught:
        read(**changes)
    assert words in caught.value.message


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="there is another upstream CLOUD"):
        upstreams(FOLDER, upstream_toml("gw-1", 1), upstream_toml("gw-1", 2, name="CLOUD"))


@pytest.mark.parametrize(
    "changes",
    [
        {"up": ["devices/#"], "down": ["devices/+/commands/#"]},
        {"up": ["devices/#"], "down": [], "down_shared": ["#"]},
        {"up": ["gateway/+/status"], "down": [], "down_shared": ["gateway/berlin/#"]},
        {"up": ["devices/+/telemetry/#", "a"], "down": ["+"]},
        {"prefix": "", "up": ["#"], "down": ["fleet/announcements/x"]},
    ],
)
def test_what_goes_up_and_down_at_once_is_refused_with_both_filters(changes: dict[str, list[str]]) -> None:
    with pytest.raises(ConfigurationError, match=r"which goes up, and .* which comes down") as caught:
        read(**({"down_shared": []} | changes))
    assert "prefix of its own" in caught.value.hint


def test_in_a_namespace_of_its_own_a_gateway_may_hear_what_it_says() -> None:
    mapping = read(prefix="sites/berlin/", up=["devices/#"], down=["devices/+/commands/#"]).mapping
    assert mapping.to_remote("devices/a/status") == "sites/berlin/devices/a/status"
    # It comes back, and is known for our own.
    assert mapping.to_local("sites/berlin/devices/a/commands/reboot") is None

    mapping = read(prefix="sites/berlin/", down=["devices/#"]).mapping
    assert mapping.to_local("sites/berlin/devices/a/commands/reboot") == "devices/a/commands/reboot"
    assert mapping.to_local("sites/berlin/devices/a/status") is None
    assert mapping.to_local("sites/paris/devices/a/commands/reboot") is None
    assert mapping.to_local("fleet/announcements/tea") == "fleet/announcements/tea"
    assert mapping.to_local("sites/berlin/fleet/announcements/tea") is None


def test_one_of_a_fleet_hears_others_and_is_not_told_of_itself() -> None:
    mapping = read(fleet=True, prefix="sites/berlin/").mapping
    assert mapping.to_remote("gateway/berlin/status") == "gateway/berlin/status"
    assert mapping.to_remote("gateway/paris/status") is None
    assert mapping.to_local("gateway/paris/seen/a") == "gateway/paris/seen/a"
    assert mapping.to_local("gateway/berlin/seen/a") is None
    assert mapping.to_local("fleet/policy") == "fleet/policy"
    assert {"fleet/crl/+", "gateway/+/seen/+"} <= set(mapping.subscriptions())


def test_nobody_above_speaks_in_the_gateways_name() -> None:
    mapping = read(up=["devices/+/status"], down=[], down_shared=["gateway/#"]).mapping
    assert mapping.to_local("gateway/berlin/crl") == "gateway/berlin/crl"
    assert mapping.to_local("gateway/paris/status") == "gateway/paris/status"
    for said in ("status", "receipts", "seen/a", "crl-in-force/00"):
        assert mapping.to_local(f"gateway/berlin/{said}") is None
        assert mapping.to_local(f"gateway/BERLIN/{said}") is None, "names are one, however their case"


def test_nobody_above_speaks_in_the_brokers_name() -> None:
    mapping = read(prefix="sites/berlin/", up=[], down=["#"], down_shared=[]).mapping
    assert mapping.to_local("sites/berlin/a/$SYS") == "a/$SYS"
    assert mapping.to_local("sites/berlin/$SYS/broker/version") is None
    assert mapping.to_local("sites/berlin/") is None, "no topic is left"


def test_what_is_this_gateways_alone_is_no_loop_however_its_case() -> None:
    assert read(up=["gateway/Berlin/#"], down=[], down_shared=["gateway/#"]).mapping.loop() is None
    with pytest.raises(ConfigurationError, match="have topics in common"):
        read(up=["gateway/paris/#"], down=[], down_shared=["gateway/#"])


def test_a_name_that_grows_too_long_stays_here() -> None:
    mapping = read(prefix="sites/berlin/", up=["#"], down=[]).mapping
    assert mapping.to_remote("a" * (65_535 - 13)) is not None
    assert mapping.to_remote("a" * (65_535 - 12)) is None


LEVELS = st.sampled_from(["a", "b", "+", "site", ""])
FILTERS = st.tuples(st.lists(LEVELS, min_size=1, max_size=3), st.booleans()).map(
    lambda found: "/".join([*found[0], *(["#"] if found[1] else [])]) or "a"
)
TOPICS = st.lists(st.sampled_from(["a", "b", "site", ""]), min_size=1, max_size=4).map(
    lambda found: "/".join(found) or "a"
)


@given(st.lists(FILTERS, max_size=3), st.lists(FILTERS, max_size=3), st.sampled_from(["", "site/"]), TOPICS)
def test_what_is_accepted_never_comes_back_as_somebody_elses(
    ups: list[str], downs: list[str], prefix: str, topic: str
) -> None:
    mapping = Mapping(
        "berlin", tuple(Passage(found, prefix) for found in ups), tuple(Passage(found, prefix) for found in downs)
    )
    if mapping.loop() is not None:
        assert not prefix
        return
    remote = mapping.to_remote(topic)
    if any(matches(found, topic) for found in ups):
        assert remote == prefix + topic
        assert mapping.to_local(remote) is None
    else:
        assert remote is None
