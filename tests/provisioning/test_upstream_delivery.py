"""CRLs through an upstream: one connection for many gateways, those that are away, who else publishes there."""

from __future__ import annotations

import queue
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from support.patience import PATIENCE_S
from support.programs import needs
from support.station import CHEAP, PASSPHRASE, Command, enrolled_row, new_station
from support.station_upstream import Fleet, fleet

from birthmark.device.backoff import Backoff
from birthmark.device.client import Client
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.provisioning import audit, delivery
from birthmark.provisioning.crl_delivery import deliver_crl
from birthmark.provisioning.crl_service import LOOK_S, CrlService
from birthmark.provisioning.crl_store import current_crl
from birthmark.provisioning.crls import sign_and_store_crl, up_to_date_crl
from birthmark.provisioning.delivery import Outcome
from birthmark.provisioning.revocation import revoke
from birthmark.provisioning.rollover.phases import activate
from birthmark.provisioning.rollover.starting import RootKey, start_issuing
from birthmark.provisioning.station import Station

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from birthmark.device.received import Message
    from birthmark.provisioning.crl_store import CrlSet
    from birthmark.provisioning.delivery import Delivery

pytestmark = needs("mosquitto")
SHORT_S = 0.5
UNTIL_THE_END_S = 4.0
"""Where somebody does not answer, and this is all waited for."""
LOST = x509.ReasonFlags.key_compromise


@pytest.fixture
def cloud(living: Station, tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path / "cloud", living) as made:
        yield made


def crls_of(station: Station) -> CrlSet:
    crls = current_crl(station)
    assert crls is not None
    return crls


def bring(cloud: Fleet, crls: CrlSet | None = None, timeout_s: float = PATIENCE_S) -> dict[str, Delivery]:
    return {one.gateway: one for one in deliver_crl(cloud.station, crls or crls_of(cloud.station), timeout_s)}


def operator(cloud: Fleet) -> Client:
    address = BrokerAddress("localhost", cloud.upstream.port)
    credentials = Credentials.from_files(cloud.folder / "alice.pem", cloud.station.root_path, address)
    return Client(credentials, client_suffix="test")


def held_by(cloud: Fleet, issuer: str) -> bytes:
    """Return what the upstream retains for a CA."""
    found: queue.Queue[bytes] = queue.Queue()
    with operator(cloud) as client:
        client.subscribe(f"fleet/crl/{issuer}", lambda message: found.put(message.payload), wait=PATIENCE_S)
        return found.get(timeout=PATIENCE_S)


def put(cloud: Fleet, issuer: str, payload: bytes) -> None:
    with operator(cloud) as client:
        client.publish(f"fleet/crl/{issuer}", payload, retain=True, wait=PATIENCE_S)


def elsewhere(cloud: Fleet, name: str) -> Station:
    """The same station on another machine, or brought back from an old copy."""
    folder = shutil.copytree(cloud.station.folder, cloud.folder / name)
    return Station.open(folder, passphrase=PASSPHRASE)


def test_every_gateway_gets_it_over_one_connection(cloud: Fleet) -> None:
    cloud.add("g-1", "g-2", "G-3")
    with cloud.there(["g-1", "g-2", "G-3"]) as gateways:
        done = bring(cloud)
        assert {one.outcome for one in done.values()} == {Outcome.DONE}, done
        assert done["g-2"].described() == "g-2: CRL 1 installed in 4.2 ms: handshakes refused; no live session"
        current = crls_of(cloud.station).current
        assert [gateway.crl_numbers for gateway in gateways] == [{current.issuer: 1}] * 3
        assert held_by(cloud, current.issuer) == current.der
        again = bring(cloud)
    assert {one.described() for one in again.values()} == {
        f"{name}: CRL 1 has it already: handshakes refused" for name in ("g-1", "g-2", "G-3")
    }


