"""`birthmark-sim fleet`: many of the device's own clients on the real broker, over networks good and bad."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.broker_process import BrokerProcess
from support.device_folder import enrolled
from support.patience import PATIENCE_S
from support.pki import Pki

from birthmark.device.clock import Moment
from birthmark.device.credentials import BrokerAddress
from birthmark.device.errors import UnreachableError
from birthmark.device.events import Connected, Disconnected
from birthmark.firmware_sim.fleet import Totals, device_folders
from birthmark.firmware_sim.fleet_command import _bars
from birthmark.firmware_sim.fleet_worker import Share, _Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COMMAND = [sys.executable, "-m", "birthmark.firmware_sim", "fleet"]
IS_WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
DEVICES = 1000 if IS_WHOLE else 20


@pytest.fixture(scope="module")
def pki() -> Pki:
    return Pki.create()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[BrokerProcess]:
    with BrokerProcess(tmp_path_factory.mktemp("broker"), pki) as process:
        yield process


def test_who_connects_anew_with_a_renewed_certificate_is_online_once() -> None:
    tally, broker = _Tally(), BrokerAddress("localhost", 8883)
    here = Connected(
        broker, "a", "TLSv1.3", tls_resumed=False, session_present=False, moment=Moment(datetime.now(UTC))
    )
    for who in ("a", "b", "a"):
        tally.see(who, here)
    seen = tally.take()
    assert (seen.online, len(seen.connects)) == (2, 3)
    tally.see("a", Disconnected(UnreachableError("gone"), 9.0, 1.0))
    assert tally.take().online == 1


def fleet(folder: Path, pki: Pki, port: int, count: int) -> Path:
    folder.mkdir()
    for number in range(1, count + 1):
        enrolled(folder / f"device-{number}", pki, port=port, host="localhost", name=f"device-{number}")
    return folder


class Fleet:
    """The command as a process; its records as they come."""

    def __init__(self, *words: str | Path) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "--json", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.records: list[dict[str, Any]] = []
        self._err: list[str] = []
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=lambda: self._err.extend(self.process.stderr or ()), daemon=True)
        self._reader.start()

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.records.append(json.loads(line))
            if wanted(self.records[-1]):
                return self.records[-1]
        raise AssertionError(f"it never said so: {self.records[-1:]}, {self._err}")

    def end(self) -> tuple[int, dict[str, Any], str]:
        assert self.process.stdout is not None
        self.records += [json.loads(line) for line in self.process.stdout]
        code = self.process.wait(PATIENCE_S)
        self._reader.join()
        self.process.stdout.close()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code, self.records[-1], "".join(self._err)


def test_a_bad_network_loses_nothing(tmp_path: Path, pki: Pki, broker: BrokerProcess) -> None:
    state = fleet(tmp_path / "fleet", pki, broker.port, 6)
    words = ("--seconds", "600", "--interval", "0.05", "--processes", "2")
    running = Fleet("--state", state, *words, "--fault", "latency=5", "loss=0.05", "cut=0.5", "refuse=0.3")
    running.wait_for(lambda r: r["lost"] >= 4 and r["acknowledged"] >= 50 and r["connects"] >= 9)
    os.killpg(running.process.pid, signal.SIGINT)  # as a terminal's Ctrl-C, which its own processes get, too
    code, end, err = running.end()
    assert code == (4 if end["never"] else 0), err
    assert end["event"] == "end"
    assert end["devices"] == 6
    assert end["resets"] >= 4
    assert end["published"] == end["acknowledged"] + end["pending"]
    assert 0 < end["latency_count"] <= end["acknowledged"]
    assert end["p50_ms"] >= 10, "five milliseconds each way"
    assert sum(end["connects_by_second"].values()) == end["connects"]
    assert end["resumed"] > 0


@pytest.mark.proof
@pytest.mark.timeout(600)
def test_a_fleet_comes_back_after_a_restart(tmp_path: Path, pki: Pki, proven: Callable[[str], None]) -> None:
    with BrokerProcess(tmp_path / "broker", pki) as broker:
        state = fleet(tmp_path / "fleet", pki, broker.port, DEVICES)
        pace = ("--interval", "30", "--ramp", "20") if IS_WHOLE else ("--interval", "1", "--ramp", "0.1")
        running = Fleet("--state", state, "--seconds", "3600", *pace)
        running.wait_for(lambda r: r["online"] == DEVICES)
        broker.stop()
        broker.start()
        running.wait_for(lambda r: r["connects"] >= 2 * DEVICES and r["online"] == DEVICES)
        running.process.send_signal(signal.SIGTERM)
        code, end, err = running.end()
    assert (code, err) == (0, "")
    assert end["lost"] == DEVICES
    assert end["pending"] == 0, "what was published meanwhile arrived"
    proven(
        f"{DEVICES} devices lost their gateway and came back: {end['connects']} connects, {end['acknowledged']} "
        f"of {end['published']} messages acknowledged, none left over"
    )


def test_it_ends_by_itself_and_says_who_never_came(tmp_path: Path, pki: Pki, broker: BrokerProcess) -> None:
    state = fleet(tmp_path / "fleet", pki, broker.port, 2)
    stranger = Pki.create()
    enrolled(state / "device-3", stranger, port=broker.port, host="localhost", name="device-3")
    end: dict[str, Any] = {"connects": 0}
    for seconds in ("2", "20", "60"):  # on a busy machine, the first may be over before everybody is there
        if end["connects"] < 2:
            code, end, err = Fleet("--state", state, "--seconds", seconds, "--interval", "0.2").end()
    assert (code, end["event"], end["never"]) == (4, "end", ["device-3"])
    assert json.loads(err)["error"] == "could not bring 1 of 3 devices online: device-3"
    assert end["connects"] == 2
    assert set(end["failures"]) == {"server-ca"}


def test_the_parent_is_killed_and_nothing_stays(tmp_path: Path, pki: Pki, broker: BrokerProcess) -> None:
    state = fleet(tmp_path / "fleet", pki, broker.port, 2)
    running = Fleet("--state", state, "--seconds", "600", "--interval", "0.2", "--processes", "2")
    running.wait_for(lambda r: r["online"] == 2)
    workers = [
        int(pid)
        for pid in os.listdir("/proc")  # noqa: PTH208 - names, not paths
        if pid.isdecimal() and _parent(pid) == running.process.pid
    ]
    assert len(workers) == 2
    descriptors = [os.pidfd_open(pid) for pid in workers]
    running.process.kill()
    for descriptor in descriptors:
        ready, _, _ = select.select([descriptor], [], [], PATIENCE_S)
        assert ready, "a worker outlived its parent"
        os.close(descriptor)
    running.end()


def _parent(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_folders(tmp_path: Path, pki: Pki) -> None:
    state = fleet(tmp_path / "fleet", pki, 8883, 11)
    (state / "notes").mkdir()
    names = [path.name for path in device_folders(state, None)]
    assert names == [f"device-{n}" for n in range(1, 12)]
    assert [path.name for path in device_folders(state, 2)] == ["device-1", "device-2"]
    for words, code, message in (
        (("--devices", "12"), 1, "could not run 12 devices: "),
        (("--fault", "rain=1"), 2, "there is no such fault of a network"),
    ):
        done = subprocess.run(
            [*COMMAND, "--state", str(state), *words],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert (done.returncode, done.stdout) == (code, "")
        assert message in done.stderr


def test_totals_and_bars() -> None:
    totals = Totals(2, began=100.0)
    first = Share(online=2, connects=[100.5, 101.5, 101.9], published=3, latency_ms=[1.0, 2.0, 9.0], max_rss_kb=10)
    totals.add(Share(), first)
    totals.add(first, Share(online=1, lost=1, pending=1, failures={"network": 1}, max_rss_kb=12))
    assert (totals.online, totals.pending, totals.max_rss_kb, totals.connects) == (1, 1, 12, 3)
    assert (totals.latency(0.5), totals.latency(0.99)) == (2.0, 9.0)
    assert totals.record()["connects_by_second"] == {0: 1, 1: 2}
    assert [line.split()[-1] for line in _bars({0: 1, 1: 2})] == ["1", "2"]
    assert len(_bars(dict.fromkeys(range(1000), 1))) == 40
