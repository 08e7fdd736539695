"""The checks of `birthmark doctor`, one by one: silent where all is well, a word for each thing that is not."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.station import NOON, public_key_der

from birthmark.device.console import Console
from birthmark.device.messages import AddressSeen, GatewayStatus, Sighting, UpstreamState
from birthmark.provisioning.audit import Head
from birthmark.provisioning.checkup import (
    AuditFacts,
    CaFacts,
    CrlFacts,
    Facts,
    FileFacts,
    Level,
    PolicyFacts,
    Remark,
)
from birthmark.provisioning.checkup_census import Census, Seen
from birthmark.provisioning.checkup_rules import CHECKS, examine
from birthmark.provisioning.checkup_view import chart, exit_code, hanging, records, show
from birthmark.provisioning.gateway_look import Look
from birthmark.provisioning.registry.line import Batch, Quarantined
from birthmark.provisioning.registry.model import Kind, Row, State
from birthmark.provisioning.settings import Lifetimes

if TYPE_CHECKING:
    from collections.abc import Sequence

DAY = timedelta(days=1)
ISSUING = CaFacts(
    "the issuing CA", "ab12", is_root=False,
    not_before=NOON - 300 * DAY, not_after=NOON + 3000 * DAY, has_key=True,
    crl=CrlFacts(7, NOON - DAY, NOON + 29 * DAY),
)  # fmt: skip
ROOT = CaFacts(
    "the root", "cd34", is_root=True, not_before=NOON - 300 * DAY, not_after=NOON + 7000 * DAY, has_key=False,
    crl=CrlFacts(1, NOON - DAY, NOON + 300 * DAY),
)  # fmt: skip
STATUS = GatewayStatus("gw-1", True, (NOON - timedelta(seconds=20)).timestamp(), {"ab12": 7}, 0.0, "", 3)  # noqa: FBT003
SEEN = Sighting("sensor-1", "5a", 0.0, NOON.timestamp(), (AddressSeen("192.0.2.7", 0.0, NOON.timestamp()),))
LOOK = Look("gw-1", "mqtts://gw-1", "", (("ab12", 7),), STATUS, (SEEN,), NOON.timestamp())


def row(name: str = "sensor-1", cert_serial: int = 0x5A, **facts: Any) -> Row:
    values: dict[str, Any] = {
        "number": cert_serial,
        "kind": Kind.DEVICE,
        "name": name,
        "role": "sensor",
        "state": State.ATTESTED,
        "created_at": NOON - 30 * DAY,
        "changed_at": NOON - 30 * DAY,
        "hwid": bytes(8),
        "txn": bytes(16),
        "public_key_der": public_key_der(),
        "cert_serial": cert_serial,
        "certificate_der": b"",
        "not_after": NOON + 700 * DAY,
    }
    if facts.get("kind") is Kind.BROKER:
        values |= {"role": "", "hwid": None, "txn": None}
    return Row(**values | facts)


def census(*rows: Row, looks: Sequence[Look] = (LOOK,)) -> Census:
    found = Census(NOON, frozenset({"ab12"}), Seen.of(looks))
    for each in rows or (row(),):
        found.add(each)
    found.foreign.clear()  # these rows have no real certificates; test_checkup.py has rows that do
    return found


GOOD = Facts(
    now=NOON,
    census=census(),
    last_issued_at=NOON - DAY,
    last_crl_at=NOON - DAY,
    last_backup_at=NOON - DAY,
    last_checkpoint_at=NOON - DAY,
    lifetimes=Lifetimes(),
    cas=(ISSUING, ROOT),
    files=(FileFacts(Path("/station/keys/issuing.key.pem"), 0o400, 1000, 0o600, is_secret=True),),
    user=1000,
    audit=AuditFacts(Head(7, "aa"), Head(7, "aa")),
    gateways=(LOOK,),
)


def look(**changes: Any) -> Facts:
    looks = (replace(LOOK, **changes),)
    return replace(GOOD, gateways=looks, census=census(looks=looks))


def status(**changes: Any) -> Facts:
    return look(status=replace(STATUS, **changes))


def away(**changes: Any) -> Facts:
    facts = look(status=replace(STATUS, online=False), **changes)
    return replace(facts, last_heard={"gw-1": NOON - DAY})


def by_policy(version: int, issuer: str = "ab12") -> Facts:
    return replace(status(policy_version=version), policy=PolicyFacts(4, issuer))


DOWN = UpstreamState("far", connected=False, since=0.0, spooled=9, reason="refused\x1b")


def seen_at(*addresses: tuple[str, float, float]) -> Facts:
    """Days before noon at which each address was used first and last."""
    places = tuple(
        AddressSeen(address, (NOON - first * DAY).timestamp(), (NOON - last * DAY).timestamp())
        for address, first, last in addresses
    )
    return look(sightings=(replace(SEEN, addresses=places),))


def issuing(**changes: Any) -> Facts:
    return replace(GOOD, cas=(replace(ISSUING, **changes), ROOT))


def root(**changes: Any) -> Facts:
    return replace(GOOD, cas=(ISSUING, replace(ROOT, **changes)))


def file(**changes: Any) -> Facts:
    return replace(GOOD, files=(replace(GOOD.files[0], **changes),))


def crl(next_update: timedelta, missing: int = 0, last_number: int = 7) -> CrlFacts:
    return CrlFacts(7, NOON - 30 * DAY, NOON + next_update, missing, last_number)


def among(*rows: Row) -> Facts:
    return replace(GOOD, census=census(*rows))


SAME_KEY = public_key_der()
ENDING = row(not_before=NOON - 30 * DAY, not_after=NOON + DAY)
BROKER = row("gw-1", kind=Kind.BROKER, not_after=NOON - DAY)
SHORT_LIVED = row("gw-2", kind=Kind.BROKER, not_before=NOON - 28 * DAY, not_after=NOON + 13 * DAY)
SERVICE = row("alice", kind=Kind.SERVICE, role="operator", not_after=NOON + DAY)
TWINS = (row(public_key_der=SAME_KEY), row("b", 1, public_key_der=SAME_KEY))
ODD = Quarantined(bytes(8), NOON, "", "is odd", bytes(16))
LATE = row("late", 1, state=State.PREPARED, changed_at=NOON - 2 * DAY)
UNREACHABLE = look(cause="could not reach it", status=None, sightings=None)
BAD: list[tuple[str, Level, str, Facts]] = [
    ("devices", Level.SOON, "1 device cannot connect", among(row(not_after=NOON - DAY))),
    ("devices", Level.SOON, "1 device certificate to end", among(row(not_after=NOON + 29 * DAY))),
    ("devices", Level.SOON, "device certificate to end", among(ENDING)),
    ("services", Level.BROKEN, "broker gw-1 has ended", among(BROKER)),
    ("services", Level.SOON, "the broker gw-2 ends", among(SHORT_LIVED)),
    ("services", Level.SOON, "service alice ends", among(SERVICE)),
    ("lifetimes", Level.BROKEN, "device = 1 of", replace(GOOD, lifetimes=Lifetimes(device_days=1))),
    ("cas", Level.BROKEN, "the issuing CA has ended", issuing(not_after=NOON - DAY)),
    ("cas", Level.SOON, "lives less long than it should", issuing(not_after=NOON + 800 * DAY)),
    ("cas", Level.SOON, "the root ends", root(not_after=NOON + 100 * DAY)),
    ("cas", Level.BROKEN, "can neither issue nor revoke", issuing(has_key=False)),
    ("root-key", Level.SOON, "still on this station", root(has_key=True)),
    ("crls", Level.BROKEN, "missing or damaged", issuing(crl=None)),
    ("crls", Level.BROKEN, "has ended on", issuing(crl=crl(-DAY))),
    ("crls", Level.SOON, "past half of its life", issuing(crl=crl(14 * DAY))),
    ("crls", Level.BROKEN, "2 revoked certificates not on the CRL", issuing(crl=crl(29 * DAY, 2))),
    ("crls", Level.SOON, "is 7, and 9 was the last number", issuing(crl=crl(29 * DAY, last_number=9))),
    ("crls", Level.SOON, "the CRL of the root is missing", root(crl=None)),
    ("crls", Level.SOON, "the CRL of the root ends", root(crl=crl(DAY))),
    ("crls", Level.SOON, "the CRL of the root has ended", root(crl=crl(-DAY))),
    ("gateways", Level.SOON, "gw-1: could not reach", UNREACHABLE),
    ("gateways", Level.BROKEN, "was stopped", status(online=False)),
    ("gateways", Level.BROKEN, "has alarms: crl-due, \\x1b", status(alarms=("crl-due", "\x1b"))),
    ("gateways", Level.NOTE, "keeps from its operator", look(sightings=None)),
    ("gateways", Level.NOTE, "cloud does not tell who connected at gw-1", look(sightings=None, via="cloud")),
    ("gateways", Level.SOON, "gw-1 has no link to cloud since 2026-0", away(via="cloud")),
    ("gateways", Level.BROKEN, "gw-1 was stopped since 2026-0", away()),
    ("policy", Level.SOON, "gw-1 goes by version 3 of the policy, and 4 is current", by_policy(3)),
    ("policy", Level.SOON, "gw-1 goes by a policy of its own, and 4 is current", by_policy(0)),
    ("policy", Level.BROKEN, "gw-1 goes by version 5 of the policy, and 4 is ours", by_policy(5)),
    ("policy", Level.BROKEN, "version 5 of the policy, and none is ours", status(policy_version=5)),
    ("policy", Level.SOON, "version 4 of the policy is signed by a CA", by_policy(4, issuer="old")),
    ("upstreams", Level.SOON, "gw-1 has no link to far: refused\\x1b; 9 messages wait", status(upstreams=(DOWN,))),
    ("gateway-crls", Level.BROKEN, "CRL 6 of the issuing CA, and 7 is current", look(crl_numbers=(("ab12", 6),))),
    ("gateway-crls", Level.BROKEN, "CRL 9 of the issuing CA, and 7 is ours", look(crl_numbers=(("ab12", 9),))),
    ("gateway-crls", Level.BROKEN, "confirmed CRL 6 of the issuing CA last, and 7 is current", look(
        cause="away", crl_numbers=(("ab12", 6),), status=None, sightings=None)),
    ("gateway-crls", Level.SOON, "has no CRL of the issuing CA", look(crl_numbers=(("ee", 7),))),
    (
        "let-in", Level.BROKEN, "let sensor-1 in after its revocation",
        among(row(revoked_at=NOON - DAY, revocation_reason="keyCompromise")),
    ),
    ("unknown", Level.BROKEN, "1 identity was let in", look(sightings=(replace(SEEN, cert_serial="5b"),))),
    ("unknown", Level.BROKEN, "1 identity was let in", look(sightings=(replace(SEEN, id="other"),))),
    ("unknown", Level.BROKEN, "1 identity was let in", look(sightings=(replace(SEEN, cert_serial="rubbish"),))),
    ("addresses", Level.SOON, "192.0.2.7, 192.0.2.8", seen_at(("192.0.2.7", 6, 0), ("192.0.2.8", 3, 1))),
    (
        "addresses", Level.SOON, "several addresses",
        seen_at(*((f"192.0.2.{number}", 6 - number, 6 - number) for number in range(4))),
    ),
    ("never-connected", Level.NOTE, "1 device was made more than 7 days ago", look(sightings=())),
    ("keys", Level.SOON, "1 key of another kind", among(row(public_key_der=b"\x30\x82"))),
    ("keys", Level.BROKEN, "1 key that another identity has", among(*TWINS)),
    ("clock", Level.BROKEN, "the issuing CA begins", issuing(not_before=NOON + DAY)),
    ("clock", Level.BROKEN, "it issued a certificate at", replace(GOOD, last_issued_at=NOON + DAY)),
    ("clock", Level.BROKEN, "it signed a CRL dated", replace(GOOD, last_crl_at=NOON + DAY)),
    ("clock", Level.SOON, "gw-1 is 10 minutes behind", status(clock=NOON.timestamp() - 620)),
    ("clock", Level.SOON, "gw-1 is 3 hours ahead of", status(clock=NOON.timestamp() + 4 * 3600 - 10)),
    ("clock", Level.SOON, "gw-1 is 36525 days behind", status(clock=-1e308)),
    ("clock", Level.SOON, "gw-1 is 36525 days ahead of", status(clock=1e308)),
    ("files", Level.BROKEN, "has mode 0440", file(mode=0o440)),
    ("files", Level.SOON, "has mode 0664", file(mode=0o664, allowed=0o644, is_secret=False)),
    ("files", Level.SOON, "belongs to another user", file(owner=0)),
    ("batch", Level.NOTE, "open for 3 days", replace(GOOD, batch=Batch("W47", NOON - 3 * DAY))),
    ("batch", Level.SOON, "open for 8 days", replace(GOOD, batch=Batch("W47", NOON - 8 * DAY))),
    ("quarantine", Level.SOON, "1 unit in quarantine", replace(GOOD, quarantined=(ODD,))),
    ("stuck", Level.SOON, "1 identity begun", among(row(), LATE)),
    ("renewals", Level.SOON, "3 renewed certificates not revoked", replace(GOOD, overdue_retirements=3)),
    ("renewals", Level.NOTE, "1 renewal not confirmed", among(row(), LATE.changed(renews=0x5A))),
    ("audit", Level.BROKEN, "no entry", replace(GOOD, audit=AuditFacts(None, Head(7, "aa")))),
    ("audit", Level.BROKEN, "ends with an entry 6", replace(GOOD, audit=AuditFacts(Head(6, "aa"), Head(7, "aa")))),
    ("audit", Level.BROKEN, "not continue", replace(GOOD, audit=replace(GOOD.audit, lacks=True, is_sound=False))),
    ("audit", Level.NOTE, "lacked entries at its end", replace(GOOD, audit=replace(GOOD.audit, lacks=True))),
    ("audit", Level.BROKEN, "ends with an entry 7", replace(GOOD, audit=AuditFacts(Head(7, "bb"), Head(7, "aa")))),
    ("checkpoint", Level.SOON, "was ever carried away", replace(GOOD, last_checkpoint_at=None)),
    ("checkpoint", Level.SOON, "is 31 days old", replace(GOOD, last_checkpoint_at=NOON - 31 * DAY)),
    ("backup", Level.SOON, "never backed up", replace(GOOD, last_backup_at=None)),
    ("backup", Level.SOON, "is 20 days old", replace(GOOD, last_backup_at=NOON - 20 * DAY)),
    ("disk", Level.SOON, "room for 100 MB", replace(GOOD, free_bytes=100_000_000)),
    ("disk", Level.BROKEN, "room for 1 MB", replace(GOOD, free_bytes=1_000_000)),
]  # fmt: skip

WELL: dict[str, Facts] = {
    "everything": GOOD,
    "a device that moved to another address": seen_at(("192.0.2.7", 6, 4), ("192.0.2.8", 3, 0)),
    "addresses that took turns long ago": seen_at(("192.0.2.7", 90, 8), ("192.0.2.8", 50, 40)),
    "an IPv6 host that changes its address": seen_at(
        *((f"2001:db8::{number}", 6, 0) for number in range(1, 9)), ("2001:db8::ffff:1", 3, 1)
    ),
    "a device made last week": among(row("new", changed_at=NOON - 3 * DAY), row()),
    "a short life that is half over": among(row(not_before=NOON - 30 * DAY, not_after=NOON + 29 * DAY)),
    "a broker's short life that is half over": among(
        row(), row("gw-1", 1, kind=Kind.BROKER, not_before=NOON - 30 * DAY, not_after=NOON + 29 * DAY)
    ),
    "an enrollment under way": among(row(), row("late", 1, state=State.ISSUED, changed_at=NOON - DAY / 2)),
    "revoked, and cut off at once": among(row(revoked_at=NOON, revocation_reason="keyCompromise")),
    "a gateway by path": look(status=None, sightings=None),
    "a policy that every gateway goes by": by_policy(4),
    "no gateway": replace(GOOD, gateways=()),
    "nothing changed since an old backup": replace(
        GOOD, last_backup_at=NOON - 20 * DAY, last_issued_at=NOON - 21 * DAY, last_crl_at=NOON - 21 * DAY
    ),
    "a renewed certificate beside the old one": among(row(), row("sensor-1", 1, replaced_by=0x5A)),
}


def by_check(facts: Facts) -> dict[str, list[Remark]]:
    found: dict[str, list[Remark]] = {}
    for remark in examine(facts):
        found.setdefault(remark.check, []).append(remark)
    return found


@pytest.mark.parametrize("facts", WELL.values(), ids=WELL)
def test_where_all_is_well_nothing_is_said(facts: Facts) -> None:
    remarks = examine(facts)
    assert {remark.check for remark in remarks} == {name for name, _ in CHECKS}
    assert [remark for remark in remarks if remark.level is not Level.WELL] == []
    assert exit_code(remarks) == 0


@pytest.mark.parametrize(("check", "level", "text", "facts"), BAD, ids=[f"{one[0]}: {one[2]}" for one in BAD])
def test_each_thing_that_will_hurt_is_said(check: str, level: Level, text: str, facts: Facts) -> None:
    (found, *more) = by_check(facts)[check]
    assert found.level is level
    assert text in found.text
    assert found.hint
    assert not more
    assert "\x1b" not in found.text


def test_every_check_is_shown_to_say_something() -> None:
    assert {check for check, *_ in BAD} == {name for name, _ in CHECKS}


def test_the_worst_comes_first_and_decides_the_exit_code() -> None:
    soon = replace(GOOD, last_backup_at=None)
    both = replace(soon, audit=AuditFacts(None, Head()))
    assert [exit_code(examine(facts)) for facts in (GOOD, soon, both)] == [0, 1, 6]
    assert [remark.check for remark in examine(both)[:2]] == ["audit", "backup"]


def test_one_certificate_at_two_gateways_by_turns_is_found() -> None:
    here, there = seen_at(("192.0.2.7", 6, 0)).gateways[0], seen_at(("192.0.2.8", 3, 1)).gateways[0]
    facts = replace(GOOD, gateways=(here, replace(there, name="gw-2")))
    assert by_check(facts)["addresses"][0].level is Level.SOON


def test_many_are_counted_and_a_few_are_named() -> None:
    devices = [row(f"sensor-{number}", number + 1, not_after=NOON + number * 3 * DAY) for number in range(400)]
    facts = among(*devices)
    (remark,) = by_check(facts)["devices"]
    assert "10 device certificates" in remark.text
    assert len(remark.about) == 5
    copies = tuple(
        replace(seen_at(("192.0.2.7", 6, 0), ("192.0.2.8", 3, 1)).gateways[0].sightings[0], id=f"sensor-{number}")  # type: ignore[index]
        for number in range(20)
    )
    assert len(by_check(look(sightings=copies))["addresses"]) == 6


def test_the_chart_has_a_bar_a_week(capsys: pytest.CaptureFixture[str]) -> None:
    devices = [row(f"a-{n}", n + 1, not_after=NOON + 8 * DAY) for n in range(4)]
    devices += [row("b", 100, not_after=NOON - DAY), row("c", 101)]
    lines = list(chart(among(*devices), with_bars=True))
    assert len(lines) == 15
    assert lines[0].split() == ["ended", "1", "█" * 10]
    assert lines[2].split() == ["2026-05-11", "4", "█" * 40]
    assert lines[1].split() == ["2026-05-04", "0"]
    assert lines[-1].split() == ["later", "1", "█" * 10]
    show(Console(), among(*devices), examine(among(*devices)))
    page = capsys.readouterr().out
    assert "█" not in page, "bars go to terminals only"
    assert "SOON    devices: 1 device cannot connect" in page
    assert "        b\n" in page


@pytest.mark.parametrize("columns", [1, 40, 80, 200])
def test_a_sentence_goes_on_below_its_beginning_on_a_terminal(columns: int) -> None:
    text = "crls: the CRL of the-issuing-CA-1a2b3c4d is past half of its life: it ends on 2026-12-27 05:25"
    lines = hanging(text, columns).split("\n        ")
    assert " ".join(lines) == text
    assert len(lines) == 1 or max(map(len, lines)) <= max(columns - 8, 32)
    assert hanging(text, None) == text


def test_machines_get_every_check_the_figures_and_the_verdict() -> None:
    told = list(records(GOOD, examine(GOOD)))
    assert [record["level"] for record in told[:-2]] == ["WELL"] * len(CHECKS)
    assert told[-2]["figures"]["devices"] == 1
    assert told[-2]["figures"]["devices_ending_by_week"] == {"100": 1}
    assert told[-1] == {"verdict": "WELL", "exit_code": 0}


@pytest.mark.parametrize(("has_key", "wanted"), [(True, False), (False, True)])
def test_a_root_crl_is_signed_with_the_key_that_is_away(has_key: bool, wanted: bool) -> None:
    (remark,) = [one for one in examine(root(crl=None, has_key=has_key)) if one.check == "crls" and one.hint]
    assert ("--root-key FILE" in remark.hint) is wanted
