"""What `birthmark doctor` looks at, gathered once: values for the pure checks in `checkup_rules`.

Rules:

- Nothing is changed and no passphrase is asked for: a locked station can be looked at. (The audit log may be given
  entries that a killed command left in the registry, as with any other command; that is said.)
- Every row is read once, for all checks together; what is kept of ten thousand is counts and the rows to be named.
- What cannot be read (a CRL, a file) is a fact like any other; only a registry or settings that cannot be read at
  all end the look.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.errors import BirthmarkError
from birthmark.device.escape import escaped
from birthmark.provisioning import keyfile
from birthmark.provisioning.audit import Head
from birthmark.provisioning.audit_check import end_is_sound
from birthmark.provisioning.audit_checkpoint import LAST_CHECKPOINT_AT
from birthmark.provisioning.backup import LAST_BACKUP_AT
from birthmark.provisioning.cas import Ca, CaKind, read_cas
from birthmark.provisioning.checkup_census import STUCK_AFTER, Census, Seen
from birthmark.provisioning.crls import crl_this_update_counter, kept_crls
from birthmark.provisioning.fleet_policy import current_policy
from birthmark.provisioning.gateway_look import Look, look_at
from birthmark.provisioning.gateway_receipts import completed, look_by_receipts, standing_of
from birthmark.provisioning.places import KEYS_FOLDER
from birthmark.provisioning.registry.interface import LAST_ISSUED_AT, moment
from birthmark.provisioning.registry.opening import has_password
from birthmark.provisioning.retirement import due_retirements
from birthmark.provisioning.tokens.uri import TokenUri

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from birthmark.provisioning.crls import KeptCrl
    from birthmark.provisioning.registry.interface import View
    from birthmark.provisioning.registry.line import Batch, Quarantined
    from birthmark.provisioning.settings import Lifetimes
    from birthmark.provisioning.station import Station

_MAX_LINE_BYTES: Final = 1 << 20


class Level(IntEnum):
    """How bad a remark is. The worst one decides the exit code."""

    WELL = 0
    NOTE = 1
    """Worth knowing; nobody has to do anything."""
    SOON = 2
    """A person has to do something, before long."""
    BROKEN = 3
    """Something does not work, or lets in what it should not."""


@dataclass(frozen=True, slots=True)
class Remark:
    """What one check has to say."""

    check: str
    level: Level
    text: str
    hint: str = ""
    about: tuple[str, ...] = ()
    """Identities, gateways or files that it is about; a few of them."""


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun: `1 device`, `2 devices`."""
    return f"1 {one}" if number == 1 else f"{number} {many or one + 's'}"


@dataclass(frozen=True, slots=True)
class CrlFacts:
    """A CRL that the station keeps."""

    number: int
    this_update: datetime
    next_update: datetime
    missing: int = 0
    """Revoked certificates that it does not list."""
    last_number: int = 0
    """The last number that was given out; above `number`, it is not the newest CRL."""


@dataclass(frozen=True, slots=True)
class TokenLook:
    """What a look at a PKCS#11 token found, without its PIN."""

    label: str
    trouble: str = ""
    """Why its key cannot be used."""
    hint: str = ""
    last_try: bool = False
    """One more wrong PIN locks it."""
    failed_before: bool = False
    """Somebody gave a wrong PIN, and nobody a right one since."""


@dataclass(frozen=True, slots=True)
class CaFacts:
    """A CA of the station."""

    name: str
    key_id: str
    is_root: bool
    not_before: datetime
    not_after: datetime
    has_key: bool
    """Whether its key is at hand: in its file, or in a token that is there."""
    crl: CrlFacts | None
    is_issuing: bool = True
    """Whether it issues anything now; an issuing CA that does not still signs its CRL."""
    is_lost: bool = False
    """Whether its key was given up for lost."""
    token: TokenLook | None = None
    """Its token, if its key is in one."""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A file or folder of the station."""

    path: Path
    mode: int
    owner: int
    allowed: int
    """The bits that it may have."""
    is_secret: bool
    is_known: bool = True
    """False for the key of a CA that the registry does not know."""


@dataclass(frozen=True, slots=True)
class AuditFacts:
    """The audit log's end, and what the registry expects there."""

    found: Head | None
    """None: the last line is no entry."""
    expected: Head
    lacks: bool = False
    """Whether entries were missing at its end, which the registry has given it again."""
    is_sound: bool = True
    """Whether its last entries continue each other."""


