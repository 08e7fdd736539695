"""The checks of `birthmark doctor`: each looks at the facts and says what will hurt. Pure; no clock, no files.

A check returns nothing where all is well. `CHECKS` is the list; what each is for stands in docs/doctor.md.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final

from birthmark.device.escape import escaped
from birthmark.provisioning.checkup import CaFacts, Facts, Level, Remark, counted
from birthmark.provisioning.checkup_census import ENDING_WITHIN, NAMED
from birthmark.provisioning.checkup_gateways import (
    check_addresses,
    check_gateway_crls,
    check_gateways,
    check_let_in,
    check_never_connected,
    check_policy,
    check_unknown,
    check_upstreams,
)
from birthmark.provisioning.profile import CRL_LIFETIME
from birthmark.provisioning.registry.model import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import datetime

    from birthmark.provisioning.checkup_census import Few

CA_MARGIN: Final = timedelta(days=180)
"""How long before a CA ends its successor should be in hand, beyond the lifetime of what it signs."""
ROOT_CRL_MARGIN: Final = timedelta(days=30)
BATCH_OPEN: Final = timedelta(days=7)
BACKUP_AGE: Final = timedelta(days=7)
CHECKPOINT_AGE: Final = timedelta(days=30)
CLOCK_STEP: Final = timedelta(minutes=2)
_CENTURY_S: Final = timedelta(days=36_525).total_seconds()
LITTLE_SPACE_BYTES: Final = 200_000_000
NO_SPACE_BYTES: Final = 20_000_000
_OTHERS: Final = 0o7077


def examine(facts: Facts) -> list[Remark]:
    """Return what every check has to say, the worst first; one WELL remark for a check that has nothing to say."""
    remarks: list[Remark] = []
    for name, check in CHECKS:
        found = list(check(facts))
        remarks += found or [Remark(name, Level.WELL, "")]
    return sorted(remarks, key=lambda remark: -remark.level)


def _check_devices(facts: Facts) -> Iterator[Remark]:
    ended, soon = facts.census.ended_devices, facts.census.ending_devices
    if ended.count:
        text = f"{counted(ended.count, 'device')} cannot connect: the certificate has ended"
        yield _about("devices", Level.SOON, text, "renew or reflash them", ended)
    if soon.count:
        text = f"{counted(soon.count, 'device certificate')} to end within {ENDING_WITHIN.days} days"
        hint = "a device renews by itself at two thirds of the lifetime: is it online?"
        yield _about("devices", Level.SOON, text, hint, soon)


def _check_services(facts: Facts) -> Iterator[Remark]:
    for kind, name, not_after in facts.census.ending_services:
        command = "issue-broker" if kind is Kind.BROKER else "issue-operator"
        hint = f"birthmark {command} {name} --renew, and bring the new file to where the old one is"
        if not_after < facts.now:
            text = f"the certificate of the {kind} {name} has ended on {not_after:%Y-%m-%d}"
            yield Remark("services", Level.BROKEN, text, hint, (name,))
        else:
            text = f"the certificate of the {kind} {name} ends on {not_after:%Y-%m-%d}"
            yield Remark("services", Level.SOON, text, hint, (name,))


def _check_lifetimes(facts: Facts) -> Iterator[Remark]:
    for kind, days in facts.lifetimes.out_of_range().items():
        text = f"{kind} = {days} of [lifetimes_days] is out of range: nothing can be issued for a {kind}"
        yield Remark("lifetimes", Level.BROKEN, text, "set it right in station.toml", (kind,))


def _check_cas(facts: Facts) -> Iterator[Remark]:
    can_issue = Kind.DEVICE not in facts.lifetimes.out_of_range()
    for ca in facts.cas:
        signs = facts.lifetimes.of(Kind.DEVICE) if ca.is_issuing and not ca.is_root and can_issue else timedelta()
        hint = f"replace it: birthmark ca rollover start {'root' if ca.is_root else 'issuing'}"
        if ca.not_after < facts.now:
            text = f"{ca.name} has ended on {ca.not_after:%Y-%m-%d}: nothing under it is accepted any more"
            yield Remark("cas", Level.BROKEN, text, hint, (ca.name,))
        elif ca.not_after - facts.now < signs + CA_MARGIN and (ca.is_root or ca.is_issuing):
            text = f"{ca.name} ends on {ca.not_after:%Y-%m-%d}"
            if signs:
                text += ": what it signs from now on, or soon, lives less long than it should"
            yield Remark("cas", Level.SOON, text, hint, (ca.name,))
        if not ca.is_root and not ca.has_key:
            can = "neither issue nor revoke" if ca.is_issuing else "not sign its CRL"
            text = f"the key of {ca.name} is not here: this station can {can}"
            hint = "bring it back, or restore it from a backup"
            if ca.is_lost:
                text = f"the key of {ca.name} was given up for lost: this station can {can}"
                hint = "replace the CA: birthmark ca rollover start issuing; in the end: ... retire issuing"
            if ca.token is not None:
                text = f"the token {ca.token.label} has the key of {ca.name}: {ca.token.trouble}"
                hint = ca.token.hint
            yield Remark("cas", Level.BROKEN, text, hint, (ca.name,))
        elif ca.token is not None and (ca.token.last_try or ca.token.failed_before):
            more = "one more would lock it" if ca.token.last_try else "after a few it locks itself"
            text = f"the token {ca.token.label} with the key of {ca.name} was given a wrong PIN last: {more}"
            yield Remark("cas", Level.SOON, text, "give it the right one: birthmark ca token check", (ca.name,))


def _check_crls(facts: Facts) -> Iterator[Remark]:
    for ca in facts.cas:
        yield from _root_crl(ca, facts.now) if ca.is_root else _crl(ca, facts.now)


def _crl(ca: CaFacts, now: datetime) -> Iterator[Remark]:
    hint = "sign a new one and bring it to the gateways: birthmark crl"
    if ca.crl is None:
        yield Remark("crls", Level.BROKEN, f"the CRL of {ca.name} is missing or damaged", hint, (ca.name,))
        return
    if ca.crl.next_update < now:
        text = f"the CRL of {ca.name} has ended on {ca.crl.next_update:%Y-%m-%d %H:%M}"
        yield Remark("crls", Level.BROKEN, text, hint, (ca.name,))
    elif ca.crl.next_update - now < CRL_LIFETIME / 2:
        text = f"the CRL of {ca.name} is past half of its life: it ends on {ca.crl.next_update:%Y-%m-%d %H:%M}"
        yield Remark("crls", Level.SOON, text, hint, (ca.name,))
    if ca.crl.missing:
        text = f"{counted(ca.crl.missing, 'revoked certificate')} not on the CRL of {ca.name}: still let in"
        yield Remark("crls", Level.BROKEN, text, hint, (ca.name,))
    elif ca.crl.number < ca.crl.last_number and not ca.is_lost:
        text = (
            f"the CRL of {ca.name} is {ca.crl.number}, and {ca.crl.last_number} was the last number: "
            "an older file was put back, or a signing was cut off"
        )
        yield Remark("crls", Level.SOON, text, hint, (ca.name,))


def _root_crl(ca: CaFacts, now: datetime) -> Iterator[Remark]:
    hint = (
        "birthmark crl --root"
        if ca.has_key
        else "with the root's key at hand: birthmark crl --root --root-key FILE"
    )
    if ca.crl is None:
        yield Remark("crls", Level.SOON, f"the CRL of {ca.name} is missing or damaged", hint, (ca.name,))
    elif ca.crl.next_update - now < ROOT_CRL_MARGIN:
        verb = "has ended" if ca.crl.next_update < now else "ends"
        text = f"the CRL of {ca.name} {verb} on {ca.crl.next_update:%Y-%m-%d}; gateways do not use it, linters do"
        yield Remark("crls", Level.SOON, text, hint, (ca.name,))


def _check_root_key(facts: Facts) -> Iterator[Remark]:
    for ca in facts.cas:
        if ca.is_root and ca.has_key:
            text = f"the key of {ca.name} is still on this station: whoever takes the station takes the root"
            hint = "move it to removable media: birthmark ca detach-root --to DIR"
            yield Remark("root-key", Level.SOON, text, hint, (ca.name,))


def _check_keys(facts: Facts) -> Iterator[Remark]:
    census = facts.census
    if census.odd_keys.count:
        text = f"{counted(census.odd_keys.count, 'key')} of another kind than P-256"
        yield _about("keys", Level.SOON, text, "issue these identities anew", census.odd_keys)
    if census.duplicate_keys.count:
        text = f"{counted(census.duplicate_keys.count, 'key')} that another identity has, too"
        hint = "revoke both, and find out how it came to that"
        yield _about("keys", Level.BROKEN, text, hint, census.duplicate_keys)
    for trouble, rows in sorted(census.foreign.items()):
        text = f"{counted(rows.count, 'row')} in the registry with a certificate that {trouble}"
        hint = "the registry was changed by hand, or is damaged: restore it from a backup"
        yield _about("keys", Level.BROKEN, text, hint, rows)


def _check_clock(facts: Facts) -> Iterator[Remark]:
    hint, says = "set this station's clock right", f"this station's clock says {facts.now:%Y-%m-%d %H:%M}"
    for ca in facts.cas:
        if facts.now < ca.not_before:
            text = f"{says}, and {ca.name} begins on {ca.not_before:%Y-%m-%d}"
            yield Remark("clock", Level.BROKEN, text, hint)
    marks = (("issued a certificate at", facts.last_issued_at), ("signed a CRL dated", facts.last_crl_at))
    for what, last in marks:
        if facts.now < last - timedelta(seconds=2):
            yield Remark("clock", Level.BROKEN, f"{says}, but it {what} {last:%Y-%m-%d %H:%M}", hint)
    for look in facts.gateways:
        if look.status is None or not look.status.online:
            continue
        # A gateway may say any number: beyond a century it is wrong, and how wrong does not matter.
        apart_s = max(-_CENTURY_S, min(look.looked_at_s - look.status.clock, _CENTURY_S))
        apart = timedelta(seconds=apart_s)
        # What is retained was said half a minute ago at most: a clock that is right is no further behind.
        if not -CLOCK_STEP < apart < CLOCK_STEP:
            where = "behind" if apart > timedelta() else "ahead of"
            text = f"the clock of the gateway {look.name} is {_span(abs(apart))} {where} this station's"
            yield Remark("clock", Level.SOON, text, "set both by the same time server", (look.name,))


def _check_files(facts: Facts) -> Iterator[Remark]:
    for file in facts.files:
        path = escaped(str(file.path))
        if file.mode & ~file.allowed & _OTHERS:
            level = Level.BROKEN if file.is_secret else Level.SOON
            text = f"{path} has mode {file.mode:04o}: others may read or change it"
            yield Remark("files", level, text, f"chmod {file.mode & file.allowed:04o} {path}", (path,))
        if not file.is_known:
            text = f"{path} is the key of no CA that the registry knows"
            hint = "a killed `ca rollover start` left it, or the registry is older than it: put it in a safe place"
            yield Remark("files", Level.SOON, text, hint, (path,))
        if facts.user and file.owner != facts.user:
            text = f"{path} belongs to another user (uid {file.owner})"
            hint = "run the station's commands as one user, who has all files"
            yield Remark("files", Level.SOON, text, hint, (path,))


def _check_batch(facts: Facts) -> Iterator[Remark]:
    if facts.batch is None:
        return
    age = facts.now - facts.batch.opened_at
    level = Level.SOON if age > BATCH_OPEN else Level.NOTE
    text = f"the batch {facts.batch.name} has been open for {_span(age)}"
    yield Remark("batch", level, text, "when it is made: birthmark batch close", (facts.batch.name,))


def _check_quarantine(facts: Facts) -> Iterator[Remark]:
    units = facts.quarantined
    if units:
        since = min(unit.since for unit in units)
        text = f"{counted(len(units), 'unit')} in quarantine, the first since {since:%Y-%m-%d}"
        named = tuple(unit.name or unit.hwid.hex() for unit in units[:NAMED])
        yield Remark("quarantine", Level.SOON, text, "birthmark quarantine list", named)


def _check_stuck(facts: Facts) -> Iterator[Remark]:
    stuck = facts.census.stuck
    if stuck.count:
        text = f"{counted(stuck.count, 'identity', 'identities')} begun more than a day ago and not finished"
        yield _about("stuck", Level.SOON, text, "finish them (birthmark resume), or revoke them", stuck)


def _check_renewals(facts: Facts) -> Iterator[Remark]:
    if facts.overdue_retirements:
        text = f"{counted(facts.overdue_retirements, 'renewed certificate')} not revoked, and it is past the grace"
        yield Remark("renewals", Level.SOON, text, "see that birthmark renewd runs")
    if facts.census.renewing.count:
        text = f"{counted(facts.census.renewing.count, 'renewal')} not confirmed for more than a day"
        hint = "the device keeps its old certificate, and asks again when it is online"
        yield _about("renewals", Level.NOTE, text, hint, facts.census.renewing)


def _check_audit(facts: Facts) -> Iterator[Remark]:
    found, expected = facts.audit.found, facts.audit.expected
    hint = "see where: birthmark audit verify"
    if found is None:
        yield Remark("audit", Level.BROKEN, "the audit log's last line is no entry", hint)
    elif found != expected:
        text = f"the audit log ends with an entry {found.seq} that is not the registry's {expected.seq}"
        yield Remark("audit", Level.BROKEN, text, hint)
    elif not facts.audit.is_sound:
        yield Remark("audit", Level.BROKEN, "the audit log's last entries do not continue each other", hint)
    elif facts.audit.lacks:
        text = "the audit log lacked entries at its end, and has been given them again"
        hint = "a command was killed or is at work; otherwise somebody cut it: birthmark audit show --last 5"
        yield Remark("audit", Level.NOTE, text, hint)


def _check_checkpoint(facts: Facts) -> Iterator[Remark]:
    hint = "birthmark audit checkpoint --out FILE, and carry the file away"
    last, made_at = facts.last_checkpoint_at, min((ca.not_before for ca in facts.cas), default=facts.now)
    if facts.now - (last or made_at) <= CHECKPOINT_AGE:
        return
    if last is None:
        text = "no checkpoint of the audit log was ever carried away: a log rewritten whole would not be noticed"
        yield Remark("checkpoint", Level.SOON, text, hint)
    elif last < max(facts.last_issued_at, facts.last_crl_at):
        yield Remark("checkpoint", Level.SOON, f"the last checkpoint is {_span(facts.now - last)} old", hint)


def _check_backup(facts: Facts) -> Iterator[Remark]:
    hint, last = "birthmark backup FILE", facts.last_backup_at
    if last is None:
        if facts.census.rows:
            yield Remark("backup", Level.SOON, "this station was never backed up", hint)
    elif facts.now - last > BACKUP_AGE and last < max(facts.last_issued_at, facts.last_crl_at):
        text = f"the last backup is {_span(facts.now - last)} old, and something was issued or revoked since"
        yield Remark("backup", Level.SOON, text, hint)


def _check_disk(facts: Facts) -> Iterator[Remark]:
    if facts.is_read_only:
        text = "the station's disk is mounted read-only: nothing can be issued or revoked"
        yield Remark("disk", Level.BROKEN, text, "mount it to write; a backup is restored: birthmark restore")
    elif facts.free_bytes < LITTLE_SPACE_BYTES:
        level = Level.BROKEN if facts.free_bytes < NO_SPACE_BYTES else Level.SOON
        text = f"there is room for {facts.free_bytes // 1_000_000} MB more on the station's disk"
        yield Remark("disk", level, text, "make room: a station that cannot write stops")


def _about(check: str, level: Level, text: str, hint: str, rows: Few) -> Remark:
    return Remark(check, level, text, hint, tuple(rows.names))


def _span(span: timedelta) -> str:
    for name, unit in (("day", timedelta(days=1)), ("hour", timedelta(hours=1)), ("minute", timedelta(minutes=1))):
        if span >= 2 * unit:
            return f"{span // unit} {name}s"
    return counted(int(span.total_seconds()), "second")


CHECKS: Final[tuple[tuple[str, Callable[[Facts], Iterable[Remark]]], ...]] = (
    ("devices", _check_devices),
    ("services", _check_services),
    ("lifetimes", _check_lifetimes),
    ("cas", _check_cas),
    ("root-key", _check_root_key),
    ("crls", _check_crls),
    ("gateways", check_gateways),
    ("gateway-crls", check_gateway_crls),
    ("policy", check_policy),
    ("upstreams", check_upstreams),
    ("let-in", check_let_in),
    ("unknown", check_unknown),
    ("addresses", check_addresses),
    ("never-connected", check_never_connected),
    ("keys", _check_keys),
    ("clock", _check_clock),
    ("files", _check_files),
    ("batch", _check_batch),
    ("quarantine", _check_quarantine),
    ("stuck", _check_stuck),
    ("renewals", _check_renewals),
    ("audit", _check_audit),
    ("checkpoint", _check_checkpoint),
    ("backup", _check_backup),
    ("disk", _check_disk),
)
