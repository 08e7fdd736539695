"""Lifetimes in station.toml that nothing can be issued for: issuing ends, and nothing else does."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.station import enrolled_row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.station import Command

    from birthmark.provisioning.station import Station


@pytest.fixture(params=[1, 10**30])
def out_of_range(request: pytest.FixtureRequest, living: Station) -> Station:
    """Return a station with a device, whose settings say what no certificate can be."""
    enrolled_row(living, "sensor-17")
    lines = re.compile(r"^(device|service|broker) = .*$", re.MULTILINE)
    living.settings_path.write_text(lines.sub(rf"\1 = {request.param}", living.settings_path.read_text()))
    return living


@pytest.fixture
def pty() -> Iterator[str]:
    """Return the path of a port that nobody answers on."""
    ends = os.openpty()
    yield os.ttyname(ends[1])
    for end in ends:
        os.close(end)


@pytest.mark.usefixtures("out_of_range")
def test_a_lost_device_is_revoked_all_the_same(birthmark: Command) -> None:
    for line in ("list", "show sensor-17", "revoke sensor-17 --reason lost", "crl", "audit verify", "ca show"):
        answer = birthmark(*line.split())
        assert answer.exit_code == 0, answer
    assert birthmark("gateway", "add", "gateway-1", "--path", "crl.pem").exit_code == 0
    assert birthmark("crl", "status", "--json").exit_code == 1, "the gateway is behind"


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("issue-broker gateway-1 --out new", "broker"),
        ("issue-operator alice --out new", "service"),
        ("issue --from list.jsonl --keys station --broker g:8883 --out new", "device"),
        ("flash --port {pty} --id sensor-18", "device"),
        ("run --port {pty} --template s-{{n}}", "device"),
        ("renewd --broker gateway-1 --identity renewd.pem", "device"),
    ],
)
def test_nothing_is_issued(birthmark: Command, out_of_range: Station, pty: str, line: str, kind: str) -> None:
    Path("list.jsonl").write_text(json.dumps({"id": "sensor-18"}))
    with out_of_range.registry.view() as view:
        before = view.count()

    answer = birthmark(*line.format(pty=pty).split())

    assert answer.exit_code == 1, answer
    assert f"could not issue for a {kind}: {kind} = 1" in answer.stderr
    assert "from 2 to 3650" in answer.stderr
    assert [path.name for path in Path.cwd().iterdir()] == ["list.jsonl"]
    with out_of_range.registry.view() as view:
        assert view.count() == before


@pytest.mark.usefixtures("out_of_range")
def test_doctor_says_so(birthmark: Command) -> None:
    answer = birthmark("doctor", "--offline", "--json")
    assert answer.exit_code == 6
    found = [each for each in answer.records if each.get("check") == "lifetimes"]
    assert [(each["level"], each["about"]) for each in found] == [
        ("BROKEN", [kind]) for kind in ("device", "service", "broker")
    ]
