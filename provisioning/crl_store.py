"""Where a station's CRLs are kept: the file `crl.pem`, and the registry, where that is in a database.

Rules:

- Stations that share a database have a file each. The newest CRL of each CA is noted in the registry before it is
  in any file, and so before any gateway has it; a file that is behind is brought up to date from there.
- A newer CRL never gives way to an older one. Of two stations that sign at once, the one that took its number
  first goes by the other's CRL: that was made from a later state of the registry, and lists all that its own does.
- A CRL below the last number that was given out is not the newest one (its file was put back, or its successor was
  lost with whoever was to sign it): it is signed anew (`crls.stale_crls`), and never brought to a gateway.
- What is read back counts only with the CA's signature.
"""

from __future__ import annotations

import binascii
import hashlib
from base64 import b64decode, b64encode
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from birthmark.device.durable import remove_leftovers, write_durably
from birthmark.device.errors import BirthmarkError
from birthmark.device.pem import CRL, block, read_blocks
from birthmark.provisioning.cas import SHORT, Ca, read_cas

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime
    from pathlib import Path

    from birthmark.provisioning.registry.interface import Transaction, View
    from birthmark.provisioning.station import Station

CRL_FILE_MODE: Final = 0o644
TOPIC: Final = "crl"
"""Where the registry notes them; the key is the CA's key identifier."""


@dataclass(frozen=True, slots=True)
class StoredCrl:
    """A signed CRL of one CA."""

    issuer: str
    """The CA's subject key identifier, lower-case hex."""
    number: int
    der: bytes
    this_update: datetime
    next_update: datetime
    cert_serials: frozenset[int]

    @property
    def pem(self) -> bytes:
        """The CRL as PEM."""
        return block(CRL, self.der)

    @property
    def sha256(self) -> str:
        """Of the DER, in lower-case hex."""
        return hashlib.sha256(self.der).hexdigest()


