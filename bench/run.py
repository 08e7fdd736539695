"""`make bench`: what this machine does in a second, beside the floor that its libraries set.

Run as `python -m bench.run`; `BENCH=json` prints JSON lines. Each figure is the median of `ROUNDS` rounds of
`ROUND_S` seconds; client and broker share the machine. A figure says something only beside its floor, from the
same run.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import socket
import ssl
import statistics
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID

from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.identity import DeviceId, Role
from birthmark.provisioning import profile
from birthmark.provisioning.issuing import issue_operator
from birthmark.provisioning.station import Station
from demo.prober import Prober
from demo.processes import Stage

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS, ROUND_S = 5, 1.0
HOST = "127.0.0.1"


def measure(name: str, once: Callable[[], object], *, floor: float | None = None) -> float:
    """Do something for a few rounds, print how often a second it was done, and return that."""
    rates = []
    for _ in range(ROUNDS):
        count, begun_s = 0, time.perf_counter()
        while (elapsed_s := time.perf_counter() - begun_s) < ROUND_S:
            once()
            count += 1
        rates.append(count / elapsed_s)
    rate = statistics.median(rates)
    record = {
        "bench": name,
        "per_second": round(rate, 1),
        "lowest": round(min(rates), 1),
        "highest": round(max(rates), 1),
    }
    if floor is not None:
        record["of_floor"] = round(rate / floor, 3)
    if os.environ.get("BENCH") == "json":
        print(json.dumps(record), flush=True)
    else:
        share = "" if floor is None else f"{rate / floor:>8.1%} of the floor"
        print(f"{name:<58}{rate:>9.0f} /s{share}", flush=True)
    return rate


def certificates(station: Station, folder: Path) -> None:
    """Measure certificates: the bare libraries, our profile, and durably issued ones."""
    key, name = generate_private_key(SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "floor")])
    now = datetime.now(UTC).replace(microsecond=0)

    def bare() -> None:
        builder = x509.CertificateBuilder(name, name, generate_private_key(SECP256R1()).public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now)
        builder.not_valid_after(now + timedelta(days=1)).sign(key, SHA256())

    def by_profile() -> None:
        profile.device_certificate(
            issuer,
            organization="Bench",
            device_id=DeviceId("sensor-1"),
            role=Role("sensor"),
            public_key=generate_private_key(SECP256R1()).public_key(),
            cert_serial=profile.new_cert_serial(secrets.token_bytes),
            lifetime=timedelta(days=730),
            now=now,
        )

    def durably() -> None:
        issue_operator(station, f"bench-{secrets.token_hex(8)}", folder / "issued")

    root = profile.root_certificate(key, organization="Bench", cert_serial=x509.random_serial_number(), now=now)
    issuer = profile.Issuer(root, key)
    floor = measure("certificates: P-256 key and signature, bare (floor)", bare)
    measure("certificates: the same by the whole profile", by_profile, floor=floor)
    measure("certificates: recorded, signed, written, each fsynced", durably, floor=floor)


def connections(stage: Stage) -> None:
    """Measure connections to a gateway, one after the other."""
    identity, anchors = stage.folder / "operator" / "bench.pem", stage.folder / "operator" / "ca.pem"
    server = stage.folder / "gateway" / "server.pem"
    floor_port = _bare_tls(server, stage.folder / "gateway" / "clients-ca.pem")
    broker = stage.start("broker", f"birthmark-broker run --config gateway/broker.toml --listen {HOST}:0 --json")
    ready = broker.wait_for("ready", lambda record: record.get("event") == "ready", timeout_s=20)
    address = BrokerAddress(HOST, ready.record["listen"][0]["port"])
    credentials = Credentials.from_files(identity, anchors, address)
    prober = Prober(address, credentials, b"", "bench:1")

    def bare() -> None:
        with socket.create_connection((HOST, floor_port)) as raw:
            context = prober._context("1.3")
            with context.wrap_socket(raw, server_hostname=HOST) as tls:
                tls.recv(1)

    def full() -> None:
        if not prober.connect("1.3")["accepted"]:
            raise RuntimeError("the broker did not let us in")
        prober.leave()

    def resumed() -> None:
        answer = prober.resume("1.3")
        if not (answer["accepted"] and answer["resumed"]):
            raise RuntimeError("the broker did not resume the session")
        prober.leave()

    floor = measure("connections: mutual TLS 1.3 by OpenSSL alone (floor)", bare)
    measure("connections: the same, judged, to CONNACK", full, floor=floor)
    measure("connections: resumed, judged, to CONNACK", resumed, floor=floor)


def _bare_tls(server_pem: Path, clients_ca_pem: Path) -> int:
    """Answer every TLS client with one byte, on a thread; return the port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server_pem)
    context.load_verify_locations(clients_ca_pem)
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    listening = socket.create_server((HOST, 0))

    def serve() -> None:
        while True:
            accepted, _ = listening.accept()
            with accepted, context.wrap_socket(accepted, server_side=True) as tls:
                tls.send(b"\0")

    threading.Thread(target=serve, daemon=True).start()
    port: int = listening.getsockname()[1]
    return port


def main() -> int:
    """Measure everything."""
    folder = Path(tempfile.mkdtemp(prefix="birthmark-bench-"))
    passphrase = secrets.token_urlsafe(24)
    stage = Stage(folder, {"BIRTHMARK_PASSPHRASE": passphrase, "BIRTHMARK_STATION": "station"})
    if os.environ.get("BENCH") != "json":
        print(f"Python {platform.python_version()}, {ssl.OPENSSL_VERSION}, {os.cpu_count()} CPUs\n")
    try:
        stage.run("init", "birthmark init --organization Bench --json")
        stage.run("issue-broker", f"birthmark issue-broker gateway-1 {HOST} --out gateway --json")
        stage.run("broker-init", "birthmark-broker init --folder gateway --json")
        stage.run("issue-operator", "birthmark issue-operator bench --out operator --json")
        station = Station.open(folder / "station", passphrase=passphrase.encode())
        certificates(station, folder)
        connections(stage)
    finally:
        stage.stop()
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
