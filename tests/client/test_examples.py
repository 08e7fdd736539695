"""The examples of the repository and of the README, run as they are written."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.device_folder import enrolled
from support.patience import PATIENCE_S
from support.repository import ROOT, tracked
from support.waiting import eventually

from birthmark.device.client import Client
from birthmark.device.commands import CommandFailedError
from birthmark.device.credentials import BrokerAddress, Credentials

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.broker_process import BrokerProcess
    from support.pki import Pki

    from birthmark.device.received import Message


@pytest.fixture
def alice(tmp_path: Path, pki: Pki, gateway: BrokerProcess) -> Iterator[Client]:
    anchors = tmp_path / "ca.pem"
    anchors.write_bytes(pki.root.pem)
    identity = pki.operator("alice").write(tmp_path / "alice.pem")
    with Client.from_credentials(
        Credentials.from_files(identity, anchors, BrokerAddress("localhost", gateway.port))
    ) as client:
        yield client


@pytest.fixture
def heard(alice: Client) -> list[Message]:
    messages: list[Message] = []
    alice.subscribe("devices/#", messages.append, wait=PATIENCE_S)
    return messages


def start(script: Path, *words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(script), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def said_online(heard: list[Message], name: str, *, online: bool) -> bool:
    return any(m.topic == f"devices/{name}/status" and m.json()["online"] is online for m in heard)


def stopped_in_order(process: subprocess.Popen[str], heard: list[Message], name: str) -> None:
    for _ in range(2):  # timeout(1) says it twice, and so do people
        process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (0, "", "")
    eventually(lambda: said_online(heard, name, online=False), "goodbye")
    assert heard[-1].json()["reason"] == "goodbye"


def test_counter(tmp_path: Path, pki: Pki, gateway: BrokerProcess, heard: list[Message]) -> None:
    state = enrolled(tmp_path / "state", pki, port=gateway.port, name="counter-1")
    process = start(ROOT / "examples/counter.py", state, "10")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (0, "the broker has all 10\n", "")
    eventually(lambda: said_online(heard, "counter-1", online=False), "goodbye, after all that it counted")
    counts = [m.json()["count"] for m in heard if m.topic.endswith("/count")]
    assert counts == list(range(1, 11))
    missing = start(ROOT / "examples/counter.py", tmp_path / "nothing", "10")
    out, err = missing.communicate(timeout=PATIENCE_S)
    assert (missing.returncode, out) == (1, "")
    assert "hint: " in err


def test_valve(tmp_path: Path, pki: Pki, gateway: BrokerProcess, alice: Client, heard: list[Message]) -> None:
    state = enrolled(tmp_path / "state", pki, port=gateway.port, name="valve-1")
    process = start(ROOT / "examples/valve.py", state)
    eventually(lambda: said_online(heard, "valve-1", online=True), "presence")
    assert alice.request("valve-1", "open", {"percent": 40}, timeout_s=PATIENCE_S).json() == {"percent": 40}
    assert alice.request("valve-1", "close", timeout_s=PATIENCE_S).json() == {"percent": 0}
    with pytest.raises(CommandFailedError, match="a whole number from 0 to 100"):
        alice.request("valve-1", "open", {"percent": "wide"}, timeout_s=PATIENCE_S)
    with pytest.raises(CommandFailedError, match="could not read a message on devices/valve-1/commands/open/"):
        alice.request("valve-1", "open", "percent=40", timeout_s=PATIENCE_S)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 0
    eventually(lambda: said_online(heard, "valve-1", online=False), "goodbye")
    assert process.stderr is not None
    assert process.stderr.read().startswith("the command open failed")
    process.communicate()


def test_cpu_temperature(tmp_path: Path, pki: Pki, gateway: BrokerProcess, heard: list[Message]) -> None:
    state = enrolled(tmp_path / "state", pki, port=gateway.port, name="pi-1")
    zone = tmp_path / "temp"
    zone.write_text("48312\n")
    text = (ROOT / "examples/cpu_temperature.py").read_text()
    for there, here in (
        ("/sys/class/thermal/thermal_zone0/temp", str(zone)),
        ("INTERVAL_S = 30", "INTERVAL_S = 1"),
    ):
        assert text.count(there) == 1
        text = text.replace(there, here)
    script = tmp_path / "cpu_temperature.py"
    script.write_text(text)
    process = start(script, state)
    eventually(lambda: any(m.topic.endswith("/cpu-temperature") for m in heard), "a reading")
    readings = [m for m in heard if m.topic.endswith("/cpu-temperature")]
    assert readings[0].topic == "devices/pi-1/telemetry/cpu-temperature"
    assert readings[0].json() == {"celsius": 48.312}
    stopped_in_order(process, heard, "pi-1")


def test_the_readme(tmp_path: Path, pki: Pki, gateway: BrokerProcess, heard: list[Message]) -> None:
    state = enrolled(tmp_path / "state", pki, port=gateway.port, name="readme-1")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    assert blocks[0].count("/var/lib/birthmark") == 1
    script = tmp_path / "readme.py"
    script.write_text(blocks[0].replace("/var/lib/birthmark", str(state)))
    out, err = start(script).communicate(timeout=PATIENCE_S)
    assert (out, err) == ("", "")
    eventually(lambda: said_online(heard, "readme-1", online=False), "goodbye")
    payloads = {m.topic.rpartition("/")[2]: m.payload for m in heard if "/telemetry/" in m.topic}
    assert payloads, "it published nothing"
    assert all(json.loads(payload) for payload in payloads.values())


def test_every_example_is_run_here() -> None:
    source = (ROOT / "tests/client/test_examples.py").read_text()
    for name in tracked():
        if str(name).startswith("examples/"):
            assert str(name) in source, f"{name} is run by no test"
