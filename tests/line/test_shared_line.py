"""Three stations on one PostgreSQL that flash at once, with kills and restarts of the database in the middle."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from support.board_agent import AgentThread
from support.board_cable import Cable
from support.postgres import running
from support.shared_line import Boards, LineStation, Shift, all_is_accounted_for, nothing_is_half
from support.station import PASSPHRASE, Command, new_station

from birthmark.provisioning.crl_store import crl_number_counter
from birthmark.provisioning.crls import up_to_date_crl
from birthmark.provisioning.line import slot
from birthmark.provisioning.registry.model import Kind, State
from birthmark.provisioning.settings import RegistrySetting
from birthmark.provisioning.settings_edit import put_registry
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.line_process import Process
    from support.postgres import Server

WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
NAMES = ("station", "line-2", "line-3")
BATCHES, SHIFTS, BOARDS_EACH = (4, 3, 6) if WHOLE else (1, 2, 2)
"""How often; how often each batch is worked at; how many boards a station has at a time."""
WHERE = ("--broker", "gateway-1.example.com:8883")


@pytest.fixture
def server() -> Iterator[Server]:
    """A PostgreSQL of the test's own: others must not feel it when it is stopped."""
    with running(durable=True) as server:
        yield server


def stations_on(server: Server, folder: Path, chance: random.Random) -> list[LineStation]:
    """Found a station on the server, and give it two more beside it (docs/registry.md)."""
    url = server.new_schema()
    new_station(folder / NAMES[0], registry=url).close()
    for name in NAMES[1:]:
        shutil.copytree(folder / NAMES[0], folder / name, ignore=shutil.ignore_patterns("audit.jsonl", "*.lock"))
        put_registry(folder / name / "station.toml", RegistrySetting(url, log=name))
    return [LineStation(folder / name, random.Random(chance.random())) for name in NAMES]


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_three_stations_flash_at_once_with_kills_and_restarts(
    tmp_path: Path, server: Server, proven: Callable[[str], None]
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    done: Counter[str] = Counter()
    folders: list[Path] = []
    stations = stations_on(server, tmp_path, chance)
    opened = Station.open(stations[0].folder, passphrase=PASSPHRASE)
    for batch in range(BATCHES):
        with Boards(tmp_path / f"batch-{batch}", len(stations) * BOARDS_EACH) as boards:
            folders += boards.folders
            for number in range(SHIFTS):
                done += shift(server, stations, boards, number, chance)
                with opened.registry.view() as view:
                    nothing_is_half(view.rows(), folders)
    proven(
        f"three stations on one PostgreSQL, {len(folders)} boards, {done['killed']} stations killed, "
        f"{done['restarts']} restarts of the server, {done['waited']} waits for it: nothing twice, nothing half"
    )
    with opened.registry.view() as view:
        rows = view.rows()
        counters = {ca.key_id: view.counter(crl_number_counter(ca.key_id)) for ca in opened.cas.issuing}
    opened.close()
    devices = [row for row in rows if row.kind is Kind.DEVICE]
    assert [row.state for row in devices if row.is_live] == [State.ATTESTED] * len(folders)
    all_is_accounted_for(rows, [one.folder / "audit.jsonl" for one in stations], counters)
    nobody_sees_anything_wrong(stations)
    assert done["restarts"] == BATCHES * 2
    assert done["killed"] >= BATCHES * (SHIFTS - 1)


def shift(
    server: Server, stations: list[LineStation], boards: Boards, number: int, chance: random.Random
) -> Counter[str]:
    """Have each station work at boards that another one had in the shift before; nobody is killed in the last."""
    work = Shift()
    alone = chance.choice(stations) if number == 0 else None
    is_last = number == SHIFTS - 1
    for each, one in enumerate(stations):
        one.shift = work
        first = (each + number) % len(stations) * BOARDS_EACH
        ports = boards.ports[first : first + BOARDS_EACH]
        make = one.flash if one is alone else one.run
        work.begin(lambda make=make, ports=ports: make(ports, is_killed=not is_last))
        if WHOLE or is_last:
            work.begin(one.sign)
    if number in (0, SHIFTS - 1):
        work.begin(work.restart, server, chance.randint(1, 4 * BOARDS_EACH))
    work.end()
    return work.done


def nobody_sees_anything_wrong(stations: list[LineStation]) -> None:
    """The commands that an operator would use find nothing to explain, and every station's CRL lists the same."""
    for one in stations:
        assert one.says("audit", "verify")[0] == 0
    assert stations[0].says("resume") == (0, [])
    _, findings = stations[0].says("doctor", "--offline")
    trouble = {found["check"] for found in findings if found.get("level", "WELL") != "WELL"}
    assert trouble == {"root-key", "backup"}, findings  # as at any station that was founded a minute ago
    opened = [Station.open(one.folder, passphrase=PASSPHRASE) for one in stations]
    lists = [up_to_date_crl(each).cert_serials for each in opened]
    assert lists == [lists[0]] * len(lists)
    for each in opened:
        each.close()
    crls = set().union(*(one.crls for one in stations))
    assert len({number for number, _ in crls}) == len(crls), "one number, two CRLs"


@pytest.fixture
def held_board(tmp_path: Path, server: Server) -> Iterator[Cable]:
    """A board whose answer to KEYGEN arrives when the server has been stopped."""
    with Cable(tmp_path / "ttyBOARD") as cable:
        stopped: list[bool] = []

        def stop_first(data: bytes) -> bytes:
            if not stopped and len(cable.passed_to_station) > 300:  # after the answer to HELLO
                stopped.append(True)
                server.stop("immediate")
            return data

        cable.to_station = stop_first
        with AgentThread(tmp_path / "state", os.urandom(8), cable.device_path):
            yield cable


@pytest.fixture
def station(tmp_path: Path, server: Server) -> Iterator[Station]:
    station = new_station(tmp_path / "station", registry=server.new_schema())
    yield station
    station.close()


def waits(record: dict[str, Any]) -> bool:
    return str(record["event"]) == "registry"


def test_a_line_waits_for_its_registry_and_goes_on(
    station: Station, server: Server, held_board: Cable, start: Callable[..., Process]
) -> None:
    line = start("run", "--port", str(held_board.link), "--template", "unit-{n}", "--json", *WHERE)
    waiting = line.wait_for(waits)
    assert waiting["text"].startswith("waiting: could not reach the registry postgresql")
    server.start()
    assert line.wait_for(waits)["text"] == "it is back"
    assert line.end() == (0, "")
    result, summary = line.records[-2:]
    assert (result["result"], result["id"], result["retries"]) == ("PASS", "unit-1", 0)
    assert (summary["retries"], summary["failures_by_step"]) == (0, {})
    with station.registry.view() as view:
        assert [(row.name, row.state) for row in view.rows()] == [("unit-1", State.ATTESTED)]


def test_a_line_that_waits_for_its_registry_can_be_stopped(
    station: Station, server: Server, held_board: Cable, start: Callable[..., Process]
) -> None:
    line = start("run", "--port", str(held_board.link), "--template", "unit-{n}", "--json", *WHERE)
    line.wait_for(waits)
    line.process.send_signal(signal.SIGINT)
    assert line.end() == (130, "")
    assert line.records[-1]["event"] == "interrupted"
    server.start()
    with station.registry.view() as view:
        assert [row.state for row in view.rows()] == [State.RESERVED]


def test_a_registry_that_stays_away_fails_the_unit(
    station: Station, held_board: Cable, birthmark: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "REGISTRY_PATIENCE_S", 0.0)
    done = birthmark("run", "--port", str(held_board.link), "--template", "unit-{n}", "--json", *WHERE)
    assert done.exit_code == 6
    assert [record["event"] for record in done.records[-3:]] == ["registry", "result", "summary"]
    assert (done.records[-2]["code"], done.records[-2]["result"]) == ("REGISTRY", "FAIL")
    assert "PostgreSQL" in done.records[-2]["hint"]
