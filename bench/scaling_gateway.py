"""What one gateway holds and spends: sessions, messages that wait, CRLs of any size; a process on loopback.

Memory is what would come back if the process ended, and CPU is that of all its threads, both from the kernel, once
it is idle; on disk is what its store has in use.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import statistics
import tempfile
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, Final, Self

from cryptography import x509

from bench.fleet import Fleet, Spent, raise_file_limit
from bench.fleet_pki import client_context
from bench.peers import BIRTHMARK, peer
from bench.wire import BenchError, Loop, Publisher, Wire
from birthmark.broker.packets import remaining_length, topic_field

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from bench.fleet_pki import FleetPki
    from bench.peers import Peer

WARM_UP: Final = 20
ROUNDS: Final = 5
EACH: Final = 20
"""Messages that wait for a device."""
PAYLOAD_BYTES: Final = 100
IN_TURN: Final = 8
SINGLY: Final = 20
"""CRLs with one more revocation each."""
DEADLINE_S: Final = 300.0
_PINGREQ: Final = b"\xc0\0"
_LOOK_S: Final = 0.005


def sessions(pki: FleetPki, count: int, say: Callable[[str], None]) -> dict[str, float]:
    """Measure what a session costs: connected, gone, with messages waiting, and coming back."""
    identities = [pki.client(f"scale-{number:05}") for number in range(count)]
    raise_file_limit(2 * count + 100)
    found: dict[str, float] = {}
    with peer(BIRTHMARK, pki.folder) as broker:
        _visit(Fleet(broker.port, pki.folder / "root.pem", identities[:WARM_UP]))
        fleet = Fleet(broker.port, pki.folder / "root.pem", identities)
        say(f"{count} sessions: connected")
        before = Spent.by(broker.pid)
        fleet.connect(at_once=IN_TURN)
        found["connected_bytes"] = (Spent.by(broker.pid).private_kb - before.private_kb) * 1024 / count
        found["spread_us"] = _spread(pki, broker, fleet, count)
        fleet.leave()
        before = Spent.by(broker.pid)  # it knows them now
        _visit(fleet)
        after = Spent.by(broker.pid)
        _visit(fleet, resume=True)
        found["visit_full_us"] = (after.cpu_us - before.cpu_us) / count
        found["visit_resumed_us"] = (Spent.by(broker.pid).cpu_us - after.cpu_us) / count
    say(f"{count} sessions: gone, and kept")
    with peer(BIRTHMARK, pki.folder) as broker:  # another one: what was freed would be used again, and not show
        _visit(Fleet(broker.port, pki.folder / "root.pem", identities[:WARM_UP]))
        return found | _kept(pki, broker, identities[WARM_UP:])


def _visit(fleet: Fleet, *, resume: bool = False) -> None:
    fleet.connect(at_once=IN_TURN, resume=resume)
    fleet.leave()


def _spread(pki: FleetPki, broker: Peer, fleet: Fleet, count: int) -> float:
    """Have every device publish `ROUNDS` times in turn; return the gateway's CPU for a message, in µs."""
    operator = Wire(client_context(pki.folder, pki.client("op-0", "operator")), broker.port, "op-0")
    operator.subscribe(["devices/+/telemetry/a"], 0)
    payload = bytes(PAYLOAD_BYTES)

    def packet(name: str) -> bytes:
        variable = topic_field(f"devices/{name}/telemetry/a") + b"\0\1"
        return b"\x32" + remaining_length(len(variable) + len(payload)) + variable + payload

    before = Spent.by(broker.pid)
    for _ in range(ROUNDS):
        fleet.send(packet)
        operator.take(count * (len(packet("scale-00000")) - 2))  # without the packet identifier
    spent_us = Spent.by(broker.pid).cpu_us - before.cpu_us
    operator.close()
    return spent_us / count / ROUNDS


def _kept(pki: FleetPki, broker: Peer, identities: Sequence[Path]) -> dict[str, float]:
    data, count = pki.folder / f"{BIRTHMARK}-data", len(identities)
    before, on_disk = Spent.by(broker.pid), _octets(data)
    for identity in identities:
        wire = Wire(client_context(pki.folder, identity), broker.port, identity.stem, clean=False)
        wire.subscribe([f"devices/{identity.stem}/commands/#"], 1)
        wire.close()
    gone, gone_on_disk = Spent.by(broker.pid), _octets(data)
    topics = [f"devices/{identity.stem}/commands/a" for identity in identities]
    operator = Wire(client_context(pki.folder, pki.client("op-0", "operator")), broker.port, "op-0")
    loop = Loop()
    publisher = Publisher(operator, loop, topics, PAYLOAD_BYTES, 1, sender=0)
    deadline_s = time.monotonic() + DEADLINE_S
    while publisher.acknowledged < count * EACH:
        if publisher.sent < count * EACH and publisher.sent - publisher.acknowledged < 64:
            publisher.publish(min(32, count * EACH - publisher.sent))
        loop.turn(1.0)
        if time.monotonic() > deadline_s:
            raise BenchError(f"{publisher.acknowledged} of {count * EACH} messages were acknowledged")
    waiting, waiting_on_disk = Spent.by(broker.pid), _octets(data)
    loop.close()
    return {
        "offline_bytes": (gone.private_kb - before.private_kb) * 1024 / count,
        "offline_disk_bytes": (gone_on_disk - on_disk) / count,
        "waiting_bytes": (waiting.private_kb - gone.private_kb) * 1024 / count / EACH,
        "waiting_disk_bytes": (waiting_on_disk - gone_on_disk) / count / EACH,
    }


