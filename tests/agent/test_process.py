"""The command as a process on a pty: enrolled from outside, killed anywhere, stopped cleanly."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.agent_bench import reference_ca
from support.agent_process import AgentProcess, Pty, station_on
from support.reference_station import ReferenceEnrollment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def pty() -> Iterator[Pty]:
    with Pty() as pty:
        yield pty


@pytest.mark.parametrize("mode", ["on-device", "station"])
def test_enrolled_over_a_pty(tmp_path: Path, pty: Pty, mode: str) -> None:
    scalar = secrets.token_bytes(31).rjust(32, b"\0") if mode == "station" else None
    enrollment = ReferenceEnrollment(reference_ca(), "sensor-17", scalar=scalar)
    with AgentProcess(pty.path, tmp_path / "state") as agent:
        started = agent.wait_for("started")
        assert started["tty"] == pty.path
        assert started["state"] == "blank"
        assert len(started["hwid"]) == 32
        assert agent.core_limit == "0 0"
        enrollment.run(station_on(pty))
        assert enrollment.hwid.hex() == started["hwid"]
        enrolled = agent.wait_for("enrolled")
        assert enrolled == {"event": "enrolled", "id": "sensor-17", "txn": enrollment.txn.hex()}
        assert agent.stop(signal.SIGTERM) == 0
        agent.wait_for("stopped")
        assert [event["event"] for event in agent.events] == [
            "started", "key_made", "prepared", "enrolled", "stopped",
        ]  # fmt: skip
    with AgentProcess(pty.path, tmp_path / "state") as agent:
        again = agent.wait_for("started")
        assert (again["state"], again["hwid"]) == ("locked", started["hwid"])
        station_on(pty).attest(enrollment.txn, enrollment.hwid, enrollment.bundle)
        assert agent.stop(signal.SIGINT) == 130
    assert {path.name for path in (tmp_path / "state").iterdir()} == {"active", "hwid"}


def test_killed_after_every_message(tmp_path: Path, pty: Pty) -> None:
    """One enrollment; the n-th run of the agent is killed after its n-th answer, until one run gets through."""

    class KilledError(Exception):
        pass

    enrollment = ReferenceEnrollment(reference_ca(), "sensor-17")
    runs = 0
    while True:
        runs += 1
        with AgentProcess(pty.path, tmp_path / "state") as agent:
            agent.wait_for("started")
            station, answers = station_on(pty), 0

            def kill(limit: int = runs, agent: AgentProcess = agent) -> None:
                nonlocal answers
                answers += 1
                if answers == limit:
                    agent.kill()
                    raise KilledError

            station.answered = kill
            try:
                enrollment.run(station)
            except KilledError:
                continue
            assert agent.stop() == 0
            break
    # HELLO, KEYGEN, BEGIN, the chunks, PREPARE, COMMIT; after that run the device is locked and only attests.
    assert runs > 5 + len(enrollment.bundle) // 256
    assert enrollment.certificates_signed == 1
    assert {path.name for path in (tmp_path / "state").iterdir()} == {"active", "hwid"}


def test_the_port_goes_and_comes_back(tmp_path: Path) -> None:
    link = tmp_path / "tty"
    first, second = Pty(), Pty()
    with first, second:
        link.symlink_to(first.path)
        with AgentProcess(link, tmp_path / "state") as agent:
            agent.wait_for("started")
            txn = secrets.token_bytes(16)
            key = station_on(first).keygen(txn).public_key()
            link.unlink()
            first.hang_up()
            agent.wait_for("port_lost")
            link.symlink_to(second.path)
            agent.wait_for("started")
            assert station_on(second).keygen(txn).public_key() == key
            link.unlink()
            second.hang_up()
            agent.wait_for("port_lost")
            assert agent.stop() == 0


def test_one_agent_a_state_folder(tmp_path: Path, pty: Pty) -> None:
    with AgentProcess(pty.path, tmp_path / "state") as first:
        first.wait_for("started")
        with AgentProcess(pty.path, tmp_path / "state") as second:
            assert second.wait() == 5
            assert "another agent is using it" in second.error()["error"]
        station_on(pty).hello()
        first.kill()
        with AgentProcess(pty.path, tmp_path / "state") as third:
            third.wait_for("started")


@pytest.mark.parametrize(
    ("tty", "options", "failure"),
    [
        ("missing", (), (5, "could not open the port")),
        ("file", (), (5, "it is no terminal")),
        ("pty", ("--baud", "12345"), (2, "could not use 12345 baud")),
        ("pty", ("--hwid", "abc"), (2, "'abc' as a hardware id")),
        ("pty", ("--hwid", "abcdef"), (2, "'abcdef' as a hardware id")),
        ("pty", ("--model", "\x1b[2J"), (2, r"use '\x1b[2J' for")),
        ("pty", ("--model", ""), (2, "--model")),
    ],
)
def test_what_cannot_be_used(
    tmp_path: Path, pty: Pty, tty: str, options: tuple[str, ...], failure: tuple[int, str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = pty.path if tty == "pty" else tmp_path / tty
    with AgentProcess(path, tmp_path / "state", *options) as agent:
        code, message = failure
        assert agent.wait() == code
        printed = agent.error()
        assert message in printed["error"]
        assert printed["exit_code"] == code


def test_the_options_reach_the_station(tmp_path: Path, pty: Pty) -> None:
    options = ("--hwid", "A1B2C3D4", "--model", "gw 100", "--keys", "station", "--baud", "921600")
    with AgentProcess(pty.path, tmp_path / "state", *options) as agent:
        agent.wait_for("started")
        hello = station_on(pty).hello()
        assert (hello[1], hello[2], hello[13]) == (bytes.fromhex("a1b2c3d4"), "gw 100", 2)
        assert hello[3].startswith("birthmark")
    assert list((tmp_path / "state").iterdir()) == []


def test_refusals_are_told_and_hold_no_secret(tmp_path: Path, pty: Pty) -> None:
    with AgentProcess(pty.path, tmp_path / "state") as agent:
        agent.wait_for("started")
        station = station_on(pty)
        station.keygen(secrets.token_bytes(16))
        scalar = secrets.token_bytes(32)
        with pytest.raises(Exception, match="error 2"):
            station.keygen(secrets.token_bytes(16), scalar)
        refused = agent.wait_for("refused")
        assert refused["detail"] == "KEYGEN: TXN"
        assert scalar.hex() not in str(agent.events)


def test_help_ends_in_examples() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "birthmark.device", "agent", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "examples:" in shown
    for option in ("--tty", "--state", "--baud", "--hwid", "--model", "--keys", "--json"):
        assert option in shown
