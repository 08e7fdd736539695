"""`birthmark` as a process of its own, whose events a test reads and which it may kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from support.patience import PATIENCE_S
from support.station import PASSPHRASE

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.provisioning.station import Station


class Process:
    """`birthmark` as a process of its own."""

    def __init__(self, station: Station, *words: str) -> None:
        environment = {
            **os.environ,
            "BIRTHMARK_PASSPHRASE": PASSPHRASE.decode(),
            "BIRTHMARK_STATION": str(station.folder),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "birthmark.provisioning", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.records: list[dict[str, Any]] = []

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Read events until one fits."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            record: dict[str, Any] = json.loads(line)
            self.records.append(record)
            if wanted(record):
                return record
        raise AssertionError(f"it never said so; stderr: {self.process.stderr and self.process.stderr.read()}")

    def end(self) -> tuple[int, str]:
        """Wait for its end; its exit code, and what it said on stderr."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        self.records += [json.loads(line) for line in out.splitlines()]
        return self.process.returncode, err
