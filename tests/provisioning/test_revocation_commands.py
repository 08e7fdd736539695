"""`birthmark revoke | crl | gateway`: output, exit code, files left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from support.patience import PATIENCE_S
from support.station import CHEAP, PASSPHRASE, Command, enrolled_row
from support.station_gateways import CLOSED, PathGateway, receipt_for

from birthmark.provisioning import audit
from birthmark.provisioning.gateway_receipts import Standing, note_policy_version, standing_of
from birthmark.provisioning.rollover.phases import activate
from birthmark.provisioning.rollover.starting import RootKey, start_issuing
from birthmark.provisioning.settings_edit import remove_gateway

if TYPE_CHECKING:
    from birthmark.provisioning.station import Station

POLICY = Path(__file__).parents[2] / "broker" / "policy.default.toml"


def test_revoke_without_a_gateway_says_so(birthmark: Command, living: Station) -> None:
    enrolled_row(living, "sensor-17")
    answer = birthmark("revoke", "sensor-17", "--reason", "lost")
    assert answer.exit_code == 0
    assert answer.stdout == f"sensor-17 is revoked: 1 certificate on CRL 2, {living.crl_path}\n"
    assert answer.stderr.startswith("warning: no gateway is configured")


def test_what_a_retired_ca_issued_is_not_said_to_be_on_the_crl(birthmark: Command, living: Station) -> None:
    enrolled_row(living, "sensor-17")
    start_issuing(living, lambda: RootKey(PASSPHRASE), derivation=CHEAP)
    activate(living, force=True)
    enrolled_row(living, "sensor-18")
    assert birthmark("ca", "rollover", "retire", "issuing", "--force").exit_code == 0
    for name, count in (("sensor-17", "0 of 1 certificate on CRL 2"), ("sensor-18", "1 certificate on CRL 3")):
        assert f"{count}, {living.crl_path}" in birthmark("revoke", name, "--reason", "lost").stdout


@pytest.mark.parametrize(
    "words",
    [("revoke", "sensor-17", "--reason", "lost"), ("crl",), ("policy", "publish", str(POLICY))],
    ids=["revoke", "crl", "policy"],
)
def test_who_does_not_wait_for_a_gateway_is_told_what_holds(
    birthmark: Command, living: Station, words: tuple[str, ...]
) -> None:
    enrolled_row(living, "sensor-17")
    code, told = interrupted(birthmark, living, *words)
    assert code == 1
    (gateway,) = told["gateways"]
    assert (gateway["gateway"], gateway["outcome"]) == ("gw-1", "PENDING")
    assert "interrupted" in gateway["cause"]
    (entry,) = [
        entry
        for entry in audit.read(living.registry.audit_path)
        if entry["action"] in ("deliver", "policy-deliver")
    ]
    assert entry["details"]["cause"] == gateway["cause"]


def test_who_does_not_wait_for_a_last_crl_has_its_ca_trusted_still(birthmark: Command, living: Station) -> None:
    start_issuing(living, lambda: RootKey(PASSPHRASE), derivation=CHEAP)
    activate(living, force=True)
    code, told = interrupted(birthmark, living, "ca", "rollover", "retire", "issuing", "--force")
    (old,) = [ca for ca in living.cas.issuing if not ca.clients]
    assert (code, told) == (130, {"event": "interrupted", "closed": [old.key_id]})
    assert (old.closed_at is None, old.retired_at) == (False, None)


def interrupted(birthmark: Command, station: Station, *words: str) -> tuple[int, dict[str, Any]]:
    """Press Ctrl-C while a command waits for a gateway; return its exit code and what it said."""
    birthmark("issue-operator", "alice", "--out", "alice")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection, and never says a word
        silent.settimeout(PATIENCE_S)
        port = str(silent.getsockname()[1])
        birthmark("gateway", "add", "gw-1", "--host", "127.0.0.1", "--port", port, "--operator", "alice/alice.pem")
        command = [sys.executable, "-m", "birthmark.provisioning", *words, "--timeout", "3600", "--json"]
        environment = {"BIRTHMARK_PASSPHRASE": PASSPHRASE.decode(), "BIRTHMARK_STATION": str(station.folder)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | environment) as process:
            connection, _ = silent.accept()
            process.send_signal(signal.SIGINT)
            try:
                told, _ = process.communicate(timeout=PATIENCE_S)
            finally:
                process.kill()
        connection.close()
    record: dict[str, Any] = json.loads(told)
    return process.returncode, record


def test_revoke_waits_for_the_gateways_word(birthmark: Command, living: Station) -> None:
    row = enrolled_row(living, "sensor-17")
    assert birthmark("gateway", "add", "gateway-1", "--path", "crl.pem").exit_code == 0
    with PathGateway(Path("crl.pem").absolute(), lambda crl: receipt_for(crl, closed=(CLOSED,)).to_bytes()):
        answer = birthmark("revoke", "Sensor-17", "--reason", "stolen")
        assert answer.exit_code == 0, answer
        assert answer.stderr == ""
        assert answer.stdout.splitlines()[1] == (
            "  gateway-1: CRL 2 installed in 4.2 ms: handshakes refused; sensor-17: 1 live session closed "
            "in 3.0 ms, will suppressed, queue purged (2 messages), presence cleared"
        )
        again = birthmark("revoke", "sensor-17", "--reason", "lost", "--json")
    assert again.exit_code == 0
    (record,) = again.records
    assert (record["revoked"], record["newly"], record["crl_number"]) == ("sensor-17", 0, 2)
    assert record["certificates"] == [{"cert_serial": f"{row.cert_serial:x}", "reason": "keyCompromise"}]
    assert record["gateways"][0]["outcome"] == "done"
    assert record["gateways"][0]["closed"][0]["will_suppressed"] is True
    crl = x509.load_pem_x509_crl(Path("crl.pem").read_bytes())
    assert crl.get_revoked_certificate_by_serial_number(row.cert_serial or 0) is not None
    delivered = [entry for entry in audit.read(living.registry.audit_path) if entry["action"] == "deliver"]
    assert [entry["details"]["outcome"] for entry in delivered] == ["done", "done"]


def test_a_gateway_that_does_not_answer_is_pending(birthmark: Command, living: Station) -> None:
    enrolled_row(living, "sensor-17")
    birthmark("gateway", "add", "gateway-1", "--path", "crl.pem")
    answer = birthmark("revoke", "sensor-17", "--reason", "lost", "--timeout", "0.2")
    assert answer.exit_code == 1
    assert "  gateway-1: PENDING: no receipt at " in answer.stdout
    assert "birthmark crl" in answer.stderr
    answer = birthmark("crl", "--timeout", "0.2", "--json")
    assert answer.exit_code == 1
    assert answer.records[0]["gateways"][0]["outcome"] == "PENDING"
    with PathGateway(Path("crl.pem").absolute(), lambda crl: receipt_for(crl, outcome="refused").to_bytes()):
        answer = birthmark("crl")
    assert answer.exit_code == 1
    assert "refused the CRL" in answer.stdout


@pytest.mark.parametrize("reason", ["los", "certificateHold", ""])
def test_an_unknown_reason_is_a_usage_error_that_lists_them(
    birthmark: Command, living: Station, reason: str
) -> None:
    enrolled_row(living, "sensor-17")
    answer = birthmark("revoke", "sensor-17", "--reason", reason)
    assert answer.exit_code == 2
    for known in ("lost", "stolen", "keyCompromise", "superseded", "cessationOfOperation"):
        assert known in answer.stderr
    assert birthmark("revoke", "sensor-17").exit_code == 2
    with living.registry.view() as view:
        assert view.revoked() == []


@pytest.mark.parametrize("timeout", ["0", "-1", "4000", "soon", "nan", "inf"])
@pytest.mark.parametrize("command", ["crl", "doctor", "restore"])
def test_a_timeout_that_is_none(birthmark: Command, command: str, timeout: str) -> None:
    answer = birthmark(command, f"--timeout={timeout}")
    assert answer.exit_code == 2
    assert f"argument --timeout: {'invalid' if timeout == 'soon' else repr(timeout)}" in answer.stderr


def test_the_root_passphrase_that_cannot_be_read_is_called_by_its_option(birthmark: Command) -> None:
    answer = birthmark("crl", "--root", "--root-passphrase-fd", "999")
    assert answer.exit_code == 6
    assert "--root-passphrase-fd" in answer.stderr


def test_revoke_nobody(birthmark: Command) -> None:
    answer = birthmark("revoke", "no/body", "--reason", "lost")
    assert answer.exit_code == 6
    assert answer.stderr.startswith("error: could not revoke no/body: there is no such identity")


def test_crl(birthmark: Command, living: Station) -> None:
    answer = birthmark("crl")
    assert answer.exit_code == 0
    assert answer.stdout == f"CRL 2 lists 0 certificates: {living.crl_path}\n"
    (record,) = birthmark("crl", "--json").records
    assert (record["crl_number"], record["entries"], record["gateways"]) == (3, 0, [])


def test_the_roots_crl(birthmark: Command, living: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    path = living.folder / "root-crl.pem"
    before = path.read_bytes()
    assert birthmark("crl", "--root", "--json").records == [{"root_crl_path": str(path)}]
    assert path.read_bytes() != before
    living.key_path(living.cas.roots[0]).rename("safe.pem")
    answer = birthmark("crl", "--root")
    assert answer.exit_code == 6
    assert "root CA's key" in answer.stderr
    assert birthmark("crl", "--root", "--root-key", "safe.pem").exit_code == 0
    monkeypatch.setenv("BIRTHMARK_ROOT_PASSPHRASE", "another")
    answer = birthmark("crl", "--root", "--root-key", "safe.pem")
    assert (answer.exit_code, "passphrase that is its own: BIRTHMARK_ROOT_PASSPHRASE" in answer.stderr) == (
        6,
        True,
    )


def test_gateways_come_and_go(birthmark: Command, living: Station) -> None:
    assert birthmark("gateway", "list").stdout == "no gateway is configured\n"
    birthmark("issue-operator", "alice")
    assert birthmark("gateway", "add", "one", "--path", "crl.pem").exit_code == 0
    added = birthmark("gateway", "add", "two.example", "--host", "192.0.2.7", "--operator", "alice.pem", "--json")
    assert added.records == [
        {
            "name": "two.example",
            "reached_by": "mqtts://192.0.2.7:8883",
            "operator": str(Path("alice.pem").absolute()),
        }
    ]
    listed = birthmark("gateway", "list", "--json").records
    assert [gateway["name"] for gateway in listed] == ["one", "two.example"]
    assert listed[0]["reached_by"] == str(Path("crl.pem").absolute())
    assert "two.example" in birthmark("gateway", "list").stdout
    assert birthmark("gateway", "remove", "ONE").exit_code == 0
    assert [gateway["name"] for gateway in birthmark("gateway", "list", "--json").records] == ["two.example"]
    answer = birthmark("gateway", "remove", "one")
    assert answer.exit_code == 1
    assert "none of that name" in answer.stderr
    actions = [entry["action"] for entry in audit.read(living.registry.audit_path)]
    assert [action for action in actions if action.startswith("gateway")] == [
        "gateway-add",
        "gateway-add",
        "gateway-remove",
    ]


def test_a_gateway_that_is_added_has_confirmed_nothing(birthmark: Command, living: Station) -> None:
    birthmark("gateway", "add", "one", "--path", "crl.pem")
    with living.registry.transaction() as transaction:
        note_policy_version(transaction, "one", 7)
    remove_gateway(living.settings_path, "one")  # as a person does, or a command that is killed after it
    assert birthmark("gateway", "add", "ONE", "--path", "other.pem").exit_code == 0
    with living.registry.view() as view:
        assert standing_of(view, "one") == Standing({})


@pytest.mark.parametrize(
    ("words", "code", "cause"),
    [
        (["g"], 2, "either a path or a broker"),
        (["g", "--host", "h"], 2, "either a path or a broker"),
        (["g", "--operator", "alice.pem"], 2, "either a path or a broker"),
        (["g", "--path", "p", "--host", "h", "--operator", "alice.pem"], 2, "either a path or a broker"),
        (["a/b", "--path", "p"], 2, "broker name"),
        (["g", "--host", "h", "--operator", "none.pem"], 1, "none.pem"),
        (["g", "--host", "h", "--port", "0", "--operator", "alice.pem"], 2, "port"),
    ],
)
def test_gateways_that_cannot_be(
    birthmark: Command, living: Station, words: list[str], code: int, cause: str
) -> None:
    before = living.settings_path.read_bytes()
    answer = birthmark("gateway", "add", *words)
    assert answer.exit_code == code
    assert cause in answer.stderr
    assert living.settings_path.read_bytes() == before
