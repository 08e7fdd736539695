"""`birthmark-broker export mosquitto`: what it writes, and everything that it refuses."""

from __future__ import annotations

import base64
import dataclasses
import json
import random
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.engines import ACCEPTED, Identities, write_gateway
from support.pki import crl_pem, now

from birthmark.broker.cli import parser
from birthmark.broker.config import BrokerSettings, Limits, RevocationSettings, read_settings
from birthmark.broker.export_roster import Roster
from birthmark.broker.filters import matches
from birthmark.broker.mosquitto_files import acl
from birthmark.broker.mosquitto_limits import CODES, POLICY, Refusal, refusals
from birthmark.broker.peer import Peer
from birthmark.broker.policy_file import parse_policy
from birthmark.broker.revocation import Revocations
from birthmark.broker.toml_file import parse_toml, read_toml
from birthmark.broker.trust import read_trust
from birthmark.device.console import run
from birthmark.device.errors import ConfigurationError, PolicyError
from birthmark.device.identity import BrokerName, DeviceId, Role

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.broker.policy import Policy
    from birthmark.broker.toml_file import Table

    Export = Callable[..., tuple[int, list[dict[str, Any]], dict[str, Any]]]

ALL = ("publish", "subscribe", "deny_publish", "deny_subscribe", "withhold")


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    return Identities.create(tmp_path_factory.mktemp("identities"))


@pytest.fixture
def folder(tmp_path: Path, identities: Identities) -> Path:
    """The files of a gateway that can be exported with `ACCEPTED`."""
    write_gateway(tmp_path / "gateway", identities, 8883)
    return tmp_path / "gateway"


@pytest.fixture
def export(folder: Path, capsys: pytest.CaptureFixture[str]) -> Export:
    """Run the command with `--json`; what it answers, and the error that it ends with."""

    def call(*accepted: str, run_as: str = "mosquitto") -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
        words = ["export", "mosquitto", "--json", "--config", str(folder / "broker.toml")]
        words += [
            "--identities",
            str(folder / "identities.jsonl"),
            "--out",
            str(folder / "out"),
            "--run-as",
            run_as,
        ]
        code = run(parser(), [*words, *(word for name in accepted for word in ("--accept", name))])
        captured = capsys.readouterr()
        records = [json.loads(line) for line in captured.out.splitlines()]
        return code, records, json.loads(captured.err) if captured.err else {}

    return call


def change(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert content.count(old) == 1
    path.write_text(content.replace(old, new))


def test_a_whole_configuration(folder: Path, export: Export) -> None:
    code, (record,), _ = export(*ACCEPTED)
    assert code == 0
    assert record["identities"] == 7
    out = folder / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        *["README.md", "acl", "clients-ca.pem", "crl.pem", "data", "mosquitto.conf", "reload"]
    ]
    assert stat.S_IMODE((out / "reload").stat().st_mode) == 0o755
    assert "PRIVATE KEY" not in "".join(path.read_text() for path in out.iterdir() if path.is_file())
    blocks = (out / "acl").read_text().split("\n\n")
    assert (
        """# role device
user CN=sensor-1,OU=device,O=Test
topic deny devices/sensor-1/telemetry/locked/#
topic deny devices/sensor-1/config/factory
topic deny fleet/secret/#
topic write devices/sensor-1/telemetry/#
topic write devices/sensor-1/status
topic read devices/sensor-1/commands/#
topic read devices/sensor-1/config/#
topic read fleet/#"""
        in blocks
    )
    assert not any("visitor" in block for block in blocks)
    readme = (out / "README.md").read_text()
    assert all(f"- `{name}`: " in readme for name in ACCEPTED)