def revocations(pki: FleetPki, count: int, entries: int, say: Callable[[str], None]) -> dict[str, float]:
    """Measure what a CRL costs beside `count` sessions: a small one, one that ends many sessions, a large one."""
    identities = [pki.client(f"scale-{number:05}") for number in range(count)]
    raise_file_limit(2 * count + 100)
    data = pki.folder / f"{BIRTHMARK}-data"
    found: dict[str, float] = {}
    with peer(BIRTHMARK, pki.folder) as broker:
        fleet = Fleet(broker.port, pki.folder / "root.pem", identities)
        fleet.connect(at_once=IN_TURN)
        serials = [_cert_serial(identity) for identity in identities]

        def install(number: int, listed: Sequence[int]) -> tuple[float, float]:
            """Bring a CRL; return the seconds until its receipt, and the gateway's CPU."""
            crl = pki.new_crl(number, listed)
            before = Spent.by(broker.pid)
            beside = data / "crl.new"
            beside.write_bytes(crl)
            begun_s = time.perf_counter()
            os.replace(beside, data / "crl.pem")  # noqa: PTH105 - what a station does
            _receipt(data / "crl.pem.receipt", number)
            taken_s = time.perf_counter() - begun_s
            return taken_s, Spent.by(broker.pid).cpu_us - before.cpu_us

        say(f"{SINGLY} CRLs, each with one revocation more")
        singly = [install(10 + number, serials[: number + 1]) for number in range(SINGLY)]
        found["crl_small_s"] = statistics.median(taken_s for taken_s, _ in singly)
        found["crl_small_us"] = statistics.median(cpu_us for _, cpu_us in singly)
        many = count // 2
        say(f"a CRL that ends {many - SINGLY} sessions")
        found["crl_many_s"], cpu_us = install(100, serials[:many])
        found["closed_session_us"] = (cpu_us - found["crl_small_us"]) / (many - SINGLY)
        say(f"a CRL of {entries:,} entries, with {count - many} sessions")
        padding = [(1 << 158) + number for number in range(entries - many)]
        memory = Spent.by(broker.pid).private_kb
        with _Pinging(pki, broker) as pinging:
            found["crl_large_s"], cpu_us = install(200, [*serials[:many], *padding])
        found["crl_large_us"] = cpu_us
        found["crl_large_stall_s"] = pinging.longest_s
        found["crl_large_bytes"] = (data / "crl.pem").stat().st_size
        found["crl_large_memory_bytes"] = (Spent.by(broker.pid).private_kb - memory) * 1024
        found["crl_large_entries"] = entries
        fleet.close()
    return found


class _Pinging(threading.Thread):
    """A client that pings all the time; how long it waited at most is how long the gateway did nothing else."""

    def __init__(self, pki: FleetPki, broker: Peer) -> None:
        super().__init__(daemon=True)
        self._wire = Wire(client_context(pki.folder, pki.client("op-0", "operator")), broker.port, "op-0")
        self._over = threading.Event()
        self.longest_s = 0.0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
        self._wire.close()

    def run(self) -> None:
        self._wire.sock.settimeout(DEADLINE_S)
        while not self._over.is_set():
            begun_s = time.perf_counter()
            self._wire.sock.sendall(_PINGREQ)
            if len(self._wire.sock.recv(2)) < 1:
                return
            self.longest_s = max(self.longest_s, time.perf_counter() - begun_s)
            self._over.wait(_LOOK_S)


def _receipt(path: Path, number: int) -> None:
    """Wait for the receipt of the CRL with this number."""
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        try:
            receipt = json.loads(path.read_bytes())
        except (OSError, ValueError):
            receipt = {}
        if receipt.get("crl_number") == number:
            if receipt.get("outcome") != "installed":
                raise BenchError(f"the gateway has not installed CRL {number}: {receipt}")
            return
        time.sleep(_LOOK_S)  # nothing tells a station when a gateway has written a file, either
    raise BenchError(f"there is no receipt for CRL {number}")


def _cert_serial(identity: Path) -> int:
    return x509.load_pem_x509_certificate(identity.read_bytes()).serial_number


def _octets(folder: Path) -> int:
    """Return how much the gateway's store holds: its pages in use, wherever SQLite keeps them just now."""
    with tempfile.TemporaryDirectory() as name:
        for path in folder.rglob("sessions.db*"):  # a copy: the gateway lets nobody else look into it
            if not path.name.endswith("-shm"):
                shutil.copy(path, name)
        with closing(sqlite3.connect(f"{name}/sessions.db")) as store:
            asked = ("page_count", "freelist_count", "page_size")
            pages, free, size = (store.execute(f"PRAGMA {what}").fetchone()[0] for what in asked)
    return int((pages - free) * size)
