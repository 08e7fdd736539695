"""An upstream that is a real Mosquitto, and played gateways behind it: for the station's side of a fleet."""

from __future__ import annotations

import hashlib
import socket
import ssl
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, cast

from cryptography import x509
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from support.patience import PATIENCE_S
from support.ports import steady_port
from support.programs import program
from support.station_gateways import receipt_for

from birthmark.device.credentials import BrokerAddress
from birthmark.device.fleet_policy import PolicyReceipt, SignedPolicy
from birthmark.device.messages import GatewayStatus, UpstreamState
from birthmark.provisioning.gateway_settings import Gateway, Upstream
from birthmark.provisioning.issuing import issue_broker, issue_operator
from birthmark.provisioning.settings import read_settings
from birthmark.provisioning.settings_edit import add_gateway, add_upstream

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from birthmark.provisioning.station import Station

CONFIGURATION = """\
listener {port} 127.0.0.1
cafile {ca}
certfile {server}
keyfile {server}
require_certificate true
use_identity_as_username true
allow_anonymous false
max_packet_size 2000000
log_dest stderr
{user}
"""


class Mosquitto:
    """Start, stop and start again on the same port; what is retained is gone then."""

    def __init__(self, folder: Path, station: Station, *names: str) -> None:
        issue_broker(station, [*names, "localhost", "127.0.0.1"], folder)
        (folder / "all-ca.pem").write_bytes(
            (folder / "clients-ca.pem").read_bytes() + station.root_path.read_bytes()
        )
        self.port = steady_port()
        self._configuration = folder / "mosquitto.conf"
        self._configuration.write_text(
            CONFIGURATION.format(
                port=self.port, ca=folder / "all-ca.pem", server=folder / "server.pem", user="user root"
            )
        )

    def start(self) -> None:
        self._process = subprocess.Popen(
            [program("mosquitto"), "-c", self._configuration], stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if "running" in line:
                return
        raise AssertionError(f"mosquitto did not start: {self._process.wait(PATIENCE_S)}")

    def stop(self) -> None:
        self._process.kill()  # it keeps nothing; and SIGTERM is lost on one that has only just started
        self._process.communicate(timeout=PATIENCE_S)


@dataclass
class PlayedGateway:
    """A gateway with a link to the upstream: it goes by what it finds there, and says so."""

    name: str
    port: int
    credentials_path: Path
    roots_path: Path
    trusted: frozenset[str]
    """Key identifiers of the issuing CAs that it trusts."""
    client_id: str = ""
    """At the upstream; empty: one of its name."""
    answers: bool = True
    """Whether it gives receipts."""
    takes_policies: bool = True
    says_it_is: str = ""
    """Whose receipts it gives; empty: its own."""
    clock_is_ahead_s: float = 0.0
    crl_numbers: dict[str, int] = field(default_factory=dict)
    policy: SignedPolicy | None = None
    refuses: str = ""
    """Why it refuses whatever comes; empty: it does not."""

    def __enter__(self) -> Self:
        self.come()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def come(self) -> None:
        """Connect, and go by what is retained there."""
        self._ready = threading.Event()
        client = self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=self.client_id or f"link-{self.name}"
        )
        context = ssl.create_default_context(cafile=self.roots_path)
        context.load_cert_chain(self.credentials_path)
        client.tls_set_context(context)
        client.will_set(f"gateway/{self.name}/status", self.status(online=False), qos=1, retain=True)
        client.on_connect = self._connected
        client.on_subscribe = lambda *_: self._ready.set()
        client.on_message = self._received
        client.connect("localhost", self.port)
        self._thread = threading.Thread(target=self._talk)
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)

    def leave(self) -> None:
        """Go without a word: the upstream says it (the last will)."""
        sock = self._client.socket()
        if sock is not None:
            cast("socket.socket", sock).shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE_S)

    def _talk(self) -> None:
        while self._client.loop() == MQTTErrorCode.MQTT_ERR_SUCCESS:
            pass

    def status(self, *, online: bool) -> bytes:
        text = b"" if self.policy is None else self.policy.text
        return GatewayStatus(
            gateway=self.name,
            online=online,
            clock=time.time() + self.clock_is_ahead_s,
            crl_numbers=self.crl_numbers,
            crl_next_update=0.0,
            policy_sha256=hashlib.sha256(text).hexdigest(),
            sessions=7,
            policy_version=0 if self.policy is None else self.policy.version,
            upstreams=(UpstreamState("cloud", connected=online, since=1.0),),
        ).to_bytes()

    def say(self) -> None:
        """Say how it is, as a gateway does every half minute."""
        self._client.publish(f"gateway/{self.name}/status", self.status(online=True), qos=1, retain=True)

    def _connected(self, client: paho.Client, *_: Any) -> None:
        self.say()
        client.subscribe([("fleet/crl/+", 1), ("fleet/policy", 1)])

    def _received(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        if message.topic == "fleet/policy":
            self._take_policy(bytes(message.payload))
        else:
            self._take_crl(bytes(message.payload))

    def _take_crl(self, der: bytes) -> None:
        try:
            crl = x509.load_der_x509_crl(der)
        except ValueError:
            return  # a gateway would say so; nobody waits for that
        number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        issuer = crl.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        assert issuer is not None
        held = self.crl_numbers.get(issuer.hex(), 0)
        if issuer.hex() not in self.trusted or number < held or self.refuses:
            outcome = "refused"
        else:
            outcome = "current" if number == held else "installed"
            self.crl_numbers[issuer.hex()] = number
        self.say()  # before the receipt: whoever believes the status misses what the receipt says
        if self.answers:
            receipt = receipt_for(der, gateway=self.says_it_is or self.name, outcome=outcome)  # type: ignore[arg-type]
            self._client.publish(f"gateway/{self.name}/receipts", receipt.to_bytes(), qos=1)

    def _take_policy(self, payload: bytes) -> None:
        if not self.takes_policies:
            return
        policy = SignedPolicy.from_bytes(payload)
        held = self.policy
        if self.refuses or (held is not None and (policy.version, policy.text) < (held.version, held.text)):
            outcome = "refused"
        else:
            outcome = "current" if held == policy else "installed"
            self.policy = policy
        self.say()
        if self.answers:
            receipt = PolicyReceipt(
                gateway=self.says_it_is or self.name,
                outcome=outcome,  # type: ignore[arg-type]
                version=0 if self.policy is None else self.policy.version,
                sha256=hashlib.sha256(payload).hexdigest(),
                installed_at=time.time(),
                elapsed_ms=1.5,
                reason=self.refuses,
            )
            self._client.publish(f"gateway/{self.name}/policy-receipts", receipt.to_bytes(), qos=1)


@dataclass
class Fleet:
    """A station, an upstream, and the gateways that the station knows there."""

    station: Station
    upstream: Mosquitto
    folder: Path

    def add(self, *names: str) -> None:
        """Have the station know these."""
        for name in names:
            add_gateway(self.station.settings_path, Gateway(name, via="cloud"))
        self.reread()

    def reread(self) -> None:
        self.station.settings = read_settings(self.station.settings_path)

    def played(self, name: str, **options: Any) -> PlayedGateway:
        trusted = frozenset(ca.key_id for ca in self.station.cas.issuing)
        options.setdefault("trusted", trusted)
        return PlayedGateway(
            name, self.upstream.port, self.folder / "alice.pem", self.station.root_path, **options
        )

    @contextmanager
    def there(self, names: Sequence[str], **options: Any) -> Iterator[list[PlayedGateway]]:
        """Have these gateways be there."""
        with ExitStack() as stack:
            yield [stack.enter_context(self.played(name, **options)) for name in names]


@contextmanager
def fleet(folder: Path, station: Station) -> Iterator[Fleet]:
    """An upstream `cloud` of the station; in its `folder` is the operator alice."""
    program("mosquitto")
    folder.mkdir()
    issue_operator(station, "alice", folder)
    upstream = Mosquitto(folder, station)
    upstream.start()
    operator_path = folder / "alice.pem"
    add_upstream(
        station.settings_path, Upstream("cloud", (BrokerAddress("127.0.0.1", upstream.port),), operator_path)
    )
    made = Fleet(station, upstream, folder)
    made.reread()
    try:
        yield made
    finally:
        upstream.stop()
