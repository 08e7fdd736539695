"""A unit whose certificate is being renewed, or was, is the made unit that it is: at the line nothing changes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from cryptography import x509

from birthmark.device.clock import Moment
from birthmark.device.renewal import making
from birthmark.device.renewal.store import RenewalStore
from birthmark.provisioning.registry.model import State
from birthmark.provisioning.renewal import Asked, Renewals

if TYPE_CHECKING:
    from support.line_board import LineBoard
    from support.station import Command

    from birthmark.provisioning.registry.model import Row
    from birthmark.provisioning.station import Station

WHERE = ("--broker", "gateway-1.example.com:8883")
UNDER_WAY, DONE = "under way", "done"


def renew(station: Station, board: LineBoard, how_far: str) -> None:
    """Renew as device and station do, without a network between them."""
    store, renewals = RenewalStore(board.folder), Renewals(station)
    current = store.current_slot()
    device_id = current.bundle.config.device_id
    asked = making.new_key(device_id)
    store.keep_asked(asked)
    request = making.renewal_request(current, asked)
    (answer,) = renewals.answer([Asked(device_id, request)])
    slot = making.granted(answer, request, current=current, asked=asked, moment=Moment(datetime.now(UTC)))
    store.keep_candidate(slot)
    if how_far == DONE:
        (answer,) = renewals.answer([Asked(device_id, making.confirmation(slot))])
        assert answer.outcome == "confirmed"
        store.confirm()


@pytest.fixture(params=[UNDER_WAY, DONE])
def how_far(request: pytest.FixtureRequest) -> str:
    text: str = request.param
    return text


@pytest.fixture
def renewed(birthmark: Command, station: Station, board: LineBoard, how_far: str) -> LineBoard:
    assert birthmark("batch", "open", "monday").exit_code == 0
    assert birthmark("flash", "--port", board.port, "--id", "sensor-17", *WHERE).exit_code == 0
    renew(station, board, how_far)
    return board


def rows(station: Station) -> list[Row]:
    with station.registry.view() as view:
        return view.named("sensor-17")


def listed(station: Station) -> set[int]:
    return {entry.serial_number for entry in x509.load_pem_x509_crl(station.crl_path.read_bytes())}


def serials(found: list[Row]) -> set[int | None]:
    return {row.cert_serial for row in found}


def test_it_is_a_duplicate_and_never_in_quarantine(birthmark: Command, renewed: LineBoard) -> None:
    again = birthmark("flash", "--port", renewed.port, "--id", "sensor-17", *WHERE)
    assert (again.exit_code, "DUPLICATE" in again.stderr) == (3, True), again.stderr
    other = birthmark("flash", "--port", renewed.port, "--id", "sensor-18", *WHERE)
    assert (other.exit_code, "MISMATCH" in other.stderr) == (3, True), other.stderr
    assert birthmark("quarantine", "list", "--json").records == []
    assert birthmark("resume", "--json").records == []


def test_it_is_made_again_and_nothing_of_before_is_left(
    birthmark: Command, station: Station, renewed: LineBoard
) -> None:
    before = rows(station)
    done = birthmark("reflash", "sensor-17", "--reason", "superseded", "--port", renewed.port, *WHERE)
    assert done.exit_code == 0, done.stderr
    *old, new = rows(station)
    assert (new.state, new.is_live, new.is_revoked) == (State.ATTESTED, True, False)
    assert [row.state for row in old] == [State.VOID] * 2
    assert all(row.is_revoked for row in old)
    assert listed(station) == serials(before)
    assert not {"renewal", "renewed"} & {path.name for path in renewed.folder.iterdir()}
    renewed.power_off()
    renewed.power_on()
    again = birthmark("flash", "--port", renewed.port, "--id", "sensor-17", *WHERE)
    assert "DUPLICATE" in again.stderr


def test_one_that_lost_its_identity_is_made_again(
    birthmark: Command, station: Station, renewed: LineBoard
) -> None:
    before = rows(station)
    renewed.wipe()
    refused = birthmark("flash", "--port", renewed.port, "--id", "sensor-17", *WHERE)
    assert (refused.exit_code, "ERASED" in refused.stderr) == (3, True)
    done = birthmark("reflash", "sensor-17", "--reason", "broken", "--port", renewed.port, *WHERE)
    assert done.exit_code == 0, done.stderr
    assert listed(station) == serials(before)
    assert [row.state for row in rows(station)] == [State.VOID, State.VOID, State.ATTESTED]


def test_closing_its_batch_revokes_nothing_of_it(
    birthmark: Command, station: Station, renewed: LineBoard, how_far: str
) -> None:
    closed = birthmark("batch", "close", "--json")
    assert closed.exit_code == 0, closed.stderr
    assert not any(row.is_revoked or row.state is State.VOID for row in rows(station))
    report = birthmark("batch", "report", "monday", "--json")
    assert '"made": 1' in report.stdout or '"made":1' in report.stdout, report.stdout
    assert renewed.is_made
    if how_far == UNDER_WAY:
        store = RenewalStore(renewed.folder)
        confirmation = making.confirmation(store.candidate_slot())
        (answer,) = Renewals(station).answer([Asked(store.candidate_slot().bundle.config.device_id, confirmation)])
        assert answer.outcome == "confirmed"


def test_all_of_it_is_revoked_with_its_name(birthmark: Command, station: Station, renewed: LineBoard) -> None:
    assert renewed.is_made
    assert birthmark("revoke", "sensor-17", "--reason", "lost").exit_code == 0
    assert listed(station) == serials(rows(station))
    again = birthmark("flash", "--port", renewed.port, "--id", "sensor-17", *WHERE)
    assert (again.exit_code, "which is revoked" in again.stderr) == (3, True), again.stderr


def test_an_agent_that_boots_keeps_what_counts(renewed: LineBoard, how_far: str) -> None:
    renewed.power_off()
    renewed.power_on()
    found = {path.name for path in renewed.folder.iterdir()}
    assert ("renewal" if how_far == UNDER_WAY else "renewed") in found
