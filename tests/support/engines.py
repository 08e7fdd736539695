"""The gateway and the Mosquitto that it exports, as real processes with the same certificates, policy and CRL.

`python -m support.engines` runs the decision suite against both, prints the matrix and writes it into
docs/engines.md.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from support import mqtt_client as mqtt
from support.mqtt_client import ConnectionEndedError, RawClient, client_context
from support.mqtt_process import BrokerProcess, broker_process
from support.mqtt_world import RECEIPTS, replace
from support.pki import Authority, Pki, crl_pem, now
from support.ports import steady_port
from support.programs import program

from birthmark.device.messages import Receipt

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

    from support.pki import Issued

MAX_PACKET_BYTES = 16_384
POLICY = b"""
[roles.device]
publish = ["devices/{id}/telemetry/#", "devices/{id}/status"]
deny_publish = ["devices/{id}/telemetry/locked/#"]
subscribe = ["devices/{id}/commands/#", "devices/{id}/config/#", "fleet/#"]
deny_subscribe = ["devices/{id}/config/factory"]
withhold = ["fleet/secret/#"]

[roles.camera]
publish = ["devices/{id}/frames/#"]

[roles.operator]
publish = ["devices/+/commands/#", "devices/+/config/#", "fleet/#"]
subscribe = ["devices/#", "gateway/+/receipts"]

[[assignments]]
ou = "operator"
role = "operator"

[[assignments]]
cn = "camera-*"
role = "camera"

[[assignments]]
ou = "device"
role = "device"
"""
BROKER_TOML = f"""
name = "localhost"
listen = "127.0.0.1:@port@"
durability = "periodic"

[revocation]
fail_closed = true

[limits]
max_packet_bytes = {MAX_PACKET_BYTES}
max_connections = 100
max_connections_per_address = 100
queue_full = "drop_newest"
"""
ACCEPTED = ("keepalive", "limits", "profile", "revocation", "timeouts")


@dataclass
class Identities:
    """Certificates, good and bad; the good ones are in the registry's file that an export reads."""

    folder: Path
    pki: Pki
    issued: dict[str, Issued] = field(default_factory=dict)
    _contexts: dict[str, ssl.SSLContext] = field(default_factory=dict)

    @classmethod
    def create(cls, folder: Path) -> Identities:
        pki = Pki.create()
        (folder / "root.pem").write_bytes(pki.root.pem)
        self = cls(folder, pki)
        for name in ("sensor-1", "sensor-2", "camera-1", "doomed"):
            self.issued[name] = pki.device(name)
        for name in ("alice", "bob"):
            self.issued[name] = pki.operator(name)
        self.issued["visitor"] = pki.device("visitor", "visitor")
        registered = dict(self.issued)
        issue, day = pki.issuing.issue, timedelta(days=1)
        sibling = Authority.create("Another Issuing CA", parent=pki.root)
        self.issued |= {
            "alice, but a device": pki.device("alice"),
            "sensor-1 of a stranger": pki.stranger.device("sensor-1"),
            "sensor-1 of another CA of the root": sibling.device("sensor-1"),
            "sensor-1 of the root": pki.root.device("sensor-1"),
            "sensor-1 of a device": Authority.create("sensor-2", parent=pki.issuing, is_ca=False).device(
                "sensor-1"
            ),
            "sensor-1, expired": issue(cns=["sensor-1"], not_before=now() - 3 * day, not_after=now() - day),
            "sensor-1, not yet": issue(cns=["sensor-1"], not_before=now() + day),
            "sensor-1, a server": pki.issuing.server("sensor-1"),
            "sensor-1, not by the profile": issue(cns=["sensor-1"], san=None, has_key_usage=False),
            "two names": issue(cns=["sensor-1", "alice"]),
        }
        lines = [
            json.dumps(
                {
                    "id": name,
                    "kind": "service" if name in {"alice", "bob"} else "device",
                    "certificate": base64.b64encode(issued.der).decode(),
                }
            )
            for name, issued in registered.items()
        ]
        (folder / "identities.jsonl").write_text("\n".join(lines) + "\n")
        return self

    def context(self, name: str) -> ssl.SSLContext:
        if name not in self._contexts:
            path = self.issued[name].write(self.folder / f"{self.issued[name].cert_serial:x}.pem")
            self._contexts[name] = client_context(path, self.folder / "root.pem")
        return self._contexts[name]


class Control(Protocol):
    """What a suite does to an engine from outside."""

    def revoke(self, crl: bytes) -> None:
        """Bring a CRL; when this returns, it is in force."""

    def wait_for_end(self, name: str) -> None:
        """Wait until the engine has dealt with the end of this identity's connection."""


@dataclass
class Engine:
    """One of the two, and the clients that a case has opened to it."""

    name: str
    port: int
    identities: Identities
    control: Control
    clients: list[RawClient] = field(default_factory=list)

    def open(self, name: str, **options: object) -> RawClient:
        """A TLS connection of an identity; closed when the case ends."""
        client = RawClient.connect(self.port, self.identities.context(name), **options)  # type: ignore[arg-type]
        self.clients.append(client)
        return client

    def client(self, name: str, **options: object) -> RawClient:
        """A client that has connected; options are those of CONNECT."""
        return self.open(name).handshake(mqtt.connect(name, **options))  # type: ignore[arg-type]

    def operator(self, *filters: str, name: str = "alice") -> RawClient:
        return self.client(name).subscribed(*((each, 0) for each in filters))

    def lets_in(self, name: str, client_id: str = "sensor-1", session: ssl.SSLSession | None = None) -> bool:
        """Whether an identity gets as far as a CONNACK that accepts it."""
        try:
            with RawClient.connect(self.port, self.identities.context(name), session=session) as client:
                client.send(mqtt.connect(client_id))
                return client.read() == mqtt.connack(0)
        except (OSError, ConnectionEndedError):
            return False

    def close_clients(self) -> None:
        for client in self.clients:
            client.close()
        self.clients.clear()


