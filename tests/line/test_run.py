"""`birthmark run` and `birthmark resume` on boards that are real but for their wires."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from support.board_agent import AgentThread
from support.board_cable import Cable
from support.board_killed import session
from support.line_board import LineBoard
from support.patience import PATIENCE_S
from support.station import PASSPHRASE
from support.station_gateways import PathGateway, receipt_for

from birthmark.provisioning.crl_store import read_crl_file
from birthmark.provisioning.enrollment.enrol import Stored
from birthmark.provisioning.gateway_settings import Gateway
from birthmark.provisioning.line.run import run_line
from birthmark.provisioning.line.slot import Slot
from birthmark.provisioning.line.view import Tally
from birthmark.provisioning.registry.model import KeyMode, State
from birthmark.provisioning.settings_edit import add_gateway

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.line_process import Process
    from support.station import Command

    from birthmark.provisioning.enrollment.session import Event
    from birthmark.provisioning.registry.model import Row
    from birthmark.provisioning.station import Station

WHERE = ("--broker", "gateway-1.example.com:8883")


class CutError(Exception):
    pass


def rows(station: Station) -> list[Row]:
    with station.registry.view() as view:
        return view.rows()


def ports(boards: list[LineBoard]) -> list[str]:
    return [word for board in boards for word in ("--port", board.port)]


def results(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {record["slot"]: record for record in records if record["event"] == "result"}


def no_half_identities(station: Station, boards: list[LineBoard]) -> None:
    """Every board that is locked is a row's, no two share a name, and no live unit has two certificates."""
    live = [row for row in rows(station) if row.is_live]
    assert len({row.hwid for row in live}) == len(live)
    assert len({row.name_folded for row in live}) == len(live)
    by_hwid = {row.hwid: row for row in live}
    for board in boards:
        if board.is_made:
            row = by_hwid[board.hwid]
            assert row.state.reached(State.PREPARED)
            assert board.bundle.config.device_id.text == row.name


def test_a_whole_fixture_at_once(
    birthmark: Command, station: Station, boards: Callable[[int], list[LineBoard]], tmp_path: Path
) -> None:
    eight = boards(8)
    fixture = tmp_path / "fixture.toml"
    fixture.write_text("".join(f"[[slot]]\nname = 'S{n}'\nport = '{b.port}'\n" for n, b in enumerate(eight)))
    birthmark("batch", "open", "W47")
    done = birthmark("run", "--ports", fixture, "--template", "sensor-{n:05}", "--json", *WHERE)
    assert done.exit_code == 0, done.stderr
    assert {(row.state, row.batch) for row in rows(station)} == {(State.ATTESTED, "W47")}
    assert sorted(row.name for row in rows(station)) == [f"sensor-{n:05}" for n in range(1, 9)]
    no_half_identities(station, eight)
    ended = results(done.records)
    assert sorted(ended) == [f"S{n}" for n in range(8)]
    for number, board in enumerate(eight):
        result = ended[f"S{number}"]
        assert (result["result"], result["id"]) == ("PASS", board.bundle.config.device_id.text)
        steps = [r["step"] for r in done.records if r["event"] == "step" and r["slot"] == f"S{number}"]
        assert steps == ["hello", "keygen", "begin", "data", "prepare", "commit", "attest"]
    summary = done.records[-1]
    assert (summary["event"], summary["passed"], summary["first_pass_yield"]) == ("summary", 8, 1.0)
    (report,) = birthmark("batch", "report", "--json").records
    assert (report["made"], report["attempts"], report["first_pass_yield"]) == (8, 8, 1.0)


def test_a_list_gives_ids_roles_and_labels_in_order(
    birthmark: Command, station: Station, boards: Callable[[int], list[LineBoard]], tmp_path: Path
) -> None:
    listed = tmp_path / "ids.csv"
    listed.write_text("id,role,lot\nmeter-1,meter,A7\nsensor-1,,\nmeter-2,meter,A8\n")
    first, second, third = boards(3)
    assert birthmark("flash", "--port", first.port, "--id", "SENSOR-1", *WHERE).exit_code == 0
    done = birthmark("run", *ports([second]), "--list", listed, *WHERE)
    assert done.exit_code == 0, done.stderr
    assert "PASS" in done.stdout
    done = birthmark("run", *ports([third]), "--list", listed, *WHERE)
    assert done.exit_code == 0, done.stderr
    made = {row.name: (row.role, row.label) for row in rows(station)}
    assert made == {"SENSOR-1": ("sensor", ""), "meter-1": ("meter", "lot: A7"), "meter-2": ("meter", "lot: A8")}
    spare = boards(1)
    done = birthmark("run", *ports(spare), "--list", listed, *WHERE)
    assert "idle: could not choose an id for the device on this port: none is left" in done.stdout
    assert not spare[0].is_made
    assert len(rows(station)) == 3