def test_one_that_is_away_is_pending_and_nobody_waits_for_it(cloud: Fleet, birthmark: Command) -> None:
    cloud.add("g-1", "g-2", "g-3")
    enrolled_row(cloud.station, "sensor-1")
    with cloud.there(["g-1"]), cloud.played("g-2") as away:
        assert bring(cloud, timeout_s=UNTIL_THE_END_S)["g-3"].cause == (
            "cloud knows nothing of it: has it a link there, with fleet = true?"
        )
    away.leave()
    with cloud.there(["g-1", "g-3"]):
        answer = birthmark("revoke", "sensor-1", "--reason", "lost", "--timeout", "600", "--json")
        assert answer.exit_code == 1, answer
        told = {one["gateway"]: (one["outcome"], one["cause"]) for one in answer.records[0]["gateways"]}
        assert told == {
            "g-1": ("done", ""),
            "g-2": ("PENDING", "its link to cloud is down"),
            "g-3": ("done", ""),
        }
        assert "not every gateway has it (g-2)" in answer.stderr
        since = birthmark("crl", "--timeout", "600").stdout
        assert "g-2: PENDING since 20" in since
        with cloud.played("g-2"):
            answer = birthmark("crl")
        assert answer.exit_code == 0, answer
    entries = [entry for entry in audit.read(cloud.station.registry.audit_path) if entry["action"] == "deliver"]
    outcomes = [entry["details"]["outcome"] for entry in entries if entry["subject"] == "g-2"]
    assert outcomes == ["done", "PENDING", "PENDING", "done"]


def test_one_that_is_away_and_has_it_already_has_it(cloud: Fleet) -> None:
    cloud.add("g-1", "g-2")
    with cloud.there(["g-1"]):
        current = crls_of(cloud.station).current
        with cloud.played("g-2", crl_numbers={current.issuer: current.number}):
            bring(cloud)
        done = bring(cloud)
        assert done["g-2"].outcome is Outcome.DONE
        assert done["g-2"].receipts[0].crl_sha256 == current.sha256
        sign_and_store_crl(cloud.station)
        assert bring(cloud)["g-2"].outcome is Outcome.PENDING


def test_what_nobody_lacks_is_not_published_again(cloud: Fleet) -> None:
    cloud.add("g-1")
    published: queue.Queue[str] = queue.Queue()
    with operator(cloud) as watching, cloud.there(["g-1"]):
        bring(cloud)
        watching.subscribe("fleet/crl/+", lambda message: published.put(message.topic), wait=PATIENCE_S)
        assert published.get(timeout=PATIENCE_S)  # the retained one
        assert bring(cloud)["g-1"].outcome is Outcome.DONE
        sign_and_store_crl(cloud.station)
        bring(cloud)
        assert published.get(timeout=PATIENCE_S)
        assert published.empty()


def test_a_refusal_and_a_silence_are_told(cloud: Fleet) -> None:
    cloud.add("g-1", "g-2", "g-3")
    with (
        cloud.there(["g-1"]),
        cloud.played("g-2", refuses="no room"),
        cloud.played("g-3", answers=False, trusted=frozenset()),
    ):
        done = bring(cloud, timeout_s=UNTIL_THE_END_S)
    assert done["g-1"].outcome is Outcome.DONE
    assert done["g-2"].described() == r"g-2: refused the CRL: the clock is late\x1b[0m"
    assert done["g-3"].described() == "g-3: PENDING: no receipt by way of cloud"


def test_a_receipt_in_another_gateways_name_is_told(cloud: Fleet) -> None:
    cloud.add("g-1", "g-2")
    with cloud.there(["g-1"]), cloud.played("g-2", says_it_is="g-9\x1b"):
        done = bring(cloud)
    assert done["g-1"].outcome is Outcome.DONE
    assert done["g-2"].outcome is Outcome.PENDING
    assert r"the receipt is of the gateway g-9\x1b" in done["g-2"].cause


