"""Rows from another registry of the same CAs: what another station issued, or what a backup is older than.

Rules:

- What is taken is an identity that is made, or void: with its certificate, which one of this station's issuing CAs
  must have signed and which must say what the record says. A void one whose certificate was never stored is taken
  for its serial number, if that is revoked; one without a serial number has nothing to take.
- What is under way belongs to the station that has it under way, and is refused.
- Rows that refer to each other (replaced, renewed) come together. They are numbered and dated anew.
- A certificate that is there already is left as it is; the same file again does nothing. One that is revoked in
  the file and not here is refused: to revoke is a decision of its own.
- What no station could have written is refused: a revocation that is yet to come, which would be on the CRL
  while `birthmark doctor` waits for its day to name a gateway that lets it in; a batch or a label outside
  their grammars, which reports and printed labels rely on.
- All of it is one transaction: a record that cannot be taken is named, and nothing of the file is applied.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from birthmark.device.errors import BirthmarkError
from birthmark.provisioning.cas import CaKind, read_cas
from birthmark.provisioning.record_files import CSV, line_error, naming, read_records
from birthmark.provisioning.registry.interface import LAST_ROW, DuplicateError
from birthmark.provisioning.registry.line import Batch
from birthmark.provisioning.registry.model import Row, State
from birthmark.provisioning.row_records import COLUMNS, from_cell, from_record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from birthmark.provisioning.cas import Ca
    from birthmark.provisioning.registry.interface import Transaction
    from birthmark.provisioning.station import Station

_LINKS: Final = ("replaces", "replaced_by", "renews")


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import has come to."""

    added: tuple[Row, ...]
    known: int
    """Those that were there before."""
    empty: int
    """Void ones without a serial number: nothing to take."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A row as the file has it, with the file's numbers, and where."""

    where: str
    row: Row


def import_rows(station: Station, path: Path) -> Imported:
    """Add the rows of a file, all or none.

    Raises:
        ConfigurationError: the file, or a record of it, cannot be used; nothing was changed.
        RegistryError: the registry cannot be read or written; nothing was changed.
    """
    with station.registry.view() as view:
        cas = {ca.key_id: ca for ca in read_cas(view) if ca.kind is CaKind.ISSUING}
    found = _read(path, cas, station.clock())
    with station.registry.transaction() as transaction:
        taken = [one for one in found if one.row.cert_serial is not None]
        here = transaction.by_cert_serials([one.row.cert_serial or 0 for one in taken])
        fresh = [one for one in taken if not _is_known(path, one, here)]
        added = _add(transaction, path, fresh, {one.row.number: one.row for one in found}, here)
        for row in added:
            transaction.record(
                "import",
                row.name,
                row=row.number,
                kind=row.kind.value,
                role=row.role or None,
                cert_serial=f"{row.cert_serial:x}",
                revoked=row.revocation_reason or None,
                source=path.name,
            )
    return Imported(tuple(added), known=len(taken) - len(fresh), empty=len(found) - len(taken))


def _read(path: Path, cas: Mapping[str, Ca], now: datetime) -> list[_Found]:
    found: dict[int, _Found] = {}
    is_csv = path.suffix.lower() == CSV
    for record in read_records(path, COLUMNS):
        fields = {name: from_cell(text) for name, text in record.fields.items()} if is_csv else record.fields
        with naming(path, record.where):
            try:
                row = from_record(fields)
            except ValueError as error:
                raise line_error(path, record.where, str(error)) from error
            if row.batch:
                Batch(row.batch, opened_at=now)
            cause, hint = _objection(row, cas, now)
            if cause:
                raise line_error(path, record.where, f"{row.name}: {cause}", hint)
        before = found.setdefault(row.number, _Found(record.where, row))
        if before.row is not row:
            raise line_error(path, record.where, f"it has the number of {before.where}")
    for one in found.values():
        for link in _LINKS:
            number = getattr(one.row, link)
            if number is not None and number not in found:
                cause = f"{one.row.name}: {link.replace('_', ' ')} row {number}, which is not in the file"
                raise line_error(
                    path, one.where, cause, "export both: rows that refer to each other come together"
                )
    return list(found.values())