def test_each_slot_for_itself_and_the_worst_exit_code(
    birthmark: Command, station: Station, boards: Callable[[int], list[LineBoard]], tmp_path: Path
) -> None:
    made, blank = boards(2)
    assert birthmark("flash", "--port", made.port, "--id", "sensor-1", *WHERE).exit_code == 0
    where = [*ports([made, blank]), "--port", str(tmp_path / "nowhere")]
    done = birthmark("run", *where, "--template", "unit-{n}", "--json", *WHERE)
    assert done.exit_code == 5
    ended = results(done.records)
    assert [(ended[n]["result"], ended[n]["code"], ended[n]["exit_code"]) for n in "123"] == [
        ("FAIL", "DUPLICATE", 3),
        ("PASS", None, 0),
        ("FAIL", "PORT", 5),
    ]
    assert done.records[-1]["failures_by_step"] == {"hello": 1, "port": 1}
    assert blank.is_made


def test_a_unit_that_is_under_way_keeps_its_id(
    birthmark: Command, station: Station, boards: Callable[[int], list[LineBoard]]
) -> None:
    begun, blank, unknown = boards(3)

    def cut(event: Event) -> None:
        if isinstance(event, Stored) and event.row.state is State.PREPARED:
            raise CutError

    with pytest.raises(CutError):
        session(station, begun.port, "old-name", KeyMode.STATION, cut).run()
    (listed,) = birthmark("resume", "--json").records
    assert (listed["name"], listed["state"], listed["hwid"]) == ("old-name", "PREPARED", begun.hwid.hex())
    done = birthmark("run", *ports([begun, blank]), "--template", "unit-{n}", "--json", *WHERE)
    assert done.exit_code == 0, done.stderr
    assert results(done.records)["1"]["id"] == "old-name"
    assert sorted(row.name for row in rows(station)) == ["old-name", "unit-1"]
    assert birthmark("resume").stdout == "nothing is under way\n"
    idle = birthmark("resume", *ports([begun, unknown]), "--json", *WHERE)
    assert idle.exit_code == 0
    assert {r["slot"]: r["text"] for r in idle.records if r["event"] == "idle"} == {
        "1": "nothing to resume: old-name is ATTESTED",
        "2": f"could not resume the device {unknown.hwid.hex()}: the journal has nothing under way for it",
    }
    assert not unknown.is_made


def test_no_port_is_guessed(birthmark: Command) -> None:
    done = birthmark("run", "--template", "unit-{n}")
    assert done.exit_code == 2
    assert "no port is ever guessed" in done.stderr


def test_a_private_key_goes_over_no_network(birthmark: Command, station: Station) -> None:
    where = ("--port", "socket://127.0.0.1:1", "--keys", "station")
    assert birthmark("run", *where, "--template", "unit-{n}", *WHERE).exit_code == 3
    assert rows(station) == []


def test_ctrl_c_stops_every_slot_and_says_how_to_go_on(
    birthmark: Command, station: Station, start: Callable[..., Process], tmp_path: Path
) -> None:
    with Cable(tmp_path / "tty1") as one, Cable(tmp_path / "tty2") as two:
        silent = [threading.Event(), threading.Event()]
        for cable, is_silent in zip((one, two), silent, strict=True):

            def hush(data: bytes, cable: Cable = cable, is_silent: threading.Event = is_silent) -> bytes:
                if len(cable.passed_to_station) > 300:  # after the answer to HELLO, in or after that to KEYGEN
                    is_silent.set()
                return b"" if is_silent.is_set() else data

            cable.to_station = hush
        with (
            AgentThread(tmp_path / "b1", os.urandom(8), one.device_path),
            AgentThread(tmp_path / "b2", os.urandom(8), two.device_path),
        ):
            where = ("--port", str(one.link), "--port", str(two.link))
            line = start("run", *where, "--template", "unit-{n}", "--json", *WHERE)
            assert all(is_silent.wait(PATIENCE_S) for is_silent in silent)
            line.process.send_signal(signal.SIGINT)
            line.process.send_signal(signal.SIGINT)
            code, err = line.end()
            assert (code, err) == (130, "")
            assert {r["result"] for r in line.records if r["event"] == "result"} == {"STOPPED"}
            last = line.records[-1]
            resume = f"birthmark resume --port {one.link} --port {two.link} --broker gateway-1.example.com:8883"
            assert (last["event"], last["resume"]) == ("interrupted", resume)
            before = {row.name: (row.state, row.cert_serial) for row in rows(station)}
            assert len(before) == 2
            assert {state for state, _ in before.values()} <= {State.RESERVED, State.KEYED, State.ISSUED}
            entries = [json.loads(text) for text in station.registry.audit_path.read_text().splitlines()]
            assert {e["subject"] for e in entries if e["action"] == "interrupt"} == set(before)

            one.to_station = two.to_station = bytes
            done = birthmark(*resume.split()[1:], "--json")
            assert done.exit_code == 0, done.stderr
            after = {row.name: row.cert_serial for row in rows(station) if row.state is State.ATTESTED}
            assert set(after) == set(before)
            assert all(serial in (None, after[name]) for name, (_, serial) in before.items())


