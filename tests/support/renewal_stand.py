"""A station, its gateway and its renewal service, each as it is run, and devices that were made there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Self

from cryptography import x509
from support.mqtt_process import broker_process
from support.patience import PATIENCE_S
from support.ports import steady_port
from support.renewing import PaperDevice
from support.repository import ROOT
from support.station import PASSPHRASE, new_station
from support.waiting import eventually

from birthmark.device import topics
from birthmark.device.agent.keys import key_to_der
from birthmark.device.agent.slots import Slot
from birthmark.device.client import Client
from birthmark.device.clock import Moment
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.identity import DeviceId, Role
from birthmark.device.link.bundle import Bundle, BundleConfig
from birthmark.device.renewal import making
from birthmark.device.renewal.store import RenewalStore
from birthmark.provisioning.crls import sign_and_store_crl
from birthmark.provisioning.issuing import issue_broker, issue_operator
from birthmark.provisioning.renewal import Asked, Renewals
from birthmark.provisioning.retirement import RETIREMENTS, retire_due

if TYPE_CHECKING:
    from pathlib import Path

    from support.mqtt_process import BrokerProcess

    from birthmark.provisioning.registry.model import Row
from birthmark.provisioning.revocation import mark_revoked
from birthmark.provisioning.station import Station


class Renewd:
    """`birthmark renewd` as a process; its lines can be waited for."""

    def __init__(
        self, stand: Stand, *, passphrase: bytes = PASSPHRASE, broker: str = "", **environment: str
    ) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "birthmark.provisioning", "renewd", "--json"),
                *("--station", str(stand.station.folder), "--identity", str(stand.folder / "renewd.pem")),
                *("--broker", broker or f"localhost:{stand.port}"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "BIRTHMARK_PASSPHRASE": passphrase.decode(), **environment},
        )
        self.lines: list[dict[str, Any]] = []
        self.noise: list[str] = []
        self._ended = 0
        self._changed = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(self._process.stdout, True)),
            threading.Thread(target=self._read, args=(self._process.stderr, False)),
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Self:
        self.wait_for("connected")
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self, number: int = signal.SIGKILL) -> int:
        if self._process.poll() is None:
            self._process.send_signal(number)
        code = self._process.wait(PATIENCE_S)
        for reader in self._readers:
            reader.join(PATIENCE_S)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        return code

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait_for(self, event: str, count: int = 1, **facts: Any) -> dict[str, Any]:
        """Return the count-th line of this name, with these facts in it."""
        wanted = {"event": event, **facts}

        def found() -> list[dict[str, Any]]:
            return [line for line in self.lines if wanted.items() <= line.items()]

        with self._changed:
            self._changed.wait_for(lambda: len(found()) >= count or self._ended, timeout=PATIENCE_S)
        assert len(found()) >= count, f"no {event!r} of renewd: {self.lines} {self.noise}"
        return found()[count - 1]

    def _read(self, stream: Any, is_answer: bool) -> None:
        for line in stream:
            with self._changed:
                if is_answer:
                    self.lines.append(json.loads(line))
                else:
                    self.noise.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended += 1
            self._changed.notify_all()


class Stand:
    """Everything that a renewal needs but the device.

    Args:
        folder: for all of it.
        broker_toml: what the gateway's settings have in addition; PORT stands for that of its renewal listener.
        settings: what takes the place of the table of that name in the station's settings.
        early: devices made two years and a day ago.
        due: devices made 540 days ago, whose renewals are due by now.
    """

    def __init__(
        self,
        folder: Path,
        *,
        broker_toml: str = "",
        settings: str = "",
        early: tuple[str, ...] = (),
        due: tuple[str, ...] = (),
    ) -> None:
        self.folder = folder
        made_at = datetime.now(UTC) - timedelta(days=731)
        founded = new_station(folder / "station", lambda: made_at)
        self._early = {name: PaperDevice.made(founded, name) for name in early}
        due_from = made_at + timedelta(days=191)
        earlier = Station.open(folder / "station", passphrase=PASSPHRASE, clock=lambda: due_from)
        self._early |= {name: PaperDevice.made(earlier, name) for name in due}
        if settings:
            _replace_table(founded.settings_path, settings)
        self.station = Station.open(folder / "station", passphrase=PASSPHRASE)
        self._broker_folder = folder / "broker"
        self._broker_folder.mkdir(mode=0o700)
        issue_broker(self.station, ["localhost", "127.0.0.1"], self._broker_folder)
        issue_operator(self.station, "renewd", folder, role="service-renewal")
        issue_operator(self.station, "alice", folder)
        (self._broker_folder / "policy.toml").write_bytes((ROOT / "broker" / "policy.default.toml").read_bytes())
        self._broker_toml = broker_toml
        self._running = ExitStack()
        self.port = steady_port()
        self.renewal_port = steady_port()
        self.broker: BrokerProcess

    def __enter__(self) -> Self:
        self.start_broker()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def start_broker(self) -> None:
        config = self._broker_folder / "broker.toml"
        more = self._broker_toml.replace("PORT", str(self.renewal_port))
        config.write_text(f'name = "localhost"\nlisten = "127.0.0.1:{self.port}"\n{more}')
        self.broker = self._running.enter_context(broker_process(config))
        ready = self.broker.wait_for_event("ready")
        self.port = ready["listen"][0]["port"]
        self.renewal_port = next((one["port"] for one in ready.get("renewal_listen", ())), 0)

    def kill_broker(self) -> None:
        self._running.close()
        self._running = ExitStack()

    def renewd(self, **options: Any) -> Renewd:
        return Renewd(self, **options)

    @property
    def crl_path(self) -> Path:
        """Where the gateway watches for CRLs."""
        return self._broker_folder / "crl.pem"

    def device(self, name: str = "sensor-17") -> Path:
        """Make a device; return its state folder."""
        return state_folder(
            self.folder / "devices" / name, self.station, PaperDevice.made(self.station, name), self.port
        )

    def fleet(self, count: int) -> list[Path]:
        """Make many devices; return their state folders."""
        made = PaperDevice.made_all(self.station, [f"fleet-{number}" for number in range(count)])
        return [state_folder(self.folder / "fleet" / one.name, self.station, one, self.port) for one in made]

    def early_device(self, name: str) -> Path:
        """Return the state folder of a device of `early`, whose certificate ended yesterday, or of `due`."""
        return state_folder(self.folder / "devices" / name, self.station, self._early[name], self.port)

    def grant(self, state: Path) -> Asked:
        """Bring a device to `granted` without its client; return the confirmation that it would send."""
        store = RenewalStore(state)
        current = store.current_slot()
        device_id = current.bundle.config.device_id
        asked = making.new_key(device_id)
        store.keep_asked(asked)
        request = making.renewal_request(current, asked)
        (answer,) = Renewals(self.station).answer([Asked(device_id, request)])
        now = datetime.now(UTC)
        store.keep_candidate(making.granted(answer, request, current=current, asked=asked, moment=Moment(now)))
        return Asked(device_id, making.confirmation(store.candidate_slot()))

    def revoke_open_renewal(self, name: str) -> None:
        """Revoke what was granted and not confirmed, and bring that to the gateway."""
        with self.station.registry.transaction() as transaction:
            for row in transaction.named(name):
                if row.is_open_renewal:
                    word, now = "test", self.station.clock()
                    mark_revoked(transaction, row, x509.ReasonFlags.superseded, word=word, now=now)
        self.bring_crl()

    def bring_crl(self) -> None:
        """Put a new CRL where the gateway watches, and wait for its receipt."""
        crls = sign_and_store_crl(self.station)
        part = self.crl_path.with_name("crl.pem.new")
        part.write_bytes(crls.pem)
        part.replace(self.crl_path)
        receipt = self.crl_path.with_name("crl.pem.receipt")
        eventually(lambda: crls.current.sha256 in receipt.read_text(), "the gateway's receipt")

    def retire_now(self) -> None:
        """Revoke what was replaced without waiting for its grace, and bring that to the gateway."""
        with self.station.registry.transaction() as transaction:
            for key, note in transaction.notes(RETIREMENTS).items():
                transaction.put_note(RETIREMENTS, key, {**note, "due": 0})
        retire_due(self.station)
        self.bring_crl()

    def birthmark(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the station that goes to the gateway as the renewal service."""
        return subprocess.run(
            [
                *(sys.executable, "-m", "birthmark.provisioning", *arguments),
                *("--station", str(self.station.folder), "--identity", str(self.folder / "renewd.pem")),
                *("--broker", f"localhost:{self.port}"),
            ],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
            env={**os.environ, "BIRTHMARK_PASSPHRASE": PASSPHRASE.decode()},
        )

    def send_command(self, name: str, command: str, payload: bytes) -> None:
        """Send a command as an operator; the gateway has it when this returns."""
        credentials = Credentials.from_files(
            self.folder / "alice.pem", self.folder / "ca.pem", BrokerAddress("localhost", self.port)
        )
        with Client(credentials) as alice:
            alice.publish(topics.command(DeviceId(name), command), payload, wait=20)

    def answer_as_service(self, name: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish on a device's `renewal/answer`; the gateway has it when this returns."""
        credentials = Credentials.from_files(
            self.folder / "renewd.pem", self.folder / "ca.pem", BrokerAddress("localhost", self.port)
        )
        with Client(credentials, client_suffix="test") as service:
            service.publish(topics.renewal_answer(DeviceId(name)), payload, retain=retain, wait=20)

    def rows(self, name: str = "sensor-17") -> list[Row]:
        with self.station.registry.view() as view:
            return view.named(name)

    def live(self, name: str = "sensor-17") -> Row:
        with self.station.registry.view() as view:
            row = view.live_by_name(name)
        assert row is not None
        return row


def _replace_table(path: Path, table: str) -> None:
    head = table.splitlines()[0]
    tables = path.read_text().split("\n\n")
    path.write_text("\n\n".join(table if old.startswith(head) else old for old in tables))


def state_folder(folder: Path, station: Station, device: PaperDevice, port: int) -> Path:
    """Write the state folder of a device, as the agent leaves it."""
    authority = station.authority
    assert device.row.not_before is not None
    assert device.row.txn is not None
    bundle = Bundle(
        leaf_der=device.leaf_der,
        issuing_der=(authority.issuing_der,),
        anchors_der=tuple(authority.anchors_der),
        config=BundleConfig("localhost", port, DeviceId(device.name), Role("sensor")),
        issued_at=int(device.row.not_before.timestamp()) + 1,
    )
    folder.mkdir(mode=0o700, parents=True)
    path = folder / "active"
    path.write_bytes(Slot(device.row.txn, key_to_der(device.key), bundle).to_pem())
    path.chmod(0o600)
    return folder
