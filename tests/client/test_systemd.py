"""What systemd hears of a device's client: that it is ready, that it lives, how it is; what its journal gets."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from support.broker_stub import BrokerStub
from support.device_folder import enrolled
from support.patience import PATIENCE_S
from support.ports import steady_port
from support.repository import ROOT
from support.waiting import eventually

from birthmark.device import cli, worker
from birthmark.device.client import Client
from birthmark.device.systemd import notify

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.pki import Pki

WATCHDOG_S = 0.3


class Systemd:
    """The end of NOTIFY_SOCKET that systemd has."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(PATIENCE_S)
        self.environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}

    def wait_for(self, pattern: str) -> str:
        heard = []
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            heard.append(self._socket.recv(65536).decode())
            if re.match(pattern, heard[-1]):
                return heard[-1]
        raise AssertionError(f"no {pattern}, but {heard}")

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    told = Systemd(tmp_path / "notify")
    yield told
    told.close()


def run(state: Path, systemd: Systemd, *words: str, **more: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "birthmark.device", "run", "--state", str(state), *words]
    return subprocess.Popen(command, env=os.environ | systemd.environment, **more)  # type: ignore[call-overload,no-any-return]


def test_ready_alive_connected_and_stopping(tmp_path: Path, pki: Pki, systemd: Systemd) -> None:
    with BrokerStub(pki) as broker:
        state = enrolled(tmp_path / "state", pki, port=broker.port)
        process = run(state, systemd, stdout=subprocess.DEVNULL)
        systemd.wait_for("READY=1")
        assert systemd.wait_for("STATUS=") == f"STATUS=connected to 127.0.0.1:{broker.port} as sensor-1"
        for _ in range(3):
            systemd.wait_for("WATCHDOG=1")
        process.send_signal(signal.SIGTERM)
        systemd.wait_for("STOPPING=1")
        assert process.wait(PATIENCE_S) == 0


def test_alive_without_a_network_and_without_an_identity(tmp_path: Path, pki: Pki, systemd: Systemd) -> None:
    state = enrolled(tmp_path / "state", pki, port=steady_port())
    for folder, status in ((state, "could not connect to"), (tmp_path / "blank", "could not find credentials")):
        process = run(folder, systemd, "--wait", stdout=subprocess.DEVNULL)
        try:
            systemd.wait_for("READY=1")
            systemd.wait_for(f"STATUS={status}")
            systemd.wait_for("WATCHDOG=1")
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0


def test_what_hangs_does_not_look_alive(tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "BEAT_S", 0.05)
    release, hangs = threading.Event(), threading.Event()
    with (
        BrokerStub(pki) as broker,
        Client.from_folder(enrolled(tmp_path / "state", pki, port=broker.port)) as client,
    ):
        fed: queue.SimpleQueue[bool] = queue.SimpleQueue()
        client.every(0.02)(lambda: fed.put(client.is_alive))
        client.every(0.02)(client._worker.wake)  # a turn waits for seconds if nothing happens
        for _ in range(20):
            fed.get(timeout=PATIENCE_S)
        assert client.is_alive

        def hang(*_: object, **__: object) -> bool:
            hangs.set()
            release.wait(PATIENCE_S)
            return False

        monkeypatch.setattr(client._worker._link, "turn", hang)
        assert hangs.wait(PATIENCE_S)
        monkeypatch.setattr(worker, "STALE_S", 0.3)  # only now: a busy machine may hold up what does not hang
        eventually(lambda: not client.is_alive, "it looks alive")
        monkeypatch.undo()
        release.set()


def test_a_message_that_is_no_text_is_told(systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.environment["NOTIFY_SOCKET"])
    notify("STATUS=could not read " + os.fsdecode(b"/state\xff"))
    assert systemd.wait_for("STATUS=") == r"STATUS=could not read /state\udcff"


def test_lines_for_the_journal(tmp_path: Path, pki: Pki, systemd: Systemd) -> None:
    port = steady_port()
    state = enrolled(tmp_path / "state", pki, port=port)
    for is_journal in (True, False):
        journal = tmp_path / f"journal-{is_journal}"
        with journal.open("wb") as out:
            told = os.fstat(out.fileno())
            systemd.environment["JOURNAL_STREAM"] = f"{told.st_dev}:{told.st_ino if is_journal else 1}"
            assert run(state, systemd, "--once", stdout=out, stderr=subprocess.DEVNULL).wait(PATIENCE_S) == 4
        lines = journal.read_text().splitlines()
        if is_journal:
            assert lines[0].startswith(f"<4>could not connect to 127.0.0.1:{port}: ")
            assert lines[1] == "<6>stopped"
            assert len(lines) == 2
        else:
            assert re.match(r"\d\d:\d\d:\d\d  could not connect", lines[0])


def test_the_unit_starts_what_there_is() -> None:
    text = (ROOT / "deploy/birthmark-device.service").read_text()
    found = re.search(r"^ExecStart=/opt/birthmark/bin/birthmark-device (.*)$", text, re.MULTILINE)
    assert found
    parsed = cli.parser().parse_args(found[1].split())
    assert (str(parsed.state), parsed.wait) == ("/var/lib/birthmark", True)
    assert "\nType=notify\n" in text
    watchdog = re.search(r"^WatchdogSec=(\d+)$", text, re.MULTILINE)
    assert watchdog
    assert int(watchdog[1]) > 2 * worker.STALE_S, "it must miss more than one word before it is ended"