def test_every_reason_at_once_and_nothing_written(folder: Path, export: Export) -> None:
    (folder / "broker.toml").write_text('name = "localhost"\non_denied = "disconnect"\n[renewal_listener]\n')
    change(folder / "policy.toml", '"devices/{id}/status"', '"devices/{id}/#"')
    code, records, error = export()
    assert code == PolicyError("").exit_code
    assert {record["refused"] for record in records} == {*CODES, POLICY} - {"rates"}
    reasons = {record["reason"] for record in records}
    assert (
        f"{folder}/broker.toml, line 2, on_denied: Mosquitto drops a message that is denied, and keeps the client"
        in (reasons)
    )
    assert any(f"{folder}/policy.toml, line 3, roles.device.publish[2]: " in reason for reason in reasons)
    assert error["error"] == (
        f"could not export to Mosquitto: Mosquitto cannot do {len(records)} things that the files say;"
        " nothing was written"
    )
    assert not (folder / "out").exists()


def test_each_reason_has_to_be_accepted(export: Export) -> None:
    for name in ACCEPTED:
        code, records, _ = export(*({*ACCEPTED} - {name}))
        assert code == ConfigurationError("").exit_code
        assert {record["refused"] for record in records} == {name}


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ('durability = "acknowledged"', "durability"),
        ('on_denied = "disconnect"', "on-denied"),
        ("revocation.fail_closed = false", "crl-grace"),
        ('limits.queue_full = "disconnect"', "queue-full"),
        ("limits.max_messages_per_s = 5", "rates"),
        ("limits.max_bytes_per_s = 5", "rates"),
        ("limits.session_expiry_s = 3601", "limits"),
        ("limits.max_connections = 10001", "limits"),
        ("renewal_listener = {}", "renewal"),
    ],
)
def test_settings_that_mosquitto_does_not_have(tmp_path: Path, setting: str, name: str) -> None:
    quiet = {
        "durability": '"none"',
        "revocation.fail_closed": "true",
        "limits.queue_full": '"drop_newest"',
        "limits.max_connections": "10000",
    }

    def found(settings: dict[str, str]) -> list[tuple[str, str]]:
        path = tmp_path / "broker.toml"
        path.write_text("\n".join(['name = "gw"', *(f"{key} = {value}" for key, value in settings.items())]))
        config, _ = read_toml(path, ConfigurationError)
        text = b'[roles.a]\npublish = ["a"]\n[[assignments]]\ncn = "*"\nrole = "a"\n'
        rules = parse_toml(text, "policy.toml", PolicyError)
        refused = refusals(read_settings(path), config, parse_policy(text, "policy.toml"), rules)
        return [(each.code, each.reason) for each in refused]

    key, value = setting.split(" = ")
    before, after = found(quiet), found(quiet | {key: value})
    (more,) = [each for each in after if each not in before]
    assert more[0] == name
    assert key in more[1]


def test_a_setting_without_translation_is_refused() -> None:
    toml = b"name = 'gw'\nnews = 1\n[revocation]\nother = 1\n[[upstream]]\nname = 'cloud'\n"
    config = parse_toml(toml, "broker.toml", ConfigurationError)
    policy, content = role('publish = ["a"]')
    found = [each.reason for each in found_of(policy, content, config) if each.code == POLICY]
    assert found == [
        "broker.toml, line 2, news: an export does not know it",
        "broker.toml, line 5, upstream: a bridge of Mosquitto's knows no fleet, and does not keep circles out",
        "broker.toml, line 4, revocation.other: an export does not know it",
    ]


def test_every_limit_is_translated_or_refused() -> None:
    translated = {"max_packet_bytes", "max_connections", "max_inflight", "max_queued_messages", "max_queued_bytes"}
    translated |= {"session_expiry_s", "shutdown_timeout_s"}
    policy, content = role('publish = ["a"]')
    limits = Limits(max_messages_per_s=1, max_bytes_per_s=1, session_expiry_s=3_601)
    reasons = " ".join(each.reason for each in found_of(policy, content, limits=limits))
    for field in dataclasses.fields(Limits):
        assert (f"limits.{field.name}:" in reasons) == (field.name not in translated - {"session_expiry_s"})


