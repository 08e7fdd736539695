"""The brokers that are measured, each a process of its own: Mosquitto, amqtt as it comes, birthmark-broker.

Rules:

- The same certificates, the same CRL and an ACL that says the same: devices keep to their own topics, operators
  (`op-*`) read every device's and write announcements. Client certificates are required everywhere.
- Limits are the default ones, except for Mosquitto, which sets TCP_NODELAY, may have as many messages in flight
  (64) as birthmark has by default (its own default is 20), and whose queues are not limited: at its default it
  drops acknowledged messages with 400 on their way. All three only help it.
- Mosquitto's persistence is on, as Debian has it: written at its end, not before a message is acknowledged. amqtt
  keeps nothing. birthmark keeps what it acknowledges (`durability`), unless a peer's name says otherwise.
- amqtt has no CRL and its TLS does not require a certificate; its plug-in does.
- Whoever starts a peer ends it: `with peer(...)`. Nothing listens anywhere but on 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.fleet_pki import HOST

if TYPE_CHECKING:
    from collections.abc import Iterator

MOSQUITTO, AMQTT, BIRTHMARK = "mosquitto", "amqtt", "birthmark"
DURABILITIES = {BIRTHMARK: "acknowledged", "birthmark-periodic": "periodic", "birthmark-none": "none"}
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0
MAX_INFLIGHT = 64

_ACL = """\
pattern readwrite devices/%u/status
pattern write devices/%u/telemetry/#
pattern write devices/%u/replies/#
pattern read devices/%u/commands/#
pattern read fleet/announcements/#
"""
_OPERATOR_ACL = """
user {name}
topic read devices/#
topic readwrite fleet/announcements/#
topic write devices/+/commands/#
"""
_MOSQUITTO = """\
user root
listener {port} 127.0.0.1
cafile {folder}/chain.pem
certfile {folder}/server.pem
keyfile {folder}/server.pem
crlfile {folder}/crl.pem
require_certificate true
use_identity_as_username true
allow_anonymous false
acl_file {folder}/acl
set_tcp_nodelay true
max_inflight_messages {inflight}
max_queued_messages 0
persistence true
persistence_location {data}/
log_dest none
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """A broker that runs.

    Args:
        name: which one.
        port: where it listens.
        pid: its process.
    """

    name: str
    port: int
    pid: int

    def cpu_s(self) -> float:
        """Return the CPU time that it has used, all threads together."""
        return cpu_s(self.pid)


def cpu_s(pid: int) -> float:
    """Return the CPU time in seconds of all the threads that a process has now, as finely as the kernel counts."""
    return sum(int(path.read_text().split()[0]) for path in Path("/proc", str(pid)).glob("task/*/schedstat")) / 1e9


def available() -> dict[str, str]:
    """Return the brokers that can be measured here, with their versions; Mosquitto only where it is installed."""
    from importlib.metadata import version  # noqa: PLC0415 - only here

    found = {}
    if program := _mosquitto():
        told = subprocess.run(
            [program, "-h"], capture_output=True, text=True, check=False, timeout=START_TIMEOUT_S
        )
        found[MOSQUITTO] = (told.stdout or told.stderr).split("\n", 1)[0].rpartition(" ")[2]
    found[AMQTT] = version("amqtt")
    found[BIRTHMARK] = version("birthmark")
    return found


@contextlib.contextmanager
def peer(name: str, folder: Path, *, operators: int = 1, settings: str = "") -> Iterator[Peer]:
    """Run a broker with the certificates in `folder` (`FleetPki`).

    Args:
        name: MOSQUITTO, AMQTT, or one of DURABILITIES.
        folder: has the certificates, and gets what the broker writes.
        operators: `op-0` to `op-(n-1)` are operators.
        settings: what else is in its file, in its own words.

    Raises:
        RuntimeError: it did not start; with what it said.
    """
    data = folder / f"{name}-data"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(mode=0o700)
    said = data / "output"
    if name == MOSQUITTO:
        command, port = _mosquitto_command(folder, data, operators, settings)
    elif name == AMQTT:
        port = free_port()
        command = [sys.executable, "-m", "bench.stock_amqtt", str(folder), str(port)]
    else:
        port = free_port()
        command = _birthmark_command(folder, data, DURABILITIES[name], port, settings)
    with said.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        _wait_for(port, process, said)
        yield Peer(name, port, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # amqtt may hang in its shutdown
            process.kill()
            process.wait(STOP_TIMEOUT_S)


def free_port() -> int:
    """Return a port of loopback that nobody listens on at this moment."""
    with socket.create_server((HOST, 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def _mosquitto() -> str | None:
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def _mosquitto_command(folder: Path, data: Path, operators: int, settings: str) -> tuple[list[str], int]:
    program = _mosquitto()
    if program is None:
        raise RuntimeError("Mosquitto is not installed: apt install mosquitto")
    port = free_port()
    acl = _ACL + "".join(_OPERATOR_ACL.format(name=f"op-{number}") for number in range(operators))
    (folder / "acl").write_text(acl)
    (folder / "acl").chmod(0o600)
    config = data / "mosquitto.conf"
    config.write_text(_MOSQUITTO.format(port=port, folder=folder, data=data, inflight=MAX_INFLIGHT) + settings)
    return [program, "-c", str(config)], port


def _birthmark_command(folder: Path, data: Path, durability: str, port: int, more: str) -> list[str]:
    for name in ("server.pem", "clients-ca.pem", "crl.pem"):
        shutil.copy2(folder / name, data / name)
    broker = [sys.executable, "-m", "birthmark.broker"]
    subprocess.run(
        [*broker, "init", "--folder", str(data), "--name", "localhost"],
        check=True,
        capture_output=True,
        timeout=START_TIMEOUT_S,
    )
    settings = data / "broker.toml"
    text = settings.read_text().replace('# durability = "acknowledged"', f"durability = {json.dumps(durability)}")
    settings.write_text(text + more)
    return [*broker, "run", "--config", str(settings), "--listen", f"{HOST}:{port}", "--json"]


def _wait_for(port: int, process: subprocess.Popen[bytes], said: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        time.sleep(0.02)  # nothing tells when a foreign process listens
    raise RuntimeError(f"{process.args!r} did not start: {said.read_text()[-2000:]}")