@dataclass
class GatewayControl:
    """The gateway: it watches its CRL file, and says on a topic when it goes by it."""

    folder: Path
    process: BrokerProcess
    identities: Identities

    def revoke(self, crl: bytes) -> None:
        with RawClient.connect(self.process.port, self.identities.context("bob")) as client:
            client.handshake(mqtt.connect("bob")).subscribed((RECEIPTS, 0))
            replace(self.folder / "crl.pem", crl)
            while (found := client.read_delivery()).retain or Receipt.from_bytes(found.payload).crl_number != 2:
                pass

    def wait_for_end(self, name: str) -> None:
        """It has closed the connection itself."""


@dataclass
class MosquittoControl:
    """An exported Mosquitto: the folder's `reload`, and what it writes on stderr."""

    folder: Path
    exported: Path
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()

    def wait_for(self, words: str, what: str = "") -> None:
        def is_said() -> bool:
            return any(words in line and what in line for line in self.lines)

        with self._changed:
            assert self._changed.wait_for(is_said, timeout=120), (words, self.lines)

    def revoke(self, crl: bytes) -> None:
        replace(self.folder / "crl.pem", crl)
        self.reload()

    def reload(self) -> None:
        """Run the folder's own script; when this returns, Mosquitto goes by the new files."""
        environment = os.environ | {"BIRTHMARK_BROKER": str(Path(sys.executable).with_name("birthmark-broker"))}
        subprocess.run([self.exported / "reload"], check=True, capture_output=True, env=environment, timeout=30)
        # It is said before anything else is read from a client.
        self.wait_for("Reloading config")

    def wait_for_end(self, name: str) -> None:
        self.wait_for("closed its connection", f"CN={name},")


def export(folder: Path, *accepted: str) -> subprocess.CompletedProcess[str]:
    """Run the command on a folder with a gateway's files; it writes `mosquitto/` there."""
    command = [sys.executable, "-m", "birthmark.broker", "export", "mosquitto", "--run-as", "root"]
    command += ["--config", str(folder / "broker.toml"), "--identities", str(folder / "identities.jsonl")]
    command += ["--out", str(folder / "mosquitto")]
    return subprocess.run(
        [*command, *(word for code in accepted for word in ("--accept", code))],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def write_gateway(folder: Path, identities: Identities, port: int = 0) -> Path:
    """Write the files of a gateway, and the registry's; return broker.toml."""
    folder.mkdir()
    identities.pki.write_broker_files(folder)
    shutil.copy(identities.folder / "identities.jsonl", folder)
    (folder / "policy.toml").write_bytes(POLICY)
    (folder / "broker.toml").write_text(BROKER_TOML.replace("@port@", str(port)))
    return folder / "broker.toml"


@contextmanager
def exported_mosquitto(folder: Path, identities: Identities) -> Iterator[Engine]:
    """Export a gateway to Mosquitto, and run it."""
    port = steady_port()
    write_gateway(folder, identities, port)
    done = export(folder, *ACCEPTED)
    assert done.returncode == 0, done.stdout + done.stderr
    with mosquitto_process(folder, folder / "mosquitto") as control:
        yield Engine("mosquitto", port, identities, control)


@contextmanager
def mosquitto_process(folder: Path, exported: Path) -> Iterator[MosquittoControl]:
    """Run what was exported to a folder, from the gateway's files in another one."""
    process = subprocess.Popen(
        [program("mosquitto"), "-c", exported / "mosquitto.conf"], stderr=subprocess.PIPE, text=True
    )
    control = MosquittoControl(folder, exported, process)
    reader = threading.Thread(target=control.read)
    reader.start()
    try:
        control.wait_for("running")
        yield control
    finally:
        process.terminate()
        process.wait(120)
        reader.join(20)
        assert process.stderr is not None
        process.stderr.close()


@contextmanager
def gateway(folder: Path, identities: Identities) -> Iterator[Engine]:
    """Run the gateway itself."""
    config = write_gateway(folder, identities)
    with broker_process(config) as process:
        yield Engine("birthmark", process.port, identities, GatewayControl(folder, process, identities))
        assert [record for record in process.log if "exception" in record] == []


@contextmanager
def both(folder: Path) -> Iterator[tuple[Engine, Engine]]:
    """Run the gateway and its export, with the same certificates."""
    identities = Identities.create(folder)
    with ExitStack() as stack:
        one = stack.enter_context(gateway(folder / "gateway", identities))
        other = stack.enter_context(exported_mosquitto(folder / "engine", identities))
        yield one, other


def revoking(identities: Identities) -> bytes:
    """The CRL on which `doomed` is."""
    return crl_pem(identities.pki.issuing.crl([identities.issued["doomed"].cert_serial], number=2))


def main() -> None:
    from support import engine_cases
    from support.repository import ROOT

    with tempfile.TemporaryDirectory() as folder, both(Path(folder)) as engines:
        table = engine_cases.table(engine_cases.measure(*engines))
    page = ROOT / "docs" / "engines.md"
    page.write_text(engine_cases.with_table(page.read_text(), table))
    print(table)


if __name__ == "__main__":
    main()
