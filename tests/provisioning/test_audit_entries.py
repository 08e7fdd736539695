"""Every command that changes something, or takes something out, leaves its entry: who, what and what for."""

from __future__ import annotations

import functools
import os
import shutil
import socket
from typing import TYPE_CHECKING, Any

import pytest
from support.command_scenarios import NEW_PASSPHRASE, SCENARIOS, SECRET, run_here, stopping_after_a_turn
from support.station import CHEAP, PASSPHRASE, enrolled_row

from birthmark.provisioning import actor as actor_module
from birthmark.provisioning import (
    audit,
    audit_check,
    backup_commands,
    ca_commands,
    crl_commands,
    rollover_commands,
    station_commands,
)
from birthmark.provisioning.backup import back_up
from birthmark.provisioning.founding import found_station
from birthmark.provisioning.passphrase_change import change_passphrase
from birthmark.provisioning.rollover.starting import start_issuing, start_root

if TYPE_CHECKING:
    from pathlib import Path

    from birthmark.provisioning.station import Station

UNLOCK, ROOT = "unlock issuing-ca", "unlock root-ca"
ENTRIES = {
    "init": ["init root-ca", "init issuing-ca", "crl root-ca", UNLOCK, "crl issuing-ca"],
    "issue": [UNLOCK, "issue-from in", "issue pump-1", "issue pump-2"],
    "issue-broker": [UNLOCK, "issue localhost"],
    "issue-operator": [UNLOCK, "issue alice"],
    "issue-operator --renew": [UNLOCK, "issue alice"],
    "revoke": [UNLOCK, "revoke sensor-1", "crl issuing-ca"],
    "revoke, a gateway away": [UNLOCK, "revoke sensor-1", "crl issuing-ca", "deliver gw-1"],
    "revoke --cert-serial": [UNLOCK, f"revoke lost-{'5a' * 16}", "crl issuing-ca"],
    "crl": [UNLOCK, "crl issuing-ca"],
    "crl --root": [ROOT, "crl root-ca"],
    "ca detach-root": [ROOT, "detach-root root-ca"],
    "upstream add": ["upstream-add cloud"],
    "upstream remove": ["upstream-remove cloud"],
    "gateway add": ["gateway-add gw-1"],
    "gateway remove": ["gateway-remove gw-1"],
    "policy publish": [UNLOCK, "policy-sign fleet", "policy-deliver gw-1"],
    "batch open": ["batch-open W47"],
    "batch close": [UNLOCK, "void sensor-1", "batch-close W47", "crl issuing-ca"],
    "quarantine clear": ["quarantine-clear 0000000000000000"],
    "backup": ["backup station"],
    "restore": [UNLOCK, "restore station", "merge-crl issuing-ca", "crl issuing-ca"],
    "restore --crl": [UNLOCK, "merge-crl issuing-ca", "crl issuing-ca"],
    "ca passphrase": [ROOT, "passphrase root-ca"],
    "audit checkpoint": [UNLOCK, "checkpoint audit-log"],
    "audit export": ["export audit-log"],
    "ca export": ["export root-ca"],
    "ca rollover start issuing": [ROOT, "ca-start issuing-ca", "crl issuing-ca"],
    "ca rollover start root": [UNLOCK, "ca-start root-ca", "ca-start issuing-ca", "crl root-ca"],
    "ca rollover activate": ["ca-activate issuing-ca"],
    "ca rollover activate --brokers": ["ca-activate-brokers issuing-ca"],
    "ca rollover retire": [UNLOCK, "ca-close issuing-ca", "ca-retire issuing-ca"],
}
"""In this order, others between them; by the names of the scenarios of commands that are killed. Whatever is not
named here leaves some entry."""
NONE = {
    "label": "what it writes is on the board's outside",
    "doctor": "it looks",
}


