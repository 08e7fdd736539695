"""`birthmark-sim board` as a process: its ports answer, its state is kept, it ends when it is told to."""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import stat
from pathlib import Path

import pytest
from support.patience import PATIENCE_S
from support.simulator import Simulator

from birthmark.device.link.frame import Deframer, Frame
from birthmark.device.link.messages import (
    Answer,
    DeviceState,
    HelloAnswer,
    HelloRequest,
    KeygenAnswer,
    KeygenRequest,
    KeyMode,
    MessageType,
    Request,
    decode_answer,
)


class Station:
    """The least that a station must be to ask a question."""

    def __init__(self, port: str) -> None:
        self.descriptor = os.open(port, os.O_RDWR | os.O_NOCTTY)
        self.sid = secrets.randbits(32)
        self.seq = 0
        self.deframer = Deframer()

    def ask(self, request: Request) -> Answer:
        self.seq += 1
        frame = Frame(type=request.TYPE, seq=self.seq, sid=self.sid, payload=request.to_payload())
        os.write(self.descriptor, frame.to_bytes())
        while select.select([self.descriptor], [], [], 10)[0]:
            for answer in self.deframer.feed(os.read(self.descriptor, 4096)):
                if (answer.sid, answer.seq) == (self.sid, self.seq) and answer.type != MessageType.BUSY:
                    return decode_answer(answer.type, answer.payload)
        raise AssertionError("no answer")

    def hello(self) -> HelloAnswer:
        nonce = secrets.token_bytes(16)
        answer = self.ask(HelloRequest(nonce=nonce, lowest=1, highest=1))
        assert isinstance(answer, HelloAnswer)
        assert answer.nonce == nonce
        return answer

    def close(self) -> None:
        os.close(self.descriptor)


def test_each_board_answers_on_its_own_port(tmp_path: Path) -> None:
    with Simulator(tmp_path / "boards", "--count", "3") as simulator:
        ready = sorted((simulator.next("ready") for _ in range(3)), key=lambda record: record["board"])
        assert [record["board"] for record in ready] == [1, 2, 3]
        hwids = []
        for record in ready:
            assert Path(record["link"]) == tmp_path / "boards" / f"board-{record['board']}" / "tty"
            assert Path(record["link"]).resolve() == Path(record["path"])
            station = Station(record["link"])
            hello = station.hello()
            station.close()
            assert hello.hwid.hex() == record["hwid"]
            assert (hello.state, hello.model, hello.key_modes) == (
                DeviceState.BLANK,
                "birthmark-sim",
                KeyMode.BOTH,
            )
            hwids.append(hello.hwid)
        assert len(set(hwids)) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_ends_cleanly_and_takes_its_ports_away(tmp_path: Path, number: signal.Signals) -> None:
    state = tmp_path / "boards"
    with Simulator(state, "--count", "2") as simulator:
        assert {simulator.next("ready")["board"] for _ in range(2)} == {1, 2}
        assert simulator.end(number) == (0, "")
    assert sorted(str(path.relative_to(state)) for path in state.rglob("*") if not path.is_dir()) == [
        "board-1/hwid",
        "board-2/hwid",
    ]


def test_a_board_is_the_same_board_after_a_power_cut(tmp_path: Path) -> None:
    state, txn = tmp_path / "boards", secrets.token_bytes(16)
    with Simulator(state) as simulator:
        first = Station(simulator.next("ready")["link"])
        before = first.hello()
        made = first.ask(KeygenRequest(txn=txn, scalar=None, supersede=False))
        assert isinstance(made, KeygenAnswer)
        simulator.process.kill()
        first.close()
    with Simulator(state) as simulator:
        second = Station(simulator.next("ready")["link"])
        after = second.hello()
        assert (after.hwid, after.open_txn) == (before.hwid, txn)
        assert after.boot_id != before.boot_id
        again = second.ask(KeygenRequest(txn=txn, scalar=None, supersede=False))
        second.close()
        assert isinstance(again, KeygenAnswer)


def test_the_state_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    state = tmp_path / "boards"
    with Simulator(state) as simulator:
        simulator.next("ready")
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        assert stat.S_IMODE((state / "board-1").stat().st_mode) == 0o700
        assert stat.S_IMODE((state / "board-1" / "hwid").stat().st_mode) == 0o600


def test_two_simulators_do_not_share_a_board(tmp_path: Path) -> None:
    with Simulator(tmp_path / "boards") as first:
        link = Path(first.next("ready")["link"])
        with Simulator(tmp_path / "boards", "--count", "2") as second:
            assert second.process.wait(timeout=PATIENCE_S) == 5
            errors = json.loads(second.process.communicate()[1])
            assert "another agent is using it" in errors["error"]
        assert link.resolve().exists(), "the first board still has its port"
        station = Station(str(link))
        assert station.hello().state is DeviceState.BLANK
        station.close()


def test_a_reader_that_goes_away_ends_it(tmp_path: Path) -> None:
    with Simulator(tmp_path / "boards", "--count", "2") as simulator:
        assert simulator.process.stdout is not None
        simulator.process.stdout.close()
        assert simulator.process.wait(timeout=PATIENCE_S) == 141


@pytest.mark.parametrize(
    "options", [["--count", "0"], ["--count", "101"], ["--count", "x"], ["--interval", "x"], ["--colour"]]
)
def test_wrong_usage(tmp_path: Path, options: list[str]) -> None:
    with Simulator(tmp_path / "boards", *options) as simulator:
        assert simulator.process.wait(timeout=PATIENCE_S) == 2
    assert not (tmp_path / "boards").exists()


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "1e9"])
def test_an_interval_out_of_range(tmp_path: Path, interval: str) -> None:
    with Simulator(tmp_path / "boards", f"--interval={interval}") as simulator:
        output, errors = simulator.process.communicate(timeout=PATIENCE_S)
        assert (simulator.process.returncode, output) == (2, "")
        assert json.loads(errors)["hint"] == "--interval takes 0.01 to 86400 seconds"
    assert not (tmp_path / "boards").exists()
