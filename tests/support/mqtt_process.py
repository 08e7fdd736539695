"""`birthmark-broker run` as a real process, for tests."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from support.mqtt_gateway import POLICY_TOML
from support.patience import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from support.pki import Pki

BROKER_TOML = """
name = "localhost"
listen = "127.0.0.1:0"
"""


def write_files(folder: Path, pki: Pki, *, broker_toml: str = BROKER_TOML) -> Path:
    """Write everything a broker needs to `folder`; return the path of broker.toml."""
    pki.write_broker_files(folder)
    (folder / "policy.toml").write_bytes(POLICY_TOML)
    path = folder / "broker.toml"
    path.write_text(broker_toml)
    return path


@dataclass
class BrokerProcess:
    """A broker that says things on stdout (its answers) and stderr (its log)."""

    process: subprocess.Popen[str]
    out: list[dict[str, Any]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    _ended: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def port(self) -> int:
        port: int = self.wait_for_event("ready")["listen"][0]["port"]
        return port

    def wait_for_event(self, event: str) -> dict[str, Any]:
        return self._wait(lambda: [record for record in self.out if record.get("event") == event], event)

    def wait_for_log(self, words: str, after: int = 0) -> dict[str, Any]:
        """The first record with these words, of those behind the first `after`."""
        return self._wait(
            lambda: [record for record in self.log[after:] if words in record.get("message", "")], words
        )

    def wait_for_failure(self) -> dict[str, Any]:
        """The error that the command ended with."""
        return self._wait(lambda: [record for record in self.log if "error" in record], "error")

    def _wait(self, look: Any, what: str) -> dict[str, Any]:
        with self._changed:
            self._changed.wait_for(lambda: look() or self._ended == 2, timeout=PATIENCE_S)
        assert look(), f"no {what!r}: {self.out} {self.log}"
        return look()[0]  # type: ignore[no-any-return]

    def read(self, stream: IO[str], into: list[dict[str, Any]]) -> None:
        for line in stream:
            with self._changed:
                into.append(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._ended += 1
            self._changed.notify_all()


@contextmanager
def broker_process(
    config: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[BrokerProcess]:
    """Run a broker with `--json`; it is killed at the end if it has not stopped by itself."""
    process = subprocess.Popen(
        [sys.executable, "-m", "birthmark.broker", "run", "--json", "--config", str(config), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(environment) if environment is not None else None,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    running = BrokerProcess(process)
    readers = [
        threading.Thread(target=running.read, args=(process.stdout, running.out)),
        threading.Thread(target=running.read, args=(process.stderr, running.log)),
    ]
    for reader in readers:
        reader.start()
    try:
        yield running
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        for reader in readers:
            reader.join(PATIENCE_S)
        process.stdout.close()
        process.stderr.close()
