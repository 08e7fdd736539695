"""How far it goes: the plan's arithmetic, the page's tables and picture, and that each part can be measured."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from support.repository import ROOT

from bench import scaling, scaling_gateway, scaling_station
from bench.fleet_pki import FleetPki
from bench.scaling_chart import amount
from bench.scaling_plan import Fleet, crl_entries, crls_a_day, plan, rows_per_device

if TYPE_CHECKING:
    from pathlib import Path

MEASURED = json.loads((ROOT / "docs" / "scaling.json").read_text())["measured"]


def test_the_pages_tables_and_picture_are_of_its_figures() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    missing = [line for line in scaling.tables(MEASURED) if line not in page]
    assert not missing, "print them with: python -m bench.scaling --from docs/scaling.json --tables"
    picture = (ROOT / "docs" / "scaling.svg").read_text()
    assert picture == scaling.drawn(MEASURED)
    assert ET.fromstring(picture).tag.endswith("svg")  # noqa: S314 - our own


def test_a_plan_by_hand() -> None:
    # 73,000 devices, 730 days: renewed after 486.7, so 150 a day; a replaced one stays for 243.3 + 90 days.
    fleet = Fleet(73_000, messages_per_day=86_400, revoked_per_year=0.05, back_within_s=100, keep_days=90)
    assert crl_entries(fleet) == pytest.approx(150 * (730 / 3 + 90) + 10 * (730 * 2 / 3 + 90))
    assert crls_a_day(fleet) == pytest.approx(24 * (1 - 2.718281828 ** (-150 / 24)) + 10)
    assert rows_per_device(fleet) == pytest.approx(1 + 5 * 365 * 3 / 2 / 730)
    found = plan({**MEASURED, "spread_us": 20.0, "visit_full_us": 3_000.0, "renewal_us": 10_000.0}, fleet)
    assert found.messages_s == 73_000
    assert found.message_cores == pytest.approx(2.92)
    assert found.return_cores == pytest.approx(2.19)
    assert found.gateways == 3
    assert found.renewals_day == pytest.approx(150)
    assert found.renewal_cpu_day_s == pytest.approx(1.5)
    assert found.crl_bytes_day == pytest.approx(found.crls_day * found.crl_bytes)


def test_a_small_fleet_needs_one_gateway_and_few_crls() -> None:
    assert plan(MEASURED, Fleet(1)).gateways == 1
    assert crls_a_day(Fleet(1)) < 0.01
    assert crls_a_day(Fleet(10**9, revoked_per_year=0)) == pytest.approx(24)


@pytest.mark.parametrize(("octets", "text"), [(0, "0"), (999, "999 B"), (53_000, "53 KB"), (7.26e6, "7.26 MB")])
def test_amounts(octets: float, text: str) -> None:
    assert amount(octets) == text


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_a_gateway_is_measured(tmp_path: Path) -> None:
    pki = FleetPki(tmp_path)
    found = scaling_gateway.sessions(pki, 30, print) | scaling_gateway.revocations(pki, 60, 200, print)
    # Of so few, freed and new memory cannot be told apart; the rest must have cost something.
    for name in (
        "spread_us",
        "visit_full_us",
        "visit_resumed_us",
        "waiting_disk_bytes",
        "crl_small_us",
        "crl_large_s",
    ):
        assert found[name] > 0, name
    assert found.keys() <= MEASURED.keys()


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_a_station_is_measured(tmp_path: Path) -> None:
    found = scaling_station.figures(tmp_path, 3, 20, 100, print)
    assert all(value > 0 for name, value in found.items() if name != "crl_entry_us"), found
    assert 50 < found["crl_entry_bytes"] < 90
    assert found.keys() <= MEASURED.keys()
