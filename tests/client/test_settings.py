"""`device.toml`: what it says, and what it may not say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.broker_stub import PUBLISH, BrokerStub
from support.device_command import DeviceCommand, run
from support.device_folder import enrolled
from support.pki import Pki

from birthmark.device.credentials import BrokerAddress
from birthmark.device.errors import ConfigurationError
from birthmark.device.outbox.settings import OutboxSettings
from birthmark.device.settings import DeviceSettings

if TYPE_CHECKING:
    from pathlib import Path

EVERYTHING = """
clock = "trust-broker"
[broker]
further_addresses = ["gw-2.example.com", "[2001:db8::1]:8884"]
return_after_s = 60
keepalive_s = [15, 300]
max_packet_bytes = 2048
[outbox]
path = "data/o.db"
max_messages = 200
max_bytes = 100000
when_full = "drop-lowest-priority"
durability = "batch:200ms"
drain_per_s = 2.5
message_id = "mid"
when_failing = "memory"
[outbox.priorities]
"alarm/#" = 10
"chat/+" = -1
"""


def test_every_key(tmp_path: Path) -> None:
    (tmp_path / "device.toml").write_text(EVERYTHING)
    assert DeviceSettings.from_folder(tmp_path) == DeviceSettings(
        further_addresses=(BrokerAddress("gw-2.example.com"), BrokerAddress("2001:db8::1", 8884)),
        return_after_s=60,
        keepalive_s=(15, 300),
        max_packet_bytes=2048,
        trusts_gateway_clock=True,
        outbox=OutboxSettings(
            path=tmp_path / "data/o.db",
            max_messages=200,
            max_bytes=100000,
            when_full="drop-lowest-priority",
            durability="batch:200ms",
            drain_per_s=2.5,
            message_id="mid",
            when_failing="memory",
            priorities=(("alarm/#", 10), ("chat/+", -1)),
        ),
    )
    assert OutboxSettings(durability="batch:200ms").batch_s == 0.2
    assert OutboxSettings().batch_s == 0


def test_none_of_it(tmp_path: Path) -> None:
    assert DeviceSettings.from_folder(tmp_path) == DeviceSettings()
    (tmp_path / "device.toml").write_text("[outbox]\n")
    assert DeviceSettings.from_folder(tmp_path) == DeviceSettings(outbox=OutboxSettings())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("outbox", "Expected"),
        ("[out]", "out is not known"),
        ("clock = 'gps'", "clock is neither"),
        ("[broker]\naddresses = []", r"\[broker\] addresses is not known"),
        ("[broker]\nfurther_addresses = 'a'", "further_addresses is of the wrong type"),
        ("[broker]\nfurther_addresses = ['a:b']", "is no port"),
        ("[broker]\nkeepalive_s = 60", "keepalive_s is of the wrong type"),
        ("[broker]\nkeepalive_s = [60, 30]", "shortest and the longest"),
        ("[broker]\nkeepalive_s = [true, 30]", "shortest and the longest"),
        ("[broker]\nreturn_after_s = 0", "return_after_s is not from 1 to 31622400"),
        ("[broker]\nreturn_after_s = nan", "return_after_s is not from 1 to"),
        pytest.param(f"[broker]\nreturn_after_s = {10**400}", "return_after_s is not from 1 to", id="huge return"),
        ("[broker]\nmax_packet_bytes = 1", "max_packet_bytes is below"),
        ("[outbox]\nmax_messages = true", "max_messages is of the wrong type"),
        ("[outbox]\nmax_messages = 99", "max_messages: it is below 100"),
        ("[outbox]\nmax_bytes = 1", "max_bytes: it is below"),
        ("[outbox]\nwhen_full = 'panic'", "when_full: it is none of drop-oldest"),
        ("[outbox]\nwhen_failing = 'panic'", "when_failing: it is none of refuse"),
        ("[outbox]\ndurability = 'batch:0ms'", "as an outbox's durability"),
        ("[outbox]\ndurability = 'batch:60001ms'", "as an outbox's durability"),
        ("[outbox]\ndrain_per_s = -1", "drain_per_s is not from 0 to 1000000"),
        ("[outbox]\ndrain_per_s = nan", "drain_per_s is not from"),
        pytest.param(f"[outbox]\ndrain_per_s = {10**400}", "drain_per_s is not from", id="huge drain"),
        ('[outbox]\npath = "a\\u0000b"', "path: it holds NUL"),
        ("[outbox.priorities]\n'a' = 'high'", r"\[outbox.priorities\] a is of the wrong type"),
        (f"[outbox.priorities]\n'a' = {2**63}", "priorities: one is not from -1000000"),
        pytest.param("a = " + "[" * 2000 + "]" * 2000, "recursion", id="nested"),
        pytest.param("#" * 300_000 + "\n[outbox]", "it is longer than 262144 bytes", id="long"),
    ],
)
def test_what_makes_no_sense_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "device.toml").write_text(text)
    with pytest.raises(ConfigurationError, match=said) as error:
        DeviceSettings.from_folder(tmp_path)
    assert str(tmp_path / "device.toml") in error.value.message


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "device.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="it is not UTF-8"):
        DeviceSettings.from_folder(tmp_path)


def test_the_command_goes_by_it(tmp_path: Path) -> None:
    pki = Pki.create()
    with BrokerStub(pki) as broker:
        state = enrolled(tmp_path / "state", pki, port=broker.port)
        (state / "device.toml").write_text("[outbox]\nmessage_id = 'mid'\n")
        with DeviceCommand("run", "--state", state, "--simulate", "--json") as device:
            reading = broker.wait_for(PUBLISH, lambda packet: "telemetry" in packet.topic)
            assert b'"mid":"' in reading.payload
            assert device.end(15) == 0
        (state / "device.toml").write_text("[outbox]\nmessage-id = 'mid'\n")
        wrong = run("run", "--state", state)
    assert wrong.returncode == 1
    assert "[outbox] message-id is not known" in wrong.stderr
