"""What stations issue, good and bad, as files for other people's validators.

Everything is made by the station's own code, on a clock that the test moves; only what a station refuses to make
(a CA below an issuing CA, a CRL under a stolen name) is signed here with its key.
"""

from __future__ import annotations

import secrets
import shutil
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from support.pki import pem_of
from support.station import PASSPHRASE, Clock, enrolled_row, new_station

from birthmark.device.identity import DeviceId, Role
from birthmark.device.pem import CERTIFICATE, read_blocks
from birthmark.provisioning import keyfile, profile
from birthmark.provisioning.cas import CaKind
from birthmark.provisioning.crls import sign_and_store_crl, sign_root_crl
from birthmark.provisioning.issuing import issue_broker, issue_operator
from birthmark.provisioning.registry.model import Kind
from birthmark.provisioning.revocation import revoke
from birthmark.provisioning.rollover.phases import activate, close_old, retire_closed
from birthmark.provisioning.rollover.starting import RootKey, start_issuing
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from pathlib import Path

KINDS = [kind.value for kind in Kind]
YEARS = timedelta(days=365)
BROKER_HOST = "gw.example.com"


def leaf_of(station: Station, kind: str, name: str, scratch: Path) -> bytes:
    """Have the station issue one certificate; return it as PEM."""
    if kind == Kind.DEVICE:
        certificate_der = enrolled_row(station, name).certificate_der
        assert certificate_der is not None
        return pem_of(certificate_der)
    issued = (
        issue_broker(station, [f"{name}.example.com", "127.0.0.1"], scratch / name)
        if kind == Kind.BROKER
        else issue_operator(station, name, scratch)
    )
    blocks = read_blocks(issued.key_path.read_bytes())
    return pem_of(next(der for label, der in blocks if label == CERTIFICATE))


def make_files(folder: Path) -> Path:
    """Make every certificate and CRL; return the folder with the files.

    `KIND-STATE.pem` for each kind and good, expired, early, revoked; `issuing.pem` and `root.pem`;
    `crl.pem` and `root-crl.pem`, with `-expired`, and `root-crl-retired.pem`, on which `issuing.pem` is;
    `crl-foreign.pem` of another CA, `crl-forged.pem` under our CA's name; `ended-issuing.pem`, expired, below
    `ended-root.pem` with `ended-root-crl.pem`. By who must not: `climber-ca.pem`, a CA that the issuing CA signed,
    and `climbed.pem` below it; `climber-device.pem` is good, `beneath.pem` is what it signed.
    `unrecorded-ca.pem` is an issuing CA that the root signed somewhere else.
    """
    files, scratch = folder / "files", folder / "scratch"
    files.mkdir(parents=True)
    now = datetime.now(UTC)
    clock = Clock(now - 3 * YEARS)
    station = new_station(folder / "station", clock)
    for name in ("crl", "root-crl"):
        shutil.copy(station.folder / f"{name}.pem", files / f"{name}-expired.pem")
    for name in ("issuing", "root"):
        shutil.copy(station.folder / f"{name}.pem", files)
    for kind in KINDS:
        (files / f"{kind}-expired.pem").write_bytes(leaf_of(station, kind, f"expired-{kind}", scratch))

    clock.now = now
    for kind in KINDS:
        for state in ("good", "revoked"):
            (files / f"{kind}-{state}.pem").write_bytes(leaf_of(station, kind, f"{state}-{kind}", scratch))
        name = "revoked-broker.example.com" if kind == Kind.BROKER else f"revoked-{kind}"
        revoke(station, name, x509.ReasonFlags.key_compromise)
    root = station.root_issuer(PASSPHRASE)
    sign_root_crl(station, root)
    for name in ("crl", "root-crl"):
        shutil.copy(station.folder / f"{name}.pem", files)

    issuing = profile.Issuer(
        station.issuing, keyfile.read_key(station.key_path(station.cas.for_clients), PASSPHRASE, whose="the CA")
    )
    _forge(files, root, issuing, now)
    _retire(folder, files, clock)
    _end(folder, files, now)
    clock.now = now + timedelta(days=2)  # the last: from here on the station would refuse the real time
    for kind in KINDS:
        (files / f"{kind}-early.pem").write_bytes(leaf_of(station, kind, f"early-{kind}", scratch))
    return files


def _forge(files: Path, root: profile.Issuer, issuing: profile.Issuer, now: datetime) -> None:
    thief = generate_private_key(SECP256R1())
    crl = profile.revocation_list(issuing, number=9, this_update=now, next_update=now + YEARS, revoked=[])
    builder = x509.CertificateRevocationListBuilder(
        issuer_name=crl.issuer, last_update=crl.last_update_utc, next_update=crl.next_update_utc
    )
    for extension in crl.extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    forged = builder.sign(thief, SHA256())
    (files / "crl-forged.pem").write_bytes(forged.public_bytes(Encoding.PEM))

    def serial() -> int:
        return profile.new_cert_serial(secrets.token_bytes)

    def device(issuer: profile.Issuer, name: str) -> x509.Certificate:
        return profile.device_certificate(
            issuer,
            organization="Acme",
            device_id=DeviceId(name),
            role=Role("sensor"),
            public_key=thief.public_key(),
            cert_serial=serial(),
            lifetime=YEARS,
            now=now,
        )

    def ca(issuer: profile.Issuer) -> x509.Certificate:
        return profile.issuing_certificate(
            issuer, thief.public_key(), organization="Acme", cert_serial=serial(), now=now
        )

    climber_ca = ca(issuing)
    climber_device = device(issuing, "climber")
    for name, certificate in (
        ("unrecorded-ca", ca(root)),
        ("climber-ca", climber_ca),
        ("climbed", device(profile.Issuer(climber_ca, thief), "climbed")),
        ("climber-device", climber_device),
        ("beneath", device(profile.Issuer(climber_device, thief), "beneath")),
    ):
        (files / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))


def _retire(folder: Path, files: Path, clock: Clock) -> None:
    """Retire the issuing CA at a copy of the station."""
    station = Station.open(
        shutil.copytree(folder / "station", folder / "rolled"), passphrase=PASSPHRASE, clock=clock
    )
    start_issuing(station, lambda: RootKey(PASSPHRASE))
    activate(station, force=True)
    closed = close_old(station, CaKind.ISSUING, force=True)
    retire_closed(station, closed, force=True)
    shutil.copy(sign_root_crl(station, station.root_issuer(PASSPHRASE)), files / "root-crl-retired.pem")
    sign_and_store_crl(station)
    shutil.copy(station.crl_path, files / "crl-foreign.pem")


def _end(folder: Path, files: Path, now: datetime) -> None:
    """Found a station so long ago that its issuing CA has ended, and its root has not."""
    station = new_station(folder / "ended", Clock(now - 11 * YEARS))
    station.clock = Clock(now)
    for name in ("issuing", "root"):
        shutil.copy(station.folder / f"{name}.pem", files / f"ended-{name}.pem")
    shutil.copy(sign_root_crl(station, station.root_issuer(PASSPHRASE)), files / "ended-root-crl.pem")
