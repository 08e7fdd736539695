"""A station whose issuing CA's key is in a PKCS#11 token: founded, at work, in trouble, backed up."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import stat
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from support.softhsm import PIN, WRONG_PIN, SoftHsm
from support.station import CHEAP, PASSPHRASE, Command, enrolled_row, served_crls
from support.token_station import found, keys_in, reopened

from birthmark.device.errors import AuthorityError, BirthmarkError, ConfigurationError
from birthmark.provisioning import audit, founding
from birthmark.provisioning.backup import back_up, read_backup
from birthmark.provisioning.ca_keys import MODULE_VARIABLE, TokenPlace
from birthmark.provisioning.checkup import Level, gather
from birthmark.provisioning.checkup_rules import examine
from birthmark.provisioning.crl_service import TROUBLE_S, CrlService
from birthmark.provisioning.crl_store import current_crl
from birthmark.provisioning.crls import sign_and_store_crl
from birthmark.provisioning.fleet_policy import POLICY_VERSION, current_policy, sign_policy, trusted_policy
from birthmark.provisioning.founding import found_station
from birthmark.provisioning.issuing import issue_operator
from birthmark.provisioning.restore import restore
from birthmark.provisioning.revocation import revoke
from birthmark.provisioning.settings import Settings, TokenSettings
from birthmark.provisioning.station import Station
from birthmark.provisioning.tokens.uri import TokenUri

if TYPE_CHECKING:
    from pathlib import Path


POLICY = b"[roles.device]\n[[assignments]]\nou = 'device'\nrole = 'device'\n"
LOST = x509.ReasonFlags.key_compromise
BACKUP_SECRET = b"the backup's own passphrase"


def files_of(station: Station) -> str:
    """Everything on disk, to look for what must not be there."""
    return "".join(path.read_text("latin-1") for path in station.folder.rglob("*") if path.is_file())


# Founded and at work


def test_it_issues_revokes_and_signs_crls_by_the_token(held: Station, softhsm: SoftHsm, tmp_path: Path) -> None:
    station = reopened(held)
    ca = station.cas.for_clients
    assert TokenUri.parse(ca.key_uri).object == "issuing"
    assert [path.name.partition("-")[0] for path in (station.folder / "keys").iterdir()] == ["root"]

    issued = issue_operator(station, "alice", tmp_path / "out")
    device = x509.load_der_x509_certificate(enrolled_row(station, "sensor-1").certificate_der or b"")
    crls = revoke(station, "sensor-1", LOST).crls

    device.verify_directly_issued_by(station.issuing)
    assert crls.cert_serials == {device.serial_number}
    command = [
        "openssl",
        "verify",
        "-x509_strict",
        "-crl_check_all",
        "-CAfile",
        "root.pem",
        "-untrusted",
        "issuing.pem",
    ]
    command += ["-CRLfile", "crl.pem", "-CRLfile", "root-crl.pem", str(issued.key_path)]
    done = subprocess.run(command, cwd=station.folder, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("OK\n"), done
    assert PIN.decode() not in files_of(station)


def test_a_policy_is_signed_by_the_token_or_not_at_all(held: Station, softhsm: SoftHsm) -> None:
    policy, _ = sign_policy(held, POLICY)
    assert trusted_policy(policy.to_bytes(), held.cas) == policy
    softhsm.take_out()
    with pytest.raises(BirthmarkError):
        sign_policy(reopened(held), POLICY + b"# another\n")
    softhsm.put_back()
    with held.registry.view() as view:
        assert current_policy(view) == policy
        assert view.counter(POLICY_VERSION) == 1


def test_init_makes_the_key_in_the_token_and_says_where_it_is(
    softhsm: SoftHsm,
    token: TokenUri,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BIRTHMARK_PASSPHRASE", PASSPHRASE.decode())
    pin_path = tmp_path / "pin"
    pin_path.write_bytes(PIN + b"\n")
    birthmark = Command(tmp_path / "station", capsys)
    words = ["init", "--issuing-key", softhsm.key_uri(token.token) + f"&pin-source=file:{pin_path}"]

    answer = birthmark(*words)
    assert (answer.exit_code, "other users have access to it" in answer.stderr) == (6, True)
    assert not (tmp_path / "station").exists()
    pin_path.chmod(0o400)
    answer = birthmark(*words, "--json")
    assert answer.exit_code == 0, answer.stderr
    assert answer.records[0]["issuing_key"].startswith(f"pkcs11:token={token.token};object=issuing;id=%")
    assert birthmark("issue-operator", "alice", "--out", tmp_path).exit_code == 0, (
        "the PIN's file is in station.toml"
    )
    assert Station.open(tmp_path / "station").settings.token == TokenSettings(softhsm.module, pin_path)
    rows = {row["kind"]: row for row in birthmark("ca", "show", "--json").records}
    assert (rows["root"]["key"], rows["issuing"]["key"], rows["issuing"]["key_path"]) == ("here", "token", "")
    assert rows["issuing"]["key_uri"] == answer.records[0]["issuing_key"]
    recorded = [entry for entry in audit.read(tmp_path / "station" / "audit.jsonl") if entry["action"] == "init"]
    assert [entry["details"].get("key_uri") for entry in recorded] == [None, rows["issuing"]["key_uri"]]


@pytest.mark.parametrize("cause", ["wrong PIN", "no token", "no module", "disk full"])
def test_a_station_that_does_not_come_about_leaves_nothing(
    softhsm: SoftHsm, token: TokenUri, tmp_path: Path, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = TokenPlace(replace(token if cause != "no token" else TokenUri("nobody"), object="issuing"))
    settings = Settings("Acme", token=TokenSettings(None if cause == "no module" else softhsm.module))
    monkeypatch.delenv(MODULE_VARIABLE, raising=False)
    if cause == "disk full":

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(founding, "sign_root_crl", fail)

    with pytest.raises((BirthmarkError, OSError)):
        found_station(
            tmp_path / "station",
            settings,
            passphrase=PASSPHRASE,
            derivation=CHEAP,
            place=place,
            pin=WRONG_PIN if cause == "wrong PIN" else PIN,
        )

    assert [path.name for path in tmp_path.iterdir()] == ["softhsm"]
    softhsm.forget()
    assert keys_in(softhsm, token) == []


def test_a_key_that_is_there_is_taken_only_when_that_is_said(
    softhsm: SoftHsm, token: TokenUri, held: Station, tmp_path: Path
) -> None:
    with pytest.raises(AuthorityError, match="the token has one of that name") as refused:
        found(tmp_path / "second", softhsm, token)
    assert "--existing-key" in refused.value.hint
    assert not (tmp_path / "second").exists()
    assert reopened(held).authority, "nobody touched it"

    named = replace(token, object="issuing")
    taken = found_station(
        tmp_path / "second",
        Settings("Acme", token=TokenSettings(softhsm.module)),
        passphrase=PASSPHRASE,
        derivation=CHEAP,
        place=TokenPlace(named, existing=True),
        pin=PIN,
    )
    assert taken.issuing.public_key() == held.issuing.public_key()
    assert keys_in(softhsm, token) == ["issuing"]
    with pytest.raises(AuthorityError, match="the token has no such key"):
        found_station(
            tmp_path / "third",
            Settings("Acme", token=TokenSettings(softhsm.module)),
            passphrase=PASSPHRASE,
            place=TokenPlace(replace(token, object="other"), existing=True),
            pin=PIN,
        )


def test_a_locked_station_reads_without_a_pin(
    held: Station, at_token: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrolled_row(held, "sensor-1")
    monkeypatch.delenv("BIRTHMARK_TOKEN_PIN")

    for words in (["list"], ["show", "sensor-1"], ["ca", "show"], ["audit", "verify"], ["inspect", held.crl_path]):
        assert at_token(*words).exit_code == 0, words
    answer = at_token("issue-operator", "alice")
    assert (answer.exit_code, "could not ask for the PIN: there is no terminal" in answer.stderr) == (6, True)
    assert "set BIRTHMARK_TOKEN_PIN, or give --pin-fd N" in answer.stderr


def test_the_pin_may_come_by_a_descriptor(
    held: Station, at_token: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BIRTHMARK_TOKEN_PIN")
    (tmp_path / "pin").write_bytes(PIN + b"\n")
    with (tmp_path / "pin").open("rb") as file:
        assert at_token("crl", "--pin-fd", file.fileno()).exit_code == 0
    answer = at_token("ca", "token", "check", "--pin-fd", 999)
    assert "could not read the PIN from descriptor 999" in answer.stdout


# In trouble


def test_nothing_is_half_issued_while_the_token_is_away(
    held: Station, softhsm: SoftHsm, at_token: Command, tmp_path: Path
) -> None:
    enrolled_row(held, "sensor-1")
    before = current_crl(held)
    softhsm.take_out()
    try:
        for words in (
            ["issue-operator", "alice", "--out", tmp_path / "out"],
            ["revoke", "sensor-1", "--reason", "lost"],
        ):
            answer = at_token(*words)
            assert answer.exit_code == 6, (words, answer)
            assert "hint: " in answer.stderr
    finally:
        softhsm.put_back()
    assert current_crl(held) == before
    assert not (tmp_path / "out" / "alice.pem").exists()
    with held.registry.view() as view:
        assert not view.revoked()
        assert view.live_by_name("alice") is None
    assert at_token("issue-operator", "alice", "--out", tmp_path / "out").exit_code == 0
    assert at_token("revoke", "sensor-1", "--reason", "lost").exit_code == 0


def test_a_token_that_goes_while_a_command_runs_stops_it_before_anything_changes(
    held: Station, softhsm: SoftHsm, tmp_path: Path
) -> None:
    """Its key was used a moment ago: nobody relies on that."""
    enrolled_row(held, "sensor-1")
    sign_and_store_crl(held)
    before = current_crl(held)
    softhsm.take_out()
    try:
        with pytest.raises(AuthorityError):
            revoke(held, "sensor-1", LOST)
        with pytest.raises(AuthorityError):
            issue_operator(held, "alice", tmp_path / "out")
    finally:
        softhsm.put_back()
    assert current_crl(held) == before
    with held.registry.view() as view:
        assert not view.revoked()
    assert revoke(held, "sensor-1", LOST).newly == 1
    issue_operator(held, "alice", tmp_path / "out")


def test_the_crl_service_tells_of_a_token_that_is_away_and_goes_on_when_it_is_back(
    held: Station, softhsm: SoftHsm
) -> None:
    told: list[str] = []
    served = CrlService(held, say=lambda name, *_, **__: told.append(name))
    served.turn()
    enrolled_row(held, "sensor-1")
    revoke(held, "sensor-1", LOST)
    held.crl_path.unlink()
    softhsm.take_out()
    try:
        assert served.turn() == TROUBLE_S
    finally:
        softhsm.put_back()
    served.turn()
    assert told == ["crl", "trouble", "crl"]
    crls = current_crl(held)
    assert crls is not None
    assert len(crls.cert_serials) == 1


def test_the_crl_service_runs_as_a_process(held: Station) -> None:
    held.crl_path.unlink()
    events, code = served_crls(held.folder, signal.SIGTERM, BIRTHMARK_TOKEN_PIN=PIN.decode())
    assert (events, code) == (["ready", "crl", "stopped"], 0)
    assert current_crl(held) is not None


def test_a_service_with_a_wrong_pin_ends_at_once(
    at_token: Command, monkeypatch: pytest.MonkeyPatch, softhsm: SoftHsm
) -> None:
    softhsm.forget()
    monkeypatch.setenv("BIRTHMARK_TOKEN_PIN", WRONG_PIN.decode())
    answer = at_token("crl", "serve")
    assert (answer.exit_code, "the PIN is wrong" in answer.stderr) == (6, True)
    assert WRONG_PIN.decode() not in answer.stderr


# Looked at


def test_ca_token_shows_and_checks(
    held: Station, softhsm: SoftHsm, token: TokenUri, at_token: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = at_token("ca", "token", "list", "--json").records
    (own,) = [one for one in tokens if one["token"] == token.token]
    assert own["pin"] == "ready"
    assert at_token("ca", "token", "list", "--module", softhsm.module, "--json").records == tokens
    keys = at_token("ca", "token", "list", "--keys", f"pkcs11:token={token.token}", "--json").records
    uri = TokenUri.parse(held.cas.for_clients.key_uri)
    assert keys == [{"object": "issuing", "id": uri.id.hex(), "suits": "yes", "made_in_token": True}]
    answer = at_token("ca", "token", "check", "--json")
    assert (answer.exit_code, answer.records[0]["signs"], answer.records[0]["warning"]) == (0, True, "")
    softhsm.forget()
    monkeypatch.setenv("BIRTHMARK_TOKEN_PIN", WRONG_PIN.decode())
    answer = at_token("ca", "token", "check", "--json")
    assert (answer.exit_code, answer.records[0]["signs"]) == (6, False)
    answer = at_token("ca", "token", "list", "--keys", "pkcs11:token=a?pin-value=135790")
    assert (answer.exit_code, "135790" in answer.stderr) == (2, False)


HINTED = re.compile(r"`(birthmark [^`]*)`")


@pytest.mark.parametrize(
    "line",
    [
        "ca token list --keys pkcs11:token=other --module {module}",
        "ca rollover start issuing --key pkcs11:token=birthmark;object=none --existing-key",
        "ca rollover start issuing --key pkcs11:token=birthmark;object=none?module-path={module} --existing-key",
    ],
)
def test_what_a_hint_says_to_run_shows_what_is_there(
    held: Station, softhsm: SoftHsm, at_token: Command, line: str
) -> None:
    del held
    failed = at_token(*line.format(module=softhsm.module).split())
    assert failed.exit_code == 6
    _, *words = shlex.split(HINTED.findall(failed.stderr)[0])
    told = at_token(*words)
    assert (told.exit_code, told.stderr) == (0, "")
    assert "issuing" in told.stdout or "birthmark" in told.stdout


def test_a_station_without_a_token_has_none_to_check(birthmark: Command) -> None:
    answer = birthmark("ca", "token", "check")
    assert (answer.exit_code, "no issuing CA's key is in one" in answer.stderr) == (1, True)
    answer = birthmark("ca", "token", "list")
    assert (answer.exit_code, "its module is not known" in answer.stderr, "--module FILE" in answer.stderr) == (
        1,
        True,
        True,
    )
    answer = birthmark("ca", "rollover", "start", "issuing", "--existing-key")
    assert (answer.exit_code, "none is named" in answer.stderr) == (2, True)


def test_the_doctor_looks_for_the_token(held: Station, softhsm: SoftHsm, token: TokenUri) -> None:
    def cas() -> list[tuple[str, str]]:
        remarks = [one for one in examine(gather(held, timeout_s=None)) if one.check == "cas"]
        return [(one.level.name, one.text) for one in remarks if one.level is not Level.WELL]

    assert cas() == []
    softhsm.forget()
    with pytest.raises(AuthorityError):
        softhsm.token(token, WRONG_PIN).private_keys()
    ((level, text),) = cas()
    assert (level, text.partition(" was given")[0]) == (
        "SOON",
        "the token birthmark with the key of the issuing CA",
    )
    softhsm.forget()
    softhsm.take_out()
    try:
        ((level, text),) = cas()
    finally:
        softhsm.put_back()
    assert level == "BROKEN"
    assert text.startswith(f"the token {token.token} has the key of the issuing CA: could not ")


# Backed up


def test_a_backup_has_no_key_and_goes_on_with_the_token_only(
    held: Station, softhsm: SoftHsm, at_token: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrolled_row(held, "sensor-1")
    number = sign_and_store_crl(held).current.number
    monkeypatch.setenv("BIRTHMARK_BACKUP_PASSPHRASE", BACKUP_SECRET.decode())
    monkeypatch.setattr("birthmark.provisioning.backup_commands.back_up", _cheaply)
    answer = at_token("backup", tmp_path / "backup.age")
    assert answer.exit_code == 0
    assert "is in a PKCS#11 token and not in this file" in answer.stdout
    names = read_backup(tmp_path / "backup.age", BACKUP_SECRET).manifest.files
    assert not [name for name in names if "issuing-" in name]
    short = held.cas.for_clients.short
    shutil.rmtree(held.folder)

    def brought_back() -> Station:
        return restore(
            tmp_path / "backup.age",
            tmp_path / "restored",
            backup_passphrase=BACKUP_SECRET,
            passphrase=PASSPHRASE,
            pin=PIN,
        ).station

    softhsm.forget()
    softhsm.take_out()
    try:
        with pytest.raises(AuthorityError) as refused:
            brought_back()
    finally:
        softhsm.put_back()
    assert refused.value.hint
    assert not (tmp_path / "restored").exists()
    given_up = restore(
        tmp_path / "backup.age",
        tmp_path / "given-up",
        backup_passphrase=BACKUP_SECRET,
        passphrase=PASSPHRASE,
        lost=[short],
    ).station
    assert given_up.key_place(given_up.cas.for_clients) == "lost"
    restored = brought_back()
    crls = current_crl(restored)
    assert crls is not None
    assert crls.current.number > number
    assert revoke(restored, "sensor-1", LOST).newly == 1


def _cheaply(*arguments: object, **options: object) -> object:
    return back_up(*arguments, **options, cost_log2=2)  # type: ignore[arg-type]


def test_another_machine_may_have_the_module_elsewhere(
    held: Station, softhsm: SoftHsm, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = held.settings_path.read_text().replace(str(softhsm.module), "/nowhere/lib.so")
    held.settings_path.write_text(text)
    with pytest.raises(AuthorityError, match=r"could not use the PKCS#11 module /nowhere/lib.so"):
        _ = reopened(held).authority
    monkeypatch.setenv(MODULE_VARIABLE, str(softhsm.module))
    assert reopened(held).authority
    monkeypatch.setenv(MODULE_VARIABLE, "")
    held.settings_path.write_text(text.replace("/nowhere/", "nowhere/"))
    with pytest.raises(ConfigurationError, match=r"module = 'nowhere/lib\.so' of \[token\]"):
        reopened(held)


def test_nobody_else_may_read_what_is_written(held: Station) -> None:
    assert stat.S_IMODE(held.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(held.settings_path.stat().st_mode) == 0o600
