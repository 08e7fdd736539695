"""A gateway of a fleet for tests: all of it, in a thread of this process; policies that a test CA has signed."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from support.mqtt_gateway import RunningGateway, in_own_thread
from support.upstreams import upstream_toml, write_credentials

from birthmark.broker.config import read_settings
from birthmark.broker.run_command import compose
from birthmark.device.durable import private_folder
from birthmark.device.fleet_policy import SignedPolicy, policy_transcript
from birthmark.device.messages import GatewayStatus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from support.pki import Authority, Pki

    from birthmark.broker.gateway import Gateway

DEVICES = 'publish = ["devices/{id}/#"]\nsubscribe = ["devices/{id}/#", "fleet/announcements/#"]\n'
OTHERS = """
[roles.operator]
publish = ["devices/+/commands/#", "fleet/#", "gateway/+/crl", "elsewhere/#"]
subscribe = ["devices/#", "fleet/#", "gateway/#"]

[roles.service-gateway]
publish = ["devices/#", "gateway/#"]
subscribe = ["devices/#", "fleet/#", "gateway/#"]

[[assignments]]
ou = "operator"
role = "operator"

[[assignments]]
ou = "service-gateway"
role = "service-gateway"

[[assignments]]
cn = "*"
role = "device"
"""
POLICY = f"[roles.device]\n{DEVICES}{OTHERS}"


def signed_policy(
    signer: Authority, version: int, text: str = POLICY, *, issued_at: int = 1_800_000_000, issuer: str = ""
) -> bytes:
    """A policy as the station publishes it; `issuer` is whom it names, by default the signer."""
    assert isinstance(signer.key, ec.EllipticCurvePrivateKey)
    content = text.encode()
    signature = signer.key.sign(policy_transcript(version, issued_at, content), ec.ECDSA(hashes.SHA256()))
    return SignedPolicy(version, issued_at, issuer or signer.issuer_id, content, signature).to_bytes()


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_gateway(folder: Path, pki: Pki, name: str = "gw-1", toml: str = "") -> Path:
    """Write everything that a gateway needs to a folder; return its broker.toml."""
    folder.mkdir(exist_ok=True)
    pki.write_broker_files(folder, "localhost", "127.0.0.1")
    (folder / "policy.toml").write_text(POLICY)
    path = folder / "broker.toml"
    head = f'name = "{name}"\nlisten = "127.0.0.1:0"\n'
    path.write_text(f"{head}[revocation]\nwatch_interval_s = 0.02\n{toml}")
    return path


def write_member(folder: Path, pki: Pki, name: str, *ports: int, **changes: Any) -> Path:
    """As `write_gateway`, with an upstream of the fleet on these ports; `changes` are keys of its table."""
    folder.mkdir(exist_ok=True)
    write_credentials(folder, pki, name)
    return write_gateway(folder, pki, name, upstream_toml(name, *ports, **{"fleet": True, **changes}))


@dataclass(kw_only=True)
class Member(RunningGateway):
    """A whole gateway."""

    gateway: Gateway

    def knows(self, identity: str, number: int) -> None:
        """Wait until it has heard of a visit elsewhere."""
        visits = self.gateway._visits
        assert visits is not None
        self.wait_for(lambda: visits._heard.get(identity, 0) >= number, f"visit {number} elsewhere")


def told_by(member: Member) -> GatewayStatus:
    """What a gateway says of itself; to be called in its own thread."""
    return GatewayStatus.from_bytes(member.broker.own_retained(f"gateway/{member.broker.settings.name}/status")[0])


@contextmanager
def running_member(config: Path, pki: Pki) -> Iterator[Member]:
    """Run the gateway of a broker.toml, composed as the command composes it; it must stop in good order."""

    @asynccontextmanager
    async def serving(stop: asyncio.Event) -> AsyncIterator[Member]:
        settings = read_settings(config)
        private_folder(settings.data_folder)
        gateway, broker = compose(settings, stop)
        await broker.start()
        port, loop = broker.addresses[0][1], asyncio.get_running_loop()
        yield Member(config.parent, pki, port, broker=broker, loop=loop, revoked=set(), gateway=gateway)
        await gateway.stop()
        await broker.shutdown()

    with in_own_thread(serving) as member:
        yield member