PLAIN = [
    name
    for name, scenario in SCENARIOS.items()
    if name not in NONE
    and not scenario.registry
    and not scenario.boards
    and not any("pkcs11:" in word for word in scenario.words)
]
"""With neither a token, a database nor a board: those have tests of their own."""


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIRTHMARK_PASSPHRASE", PASSPHRASE.decode())
    monkeypatch.setenv("BIRTHMARK_BACKUP_PASSPHRASE", SECRET.decode())
    monkeypatch.setenv("BIRTHMARK_NEW_PASSPHRASE", NEW_PASSPHRASE.decode())
    monkeypatch.setattr(ca_commands, "change_passphrase", functools.partial(change_passphrase, derivation=CHEAP))
    monkeypatch.setattr(backup_commands, "back_up", functools.partial(back_up, cost_log2=2))
    monkeypatch.setattr(station_commands, "found_station", functools.partial(found_station, derivation=CHEAP))
    monkeypatch.setattr(crl_commands, "stopping_on_signals", stopping_after_a_turn)
    for start in (start_issuing, start_root):
        monkeypatch.setattr(rollover_commands, start.__name__, functools.partial(start, derivation=CHEAP))


def entries_of(folder: Path) -> list[dict[str, Any]]:
    return list(audit.read(folder / "audit.jsonl"))


def in_order(wanted: list[str], found: list[str]) -> bool:
    rest = iter(found)
    return all(any(each == one for each in rest) for one in wanted)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("name", PLAIN)
def test_a_command_leaves_its_entries(founded: Path, tmp_path: Path, name: str) -> None:
    scenario = SCENARIOS[name]
    folder = tmp_path / "station"
    if scenario.founds:
        shutil.copytree(founded / "living", folder)
    scenario.prepare(tmp_path)
    before = len(entries_of(folder))

    code, said = run_here(tmp_path, scenario.words)

    assert code == scenario.code, said
    if name == "restore":
        folder, before = tmp_path / "restored", 0
    new = entries_of(folder)[before:]
    told = [f"{entry['action']} {entry['subject']}" for entry in new]
    assert told, "it left none"
    assert in_order(ENTRIES.get(name, []), told), told
    keys = [entry["details"]["key_id"] for entry in new if entry["action"] == "unlock"]
    assert name == "restore" or len(keys) == len(set(keys)), "a key is unlocked once a command"
    assert {entry["actor"] for entry in new} == {actor_module.actor()}
    purposes = {entry["details"]["purpose"] for entry in new if entry["action"] == "unlock"}
    words = " ".join(word for word in scenario.words if not word.startswith("-"))
    assert name == "restore" or all(words.startswith(purpose) for purpose in purposes), purposes


def test_the_actor_is_who_logged_in_and_whom_they_work_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    login = tmp_path / "loginuid"
    monkeypatch.setattr(actor_module, "_LOGIN_USER", login)
    me, host = actor_module._user_name(os.getuid()), socket.gethostname()
    for content, expected in (
        (None, me),
        ("4294967295", me),
        (str(os.getuid()), me),
        ("4000000001", f"4000000001/{me}"),
        ("nonsense", me),
    ):
        if content is not None:
            login.write_text(content)
        assert actor_module.actor() == f"{expected}@{host}"


def test_a_key_that_cannot_be_unlocked_leaves_no_entry(station: Station) -> None:
    locked = type(station).open(station.folder, passphrase=b"wrong")
    before = len(entries_of(station.folder))
    with pytest.raises(Exception, match="passphrase is wrong"):
        _ = locked.authority
    assert len(entries_of(station.folder)) == before


def test_many_certificates_are_one_unlocking(station: Station) -> None:
    for number in range(3):
        enrolled_row(station, f"sensor-{number}")
    actions = [entry["action"] for entry in entries_of(station.folder)]
    assert actions.count("unlock") - actions[: actions.index("crl")].count("unlock") <= 2  # of `init`, and this


def test_the_log_of_all_that_is_sound(station: Station) -> None:
    enrolled_row(station, "sensor-1")
    assert not audit_check.check(station.registry).problems
