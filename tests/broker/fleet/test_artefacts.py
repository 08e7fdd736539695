"""CRLs and policies on the fleet's topics: who may have signed them, what is said of them, what lasts."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.fleet import (
    DEVICES,
    OTHERS,
    POLICY,
    running_member,
    signed_policy,
    text_sha256,
    told_by,
    write_gateway,
)
from support.mqtt_client import ConnectionEndedError, RawClient
from support.patience import PATIENCE_S
from support.pki import Authority, Pki, now

from birthmark.broker.config import read_settings
from birthmark.broker.fleet.intake import MAX_STRANGERS
from birthmark.broker.fleet.policy import FILE_NAME
from birthmark.broker.gateway import Gateway
from birthmark.broker.log_budget import MAX_LINES
from birthmark.device.errors import ConfigurationError
from birthmark.device.fleet_policy import PolicyReceipt, SignedPolicy
from birthmark.device.messages import GatewayStatus, Receipt

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.fleet import Member

NARROW = f'[roles.device]\npublish = ["devices/{{id}}/telemetry/#"]\nsubscribe = []\n{OTHERS}'
NARROWER = f"[roles.device]\npublish = []\nsubscribe = []\n{OTHERS}"


@pytest.fixture
def config(tmp_path: Path, pki: Pki) -> Path:
    return write_gateway(tmp_path, pki)


@pytest.fixture
def member(config: Path, pki: Pki) -> Iterator[Member]:
    with running_member(config, pki) as found:
        found.client("gw-below", "service-gateway")  # what is in force is retained for those below
        yield found


def alice_of(member: Member) -> RawClient:
    """An operator who hears every receipt from now on."""
    alice = member.client("alice", "operator")
    return alice.subscribed(("gateway/gw-1/policy-receipts", 0), ("gateway/gw-1/receipts", 0))


def receipt_of(alice: RawClient, topic: str, payload: bytes) -> PolicyReceipt:
    """Publish, and return the receipt for just that; others, retained ones too, are passed over."""
    alice.send(mqtt.publish(topic, payload, retain=True))
    sha256 = hashlib.sha256(payload).hexdigest()
    while True:
        told = alice.read_delivery()
        if told.topic.endswith("/policy-receipts") and not told.retain:
            found = PolicyReceipt.from_bytes(told.payload)
            if found.sha256 == sha256:
                return found


def crl_receipt_of(alice: RawClient, topic: str, payload: bytes) -> Receipt:
    alice.send(mqtt.publish(topic, payload, retain=True))
    sha256 = hashlib.sha256(payload).hexdigest()
    while True:
        told = alice.read_delivery()
        if told.topic.endswith("/receipts") and not told.retain:
            found = Receipt.from_bytes(told.payload)
            if found.crl_sha256 == sha256:
                return found


def status_of(member: Member) -> GatewayStatus:
    return member.call(told_by, member)


def retained_on(member: Member, topic: str) -> bytes | None:
    found = member.call(member.broker.own_retained, topic)
    return found[0] if found else None


# --- policies ------------------------------------------------------------------------------------------------


def test_a_signed_policy_takes_hold_at_once_and_is_answered_told_and_handed_on(member: Member) -> None:
    device = member.client("sensor-1").subscribed(("devices/sensor-1/commands/#", 1))
    alice = alice_of(member)
    payload = signed_policy(member.pki.issuing, 7, NARROW)
    receipt = receipt_of(alice, "fleet/policy", payload)
    assert (receipt.gateway, receipt.outcome, receipt.version, receipt.reason) == ("gw-1", "installed", 7, "")
    assert receipt.subscriptions_ended == 1
    alice.send(mqtt.publish("devices/sensor-1/commands/x", b"1"))
    device.ping()  # nothing is delivered: the policy in force grants no commands
    member.wait_for(lambda: member.gateway.policy.sha256 == text_sha256(NARROW), "the policy")
    status = status_of(member)
    assert (status.policy_version, status.policy_sha256, status.alarms) == (7, text_sha256(NARROW), ())
    assert retained_on(member, "fleet/policy") == payload


def test_the_same_again_is_current_and_nothing_changes(member: Member) -> None:
    alice = alice_of(member)
    payload = signed_policy(member.pki.issuing, 7, NARROW)
    assert receipt_of(alice, "fleet/policy", payload).outcome == "installed"
    again = receipt_of(alice, "fleet/policy", payload)
    assert (again.outcome, again.version, again.reason) == ("current", 7, "")
    signed_anew = signed_policy(member.pki.issuing, 7, NARROW)
    assert receipt_of(alice, "fleet/policy", signed_anew).outcome == "current"
    assert status_of(member).alarms == ()


@pytest.mark.parametrize("hours", [-1, 1, 24 * 365 * 20])
def test_the_issue_time_orders_nothing(member: Member, hours: int) -> None:
    alice = alice_of(member)
    at = int((now() + dt.timedelta(hours=hours)).timestamp())
    receipt = receipt_of(alice, "fleet/policy", signed_policy(member.pki.issuing, 7, NARROW, issued_at=at))
    assert receipt.outcome == "installed"
    earlier = signed_policy(member.pki.issuing, 8, NARROWER, issued_at=at - 7_200)
    assert receipt_of(alice, "fleet/policy", earlier).version == 8


def _foreign(pki: Pki) -> bytes:
    del pki
    return signed_policy(Authority.create("Other CA"), 8, NARROWER)


def _forged(pki: Pki) -> bytes:
    return signed_policy(Authority.create("Other CA"), 8, NARROWER, issuer=pki.issuing.issuer_id)


def _changed(pki: Pki) -> bytes:
    return signed_policy(pki.issuing, 8, NARROWER).replace(b'"version":8', b'"version":9')


def _by_the_root(pki: Pki) -> bytes:
    return signed_policy(pki.root, 8, NARROWER)


def _unusable(pki: Pki) -> bytes:
    return signed_policy(pki.issuing, 8, NARROWER.replace("subscribe", "subscrib", 1))


@pytest.mark.parametrize(
    ("made", "fault", "cause"),
    [
        (lambda pki: signed_policy(pki.issuing, 6, POLICY), "older", "version 6 is lower than 7"),
        (lambda pki: signed_policy(pki.issuing, 7, NARROWER), "conflict", "another policy with the version 7"),
        (_foreign, "issuer", "no trusted issuing CA"),
        (_by_the_root, "issuer", "no trusted issuing CA"),
        (_forged, "signature", "not signed by"),
        (_changed, "signature", "not signed by"),
        (lambda pki: signed_policy(pki.issuing, 8, NARROWER)[:-9], "malformed", "not JSON"),
        (_unusable, "policy", "the fleet's policy, version 8, line 3"),
    ],
    ids=["older", "conflict", "foreign", "root", "forged", "changed", "broken", "unusable"],
)
def test_anything_else_is_refused_answered_and_alarmed(
    member: Member, made: object, fault: str, cause: str
) -> None:
    assert callable(made)
    alice = alice_of(member)
    good = signed_policy(member.pki.issuing, 7, NARROW)
    assert receipt_of(alice, "fleet/policy", good).outcome == "installed"
    receipt = receipt_of(alice, "fleet/policy", made(member.pki))
    assert (receipt.outcome, receipt.version) == ("refused", 7)
    assert receipt.reason.startswith(f"{fault}: ")
    assert cause in receipt.reason
    assert member.gateway.policy.sha256 == text_sha256(NARROW)
    assert retained_on(member, "fleet/policy") == good, "what was refused is handed on"
    member.wait_for(lambda: told_by(member).alarms == ("fleet-policy-refused",), "the alarm")
    assert receipt_of(alice, "fleet/policy", good).outcome == "current"
    member.wait_for(lambda: told_by(member).alarms == (), "the end of the alarm")


def test_a_device_may_publish_neither(member: Member) -> None:
    device = member.client("sensor-1")
    payload = signed_policy(member.pki.issuing, 7, NARROW)
    device.send(mqtt.publish("fleet/policy", payload, qos=1, retain=True, pid=1))
    assert device.read() == mqtt.Packet(0x40, b"\0\1")
    assert member.broker.counters.publishes_denied == 1
    assert status_of(member).policy_version == 0


def test_an_empty_message_takes_nothing_away(member: Member) -> None:
    alice = alice_of(member)
    payload = signed_policy(member.pki.issuing, 7, NARROW)
    receipt_of(alice, "fleet/policy", payload)
    alice.send(mqtt.publish("fleet/policy", b"", retain=True))
    later = signed_policy(member.pki.issuing, 8, NARROWER)
    assert receipt_of(alice, "fleet/policy", later).version == 8
    assert retained_on(member, "fleet/policy") == later


def test_a_version_lasts_over_a_restart_and_an_older_one_stays_out(config: Path, pki: Pki) -> None:
    newer, older = signed_policy(pki.issuing, 7, NARROW), signed_policy(pki.issuing, 6, POLICY)
    with running_member(config, pki) as member:
        assert receipt_of(alice_of(member), "fleet/policy", newer).outcome == "installed"
    (config.parent / "policy.toml").write_text("broken")  # it has no say, and is no reason not to start
    with running_member(config, pki) as member:
        assert status_of(member).policy_version == 7
        assert member.gateway.policy.sha256 == text_sha256(NARROW)
        member.client("gw-below", "service-gateway").subscribed(("fleet/policy", 1))
        assert retained_on(member, "fleet/policy") == newer
        assert receipt_of(alice_of(member), "fleet/policy", older).reason.startswith("older")


def test_it_is_on_disk_before_it_is_in_force(config: Path, pki: Pki) -> None:
    (config.parent / "data").mkdir(mode=0o700)
    (config.parent / "data" / FILE_NAME).mkdir()  # nothing can be renamed over it, by root neither
    settings = read_settings(config)
    with pytest.raises(Exception, match="could not read the fleet's policy"):
        Gateway.open(settings)
    (config.parent / "data" / FILE_NAME).rmdir()
    with running_member(config, pki) as member:
        (config.parent / "data" / FILE_NAME).mkdir()
        alice = alice_of(member)
        payload = signed_policy(pki.issuing, 7, NARROW)
        receipt = receipt_of(alice, "fleet/policy", payload)
        assert (receipt.outcome, receipt.version) == ("refused", 0)
        assert receipt.reason.startswith("storage: ")
        assert member.gateway.policy.sha256 == text_sha256(POLICY)
        (config.parent / "data" / FILE_NAME).rmdir()
        member.call(member.gateway._member.try_again)  # as the gateway's own round does
        member.wait_for(lambda: told_by(member).policy_version == 7, "the policy, once there is room")


@pytest.mark.parametrize("spoilt", ["bytes", "signature"])
def test_a_spoilt_copy_is_no_policy_and_no_start(config: Path, pki: Pki, spoilt: str) -> None:
    payload = signed_policy(pki.issuing, 7, NARROW)
    with running_member(config, pki) as member:
        receipt_of(alice_of(member), "fleet/policy", payload)
    copy = config.parent / "data" / FILE_NAME
    assert copy.read_bytes() == payload
    wider = signed_policy(Authority.create(), 7, POLICY, issuer=pki.issuing.issuer_id)
    copy.write_bytes(payload[:-40] if spoilt == "bytes" else wider)
    with pytest.raises(ConfigurationError, match="could not use the fleet's policy kept in") as caught:
        Gateway.open(read_settings(config))
    assert str(copy) in caught.value.hint


def test_a_change_of_policy_toml_has_no_say_and_is_an_alarm(member: Member, config: Path) -> None:
    alice = alice_of(member)
    receipt_of(alice, "fleet/policy", signed_policy(member.pki.issuing, 7, NARROW))
    wide = config.parent / "policy.toml"
    before = wide.read_text()
    wide.write_text(POLICY.replace(DEVICES, 'publish = ["#"]\nsubscribe = ["#"]\n'))
    member.wait_for(lambda: told_by(member).alarms == ("policy-local",), "the alarm")
    assert member.gateway.policy.sha256 == text_sha256(NARROW)
    wide.write_text(before)
    member.wait_for(lambda: told_by(member).alarms == (), "its end")


def test_without_a_policy_of_the_fleet_policy_toml_has_the_say(member: Member, config: Path) -> None:
    (config.parent / "policy.toml").write_text(NARROW)
    member.wait_for(lambda: told_by(member).policy_sha256 == text_sha256(NARROW), "the new policy")
    assert (status_of(member).policy_version, status_of(member).alarms) == (0, ())


def test_a_policy_of_a_ca_that_is_trusted_later_waits_for_it(member: Member, config: Path) -> None:
    successor = Authority.create("Next Issuing CA", parent=member.pki.root)
    alice = alice_of(member)
    payload = signed_policy(successor, 7, NARROW)
    assert receipt_of(alice, "fleet/policy", payload).reason.startswith("issuer: ")
    crl = successor.crl([], number=1)
    assert crl_receipt_of(alice, f"fleet/crl/{successor.issuer_id}", crl).reason.startswith("issuer: ")
    member.wait_for(lambda: told_by(member).alarms == ("fleet-crl-refused", "fleet-policy-refused"), "the alarms")
    both = config.parent / "clients-ca.new"
    both.write_bytes(member.pki.issuing.pem + successor.pem)
    both.replace(config.parent / "clients-ca.pem")
    member.wait_for(lambda: told_by(member).policy_version == 7, "the policy, once its CA is trusted")
    member.wait_for(lambda: successor.issuer_id in told_by(member).crl_numbers, "the CRL, likewise")
    member.wait_for(lambda: told_by(member).alarms == (), "the end of the alarms")


def test_a_policy_of_a_ca_that_is_trusted_no_more_stays_under_an_alarm(config: Path, pki: Pki) -> None:
    successor = Authority.create("Next Issuing CA", parent=pki.root)
    with running_member(config, pki) as member:
        receipt_of(alice_of(member), "fleet/policy", signed_policy(pki.issuing, 7, NARROW))
    (config.parent / "clients-ca.pem").write_bytes(successor.pem)
    (config.parent / "crl.pem").write_bytes(successor.crl([], number=1))
    with running_member(config, replace(pki, issuing=successor)) as member:
        status = status_of(member)
        assert (status.policy_version, status.policy_sha256) == (7, text_sha256(NARROW))
        member.wait_for(lambda: told_by(member).alarms == ("policy-signer",), "the alarm")
        receipt = receipt_of(alice_of(member), "fleet/policy", signed_policy(successor, 8, NARROW))
        assert receipt.outcome == "installed"
        member.wait_for(lambda: told_by(member).alarms == (), "its end")


# --- CRLs ----------------------------------------------------------------------------------------------------


def topic_of(ca: Authority) -> str:
    return f"fleet/crl/{ca.issuer_id}"


def test_a_crl_takes_hold_with_all_effects_and_is_handed_on(member: Member) -> None:
    lost = member.pki.device("lost")
    client = member.open(member.context_of(lost)).handshake(
        mqtt.connect("lost", will=("devices/lost/status", b"offline", 1, True))
    )
    alice = alice_of(member)
    crl = member.pki.issuing.crl([lost.cert_serial], number=2)
    receipt = crl_receipt_of(alice, topic_of(member.pki.issuing), crl)
    assert (receipt.outcome, receipt.crl_number, receipt.revoked_count) == ("installed", 2, 1)
    assert [(one.id, one.sessions_closed, one.will_suppressed) for one in receipt.closed] == [("lost", 1, True)]
    with pytest.raises(ConnectionEndedError):
        client.read()
    member.wait_for(lambda: told_by(member).crl_numbers == {member.pki.issuing.issuer_id: 2}, "the status")
    assert retained_on(member, topic_of(member.pki.issuing)) == crl


def test_the_crl_of_the_start_is_handed_on_too(member: Member, config: Path) -> None:
    found = retained_on(member, topic_of(member.pki.issuing))
    assert found == retained_on(member, f"gateway/gw-1/crl-in-force/{member.pki.issuing.issuer_id}")
    crl = member.pki.issuing.crl([], number=5)
    (config.parent / "crl.pem").write_bytes(crl)
    topic = topic_of(member.pki.issuing)
    member.wait_for(lambda: member.broker.own_retained(topic) == [crl], "the newer one")


def test_nothing_is_retained_for_nobody(config: Path, pki: Pki) -> None:
    with running_member(config, pki) as member:
        crl = pki.issuing.crl([], number=2)
        assert crl_receipt_of(alice_of(member), topic_of(pki.issuing), crl).outcome == "installed"
        assert retained_on(member, topic_of(pki.issuing)) is None
        below = member.client("gw-below", "service-gateway").subscribed((topic_of(pki.issuing), 1))
        assert below.read_delivery().payload == crl


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        (lambda pki: pki.issuing.crl([], number=4), "older"),
        (lambda pki: pki.issuing.crl([7], number=5), "conflict"),
        (lambda _pki: Authority.create("Other CA").crl([], number=9), "issuer"),
        (lambda pki: pki.issuing.crl([], number=9)[:-2], "malformed"),
        (lambda _pki: bytes(range(64)), "unreadable"),
    ],
    ids=["older", "conflict", "foreign", "broken", "noise"],
)
def test_any_other_crl_is_refused_answered_and_alarmed(member: Member, made: object, fault: str) -> None:
    assert callable(made)
    alice = alice_of(member)
    topic, good = topic_of(member.pki.issuing), member.pki.issuing.crl([], number=5)
    assert crl_receipt_of(alice, topic, good).outcome == "installed"
    receipt = crl_receipt_of(alice, topic, made(member.pki))
    assert receipt.outcome == "refused"
    assert receipt.reason.startswith(fault)
    assert status_of(member).crl_numbers == {member.pki.issuing.issuer_id: 5}
    assert retained_on(member, topic) == good
    member.wait_for(lambda: told_by(member).alarms == ("fleet-crl-refused",), "the alarm")
    assert crl_receipt_of(alice, topic, good).outcome == "current"
    member.wait_for(lambda: told_by(member).alarms == (), "its end")


def test_a_crl_from_a_clock_an_hour_ahead_waits_until_it_is_time(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, issuing = alice_of(member), member.pki.issuing
    ahead = issuing.crl([], number=2, this_update=now() + dt.timedelta(hours=1))
    receipt = crl_receipt_of(alice, topic_of(issuing), ahead)
    assert receipt.reason.startswith("not-yet-valid: ")
    assert "CLOCK" in receipt.reason
    member.wait_for(lambda: told_by(member).alarms == ("fleet-crl-refused",), "the alarm")
    member.call(member.gateway._member.try_again)
    asyncio.run_coroutine_threadsafe(member.gateway._member.settled(), member.loop).result(PATIENCE_S)
    assert status_of(member).crl_numbers == {issuing.issuer_id: 1}
    in_an_hour = now() + dt.timedelta(hours=1, minutes=1)
    monkeypatch.setattr("birthmark.broker.gateway.now", lambda: in_an_hour)
    member.call(member.gateway._member.try_again)
    member.wait_for(lambda: told_by(member).crl_numbers == {issuing.issuer_id: 2}, "the CRL, an hour later")
    member.wait_for(lambda: told_by(member).alarms == (), "the end of the alarm")


def test_topics_that_are_no_fleets_are_ignored_and_many_keep_nothing_out(member: Member) -> None:
    alice = alice_of(member)
    for topic in ("fleet/crl/UPPER", "fleet/crl/", f"fleet/crl/{'0' * 65}"):
        alice.send(mqtt.publish(topic, b"x"))
    for number in range(100):
        alice.send(mqtt.publish(f"fleet/crl/{number:040x}", b"not a CRL"))
    crl = member.pki.issuing.crl([], number=2)
    assert crl_receipt_of(alice, topic_of(member.pki.issuing), crl).outcome == "installed"
    asyncio.run_coroutine_threadsafe(member.gateway._member.settled(), member.loop).result(PATIENCE_S)
    assert 0 < len(member.gateway._member.alarms()) <= MAX_STRANGERS + 1, "those, and the one that is judged"


def test_a_flood_is_answered_seldom_and_hides_nothing_that_was_installed(
    member: Member, caplog: pytest.LogCaptureFixture
) -> None:
    issuing, intake = member.pki.issuing, member.gateway._member._intake
    over = asyncio.Event()
    member.call(setattr, intake, "_rest", over.wait)
    member.call(setattr, member.gateway._log_budget, "_clock", lambda: 0.0)  # it is one and the same minute
    alice = alice_of(member)
    assert receipt_of(alice, "fleet/policy", b"bad").outcome == "refused"
    for number in range(200):
        alice.send(mqtt.publish("fleet/policy", b"bad %d" % number, retain=True))
        alice.send(mqtt.publish(topic_of(issuing), b"bad %d" % number, retain=True))
    policy, crl = signed_policy(issuing, 7, NARROW), issuing.crl([], number=2)
    alice.send(mqtt.publish("fleet/policy", policy, retain=True))
    alice.send(mqtt.publish(topic_of(issuing), crl, retain=True))
    alice.ping()  # none of them was judged: there is no receipt
    member.loop.call_soon_threadsafe(over.set)
    told = [alice.read_delivery(), alice.read_delivery()]
    assert PolicyReceipt.from_bytes(told[0].payload).version == 7
    assert Receipt.from_bytes(told[1].payload).crl_number == 2
    # From here on nothing rests: each is answered, and only so many are logged.
    with caplog.at_level(logging.INFO):
        for number in range(MAX_LINES + 20):
            receipt_of(alice, "fleet/policy", b"bad %d" % number)
            crl_receipt_of(alice, topic_of(issuing), b"bad %d" % number)
        assert receipt_of(alice, "fleet/policy", signed_policy(issuing, 8, NARROWER)).outcome == "installed"
        assert crl_receipt_of(alice, topic_of(issuing), issuing.crl([], number=3)).outcome == "installed"
    lines = caplog.messages
    assert len([line for line in lines if line.startswith("refused a policy from alice")]) == MAX_LINES
    assert len([line for line in lines if line.startswith("refused a CRL from alice")]) == MAX_LINES
    assert any(line.startswith("the fleet's policy, version 8, from alice: installed") for line in lines)
    assert any(line.startswith("CRL 3 from alice: installed") for line in lines)


def test_the_golden_file_of_a_policy_is_what_is_kept(config: Path, pki: Pki) -> None:
    payload = signed_policy(pki.issuing, 7, NARROW)
    with running_member(config, pki) as member:
        receipt_of(alice_of(member), "fleet/policy", payload)
    assert SignedPolicy.from_bytes((config.parent / "data" / FILE_NAME).read_bytes()).version == 7
    assert (config.parent / "data" / FILE_NAME).stat().st_mode & 0o777 == 0o600
