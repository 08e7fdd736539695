"""Units that are ahead of the journal: recorded, refused, and cleared by a person."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from support.station import Command, new_station

from birthmark.provisioning.registry.line import Quarantined

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from support.line_board import LineBoard
    from support.station import Answer

    from birthmark.provisioning.station import Station

WHERE = ("--broker", "gateway-1.example.com:8883")


def flash(birthmark: Command, board: LineBoard, name: str) -> Answer:
    return birthmark("flash", "--port", board.port, "--id", name, *WHERE)


def made_elsewhere(tmp_path: Path, board: LineBoard, capsys: pytest.CaptureFixture[str]) -> None:
    """Let another station make the board."""
    other = new_station(tmp_path / "elsewhere")
    assert flash(Command(other.folder, capsys), board, "foreign-1").exit_code == 0


def test_a_foreign_unit_stays_refused_until_it_is_cleared(
    birthmark: Command, station: Station, board: LineBoard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert birthmark("quarantine", "list").stdout == "no unit is in quarantine\n"
    made_elsewhere(tmp_path, board, capsys)
    refused = flash(birthmark, board, "sensor-1")
    assert refused.exit_code == 3
    assert "QUARANTINE" in refused.stderr
    assert "birthmark quarantine list" in refused.stderr
    (unit,) = birthmark("quarantine", "list", "--json").records
    assert (unit["hwid"], unit["name"]) == (board.hwid.hex(), None)
    assert unit["active_txn"] in unit["reason"]

    board.wipe()
    still = flash(birthmark, board, "sensor-1")
    assert still.exit_code == 3
    assert "is in quarantine: it is locked by a transaction" in still.stderr
    assert not board.is_made

    cleared = birthmark("quarantine", "clear", board.hwid.hex(), "--reason", "reset at the bench")
    assert cleared.exit_code == 0
    assert birthmark("quarantine", "list", "--json").records == []
    assert flash(birthmark, board, "sensor-1").exit_code == 0
    entries = [json.loads(line) for line in station.registry.audit_path.read_text().splitlines()]
    said = [
        (entry["action"], entry["details"].get("reason")) for entry in entries if "quarantine" in entry["action"]
    ]
    assert said == [("quarantine", None), ("quarantine-clear", "reset at the bench")]


def test_clearing_a_unit_that_is_still_ahead_puts_it_back(
    birthmark: Command, board: LineBoard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_elsewhere(tmp_path, board, capsys)
    assert flash(birthmark, board, "sensor-1").exit_code == 3
    assert birthmark("quarantine", "clear", board.hwid.hex(), "--reason", "to try").exit_code == 0
    assert flash(birthmark, board, "sensor-1").exit_code == 3
    assert [unit["hwid"] for unit in birthmark("quarantine", "list", "--json").records] == [board.hwid.hex()]


def test_a_unit_that_the_journal_knows_stands_under_its_name(
    birthmark: Command, station: Station, board: LineBoard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its storage was wiped, and another station has locked it since."""
    assert flash(birthmark, board, "sensor-1").exit_code == 0
    board.wipe()
    made_elsewhere(tmp_path, board, capsys)
    assert flash(birthmark, board, "sensor-1").exit_code == 3
    (unit,) = birthmark("quarantine", "list", "--json").records
    assert (unit["name"], unit["hwid"]) == ("sensor-1", board.hwid.hex())
    done = birthmark("quarantine", "clear", "SENSOR-1", "--reason", "to try", "--json")
    assert done.records == [{"cleared": board.hwid.hex(), "name": "sensor-1"}]


def test_what_cannot_be_cleared(birthmark: Command, station: Station) -> None:
    unknown = birthmark("quarantine", "clear", "sensor-9", "--reason", "x")
    assert unknown.exit_code == 6
    assert "it is not in quarantine" in unknown.stderr
    with station.registry.transaction() as transaction:
        for number in range(2):
            hwid = bytes([number]) * 8
            transaction.quarantine(Quarantined(hwid, station.clock(), "sensor-1", "is odd", bytes(16)))
    both = birthmark("quarantine", "clear", "sensor-1", "--reason", "x")
    assert both.exit_code == 6
    assert "0000000000000000, 0101010101010101" in both.stderr
    assert birthmark("quarantine", "clear", "00" * 8, "--reason", " ").exit_code == 2
    assert birthmark("quarantine", "clear", "", "--reason", "x").exit_code == 6
    assert len(birthmark("quarantine", "list", "--json").records) == 2
