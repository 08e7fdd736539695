"""A station brought back from its backup, which must not repeat what the lost one did after it was taken.

Rules:

- All or nothing: everything is unpacked and checked in a folder beside the final one, which is renamed into place
  at the end. A folder with something in it is refused.
- What it is checked for: every file whole and on the backup's list, the registry readable, the issuing CA's key
  unlocked and fitting its certificate. An audit log that does not verify is said, not refused: what was damaged
  before the backup must not keep anybody from revoking.
- Nobody knows what the lost station did after the backup. So numbers that must never repeat are jumped: CRL
  numbers and versions of the fleet's policy go on from the seconds since 1970 (or from the highest that is known,
  if that is more), row numbers from `ROWS_JUMP` above. Serial numbers of certificates are random: no jump.
- No revocation is lost as far as it can be known: the CRLs that gateways hold are merged. An entry whose
  certificate the registry does not know becomes a VOID row `lost-SERIAL`, so that every later CRL lists it, too.
- The first entries in the audit log after it are `unlock`, for each issuing CA, and `restore`; the lost station's
  own entries of after the backup have the same numbers, and other hashes.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from birthmark.device.durable import durable_file, private_folder, rename_durably
from birthmark.device.errors import BirthmarkError, ConfigurationError, CredentialError
from birthmark.device.pem import CRL, read_blocks
from birthmark.provisioning import audit_check, founding
from birthmark.provisioning.actor import actor
from birthmark.provisioning.at_once import in_order
from birthmark.provisioning.backup import LAST_BACKUP_AT, Manifest, opened
from birthmark.provisioning.cas import Ca, read_cas
from birthmark.provisioning.crl_store import CrlSet, crl_number_counter
from birthmark.provisioning.crls import crl_this_update_counter, sign_and_store_crl, unlock_all
from birthmark.provisioning.fleet_policy import POLICY_VERSION, current_policy, keep_policy, trusted_policy
from birthmark.provisioning.gateway_contact import contacts
from birthmark.provisioning.gateway_look import DEFAULT_TIMEOUT_S, crls_in_force
from birthmark.provisioning.key_custody import give_up_key
from birthmark.provisioning.registry.content import from_tables
from birthmark.provisioning.registry.interface import LAST_ISSUED_AT, LAST_ROW
from birthmark.provisioning.registry.model import REASON_NAMES
from birthmark.provisioning.registry.opening import new_registry
from birthmark.provisioning.registry.place import REGISTRY_FILE
from birthmark.provisioning.registry.storage import RegistryFile
from birthmark.provisioning.revocation import lost_row, mark_revoked
from birthmark.provisioning.settings import SETTINGS_FILE, read_settings
from birthmark.provisioning.settings_edit import put_registry
from birthmark.provisioning.station import Station, utc_now

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from datetime import datetime
    from pathlib import Path

    from birthmark.device.fleet_policy import SignedPolicy
    from birthmark.provisioning.audit_places import Problem
    from birthmark.provisioning.backup import Member
    from birthmark.provisioning.cas import Cas
    from birthmark.provisioning.gateway_contact import Contact
    from birthmark.provisioning.passphrase import PassphraseSource
    from birthmark.provisioning.registry.interface import Transaction
    from birthmark.provisioning.settings import RegistrySetting

ROWS_JUMP: Final = 1_000_000
_COPY_BYTES: Final = 1 << 16
_CRL_HINT: Final = "name the file that the gateway keeps: data/crl/KEY-ID.crl"
_MODES: Final = 0o644
"""No more than this, whatever an archive says."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What a CRL from elsewhere told the station."""

    source: str
    number: int = 0
    newly: int = 0
    """Revocations that the registry did not know."""
    cause: str = ""
    """Why it could not be used; empty if it could."""
    issuer: str = ""
    """The key identifier of the CA that signed it."""

    def record(self) -> dict[str, Any]:
        """Return this as a JSON object."""
        return {
            "source": self.source,
            "issuer": self.issuer,
            "crl_number": self.number,
            "newly_revoked": self.newly,
            "cause": self.cause,
        }


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did."""

    station: Station
    manifest: Manifest
    crls: CrlSet
    merged: tuple[Merged, ...]
    audit_problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class KnownCrl:
    """A CRL of one of the station's CAs that somebody holds."""

    issuer: str
    """The CA's key identifier."""
    number: int
    this_update: datetime
    entries: tuple[tuple[int, datetime, x509.ReasonFlags], ...]


