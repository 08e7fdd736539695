"""CAs are replaced at a station whose issuing key is, was or is to be in a PKCS#11 token; a key may be lost."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from support.renewing import PaperDevice
from support.softhsm import PIN, SoftHsm
from support.station import CHEAP, PASSPHRASE, Command, enrolled_row
from support.token_station import keys_in, reopened

from birthmark.device.errors import AuthorityError
from birthmark.provisioning import profile
from birthmark.provisioning.ca_keys import TokenPlace
from birthmark.provisioning.cas import CaKind
from birthmark.provisioning.checkup import gather
from birthmark.provisioning.checkup_rules import examine
from birthmark.provisioning.crl_service import CrlService
from birthmark.provisioning.crl_store import current_crl
from birthmark.provisioning.crls import sign_and_store_crl, up_to_date_crl
from birthmark.provisioning.issuing import issue_operator
from birthmark.provisioning.key_custody import give_up_key
from birthmark.provisioning.keyfile import read_key
from birthmark.provisioning.renewal import Renewals
from birthmark.provisioning.rollover import starting
from birthmark.provisioning.rollover.phases import activate, close_old, retire_closed
from birthmark.provisioning.rollover.starting import RootKey, start_issuing, start_root
from birthmark.provisioning.station import Station, utc_now
from birthmark.provisioning.tokens.uri import TokenUri

if TYPE_CHECKING:
    from pathlib import Path


def start(station: Station, token: TokenUri | None, name: str = "issuing-2") -> str:
    place = None if token is None else TokenPlace(replace(token, object=name))
    return start_issuing(station, lambda: RootKey(PASSPHRASE), derivation=CHEAP, place=place).key_uri


def retired(station: Station) -> None:
    activate(station, force=True)
    sign_and_store_crl(station)
    retire_closed(station, close_old(station, CaKind.ISSUING, force=True), force=True)


def test_a_key_moves_from_a_file_into_a_token_and_out_again(
    softhsm: SoftHsm,
    token: TokenUri,
    living: Station,
    birthmark: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BIRTHMARK_TOKEN_PIN", PIN.decode())
    enrolled_row(living, "sensor-1")
    settings = living.settings_path.read_text()
    answer = birthmark("ca", "rollover", "start", "issuing", "--key", softhsm.key_uri(token.token), "--json")
    assert answer.exit_code == 0, answer.stderr
    assert living.settings_path.read_text().startswith(settings.rstrip())
    station = Station.open(living.folder, passphrase=PASSPHRASE, pin=PIN)
    assert [bool(ca.key_uri) for ca in station.cas.issuing] == [False, True]
    retired(station)
    assert TokenUri.parse(station.cas.for_clients.key_uri).object == "issuing"
    issue_operator(station, "alice", station.folder.parent / "out")

    assert start(station, None) == ""
    retired(station)
    assert station.key_place(station.cas.for_clients) == "here"
    assert Station.open(living.folder, passphrase=PASSPHRASE, pin=b"not asked for").authority


def test_the_first_key_file_of_a_station_gets_a_passphrase_that_was_given_twice(
    held: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return "another one"

    monkeypatch.delenv("BIRTHMARK_PASSPHRASE", raising=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", answer)
    station = Station.open(held.folder, pin=PIN)

    start(station, None)

    assert asked == ["Passphrase of the CA: ", "The same again: "]
    (new,) = [ca for ca in station.cas.issuing if not ca.key_uri]
    assert read_key(station.key_path(new), b"another one", whose="the CA")


def test_the_key_of_another_ca_of_the_station_is_refused(held: Station, token: TokenUri, softhsm: SoftHsm) -> None:
    with pytest.raises(AuthorityError, match=r"it is that of the CA [0-9a-f]{8} already"):
        start(held, token, "issuing")
    start(held, token)
    assert keys_in(softhsm, token) == ["issuing", "issuing-2"]
    assert len(up_to_date_crl(held).crls) == 2


def test_a_token_that_is_lost_can_be_replaced(held: Station, softhsm: SoftHsm, tmp_path: Path) -> None:
    """The root vouches for the next one; the old key is not asked for."""
    (folder,) = softhsm.tokens.iterdir()
    shutil.rmtree(folder)
    fresh = softhsm.new_token("replacement")
    station = reopened(held)
    with pytest.raises(AuthorityError, match="it is not there"):
        _ = station.authority

    start(station, fresh)
    activate(station, force=True)

    issue = issue_operator(station, "alice", tmp_path / "out")
    assert issue.row.issuer == station.cas.for_clients.key_id


def test_a_key_that_is_given_up_for_lost_stops_nobody_else(
    held: Station, softhsm: SoftHsm, at_token: Command, tmp_path: Path
) -> None:
    """The token is gone for good: what it issued can be on no CRL, and that is said; all else goes on."""
    enrolled_row(held, "sensor-1")
    old = held.cas.for_clients
    before = issue_operator(held, "alice", tmp_path / "out")
    last = sign_and_store_crl(held).current
    (folder,) = softhsm.tokens.iterdir()
    softhsm.forget()
    shutil.rmtree(folder)
    softhsm.new_token("replacement")
    new = f"pkcs11:token=replacement;object=issuing?module-path={softhsm.module}"

    answer = at_token("ca", "lost", old.short, "--json")
    assert (answer.exit_code, answer.records[0]["key"]) == (0, "lost")
    answer = at_token("revoke", "sensor-1", "--reason", "lost")
    assert (answer.exit_code, "it was given up on" in answer.stderr) == (6, True)
    answer = at_token("revoke", "--cert-serial", f"{cert_serial_of(held, 'sensor-1'):x}", "--reason", "lost")
    assert (answer.exit_code, "it was given up on" in answer.stderr) == (6, True)
    assert at_token("ca", "rollover", "start", "issuing", "--key", new).exit_code == 0
    assert at_token("ca", "rollover", "activate", "--force").exit_code == 0
    # Alice, issued anew, has a certificate of each CA.
    assert at_token("issue-operator", "alice", "--renew", "--out", tmp_path / "out").exit_code == 0
    answer = at_token("revoke", "alice", "--reason", "lost", "--json")
    assert (answer.exit_code, answer.records[0]["unlisted"]) == (1, [f"{before.row.cert_serial:x}"])
    assert "is on no CRL, and gateways let it in" in answer.stderr
    crls = current_crl(held)
    assert crls is not None
    assert [len(crl.cert_serials) for crl in crls.crls] == [1, 0]
    assert crls.crls[1].der == last.der
    late = Station.open(held.folder, pin=PIN, clock=lambda: utc_now() + timedelta(days=20))
    told: list[str] = []
    CrlService(late, say=lambda name, *_, **__: told.append(name)).turn()
    assert told == ["crl"], "what nobody can sign is not waited for"
    answer = at_token("ca", "rollover", "retire", "issuing", "--force")
    assert answer.exit_code == 0, answer.stderr
    assert [ca.phase for ca in held.cas if ca.kind is CaKind.ISSUING] == ["retired", "current"]


def cert_serial_of(station: Station, name: str) -> int:
    with station.registry.view() as view:
        row = view.live_by_name(name)
    assert row is not None
    assert row.cert_serial is not None
    return row.cert_serial


def test_a_key_may_be_found_again(held: Station, at_token: Command) -> None:
    ca = held.cas.for_clients
    assert at_token("ca", "lost", ca.key_id).exit_code == 0
    assert at_token("issue-operator", "alice").exit_code == 6
    remarks = [one.text for one in examine(gather(held, timeout_s=None)) if one.check == "cas"]
    assert remarks == [
        "the key of the issuing CA was given up for lost: this station can neither issue nor revoke"
    ]
    assert at_token("ca", "lost", ca.short, "--found").exit_code == 0
    assert at_token("crl").exit_code == 0
    for word in ("", ca.short[:4], "f" * 8):
        answer = at_token("ca", "lost", word)
        assert (answer.exit_code, f"name one of these: {ca.short}" in answer.stderr) == (6, True)


def test_devices_of_a_ca_whose_key_is_lost_renew_under_the_next_one(
    living: Station,
) -> None:
    device = PaperDevice.made(living)
    old = living.cas.for_clients
    give_up_key(living, old.short)
    station = Station.open(living.folder, passphrase=b"a new one")
    new = start_issuing(station, lambda: RootKey(PASSPHRASE), derivation=CHEAP)
    activate(station, force=True)

    (granted,) = Renewals(station).answer([device.renew()])
    (confirmed,) = Renewals(station).answer([device.confirm(granted.leaf_der)])

    assert (granted.outcome, confirmed.outcome) == ("issued", "confirmed")
    x509.load_der_x509_certificate(granted.leaf_der).verify_directly_issued_by(new.certificate)
    assert confirmed.signature, "what is said of the new certificate is signed by its own CA"


def test_a_lost_passphrase_is_replaced_with_the_next_ca(living: Station) -> None:
    give_up_key(living, living.cas.for_clients.short)
    station = Station.open(living.folder, passphrase=b"a new one")

    start_issuing(station, lambda: RootKey(PASSPHRASE), derivation=CHEAP)
    activate(station, force=True)

    again = Station.open(living.folder, passphrase=b"a new one")
    assert again.authority.key_id == station.cas.for_clients.key_id


def test_a_rollover_that_fails_leaves_no_key(
    held: Station, token: TokenUri, softhsm: SoftHsm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AuthorityError("could not: a test")

    monkeypatch.setattr(profile, "issuing_certificate", fail)
    with pytest.raises(AuthorityError, match="a test"):
        start(held, token)
    assert keys_in(softhsm, token) == ["issuing"]
    assert len(held.cas.issuing) == 1


def test_an_interrupted_attempts_key_is_taken_up(held: Station, token: TokenUri, softhsm: SoftHsm) -> None:
    """Killed after the token had made it, and before it was recorded."""
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(starting, "_put", lambda *_: None)
        lost = start(held, token)
    assert len(held.cas.issuing) == 1

    assert start(held, token) == lost
    assert keys_in(softhsm, token) == ["issuing", "issuing-2"]


def test_a_root_is_replaced_with_an_issuing_key_in_the_token(
    held: Station, token: TokenUri, softhsm: SoftHsm
) -> None:
    ca = start_root(held, PASSPHRASE, derivation=CHEAP, place=TokenPlace(replace(token, object="issuing-2")))
    assert keys_in(softhsm, token) == ["issuing", "issuing-2"]
    assert held.authority_of(ca.key_id).key_id == ca.key_id


def test_the_module_is_told_once(held: Station, at_token: Command, token: TokenUri) -> None:
    uri = f"pkcs11:token={token.token};object=issuing-2?module-path=/usr/lib/other.so"

    answer = at_token("ca", "rollover", "start", "issuing", "--key", uri)

    assert (answer.exit_code, "[token] there has something else" in answer.stderr) == (1, True)
    assert len(held.cas.issuing) == 1