class FragileEvent(threading.Event):
    """Is interrupted by another signal while it is set, when it must not be set again: it holds its lock."""

    is_being_set = False

    def set(self) -> None:
        assert not self.is_being_set, "the handler set what it had interrupted: a threading.Event hangs here"
        self.is_being_set = True
        if not self.is_set():
            signal.raise_signal(signal.SIGINT)
        super().set()
        self.is_being_set = False


def test_a_signal_may_come_on_top_of_another() -> None:
    stop = FragileEvent()

    class Waiting:
        port = SimpleNamespace(slot="1")

        def run(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.wait(PATIENCE_S)

    class Blind:
        def show(self, report: object) -> None: ...
        def tick(self) -> None: ...
        def close(self) -> None: ...

    run_line(lambda _: [cast(Slot, Waiting())], Blind(), Tally(), stop, nullcontext())
    assert stop.is_set()


@pytest.mark.parametrize("error", [BrokenPipeError(), UnicodeEncodeError("ascii", "é", 0, 1, "no")])
def test_a_screen_that_fails_leaves_no_slot_at_work(error: Exception) -> None:
    stop, ended = threading.Event(), threading.Event()

    class Waiting:
        port = SimpleNamespace(slot="1")

        def run(self) -> None:
            if stop.wait(PATIENCE_S):
                ended.set()

    class Gone:
        def show(self, report: object) -> None: ...
        def tick(self) -> None:
            raise error

        def close(self) -> None: ...

    with pytest.raises(type(error)):
        run_line(lambda _: [cast(Slot, Waiting())], Gone(), Tally(), stop, nullcontext())
    stopped = ended.is_set()
    stop.set()
    assert stopped


KILLS = 12 if os.environ.get("BIRTHMARK_PROOF") == "whole" else 2


@pytest.mark.proof
@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_at_any_moment_nothing_is_half(
    birthmark: Command,
    station: Station,
    boards: Callable[[int], list[LineBoard]],
    start: Callable[..., Process],
    *,
    kill: int,
    proven: Callable[[str], None],
) -> None:
    six = boards(6)
    line = start("run", *ports(six), "--template", "unit-{n}", "--json", *WHERE)
    seen = [0]

    def enough(record: dict[str, Any]) -> bool:
        seen[0] += record["event"] in ("step", "result")
        return seen[0] == 5 + kill * 40 // KILLS

    line.wait_for(enough)
    line.process.kill()
    line.process.wait()
    no_half_identities(station, six)
    before = {row.hwid: row for row in rows(station)}
    resumed = start("resume", *ports(six), "--json", *WHERE)
    resumed.wait_for(lambda record: record["event"] in ("step", "result", "summary"))
    resumed.process.kill()
    resumed.process.wait()
    no_half_identities(station, six)
    finished = birthmark("resume", *ports(six), *WHERE)
    assert finished.exit_code == 0, finished.stdout
    for row in rows(station):
        assert row.state is State.ATTESTED
        if before[row.hwid].cert_serial is not None:
            assert row.cert_serial == before[row.hwid].cert_serial
    again = birthmark("run", *ports(six), "--template", "unit-{n}", *WHERE)
    assert again.exit_code in (0, 3)  # what is made is a DUPLICATE
    assert all(board.is_made for board in six)
    assert {row.state for row in rows(station)} == {State.ATTESTED}
    no_half_identities(station, six)
    proven("`run` and then `resume` killed over six boards: all made in the end, no certificate signed again")


def test_two_lines_on_one_registry_never_give_an_id_twice(
    station: Station, boards: Callable[[int], list[LineBoard]], start: Callable[..., Process]
) -> None:
    eight = boards(8)
    lines = [
        start("run", *ports(half), "--template", "unit-{n}", "--json", *WHERE) for half in (eight[:4], eight[4:])
    ]
    assert [line.end() for line in lines] == [(0, ""), (0, "")]
    assert sorted(row.name for row in rows(station)) == [f"unit-{n}" for n in range(1, 9)]
    no_half_identities(station, eight)


def test_with_again_a_slot_takes_one_board_after_the_other(
    station: Station, start: Callable[..., Process], tmp_path: Path
) -> None:
    link = tmp_path / "slot"
    line = start("run", "--port", str(link), "--template", "unit-{n}", "--again", "--json", *WHERE)
    line.wait_for(lambda record: record["event"] == "waiting")
    made = []
    for number in (1, 2):
        with LineBoard(tmp_path / f"board-{number}", link) as board:
            result = line.wait_for(lambda record: record["event"] == "result")
            made.append((result["result"], result["id"]))
            line.wait_for(lambda record: record["event"] == "waiting")
            assert board.is_made
    line.process.send_signal(signal.SIGTERM)
    assert line.end()[0] == 130
    assert made == [("PASS", "unit-1"), ("PASS", "unit-2")]
    assert [row.state for row in rows(station)] == [State.ATTESTED] * 2


@pytest.mark.parametrize("is_there", [True, False])
def test_what_a_running_line_revokes_is_refused_while_it_still_runs(
    station: Station, start: Callable[..., Process], tmp_path: Path, birthmark: Command, is_there: bool
) -> None:
    """A unit was to be made again, and the line comes to finish it: its old identity is good no longer."""
    crl_path, link = tmp_path / "gateway.crl", tmp_path / "slot"
    add_gateway(station.settings_path, Gateway("gateway-1", crl_path))

    def cut(event: Event) -> None:
        if isinstance(event, Stored) and event.row.state is State.PREPARED:
            raise CutError

    def answer(crl: bytes) -> bytes:
        return receipt_for(crl).to_bytes()

    board = LineBoard(tmp_path / "board", link)
    with board:
        assert birthmark("flash", "--port", str(link), "--id", "unit-1", *WHERE).exit_code == 0
        begun = session(station, str(link), "unit-1", KeyMode.ON_DEVICE, cut)
        object.__setattr__(begun.wish, "replaces_reason", "superseded")
        with pytest.raises(CutError):
            begun.run()
    (old, _) = rows(station)
    with PathGateway(crl_path, answer) if is_there else nullcontext():
        line = start("run", "--port", str(link), "--template", "unit-{n}", "--again", "--json", *WHERE)
        with board:
            told = line.wait_for(lambda record: record["event"] == "crl")
            assert line.process.poll() is None
        assert [gateway["outcome"] for gateway in told["gateways"]] == ["done" if is_there else "PENDING"]
        assert read_crl_file(station.crl_path, station.cas.issuing)[0].cert_serials == {old.cert_serial}
        line.process.send_signal(signal.SIGTERM)
        code, complaint = line.end()
    assert code == 130
    assert ("not every gateway has it (gateway-1)" in complaint) is not is_there


def test_the_table_on_a_terminal(
    station: Station, boards: Callable[[int], list[LineBoard]], tmp_path: Path
) -> None:
    made = boards(2)
    master, slave = os.openpty()
    environment = {
        **{name: value for name, value in os.environ.items() if name != "NO_COLOR"},
        "BIRTHMARK_PASSPHRASE": PASSPHRASE.decode(),
        "BIRTHMARK_STATION": str(station.folder),
        "COLUMNS": "100",
        "LINES": "30",
    }
    where = [*ports(made), "--port", str(tmp_path / "nowhere")]
    process = subprocess.Popen(
        [sys.executable, "-m", "birthmark.provisioning", "run", *where, "--template", "unit-{n}", *WHERE],
        env=environment,
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
    )
    os.close(slave)
    shown = b""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        try:
            data = os.read(master, 65536)
        except OSError:  # the last one to have it open is gone
            break
        shown += data
    os.close(master)
    assert process.wait(PATIENCE_S) == 5
    assert process.stderr is not None
    process.stderr.close()
    last = shown.decode().split("\x1b[J")[-2]
    lines = last.split("\r\n")
    assert "SLOT" in lines[0]
    for line, colour in zip(lines[1:4], ("32", "32", "31"), strict=True):
        assert f"\x1b[7;{colour}m" in line
    assert "PASS" in lines[1]
    assert "FAIL PORT" in lines[3]
    assert "2 PASS, 1 FAIL; first-pass yield 66.7%" in lines[4]
    assert "0 retries; " in lines[5]
    assert "failures by step: port 1" in lines[6]
