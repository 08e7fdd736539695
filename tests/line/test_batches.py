"""Batches: what is made, what is not, and that nothing unaccounted for is left valid."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from support.board_killed import session

from birthmark.provisioning.enrollment.enrol import Stored
from birthmark.provisioning.line.batches import counted
from birthmark.provisioning.registry.model import KeyMode, State

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.line_board import LineBoard
    from support.station import Command

    from birthmark.provisioning.enrollment.session import Event
    from birthmark.provisioning.registry.model import Row
    from birthmark.provisioning.station import Station

WHERE = ("--broker", "gateway-1.example.com:8883")
CUTS = [State.RESERVED, State.KEYED, State.ISSUED, State.PREPARED, State.COMMITTED]


class CutError(Exception):
    pass


def cut_off(station: Station, board: LineBoard, name: str, state: State) -> None:
    """Begin an enrollment that ends without a word once a state is durable."""

    def cut(event: Event) -> None:
        if isinstance(event, Stored) and event.row.state is state:
            raise CutError

    with pytest.raises(CutError):
        session(station, board.port, name, KeyMode.ON_DEVICE, cut).run()


def row_of(station: Station, name: str) -> Row:
    with station.registry.view() as view:
        return view.named(name)[-1]


def listed(station: Station) -> set[int]:
    return {entry.serial_number for entry in x509.load_pem_x509_crl(station.crl_path.read_bytes())}


def test_closing_voids_and_revokes_what_was_not_attested(
    birthmark: Command, station: Station, boards: Callable[[int], list[LineBoard]]
) -> None:
    whole, before, *cut = boards(2 + len(CUTS))
    cut_off(station, before, "before", State.ISSUED)
    assert birthmark("batch", "open", "W47").exit_code == 0
    assert birthmark("flash", "--port", whole.port, "--id", "whole", *WHERE).exit_code == 0
    for board, state in zip(cut, CUTS, strict=True):
        cut_off(station, board, state.value, state)
    serials = {state: row_of(station, state.value).cert_serial for state in CUTS}

    closed = birthmark("batch", "close", "--json")
    assert closed.exit_code == 0, closed.stderr
    closing, crl = closed.records
    assert (closing["batch"], closing["made"], closing["revoked"]) == ("W47", 1, len(CUTS) - 1)
    assert sorted(closing["voided"]) == sorted(state.value for state in CUTS)
    assert crl["entries"] == len(CUTS) - 1
    assert {row_of(station, state.value).state for state in CUTS} == {State.VOID}
    assert listed(station) == {serial for serial in serials.values() if serial is not None}
    assert row_of(station, "whole").state is State.ATTESTED
    assert row_of(station, "before").state is State.ISSUED, "it is of no batch"

    late = birthmark("flash", "--port", cut[-1].port, "--id", "COMMITTED", *WHERE)
    assert late.exit_code == 3
    assert "QUARANTINE" in late.stderr
    fresh = birthmark("flash", "--port", cut[2].port, "--id", "ISSUED", *WHERE)
    assert fresh.exit_code == 0, fresh.stderr
    assert row_of(station, "ISSUED").batch == ""


def test_a_unit_made_again_stands_as_before_if_its_batch_closes_first(
    birthmark: Command, station: Station, board: LineBoard
) -> None:
    assert birthmark("flash", "--port", board.port, "--id", "sensor-1", *WHERE).exit_code == 0
    birthmark("batch", "open", "W48")

    def cut(event: Event) -> None:
        if isinstance(event, Stored) and event.row.state is State.PREPARED:
            raise CutError

    again = session(station, board.port, "sensor-1", KeyMode.ON_DEVICE, cut)
    object.__setattr__(again.wish, "replaces_reason", "superseded")
    with pytest.raises(CutError):
        again.run()
    assert birthmark("batch", "close").exit_code == 0
    with station.registry.view() as view:
        old, new = view.named("sensor-1")
    assert (old.state, old.is_revoked, old.replaced_by) == (State.ATTESTED, False, None)
    assert (new.state, new.is_revoked) == (State.VOID, True)


def test_a_report_names_what_is_made_and_counts_the_rest(
    birthmark: Command, station: Station, boards: Callable[[int], list[LineBoard]]
) -> None:
    first, second, third = boards(3)
    birthmark("batch", "open", "W47")
    assert birthmark("flash", "--port", first.port, "--id", "sensor-1", *WHERE).exit_code == 0
    assert birthmark("flash", "--port", second.port, "--id", "sensor-1", *WHERE).exit_code == 3
    assert birthmark("flash", "--port", second.port, "--id", "sensor-2", *WHERE).exit_code == 0
    cut_off(station, third, "sensor-3", State.PREPARED)

    (report,) = birthmark("batch", "report", "--json").records
    assert (report["batch"], report["made"], report["units"], report["closed_at"]) == ("W47", 2, 3, None)
    assert (report["attempts"], report["retries"]) == (3, 1)
    assert (report["first_pass_yield"], report["final_yield"]) == (0.3333, 0.6667)
    assert report["failures_by_step"] == {"hello": 1}
    assert report["failures_by_code"] == {"TAKEN-NAME": 1}
    assert report["boards_an_hour"] > 0
    assert [device["id"] for device in report["devices"]] == ["sensor-1", "sensor-2"]
    assert "sensor-3" not in json.dumps(report)

    rows = list(csv.DictReader(io.StringIO(birthmark("batch", "report", "w47", "--csv").stdout)))
    assert [(row["batch"], row["id"], row["hwid"]) for row in rows] == [
        ("W47", "sensor-1", first.hwid.hex()),
        ("W47", "sensor-2", second.hwid.hex()),
    ]
    assert rows[0]["cert_serial"] == f"{row_of(station, 'sensor-1').cert_serial:x}"
    text = birthmark("batch", "report").stdout
    assert "2 made of 3 boards; first-pass yield 33.3%, final yield 66.7%" in text
    assert "3 attempts, 1 retries" in text


def test_one_batch_at_a_time_and_no_name_twice(birthmark: Command) -> None:
    assert "there never was one" in birthmark("batch", "report").stderr
    assert birthmark("batch", "close").exit_code == 6
    assert birthmark("batch", "open", "W47").exit_code == 0
    other = birthmark("batch", "open", "W48")
    assert other.exit_code == 6
    assert "W47 is open" in other.stderr
    assert birthmark("batch", "close").exit_code == 0
    again = birthmark("batch", "open", "w47")
    assert again.exit_code == 6
    assert "there was one of that name" in again.stderr
    assert birthmark("batch", "open", "a b").exit_code == 1
    assert birthmark("batch", "report", "W49").exit_code == 6


def test_a_wrong_passphrase_closes_nothing(
    birthmark: Command, station: Station, board: LineBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    birthmark("batch", "open", "W47")
    cut_off(station, board, "sensor-1", State.ISSUED)
    monkeypatch.setenv("BIRTHMARK_PASSPHRASE", "wrong")
    assert birthmark("batch", "close").exit_code == 6
    assert row_of(station, "sensor-1").state is State.ISSUED
    (report,) = birthmark("batch", "report", "--json").records
    assert report["closed_at"] is None


def entry(hwid: str, outcome: str, at_s: int, step: str = "", code: str = "") -> dict[str, object]:
    details = {"hwid": hwid or None, "outcome": outcome, "step": step, "code": code, "elapsed_ms": 1000}
    return {"at": f"2026-05-04T12:00:{at_s:02}+00:00", "details": details}


def test_how_attempts_are_counted() -> None:
    counts = counted(
        [
            entry("", "FAIL", 1, "hello", "SILENT"),
            entry("a", "FAIL", 2, "data", "STUCK"),
            entry("a", "PASS", 3),
            entry("b", "PASS", 4),
            entry("c", "STOPPED", 5),
            entry("d", "FAIL", 20, "data", "STUCK"),
        ]
    )
    assert (counts.attempts, counts.units, counts.passed_at_first, counts.retries) == (6, 4, 1, 1)
    assert counts.failures_by_step == (("data", 2), ("hello", 1))
    assert counts.failures_by_code == (("STUCK", 2), ("SILENT", 1))
    assert counts.boards_an_hour == 360.0, "two boards in twenty seconds"
    assert counted([]).boards_an_hour is None
