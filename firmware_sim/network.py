"""A bad network between clients and a broker: a proxy on loopback that does to TCP what networks do.

Rules:

- Bytes are never changed and never reordered: that is TCP's own promise. What is lost on a network arrives late;
  what is lost for good ends the connection, or lets it stand without a word.
- Nothing is read from one side that the other does not take: at most `MAX_HELD` chunks wait in each direction.
- The same seed draws the same misfortunes for the nth connection.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Self

from birthmark.device.errors import ConfigurationError, SystemFailureError
from birthmark.device.escape import quoted

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

MAX_HELD: Final = 64
CHUNK_BYTES: Final = 16_384
FIRST_RETRANSMISSION_S: Final = 0.2
"""Linux's least retransmission time-out; it doubles each time that the copy is lost, too."""
MEANING: Final = {
    "latency": ("MS", "each way takes so long"),
    "jitter": ("MS", "and up to so much more, at random"),
    "loss": ("P", "a chunk is lost with this probability, and comes when TCP has sent it again"),
    "refuse": ("P", "a new connection is closed at once with this probability"),
    "cut": ("S", "a connection is reset after S seconds, on average"),
    "stall": ("S", "a connection falls silent for good after S seconds, on average, and stays open"),
    "outage": ("S@EVERY", "S seconds of every EVERY nobody gets through, and who was there is reset"),
}


@dataclass(frozen=True, slots=True)
class NetworkFaults:
    """What is wrong with a network; by default nothing. Times are in seconds."""

    latency: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    refuse: float = 0.0
    cut: float = 0.0
    stall: float = 0.0
    outage: float = 0.0
    outage_every: float = 0.0

    @classmethod
    def parse(cls, texts: Iterable[str]) -> NetworkFaults:
        """Read faults as they are written on a command line: KIND=VALUE.

        Raises:
            ConfigurationError: there is no such kind, or its value is none.
        """
        found: dict[str, float] = {}
        for text in texts:
            name, _, value = text.partition("=")
            if name not in MEANING:
                raise ConfigurationError(
                    f"could not simulate {quoted(text)}: there is no such fault of a network",
                    hint="there are: " + ", ".join(MEANING),
                )
            try:
                found |= _value(name, value)
            except ValueError:
                how, meaning = MEANING[name]
                raise ConfigurationError(
                    f"could not simulate {quoted(text)}: that is no value for it",
                    hint=f"write {name}={how}: {meaning}",
                ) from None
        return cls(**found)

    @property
    def are_there(self) -> bool:
        """Whether anything is wrong."""
        return any(getattr(self, field.name) for field in fields(self))

    def is_out(self, at_s: float) -> bool:
        """Whether there is an outage, so many seconds after the start. The first comes at the end of a period."""
        return bool(self.outage) and at_s % self.outage_every >= self.outage_every - self.outage


def _value(name: str, value: str) -> dict[str, float]:
    if name == "outage":
        length, at, every = value.partition("@")
        seconds, period = float(length), float(every)
        if not (at and 0 < seconds < period < 1e6):
            raise ValueError(value)
        return {"outage": seconds, "outage_every": period}
    number = float(value)
    is_probability = name in ("loss", "refuse")
    if not 0 < number < (1 if is_probability else 1e6):
        raise ValueError(value)
    return {name: number / 1000 if name in ("latency", "jitter") else number}


