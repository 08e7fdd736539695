"""`birthmark init | issue-broker | issue-operator | list | show | audit`: output, exit code, files left."""

from __future__ import annotations

import json
import os
import ssl
import stat
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from support.patience import PATIENCE_S
from support.station import PASSPHRASE, Command, enrolled_row, keyed_row

from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.pem import read_blocks
from birthmark.provisioning.registry.line import Batch
from birthmark.provisioning.registry.model import Kind, State
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from support.station import Answer


def fails(answer: Answer, code: int, cause: str) -> None:
    """Expect an expected failure: nothing on stdout, an error and a hint on stderr."""
    assert answer.exit_code == code, answer
    assert answer.stdout == ""
    error, hint = answer.stderr.splitlines()
    assert error.startswith("error: could not ")
    assert cause in error
    assert hint.startswith("hint: ")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    "words",
    [
        ["init"],
        ["issue-broker"],
        ["issue-operator"],
        ["list"],
        ["show"],
        ["audit", "verify"],
        ["audit", "show"],
        ["revoke"],
        ["crl"],
        ["gateway", "add"],
        ["gateway", "list"],
        ["gateway", "remove"],
        ["flash"],
    ],
)
def test_every_command_has_examples_and_json(birthmark: Command, words: list[str]) -> None:
    answer = birthmark(*words, "--help")
    assert answer.exit_code == 0
    assert "examples:\n  birthmark " + " ".join(words) in answer.stdout
    assert "--json" in answer.stdout
    assert "--station" in answer.stdout


