"""The broker's commands: what they say, how they end, and which files they leave behind."""

from __future__ import annotations

import dataclasses
import json
import stat
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from support.pki import Pki

from birthmark.broker.cli import parser
from birthmark.broker.config import BrokerSettings, Limits, RenewalListener, read_settings
from birthmark.broker.gateway import Gateway
from birthmark.broker.policy_file import read_policy
from birthmark.broker.upstream.settings import UPSTREAM_KEYS, UpstreamSettings
from birthmark.device.console import run
from birthmark.device.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

PKI = Pki.create()


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def broker(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Run `birthmark-broker` in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Result:
        try:
            code = run(parser(), arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def test_init_writes_two_files_that_can_be_read(broker: Callable[..., Result]) -> None:
    result = broker("init", "--name", "gw-1")
    assert result.code == 0
    assert "wrote broker.toml (gateway gw-1)" in result.out
    assert "server.pem" in result.out
    assert sorted(path.name for path in Path().iterdir()) == ["broker.toml", "policy.toml"]
    settings = read_settings(Path("broker.toml"))
    assert settings == BrokerSettings(
        name=settings.name,
        listen_host="0.0.0.0",  # noqa: S104 - the documented default
        listen_port=8883,
        credentials_path=Path.cwd() / "server.pem",
        clients_ca_path=Path.cwd() / "clients-ca.pem",
        crl_path=Path.cwd() / "crl.pem",
        policy_path=Path.cwd() / "policy.toml",
        data_folder=Path.cwd() / "data",
        path=Path.cwd() / "broker.toml",
    )
    assert [role.name for role in read_policy(Path("policy.toml")).roles] == [
        "device",
        "operator",
        "service-renewal",
        "service-gateway",
    ]
    assert stat.S_IMODE(Path("broker.toml").stat().st_mode) == 0o644


def test_an_expired_certificate_is_renewed_for_as_long_as_the_crl_has_it(broker: Callable[..., Result]) -> None:
    broker("init", "--name", "gw-1")
    with Path("broker.toml").open("a") as file:
        file.write("\n[renewal_listener]\ngrace_days = 61\n")
    refused = broker("run")
    assert refused.code != 0
    assert "grace_days" in refused.err
    assert "60" in refused.err


def test_what_init_comments_out_is_the_default(broker: Callable[..., Result]) -> None:
    broker("init", "--name", "gw-1")
    before = read_settings(Path("broker.toml"))
    lines = Path("broker.toml").read_text().splitlines()
    active = [
        line.removeprefix("# ")
        if line in ("# [renewal_listener]", "# [[upstream]]")
        or (line.startswith("# ") and " = " in line and line[2].islower())
        else line
        for line in lines
    ]
    active = [line for line in active if "`" not in line]
    Path("all.toml").write_text("\n".join(active))
    keys = tomllib.loads("\n".join(active))
    assert {"grace_days", "fail_closed", "max_crl_bytes", "watch_interval_s"} == set(keys["revocation"])
    assert set(keys["limits"]) == {field.name for field in dataclasses.fields(Limits)}
    after = read_settings(Path("all.toml"))
    assert before.renewal_listener is None
    assert after.renewal_listener == RenewalListener("0.0.0.0", 8884, timedelta(days=30))  # noqa: S104 - the default
    assert before.upstreams == ()
    (upstream,) = after.upstreams
    assert set(keys["upstream"][0]) == set(UPSTREAM_KEYS)
    assert upstream == UpstreamSettings(
        name=upstream.name,
        servers=upstream.servers,
        credentials_path=upstream.credentials_path,
        ca_path=upstream.ca_path,
        mapping=upstream.mapping,
    )
    assert (after.limits, after.revocation, after.on_denied) == (
        before.limits,
        before.revocation,
        before.on_denied,
    )


def test_init_takes_the_name_from_the_certificate(broker: Callable[..., Result]) -> None:
    PKI.write_broker_files(Path(), "gateway-7.example.com")
    result = broker("init", "--json")
    record = json.loads(result.out)
    assert record["name"] == "gateway-7.example.com"
    assert str(read_settings(Path(record["broker"])).name) == "gateway-7.example.com"


def test_init_with_paths_and_a_folder(broker: Callable[..., Result]) -> None:
    odd = 'tls "folder"\\\u20ac/server.pem'
    result = broker("init", "--folder", "etc/gw", "--name", "gw", "--credentials", odd, "--listen", "[::1]:0")
    assert result.code == 0
    settings = read_settings(Path("etc/gw/broker.toml"))
    assert settings.credentials_path == Path.cwd() / odd
    assert (settings.listen_host, settings.listen_port) == ("::1", 0)


@pytest.mark.parametrize("there", ["broker.toml", "policy.toml"])
def test_init_overwrites_nothing(broker: Callable[..., Result], there: str) -> None:
    Path(there).write_text("mine")
    result = broker("init", "--name", "gw")
    assert (result.code, result.out) == (1, "")
    assert f"could not write {there}: it exists already" in result.err
    assert "hint:" in result.err
    assert [path.read_text() for path in Path().iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (1, ("--name", "a/b")),
        (1, ("--name", "+")),
        (2, ("--name", "gw", "--listen", "nowhere")),
        (2, ("--name", "gw", "--listen", "::1:8883")),
        (2, ("--name", "gw", "--listen", "a:65536")),
        (1, ("--name", "gw", "--crl", "\udcff")),
    ],
)
def test_init_refuses_and_leaves_nothing(
    broker: Callable[..., Result], code: int, arguments: tuple[str, ...]
) -> None:
    result = broker("init", *arguments)
    assert result.code == code
    assert "error: could not" in result.err
    assert list(Path().iterdir()) == []


def test_init_where_it_may_not_write_leaves_nothing(broker: Callable[..., Result]) -> None:
    Path("etc").write_text("a file")
    result = broker("init", "--name", "gw", "--folder", "etc/gw")
    assert result.code == 5
    assert [path.name for path in Path().iterdir()] == ["etc"]


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("", 1, "'name' is missing"),
        ('name = "a/b"', 1, "name: could not use 'a/b' as a broker name"),
        ('name = "gw"\nlisten = "8883"', 2, "listen: it must be host:port"),
        ('name = "gw"\n\n[limits]\nmax_packet = 1', 4, "limits.max_packet: unknown key"),
        ('name = "gw"\n[limits]\nmax_inflight = 0', 3, "limits.max_inflight: it must be a whole number"),
        ('name = "gw"\n[limits]\nmax_inflight = true', 3, "limits.max_inflight: it must be a whole number"),
        ('name = "gw"\n[limits]\nconnect_timeout_s = nan', 3, "limits.connect_timeout_s: it must be a number"),
        ('name = "gw"\non_denied = "ignore"', 2, "on_denied: 'ignore' is none of"),
        ('name = "gw"\n[limits]\nqueue_full = "grow"', 3, "limits.queue_full: 'grow' is none of 'drop_oldest'"),
        ('name = "gw"\n[revocation]\nfail_closed = "yes"', 3, "revocation.fail_closed: it must be true or false"),
        ('name = "gw"\ncrl = ""', 2, "crl: it must be the path"),
        ('name = "gw"\nlimits = 3', 2, "limits: it must be a table"),
        ("name = gw", 1, "Invalid value"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(tmp_path: Path, text: str, line: int, expected: str) -> None:
    path = tmp_path / "broker.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        read_settings(path)
    assert str(path) in caught.value.message
    assert f"line {line}" in caught.value.message
    assert expected in caught.value.message


def test_policy_check(broker: Callable[..., Result]) -> None:
    broker("init", "--name", "gw")
    result = broker("policy", "check")
    assert result.code == 0
    assert "policy.toml: ok, 4 roles, 4 assignments" in result.out
    assert result.err == ""
    record = json.loads(broker("policy", "check", "policy.toml", "--json").out)
    assert record["ok"] is True
    assert record["roles"] == ["device", "operator", "service-renewal", "service-gateway"]


def test_policy_check_of_a_bad_file(broker: Callable[..., Result]) -> None:
    Path("bad.toml").write_text('[roles.device]\npublish = ["a/#/b"]\n')
    result = broker("policy", "check", "bad.toml")
    assert (result.code, result.out) == (1, "")
    assert "bad.toml, line 2, roles.device.publish[1]" in result.err
    failure = json.loads(broker("policy", "check", "bad.toml", "--json").err)
    assert failure["exit_code"] == 1
    assert broker("policy", "check", "missing.toml").code == 1


def test_policy_check_warns_of_what_is_not_meant(broker: Callable[..., Result]) -> None:
    Path("odd.toml").write_text(
        '[roles.a]\npublish = ["#"]\n[roles.b]\n[[assignments]]\ncn = "*"\nrole = "a"\n'
        '[[assignments]]\ncn = "x"\nrole = "a"\n'
    )
    result = broker("policy", "check", "odd.toml")
    assert result.code == 0
    assert "no assignment gives the role 'b'" in result.err
    assert "assignment 2 is never reached" in result.err
    assert "roles.a.publish has '#'" in result.err
    assert len(json.loads(broker("policy", "check", "odd.toml", "--json").out)["warnings"]) == 3


@pytest.mark.parametrize(
    ("arguments", "verdict", "because"),
    [
        (("sensor-1", "publish", "devices/sensor-1/telemetry/x"), "allowed", "'devices/{id}/telemetry/#' matches"),
        (("sensor-1", "publish", "devices/sensor-2/telemetry/x"), "denied", "no publish entry matches"),
        (("sensor-1", "subscribe", "#"), "denied", "no one subscribe entry contains"),
        (("sensor-1", "receive", "devices/sensor-1/commands/x"), "allowed", "matches"),
        (("alice", "subscribe", "devices/#", "--role", "operator"), "allowed", "assignment 1, ou 'operator'"),
        (("alice", "subscribe", "devices/#", "--role", "service-x"), "denied", "no assignment matches"),
        (("sensor-1", "publish", "a\x1b[2J"), "denied", "no publish entry"),
    ],
)
def test_policy_explain(
    broker: Callable[..., Result], arguments: tuple[str, ...], verdict: str, because: str
) -> None:
    broker("init", "--name", "gw")
    result = broker("policy", "explain", *arguments)
    assert result.code == 0
    assert result.out.startswith(f"{verdict}: {arguments[0]} {arguments[1]}")
    assert because in result.out
    assert "\x1b" not in result.out
    record = json.loads(broker("policy", "explain", *arguments, "--json").out)
    assert record["allowed"] is (verdict == "allowed")
    assert because in record["rule"]


def test_policy_explain_says_what_is_allowed_instead(broker: Callable[..., Result]) -> None:
    broker("init", "--name", "gw")
    result = broker("policy", "explain", "sensor-1", "subscribe", "devices/sensor-1/#")
    assert "it may subscribe: devices/sensor-1/commands/#, fleet/announcements/#" in result.out


def test_policy_explain_of_a_name_that_is_none(broker: Callable[..., Result]) -> None:
    broker("init", "--name", "gw")
    result = broker("policy", "explain", "a/b", "publish", "x")
    assert result.code == 1
    assert "outside the grammar" in result.err
    assert broker("policy", "explain", "a", "publish", "x", "--role", "a b").code == 1
    assert broker("policy", "explain", "a", "shout", "x").code == 2


def test_policy_diff(broker: Callable[..., Result]) -> None:
    broker("init", "--name", "gw")
    text = Path("policy.toml").read_text()
    Path("new.toml").write_text(text.replace('"gateway/+/crl",', "").replace('cn = "*"', 'cn = "sensor-*"'))
    lines = broker("policy", "diff", "policy.toml", "new.toml").out.splitlines()
    assert lines == [
        "- roles.operator.publish: gateway/+/crl (loses)",
        "- assignments[4]: cn '*' -> device",
        "+ assignments[4]: cn 'sensor-*' -> device",
    ]
    record = json.loads(broker("policy", "diff", "policy.toml", "new.toml", "--json").out.splitlines()[0])
    assert (record["sign"], record["effect"]) == ("-", "loses")
    Path("same.toml").write_text("# a comment\n" + text)
    assert "no difference" in broker("policy", "diff", "policy.toml", "same.toml").out


def test_policy_test(broker: Callable[..., Result]) -> None:
    broker("init", "--name", "gw")
    case = '[[test]]\ncn = "a"\npublish = "devices/a/status"\nallowed = {}\n'
    Path("good.toml").write_text(case.format("true"))
    assert broker("policy", "test", "good.toml") == Result(0, "1 passed, 0 failed\n", "")
    Path("bad.toml").write_text(case.format("true") + case.format("false"))
    result = broker("policy", "test", "bad.toml")
    assert result.code == 1
    assert result.out.splitlines()[0].startswith("FAIL [2] a publish devices/a/status: allowed")
    assert result.out.splitlines()[1] == "1 passed, 1 failed"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no [[test]] tables"),
        ('[[test]]\ncn = "a"\nallowed = true\n', "it needs one of"),
        ('[[test]]\ncn = "a"\npublish = "x"\n', "'allowed' is missing"),
        ('[[test]]\ncn = "a/"\npublish = "x"\nallowed = true\n', "outside the grammar"),
        ('[[test]]\ncn = "a"\npublsh = "x"\nallowed = true\n', "line 3, test[1].publsh: unknown key"),
    ],
)
def test_policy_test_of_a_bad_file(broker: Callable[..., Result], text: str, expected: str) -> None:
    broker("init", "--name", "gw")
    Path("t.toml").write_text(text)
    result = broker("policy", "test", "t.toml")
    assert result.code == 1
    assert expected in result.err


def test_crl_show(broker: Callable[..., Result]) -> None:
    PKI.write_broker_files(Path(), "gw", revoked=[1, 2], crl_number=7)
    broker("init")
    before = broker("crl", "show")
    assert before.code == 0
    assert "missing" in before.out
    assert not Path("data").exists()
    Gateway.open(read_settings(Path("broker.toml")))
    record = json.loads(broker("crl", "show", "--json").out)
    assert (record["number"], record["revoked"], record["state"]) == (7, 2, "in force")
    assert record["issuer"] == "CN=Test Issuing CA,O=Test"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("init",),
        ("run",),
        ("policy",),
        ("policy", "check"),
        ("policy", "explain"),
        ("policy", "diff"),
        ("policy", "test"),
        ("crl",),
        ("crl", "show"),
    ],
)
def test_every_command_has_help_with_examples(broker: Callable[..., Result], arguments: tuple[str, ...]) -> None:
    result = broker(*arguments, "--help")
    assert result.code == 0
    assert "examples:\n  birthmark-broker" in result.out


def test_usage_errors_are_2(broker: Callable[..., Result]) -> None:
    assert broker().code == 2
    assert broker("policy").code == 2
    assert broker("nonsense").code == 2
