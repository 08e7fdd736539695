"""From its start to a connection, a device loads no cryptography library: a small board waits for none."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from support.broker_stub import DISCONNECT, PUBLISH, BrokerStub
from support.device_folder import enrolled
from support.patience import PATIENCE_S
from support.pki import Pki

if TYPE_CHECKING:
    from pathlib import Path

_BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cryptography", "cffi", "cbor2", "serial", "amqtt", "tinydb"):
            raise ImportError(f"{name} is blocked here")

sys.meta_path.insert(0, Blocked())
"""

_LIBRARY = """
from birthmark.device import Client

with Client.from_folder(sys.argv[1]) as client:
    client.publish(client.telemetry("temperature"), {"celsius": 21.5}, wait=20)
"""

_COMMAND = """
from birthmark.device import cli, console

arguments = ["run", "--state", sys.argv[1], "--json", "--simulate", "--give-up-after", "20"]
sys.exit(console.run(cli.parser(), arguments))
"""


def test_the_library(tmp_path: Path) -> None:
    pki = Pki.create()
    with BrokerStub(pki) as broker:
        state = enrolled(tmp_path / "state", pki, port=broker.port)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", _BLOCKED + _LIBRARY, state],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        broker.wait_for(DISCONNECT)


def test_the_command(tmp_path: Path) -> None:
    pki = Pki.create()
    with BrokerStub(pki) as broker:
        state = enrolled(tmp_path / "state", pki, port=broker.port)
        with subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _BLOCKED + _COMMAND, state],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            broker.wait_for(PUBLISH, lambda packet: "telemetry" in packet.topic)
            process.terminate()
            output, errors = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, errors) == (0, "")
        assert json.loads(output.splitlines()[0])["event"] == "connected"