class Proxy:
    """A proxy for one broker, on a thread of its own. Use it in a `with` block.

    Args:
        host: the broker's name or address; it has to lead to loopback, so that the broker's certificate, which is
            checked against that name, is the right one for the proxy, too.
        port: the broker's port.
        faults: what is wrong with the network.
        seed: of the misfortunes.

    Raises:
        ConfigurationError: the name does not lead to loopback.
    """

    def __init__(self, host: str, port: int, faults: NetworkFaults, *, seed: int = 0) -> None:
        self._addresses = _loopback(host, port)
        self._broker = (host, port)
        self._faults = faults
        self._seed = seed
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._servers: list[asyncio.Server] = []
        self._live: set[asyncio.Task[None]] = set()
        self._count = 0
        self._is_stopping = False
        self._began_s = 0.0
        self.port = 0
        """Where it listens, on every loopback address of the broker's name."""
        self.resets = 0
        """Connections that it ended."""

    def __enter__(self) -> Self:
        """Listen.

        Raises:
            SystemFailureError: there is no port to listen on.
        """
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        except OSError as error:
            self.__exit__()
            raise SystemFailureError(f"could not listen on loopback: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and end every connection."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        self._began_s = self._loop.time()
        for address in self._addresses:
            server = await asyncio.start_server(self._accepted, address, self.port, backlog=4096)
            self.port = server.sockets[0].getsockname()[1]
            self._servers.append(server)
        if self._faults.outage:
            self._keep(self._outages())

    async def _stop(self) -> None:
        self._is_stopping = True
        for server in self._servers:
            server.close()
        for task in (live := list(self._live)):
            task.cancel()
        await asyncio.gather(*live, return_exceptions=True)

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._live.add(task)
        task.add_done_callback(self._live.discard)
        return task

    async def _outages(self) -> None:
        """Reset everybody as each outage begins."""
        faults = self._faults
        while True:
            since_s = (self._loop.time() - self._began_s) % faults.outage_every
            begins_in_s = (faults.outage_every - faults.outage - since_s) % faults.outage_every
            await asyncio.sleep(begins_in_s or faults.outage_every)
            me = asyncio.current_task()
            for task in [one for one in self._live if one is not me]:
                task.cancel()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._count += 1
        chance = random.Random(f"{self._seed}:{self._count}")
        faults = self._faults
        is_out = faults.is_out(self._loop.time() - self._began_s)
        if is_out or chance.random() < faults.refuse:
            self._reset(writer)
            return
        task = self._keep(self._carry(reader, writer, chance))
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task])

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, chance: random.Random
    ) -> None:
        """Carry one connection both ways until an end closes it, or until its time has come."""
        faults = self._faults
        try:
            there, back = await asyncio.open_connection(*self._broker)
        except OSError:
            self._reset(writer)
            return
        except asyncio.CancelledError:
            self._reset(writer)  # or it would stand open through an outage, and beyond the end
            raise
        silent = asyncio.Event()
        ways = [
            asyncio.ensure_future(_pump(reader, back, faults, chance, silent)),
            asyncio.ensure_future(_pump(there, writer, faults, chance, silent)),
        ]
        if faults.stall:
            self._loop.call_later(chance.expovariate(1 / faults.stall), silent.set)
        lasts_s = chance.expovariate(1 / faults.cut) if faults.cut else None
        was_cut = True
        try:
            done, _ = await asyncio.wait(ways, timeout=lasts_s, return_when=asyncio.FIRST_COMPLETED)
            was_cut = not done
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            if was_cut:
                self._reset(writer)
                _abort(back)
            else:
                writer.close()
                back.close()

    def _reset(self, writer: asyncio.StreamWriter) -> None:
        self.resets += not self._is_stopping
        _abort(writer)


async def _pump(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    faults: NetworkFaults,
    chance: random.Random,
    silent: asyncio.Event,
) -> None:
    """Carry one direction; each chunk has its own time of arrival, and waits for those before it."""
    loop = asyncio.get_running_loop()
    on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_HELD)

    async def deliver() -> None:
        while True:
            due, chunk = await on_the_way.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not chunk:
                return
            if not silent.is_set():
                writer.write(chunk)
                await writer.drain()

    delivering = asyncio.ensure_future(deliver())
    try:
        with suppress(OSError):
            chunk = b"-"
            while chunk and not delivering.done():
                chunk = await reader.read(CHUNK_BYTES)
                await on_the_way.put((loop.time() + _takes_s(faults, chance), chunk))
            await delivering
    finally:
        delivering.cancel()


def _takes_s(faults: NetworkFaults, chance: random.Random) -> float:
    seconds = faults.latency + chance.random() * faults.jitter
    again_s = FIRST_RETRANSMISSION_S
    while chance.random() < faults.loss:
        seconds += again_s
        again_s *= 2
    return seconds


def _abort(writer: asyncio.StreamWriter) -> None:
    """End a connection with a reset, as what stands between does (RFC 9293 §3.5.2)."""
    connection = writer.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _loopback(host: str, port: int) -> list[str]:
    """Return the addresses of a name; all of them have to be loopback's."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is no host name"
        raise ConfigurationError(f"could not find {quoted(host)}: {cause}") from error
    if not all(address == "::1" or address.startswith("127.") for address in found):
        raise ConfigurationError(
            f"could not put a bad network before {quoted(host)}: it is not on this machine",
            hint="the proxy listens on loopback, and the broker's certificate has to fit: run both on one machine",
        )
    return sorted(found)
