"""A gateway for tests: a real `GatewayBroker` in a thread of its own, on a free port, with a test PKI."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from support.mqtt_client import RawClient, client_context, connect
from support.patience import PATIENCE_S
from support.waiting import until

from birthmark.broker.config import BrokerSettings, Limits, OnDenied
from birthmark.broker.event_loop import run_loop
from birthmark.broker.peer import Peer, PeerRefusedError, check_peer
from birthmark.broker.policy_file import parse_policy
from birthmark.broker.server import GatewayBroker
from birthmark.broker.tls import server_context
from birthmark.broker.trust import Trust
from birthmark.device.identity import BrokerName

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from support.pki import Issued, Pki

    from birthmark.broker.policy import Policy

T = TypeVar("T")
G = TypeVar("G", bound="RunningGateway")

POLICY_TOML = b"""
[roles.device]
publish = ["devices/{id}/#"]
subscribe = ["devices/{id}/#", "fleet/announcements/#"]

[roles.free]
publish = ["#"]
subscribe = ["#", "$SYS/#"]

[roles.operator]
publish = ["devices/+/commands/#", "fleet/#", "gateway/+/crl"]
subscribe = ["devices/#", "fleet/#", "gateway/#", "$SYS/#"]

[[assignments]]
ou = "operator"
role = "operator"

[[assignments]]
cn = "free-*"
role = "free"

[[assignments]]
ou = "device"
role = "device"
"""


def policy(text: bytes = POLICY_TOML) -> Policy:
    return parse_policy(text, "policy.toml")


@dataclass
class World:
    """A broker on loopback with a test PKI, and the clients that tests open to it."""

    folder: Path
    pki: Pki
    port: int
    clients: list[RawClient] = field(default_factory=list)
    _contexts: dict[str, ssl.SSLContext] = field(default_factory=dict)

    def context(self, name: str = "sensor-1", role: str = "device", **options: Any) -> ssl.SSLContext:
        """The TLS context of an identity, issued when first asked for."""
        key = f"{name}/{role}/{options}"
        if key not in self._contexts:
            self._contexts[key] = self.context_of(self.pki.device(name, role), **options)
        return self._contexts[key]

    def context_of(self, issued: Issued, **options: Any) -> ssl.SSLContext:
        path = issued.write(self.folder / f"{issued.cert_serial:x}.pem")
        return client_context(path, self.folder / "root.pem", **options)

    def open(self, context: ssl.SSLContext, **options: Any) -> RawClient:
        """A TLS connection; closed when the world ends."""
        client = RawClient.connect(self.port, context, **options)
        self.clients.append(client)
        return client

    def client(
        self, name: str = "sensor-1", role: str = "device", *, present: bool = False, **options: Any
    ) -> RawClient:
        """A client that has connected; options are those of CONNECT."""
        client_id = options.pop("client_id", name)
        return self.open(self.context(name, role)).handshake(connect(client_id, **options), present=present)

    def close_clients(self) -> None:
        for client in self.clients:
            client.close()


@dataclass(kw_only=True)
class RunningGateway(World):
    """Our broker, in a thread of this process."""

    broker: GatewayBroker
    loop: asyncio.AbstractEventLoop
    revoked: set[int]

    def call(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Call something of the broker in its own thread."""

        async def run() -> T:
            return function(*arguments, **named)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(PATIENCE_S)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until something is true in the broker's thread."""

        try:
            asyncio.run_coroutine_threadsafe(until(condition), self.loop).result(2 * PATIENCE_S)
        except TimeoutError:
            raise AssertionError(f"not in time: {what}") from None


def settings(folder: Path, limits: Limits, **changes: Any) -> BrokerSettings:
    values: dict[str, Any] = {
        "name": BrokerName("localhost"),
        "listen_host": "127.0.0.1",
        "listen_port": 0,
        "credentials_path": folder / "server.pem",
        "clients_ca_path": folder / "clients-ca.pem",
        "crl_path": folder / "crl.pem",
        "policy_path": folder / "policy.toml",
        "data_folder": folder / "data",
        "on_denied": OnDenied.DROP,
        "limits": limits,
    }
    return BrokerSettings(**values | changes)


@contextmanager
def running_gateway(
    folder: Path,
    pki: Pki,
    *,
    limits: Limits | None = None,
    policy_toml: bytes = POLICY_TOML,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    plugins: dict[str, dict[str, Any]] | None = None,
    **changes: Any,
) -> Iterator[RunningGateway]:
    """Run a gateway; it must stop in good order at the end."""
    pki.write_broker_files(folder)
    trust = Trust.from_pem(pki.issuing.pem)
    revoked: set[int] = set()

    def admit(leaf_der: bytes) -> Peer:
        peer = check_peer(leaf_der, trust, clock())
        if peer.cert_serial in revoked:
            raise PeerRefusedError("revoked", f"{peer.device_id} is revoked")
        return peer

    @asynccontextmanager
    async def serving(_stop: asyncio.Event) -> AsyncIterator[RunningGateway]:
        broker = GatewayBroker(
            settings(folder, limits or Limits(), **changes),
            server_context(folder / "server.pem", folder / "clients-ca.pem"),
            admit,
            policy(policy_toml),
            plugins=plugins or {},
        )
        await broker.start()
        port, loop = broker.addresses[0][1], asyncio.get_running_loop()
        yield RunningGateway(folder, pki, port, broker=broker, loop=loop, revoked=revoked)
        await broker.shutdown()

    with in_own_thread(serving) as gateway:
        yield gateway


@contextmanager
def in_own_thread(serving: Callable[[asyncio.Event], AbstractAsyncContextManager[G]]) -> Iterator[G]:
    """Run a gateway in a thread of its own, until the test is over; it must start, serve and stop in good order.

    Args:
        serving: starts the gateway, and stops it on leaving. It is given the event that is set at the end.
    """
    started: Future[tuple[G, asyncio.Event]] = Future()
    failures: list[BaseException] = []

    def report(_loop: asyncio.AbstractEventLoop, details: dict[str, Any]) -> None:
        failures.append(details.get("exception") or AssertionError(details["message"]))

    async def serve() -> None:
        # An exception in a callback is a defect, whatever the test was about.
        asyncio.get_running_loop().set_exception_handler(report)
        stop = asyncio.Event()
        async with serving(stop) as gateway:
            started.set_result((gateway, stop))
            await stop.wait()
        if gateway.broker.counters.defects:
            failures.append(AssertionError("a defect ended a connection: see the log"))

    def main() -> None:
        try:
            run_loop(serve())
        except BaseException as error:  # noqa: BLE001 - told to the test below
            if started.done():
                failures.append(error)
            else:
                started.set_exception(error)

    thread = threading.Thread(target=main)
    thread.start()
    gateway, stop = started.result(PATIENCE_S)
    try:
        yield gateway
    finally:
        gateway.close_clients()
        gateway.loop.call_soon_threadsafe(stop.set)
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the gateway did not stop"
        if failures:
            raise failures[0]
