"""Certificates whose key pair the station makes itself: brokers and services.

Rules:

- The row is durable in KEYED, with key and serial number, before the certificate is signed; in ISSUED before
  the file with key and certificate is written; in ATTESTED once that file, and all beside it, is on disk.
- A killed attempt leaves a row short of ATTESTED. The next attempt under that name finishes it if its file is
  there, and otherwise revokes its certificate and starts again: the key is gone with the process.
- The key is in the written file, mode 0600, and nowhere else.
- One at a time: of two attempts under one name, the later one would take the earlier one for killed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from birthmark.device.durable import remove_leftovers, write_durably
from birthmark.device.errors import BirthmarkError, ConfigurationError, EnrollmentRefusedError, IdentityError
from birthmark.device.identity import BrokerName, DeviceId
from birthmark.device.pem import CERTIFICATE, PRIVATE_KEY, block, read_blocks
from birthmark.provisioning import profile
from birthmark.provisioning.authority import with_certificate
from birthmark.provisioning.crls import sign_and_store_crl, up_to_date_crl
from birthmark.provisioning.registry.model import KeyMode, Kind, Row, State
from birthmark.provisioning.revocation import mark_revoked
from birthmark.provisioning.station import PUBLIC_FILE_MODE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from pathlib import Path

    from birthmark.provisioning.authority import Authority
    from birthmark.provisioning.registry.interface import Transaction, View
    from birthmark.provisioning.station import Station

BROKER_FILE: Final = "server.pem"
BROKER_ANCHORS_FILE: Final = "clients-ca.pem"
BROKER_CRL_FILE: Final = "crl.pem"
SERVICE_ANCHORS_FILE: Final = "ca.pem"
KEY_FILE_MODE: Final = 0o600
OPERATOR: Final = "operator"


@dataclass(frozen=True, slots=True)
class Issued:
    """What was issued, and where it is."""

    row: Row
    key_path: Path
    paths: tuple[Path, ...]
    """Every file that was written."""
    leftovers_revoked: int
    """Certificates of interrupted attempts that were revoked; the CRL carries them."""


@dataclass(frozen=True, slots=True)
class _Request:
    kind: Kind
    name: str
    role: str
    hosts: tuple[str, ...]
    renew: bool

    def sign(self, authority: Authority, row: Row, now: datetime) -> bytes:
        if self.kind is Kind.BROKER:
            return authority.issue_broker(row, self.hosts, now=now)
        return authority.issue_service(row, now=now)


def issue_broker(station: Station, hosts: Sequence[str], out: Path, *, renew: bool = False) -> Issued:
    """Make a gateway's key and certificate, and what else it needs from the station, in the folder `out`.

    Writes `server.pem` (key, leaf, issuing CA), `clients-ca.pem` (the trusted issuing CAs) and `crl.pem`.

    Args:
        station: the station.
        hosts: DNS names and addresses; the first one is the gateway's name.
        out: made if needed, for the owner alone.
        renew: replace the certificate that this name holds already; the old one stays valid until its end.

    Raises:
        IdentityError: a host is neither a DNS name nor an address.
        EnrollmentRefusedError: the name is taken, and `renew` is false.
        ConfigurationError: `server.pem` is there already, and `renew` is false; or the lifetime in the settings is
            none.
        AuthorityError: the CA cannot be unlocked, or its clock is wrong.
    """
    for host in hosts:
        profile.general_name(host)
    request = _Request(Kind.BROKER, str(BrokerName(hosts[0])), "", tuple(dict.fromkeys(hosts)), renew)
    return _issue(station, request, out / BROKER_FILE)


def issue_operator(station: Station, name: str, out: Path, *, role: str = OPERATOR, renew: bool = False) -> Issued:
    """Make a service's key and certificate in the folder `out`: `NAME.pem` (key, leaf, issuing CA), `ca.pem`.

    `ca.pem` has the trusted roots: what the service checks a broker's certificate against. The other arguments
    and the errors are those of `issue_broker`; a name outside the grammar, or a role that is not a service's, is
    an `IdentityError`.
    """
    profile.check_service_role(role)
    request = _Request(Kind.SERVICE, str(DeviceId(name)), role, (), renew)
    key_path, anchors = out / f"{name}.pem", out / SERVICE_ANCHORS_FILE
    if key_path.name.lower() == anchors.name:
        raise IdentityError(
            f"could not name a service {name}: its key would be in {anchors.name}, the CA's place",
            hint="choose another name",
        )
    return _issue(station, request, key_path)


def _issue(station: Station, request: _Request, key_path: Path) -> Issued:
    with station.registry.view() as view:
        _replaced(view, request)  # refuses a name that is taken, before anybody types a passphrase
    _authority(station, request)  # unlocked before anybody else has to wait
    with station.issue_lock():
        with station.registry.view() as view:
            _replaced(view, request)  # somebody else may have had the lock before
        return _issue_alone(station, request, key_path)


def _issue_alone(station: Station, request: _Request, key_path: Path) -> Issued:
    _make_folder(key_path.parent)
    remove_leftovers(key_path.parent, key_path.name)  # a killed attempt's has a private key in it
    row, revoked = _interrupted_at_its_end(station, request, key_path), 0
    if row is None:
        row, revoked = _make(station, request, key_path)
    if revoked:
        sign_and_store_crl(station)
    beside = _write_beside(station, request, key_path.parent)
    # Last of all: until here, the same command again does what is missing.
    return Issued(_attest(station, row), key_path, (key_path, *beside), revoked)


def _make(station: Station, request: _Request, key_path: Path) -> tuple[Row, int]:
    """Make key, certificate and file; return the row in ISSUED, and how many attempts of before were revoked."""
    authority = _authority(station, request)
    if key_path.exists() and not request.renew:
        raise ConfigurationError(
            f"could not write {key_path}: it is there already",
            hint="choose another folder with --out, or give --renew to replace it",
        )
    private_key = generate_private_key(SECP256R1())
    with station.registry.transaction() as transaction:
        revoked = _revoke_interrupted(transaction, request, station.clock())
        row = transaction.insert(
            kind=request.kind,
            name=request.name,
            role=request.role,
            state=State.KEYED,
            key_mode=KeyMode.STATION,
            public_key_der=private_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            cert_serial=authority.new_cert_serial(),
            issuer=authority.key_id,
            replaces=_replaced(transaction, request),
        )
    leaf_der = request.sign(authority, row, station.clock())
    issued = with_certificate(row, leaf_der, anchors=authority.anchor_ids)
    with station.registry.transaction() as transaction:
        row = transaction.update(issued)
        transaction.record(
            "issue",
            row.name,
            row=row.number,
            kind=row.kind.value,
            role=row.role,
            cert_serial=f"{row.cert_serial:x}",
            not_after=row.not_after.isoformat() if row.not_after else None,
            hosts=" ".join(request.hosts) or None,
        )
    key_der = private_key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    content = (
        block(PRIVATE_KEY, key_der) + block(CERTIFICATE, leaf_der) + block(CERTIFICATE, authority.issuing_der)
    )
    write_durably(key_path, content, mode=KEY_FILE_MODE)
    return row, revoked


def _write_beside(station: Station, request: _Request, out: Path) -> list[Path]:
    """Write what its holder needs beside the key, and return where."""
    if request.kind is Kind.BROKER:
        contents = {
            BROKER_ANCHORS_FILE: b"".join(ca.pem for ca in station.cas.issuing),
            BROKER_CRL_FILE: up_to_date_crl(station).pem,
        }
    else:
        contents = {SERVICE_ANCHORS_FILE: b"".join(ca.pem for ca in station.cas.roots)}
    for name, content in contents.items():
        remove_leftovers(out, name)
        write_durably(out / name, content, mode=PUBLIC_FILE_MODE)
    return [out / name for name in contents]


def _authority(station: Station, request: _Request) -> Authority:
    station.settings.lifetimes.of(request.kind)  # before anything is on record for a certificate that cannot be
    cas = station.cas
    return station.authority_of((cas.for_brokers if request.kind is Kind.BROKER else cas.for_clients).key_id)


def _interrupted_at_its_end(station: Station, request: _Request, key_path: Path) -> Row | None:
    """Return the row of an attempt that was killed after its file was written; None if there is none."""
    with station.registry.view() as view:
        row = view.live_by_name(request.name)
    if row is None or row.kind is not request.kind or row.state is not State.ISSUED:
        return None
    try:
        held = [der for label, der in read_blocks(key_path.read_bytes()) if label == CERTIFICATE]
    except (OSError, BirthmarkError):
        return None
    return row if held and held[0] == row.certificate_der else None


def _attest(station: Station, row: Row) -> Row:
    with station.registry.transaction() as transaction:
        row = transaction.update(row.changed(state=State.ATTESTED))
        transaction.record("release", row.name, row=row.number)
        return row


def _revoke_interrupted(transaction: Transaction, request: _Request, now: datetime) -> int:
    row = transaction.live_by_name(request.name)
    if row is None or not _is_interrupted(row, request):
        return 0
    word = "interrupted before its key was written"
    mark_revoked(transaction, row, x509.ReasonFlags.superseded, word=word, now=now)
    return 1


def _is_interrupted(row: Row, request: _Request) -> bool:
    return row.kind is request.kind and row.state is not State.ATTESTED


def _replaced(view: View, request: _Request) -> int | None:
    """Return the number of the row to be replaced; refuse a name that is taken."""
    holder = view.live_by_name(request.name)
    if holder is None or _is_interrupted(holder, request):
        return None
    if holder.kind is request.kind and request.renew:
        return holder.number
    hint = f"look at it with `birthmark show {holder.name}`"
    if holder.kind is request.kind:
        hint = f"give --renew for a new certificate, or revoke it first: birthmark revoke {holder.name}"
    raise EnrollmentRefusedError(
        f"could not issue a certificate for {request.name}: the name belongs to {holder.kind} {holder.name}",
        hint=hint,
    )


def _make_folder(out: Path) -> None:
    if not out.is_dir():
        out.mkdir(mode=0o700, parents=True)
