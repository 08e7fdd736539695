"""A station, its boards, a gateway's files and what is exported of them: by the commands that a person types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support import mqtt_client as mqtt
from support.mqtt_client import ConnectionEndedError, RawClient, client_context
from support.ports import steady_port
from support.station import PASSPHRASE

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMANDS = Path(sys.executable).parent
NOT_THERE = ('"devices/{id}/time/request"', '"gateway/+/crl"')
"""What the policy of `birthmark-broker init` has and Mosquitto cannot do (docs/engines.md)."""


class Bench:
    """A folder with a station, its boards, the files of a gateway, and what is exported of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.station, self.gateway = folder / "station", folder / "gateway"
        self.boards, self.exported = folder / "boards", folder / "mosquitto"
        self.port = steady_port()

    def run(self, *words: object, code: int = 0) -> list[dict[str, Any]]:
        """Run a command of the station or of the gateway; return what it printed."""
        command = [str(COMMANDS / str(words[0])), *map(str, words[1:]), "--json"]
        environment = os.environ | {
            "BIRTHMARK_PASSPHRASE": PASSPHRASE.decode(),
            "BIRTHMARK_STATION": str(self.station),
        }
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=600, check=False, cwd=self.folder
        )
        assert done.returncode == code, (command, done.stdout, done.stderr)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def identities(self) -> None:
        """What the station knows, for the export; in place of what it knew before."""
        fresh = self.folder / "fresh.jsonl"
        self.run("birthmark", "registry", "export", "--format", "jsonl", "-o", fresh)
        fresh.replace(self.folder / "identities.jsonl")

    def export(self, *accepted: str, code: int = 0) -> list[dict[str, Any]]:
        where = ["--config", self.gateway / "broker.toml", "--identities", self.folder / "identities.jsonl"]
        names = [word for name in accepted for word in ("--accept", name)]
        out = ["--out", self.exported, "--run-as", "root"]
        return self.run("birthmark-broker", "export", "mosquitto", *where, *out, *names, code=code)

    def credentials(self, name: str) -> Path:
        """The file of a device or of an operator."""
        return {"alice": self.folder / "alice.pem"}.get(name) or self.boards / f"board-{name[-1]}" / "active"

    @contextmanager
    def client(self, name: str) -> Iterator[RawClient]:
        """A connection as an identity, by what its board holds."""
        context = client_context(self.credentials(name), self.station / "root.pem")
        with RawClient.connect(self.port, context) as client:
            yield client.handshake(mqtt.connect(name))

    def lets_in(self, name: str) -> bool:
        try:
            with self.client(name):
                return True
        except (OSError, ConnectionEndedError):
            return False

    def gateway_files(self) -> None:
        """Make the files of a gateway, and an operator."""
        self.run("birthmark", "issue-broker", "localhost", "127.0.0.1", "--out", self.gateway)
        self.run("birthmark", "issue-operator", "alice", "--out", self.folder)
        self.run("birthmark-broker", "init", "--folder", self.gateway, "--listen", f"127.0.0.1:{self.port}")

    def without_what_is_not_there(self) -> int:
        """Take out of the policy what Mosquitto cannot do; return how many lines that were."""
        policy = self.gateway / "policy.toml"
        lines = policy.read_text().splitlines(keepends=True)
        kept = [line for line in lines if not any(entry in line for entry in NOT_THERE)]
        policy.write_text("".join(kept))
        return len(lines) - len(kept)
