"""`birthmark reflash`: a unit is made again, and at no moment is it without an identity that is accounted for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from support.board_killed import session
from support.station_gateways import PathGateway, receipt_for

from birthmark.provisioning import audit
from birthmark.provisioning.enrollment.enrol import Stored
from birthmark.provisioning.gateway_settings import Gateway
from birthmark.provisioning.registry.model import KeyMode, State
from birthmark.provisioning.settings_edit import add_gateway

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.line_board import LineBoard
    from support.line_process import Process
    from support.station import Command

    from birthmark.provisioning.enrollment.session import Event
    from birthmark.provisioning.registry.model import Row
    from birthmark.provisioning.station import Station

WHERE = ("--broker", "gateway-1.example.com:8883")


class CutError(Exception):
    pass


def rows(station: Station, name: str = "sensor-17") -> list[Row]:
    with station.registry.view() as view:
        return view.named(name)


def revoked(station: Station) -> dict[int, str]:
    crl = x509.load_pem_x509_crl(station.crl_path.read_bytes())
    reasons = {}
    for entry in crl:
        reasons[entry.serial_number] = entry.extensions.get_extension_for_class(x509.CRLReason).value.reason.value
    return reasons


def held_serial(board: LineBoard) -> int:
    return x509.load_der_x509_certificate(board.bundle.leaf_der).serial_number


@pytest.fixture
def made(birthmark: Command, board: LineBoard) -> LineBoard:
    assert birthmark("flash", "--port", board.port, "--id", "sensor-17", *WHERE).exit_code == 0
    return board


def test_a_made_unit_is_made_again(birthmark: Command, station: Station, made: LineBoard, tmp_path: Path) -> None:
    before = held_serial(made)
    crl_path = tmp_path / "gateway.crl"
    add_gateway(station.settings_path, Gateway("gateway-1", crl_path))
    with PathGateway(crl_path, lambda der: receipt_for(der).to_bytes()):
        done = birthmark(
            "reflash", "SENSOR-17", "--reason", "lost", "--port", made.port, "--role", "meter", "--json", *WHERE
        )
    assert done.exit_code == 0, done.stderr
    steps = [record["step"] for record in done.records if record["event"] == "step"]
    assert steps == ["hello", "unlock", "keygen", "begin", "data", "prepare", "commit", "attest"]
    old, new = rows(station)
    entries = list(audit.read(station.registry.audit_path))
    (opened,) = [entry for entry in entries if entry["action"] == "unlock-device"]
    (unlocked,) = [entry for entry in entries if entry["details"].get("purpose") == "reflash"]
    assert (opened["subject"], opened["details"]["row"]) == ("sensor-17", new.number)
    assert unlocked["seq"] < opened["seq"]
    assert (old.state, old.void_reason) == (State.VOID, f"replaced by row {new.number}")
    assert (new.state, new.name, new.role, new.replaces) == (State.ATTESTED, "sensor-17", "meter", old.number)
    assert held_serial(made) == new.cert_serial != before
    assert made.bundle.config.role.name == "meter"
    assert revoked(station) == {before: "keyCompromise"}
    (crl,) = [record for record in done.records if record["event"] == "crl"]
    assert [gateway["outcome"] for gateway in crl["gateways"]] == ["done"]
    assert crl_path.read_bytes() == station.crl_path.read_bytes()
    again = birthmark("flash", "--port", made.port, "--id", "sensor-17", *WHERE)
    assert again.exit_code == 3
    assert "DUPLICATE" in again.stderr


@pytest.mark.parametrize(
    "state", [State.RESERVED, State.KEYED, State.ISSUED, State.PREPARED, State.COMMITTED, State.ATTESTED]
)
def test_cut_off_in_the_middle_the_old_identity_stands_until_the_new_one(
    birthmark: Command, station: Station, made: LineBoard, state: State
) -> None:
    before = held_serial(made)

    def cut(event: Event) -> None:
        if isinstance(event, Stored) and event.row.state is state:
            raise CutError

    enrolling = session(station, made.port, "sensor-17", KeyMode.ON_DEVICE, cut)
    object.__setattr__(enrolling.wish, "replaces_reason", "superseded")
    with pytest.raises(CutError):
        enrolling.run()
    old, new = rows(station)
    assert new.state is state
    locked_anew = state in (State.COMMITTED, State.ATTESTED)
    assert held_serial(made) == (new.cert_serial if locked_anew else before)
    assert old.state is (State.VOID if state is State.ATTESTED else State.ATTESTED)
    assert old.is_revoked == (state is State.ATTESTED), "the old certificate is revoked when the new one stands"
    if state is State.ATTESTED:
        assert birthmark("crl").exit_code == 0
    else:
        again = birthmark("reflash", "sensor-17", "--reason", "superseded", "--port", made.port, *WHERE)
        assert again.exit_code == 0, again.stderr
    old, new = rows(station)
    assert (old.state, new.state) == (State.VOID, State.ATTESTED)
    assert held_serial(made) == new.cert_serial
    assert revoked(station) == {before: "superseded"}


KILLS = ("hello", "unlock", "keygen", "begin", "data", "prepare", "commit", "attest")


@pytest.mark.proof
@pytest.mark.parametrize("step", KILLS if os.environ.get("BIRTHMARK_PROOF") == "whole" else KILLS[6:7])
def test_the_command_is_killed_at_a_step(
    birthmark: Command,
    station: Station,
    made: LineBoard,
    start: Callable[..., Process],
    *,
    step: str,
    proven: Callable[[str], None],
) -> None:
    """The board holds an identity that stands; the same command again, or the next CRL, finishes it."""
    again = ("reflash", "sensor-17", "--reason", "superseded", "--port", made.port, *WHERE)
    killed = start(*again, "--json")
    killed.wait_for(lambda record: record.get("step") == step)
    killed.process.kill()
    killed.process.wait()
    standing = [row for row in rows(station) if not row.is_revoked and row.state is not State.VOID]
    assert held_serial(made) in [row.cert_serial for row in standing]
    old, *begun = rows(station)
    if old.state is State.VOID:
        assert birthmark("crl").exit_code == 0
    else:
        assert birthmark(*again).exit_code == 0
    old, new = rows(station)
    assert [row.number for row in begun] in ([], [new.number]), "a second row for the same wish"
    assert (old.state, new.state) == (State.VOID, State.ATTESTED)
    assert held_serial(made) == new.cert_serial
    assert revoked(station) == {old.cert_serial: "superseded"}
    proven("killed at that step: the board held an identity that stands, and the same command again ended it")


def test_a_unit_that_lost_its_identity_gets_another(birthmark: Command, station: Station, made: LineBoard) -> None:
    lost = held_serial(made)
    made.wipe()
    refused = birthmark("flash", "--port", made.port, "--id", "sensor-17", *WHERE)
    assert refused.exit_code == 3
    assert "ERASED" in refused.stderr
    assert "birthmark reflash" in refused.stderr
    done = birthmark("reflash", "sensor-17", "--reason", "broken", "--port", made.port, *WHERE)
    assert done.exit_code == 0, done.stderr
    old, new = rows(station)
    assert (old.state, new.state, new.replaces) == (State.VOID, State.ATTESTED, None)
    assert revoked(station) == {lost: "cessationOfOperation"}
    assert held_serial(made) == new.cert_serial


@pytest.mark.parametrize("again", ["reflash", "resume", "flash"])
def test_what_a_run_revoked_that_was_killed_is_on_the_crl_of_the_next(
    birthmark: Command, station: Station, made: LineBoard, again: str
) -> None:
    """It was killed when the lost certificate was revoked, and had signed no CRL yet."""
    lost = held_serial(made)
    made.wipe()

    def cut(event: Event) -> None:
        if isinstance(event, Stored) and event.row.state is State.RESERVED:
            raise CutError

    enrolling = session(station, made.port, "sensor-17", KeyMode.ON_DEVICE, cut)
    object.__setattr__(enrolling.wish, "replaces_reason", "cessationOfOperation")
    with pytest.raises(CutError):
        enrolling.run()
    assert revoked(station) == {}
    words = {
        "reflash": ("reflash", "sensor-17", "--reason", "broken"),
        "resume": ("resume",),
        "flash": ("flash", "--id", "sensor-17"),
    }
    done = birthmark(*words[again], "--port", made.port, *WHERE)
    assert done.exit_code == 0, done.stderr
    assert revoked(station) == {lost: "cessationOfOperation"}
    # It is on it now: whoever comes by again needs no other one.
    signed = station.crl_path.read_bytes()
    assert birthmark("flash", "--id", "sensor-17", "--port", made.port, *WHERE).exit_code == 3
    assert station.crl_path.read_bytes() == signed


def test_what_was_never_made_is_not_made_again(birthmark: Command, station: Station, board: LineBoard) -> None:
    done = birthmark("reflash", "sensor-17", "--reason", "lost", "--port", board.port, *WHERE)
    assert done.exit_code == 3
    assert "was never made here" in done.stderr
    assert "birthmark flash" in done.stderr
    assert rows(station) == []
    assert not board.is_made


def test_another_unit_is_not_made_again_by_mistake(birthmark: Command, station: Station, made: LineBoard) -> None:
    done = birthmark("reflash", "sensor-18", "--reason", "lost", "--port", made.port, *WHERE)
    assert done.exit_code == 3
    assert "MISMATCH" in done.stderr
    assert [row.state for row in rows(station)] == [State.ATTESTED]


def test_a_reason_that_is_none_is_a_usage_error(birthmark: Command, made: LineBoard) -> None:
    done = birthmark("reflash", "sensor-17", "--reason", "because", "--port", made.port)
    assert done.exit_code == 2
    assert "keyCompromise" in done.stderr