@dataclass(frozen=True, slots=True)
class PolicyFacts:
    """The policy of the fleet that was published last."""

    version: int
    issuer: str
    """The key identifier of the CA that signed it."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that the checks go by."""

    now: datetime
    census: Census
    last_issued_at: datetime
    last_crl_at: datetime
    last_backup_at: datetime | None
    last_checkpoint_at: datetime | None
    lifetimes: Lifetimes
    cas: tuple[CaFacts, ...] = ()
    batch: Batch | None = None
    quarantined: tuple[Quarantined, ...] = ()
    overdue_retirements: int = 0
    """Certificates that were renewed, and should have been revoked a day ago."""
    files: tuple[FileFacts, ...] = ()
    user: int = 0
    audit: AuditFacts = field(default_factory=lambda: AuditFacts(Head(), Head()))
    free_bytes: int = 1 << 40
    is_read_only: bool = False
    """Whether the station's disk is mounted read-only."""
    gateways: tuple[Look, ...] = ()
    looked_at_gateways: bool = True
    last_heard: Mapping[str, datetime | None] = field(default_factory=dict)
    """When each gateway was last known to be there."""
    policy: PolicyFacts | None = None
    """None: none was published."""


def gather(station: Station, *, timeout_s: float | None) -> Facts:
    """Look at a station and its gateways.

    Args:
        station: which; it is not unlocked.
        timeout_s: how long to wait for the gateways; None: they are not looked at.

    Raises:
        RegistryError: the registry or the audit log cannot be read.
    """
    now = station.clock()
    log = station.registry.audit_path
    before, expected = _last_entry(log), station.registry.audit_head()
    lacks = before is not None and before.seq < expected.seq
    found = _asked(station, timeout_s)
    with station.registry.view() as view:
        cas = _cas(station, view)
        issuers = frozenset(ca.key_id for ca in read_cas(view) if ca.kind is CaKind.ISSUING)
        census = Census(now, issuers, Seen.of(found))
        for row in view.stream():
            census.add(row)
        backed_up_s = view.counter(LAST_BACKUP_AT)
        facts: dict[str, Any] = {
            "last_issued_at": moment(view, LAST_ISSUED_AT),
            "last_crl_at": max(moment(view, crl_this_update_counter(ca.key_id)) for ca in cas),
            "last_backup_at": datetime.fromtimestamp(backed_up_s, UTC) if backed_up_s else None,
            "last_checkpoint_at": moment(view, LAST_CHECKPOINT_AT) if view.counter(LAST_CHECKPOINT_AT) else None,
            "batch": view.open_batch(),
            "quarantined": tuple(view.quarantined()),
            "overdue_retirements": len(due_retirements(view, now - STUCK_AFTER)),
        }
        looks = _looks(station, view, every=timeout_s is None)
        policy = current_policy(view)
        standings = {gateway.name: standing_of(view, gateway.name) for gateway in station.settings.gateways}
    looks += [completed(look, standings[look.name]) for look in found]
    return Facts(
        now=now,
        census=census,
        lifetimes=station.settings.lifetimes,
        cas=tuple(cas),
        files=tuple(_files(station)),
        user=os.geteuid(),
        audit=AuditFacts(_last_entry(log), expected, lacks, not log.exists() or end_is_sound(log)),
        free_bytes=shutil.disk_usage(station.folder).free,
        is_read_only=station.is_read_only,
        gateways=tuple(looks),
        last_heard={name: standing.heard_at for name, standing in standings.items()},
        policy=None if policy is None else PolicyFacts(policy.version, policy.issuer),
        looked_at_gateways=timeout_s is not None,
        **facts,
    )