def of_policy(text: str) -> list[str]:
    """The reasons for which a policy of one role cannot be exported."""
    return [each.reason for each in found_of(*role(text)) if each.code == POLICY]


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ('publish = ["a", "gateway/+/receipts"]', "publish[2]: it lets the role publish gateway/+/receipts/#"),
        ('publish = ["#"]', "publish[1]: it lets the role publish gateway/+/receipts/#"),
        ('publish = ["+/+/status"]', "publish[1]: it lets the role publish gateway/+/status/#"),
        ('publish = ["gateway/+/seen/x"]', "publish[1]: it lets the role publish gateway/+/seen/#"),
        ('publish = ["{id}/a/receipts"]', "publish[1]: it lets the role publish gateway/+/receipts/#"),
        ('publish = ["gateway/{id}/crl-in-force/x"]', "it lets the role publish gateway/+/crl-in-force/#"),
        ('publish = ["gateway/gw/crl"]', "publish[1]: it lets the role publish gateway/+/crl: "),
        ('publish = ["devices/{id}/#"]', "publish[1]: it lets the role publish devices/+/time/request"),
        (
            'publish = ["x/#"]\ndeny_publish = ["x/y"]\nsubscribe = ["x/#"]',
            "deny_publish[1]: a deny of Mosquitto is",
        ),
        (
            'publish = ["x/#"]\nwithhold = ["x/y"]\nsubscribe = ["x/#"]',
            "withhold[1]: a deny of Mosquitto is for both",
        ),
        (
            'publish = ["x/{id}"]\ndeny_subscribe = ["x/+"]\nsubscribe = ["x/#"]',
            "deny_subscribe[1]: a deny of Mosqui",
        ),
        ('publish = ["a "]', "publish[1]: an ACL file cannot have spaces"),
        ('subscribe = [" a"]', "subscribe[1]: an ACL file cannot have spaces"),
        ('subscribe = ["a\\nuser CN=x"]', "subscribe[1]: an ACL file cannot have spaces"),
        (f'subscribe = ["{"a/" * 200}a"]', "subscribe[1]: Mosquitto takes 200 levels"),
    ],
)
def test_policies_that_mosquitto_cannot_have(rules: str, reason: str) -> None:
    (found,) = of_policy(rules)
    assert reason in found
    assert found.startswith("policy.toml, line ")


@pytest.mark.parametrize(
    "rules",
    [
        'publish = ["x/#"]\ndeny_publish = ["x/y"]\nsubscribe = ["z/#"]',
        'publish = ["x/#"]\ndeny_publish = ["x/y"]\nsubscribe = ["x/#"]\ndeny_subscribe = ["x/y"]',
        'publish = ["x/#"]\ndeny_publish = ["other/#"]\nsubscribe = ["other/#"]',
        'publish = ["devices/{id}/#"]\ndeny_publish = ["devices/+/time/#"]',
    ],
)
def test_policies_that_mosquitto_can_have(rules: str) -> None:
    assert of_policy(rules) == []


def role(text: str) -> tuple[Policy, str]:
    content = f'[roles.a]\n{text}\n[[assignments]]\ncn = "*"\nrole = "a"\n'
    return parse_policy(content.encode(), "policy.toml"), content


def found_of(
    policy: Policy, content: str, config: Table | None = None, limits: Limits | None = None
) -> list[Refusal]:
    settings = BrokerSettings(BrokerName("gw"), "127.0.0.1", 1, *(Path(),) * 5, limits=limits or Limits())
    config = config or parse_toml(b"", "broker.toml", ConfigurationError)
    return refusals(settings, config, policy, parse_toml(content.encode(), "policy.toml", PolicyError))