def test_the_whole_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "station"
    environment = {**os.environ, "BIRTHMARK_STATION": str(folder)}
    environment.pop("BIRTHMARK_PASSPHRASE", None)
    reader, writer = os.pipe()
    os.write(writer, PASSPHRASE + b"\n")
    os.close(writer)
    command = [sys.executable, "-m", "birthmark.provisioning", "init", "--organization", "Acme", "--json"]
    done = subprocess.run(
        [*command, "--passphrase-fd", str(reader)],
        env=environment,
        pass_fds=[reader],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    os.close(reader)
    record = json.loads(done.stdout)
    assert record["station"] == str(folder)
    assert record["organization"] == "Acme"
    assert done.stderr == ""
    assert Station.open(folder, passphrase=PASSPHRASE).authority.key_id
    again = subprocess.run(
        [sys.executable, "-m", "birthmark.provisioning", "list"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (again.returncode, again.stdout) == (0, "nothing is enrolled that fits\n")


def test_init_refuses_what_is_there(birthmark: Command) -> None:
    before = sorted(birthmark.folder.rglob("*"))
    fails(birthmark("init"), 1, "something already")
    assert sorted(birthmark.folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--organization", ""),
        ("--organization", "x" * 65),
        ("--default-role", "operator"),
        ("--broker-host", "a/b"),
        ("--broker-port", "0"),
        ("--keepalive-s", "70000"),
    ],
)
def test_init_refuses_settings_that_cannot_be_used(
    birthmark: Command, tmp_path: Path, option: str, value: str
) -> None:
    birthmark.folder = tmp_path / "new"
    answer = birthmark("init", option, value)
    assert answer.exit_code == 2
    causes = ("error: could not use ", "error: could not give a device the role ")
    assert answer.stderr.startswith(causes) or f"error: argument {option}: " in answer.stderr
    assert not birthmark.folder.exists()


def test_issue_broker(birthmark: Command, living: Station) -> None:
    answer = birthmark("issue-broker", "gateway-1.example.com", "127.0.0.1", "--out", "gw", "--json")
    assert answer.exit_code == 0, answer
    (record,) = answer.records
    assert record["name"] == "gateway-1.example.com"
    out = Path("gw")
    assert record["files"] == ["gw/server.pem", "gw/clients-ca.pem", "gw/crl.pem"]
    assert sorted(path.name for path in out.iterdir()) == ["clients-ca.pem", "crl.pem", "server.pem"]
    assert (mode(out), mode(out / "server.pem")) == (0o700, 0o600)
    labels = [label for label, _ in read_blocks((out / "server.pem").read_bytes())]
    assert labels == ["PRIVATE KEY", "CERTIFICATE", "CERTIFICATE"]
    assert (out / "clients-ca.pem").read_bytes() == (living.folder / "issuing.pem").read_bytes()
    assert (out / "crl.pem").read_bytes() == living.crl_path.read_bytes()
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(out / "server.pem")
    with living.registry.view() as view:
        row = view.live_by_name("gateway-1.example.com")
    assert row is not None
    assert row.state is State.ATTESTED
    assert f"{row.cert_serial:x}" == record["cert_serial"]


def test_issue_broker_names_its_folder_after_the_host(birthmark: Command) -> None:
    assert birthmark("issue-broker", "localhost").exit_code == 0
    assert Path("localhost/server.pem").exists()


@pytest.mark.parametrize("host", ["+", "a/b", "*.example.com", "x" * 65, "a b", "\x1b[31m", ""])
def test_issue_broker_refuses_what_is_no_host(birthmark: Command, host: str) -> None:
    fails(birthmark("issue-broker", host, "--out", "gw"), 1, "broker")
    fails(birthmark("issue-broker", "localhost", host, "--out", "gw"), 1, "broker")
    assert not Path("gw").exists()


def test_issue_operator(birthmark: Command, living: Station) -> None:
    answer = birthmark("issue-operator", "alice", "--out", "ops")
    assert answer.exit_code == 0, answer
    assert "alice" in answer.stdout
    assert mode(Path("ops/alice.pem")) == 0o600
    assert mode(Path("ops")) == 0o700
    credentials = Credentials.from_files("ops/alice.pem", "ops/ca.pem", BrokerAddress("localhost"))
    assert (str(credentials.device_id), str(credentials.role)) == ("alice", "operator")
    assert Path("ops/ca.pem").read_bytes() == (living.folder / "root.pem").read_bytes()


def test_an_existing_folder_keeps_its_mode(birthmark: Command) -> None:
    Path("ops").mkdir(mode=0o755)
    assert birthmark("issue-operator", "alice", "--out", "ops").exit_code == 0
    assert mode(Path("ops")) == 0o755


def test_issue_operator_with_a_service_role(birthmark: Command) -> None:
    assert birthmark("issue-operator", "billing", "--role", "service-billing").exit_code == 0
    fails(birthmark("issue-operator", "sensor-1", "--role", "sensor"), 1, "a device's")
    assert not Path("sensor-1.pem").exists()


@pytest.mark.parametrize("name", ["+", "#", "a/b", "", "x" * 64, "a.b", "al\u0131ce", "-a", "a\x1b[0m"])
def test_issue_operator_refuses_names_outside_the_grammar(birthmark: Command, name: str) -> None:
    words = ["issue-operator", "--", name] if name.startswith("-") else ["issue-operator", name]
    if name == "-a":
        assert birthmark("issue-operator", name).exit_code == 2
        return
    fails(birthmark(*words), 1, "grammar")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("name", ["ca", "CA"])
def test_no_key_goes_where_the_ca_certificate_goes(birthmark: Command, name: str) -> None:
    fails(birthmark("issue-operator", name), 1, "ca.pem")
    assert list(Path().iterdir()) == []


def test_the_audit_log_names_the_user_whatever_the_environment_says(
    birthmark: Command, living: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "somebody-else")
    monkeypatch.setenv("USER", "somebody-else")
    assert birthmark("crl").exit_code == 0
    assert "somebody-else" not in living.registry.audit_path.read_text()


def test_a_name_is_issued_once(birthmark: Command, living: Station) -> None:
    enrolled_row(living, "sensor-1")
    assert birthmark("issue-operator", "alice").exit_code == 0
    before = Path("alice.pem").read_bytes()
    fails(birthmark("issue-operator", "ALICE", "--out", "other"), 3, "belongs to service alice")
    fails(birthmark("issue-operator", "Sensor-1", "--renew", "--out", "other"), 3, "belongs to device sensor-1")
    fails(birthmark("issue-broker", "alice", "--out", "other"), 3, "belongs to service alice")
    assert not Path("other").exists()
    assert Path("alice.pem").read_bytes() == before


def test_renewing_replaces_the_file_and_leaves_the_old_certificate_valid(
    birthmark: Command, living: Station
) -> None:
    birthmark("issue-operator", "alice")
    before = Path("alice.pem").read_bytes()
    answer = birthmark("issue-operator", "alice", "--renew", "--json")
    assert answer.exit_code == 0, answer
    assert Path("alice.pem").read_bytes() != before
    with living.registry.view() as view:
        old, new = view.named("alice")
        assert view.live_by_name("alice") == new
    assert (old.replaced_by, new.replaces) == (new.number, old.number)
    assert not old.is_revoked
    assert answer.records[0]["cert_serial"] == f"{new.cert_serial:x}"
    assert birthmark("revoke", "alice", "--reason", "superseded", "--json").records[0]["newly"] == 2


def test_a_file_that_is_there_is_not_overwritten(birthmark: Command, living: Station) -> None:
    Path("alice.pem").write_text("precious")
    fails(birthmark("issue-operator", "alice"), 1, "there already")
    assert Path("alice.pem").read_text() == "precious"
    with living.registry.view() as view:
        assert view.rows() == []


def test_an_interrupted_attempt_is_revoked_and_begun_again(birthmark: Command, living: Station) -> None:
    birthmark("issue-operator", "alice", "--out", "one")
    edit = Path(living.folder / "registry.json")
    tables = json.loads(edit.read_text())
    tables["rows"]["1"]["state"] = "ISSUED"  # as a kill before the last step leaves it
    edit.write_text(json.dumps(tables))
    answer = birthmark("issue-operator", "alice", "--out", "two", "--json")
    assert answer.exit_code == 0, answer
    assert "interrupted attempt's certificate was revoked" in answer.stderr
    with living.registry.view() as view:
        first, second = view.named("alice")
    assert (first.state, first.is_revoked, second.state) == (State.VOID, True, State.ATTESTED)
    crl = x509.load_pem_x509_crl(living.crl_path.read_bytes())
    assert [entry.serial_number for entry in crl] == [first.cert_serial]


@pytest.mark.parametrize("words", [["issue-broker", "localhost"], ["issue-operator", "alice"], ["crl"]])
def test_a_wrong_passphrase_changes_nothing(
    birthmark: Command, living: Station, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    before = {path: path.read_bytes() for path in living.folder.rglob("*") if path.is_file()}
    monkeypatch.setenv("BIRTHMARK_PASSPHRASE", "wrong")
    fails(birthmark(*words), 6, "passphrase is wrong")
    assert {path: path.read_bytes() for path in living.folder.rglob("*") if path.is_file()} == before
    assert list(Path().iterdir()) == []


def test_no_station_is_said_with_what_to_do(birthmark: Command, tmp_path: Path) -> None:
    birthmark.folder = tmp_path / "nowhere"
    for words in (["list"], ["show", "x"], ["crl"], ["audit", "verify"], ["gateway", "list"]):
        fails(birthmark(*words), 1, "there is none")
    assert not birthmark.folder.exists()


def test_a_failure_in_json(birthmark: Command) -> None:
    answer = birthmark("show", "nobody", "--json")
    assert answer.exit_code == 6
    assert answer.stdout == ""
    assert json.loads(answer.stderr) == {
        "error": "could not show nobody: there is no such identity",
        "hint": "list them with `birthmark list`",
        "exit_code": 6,
    }


def test_list(birthmark: Command, living: Station) -> None:
    assert birthmark("list").stdout == "nothing is enrolled that fits\n"
    row = enrolled_row(living, "sensor-1")
    keyed_row(living, "camera-1", role="camera")
    birthmark("issue-operator", "alice")
    birthmark("revoke", "alice", "--reason", "withdrawn")
    answer = birthmark("list")
    heading, *lines = answer.stdout.splitlines()
    assert heading.split() == ["NAME", "KIND", "ROLE", "STATE", "REVOKED", "NOT", "AFTER", "HWID"]
    assert [line.split()[:5] for line in lines] == [
        ["sensor-1", "device", "sensor", "ATTESTED", "-"],
        ["camera-1", "device", "camera", "KEYED", "-"],
        ["alice", "service", "operator", "VOID", "privilegeWithdrawn"],
    ]
    records = birthmark("list", "--json").records
    assert [record["name"] for record in records] == ["sensor-1", "camera-1", "alice"]
    assert records[0]["cert_serial"] == f"{row.cert_serial:x}"

    def names(*filters: str) -> list[str]:
        return [record["name"] for record in birthmark("list", "--json", *filters).records]

    assert names("--state", "keyed") == ["camera-1"]
    assert names("--state", "KEYED", "--state", "VOID") == ["camera-1", "alice"]
    assert names("--role", "sensor") == ["sensor-1"]
    assert names("--kind", "service") == ["alice"]
    assert names("--name", "*-1") == ["sensor-1", "camera-1"]
    assert names("--name", "CAMERA-?") == ["camera-1"]
    assert names("--revoked") == ["alice"]
    assert names("--not-revoked") == ["sensor-1", "camera-1"]
    assert birthmark("list", "--state", "nonsense").exit_code == 2
    assert birthmark("list", "--revoked", "--not-revoked").exit_code == 2
    for words, cause in ((["--name", "pump[12]"], "can match no name"), (["--expiring", "soon"], "like 30d")):
        answer = birthmark("list", *words)
        assert (answer.exit_code, answer.stdout) == (2, "")
        assert cause in answer.stderr


def test_list_by_batch_and_end(birthmark: Command, living: Station) -> None:
    enrolled_row(living, "sensor-2")
    with living.registry.transaction() as transaction:
        transaction.put_batch(Batch("2026-W47", living.clock()))
        row = transaction.insert(
            kind=Kind.DEVICE, name="sensor-1", role="sensor", hwid=b"unit", txn=bytes(16), batch="2026-W47"
        )
        transaction.update(row.changed(not_after=living.clock() + timedelta(days=10)))

    def names(*filters: str) -> list[str]:
        return [record["name"] for record in birthmark("list", "--json", *filters).records]

    assert names("--batch", "2026-w47") == ["sensor-1"]
    assert names("--batch", "2026-W48") == []
    assert names("--expiring", "11d") == names("--expiring", "2w") == ["sensor-1"]
    assert names("--expiring", "9d") == names("--expiring", "12h") == []


def test_show(birthmark: Command, living: Station) -> None:
    row = enrolled_row(living, "sensor-1")
    answer = birthmark("show", "SENSOR-1", "--json")
    (record,) = answer.records
    assert row.certificate_der is not None
    assert row.hwid is not None
    certificate = x509.load_der_x509_certificate(row.certificate_der)
    expected = {
        "name": "sensor-1",
        "kind": "device",
        "state": "ATTESTED",
        "hwid": row.hwid.hex(),
        "subject": "CN=sensor-1,OU=sensor,O=Acme",
        "cert_serial": f"{certificate.serial_number:x}",
        "extended_key_usage": ["clientAuth"],
        "alternative_names": ["CN=sensor-1"],
        "not_before": f"{certificate.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}",
        "not_after": f"{certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
        "revoked_at": None,
        "other_rows": [],
    }
    assert expected.items() <= record.items()
    text = birthmark("show", "sensor-1").stdout
    assert "subject" in text
    assert record["certificate_sha256"] in text
    fails(birthmark("show", "nobody"), 6, "no such identity")


def test_show_tells_of_other_rows(birthmark: Command, living: Station) -> None:
    row = keyed_row(living, "sensor-1")
    with living.registry.transaction() as transaction:
        transaction.update(row.changed(state=State.VOID, void_reason="test"))
    enrolled_row(living, "sensor-1")
    (record,) = birthmark("show", "sensor-1", "--json").records
    assert (record["number"], record["state"], record["other_rows"]) == (2, "ATTESTED", ["1 VOID"])


def test_audit(birthmark: Command, living: Station) -> None:
    birthmark("issue-operator", "alice")
    birthmark("revoke", "alice", "--reason", "lost")
    answer = birthmark("audit", "verify")
    assert answer.exit_code == 0
    assert answer.stdout.startswith("11 entries, all sound; the last one's hash is ")
    shown = birthmark("audit", "show", "--subject", "ALICE", "--json").records
    assert [entry["action"] for entry in shown] == ["issue", "release", "revoke"]
    assert "@" in shown[0]["actor"]
    assert shown[2]["details"]["reason"] == "keyCompromise"
    assert [entry["action"] for entry in birthmark("audit", "show", "--last", "1", "--json").records] == ["crl"]
    assert birthmark("audit", "show", "--last", "0").stdout == ""
    assert len(birthmark("audit", "show", "--action", "crl").stdout.splitlines()) == 3


def test_audit_verify_locates_what_was_done(birthmark: Command, living: Station) -> None:
    log = living.registry.audit_path
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([lines[0], lines[1].replace("issuing-ca", "Issuing-ca"), *lines[2:]]))
    answer = birthmark("audit", "verify", "--json")
    assert answer.exit_code == 6
    assert [problem["line"] for problem in answer.records[0]["problems"]] == [2]
    log.write_text("".join(lines[:-1]))
    answer = birthmark("audit", "verify")
    # The last entry is still in the registry's outbox: it comes back by itself.
    assert answer.exit_code == 0
    log.write_text("".join(lines[:-2]))
    answer = birthmark("audit", "verify")
    assert answer.exit_code == 6
    assert "missing" in answer.stdout


def test_a_damaged_registry_stops_every_command(birthmark: Command, living: Station) -> None:
    path = living.folder / "registry.json"
    path.write_bytes(path.read_bytes()[:-20])
    for words in (["list"], ["show", "x"], ["crl"], ["issue-operator", "x"], ["revoke", "x", "--reason", "lost"]):
        fails(birthmark(*words), 6, "damaged")


def test_no_core_dumps(birthmark: Command, living: Station) -> None:
    script = (
        "import resource, sys; from birthmark.device.console import run;"
        "from birthmark.provisioning.cli import parser; run(parser(), sys.argv[1:]);"
        "print(resource.getrlimit(resource.RLIMIT_CORE))"
    )
    command = [sys.executable, "-c", script, "list", "--json", "--station", str(living.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout == "(0, 0)\n"


def test_no_private_key_leaves_its_file(birthmark: Command, living: Station) -> None:
    answers = [birthmark("issue-operator", "alice", "--out", "out"), birthmark("show", "alice")]
    key = next(der for label, der in read_blocks(Path("out/alice.pem").read_bytes()) if label == "PRIVATE KEY")
    scalar = key[36:68]
    holders = [
        path
        for root in (living.folder, Path("out"))
        for path in root.rglob("*")
        if path.is_file() and (scalar in path.read_bytes() or scalar.hex().encode() in path.read_bytes())
    ]
    assert holders == []  # PEM is base64: not even the file itself holds the octets
    text = "".join(answer.stdout + answer.stderr for answer in answers)
    assert "PRIVATE" not in text
    assert "PRIVATE" not in (living.folder / "registry.json").read_text()
    assert "PRIVATE" not in living.registry.audit_path.read_text()


@pytest.mark.parametrize("next_command", [["audit", "verify"], ["batch", "open", "W47"], ["crl"]])
def test_cutting_just_what_the_registry_puts_back_leaves_a_trace(
    birthmark: Command, living: Station, next_command: list[str]
) -> None:
    log = living.registry.audit_path
    assert birthmark("batch", "open", "W46").exit_code == 0
    assert birthmark("batch", "close").exit_code == 0
    whole = log.read_bytes()
    log.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))

    birthmark(*next_command)

    answer = birthmark("audit", "verify", "--json")
    assert log.read_bytes().startswith(whole)
    assert answer.records[0]["sound"] is True
    number = len(whole.splitlines()) + 1
    (place,) = answer.records[0]["restored"]
    assert place.startswith(f"before line {number} (entry {number}, ")
    assert place.endswith("1 line was missing and was put back")
    assert "somebody cut the end of the log" in answer.stderr