def _asked(station: Station, timeout_s: float | None) -> list[Look]:
    """Ask the gateways that can be asked; none of them if `timeout_s` is None."""
    if timeout_s is None:
        return []
    return look_at(
        station.settings.gateways,
        anchors_path=station.root_path,
        timeout_s=timeout_s,
        upstreams=station.settings.upstreams,
    )


def _cas(station: Station, view: View) -> list[CaFacts]:
    kept = kept_crls(station, view)
    kinds = [one.ca.kind for one in kept]
    return [_ca(station, one, is_only=kinds.count(one.ca.kind) == 1) for one in kept]


def _ca(station: Station, kept: KeptCrl, *, is_only: bool) -> CaFacts:
    ca, crl = kept.ca, kept.crl
    certificate = ca.certificate
    name = "the root" if ca.kind is CaKind.ROOT else "the issuing CA"
    token = _token(station, ca) if ca.key_uri and ca.lost_at is None else None
    return CaFacts(
        name=name if is_only else f"{name} {ca.short}",
        key_id=ca.key_id,
        is_root=ca.kind is CaKind.ROOT,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        has_key=station.key_place(ca) not in ("away", "lost") and not (token and token.trouble),
        token=token,
        is_lost=ca.lost_at is not None,
        is_issuing=ca.clients or ca.brokers,
        crl=None
        if crl is None
        else CrlFacts(crl.number, crl.this_update, crl.next_update, kept.missing, kept.last_number),
    )


def _token(station: Station, ca: Ca) -> TokenLook:
    uri = TokenUri.parse(ca.key_uri)
    label = escaped(uri.label)
    try:
        facts = station.tokens.token(uri).facts()
    except BirthmarkError as error:
        return TokenLook(label, error.message, error.hint)
    if facts.locked:
        return TokenLook(label, "its PIN is locked", "its security officer sets a new one, with the vendor's tool")
    return TokenLook(label, last_try=facts.last_try, failed_before=facts.failed_before)


def _looks(station: Station, view: View, *, every: bool) -> list[Look]:
    """Return what receipts said last of the gateways that are reached by a path, or of every one."""
    return [
        look_by_receipts(gateway, standing_of(view, gateway.name))
        for gateway in station.settings.gateways
        if every or gateway.crl_path is not None
    ]


def _files(station: Station) -> Iterable[FileFacts]:
    keys = station.folder / KEYS_FOLDER
    url = station.settings.registry.url
    keeps_password = bool(url) and has_password(url)
    for folder in (station.folder, keys):
        yield from _file(folder, 0o700, is_secret=folder == keys)
    known = {station.key_path(ca) for ca in station.cas}
    for path in station.files():
        is_secret = path.parent == keys or (path == station.settings_path and keeps_password)
        is_known = not path.name.endswith(".key.pem") or path in known
        allowed = keyfile.KEY_FILE_MODE if path.parent == keys else 0o600 if is_secret else 0o644
        yield from _file(path, allowed, is_secret=is_secret, is_known=is_known)
    for path in station.registry.files():
        yield from _file(path, 0o600, is_secret=False)
    yield from _file(station.registry.audit_path, 0o600, is_secret=False)


def _file(path: Path, allowed: int, *, is_secret: bool, is_known: bool = True) -> Iterable[FileFacts]:
    try:
        status = path.stat()
    except OSError:
        return
    yield FileFacts(path, stat.S_IMODE(status.st_mode), status.st_uid, allowed, is_secret, is_known)


def _last_entry(path: Path) -> Head | None:
    """Return the number and hash of the audit log's last line; None if that is no entry."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _MAX_LINE_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return Head()
    except OSError:
        return None
    if lines[-1]:  # every whole line ends in a line end
        return None
    try:
        entry = json.loads(lines[-2])
        return Head(int(entry["seq"]), str(entry["hash"]))
    except (ValueError, KeyError, TypeError, IndexError):
        return None
