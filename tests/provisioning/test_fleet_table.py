"""`birthmark gateways`: who is there, what each goes by, and how far that is behind."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from support.programs import needs
from support.station_gateways import PathGateway, receipt_for
from support.station_upstream import Fleet, fleet

from birthmark.device.console import Console
from birthmark.device.fleet_policy import MAX_VERSION
from birthmark.device.messages import GatewayStatus, UpstreamState
from birthmark.provisioning.crl_delivery import deliver_crl
from birthmark.provisioning.crl_store import current_crl
from birthmark.provisioning.crls import sign_and_store_crl
from birthmark.provisioning.fleet_policy import sign_policy
from birthmark.provisioning.fleet_table import COLUMNS, Aims, GatewayRow
from birthmark.provisioning.gateway_look import Look
from birthmark.provisioning.gateway_receipts import Confirmed, Standing, completed, note_heard, standing_of
from birthmark.provisioning.gateway_settings import Gateway
from birthmark.provisioning.policy_delivery import deliver_policy
from birthmark.provisioning.settings_edit import add_gateway

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.station import Clock, Command

    from birthmark.provisioning.station import Station

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)
TEXT = b"[roles.device]\n[[assignments]]\nou = 'device'\nrole = 'device'\n"
STATUS = GatewayStatus(
    gateway="g-1",
    online=True,
    clock=1000.0,
    crl_numbers={"aa": 7, "bb": 3},
    crl_next_update=0.0,
    policy_sha256="",
    sessions=12,
    alarms=("crl-due",),
    policy_version=4,
    upstreams=(
        UpstreamState("cloud", connected=True, since=1.0, spooled=21),
        UpstreamState("far", connected=False, since=0.0, spooled=9, reason="refused"),
    ),
)
LOOK = Look("g-1", "via cloud", crl_numbers=(("aa", 7), ("bb", 3)), status=STATUS, looked_at_s=1000.0, via="cloud")
AIMS = Aims({"aa": 7, "bb": 3}, 4)
KNOWN = Standing({"aa": Confirmed(6, "", NOON), "bb": Confirmed(3, "", NOON - timedelta(days=1))}, heard_at=NOON)


def row(*, look: Look = LOOK, standing: Standing = KNOWN, **status: object) -> GatewayRow:
    changed = replace(STATUS, **status) if status else STATUS  # type: ignore[arg-type]
    if status:
        look = replace(look, status=changed, crl_numbers=tuple(sorted(changed.crl_numbers.items())))
    return GatewayRow(completed(look, standing), standing, AIMS)


def test_one_that_is_well() -> None:
    assert row().is_well
    assert row().shown() == {
        "gateway": "g-1",
        "state": "online",
        "crl": "aa:7, bb:3",
        "policy": "4",
        "clock": "right",
        "sessions": 12,
        "last_receipt": "2026-05-04T12:00:00Z",
        "alarms": ["crl-due"],
        "upstreams": ["cloud: up, 21 to go", "far: down, 9 to go"],
    }
    assert row().record()["upstreams"][1]["reason"] == "refused"


def test_one_that_is_behind_says_by_how_much() -> None:
    behind = row(crl_numbers={"aa": 5}, policy_version=1)
    assert (behind.is_well, behind.shown()["crl"], behind.shown()["policy"]) == (
        False,
        "aa:5 (2 behind), bb:none (3 behind)",
        "1 (3 behind)",
    )
    assert not row(crl_numbers={"aa": 6, "bb": 3}).is_well
    assert not row(policy_version=3).is_well
    assert row(upstreams=(replace(STATUS.upstreams[0], spooled=20),)).shown()["upstreams"] == ["cloud: up"]
    assert row(policy_version=0).shown()["policy"] == "own (4 behind)"
    assert GatewayRow(replace(LOOK, status=replace(STATUS, policy_version=0)), KNOWN, Aims(AIMS.crls, 0)).is_well
    newer = row(crl_numbers={"aa": 9, "bb": 3})
    assert (newer.is_well, newer.shown()["crl"]) == (False, "aa:9 (newer than ours), bb:3")
    assert GatewayRow(LOOK, KNOWN, Aims({"aa": 1_790_000_000}, 4)).shown()["crl"] == "7 (behind)"


def test_one_that_is_away_is_known_by_its_receipts_where_its_will_is_older() -> None:
    away = row(online=False, crl_numbers={"aa": 5, "bb": 3})
    assert (away.state, away.is_well) == ("away", False)
    assert away.shown()["state"] == "away since 2026-05-04 12:00"
    assert away.shown()["crl"] == "aa:6 (1 behind), bb:3"
    assert (away.shown()["clock"], away.shown()["sessions"], away.shown()["upstreams"]) == (None, None, [])
    assert row(online=False, policy_version=0).shown()["policy"] == "own (4 behind)"
    known = replace(KNOWN, policy_version=3)
    assert row(online=False, policy_version=0, standing=known).shown()["policy"] == "3 (1 behind)"
    assert row(online=True, policy_version=0, standing=known).shown()["policy"] == "own (4 behind)"
    assert row(online=True, crl_numbers={"aa": 5, "bb": 3}).shown()["crl"] == "aa:5 (2 behind), bb:3", (
        "one that is there speaks for itself: it was restored from an old image"
    )
    assert row(online=False, look=replace(LOOK, via="")).state == "stopped"
    never = GatewayRow(Look("g-1", "via cloud", "knows nothing", via="cloud"), Standing({}), AIMS)
    assert (never.state, never.is_well, never.shown()["crl"]) == (
        "unknown",
        False,
        "aa:none (7 behind), bb:none (3 behind)",
    )


@pytest.mark.parametrize(
    ("ahead_s", "shown"),
    [
        (0, "right"),
        (-34, "right"),
        (4.9, "right"),
        (-36, "36 s behind"),
        (5.1, "5 s ahead"),
        (-119, "119 s behind"),
        (-3600, "60 min behind"),
        (7200, "2 h ahead"),
        (-3 * 86400, "3 d behind"),
    ],
)
def test_a_clock_that_is_wrong_is_said(ahead_s: float, shown: str) -> None:
    assert row(clock=1000.0 + ahead_s).shown()["clock"] == shown


@pytest.fixture
def cloud(living: Station, tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path / "cloud", living) as made:
        yield made


@needs("mosquitto")
def test_nothing_that_a_gateway_says_floods_or_drives_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """A gateway that lies: it is in its own row, in bounds, and not well."""
    most = 2**160 - 1
    liar = GatewayStatus.from_bytes(
        replace(
            STATUS,
            clock=1e300,
            crl_numbers={"aa": most, "bb": 3, "\x1b[2J": 1},
            policy_version=most,
            sessions=most,
            alarms=("\x1b[2J\u202e" * 100,) * 50,
            upstreams=(UpstreamState("\x1b]0;owned\x07" * 100, connected=False, since=1e300, spooled=most),) * 50,
        ).to_bytes()
    )
    found = row(look=replace(LOOK, status=liar, crl_numbers=tuple(sorted(liar.crl_numbers.items()))))
    assert not found.is_well
    Console().table([found.shown()], COLUMNS, empty="")
    Console(as_json=True).table([found.record()], COLUMNS, empty="")
    table, _, record = capsys.readouterr().out.partition("{")
    assert "over 99999 d ahead" in table
    assert f"{most} (newer than ours)" in table
    assert len(table) < 40_000
    is_safe = (table + record).replace("\n", "").isprintable()
    assert is_safe


@pytest.mark.parametrize("timeout", ["nan", "inf", "-1", "0"])
def test_a_time_out_that_is_none_is_refused(birthmark: Command, timeout: str) -> None:
    assert birthmark("gateways", f"--timeout={timeout}").exit_code == 2


def test_the_table_of_a_fleet(cloud: Fleet, birthmark: Command, tmp_path: Path) -> None:
    station = cloud.station
    cloud.add("g-1", "g-2", "g-3")
    path = tmp_path / "crl.pem"
    add_gateway(station.settings_path, Gateway("g-4", crl_path=path))
    cloud.reread()
    policy, _ = sign_policy(station, TEXT)
    crls = current_crl(station)
    assert crls is not None
    with (
        cloud.there(["g-1"]),
        cloud.there(["g-2"], clock_is_ahead_s=-7200),
        PathGateway(path, lambda crl: receipt_for(crl, gateway="g-4").to_bytes()),
    ):
        with cloud.there(["g-3"]):
            deliver_crl(station, crls, 30)
            deliver_policy(station, policy, 30)
            answer = birthmark("gateways", "--json")
            assert answer.exit_code == 0, answer
            assert {one["gateway"]: (one["state"], one["policy_behind"]) for one in answer.records} == {
                "g-1": ("online", 0),
                "g-2": ("online", 0),
                "g-3": ("online", 0),
                "g-4": ("by path", None),
            }
            assert answer.records[1]["clock_difference_s"] < -7000
            changes = birthmark("audit", "show", "--action", "policy", "--json").records
        before = time.time()
        deliver_crl(station, sign_and_store_crl(station), 30)
        answer = birthmark("gateways", "--json")
        assert answer.exit_code == 1
        away = answer.records[2]
        assert (away["state"], away["sessions"], away["trouble"]) == ("away", None, "its link to cloud is down")
        assert [one["behind"] for one in away["crls"].values()] == [1]
        assert (away["policy_version"], away["policy_behind"]) == (1, 0), "its last will is of before the policy"
        assert birthmark("audit", "show", "--action", "policy", "--json").records == changes
        assert datetime.fromisoformat(away["last_heard"]).timestamp() <= before
        assert [one["well"] for one in answer.records] == [True, True, False, True]
        lines = birthmark("gateways").stdout.splitlines()
    assert lines[0].split() == [
        "GATEWAY",
        "STATE",
        "CRL",
        "POLICY",
        "CLOCK",
        "SESSIONS",
        "LAST",
        "RECEIPT",
        "ALARMS",
        "UPSTREAMS",
    ]
    assert "2 h behind" in lines[2]
    assert "away since 20" in lines[3]
    assert "1 (1 behind)" in lines[3]


def test_who_was_there_is_noted_once_a_minute(station: Station, clock: Clock) -> None:
    def heard_at() -> datetime | None:
        with station.registry.view() as view:
            return standing_of(view, "G-1").heard_at

    note_heard(station, [replace(LOOK, status=replace(STATUS, online=False))])
    assert heard_at() is None
    note_heard(station, [LOOK])
    first = heard_at()
    assert first == clock.now
    liar = replace(LOOK, status=replace(STATUS, policy_version=2**160))
    note_heard(station, [liar])
    with station.registry.view() as view:
        assert standing_of(view, "g-1").policy_version == MAX_VERSION
    note_heard(station, [LOOK])
    clock.advance(seconds=59)
    note_heard(station, [LOOK])
    assert heard_at() == first
    clock.advance(seconds=2)
    note_heard(station, [LOOK])
    assert heard_at() == clock.now
    clock.advance(days=-1)  # the station's clock was wrong, and is right now
    note_heard(station, [LOOK])
    assert heard_at() == clock.now


def test_without_a_gateway(birthmark: Command) -> None:
    answer = birthmark("gateways")
    assert (answer.exit_code, answer.stdout) == (0, "no gateway is configured\n")
    assert birthmark("gateways", "--watch", "0").exit_code == 2
