"""A fleet of real processes, to be measured and tested: gateways, and the broker that they have a link to."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from birthmark.device.credentials import BrokerAddress
from birthmark.provisioning.gateway_settings import Gateway, Upstream
from birthmark.provisioning.issuing import issue_broker, issue_operator
from birthmark.provisioning.settings import read_settings
from birthmark.provisioning.settings_edit import add_gateway, add_upstream

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from birthmark.provisioning.station import Station

COMMAND = (sys.executable, "-m", "birthmark.broker")
DEADLINE_S = 60.0
UPSTREAM = "cloud"


@dataclass
class GatewayProcess:
    """One broker; it listens on the same port whenever it is started."""

    name: str
    folder: Path
    port: int = 0
    log: Path = field(init=False)
    _process: subprocess.Popen[str] | None = None

    def __post_init__(self) -> None:
        self.log = self.folder / "log"

    def start(self) -> None:
        """Start it, and do not wait for it (`ready`)."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*COMMAND, "run", "--listen", f"127.0.0.1:{self.port}", "--json"],
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def ready(self) -> None:
        """Wait until it listens to devices; raises `RuntimeError` if it does not start."""
        line = ""
        if self._process is not None and self._process.stdout is not None:
            line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} did not start: {self.log.read_text()[-2000:]}")
        self.port = json.loads(line)["listen"][0]["port"]

    def kill(self) -> None:
        """End it as a power cut does."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate(timeout=DEADLINE_S)
            self._process = None


@dataclass
class FleetStand:
    """A station, `cloud`, and the gateways that have a link there."""

    station: Station
    cloud: GatewayProcess
    gateways: dict[str, GatewayProcess]
    operator_path: Path

    def start(self, names: Sequence[str]) -> None:
        """Start these at once, and wait until all of them listen."""
        for name in names:
            self.gateways[name].start()
        for name in names:
            self.gateways[name].ready()


def _write(folder: Path, files: Path, name: str, toml: str = "") -> GatewayProcess:
    """Write the folder of a gateway; all have the same certificate, for localhost."""
    folder.mkdir(mode=0o700)
    for each in files.iterdir():
        shutil.copy2(each, folder)
    subprocess.run(
        [*COMMAND, "init", "--name", name], cwd=folder, check=True, capture_output=True, timeout=DEADLINE_S
    )
    with (folder / "broker.toml").open("a") as file:
        file.write(toml)
    return GatewayProcess(name, folder)


def _link(port: int, **changes: Any) -> str:
    values = {
        "name": UPSTREAM,
        "servers": [f"mqtts://127.0.0.1:{port}"],
        "credentials": "link.pem",
        "ca": "root.pem",
        "fleet": True,
        "up": ["devices/+/telemetry/#", "devices/+/status", "devices/+/replies/#"],
        "down": ["devices/+/commands/#"],
        "longest_wait_s": 0.5,
        **changes,
    }
    return "\n[[upstream]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items()) + "\n"


@contextmanager
def fleet_stand(folder: Path, station: Station, names: Sequence[str]) -> Iterator[FleetStand]:
    """Have the station know these gateways by way of `cloud`, which runs; they are started by `start`."""
    folder.mkdir()
    files = folder / "files"
    issue_broker(station, ["localhost", "127.0.0.1"], files)
    shutil.copy(station.root_path, files / "root.pem")
    operator_path = issue_operator(station, "alice", folder).key_path
    cloud = _write(folder / UPSTREAM, files, UPSTREAM)
    stand = FleetStand(station, cloud, {}, operator_path)
    with contextlib.ExitStack() as stack:
        stack.callback(cloud.kill)
        cloud.start()
        cloud.ready()
        add_upstream(
            station.settings_path, Upstream(UPSTREAM, (BrokerAddress("127.0.0.1", cloud.port),), operator_path)
        )
        for name in names:
            credentials = issue_operator(station, name, folder, role="service-gateway").key_path
            gateway = _write(folder / name, files, name, _link(cloud.port))
            shutil.copy2(credentials, gateway.folder / "link.pem")
            stand.gateways[name] = gateway
            stack.callback(gateway.kill)
            add_gateway(station.settings_path, Gateway(name, via=UPSTREAM))
        station.settings = read_settings(station.settings_path)
        yield stand
