"""A Mosquitto of the tests' own: TLS alone, client certificates required, the CN as user name and ACL.

The settings are those that docs/upstream.md gives an operator. Its persistence is written when it stops in good
order: what it had acknowledged since then is gone when it is killed, with the sessions, as Mosquitto is.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from support.patience import PATIENCE_S
from support.ports import HOST, steady_port
from support.programs import program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.pki import Pki

SETTINGS = """\
listener {port} {host}
cafile {folder}/root.pem
certfile {folder}/server.pem
keyfile {folder}/server.pem
require_certificate true
use_identity_as_username true
allow_anonymous false
acl_file {folder}/acl

persistence true
persistence_location {folder}/
max_inflight_messages 500
max_queued_messages 0
set_tcp_nodelay true
"""
_OF_TESTS = """\
user root
log_type error
log_type warning
log_type notice
log_type information
log_dest stderr
"""


@dataclass
class Mosquitto:
    """A broker that may be stopped or killed, and started again on its port."""

    folder: Path
    port: int
    said: list[str] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None
    _reader: threading.Thread | None = None
    _running: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Return when it takes connections."""
        self._running.clear()
        command = [program("mosquitto"), "-c", str(self.folder / "mosquitto.conf")]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self._reader = threading.Thread(target=self._read, args=(self.process,))
        self._reader.start()
        assert self._running.wait(PATIENCE_S), "".join(self.said)

    def stop(self) -> None:
        """Stop it in good order: it writes down what it has."""
        assert self.process is not None
        self.process.terminate()
        self._ended()

    def kill(self) -> None:
        """Kill it: it forgets what it has not written down."""
        assert self.process is not None
        self.process.kill()
        self._ended()

    def _ended(self) -> None:
        assert self.process is not None
        assert self._reader is not None
        self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.process = None

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.said.append(line)
            if " running" in line:
                self._running.set()


@contextlib.contextmanager
def mosquitto(folder: Path, pki: Pki, acl: str) -> Iterator[Mosquitto]:
    """Run one in a folder, which is made; `acl` is its ACL file."""
    folder.mkdir()
    pki.issuing.server("localhost", HOST).write(folder / "server.pem")
    (folder / "root.pem").write_bytes(pki.root.pem)
    (folder / "acl").write_text(acl)
    (folder / "acl").chmod(0o600)
    port = steady_port()
    settings = SETTINGS.format(port=port, host=HOST, folder=folder)
    (folder / "mosquitto.conf").write_text(settings + _OF_TESTS)
    running = Mosquitto(folder, port)
    try:
        running.start()
        yield running
    finally:
        if running.process is not None:
            running.kill()
