"""What connections that come to nothing leave behind at the gateway: nothing.

Memory and descriptors are those of a real process. A session or a task that stayed would hold a descriptor or be
counted in the status; tasks are looked at once more inside a gateway of this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.mqtt_client import ConnectionEndedError, RawClient
from support.mqtt_gateway import running_gateway
from support.mqtt_process import BROKER_TOML
from support.mqtt_world import process_world
from support.patience import PATIENCE_S
from support.pki import Pki
from support.vitals import Vitals, wait_for_descriptors

from birthmark.broker.config import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.mqtt_gateway import World
    from support.mqtt_world import ProcessWorld

pytestmark = pytest.mark.proof

WHOLE = os.environ.get("BIRTHMARK_PROOF") == "whole"
HALF_OPEN, SILENT, RAPID, REFUSED = (200, 50, 1_000, 300) if WHOLE else (200, 50, 200, 100)
MAX_GROWTH_BYTES = 20 * 1_048_576
CLAIMED_256_MB = b"\x30\xff\xff\xff\x7f" + mqtt.text("devices/sensor-1/telemetry/t")
TIMEOUT_S = 5.0
"""Short of what a good client needs on no machine: that one is cut off would be the fault of neither."""

LIMITS_TOML = f"""{BROKER_TOML}
[limits]
handshake_timeout_s = {TIMEOUT_S}
connect_timeout_s = {TIMEOUT_S}
"""


def client_hello() -> bytes:
    """The first bytes that a client says."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    shaking = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        shaking.do_handshake()
    return outgoing.read()


def half_open(world: World) -> list[RawClient]:
    """TCP connections that say nothing, a part of a ClientHello, or a whole one and no more."""
    hello = client_hello()
    opened = []
    for number in range(HALF_OPEN):
        client = RawClient(socket.create_connection(("127.0.0.1", world.port), timeout=PATIENCE_S))
        client.send((b"", hello[:20], hello)[number % 3])
        opened.append(client)
    return opened


def silent(world: World) -> list[RawClient]:
    """Good handshakes, and then silence, or the beginning of a CONNECT."""
    opened = []
    for number in range(SILENT):
        client = RawClient.connect(world.port, world.context("sensor-1"))
        client.send(mqtt.connect("sensor-1")[: number % 9] or b"\x10")
        opened.append(client)
    return opened


def claimed(world: World) -> list[RawClient]:
    """A packet of 256 MB announced, before a CONNECT and after it; and as much of it as is taken."""
    opened = []
    for hello in (b"", mqtt.connect("sensor-1")):
        client = RawClient.connect(world.port, world.context("sensor-1"))
        client.send(hello)
        with contextlib.suppress(OSError):
            client.send(CLAIMED_256_MB)
            for _ in range(64):
                client.send(bytes(1_048_576))
        opened.append(client)
    return opened


def rapid(world: World) -> list[RawClient]:
    """Connects one after the other: some say goodbye, some vanish, some do not even wait for an answer."""
    context = world.context("sensor-1")
    session = None
    for number in range(RAPID):
        with RawClient.connect(world.port, context, session=session) as client:
            client.send(mqtt.connect("sensor-1", clean=number % 2 == 0))
            if number % 3:
                client.read()
                session = client.tls.session
            if number % 3 == 1:
                client.send(mqtt.DISCONNECT)
    with RawClient.connect(world.port, context) as client:
        client.send(mqtt.connect("sensor-1", clean=True))  # the last word: no session is to stay
        client.read()
    return []


def refused(world: World) -> list[RawClient]:
    """By client id, by a will, by the certificate."""
    good, evil = world.context("sensor-1"), world.context_of(world.pki.issuing.issue(cns=["a/b"]))
    for number in range(REFUSED):
        will = ("devices/other/status", b"x", 0, False)
        hello = (mqtt.connect(f"other-{number}"), mqtt.connect("sensor-1", will=will))[number % 2]
        with (
            RawClient.connect(world.port, evil if number % 3 == 0 else good) as client,
            contextlib.suppress(ConnectionEndedError, OSError),
        ):
            client.send(hello)
            assert client.read().body[1] in (2, 5)
    return []


ATTACKS: dict[str, Callable[[World], list[RawClient]]] = {
    "half-open handshakes": half_open,
    "silent TLS clients": silent,
    "a claimed packet of 256 MB": claimed,
    "rapid connects": rapid,
    "refused connects": refused,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessWorld]:
    with process_world(tmp_path_factory.mktemp("gateway"), Pki.create(), broker_toml=LIMITS_TOML) as running:
        ATTACKS["refused connects"](running)  # so that what is made once is there
        yield running


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_nothing_is_left_behind(
    world: ProcessWorld, attack: Callable[[World], list[RawClient]], proven: Callable[[str], None]
) -> None:
    pid = world.broker.process.pid
    with world.client("bystander") as bystander:
        before = Vitals.of(pid)
        sessions = world.status().sessions
        opened = attack(world)
        bystander.ping()  # while they are there
        try:
            wait_for_descriptors(pid, before.descriptors)  # it is the gateway that ends them
        finally:
            for client in opened:
                client.close()
        grown_bytes = Vitals.of(pid).resident_bytes - before.resident_bytes
        assert grown_bytes < MAX_GROWTH_BYTES
        proven(f"no descriptor and no session left, memory {grown_bytes / 1024:+,.0f} KB")
        bystander.ping()
        after = world.status()
        assert after.sessions == sessions
        assert after.counters["defects"] == 0


def test_no_task_and_no_session_is_left_behind(tmp_path: Path) -> None:
    limits = Limits(handshake_timeout_s=TIMEOUT_S, connect_timeout_s=TIMEOUT_S)
    with running_gateway(tmp_path, Pki.create(), limits=limits) as gateway:

        def tasks() -> int:
            return len(asyncio.all_tasks(gateway.loop))

        before = gateway.call(tasks)
        opened = [client for attack in ATTACKS.values() for client in attack(gateway)]
        for client in opened:
            client.close()
        gateway.wait_for(lambda: len(gateway.broker._connections) == 0, "every connection is over")
        gateway.wait_for(lambda: len(gateway.broker.exchange.sessions) == 0, "no session is left")
        gateway.wait_for(lambda: tasks() == before, "no task is left")
        assert gateway.broker.exchange.router.count == 0
        assert gateway.broker.counters.defects == 0