def mosquitto_decides(lines: list[str], access: str, topic: str) -> bool:
    """What an ACL's lines say, by Mosquitto's rules: a deny first, and no wildcard for `$`."""
    entries = [line.split(" ", 2)[1:] for line in lines if line.startswith("topic ")]
    if any(kind == "deny" and matches(entry, topic) for kind, entry in entries):
        return False
    return any(kind in (access, "readwrite") and matches(entry, topic) for kind, entry in entries)


def test_an_exported_policy_decides_as_the_policy_does() -> None:
    """Of many small policies each is refused, or its ACL says about every topic what the policy says."""
    chance = random.Random(24)
    words = ["a", "me", "{id}", "+"]
    pool = [f"{one}{rest}" for one in words for rest in ("", "/#", *(f"/{two}" for two in words))]
    topics = [f"{one}{rest}" for one in ("a", "b", "me") for rest in ("", "/a", "/b", "/me", "/a/b")]
    device, exported = DeviceId("me"), 0
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    peer = Peer(
        device, Role("device"), is_service=False, issuer="", cert_serial=1, not_before=moment, not_after=moment
    )
    for _ in range(400):
        lists = {key: chance.sample(pool, chance.choice([0, 1, 1, 2])) for key in ALL}
        policy, content = role("\n".join(f"{key} = {json.dumps(entries)}" for key, entries in lists.items()))
        if any(each.code == POLICY for each in found_of(policy, content)):
            continue
        exported += any(lists[key] for key in ALL[2:])
        lines = acl(policy, Roster({"CN=me": peer}, 0, 0)).splitlines()
        rights = policy.rights(device, Role("device"))
        for topic in topics:
            assert mosquitto_decides(lines, "write", topic) == rights.publish(topic).allowed, (content, topic)
            assert mosquitto_decides(lines, "read", topic) == rights.receive(topic).allowed, (content, topic)
    assert exported > 50


@pytest.mark.parametrize(
    ("broken", "cause"),
    [
        ("sensor-1 of a stranger", "line 8"),
        ("two names", "2 CNs"),
        ("sensor-1, not by the profile", "line 8"),
        ("alice", "its id is not the CN of its certificate, alice"),
    ],
)
def test_identities_are_checked_as_the_gateway_would(
    folder: Path, export: Export, identities: Identities, broken: str, cause: str
) -> None:
    with (folder / "identities.jsonl").open("a") as file:
        file.write(record_of(identities, broken, "sensor-1"))
    code, _, error = export(*ACCEPTED)
    assert code == ConfigurationError("").exit_code
    assert f"could not use the identities in {folder}/identities.jsonl, line 8: " in error["error"]
    assert cause in error["error"]
    assert not (folder / "out").exists()


@pytest.mark.parametrize("organization", ["Acme, Inc.", "Test\nuser CN=alice", "Test ", "Ärzte", "#1"])
def test_a_subject_that_is_spelt_otherwise_elsewhere(
    folder: Path, export: Export, identities: Identities, organization: str
) -> None:
    issued = identities.pki.issuing.issue(organization=organization)
    record = {"id": "sensor-1", "kind": "device", "certificate": base64.b64encode(issued.der).decode()}
    (folder / "identities.jsonl").write_text(json.dumps(record))
    code, _, error = export(*ACCEPTED)
    assert code == ConfigurationError("").exit_code
    assert "line 1: its subject has " in error["error"]
    assert not (folder / "out").exists()


@pytest.mark.parametrize("line", ["{", "[]", '{"certificate": 1}', '{"id": "x", "certificate": "?"}'])
def test_a_line_that_is_no_record(folder: Path, export: Export, line: str) -> None:
    (folder / "identities.jsonl").write_text(line)
    code, _, error = export(*ACCEPTED)
    assert code == ConfigurationError("").exit_code
    assert "identities.jsonl, line 1: " in error["error"]


def record_of(identities: Identities, which: str, name: str, **more: str) -> str:
    encoded = base64.b64encode(identities.issued[which].der).decode()
    return json.dumps({"id": name, "kind": "device", "certificate": encoded, **more}) + "\n"


