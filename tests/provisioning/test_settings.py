"""`station.toml`: read strictly, edited without losing what a person wrote."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from birthmark.device.credentials import BrokerAddress
from birthmark.device.errors import ConfigurationError
from birthmark.provisioning.gateway_settings import Gateway, Upstream
from birthmark.provisioning.settings import (
    BrokerDefaults,
    Lifetimes,
    RegistrySetting,
    RenewalSettings,
    Settings,
    read_settings,
)
from birthmark.provisioning.settings_edit import (
    add_gateway,
    add_upstream,
    put_registry,
    remove_gateway,
    remove_upstream,
)

BY_PATH = Gateway("gateway-1", crl_path=Path("/etc/broker/crl.pem"))
SERVERS = (BrokerAddress("mq1.example", 8884), BrokerAddress("mq2.example"))
UPSTREAM = Upstream("cloud", SERVERS, Path("/srv/a.pem"), Path("/srv/ca.pem"))
VIA = Gateway("gateway-3", via="Cloud")
BY_MQTT = Gateway("gateway-2.example", host="192.0.2.7", port=8884, operator_path=Path("/srv/alice.pem"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "station.toml"
    path.write_text(Settings('Acme "Sensors" \\ Söhne').to_toml())
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    settings = Settings(
        "Acme",
        default_role="camera",
        lifetimes=Lifetimes(10, 20, 30),
        broker=BrokerDefaults("gateway-1.example", 1883, 10),
        renewal=RenewalSettings(grace_days=7, retire_after_hours=1, max_per_day=3),
        upstreams=(UPSTREAM, Upstream("b", (BrokerAddress("::1"),), Path("/srv/b.pem"))),
        gateways=(BY_PATH, BY_MQTT, VIA),
    )
    path = tmp_path / "station.toml"
    path.write_text(settings.to_toml())
    assert read_settings(path) == settings


@given(st.text(min_size=1, max_size=64).filter(lambda text: text.strip() and text.isprintable()))
def test_any_printable_organization_survives(tmp_path_factory: pytest.TempPathFactory, organization: str) -> None:
    path = tmp_path_factory.getbasetemp() / "organization.toml"
    path.write_text(Settings(organization).to_toml(), encoding="utf-8")
    assert read_settings(path).organization == organization


def test_gateways_come_and_go_and_comments_stay(path: Path) -> None:
    path.write_text(path.read_text() + "\n# a person's remark\n")
    before = path.read_text()
    add_gateway(path, BY_PATH)
    with path.open("a") as file:
        file.write("# beside the second\n")
    add_gateway(path, BY_MQTT)
    assert read_settings(path).gateways == (BY_PATH, BY_MQTT)
    assert path.read_text().startswith(before)
    remove_gateway(path, "GATEWAY-1")
    assert read_settings(path).gateways == (BY_MQTT,)
    assert "a person's remark" in path.read_text()
    remove_gateway(path, BY_MQTT.name)
    assert read_settings(path).gateways == ()
    assert path.read_text() == f"{before}\n# beside the second\n"
    assert path.stat().st_mode & 0o777 == 0o600


def test_upstreams_come_and_go_and_not_while_gateways_are_behind_them(path: Path) -> None:
    add_gateway(path, BY_PATH)
    before = path.read_text()
    with pytest.raises(ConfigurationError, match=r"gateway-3: there is no upstream") as caught:
        add_gateway(path, VIA)
    assert "upstream add" in caught.value.hint
    add_upstream(path, UPSTREAM)
    add_upstream(path, Upstream("other", SERVERS[:1], Path("/srv/a.pem")))
    with pytest.raises(ConfigurationError, match="one of that name"):
        add_upstream(path, UPSTREAM)
    add_gateway(path, VIA)
    settings = read_settings(path)
    assert settings.gateways == (BY_PATH, VIA)
    assert settings.upstream("CLOUD") == UPSTREAM
    with pytest.raises(ConfigurationError, match="gateway-3 can be reached only by it"):
        remove_upstream(path, "cloud")
    remove_gateway(path, VIA.name)
    remove_upstream(path, "Cloud")
    with pytest.raises(ConfigurationError, match="none of that name"):
        remove_upstream(path, "cloud")
    remove_upstream(path, "other")
    assert path.read_text() == before


def test_a_gateway_in_the_middle_of_the_file_can_be_removed(path: Path) -> None:
    path.write_text(BY_PATH.to_toml() + "\n[station]\norganization = 'Acme'\n\n" + BY_MQTT.to_toml())
    remove_gateway(path, BY_PATH.name)
    assert read_settings(path).gateways == (BY_MQTT,)
    assert read_settings(path).organization == "Acme"


def test_the_comments_before_the_next_table_stay(path: Path) -> None:
    remark = "# The one in the attic;\n\n# the porter has the key.\n"
    for edit in (partial(remove_gateway, name=BY_PATH.name), partial(put_registry, registry=RegistrySetting())):
        path.write_text(Settings("Acme", registry=RegistrySetting("sqlite:///registry.db")).to_toml())
        path.write_text(f"{path.read_text()}\n{remark}{BY_PATH.to_toml()}\n{remark}{BY_MQTT.to_toml()}")
        edit(path)
        assert f"\n\n{remark}{BY_MQTT.to_toml()}" in path.read_text()
        assert path.read_text().count(remark) == 2


@pytest.mark.parametrize(
    "written", ["gateway = [{name = 'g', crl_path = '/x'}]", "[['gateway']]\nname='g'\ncrl_path='/x'"]
)
def test_a_gateway_written_otherwise_is_left_to_a_person(path: Path, written: str) -> None:
    station = "[station]\norganization = 'Acme'\n"
    path.write_text(f"{written}\n{station}" if written.startswith("gateway") else f"{station}{written}\n")
    before = path.read_text()
    with pytest.raises(ConfigurationError, match=r"\[\[gateway\]\]") as caught:
        remove_gateway(path, "g")
    assert "by hand" in caught.value.hint
    assert path.read_text() == before


def test_a_path_of_other_octets_than_text_is_refused(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not printable"):
        add_gateway(path, Gateway("g", crl_path=Path(os.fsdecode(b"/srv/\xff"))))


def test_commands_at_once_lose_no_gateway(path: Path) -> None:
    names = [f"gateway-{number}" for number in range(6)]
    with ThreadPoolExecutor(max_workers=len(names)) as pool:
        for _ in pool.map(lambda name: add_gateway(path, Gateway(name, crl_path=Path("/x"))), names):
            pass
    assert sorted(gateway.name for gateway in read_settings(path).gateways) == names


def test_names_of_gateways_are_unique(path: Path) -> None:
    add_gateway(path, BY_PATH)
    before = path.read_text()
    with pytest.raises(ConfigurationError, match="one of that name"):
        add_gateway(path, Gateway("Gateway-1", crl_path=Path("/x")))
    with pytest.raises(ConfigurationError, match="none of that name"):
        remove_gateway(path, "gateway-9")
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("\nx = = 1", "line 2"),
        ("", "'organization' in \\[station\\] is missing"),
        ("[station]\norganization = 7", "no text"),
        ("[station]\norganization = ' '", "organization"),
        ('[station]\norganization = "A\\u001b"', "organization"),
        (f"[station]\norganization = '{'x' * 65}'", "64"),
        ("[station]\norganization = 'A'\ncolour = 'blue'", "'colour' in \\[station\\] is unknown"),
        ("[station]\norganization = 'A'\n[other]\nx = 1", "'other' is unknown"),
        ("[station]\norganization = 'A'\ndefault_role = 'operator'", "reserved"),
        ("[station]\norganization = 'A'\ndefault_role = 'a b'", "role"),
        ("[station]\norganization = 'A'\n[lifetimes_days]\ndevice = true", "whole number"),
        ("[station]\norganization = 'A'\n[broker]\nport = 65536", "65536"),
        ("[station]\norganization = 'A'\n[broker]\nkeepalive_s = 0", "keepalive"),
        ("[station]\norganization = 'A'\n[broker]\nhost = 'a/b'", "broker name"),
        ("station = 3", "no table"),
        ("gateway = 3\n[station]\norganization = 'A'", "gateway"),
        ("[station]\norganization = 'A'\n[[gateway]]\nname = 'g'", "either a path or a broker"),
        ("[station]\norganization = 'A'\n[[gateway]]\nname = 'g'\nhost = 'h'", "either a path or a broker"),
        ("[station]\norganization = 'A'\n[[gateway]]\nname = '#'\ncrl_path = '/x'", "broker name"),
        ("[station]\norganization = 'A'\n[[gateway]]\ncrl_path = '/x'", "'name' in \\[gateway\\] is missing"),
        ("[station]\norganization = 'A'\n[[gateway]]\nname = 'g'\ncrl_path = '/x'\nx = 1", "'x' in \\[gateway\\]"),
        ("[station]\norganization = 'A'\n[[gateway]]\nname='g'\nhost='h'\noperator='o'\nport=0", "port"),
        ('[station]\norganization = "A"\n[[gateway]]\nname="g"\ncrl_path="/x\\u0000"', "not printable"),
        ("[station]\norganization='A'\n[[gateway]]\nname='g'\nvia='cloud'", "no upstream 'cloud'"),
        (
            "[station]\norganization='A'\n[[gateway]]\nname='g'\nvia='c'\ncrl_path='/x'",
            "either a path or a broker",
        ),
        ("[station]\norganization='A'\n[[gateway]]\nname='g'\nvia='c'\nclients_ca_path='/x'", "over MQTT"),
        (
            "[station]\norganization='A'\n[[upstream]]\nname='a b'\nservers=['h']\noperator='o'",
            "name of an upstream",
        ),
        ("[station]\norganization='A'\n[[upstream]]\nname='c'\nservers=['h']", "'operator' in .* missing"),
        ("[station]\norganization='A'\n[[upstream]]\nname='c'\noperator='o'", "'servers' in .* missing"),
        ("[station]\norganization='A'\n[[upstream]]\nname='c'\nservers='h'\noperator='o'", "no list of texts"),
        ("[station]\norganization='A'\n[[upstream]]\nname='c'\nservers=[]\noperator='o'", "1 to 16 servers"),
        (
            "[station]\norganization='A'\n[[upstream]]\nname='c'\nservers=['h', 'h:8883']\noperator='o'",
            "each once",
        ),
        (
            "[station]\norganization='A'\n[[upstream]]\nname='c'\nservers=['h:0']\noperator='o'",
            "could not use 0 as a broker's port",
        ),
        (
            "[station]\norganization='A'\n[[upstream]]\nname='c'\nservers=['h']\noperator='o'\nkey='k'",
            "'key' in",
        ),
        (
            "[station]\norganization='A'\n[[gateway]]\nname='g'\ncrl_path='/x'\n[[gateway]]\nname='G'\ncrl_path='/y'",
            "two of that name",
        ),
        ("x = " + "1" * 5000, "5000 digits"),
        ("x = " + "[" * 5000 + "]" * 5000, "recursion"),
        (
            "[station]\norganization='A'\n" + "[[upstream]]\nname='c'\nservers=['h']\noperator='o'\n" * 2,
            "two of that name",
        ),
        ('[station]\norganization = "A"\n[[upstream]]\nname="c"\nservers=["h"]\noperator="/\\n"', "not printable"),
        ('[station]\norganization = "A"\n[[gateway]]\nname="g"\ncrl_path="/\\u001b[2J"', "not printable"),
        ('[station]\norganization = "A"\n[[gateway]]\nname="g"\nhost="h"\noperator="/\\n"', "not printable"),
        ('[station]\norganization = "A"\n[[gateway]]\nname="g"\nhost="\\u001bh"\noperator="o"', "host"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_place(path: Path, text: str, cause: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=cause) as caught:
        read_settings(path)
    assert str(path) in caught.value.message
    assert caught.value.message.isprintable()
    assert caught.value.hint


@pytest.mark.parametrize("key", ["device", "service", "broker"])
def test_a_lifetime_is_judged_where_a_certificate_is_issued(path: Path, key: str) -> None:
    text = path.read_text()
    for days in (-1, 1, 3651, 10**30):
        path.write_text(re.sub(f"^{key} = .*$", f"{key} = {days}", text, flags=re.MULTILINE))
        lifetimes = read_settings(path).lifetimes
        assert lifetimes.out_of_range() == {key: days}
        with pytest.raises(ConfigurationError, match=rf"{key} = {days} of \[lifetimes_days\]"):
            lifetimes.of(key)
    for days in (2, 3650):
        path.write_text(re.sub(f"^{key} = .*$", f"{key} = {days}", text, flags=re.MULTILINE))
        assert read_settings(path).lifetimes.of(key) == timedelta(days=days)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not there"):
        read_settings(tmp_path / "none.toml")
    with pytest.raises(ConfigurationError, match="directory"):
        read_settings(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        read_settings(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("grace_days = 61", "out of range"),
        ("grace_days = -1", "out of range"),
        ("retire_after_hours = 8761", "out of range"),
        ("max_per_day = 0", "out of range"),
        ("grace = 3", "unknown"),
    ],
)
def test_what_renewal_cannot_be_is_refused(path: Path, line: str, complaint: str) -> None:
    key = line.partition(" ")[0]
    kept = [old for old in path.read_text().splitlines() if not old.startswith(f"{key} =")]
    kept.insert(kept.index("[renewal]") + 1, line)
    path.write_text("\n".join(kept))
    with pytest.raises(ConfigurationError, match=complaint):
        read_settings(path)


@pytest.mark.parametrize(("days", "fits"), [(60, False), (61, True), (3650, True), (3651, False)])
def test_what_is_revoked_stays_on_the_crl_for_longer_than_any_gateway_renews_it(
    path: Path, days: int, *, fits: bool
) -> None:
    path.write_text(path.read_text().replace("keep_expired_days = 90", f"keep_expired_days = {days}"))
    if fits:
        assert read_settings(path).keep_expired_days == days
    else:
        with pytest.raises(ConfigurationError, match="keep_expired_days: it is not in 61 to 3650"):
            read_settings(path)