def test_what_was_signed_meanwhile_is_brought_instead(cloud: Fleet) -> None:
    cloud.add("g-1")
    older = crls_of(cloud.station)
    newer = sign_and_store_crl(cloud.station).current
    with cloud.there(["g-1"]) as (gateway,):
        done = bring(cloud, older)
        assert done["g-1"].receipts[0].crl_sha256 == newer.sha256
        assert gateway.crl_numbers == {newer.issuer: newer.number}
    assert held_by(cloud, newer.issuer) == newer.der


def test_one_whose_receipt_is_lost_is_believed_by_its_status(cloud: Fleet) -> None:
    cloud.add("g-1")
    with cloud.there(["g-1"], answers=False):
        done = bring(cloud, timeout_s=UNTIL_THE_END_S)
    assert done["g-1"].outcome is Outcome.DONE


def test_a_newer_crl_that_lists_all_that_ours_does_counts(cloud: Fleet) -> None:
    """Another station with the same registry has signed it, and another file is what we have."""
    cloud.add("g-1")
    enrolled_row(cloud.station, "sensor-1")
    other = elsewhere(cloud, "other")
    newer = revoke(other, "sensor-1", LOST).crls.current
    with cloud.there(["g-1"]):
        put(cloud, newer.issuer, newer.der)
        done = bring(cloud)
    assert done["g-1"].outcome is Outcome.DONE, done
    assert done["g-1"].receipts[0].crl_number == newer.number
    assert held_by(cloud, newer.issuer) == newer.der


def test_a_newer_crl_that_lacks_what_ours_lists_is_told(cloud: Fleet) -> None:
    """This station was restored from an old copy: its numbers lag behind."""
    cloud.add("g-1")
    other = elsewhere(cloud, "other")
    for _ in range(3):
        newer = sign_and_store_crl(other).current
    enrolled_row(cloud.station, "sensor-1")
    ours = revoke(cloud.station, "sensor-1", LOST).crls
    with cloud.there(["g-1"]):
        put(cloud, newer.issuer, newer.der)
        done = bring(cloud, ours)
    assert done["g-1"].outcome is Outcome.PENDING
    assert f"cloud holds CRL {newer.number}" in done["g-1"].cause
    assert "restore --crl" in done["g-1"].cause
    assert held_by(cloud, newer.issuer) == newer.der


@pytest.mark.parametrize("what", ["junk", "foreign", "older"])
def test_what_is_none_of_ours_or_older_is_replaced(cloud: Fleet, tmp_path: Path, what: str) -> None:
    cloud.add("g-1")
    older = crls_of(cloud.station).current
    ours = sign_and_store_crl(cloud.station).current
    if what == "foreign":
        payload = crls_of(new_station(tmp_path / "foreign")).current.der
    else:
        payload = older.der if what == "older" else b"junk"
    put(cloud, ours.issuer, payload)
    with cloud.there(["g-1"]):
        assert bring(cloud)["g-1"].outcome is Outcome.DONE
    assert held_by(cloud, ours.issuer) == ours.der


def test_an_older_crl_does_not_stay_in_the_place_of_ours(cloud: Fleet) -> None:
    """Two commands at once: the one that signed first comes to publish last."""
    cloud.add("g-1")
    older = crls_of(cloud.station).current
    ours = sign_and_store_crl(cloud.station).current
    again: queue.Queue[bytes] = queue.Queue()

    def disturb(message: Message) -> None:
        payload = message.payload
        again.put(payload)
        if payload == ours.der and again.qsize() == 1:
            disturber.publish(f"fleet/crl/{ours.issuer}", older.der, retain=True)

    with operator(cloud) as disturber, cloud.played("g-1", answers=False, trusted=frozenset()):
        disturber.subscribe(f"fleet/crl/{ours.issuer}", disturb, wait=PATIENCE_S)
        bring(cloud, timeout_s=UNTIL_THE_END_S)  # nobody answers: it watches until the end
        assert [again.get(timeout=PATIENCE_S) for _ in range(3)] == [ours.der, older.der, ours.der]
    assert held_by(cloud, ours.issuer) == ours.der


