"""A gateway as a process of its own, and the clients that tests open to it."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from support import mqtt_client as mqtt
from support.mqtt_client import ConnectionEndedError, RawClient
from support.mqtt_gateway import World
from support.mqtt_process import BROKER_TOML, BrokerProcess, broker_process, write_files

from birthmark.device.messages import GatewayStatus, Receipt

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator
    from pathlib import Path

    from support.pki import Pki

STATUS = "gateway/localhost/status"
RECEIPTS = "gateway/localhost/receipts"


@dataclass(kw_only=True)
class ProcessWorld(World):
    """A running `birthmark-broker run`."""

    broker: BrokerProcess

    def answer(self, context: ssl.SSLContext, hello: bytes, **options: Any) -> int | None:
        """The code of the CONNACK that a CONNECT is answered with; None if there is none."""
        try:
            with RawClient.connect(self.port, context, **options) as client:
                client.send(hello)
                found = client.read()
        except (OSError, ConnectionEndedError):
            return None
        assert found.first == 0x20, found
        return found.body[1]

    def lets_in(self, context: ssl.SSLContext, client_id: str = "sensor-1", **options: Any) -> bool:
        """Whether a CONNECT with this client id is accepted."""
        return self.answer(context, mqtt.connect(client_id), **options) == 0

    def operator(self, name: str = "alice", *filters: tuple[str, int]) -> RawClient:
        """An operator that has subscribed."""
        client = self.client(name, "operator")
        return client.subscribed(*filters) if filters else client

    def status(self) -> GatewayStatus:
        """What the gateway says of itself at this moment, on its retained topic."""
        with RawClient.connect(self.port, self.context("status-reader", "operator")) as client:
            client.handshake(mqtt.connect("status-reader")).subscribed((STATUS, 0), (RECEIPTS, 0))
            self.broker.process.send_signal(signal.SIGHUP)
            # The retained ones come first; a receipt that is not retained answers the signal, a status follows it.
            is_answered = False
            while True:
                found = client.read_delivery()
                if found.topic == RECEIPTS and not found.retain:
                    Receipt.from_bytes(found.payload)
                    is_answered = True
                elif found.topic == STATUS and is_answered:
                    return GatewayStatus.from_bytes(found.payload)


@contextmanager
def process_world(
    folder: Path, pki: Pki, *, broker_toml: str = BROKER_TOML, policy_toml: bytes | None = None, crl: bytes = b""
) -> Iterator[ProcessWorld]:
    """Run a broker with files of its own in a folder; its log must hold no exception at the end."""
    config = write_files(folder, pki, broker_toml=broker_toml)
    if policy_toml is not None:
        (folder / "policy.toml").write_bytes(policy_toml)
    if crl:
        (folder / "crl.pem").write_bytes(crl)
    with broker_process(config) as broker:
        world = ProcessWorld(folder=folder, pki=pki, port=broker.port, broker=broker)
        try:
            yield world
        finally:
            world.close_clients()
        assert [record for record in broker.log if "exception" in record] == []


def replace(path: Path, content: bytes) -> None:
    """Put a new file in the place of an old one, at once."""
    part = path.with_name(path.name + ".new")
    part.write_bytes(content)
    part.replace(path)