def test_the_revoked_and_the_expired_have_no_rights(folder: Path, export: Export, identities: Identities) -> None:
    pki = identities.pki
    lines = [
        record_of(identities, "sensor-1", "sensor-1"),
        record_of(identities, "sensor-2", "sensor-2", revoked_at="2026-01-01T00:00:00+00:00"),
        record_of(identities, "camera-1", "camera-1"),
        record_of(identities, "sensor-1, expired", "sensor-1"),
        json.dumps({"id": "localhost", "kind": "broker", "certificate": "whatever it is"}) + "\n",
    ]
    (folder / "identities.jsonl").write_text("".join(lines))
    revoked = pki.issuing.crl([identities.issued["camera-1"].cert_serial], number=7)
    # It came over MQTT: it is in force, and newer than the watched file.
    settings = read_settings(folder / "broker.toml")
    trust = read_trust(settings.clients_ca_path)
    settings.data_folder.mkdir()
    in_force = Revocations.open(trust, settings.data_folder, RevocationSettings())
    assert in_force.install(revoked, datetime.now(UTC))
    code, (record,), _ = export(*ACCEPTED)
    assert code == 0
    assert (record["identities"], record["revoked"], record["out_of_date"]) == (1, 2, 1)
    assert (folder / "out" / "crl.pem").read_bytes() == crl_pem(revoked)
    users = [line for line in (folder / "out" / "acl").read_text().splitlines() if line.startswith("user ")]
    assert users == ["user CN=sensor-1,OU=device,O=Test"]

    newer = pki.issuing.crl([identities.issued[name].cert_serial for name in ("camera-1", "sensor-1")], number=8)
    (folder / "crl.pem").write_bytes(newer)
    assert export(*ACCEPTED)[1][0]["revoked"] == 3
    assert (folder / "out" / "crl.pem").read_bytes() == crl_pem(newer)
    assert "user " not in (folder / "out" / "acl").read_text()


def test_an_expired_crl_is_not_exported(folder: Path, export: Export, identities: Identities) -> None:
    past = now() - timedelta(days=1)
    crl = identities.pki.issuing.crl([], number=3, this_update=past - timedelta(days=1), next_update=past)
    (folder / "crl.pem").write_bytes(crl)
    code, _, error = export(*ACCEPTED)
    assert code == ConfigurationError("").exit_code
    assert "it expired on" in error["error"]
    assert not (folder / "out").exists()


def test_a_configuration_of_somebody_else_is_left_alone(folder: Path, export: Export) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "mosquitto.conf").write_text("listener 1883\n")
    code, _, error = export(*ACCEPTED)
    assert code == ConfigurationError("").exit_code
    assert "is not from an export" in error["error"]
    assert [path.name for path in (folder / "out").iterdir()] == ["mosquitto.conf"]


def test_an_export_replaces_an_export(folder: Path, export: Export) -> None:
    assert export(*ACCEPTED)[0] == 0
    before = (folder / "out" / "acl").read_text()
    change(folder / "policy.toml", '"devices/{id}/frames/#"', '"devices/{id}/pictures/#"')
    assert export(*ACCEPTED)[0] == 0
    assert (folder / "out" / "acl").read_text() == before.replace("/frames/#", "/pictures/#")


@pytest.mark.parametrize("user", ["", " me", "me\nallow_anonymous true"])
def test_a_word_that_would_be_another_setting(folder: Path, export: Export, user: str) -> None:
    code, _, error = export(*ACCEPTED, run_as=user)
    assert code == ConfigurationError("").exit_code
    assert "into mosquitto.conf" in error["error"]
    assert not (folder / "out").exists()


def test_an_export_needs_a_port(folder: Path, export: Export) -> None:
    change(folder / "broker.toml", ":8883", ":0")
    code, _, error = export(*ACCEPTED)
    assert code == ConfigurationError("").exit_code
    assert "its port is 0" in error["error"]
