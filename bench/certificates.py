"""Certificates a second on one core: the floor, the profile, the station, cfssl and the openssl command.

Every certificate is for a key made for it. The floor is one P-256 key and one signature of as many octets; what is
"recorded" has its row in the registry (TinyDB) before it is signed, and its certificate after: 200 in two
transactions. The two commands start a process for each certificate, as their users do, and keep no record.
"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from bench.report import Figure
from birthmark.device.identity import DeviceId, Role
from birthmark.provisioning import profile
from birthmark.provisioning.founding import found_station
from birthmark.provisioning.registry.model import KeyMode, Kind, Row, State
from birthmark.provisioning.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SECTION: Final = "Certificates"
FLOOR, PROFILE, STATION, RECORDED = "key and signature", "profile", "station", "station, recorded"
CFSSL, OPENSSL = "cfssl", "openssl"
ONE_CORE: Final = (FLOOR, PROFILE, STATION)
"""Measured by this process's CPU time; what waits for a disk or a command, by the clock."""
SIGNED_BYTES: Final = 430
"""What a device certificate's signature covers."""
ROWS: Final = 200


def figures(folder: Path, rounds: int, seconds: float, say: Callable[[str], None]) -> Iterator[Figure]:
    """Measure; `folder` is for a station and what the commands need, and each is measured for `seconds`."""
    work = _Work(folder)
    ways: dict[str, Callable[[], int]] = {
        FLOOR: work.floor,
        PROFILE: work.by_profile,
        STATION: work.by_station,
        RECORDED: work.recorded,
    }
    if shutil.which("openssl"):
        ways[OPENSSL] = work.by_openssl
    if shutil.which("cfssl"):
        ways[CFSSL] = work.by_cfssl
    values: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        for way, once in ways.items():
            say(f"certificates: {way}, round {number + 1} of {rounds}")
            values[way].append(_rate(once, seconds, time.process_time if way in ONE_CORE else time.perf_counter))
    work.close()
    for way, goal in ((PROFILE, 0.5), (STATION, 0.5)):
        shown = {who: values[who] for who in (FLOOR, way)}
        yield Figure(SECTION, f"by the {way}", "/s", shown, ours=way, reference=FLOOR, at_least=goal)
    for peer in (OPENSSL, CFSSL):
        if peer in values:
            shown = {who: values[who] for who in (peer, RECORDED)}
            yield Figure(SECTION, f"recorded, beside {peer}", "/s", shown, ours=RECORDED, reference=peer)
        else:
            yield Figure(SECTION, f"recorded, beside {peer}", "/s", {}, errors=[f"{peer} is not installed"])


def _rate(once: Callable[[], int], seconds: float, clock: Callable[[], float]) -> float:
    """Do something for so many seconds of a clock; return how many a second were made."""
    made, begun_s = 0, clock()
    while (spent_s := clock() - begun_s) < seconds or not made:
        made += once()
    return made / spent_s


class _Work:
    def __init__(self, folder: Path) -> None:
        self._folder = folder / "certificates"
        self._folder.mkdir()
        self._now = datetime.now(UTC)
        self._key = generate_private_key(SECP256R1())
        root = profile.root_certificate(self._key, organization="Bench", cert_serial=_cert_serial(), now=self._now)
        self._issuer = profile.Issuer(root, self._key)
        self._signed = secrets.token_bytes(SIGNED_BYTES)
        self._station = found_station(
            folder / "certificates-station", Settings("Bench"), passphrase=secrets.token_hex(16).encode()
        )
        self._authority = self._station.authority_of(self._station.cas.for_clients.key_id)
        self._rows = self._key_rows()
        self._next = 0
        (self._folder / "ca.pem").write_bytes(root.public_bytes(Encoding.PEM))
        ca_key = self._folder / "ca-key.pem"
        ca_key.touch(mode=0o600)
        ca_key.write_bytes(self._key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
        request = {
            "CN": "sensor-1",
            "key": {"algo": "ecdsa", "size": 256},
            "names": [{"O": "Bench", "OU": "sensor"}],
        }
        (self._folder / "request.json").write_text(json.dumps(request))

    def close(self) -> None:
        self._station.close()

    def floor(self) -> int:
        """Make a key, and sign with another."""
        generate_private_key(SECP256R1())
        self._key.sign(self._signed, ECDSA(SHA256()))
        return 1

    def by_profile(self) -> int:
        """Make a key and its certificate."""
        profile.device_certificate(
            self._issuer,
            organization="Bench",
            device_id=DeviceId("sensor-1"),
            role=Role("sensor"),
            public_key=generate_private_key(SECP256R1()).public_key(),
            cert_serial=_cert_serial(),
            lifetime=timedelta(days=730),
            now=self._now,
        )
        return 1

    def by_station(self) -> int:
        """Make `ROWS` keys, and have the certificates of as many rows that are recorded already."""
        for _ in self._rows:
            generate_private_key(SECP256R1())
        self._authority.issue_devices(self._rows, now=self._station.clock())
        return ROWS

    def recorded(self) -> int:
        """Record `ROWS` rows with a key each, sign them, and record that: two transactions."""
        rows = self._key_rows()
        certificates = self._authority.issue_devices(rows, now=self._station.clock())
        with self._station.registry.transaction() as transaction:
            for row, certificate_der in zip(rows, certificates, strict=True):
                issued = row.changed(state=State.ISSUED, certificate_der=certificate_der)
                transaction.update(issued.changed(anchors=self._authority.anchor_ids))
        return ROWS

    def _key_rows(self) -> list[Row]:
        made = []
        with self._station.registry.transaction() as transaction:
            for _ in range(ROWS):
                public_key = generate_private_key(SECP256R1()).public_key()
                made.append(
                    transaction.insert(
                        kind=Kind.DEVICE,
                        name=f"bench-{secrets.token_hex(8)}",
                        role="sensor",
                        hwid=secrets.token_bytes(8),
                        txn=secrets.token_bytes(16),
                        state=State.KEYED,
                        key_mode=KeyMode.ON_DEVICE,
                        public_key_der=public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
                        cert_serial=self._authority.new_cert_serial(),
                        issuer=self._authority.key_id,
                    )
                )
        return made

    def by_openssl(self) -> int:
        """Make a key and its certificate with `openssl req -x509 -CA`."""
        self._run(
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-subj", "/O=Bench/OU=sensor/CN=sensor-1", "-CA", "ca.pem", "-CAkey", "ca-key.pem",
            "-keyout", "openssl-key.pem", "-out", "openssl.pem",
        )  # fmt: skip
        return 1

    def by_cfssl(self) -> int:
        """Make a key and its certificate with `cfssl gencert`."""
        self._run(
            "cfssl", "gencert", "-loglevel", "4", "-ca", "ca.pem", "-ca-key", "ca-key.pem", "request.json"
        )  # fmt: skip
        return 1

    def _run(self, *command: str) -> None:
        subprocess.run(command, cwd=self._folder, check=True, capture_output=True, timeout=30)


def _cert_serial() -> int:
    return profile.new_cert_serial(secrets.token_bytes)