def test_whoever_keeps_overwriting_it_is_named(cloud: Fleet) -> None:
    cloud.add("g-1")
    older = crls_of(cloud.station).current
    ours = sign_and_store_crl(cloud.station).current

    def disturb(message: Message) -> None:
        if message.payload == ours.der:
            disturber.publish(f"fleet/crl/{ours.issuer}", older.der, retain=True)

    with operator(cloud) as disturber, cloud.played("g-1", answers=False, trusted=frozenset()):
        disturber.subscribe(f"fleet/crl/{ours.issuer}", disturb, wait=PATIENCE_S)
        done = bring(cloud)
    assert done["g-1"].outcome is Outcome.PENDING
    assert "somebody else keeps putting something else" in done["g-1"].cause


def test_a_crl_that_is_too_long_is_told_and_goes_nowhere(cloud: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud.add("g-1")
    monkeypatch.setattr(delivery, "MAX_MQTT_CRL_BYTES", 100)
    with cloud.there(["g-1"]) as (gateway,):
        done = bring(cloud)
        assert gateway.crl_numbers == {}
    assert done["g-1"].outcome is Outcome.PENDING
    assert "too long for MQTT" in done["g-1"].cause
    assert "gateway add NAME --path" in done["g-1"].cause


def test_an_upstream_that_cannot_be_used_leaves_all_behind_it_pending(cloud: Fleet, tmp_path: Path) -> None:
    cloud.add("g-1", "g-2")
    foreign = new_station(tmp_path / "foreign").root_path
    (upstream,) = cloud.station.settings.upstreams
    for settings, cause in (
        (replace(upstream, ca_path=foreign), "certificate"),
        (replace(upstream, operator_path=tmp_path / "none.pem"), "none.pem"),
    ):
        cloud.station.settings = replace(cloud.station.settings, upstreams=(settings,))
        done = bring(cloud)
        assert {one.outcome for one in done.values()} == {Outcome.PENDING}
        assert all(cause in one.cause for one in done.values()), done
    cloud.reread()
    cloud.upstream.stop()
    assert str(cloud.upstream.port) in bring(cloud, timeout_s=SHORT_S)["g-1"].cause
    cloud.upstream.start()


def test_a_ca_that_is_not_trusted_yet_hinders_nothing_until_it_issues(cloud: Fleet) -> None:
    cloud.add("g-1", "g-2")
    old = crls_of(cloud.station).current.issuer
    new = start_issuing(cloud.station, lambda: RootKey(PASSPHRASE), derivation=CHEAP)
    crls = up_to_date_crl(cloud.station)
    with cloud.there(["g-1"], trusted=frozenset({old})), cloud.there(["g-2"]):
        done = bring(cloud, crls)
        assert {one.outcome for one in done.values()} == {Outcome.DONE}, done
        assert (done["g-1"].distrusted, done["g-2"].distrusted) == ((new.key_id,), ())
        assert [receipt.issuer for receipt in done["g-2"].receipts] == [old, new.key_id]
        activate(cloud.station, force=True)
        done = bring(cloud)
    assert {name: one.outcome for name, one in done.items()} == {"g-1": Outcome.REFUSED, "g-2": Outcome.DONE}


def test_the_crl_service_brings_it_once_it_is_back(cloud: Fleet) -> None:
    cloud.add("g-1", "g-2")
    told: list[tuple[str, str]] = []
    service = CrlService(
        cloud.station,
        say=lambda name, *_, **facts: told.append((name, facts.get("gateway", ""))),
        timeout_s=PATIENCE_S,
        retry=Backoff(0.001, 0.001),
    )
    with cloud.there(["g-1", "g-2"]):
        while service.turn() < LOOK_S:
            pass
    with cloud.there(["g-1"]):
        sign_and_store_crl(cloud.station)
        assert service.turn() < LOOK_S
        assert service.turn() < LOOK_S
        with cloud.there(["g-2"]):
            while service.turn() < LOOK_S:
                pass
    assert [gateway for name, gateway in told if name == "delivery"] == ["g-1", "g-2", "g-1", "g-2", "g-2"]
