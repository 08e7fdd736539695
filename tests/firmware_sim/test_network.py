"""The bad network: what it does to TCP, and what it must never do."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from typing import TYPE_CHECKING

import pytest
from support.patience import PATIENCE_S
from support.ports import steady_port

from birthmark.device.errors import ConfigurationError
from birthmark.firmware_sim.network import NetworkFaults, Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator


class Echo:
    """A server that sends back what comes, and counts who came."""

    def __init__(self) -> None:
        self.came = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.came += 1
                threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                connection.sendall(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


def connected(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE_S)


def gets_through(proxy: Proxy) -> bool:
    try:
        with connected(proxy) as client:
            client.sendall(b"x")
            return client.recv(1) == b"x"
    except ConnectionError:
        return False


def through(client: socket.socket, data: bytes) -> bytes:
    """Send, and read as much as was sent."""
    sending = threading.Thread(target=client.sendall, args=(data,))
    sending.start()
    got = b""
    while len(got) < len(data):
        piece = client.recv(65536)
        assert piece, "it was closed"
        got += piece
    sending.join()
    return got


@pytest.mark.parametrize("faults", [[], ["latency=5", "jitter=10"], ["loss=0.2"]], ids=str)
def test_bytes_arrive_whole_and_in_order(echo: Echo, faults: list[str]) -> None:
    data = random.Random(7).randbytes(300_000)
    with Proxy("127.0.0.1", echo.port, NetworkFaults.parse(faults)) as proxy, connected(proxy) as client:
        assert through(client, data) == data
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        assert proxy.resets == 0


def test_some_are_refused_and_with_the_same_seed_the_same(echo: Echo) -> None:
    seen = []
    for _ in range(2):
        came = echo.came
        with Proxy("127.0.0.1", echo.port, NetworkFaults.parse(["refuse=0.5"]), seed=3) as proxy:
            got = [gets_through(proxy) for _ in range(20)]
        assert 0 < sum(got) < 20
        assert (proxy.resets, echo.came - came) == (20 - sum(got), sum(got))
        seen.append(got)
    assert seen[0] == seen[1]


def test_a_connection_is_reset(echo: Echo) -> None:
    with (
        Proxy("127.0.0.1", echo.port, NetworkFaults.parse(["cut=0.02"])) as proxy,
        connected(proxy) as client,
        pytest.raises(ConnectionResetError),
    ):
        client.recv(1)


def test_a_connection_falls_silent_and_stays(echo: Echo) -> None:
    with Proxy("127.0.0.1", echo.port, NetworkFaults.parse(["stall=0.02"])) as proxy, connected(proxy) as client:
        client.settimeout(0.3)
        silent = False
        for _ in range(10_000):
            client.sendall(b"x")
            try:
                assert client.recv(1) == b"x"
            except TimeoutError:
                silent = True
                break
        assert silent
        client.sendall(b"x")  # it still takes what is sent
        assert proxy.resets == 0


def test_an_outage_resets_and_refuses_and_ends(echo: Echo) -> None:
    with Proxy("127.0.0.1", echo.port, NetworkFaults.parse(["outage=2@4"])) as proxy:
        with connected(proxy) as client:
            assert through(client, b"before") == b"before"
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        came = echo.came
        assert not gets_through(proxy), "the outage had begun"
        assert echo.came == came
        for _ in range(100_000):
            if gets_through(proxy):
                break
        else:
            pytest.fail("the outage never ended")


def test_who_waits_for_the_broker_is_reset_too(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    dialled = threading.Event()

    async def never(*_: object) -> None:
        dialled.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio, "open_connection", never)
    proxy = Proxy("127.0.0.1", echo.port, NetworkFaults())
    with proxy:
        client = connected(proxy)
        assert dialled.wait(PATIENCE_S)
    with client, pytest.raises(ConnectionResetError):
        client.recv(1)


def test_a_broker_that_is_not_there(echo: Echo) -> None:
    with Proxy("127.0.0.1", steady_port(), NetworkFaults()) as proxy:
        assert not gets_through(proxy)
        assert proxy.resets == 1


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("rain=1", "there are: latency, "),
        ("loss=1", "write loss=P: a chunk is lost"),
        ("loss=-0.1", "write loss=P"),
        ("loss=nan", "write loss=P"),
        ("latency", "write latency=MS"),
        ("latency=fast", "write latency=MS"),
        ("cut=inf", "write cut=S"),
        ("outage=10", "write outage=S@EVERY"),
        ("outage=60@10", "write outage=S@EVERY"),
    ],
)
def test_faults_that_are_none(text: str, hint: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        NetworkFaults.parse([text])
    assert caught.value.hint.startswith(hint)


def test_only_loopback() -> None:
    with pytest.raises(ConfigurationError, match="it is not on this machine"):
        Proxy("192.0.2.1", 8883, NetworkFaults())
    with pytest.raises(ConfigurationError, match="it is no host name"):
        Proxy("a..b", 8883, NetworkFaults())


@pytest.mark.parametrize(("at_s", "is_out"), [(0, False), (49.9, False), (50, True), (59.9, True), (60, False)])
def test_when_an_outage_is(at_s: float, is_out: bool) -> None:
    assert NetworkFaults.parse(["outage=10@60"]).is_out(at_s) is is_out
