"""Gateways with an upstream, for tests: the settings by way of the parser, and a policy that lets gateways in."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from support import mqtt_client as mqtt
from support.mqtt_gateway import POLICY_TOML
from support.patience import PATIENCE_S

from birthmark.broker.toml_file import parse_toml
from birthmark.broker.upstream.settings import read_upstreams
from birthmark.device.errors import ConfigurationError
from birthmark.device.identity import BrokerName

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.mqtt_client import RawClient
    from support.mqtt_gateway import RunningGateway
    from support.pki import Issued, Pki

    from birthmark.broker.upstream.settings import UpstreamSettings
    from birthmark.broker.upstream.upstream import Upstream

ACCEPTED = b"\x20\x02\x00\x00"
"""A CONNACK, without session present."""
ROLE = "service-gateway"
POLICY = (
    POLICY_TOML
    + b"""
[roles.service-gateway]
publish = ["#"]
subscribe = ["#"]

[[assignments]]
ou = "service-gateway"
role = "service-gateway"
"""
)
UP = ["devices/+/telemetry/#", "devices/+/status", "devices/+/replies/#"]
DOWN = ["devices/+/commands/#"]
SHARED = ["fleet/announcements/#"]


def write_credentials(
    folder: Path, pki: Pki, identity: str, *, issued: Issued | None = None, trust: bytes | None = None
) -> None:
    """Write what `upstream_toml` names: `IDENTITY.pem` and `IDENTITY-ca.pem`."""
    folder.mkdir(exist_ok=True)
    (issued or pki.device(identity, ROLE)).write(folder / f"{identity}.pem")
    (folder / f"{identity}-ca.pem").write_bytes(trust or pki.root.pem)


def upstream_toml(identity: str, *ports: int, name: str = "cloud", **changes: Any) -> str:
    """One `[[upstream]]` table, quick to try again; `changes` are its keys, None to leave one out."""
    values: dict[str, Any] = {
        "name": name,
        "servers": [f"mqtts://127.0.0.1:{port}" for port in ports],
        "credentials": f"{identity}.pem",
        "ca": f"{identity}-ca.pem",
        "up": UP,
        "down": DOWN,
        "down_shared": SHARED,
        "longest_wait_s": 0.1,
    }
    lines = [f"{key} = {_toml(value)}" for key, value in (values | changes).items() if value is not None]
    return "\n[[upstream]]\n" + "\n".join(lines) + "\n"


def upstreams(folder: Path, *tables: str, gateway: str = "localhost") -> tuple[UpstreamSettings, ...]:
    """Read tables as `broker.toml` would."""
    root = parse_toml("".join(tables).encode(), "broker.toml", ConfigurationError)
    return read_upstreams(root, folder, BrokerName(gateway))


def linked(folder: Path, pki: Pki, port: int, identity: str = "gw-1", **changes: Any) -> dict[str, Any]:
    """Return what `running_gateway` needs to be given for a gateway below the broker on a port."""
    write_credentials(folder, pki, identity)
    return {
        "policy_toml": POLICY,
        "upstreams": upstreams(folder, upstream_toml(identity, port, **changes)),
    }


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def upstream_of(gateway: RunningGateway, name: str = "cloud") -> Upstream:
    return next(found for found in gateway.broker.upstreams if found.name == name)


def wait_until_up(gateway: RunningGateway, name: str = "cloud") -> Upstream:
    """Wait until a link is up and its subscriptions stand."""
    upstream = upstream_of(gateway, name)

    def is_up() -> bool:
        wanted = set(upstream.settings.mapping.subscriptions())
        return upstream.link is not None and wanted <= {*upstream.spool.granted, *upstream.link.refused}

    gateway.wait_for(is_up, f"the link to {name}: {upstream.reason}")
    return upstream


def publish(client: RawClient, topic: str, payload: bytes, *, pid: int = 1, retain: bool = False) -> None:
    """Publish at QoS 1, and have it acknowledged."""
    client.send(mqtt.publish(topic, payload, qos=1, pid=pid, retain=retain))
    assert client.read() == mqtt.Packet(0x40, pid.to_bytes(2, "big"))


def said(client: RawClient, count: int) -> list[tuple[str, bytes, int, bool]]:
    """The next messages of a client; what came at QoS 1 is acknowledged."""
    found = []
    for _ in range(count):
        message = client.read_delivery()
        if message.qos:
            client.send(mqtt.puback(message.packet_id))
        found.append((message.topic, message.payload, message.qos, message.retain))
    return found


@contextmanager
def speaking(folder: Path, pki: Pki, talk: Callable[[ssl.SSLSocket], Any], *hosts: str) -> Iterator[int]:
    """A TLS server that does with each connection what `talk` does; yields its port."""
    folder /= "speaking"
    folder.mkdir()
    pki.write_broker_files(folder, *hosts)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    plain, _ = listener.accept()
                except OSError:
                    return
                with plain, suppress(OSError):
                    plain.settimeout(PATIENCE_S)
                    with context.wrap_socket(plain, server_side=True) as secured:
                        talk(secured)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(PATIENCE_S)
