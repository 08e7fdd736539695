"""Stations for tests: cheap to unlock, with a clock that a test can set."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.patience import PATIENCE_S

from birthmark.device.console import run
from birthmark.provisioning.authority import with_certificate
from birthmark.provisioning.cli import parser
from birthmark.provisioning.encrypted_key import KeyDerivation
from birthmark.provisioning.founding import found_station
from birthmark.provisioning.registry.model import Kind, Row, State
from birthmark.provisioning.settings import RegistrySetting, Settings

if TYPE_CHECKING:
    import signal
    from pathlib import Path

    import pytest

    from birthmark.provisioning.station import Station

PASSPHRASE = b"correct horse battery staple"
CHEAP = KeyDerivation(cost=16, parallelism=1)
"""For tests only: a passphrase under this is guessed in no time."""
NOON = datetime(2026, 5, 4, 12, 0, 0, tzinfo=UTC)


@dataclass
class Clock:
    """A clock that stands still until it is moved."""

    now: datetime = NOON

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **delta: float) -> None:
        self.now += timedelta(**delta)


def new_station(folder: Path, clock: Any = None, *, registry: str = "") -> Station:
    """Found a station whose passphrase is PASSPHRASE, and whose registry is on TinyDB or at a URL."""
    clocked = {} if clock is None else {"clock": clock}
    settings = Settings("Acme", registry=RegistrySetting(registry))
    return found_station(folder, settings, passphrase=PASSPHRASE, derivation=CHEAP, **clocked)


def public_key_der() -> bytes:
    """Return a fresh P-256 public key (SubjectPublicKeyInfo)."""
    key = generate_private_key(SECP256R1()).public_key()
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def keyed_row(station: Station, name: str, *, role: str = "sensor", hwid: bytes | None = None) -> Row:
    """Bring a device to KEYED, as an enrollment does."""
    authority = station.authority
    with station.registry.transaction() as transaction:
        row = transaction.insert(
            kind=Kind.DEVICE,
            name=name,
            role=role,
            hwid=hwid or secrets.token_bytes(8),
            txn=secrets.token_bytes(16),
        )
        return transaction.update(
            row.changed(
                state=State.KEYED,
                public_key_der=public_key_der(),
                cert_serial=authority.new_cert_serial(),
                issuer=authority.key_id,
            )
        )


def issue(station: Station, row: Row) -> bytes:
    """Sign the certificate of a device's row in KEYED."""
    return station.authority_of(row.issuer).issue_device(row, now=station.clock())


def enrolled_row(
    station: Station,
    name: str,
    *,
    state: State = State.ATTESTED,
    hwid: bytes | None = None,
) -> Row:
    """Bring a device to ISSUED or beyond, as an enrollment does."""
    row = keyed_row(station, name, hwid=hwid)
    issued = with_certificate(row, issue(station, row), anchors=station.authority_of(row.issuer).anchor_ids)
    with station.registry.transaction() as transaction:
        return transaction.update(issued.changed(state=state))


def served_crls(folder: Path, stop: signal.Signals, **secrets: str) -> tuple[list[str], int]:
    """Run `birthmark crl serve` until it has signed a CRL, and stop it; return its events and its exit code."""
    command = [sys.executable, "-m", "birthmark.provisioning", "crl", "serve", "--json", "--station", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **secrets}) as process:
        assert process.stdout is not None
        events = [json.loads(process.stdout.readline())["event"] for _ in range(2)]
        process.send_signal(stop)
        events += [json.loads(line)["event"] for line in process.stdout]
        return events, process.wait(PATIENCE_S)


@dataclass
class Answer:
    """What a command said and how it ended."""

    exit_code: int
    stdout: str
    stderr: str
    records: list[dict[str, Any]] = field(default_factory=list)
    """stdout, line by line, where --json was given."""


class Command:
    """Runs `birthmark` in this process against one station."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Answer:
        words = [str(argument) for argument in arguments]
        self._capsys.readouterr()
        try:
            code = run(parser(), [*words, "--station", str(self.folder)])
        except SystemExit as stop:  # argparse: usage and --help
            code = int(stop.code or 0)
        captured = self._capsys.readouterr()
        records = []
        if "--json" in words and code != 2:
            records = [json.loads(line) for line in captured.out.splitlines()]
        return Answer(code, captured.out, captured.err, records)
