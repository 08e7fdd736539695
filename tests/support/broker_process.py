"""The gateway as it is run: `birthmark-broker init` and `run`, in a process of its own, on a free port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from support.patience import PATIENCE_S
from support.pki import crl_pem, now
from support.ports import steady_port

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from support.pki import Pki

COMMAND = [sys.executable, "-m", "birthmark.broker"]


class BrokerProcess:
    """Start, stop and start again; the port stays the same."""

    def __init__(self, folder: Path, pki: Pki, *, name: str = "gw-1") -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.folder = folder
        self.port = steady_port()
        self._pki = pki
        self._crl_number = 1
        pki.write_broker_files(folder, "localhost", "127.0.0.1")
        subprocess.run(
            [*COMMAND, "init", "--name", name], cwd=folder, check=True, capture_output=True, timeout=PATIENCE_S
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "run", "--listen", f"127.0.0.1:{self.port}", "--json"],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.log: list[str] = []
        self._log_reader = threading.Thread(target=self._read_log, daemon=True)
        self._log_reader.start()
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        assert first, f"the broker did not start: {self._ended()}"
        ready: dict[str, Any] = json.loads(first)
        self.port = ready["listen"][0]["port"]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        try:
            code = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._ended()
        return code

    def restart(self) -> None:
        self.stop()
        self.start()

    def revoke(self, *cert_serials: int) -> None:
        """Put a newer CRL where the broker watches, and wait for its receipt."""
        self._crl_number += 1
        content = crl_pem(self._pki.issuing.crl(cert_serials, number=self._crl_number, this_update=now()))
        fresh = self.folder / "crl.pem.new"
        fresh.write_bytes(content)
        fresh.rename(self.folder / "crl.pem")
        receipt = self.folder / "crl.pem.receipt"
        deadline = time.monotonic() + PATIENCE_S
        while not _speaks_of(receipt, self._crl_number):
            assert time.monotonic() < deadline, f"no receipt; the log: {self.log}"
            time.sleep(0.02)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)

    def _ended(self) -> Iterable[str]:
        self.process.wait(PATIENCE_S)
        self._log_reader.join(PATIENCE_S)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return self.log


def _speaks_of(receipt: Path, crl_number: int) -> bool:
    try:
        text = receipt.read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return f'"crl_number":{crl_number}' in text.replace(" ", "")