@dataclass(frozen=True, slots=True)
class CrlSet:
    """The CRLs of the issuing CAs that are trusted, as they are in their file; at least one."""

    path: Path
    crls: tuple[StoredCrl, ...]
    """That of the CA which issues for devices now comes first."""

    @property
    def current(self) -> StoredCrl:
        """That of the CA which issues for devices now."""
        return self.crls[0]

    @property
    def pem(self) -> bytes:
        """What is in the file."""
        return b"".join(crl.pem for crl in self.crls)

    @property
    def cert_serials(self) -> frozenset[int]:
        """What is on any of them."""
        return frozenset().union(*(crl.cert_serials for crl in self.crls))

    @property
    def next_update(self) -> datetime:
        """When the first of them ends."""
        return min(crl.next_update for crl in self.crls)

    def shown(self) -> str:
        """Return their numbers, for people: `CRL 7`, or with the CAs' identifiers if there are several."""
        if len(self.crls) == 1:
            return f"CRL {self.current.number}"
        return " and ".join(f"CRL {crl.number} of {crl.issuer[:SHORT]}" for crl in self.crls)

    def records(self) -> list[dict[str, object]]:
        """Return a JSON object for each."""
        return [
            {
                "issuer": crl.issuer,
                "number": crl.number,
                "entries": len(crl.cert_serials),
                "next_update": crl.next_update.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
            for crl in self.crls
        ]


def crl_number_counter(key_id: str) -> str:
    """Return the name of the registry's counter of a CA's CRL numbers: the number of the last one."""
    return f"crl_number {key_id}"


def newest_crls(station: Station, view: View, issuing: Iterable[Ca]) -> dict[str, StoredCrl]:
    """Return the newest CRL of each of these CAs that is kept anywhere, by key identifier."""
    issuing = tuple(issuing)
    if not issuing:
        return {}
    found = {crl.issuer: crl for crl in read_crl_file(station.crl_path, issuing)}
    behind = [ca for ca in issuing if ca.key_id not in found or found[ca.key_id].number < last_number(view, ca)]
    noted = _noted(view, behind) if behind and _is_shared(station) else {}
    newer = {key_id for key_id, crl in noted.items() if key_id not in found or found[key_id].number < crl.number}
    return found | {key_id: noted[key_id] for key_id in newer}


def last_number(view: View, ca: Ca) -> int:
    """Return the last CRL number that was given out for a CA."""
    return view.counter(crl_number_counter(ca.key_id))


def current_crl(station: Station) -> CrlSet | None:
    """Return the newest CRLs that are kept; None if one of them is missing or damaged (sign new ones).

    That of a CA that has issued nothing yet may be missing.
    """
    with station.registry.view() as view:
        issuing = read_cas(view).issuing
        return whole(station, issuing, newest_crls(station, view, issuing))


def whole(station: Station, issuing: Iterable[Ca], found: Mapping[str, StoredCrl]) -> CrlSet | None:
    """Return these CRLs, by key identifier, if none is missing of a CA that has issued something."""
    if any(ca.key_id not in found and ca.activated_at is not None for ca in issuing):
        return None
    return CrlSet(station.crl_path, tuple(found[ca.key_id] for ca in issuing if ca.key_id in found))


def successor(station: Station, crls: CrlSet) -> CrlSet | None:
    """Return the newest CRLs if another command, or another station, has signed one that is newer than these."""
    before = {crl.issuer: crl.number for crl in crls.crls}
    newest = current_crl(station)
    if newest is None or not any(crl.number > before.get(crl.issuer, 0) for crl in newest.crls):
        return None
    return newest


def keep_signed(station: Station, signed: Mapping[str, StoredCrl]) -> CrlSet:
    """Keep CRLs that were just signed, by key identifier; return the newest ones, which the file has then.

    The caller holds the station's CRL lock, as it did when they got their numbers.
    """
    with station.registry.view() as view:
        issuing = read_cas(view).issuing
        others = [ca for ca in issuing if ca.key_id not in signed]
        found = {**newest_crls(station, view, others), **signed}
        was_shared = not _is_shared(station) and bool(view.notes(TOPIC))
    if _is_shared(station):
        found |= _noted_or_newer(station, signed)
    elif was_shared:
        with station.registry.transaction() as transaction:
            _forget_all_but(transaction, ())
    crls = CrlSet(station.crl_path, tuple(found[ca.key_id] for ca in issuing if ca.key_id in found))
    put_in_file(crls)
    return crls


def put_in_file(crls: CrlSet) -> None:
    """Have the station's file be these CRLs. The caller holds the station's CRL lock."""
    crl_pem = crls.pem
    if not _is_content(crls.path, crl_pem):
        write_crl_file(crls.path, crl_pem)


def is_in_file(crls: CrlSet) -> bool:
    """Whether the station's file is just these CRLs."""
    return _is_content(crls.path, crls.pem)


def _is_content(path: Path, crl_pem: bytes) -> bool:
    try:
        return path.read_bytes() == crl_pem
    except OSError:
        return False


def write_crl_file(path: Path, crl_pem: bytes) -> None:
    """Write a CRL of the station's. The caller holds its CRL lock."""
    remove_leftovers(path.parent, path.name)
    write_durably(path, crl_pem, mode=CRL_FILE_MODE)


def read_crl_file(path: Path, cas: Iterable[Ca]) -> list[StoredCrl]:
    """Return the CRLs in a file, of those CAs, that are whole and signed by them."""
    cas = tuple(cas)
    try:
        blocks = [der for label, der in read_blocks(path.read_bytes()) if label == CRL]
    except (OSError, BirthmarkError):
        return []
    found = (signed_crl(der, cas) for der in blocks)
    return [crl for crl in found if crl is not None]


def signed_crl(der: bytes, cas: Iterable[Ca]) -> StoredCrl | None:
    """Return a CRL that one of these CAs signed; None if it is none."""
    try:
        crl = x509.load_der_x509_crl(der)
        stored = stored_crl(crl)
        ca = None if stored is None else next((each for each in cas if each.key_id == stored.issuer), None)
        if ca is None or not crl.is_signature_valid(cast(EllipticCurvePublicKey, ca.certificate.public_key())):
            return None
    except ValueError:
        return None
    return stored


def stored_crl(crl: x509.CertificateRevocationList) -> StoredCrl | None:
    """Return a CRL as it is kept; None if it lacks what every one of ours has. Its signature is not checked."""
    try:
        number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        issuer = crl.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return None
    next_update = crl.next_update_utc
    if next_update is None or issuer is None:
        return None
    return StoredCrl(
        issuer=issuer.hex(),
        number=number,
        der=crl.public_bytes(Encoding.DER),
        this_update=crl.last_update_utc,
        next_update=next_update,
        cert_serials=frozenset(entry.serial_number for entry in crl),
    )


def _is_shared(station: Station) -> bool:
    """Whether another station, with a file of its own, may use the registry: it is in a database."""
    return bool(station.settings.registry.url)


def _noted(view: View, issuing: Iterable[Ca]) -> dict[str, StoredCrl]:
    """Return the CRLs of these CAs that the registry has, by key identifier."""
    notes = view.notes(TOPIC)
    found: dict[str, StoredCrl] = {}
    for ca in issuing:
        try:
            crl = signed_crl(b64decode(notes[ca.key_id]["der"], validate=True), [ca])
        except (KeyError, TypeError, ValueError, binascii.Error):
            continue  # there is none, or it is damaged: then a new one is signed
        if crl is not None:
            found[ca.key_id] = crl
    return found


def _noted_or_newer(station: Station, signed: Mapping[str, StoredCrl]) -> dict[str, StoredCrl]:
    """Note these CRLs in the registry; return those that another station has noted since, which stay."""
    newer: dict[str, StoredCrl] = {}
    with station.registry.transaction() as transaction:
        issuing = read_cas(transaction).issuing
        _forget_all_but(transaction, issuing)
        overtaken = [
            ca for ca in issuing if ca.key_id in signed and signed[ca.key_id].number < last_number(transaction, ca)
        ]
        if overtaken:
            noted = _noted(transaction, overtaken)
            newer = {key_id: crl for key_id, crl in noted.items() if signed[key_id].number < crl.number}
        for key_id in signed.keys() - newer.keys():
            note = {"number": signed[key_id].number, "der": b64encode(signed[key_id].der).decode()}
            transaction.put_note(TOPIC, key_id, note)
    return newer


def _forget_all_but(transaction: Transaction, issuing: Iterable[Ca]) -> None:
    for key_id in transaction.notes(TOPIC).keys() - {ca.key_id for ca in issuing}:
        transaction.put_note(TOPIC, key_id, None)
