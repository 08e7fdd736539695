"""An exported Mosquitto at 10,000 identities: size, and processor time of export, start, reload and a connection.

`python -m support.engine_size [COUNT]` in tests/ prints the figures of docs/engines.md, beside those at 100.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from support import mqtt_client as mqtt
from support.engine_bench import Bench
from support.engines import mosquitto_process
from support.mqtt_client import RawClient, client_context

from birthmark.broker.mosquitto_limits import CODES

ROUNDS, CONNECTIONS = 5, 100
FEW = 100
ACCEPTED = tuple(code for code in CODES if code != "renewal")


def requests(path: Path, count: int) -> None:
    """Write requests for so many certificates."""
    with path.open("w") as file:
        for number in range(count):
            name = f"sensor-{number:05}"
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
            made = x509.CertificateSigningRequestBuilder().subject_name(subject)
            pem = made.sign(generate_private_key(SECP256R1()), SHA256()).public_bytes(Encoding.PEM)
            file.write(json.dumps({"id": name, "csr": pem.decode()}) + "\n")


def station_of(folder: Path, count: int) -> Bench:
    """Make a station with so many devices, and the files of a gateway."""
    folder.mkdir()
    bench = Bench(folder)
    bench.run("birthmark", "init", "--registry", "sqlite:///registry.db")
    requests(folder / "in.jsonl", count)
    bench.run("birthmark", "issue", "--from", folder / "in.jsonl", "--out", folder / "out.jsonl")
    bench.gateway_files()
    bench.without_what_is_not_there()
    bench.identities()
    return bench


def cpu_of_children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cpu_of_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measured(bench: Bench) -> dict[str, float]:
    """One round: export, start, a connection, reload."""
    before_s = cpu_of_children_s()
    bench.export(*ACCEPTED)
    found = {"export": cpu_of_children_s() - before_s, "acl_mb": (bench.exported / "acl").stat().st_size / 1e6}
    alice = client_context(bench.credentials("alice"), bench.station / "root.pem")

    def connect() -> None:
        with RawClient.connect(bench.port, alice) as client:
            client.handshake(mqtt.connect("alice")).ping()

    with mosquitto_process(bench.gateway, bench.exported) as mosquitto:
        pid = mosquitto.process.pid
        found["start"] = cpu_of_s(pid)
        connect()
        before_s = cpu_of_s(pid)
        for _ in range(CONNECTIONS):
            connect()
        found["connection"] = (cpu_of_s(pid) - before_s) / CONNECTIONS
        before_s = cpu_of_s(pid)
        mosquitto.process.send_signal(1)
        mosquitto.wait_for("Reloading config")
        connect()  # it is answered when everything has been read
        found["reload"] = cpu_of_s(pid) - before_s - found["connection"]
        found["resident_mb"] = resident_mb(pid)
    return found


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        benches = {size: station_of(Path(folder) / str(size), size) for size in (FEW, count)}
        rounds = [{size: measured(bench) for size, bench in benches.items()} for _ in range(ROUNDS)]
    for what in rounds[0][FEW]:
        for size in benches:
            values = sorted(each[size][what] for each in rounds)
            middle = statistics.median(values)
            print(f"{what:<12} {size:>7}  median {middle:.4f}, {values[0]:.4f} to {values[-1]:.4f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
