"""Many devices at once: raw TLS sockets on one epoll, lean, so that the broker is what is measured.

Rules:

- A device counts as connected when its CONNACK says so; anything else ends the measurement with an error.
- What the broker spends is read from the kernel, of all its threads, in nanoseconds.
"""

from __future__ import annotations

import resource
import select
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.fleet_pki import HOST
from bench.peers import cpu_s
from bench.wire import BenchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

CONNACK: Final = b"\x20\x02\x00\x00"
DISCONNECT: Final = b"\xe0\x00"
KEEPALIVE_S: Final = 3_600
DEADLINE_S: Final = 120.0
STILL_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Spent:
    """What a process has used so far."""

    cpu_us: float
    private_kb: int
    """Memory that would come back if it ended (unique set size)."""

    @classmethod
    def by(cls, pid: int) -> Spent:
        """Read a process's figures, once it does nothing for `STILL_S`."""
        process, before, deadline_s = Path("/proc", str(pid)), -1.0, time.monotonic() + DEADLINE_S
        while (spent_s := cpu_s(pid)) - before > 0.002 and time.monotonic() < deadline_s:
            before = spent_s
            time.sleep(STILL_S)  # nothing tells when a foreign process is idle
        lines = (process / "smaps_rollup").read_text().splitlines()
        return cls(spent_s * 1e6, sum(int(line.split()[1]) for line in lines if line.startswith("Private_")))


def raise_file_limit(wanted: int) -> None:
    """Let this process, and what it starts from now on, open so many files.

    Raises:
        BenchError: the hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise BenchError(f"{wanted} open files are needed, and the hard limit is {hard} (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Device:
    """One device's connection, from connect(2) to CONNACK."""

    __slots__ = ("connect_packet", "has_sent", "identity", "session", "sock")

    def __init__(self, identity: Path) -> None:
        self.identity = identity
        client_id = identity.stem.encode()
        body = b"\x00\x04MQTT\x04\x02" + KEEPALIVE_S.to_bytes(2, "big") + len(client_id).to_bytes(2, "big")
        body += client_id
        self.connect_packet = bytes((0x10, len(body))) + body
        self.session: ssl.SSLSession | None = None
        self.sock: ssl.SSLSocket | None = None
        self.has_sent = False

    def go_on(self, sock: ssl.SSLSocket) -> None:
        """Do what can be done, up to CONNACK; raises `SSLWantReadError` before."""
        if not self.has_sent:
            sock.do_handshake()
            sock.send(self.connect_packet)
            self.has_sent = True
        answer = sock.recv(64)
        if answer != CONNACK:
            raise BenchError(f"{self.identity.stem} was answered {answer.hex() or 'nothing'} instead of CONNACK")


class Fleet:
    """Devices that connect to one broker.

    Args:
        port: the broker's, on the loopback.
        root_path: whom the devices trust.
        identities: each device's key and chain; its id is the file's name.
    """

    def __init__(self, port: int, root_path: Path, identities: Sequence[Path]) -> None:
        self._port = port
        self._devices = [_Device(path) for path in identities]
        self._context = ssl.create_default_context(cafile=str(root_path))

    def connect(self, *, at_once: int, resume: bool = False) -> float:
        """Connect every device, so many at the same time; return the seconds until the last CONNACK.

        Raises:
            BenchError: a device was not let in, did not resume, or it took longer than `DEADLINE_S`.
        """
        begun_s = time.monotonic()
        waiting = iter(self._devices)
        under_way: dict[int, _Device] = {}
        with select.epoll() as epoll:
            while self._start(waiting, under_way, epoll, at_once - len(under_way), resume=resume) or under_way:
                if time.monotonic() - begun_s > DEADLINE_S:
                    raise BenchError(f"{len(under_way)} devices were not let in within {DEADLINE_S:.0f} s")
                for descriptor, _ in epoll.poll(1.0):
                    _step(under_way, descriptor, epoll)
        elapsed_s = time.monotonic() - begun_s
        if resume and not all(device.sock and device.sock.session_reused for device in self._devices):
            raise BenchError("a device did not resume its session")
        return elapsed_s

    def send(self, packet_of: Callable[[str], bytes]) -> None:
        """Send a packet from every device, one after the other."""
        for device in self._devices:
            if device.sock is not None:
                device.sock.settimeout(DEADLINE_S)
                device.sock.send(packet_of(device.identity.stem))

    def close(self) -> None:
        """Close every connection, also those that the broker has ended."""
        for device in self._devices:
            if device.sock is not None:
                device.sock.close()
                device.sock = None

    def leave(self) -> None:
        """Say goodbye and close, every device; each keeps its TLS session."""
        for device in self._devices:
            if device.sock is not None:
                device.session = device.sock.session
                device.sock.settimeout(DEADLINE_S)
                device.sock.send(DISCONNECT)
                device.sock.close()
                device.sock = None

    def _start(
        self,
        waiting: Iterator[_Device],
        under_way: dict[int, _Device],
        epoll: select.epoll,
        room: int,
        *,
        resume: bool,
    ) -> int:
        started = 0
        for _, device in zip(range(room), waiting, strict=False):
            # Each socket gets the certificate that the context holds when it is made.
            self._context.load_cert_chain(device.identity)
            raw = socket.create_connection((HOST, self._port))
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw.settimeout(0)
            device.has_sent = False
            device.sock = self._context.wrap_socket(
                raw,
                server_hostname="localhost",
                do_handshake_on_connect=False,
                session=device.session if resume else None,
            )
            epoll.register(device.sock, select.EPOLLIN)
            under_way[device.sock.fileno()] = device
            _step(under_way, device.sock.fileno(), epoll)
            started += 1
        return started


def _step(under_way: dict[int, _Device], descriptor: int, epoll: select.epoll) -> None:
    device = under_way[descriptor]
    if device.sock is None:
        return
    try:
        device.go_on(device.sock)
    except ssl.SSLWantReadError:
        return
    epoll.unregister(descriptor)
    del under_way[descriptor]