def _objection(row: Row, cas: Mapping[str, Ca], now: datetime) -> tuple[str, str]:
    """Return why a row cannot be taken, and what to do; nothing if it can."""
    if row.state not in (State.ATTESTED, State.VOID):
        return f"it is {row.state}, under way at another station", "finish it there; or export what is made alone"
    if row.revoked_at is not None and row.revoked_at > now:
        cause = f"it is revoked on {row.revoked_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC, which is yet to come"
        return cause, "this station's clock is behind, that of the file's was ahead, or the file was changed"
    if not all(line.isprintable() for line in row.label.split("\n")):
        return "its label is not printable", ""
    if row.cert_serial is None:
        return "", ""
    ca = cas.get(row.issuer)
    if ca is None:
        return f"it was issued by {row.issuer[:16] or 'nobody known'}, which is none of this station's CAs", ""
    if row.certificate_der is None:
        return ("", "") if row.is_revoked else ("it has a serial number, no certificate, and is not revoked", "")
    return _misfit(row, row.certificate_der, ca), ""


def _misfit(row: Row, certificate_der: bytes, ca: Ca) -> str:
    """Return in what a certificate is not the one of its row; nothing if it is."""
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        certificate.verify_directly_issued_by(ca.certificate)
        facts = _facts(certificate)
    except InvalidSignature:
        return f"its certificate is not signed by {ca.short}"
    except Exception as error:  # noqa: BLE001 - foreign DER: whatever the parser trips over is a refusal
        return f"its certificate cannot be used ({type(error).__name__})"
    said = {name: getattr(row, name) for name in facts}
    odd = [name for name, value in facts.items() if said[name] != value]
    return f"its certificate has another {odd[0].removesuffix('_der').replace('_', ' ')}" if odd else ""


def _facts(certificate: x509.Certificate) -> dict[str, object]:
    """Return what a row must say of a certificate; with the role, it says the kind: a broker has none."""
    names = [name.value for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    units = [name.value for name in certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)]
    usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    is_broker = ExtendedKeyUsageOID.SERVER_AUTH in usages
    return {
        "name": names[0] if len(names) == 1 else None,
        "role": "" if is_broker else units[0] if len(units) == 1 else None,
        "cert_serial": certificate.serial_number,
        "public_key_der": certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        "not_before": certificate.not_valid_before_utc,
        "not_after": certificate.not_valid_after_utc,
    }


def _is_known(path: Path, one: _Found, here: Mapping[int, Row]) -> bool:
    row, known = one.row, here.get(one.row.cert_serial or 0)
    if known is None:
        return False
    if (known.name, known.certificate_der) != (row.name, row.certificate_der):
        cause = (
            f"{row.name}: its serial number is that of row {known.number}, {known.name}, and it is not the same"
        )
        raise line_error(path, one.where, cause)
    if row.is_revoked and not known.is_revoked:
        cause = f"{row.name}: it is revoked ({row.revocation_reason}), and here it is not"
        raise line_error(path, one.where, cause, f"revoke it first: birthmark revoke {row.name}")
    return True


def _add(
    transaction: Transaction,
    path: Path,
    fresh: Sequence[_Found],
    in_file: Mapping[int, Row],
    here: Mapping[int, Row],
) -> list[Row]:
    """Add rows with the numbers that are theirs here, and the references between them."""
    first = transaction.counter(LAST_ROW) + 1
    numbers = {one.row.number: number for number, one in enumerate(fresh, start=first)}
    for number, row in in_file.items():
        known = here.get(row.cert_serial or 0)
        if known is not None:
            numbers[number] = known.number
    wanted = []
    for one in fresh:
        links: dict[str, Any] = {link: numbers.get(getattr(one.row, link)) for link in _LINKS}
        wanted.append(one.row.changed(number=numbers[one.row.number], **links))
    try:
        # Whom a row replaces is written in a second step: `insert` would begin the replacement anew.
        added = transaction.insert_all([row.changed(replaces=None) for row in wanted])
        linked = [
            row.changed(replaces=one.replaces) for row, one in zip(added, wanted, strict=True) if one.replaces
        ]
        by_number = {row.number: row for row in [*added, *transaction.update_all(linked)]}
    except DuplicateError as error:
        raise _refusal(path, fresh, wanted, error) from error
    except BirthmarkError as error:
        raise line_error(path, "", error.message, error.hint) from error
    return [by_number[row.number] for row in added]


def _refusal(path: Path, fresh: Sequence[_Found], wanted: Sequence[Row], error: DuplicateError) -> BirthmarkError:
    holder, value = error.holder, getattr(error.holder, error.attribute)
    # Rows that are no longer live share name and hwid with whom they like; the holder may be in the file, too.
    ever = error.field not in ("name", "hwid")
    alike = [row for row in wanted if getattr(row, error.attribute) == value and (ever or row.is_live)]
    number = next(row.number for row in alike if row.number != holder.number)
    one = fresh[number - wanted[0].number]
    cause = f"{one.row.name}: its {error.field.replace('_', ' ')} belongs to {holder.kind} {holder.name}"
    return line_error(path, one.where, f"{cause}, row {holder.number}, {holder.state}")
