"""`birthmark policy`: numbered, signed, brought to every gateway; and what may go wrong on the way."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from support.patience import PATIENCE_S
from support.programs import needs
from support.station import CHEAP, PASSPHRASE, Command, new_station
from support.station_broker import station_broker
from support.station_upstream import Fleet, fleet

from birthmark.device.client import Client
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.errors import PolicyError, RegistryError
from birthmark.device.fleet_policy import MAX_POLICY_BYTES, SignedPolicy, policy_transcript
from birthmark.provisioning import audit, fleet_policy
from birthmark.provisioning.backup import back_up
from birthmark.provisioning.delivery import Outcome
from birthmark.provisioning.fleet_policy import (
    POLICY_VERSION,
    current_policy,
    read_policy_text,
    sign_policy,
    trusted_policy,
)
from birthmark.provisioning.gateway_settings import Gateway
from birthmark.provisioning.issuing import issue_operator
from birthmark.provisioning.policy_delivery import deliver_policy
from birthmark.provisioning.restore import restore
from birthmark.provisioning.rollover.phases import activate
from birthmark.provisioning.rollover.starting import RootKey, start_issuing
from birthmark.provisioning.settings_edit import add_gateway
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from birthmark.device.received import Message

AWAY_S = 8.0
"""For those who will not answer: what is published meanwhile is what matters."""
UNTIL_THE_END_S = 4.0
"""Where somebody does not answer, and this is all waited for."""
TEXT = b"""
[roles.device]
publish = ["devices/{id}/telemetry/#"]
[[assignments]]
ou = "device"
role = "device"
"""
OTHER = TEXT.replace(b"telemetry", b"readings")


@pytest.fixture
def cloud(living: Station, tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path / "cloud", living) as made:
        yield made


def last(station: Station) -> SignedPolicy:
    with station.registry.view() as view:
        policy = current_policy(view)
    assert policy is not None
    return policy


def operator(cloud: Fleet) -> Client:
    address = BrokerAddress("localhost", cloud.upstream.port)
    credentials = Credentials.from_files(cloud.folder / "alice.pem", cloud.station.root_path, address)
    return Client(credentials, client_suffix="test")


def held_by(cloud: Fleet) -> bytes:
    found: queue.Queue[bytes] = queue.Queue()
    with operator(cloud) as client:
        client.subscribe("fleet/policy", lambda message: found.put(message.payload), wait=PATIENCE_S)
        return found.get(timeout=PATIENCE_S)


def put(cloud: Fleet, payload: bytes) -> None:
    with operator(cloud) as client:
        client.publish("fleet/policy", payload, retain=True, wait=PATIENCE_S)


def told(station: Station, policy: SignedPolicy, timeout_s: float = PATIENCE_S) -> dict[str, tuple[str, str]]:
    done = deliver_policy(station, policy, timeout_s)
    return {one.gateway: (one.outcome.value, one.cause) for one in done}


def test_versions_rise_and_the_issuing_ca_signs(living: Station) -> None:
    first, is_new = sign_policy(living, TEXT)
    assert (first.version, is_new) == (1, True)
    key = living.issuing.public_key()
    assert isinstance(key, EllipticCurvePublicKey)
    assert first.is_signed_by(key)
    assert sign_policy(living, TEXT) == (first, False)
    second, is_new = sign_policy(living, OTHER)
    assert (second.version, is_new) == (2, True)
    assert last(living) == second
    assert sign_policy(living, TEXT)[0].version == 3
    signed = [entry for entry in audit.read(living.registry.audit_path) if entry["action"] == "policy-sign"]
    assert [entry["details"]["version"] for entry in signed] == [1, 2, 3]
    assert signed[0]["details"]["sha256"] == first.text_sha256


def test_the_same_text_is_signed_anew_once_another_ca_issues(living: Station) -> None:
    first, _ = sign_policy(living, TEXT)
    new = start_issuing(living, lambda: RootKey(PASSPHRASE), derivation=CHEAP)
    assert sign_policy(living, TEXT) == (first, False)
    activate(living, force=True)
    second, is_new = sign_policy(living, TEXT)
    assert (second.version, second.issuer, is_new) == (2, new.key_id, True)


def test_no_version_is_given_twice_however_many_publish_at_once(living: Station) -> None:
    begin = threading.Barrier(6)

    def publish(number: int) -> SignedPolicy:
        opened = Station.open(living.folder, passphrase=PASSPHRASE)
        begin.wait(PATIENCE_S)
        return sign_policy(opened, TEXT + b"# %d\n" % number)[0]

    with ThreadPoolExecutor(6) as pool:
        signed = list(pool.map(publish, range(6)))
    assert sorted(policy.version for policy in signed) == [1, 2, 3, 4, 5, 6]
    assert last(living) == max(signed, key=lambda policy: policy.version)


def test_one_that_cannot_be_signed_takes_no_version(living: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise RegistryError("the token went away")

    with monkeypatch.context() as broken:
        broken.setattr("birthmark.provisioning.authority.Authority.sign_transcript", fail)
        with pytest.raises(RegistryError):
            sign_policy(living, TEXT)
    with living.registry.view() as view:
        assert view.counter(POLICY_VERSION) == 0
        assert current_policy(view) is None


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (b"", "no roles"),
        (b"\xff", "UTF-8"),
        (b"= 1", "no TOML"),
        (b"a = " + b"1" * 5000, "5000 digits"),
        (b"[roles.a]\n", "no assignments"),
        (b"[[assignments]]\nou='a'\n", "no roles"),
        (b"roles = 3\nassignments = 4", "no roles"),
        (b"#" * (MAX_POLICY_BYTES + 1), "more than"),
    ],
)
def test_what_no_gateway_could_use_is_refused_at_the_station(tmp_path: Path, text: bytes, cause: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(text)
    with pytest.raises(PolicyError, match=cause) as caught:
        read_policy_text(path)
    assert "birthmark-broker policy check" in caught.value.hint


def test_a_policy_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="No such file"):
        read_policy_text(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "damage", [{"version": "1"}, {"text": 3}, {"signature": "?"}, {"text": "\ud800"}, {"version": 0}]
)
def test_a_damaged_note_is_said(living: Station, damage: dict[str, Any]) -> None:
    sign_policy(living, TEXT)
    with living.registry.view() as view:
        note = view.notes(fleet_policy.TOPIC)["current"]
    if damage != {"text": "\ud800"}:
        with living.registry.transaction() as transaction:
            transaction.put_note(fleet_policy.TOPIC, "current", note | damage)
        with pytest.raises(RegistryError, match="damaged"):
            last(living)


@needs("mosquitto")
def test_every_gateway_goes_by_it_and_one_that_is_away_takes_it_later(cloud: Fleet) -> None:
    cloud.add("g-1", "g-2", "g-3")
    policy, _ = sign_policy(cloud.station, TEXT)
    with cloud.there(["g-1", "g-2"]), cloud.played("g-3"):
        first = {one.gateway: one.described() for one in deliver_policy(cloud.station, policy, PATIENCE_S)}
        assert first["g-1"] == "g-1: goes by version 1 after 1.5 ms"
    policy, _ = sign_policy(cloud.station, OTHER)
    with cloud.there(["g-1", "g-2"]):
        assert told(cloud.station, policy, 600) == {
            "g-1": ("done", ""),
            "g-2": ("done", ""),
            "g-3": ("PENDING", "its link to cloud is down"),
        }
        with cloud.played("g-3"):
            again = {one.gateway: one for one in deliver_policy(cloud.station, policy, PATIENCE_S)}
        assert {one.described() for one in again.values()} == {
            f"{name}: goes by version 2 already" for name in again
        }
    assert held_by(cloud) == policy.to_bytes()
    entries = audit.read(cloud.station.registry.audit_path)
    delivered = [entry["details"] for entry in entries if entry["action"] == "policy-deliver"]
    assert [one["outcome"] for one in delivered] == ["done"] * 5 + ["PENDING"] + ["done"] * 3


@needs("mosquitto")
def test_a_refusal_and_a_silence_are_told(cloud: Fleet) -> None:
    cloud.add("g-1", "g-2", "g-4", "g-5")
    add_gateway(cloud.station.settings_path, Gateway("g-3", crl_path=cloud.folder / "crl.pem"))
    cloud.reread()
    policy, _ = sign_policy(cloud.station, TEXT)
    with (
        cloud.played("g-1", refuses="line 3: no such role\x1b"),
        cloud.played("g-2", answers=False),
        cloud.played("g-4", answers=False, takes_policies=False),
        cloud.played("g-5", says_it_is="g-9"),
    ):
        done = told(cloud.station, policy, UNTIL_THE_END_S)
    assert done["g-1"] == ("refused", r"line 3: no such role\x1b")
    assert done["g-2"] == ("done", ""), "its status has version and text"
    assert done["g-3"][0] == "PENDING"
    assert "a path takes no policy" in done["g-3"][1]
    assert done["g-4"] == ("PENDING", "no receipt by way of cloud")
    assert done["g-5"] == ("PENDING", "the receipt is of the gateway g-9")


@needs("mosquitto")
def test_a_status_with_the_version_and_another_text_is_no_answer(cloud: Fleet) -> None:
    cloud.add("g-1")
    policy, _ = sign_policy(cloud.station, TEXT)
    other = SignedPolicy(policy.version, 0, policy.issuer, OTHER, policy.signature)
    with cloud.played("g-1", answers=False, takes_policies=False, policy=other):
        assert told(cloud.station, policy, UNTIL_THE_END_S)["g-1"] == ("PENDING", "no receipt by way of cloud")


@needs("mosquitto")
def test_a_version_that_this_station_does_not_know_is_told_and_not_given_again(cloud: Fleet) -> None:
    """The station was brought back by hand from an old copy, and publishes."""
    cloud.add("g-1")
    with cloud.there(["g-1"]):
        lost = Station.open(cloud.station.folder, passphrase=PASSPHRASE)
        policy, _ = sign_policy(lost, TEXT)
        theirs = SignedPolicy(
            5, 0, policy.issuer, OTHER, lost.authority.sign_transcript(policy_transcript(5, 0, OTHER))
        )
        put(cloud, theirs.to_bytes())
        done = told(cloud.station, policy)
        assert done["g-1"][0] == "PENDING"
        assert "cloud holds a version 5 that this station does not know" in done["g-1"][1]
        assert held_by(cloud) == theirs.to_bytes()
        policy, is_new = sign_policy(cloud.station, TEXT)
        assert (policy.version, is_new) == (7, True)
        assert told(cloud.station, policy) == {"g-1": ("done", "")}


@needs("mosquitto")
def test_a_version_that_this_station_does_not_know_stays_however_late_it_is_seen(cloud: Fleet) -> None:
    cloud.add("g-1")
    policy, _ = sign_policy(cloud.station, TEXT)
    signature = cloud.station.authority.sign_transcript(policy_transcript(5, 0, OTHER))
    theirs = SignedPolicy(5, 0, policy.issuer, OTHER, signature).to_bytes()
    seen: queue.Queue[bytes] = queue.Queue()

    def disturb(message: Message) -> None:
        seen.put(message.payload)
        if message.payload == policy.to_bytes():
            disturber.publish("fleet/policy", theirs, retain=True)

    with operator(cloud) as disturber, cloud.played("g-1", answers=False, takes_policies=False):
        disturber.subscribe("fleet/policy", disturb, wait=PATIENCE_S)
        assert "cloud holds a version 5" in told(cloud.station, policy)["g-1"][1]
        assert [seen.get(timeout=PATIENCE_S) for _ in range(3)] == [policy.to_bytes(), theirs, theirs]
    assert held_by(cloud) == theirs


@needs("mosquitto")
def test_a_newer_one_that_another_command_signed_meanwhile_counts(cloud: Fleet) -> None:
    cloud.add("g-1")
    older, _ = sign_policy(cloud.station, TEXT)
    newer, _ = sign_policy(cloud.station, OTHER)
    with cloud.there(["g-1"]) as (gateway,):
        put(cloud, newer.to_bytes())
        (done,) = deliver_policy(cloud.station, older, PATIENCE_S)
        assert (done.outcome, done.version) == (Outcome.DONE, 2)
        assert gateway.policy == newer
    assert held_by(cloud) == newer.to_bytes()


@needs("mosquitto")
@pytest.mark.parametrize("what", ["junk", "foreign"])
def test_what_our_ca_did_not_sign_is_replaced(cloud: Fleet, tmp_path: Path, what: str) -> None:
    cloud.add("g-1")
    policy, _ = sign_policy(cloud.station, TEXT)
    foreign, _ = sign_policy(new_station(tmp_path / "foreign"), OTHER)
    fake = SignedPolicy(9, 0, policy.issuer, OTHER, foreign.signature)
    assert trusted_policy(fake.to_bytes(), cloud.station.cas) is None
    put(cloud, b"junk" if what == "junk" else fake.to_bytes())
    (done,) = deliver_policy(cloud.station, policy, AWAY_S)  # nobody is there: nothing is known of it
    assert done.outcome is Outcome.PENDING
    assert held_by(cloud) == policy.to_bytes()


@needs("mosquitto")
def test_a_restored_station_takes_over_the_highest_version(cloud: Fleet, tmp_path: Path) -> None:
    cloud.add("g-1")
    sign_policy(cloud.station, TEXT)
    back_up(cloud.station, tmp_path / "backup.age", b"x", cost_log2=2)
    newer, _ = sign_policy(cloud.station, OTHER)
    with cloud.there(["g-1"]):
        deliver_policy(cloud.station, newer, PATIENCE_S)
        restored = restore(
            tmp_path / "backup.age", tmp_path / "restored", backup_passphrase=b"x", passphrase=PASSPHRASE
        ).station
        assert last(restored) == newer
        next_one, is_new = sign_policy(restored, OTHER)
        assert is_new
        assert next_one.version > 1_700_000_000, "what the lost one gave after that is not known"
        assert told(restored, next_one) == {"g-1": ("done", "")}
    actions = [entry["action"] for entry in audit.read(restored.registry.audit_path)]
    assert "merge-policy" in actions


def test_a_gateway_at_its_own_broker(living: Station, birthmark: Command, tmp_path: Path) -> None:
    """A real one, which is no part of a fleet: it takes the policy from its operator."""
    operator_path = issue_operator(living, "alice", tmp_path).key_path
    with station_broker(tmp_path / "gateway", living) as broker:
        gateway = Gateway("localhost", host="127.0.0.1", port=broker.port, operator_path=operator_path)
        add_gateway(living.settings_path, gateway)
        path = tmp_path / "policy.toml"
        text = (tmp_path / "gateway" / "policy.toml").read_text()
        path.write_text(text + "# for all\n")
        answer = birthmark("policy", "publish", str(path), "--timeout", "30")
        assert answer.exit_code == 0, answer
        assert "localhost: goes by version 1 after" in answer.stdout
        assert birthmark("crl", "--timeout", "30").exit_code == 0
        answer = birthmark("gateways", "--json", "--timeout", "30")
        assert answer.exit_code == 0, answer
        (row,) = answer.records
        assert (row["state"], row["policy_version"], row["policy_behind"]) == ("online", 1, 0)
        path.write_text(text + '[[assignments]]\nrole = "nobody"\nou = "device"\n')
        answer = birthmark("policy", "publish", str(path), "--timeout", "30")
        assert answer.exit_code == 1
        assert "localhost: refused the policy: " in answer.stdout
        assert "nobody" in answer.stdout
        assert birthmark("gateways", "--timeout", "30").exit_code == 1
        broker.stop()
        path.write_text(text)
        answer = birthmark("policy", "publish", str(path), "--timeout", "0.5")
        assert "localhost: PENDING: " in answer.stdout


@needs("mosquitto")
def test_the_commands(cloud: Fleet, birthmark: Command, tmp_path: Path) -> None:
    cloud.add("g-1")
    path = tmp_path / "policy.toml"
    path.write_bytes(TEXT)
    answer = birthmark("policy", "show")
    assert answer.exit_code == 1
    assert "none was published" in answer.stderr
    assert birthmark("policy", "publish").exit_code == 1
    with cloud.there(["g-1"]):
        answer = birthmark("policy", "publish", str(path))
        assert answer.exit_code == 0, answer
        assert answer.stdout.splitlines() == [
            "version 1 of the policy is signed",
            "  g-1: goes by version 1 after 1.5 ms",
        ]
        (record,) = birthmark("policy", "publish", "--json").records
        assert (record["version"], record["newly"], record["gateways"][0]["outcome"]) == (1, False, "done")
    answer = birthmark("policy", "publish", str(path), "--timeout", "600")
    assert answer.exit_code == 1
    assert "PENDING: its link to cloud is down" in answer.stdout
    assert "g-1" in answer.stderr
    (record,) = birthmark("policy", "show", "--json").records
    assert (record["version"], record["sha256"]) == (1, last(cloud.station).text_sha256)
    assert birthmark("policy", "show", "--text").stdout.encode() == TEXT