def restore(
    backup: Path,
    folder: Path,
    *,
    backup_passphrase: bytes,
    passphrase: bytes | PassphraseSource,
    pin: bytes | PassphraseSource | None = None,
    crls: Sequence[Path] = (),
    lost: Sequence[str] = (),
    timeout_s: float = DEFAULT_TIMEOUT_S,
    registry: RegistrySetting | None = None,
    clock: Callable[[], datetime] = utc_now,
) -> Restored:
    """Make a station in `folder` from a backup, and sign its next CRL.

    Args:
        backup: the file.
        folder: where the station is to be; must not exist, or be empty.
        backup_passphrase: what the backup is encrypted under.
        passphrase: the issuing CA's.
        pin: of the token with the issuing CA's key, if it is in one.
        crls: CRLs that gateways hold, PEM or DER. Those that a gateway's path, or the gateway itself, has to give
            are found without.
        lost: issuing CAs whose keys are lost, with a token for instance; they are given up (`give_up_key`).
        timeout_s: how long to wait for each gateway that is reached by MQTT.
        registry: where the registry is to be; where the lost station had it, if that is not given.
        clock: the current time, aware.

    Raises:
        ConfigurationError: there is something in `folder`; or a CRL that was named is not of this station's CA.
        RegistryError: there is a registry already where this one is to be.
        BackupError: the backup cannot be used.
        AuthorityError: the issuing CA cannot be unlocked, or its key does not fit.
        OSError: something cannot be read or written. After any of these there is nothing in `folder`.
    """
    folder = folder.absolute()
    founding.refuse_occupied(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with founding.unfinished(folder) as building:
        with opened(backup, backup_passphrase) as (manifest, members):
            _unpack(members, building)
        if registry is not None:
            put_registry(building / SETTINGS_FILE, registry)
        with _registry_in_place(building, clock):
            station = Station.open(building, passphrase=passphrase, pin=pin, clock=clock, purpose="restore")
            try:
                problems, merged, signed = _continue(station, manifest, crls, timeout_s, lost)
            finally:
                station.close()
            founding.refuse_occupied(folder)
            rename_durably(building, folder)
    station = Station.open(folder, passphrase=passphrase, pin=pin, clock=clock, purpose="restore")
    signed = replace(signed, path=station.folder / signed.path.relative_to(building))
    return Restored(station, manifest, signed, merged, problems)


@contextmanager
def _registry_in_place(folder: Path, clock: Callable[[], datetime]) -> Iterator[None]:
    """Bring the registry of a backup to where the settings say; it is gone again if the block fails."""
    setting = read_settings(folder / SETTINGS_FILE).registry
    if not setting.url:
        yield
        return
    file = RegistryFile(folder / REGISTRY_FILE)
    documents = from_tables(file.load())
    with new_registry(folder, setting, clock=clock, actor=actor(), documents=documents):
        file.close()
        file.path.unlink()
        yield


def merge_crls(station: Station, crls: Sequence[Path]) -> tuple[tuple[Merged, ...], CrlSet]:
    """Take over what CRLs from elsewhere list, and sign a CRL with all of it and a number above all of theirs.

    Raises:
        ConfigurationError: a CRL is not of this station's CA; nothing was changed.
        AuthorityError: the issuing CA cannot be unlocked; nothing was changed.
    """
    known = [(str(path), crl) for path in crls for crl in read_crls(path, station.cas)]
    unlock_all(station, [ca.key_id for ca in station.cas.signing])
    with station.signing() as transaction:
        merged = tuple(_merge(transaction, source, crl) for source, crl in known)
    return merged, sign_and_store_crl(station)


def _continue(
    station: Station, manifest: Manifest, crls: Sequence[Path], timeout_s: float, lost: Sequence[str]
) -> tuple[tuple[Problem, ...], tuple[Merged, ...], CrlSet]:
    # Every key that is to sign fits its certificate, or this ends here.
    for word in lost:
        give_up_key(station, word)
    unlock_all(station, [ca.key_id for ca in station.cas.signing])
    problems = audit_check.check(station.registry).problems
    known = [(str(path), crl) for path in crls for crl in read_crls(path, station.cas)]
    found, unknown, policies = _from_gateways(station, timeout_s)
    now = station.clock()
    with station.registry.transaction() as transaction:
        transaction.record(
            "restore",
            "station",
            backup_of=manifest.created_at.isoformat(),
            made_by=manifest.made_by,
            audit_problems=len(problems),
        )
        _jump(transaction, manifest, now)
        _take_over(transaction, policies)
        merged = tuple(_merge(transaction, source, crl) for source, crl in [*known, *found])
    return problems, (*merged, *unknown), sign_and_store_crl(station)


def _jump(transaction: Transaction, manifest: Manifest, now: datetime) -> None:
    """Leave out every number that the lost station may have used."""
    for ca in read_cas(transaction):
        name = crl_number_counter(ca.key_id)
        transaction.set_counter(name, max(transaction.counter(name), int(now.timestamp())))
    transaction.set_counter(LAST_ROW, transaction.counter(LAST_ROW) + ROWS_JUMP)
    transaction.set_counter(POLICY_VERSION, max(transaction.counter(POLICY_VERSION), int(now.timestamp())))
    backed_up_at = int(manifest.created_at.timestamp())
    transaction.set_counter(LAST_ISSUED_AT, max(transaction.counter(LAST_ISSUED_AT), backed_up_at))
    transaction.set_counter(LAST_BACKUP_AT, max(transaction.counter(LAST_BACKUP_AT), backed_up_at))


def _take_over(transaction: Transaction, policies: Sequence[SignedPolicy]) -> None:
    """Take the newest policy of the fleet that is known anywhere for the last one."""
    newest = max(policies, key=lambda policy: policy.version, default=None)
    before = current_policy(transaction)
    if newest is None or (before is not None and before.version >= newest.version):
        return
    keep_policy(transaction, newest)
    transaction.set_counter(POLICY_VERSION, max(transaction.counter(POLICY_VERSION), newest.version))
    transaction.record("merge-policy", "fleet", version=newest.version, sha256=newest.text_sha256)


def _from_gateways(
    station: Station, timeout_s: float
) -> tuple[list[tuple[str, KnownCrl]], list[Merged], list[SignedPolicy]]:
    """Return the CRLs that can be had of the gateways, all asked at once, and those of which none can.

    Beside them the policies of their fleet that are held where they are reached.
    """
    settings, cas = station.settings, station.cas
    policies: list[SignedPolicy] = []
    answers = {
        gateway.name: _of_file(gateway.crl_path, cas)
        for gateway in settings.gateways
        if gateway.crl_path is not None
    }
    reached = contacts(settings.gateways, settings.upstreams, station.root_path)
    for told, held in in_order(lambda contact: _held_at(contact, cas, timeout_s), reached):
        answers |= told
        policies += held
    found: list[tuple[str, KnownCrl]] = []
    unknown: list[Merged] = []
    for gateway in settings.gateways:
        answer = answers[gateway.name]
        if isinstance(answer, BirthmarkError):
            unknown.append(Merged(gateway.name, cause=answer.message))
        else:
            found += [(gateway.name, crl) for crl in answer]
    return found, unknown, policies


def _of_file(path: Path, cas: Cas) -> list[KnownCrl] | BirthmarkError:
    try:
        return read_crls(path, cas)
    except BirthmarkError as error:
        return error


def _held_at(
    contact: Contact, cas: Cas, timeout_s: float
) -> tuple[dict[str, list[KnownCrl] | BirthmarkError], list[SignedPolicy]]:
    """Return what each gateway at a contact holds, or why that is not known; and the policy that is held there."""
    try:
        told, policies = crls_in_force(contact, [ca.key_id for ca in cas.issuing], timeout_s=timeout_s)
    except BirthmarkError as error:
        return {gateway.name: error for gateway in contact.gateways}, []
    found = [trusted_policy(payload, cas) for payload in policies]
    answers = {name: _of_answer(name, answer, cas) for name, answer in told.items()}
    return answers, [policy for policy in found if policy is not None]


def _of_answer(name: str, answer: list[bytes] | BirthmarkError, cas: Cas) -> list[KnownCrl] | BirthmarkError:
    if isinstance(answer, BirthmarkError):
        return answer
    try:
        return [crl for der in answer for crl in parse_crls(der, cas, of=name)]
    except BirthmarkError as error:
        return error


def _merge(transaction: Transaction, source: str, crl: KnownCrl) -> Merged:
    """Take over what one CRL says."""
    newly = 0
    for cert_serial, revoked_at, reason in crl.entries:
        row = transaction.by_cert_serial(cert_serial) or lost_row(transaction, cert_serial, crl.issuer)
        word = f"on CRL {crl.number} of before the restore"
        newly += mark_revoked(transaction, row, reason, word=word, now=revoked_at)
    number_name, time_name = crl_number_counter(crl.issuer), crl_this_update_counter(crl.issuer)
    transaction.set_counter(number_name, max(transaction.counter(number_name), crl.number))
    this_update = int(crl.this_update.timestamp())
    transaction.set_counter(time_name, max(transaction.counter(time_name), this_update))
    transaction.record(
        "merge-crl",
        "issuing-ca",
        number=crl.number,
        entries=len(crl.entries),
        newly=newly,
        source=source,
        issuer=crl.issuer,
    )
    return Merged(source, crl.number, newly, issuer=crl.issuer)


def read_crls(path: Path, cas: Iterable[Ca]) -> list[KnownCrl]:
    """Read the CRLs in a file, PEM or DER, that CAs of this station signed; what others signed is passed over.

    Raises:
        ConfigurationError: it cannot be read, or none of them is this station's.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"could not use the CRL {path}: {error.strerror}", hint=_CRL_HINT) from error
    return parse_crls(content, cas, of=str(path))


def parse_crls(content: bytes, cas: Iterable[Ca], *, of: str) -> list[KnownCrl]:
    """Read CRLs, PEM or DER, as `read_crls` does; `of` says in an error whose they are."""
    what, hint = f"could not use the CRL {of}", _CRL_HINT
    try:
        is_pem = content.lstrip().startswith(b"-----BEGIN")
        blocks = [der for label, der in read_blocks(content) if label == CRL] if is_pem else [content]
        found = [x509.load_der_x509_crl(der) for der in blocks]
        known = [_known(crl, ca) for crl in found for ca in cas if _is_signed_by(crl, ca)]
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, CredentialError) as error:
        raise ConfigurationError(f"{what}: it is no CRL", hint=hint) from error
    if not found:
        raise ConfigurationError(f"{what}: it is no CRL", hint=hint)
    if not known:
        raise ConfigurationError(f"{what}: this station's CA did not sign it", hint="is it another station's?")
    return known


def _is_signed_by(crl: x509.CertificateRevocationList, ca: Ca) -> bool:
    certificate = ca.certificate
    return crl.issuer == certificate.subject and crl.is_signature_valid(
        cast(EllipticCurvePublicKey, certificate.public_key())
    )


def _known(crl: x509.CertificateRevocationList, ca: Ca) -> KnownCrl:
    number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    return KnownCrl(ca.key_id, number, crl.last_update_utc, tuple(_entry(item) for item in crl))


def _entry(item: x509.RevokedCertificate) -> tuple[int, datetime, x509.ReasonFlags]:
    try:
        reason = item.extensions.get_extension_for_class(x509.CRLReason).value.reason
    except x509.ExtensionNotFound:
        reason = x509.ReasonFlags.unspecified
    if reason.value not in REASON_NAMES:
        reason = x509.ReasonFlags.unspecified
    return item.serial_number, item.revocation_date_utc, reason


def _unpack(members: Iterator[Member], folder: Path) -> None:
    """Write the members of a backup, each whole and on disk."""
    for member in members:
        path = folder / member.name
        if path.parent != folder:
            private_folder(path.parent)
        with durable_file(path, mode=member.mode & _MODES) as file:
            shutil.copyfileobj(member.content, file, _COPY_BYTES)
