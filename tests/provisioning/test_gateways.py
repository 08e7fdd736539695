"""Deliveries: by path and over MQTT, answered, refused, and not answered."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pytest
from cryptography import x509
from support.patience import PATIENCE_S
from support.ports import steady_port
from support.station import CHEAP, PASSPHRASE
from support.station_gateways import CLOSED, MqttGateway, PathGateway, receipt_for

from birthmark.device.durable import write_durably
from birthmark.provisioning.crl_store import CrlSet, current_crl, successor
from birthmark.provisioning.crls import sign_and_store_crl, up_to_date_crl
from birthmark.provisioning.delivery import Outcome
from birthmark.provisioning.gateway_settings import Gateway
from birthmark.provisioning.gateways import deliver
from birthmark.provisioning.issuing import issue_broker, issue_operator
from birthmark.provisioning.rollover.phases import activate
from birthmark.provisioning.rollover.starting import RootKey, start_issuing
from birthmark.provisioning.settings_edit import add_gateway

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.station import Command

    from birthmark.provisioning.delivery import Delivery
    from birthmark.provisioning.station import Station

SHORT_S = 0.3
EXPORTED = "`birthmark ca export issuing --out clients-ca.pem`"


def crl_of(station: Station) -> CrlSet:
    crl = current_crl(station)
    assert crl is not None
    return crl


def deliver_all(station: Station, *gateways: Gateway, timeout_s: float = PATIENCE_S) -> list[Delivery]:
    return deliver(
        gateways,
        crl_of(station),
        station.cas,
        successor=partial(successor, station),
        anchors_path=station.folder / "root.pem",
        timeout_s=timeout_s,
    )


@pytest.fixture
def by_path(tmp_path: Path) -> Gateway:
    return Gateway("gateway-1", crl_path=tmp_path / "gateway.crl.pem")


@pytest.fixture
def by_mqtt(living: Station, tmp_path: Path) -> Callable[[int], Gateway]:
    issue_broker(living, ["localhost", "127.0.0.1"], tmp_path / "gateway")
    issue_operator(living, "alice", tmp_path)
    return lambda port: Gateway("localhost", host="127.0.0.1", port=port, operator_path=tmp_path / "alice.pem")


def mqtt_gateway(tmp_path: Path, answer: Callable[[bytes], list[bytes]], **options: Any) -> MqttGateway:
    folder = tmp_path / "gateway"
    return MqttGateway(folder / "server.pem", folder / "clients-ca.pem", answer, **options)


def test_by_path_the_receipt_is_read_and_told(living: Station, by_path: Gateway) -> None:
    assert by_path.crl_path is not None
    with PathGateway(by_path.crl_path, lambda crl: receipt_for(crl, closed=(CLOSED,)).to_bytes()):
        (delivery,) = deliver_all(living, by_path)
    assert delivery.outcome is Outcome.DONE
    assert delivery.described() == (
        "gateway-1: CRL 1 installed in 4.2 ms: handshakes refused; sensor-17: 1 live session closed in 3.0 ms, "
        "will suppressed, queue purged (2 messages), presence cleared"
    )
    assert delivery.record()["closed"][0]["id"] == "sensor-17"
    json.dumps(delivery.record())
    assert by_path.crl_path.read_bytes() == living.crl_path.read_bytes()
    assert by_path.crl_path.stat().st_mode & 0o777 == 0o644


def test_by_path_without_a_live_session(living: Station, by_path: Gateway) -> None:
    assert by_path.crl_path is not None
    with PathGateway(by_path.crl_path, lambda crl: receipt_for(crl).to_bytes()):
        (delivery,) = deliver_all(living, by_path)
    assert delivery.described().endswith("handshakes refused; no live session")


def test_by_path_a_refusal_is_told_with_its_reason_escaped(living: Station, by_path: Gateway) -> None:
    assert by_path.crl_path is not None
    with PathGateway(by_path.crl_path, lambda crl: receipt_for(crl, outcome="refused").to_bytes()):
        (delivery,) = deliver_all(living, by_path)
    assert delivery.outcome is Outcome.REFUSED
    assert delivery.described() == r"gateway-1: refused the CRL: the clock is late\x1b[0m"


def test_by_path_a_receipt_of_before_counts_unless_it_is_a_refusal(living: Station, by_path: Gateway) -> None:
    assert by_path.crl_path is not None
    receipt_path = by_path.crl_path.with_name(by_path.crl_path.name + ".receipt")
    write_durably(receipt_path, receipt_for(crl_of(living).current.der, outcome="refused").to_bytes())
    assert deliver_all(living, by_path, timeout_s=SHORT_S)[0].outcome is Outcome.PENDING
    write_durably(receipt_path, receipt_for(crl_of(living).current.der).to_bytes())
    assert deliver_all(living, by_path, timeout_s=SHORT_S)[0].outcome is Outcome.DONE


@pytest.mark.parametrize("junk", [b"", b"{}", b"\xff", b'{"gateway": "x"}', b"[" * 100_000])
def test_by_path_an_unreadable_receipt_is_pending(living: Station, by_path: Gateway, junk: bytes) -> None:
    assert by_path.crl_path is not None
    by_path.crl_path.with_name(by_path.crl_path.name + ".receipt").write_bytes(junk)
    (delivery,) = deliver_all(living, by_path, timeout_s=SHORT_S)
    assert delivery.outcome is Outcome.PENDING
    assert "receipt" in delivery.cause


def test_by_path_a_receipt_for_another_crl_is_pending(living: Station, by_path: Gateway) -> None:
    assert by_path.crl_path is not None
    old = crl_of(living).current.der
    sign_and_store_crl(living)
    by_path.crl_path.with_name(by_path.crl_path.name + ".receipt").write_bytes(receipt_for(old).to_bytes())
    (delivery,) = deliver_all(living, by_path, timeout_s=SHORT_S)
    assert delivery.outcome is Outcome.PENDING
    assert "another CRL" in delivery.cause


def test_by_path_a_pipe_in_place_of_the_receipt_is_pending(living: Station, by_path: Gateway) -> None:
    assert by_path.crl_path is not None
    os.mkfifo(by_path.crl_path.with_name(by_path.crl_path.name + ".receipt"))
    (delivery,) = deliver_all(living, by_path, timeout_s=SHORT_S)
    assert delivery.outcome is Outcome.PENDING
    assert "no regular file" in delivery.cause


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"gateway": "gateway-2"}, "gateway-2"),
        ({"gateway": "\x1b[31mgateway-1"}, r"\x1b[31mgateway-1"),
        ({"crl_number": 0}, "says that 0 is in force"),
        ({"crl_number": 1 << 150}, "is in force"),
    ],
)
def test_a_receipt_of_another_gateway_or_one_that_contradicts_itself_is_pending(
    living: Station, by_path: Gateway, changes: dict[str, Any], cause: str
) -> None:
    assert by_path.crl_path is not None
    with PathGateway(by_path.crl_path, lambda crl: replace(receipt_for(crl), **changes).to_bytes()):
        (delivery,) = deliver_all(living, by_path)
    assert delivery.outcome is Outcome.PENDING
    assert cause in delivery.cause


def test_by_path_an_older_crl_does_not_stay_in_the_place_of_a_newer_one(living: Station, by_path: Gateway) -> None:
    """Two revocations at once: the one that signed first comes to write last."""
    assert by_path.crl_path is not None
    older = crl_of(living)
    newer = sign_and_store_crl(living)
    with PathGateway(by_path.crl_path, lambda crl: receipt_for(crl, outcome="current").to_bytes()):
        (delivery,) = deliver(
            [by_path],
            older,
            living.cas,
            successor=partial(successor, living),
            anchors_path=living.folder / "root.pem",
            timeout_s=PATIENCE_S,
        )
    assert by_path.crl_path.read_bytes() == newer.pem
    assert delivery.outcome is Outcome.DONE
    assert delivery.receipts
    assert delivery.receipts[0].crl_sha256 == newer.current.sha256


def test_by_path_a_newer_crl_that_another_command_brought_counts(living: Station, by_path: Gateway) -> None:
    assert by_path.crl_path is not None
    older = crl_of(living)

    def answer(_crl: bytes) -> bytes:
        return receipt_for(sign_and_store_crl(living).current.der).to_bytes()

    with PathGateway(by_path.crl_path, answer):
        (delivery,) = deliver(
            [by_path],
            older,
            living.cas,
            successor=partial(successor, living),
            anchors_path=living.folder / "root.pem",
            timeout_s=PATIENCE_S,
        )
    assert delivery.outcome is Outcome.DONE
    assert delivery.receipts
    assert delivery.receipts[0].crl_number > older.current.number


def test_by_mqtt_a_newer_crl_is_brought_when_the_gateway_has_it_already(
    living: Station, tmp_path: Path, by_mqtt: Callable[[int], Gateway]
) -> None:
    older = crl_of(living)
    newer = sign_and_store_crl(living)

    def answer(crl: bytes) -> list[bytes]:
        outcome: Literal["refused", "current"] = "refused" if crl == older.current.der else "current"
        return [receipt_for(crl, gateway="localhost", outcome=outcome).to_bytes()]

    with mqtt_gateway(tmp_path, answer) as gateway:
        (delivery,) = deliver(
            [by_mqtt(gateway.port)],
            older,
            living.cas,
            successor=partial(successor, living),
            anchors_path=living.folder / "root.pem",
            timeout_s=PATIENCE_S,
        )
    assert delivery.outcome is Outcome.DONE, delivery
    assert delivery.receipts
    assert delivery.receipts[0].crl_sha256 == newer.current.sha256


def test_by_path_no_folder_is_pending(living: Station, tmp_path: Path) -> None:
    (delivery,) = deliver_all(living, Gateway("gateway-1", crl_path=tmp_path / "none" / "crl.pem"))
    assert delivery.outcome is Outcome.PENDING
    assert "No such file" in delivery.described()
    assert not (tmp_path / "none").exists()


def test_by_mqtt(living: Station, tmp_path: Path, by_mqtt: Callable[[int], Gateway]) -> None:
    older = receipt_for(crl_of(living).current.der)
    newer = sign_and_store_crl(living)

    def answer(crl: bytes) -> list[bytes]:
        # Somebody else's receipt, and no receipt at all, come first.
        return [older.to_bytes(), b"junk", receipt_for(crl, gateway="localhost", outcome="current").to_bytes()]

    with mqtt_gateway(tmp_path, answer) as gateway:
        (delivery,) = deliver_all(living, by_mqtt(gateway.port))
    assert delivery.outcome is Outcome.DONE, delivery
    assert delivery.receipts
    assert delivery.receipts[0].crl_sha256 == newer.current.sha256
    assert delivery.described() == "localhost: CRL 2 has it already: handshakes refused"
    assert gateway.topics == ["gateway/localhost/receipts", "gateway/localhost/crl"]
    assert gateway.client_ids[0].startswith("alice:crl-")


@pytest.mark.parametrize(("before", "after"), [("refused", "installed"), ("installed", "refused")])
def test_by_mqtt_only_what_is_said_now_counts(
    living: Station,
    tmp_path: Path,
    by_mqtt: Callable[[int], Gateway],
    before: Literal["installed", "refused"],
    after: Literal["installed", "refused"],
) -> None:
    """The gateway retains its last receipt, and that may be one for this CRL, of an attempt before."""
    retained = receipt_for(crl_of(living).current.der, gateway="localhost", outcome=before)

    def answer(crl: bytes) -> list[bytes]:
        return [receipt_for(crl, gateway="localhost", outcome=after).to_bytes()]

    with mqtt_gateway(tmp_path, answer, retained=retained.to_bytes()) as gateway:
        (delivery,) = deliver_all(living, by_mqtt(gateway.port))
    assert delivery.outcome is (Outcome.DONE if after == "installed" else Outcome.REFUSED)


@pytest.mark.parametrize(
    ("connack", "suback", "answers", "cause"),
    [(5, 1, True, "does not let us in"), (0, 0x80, True, "policy"), (0, 1, False, "no receipt")],
)
def test_by_mqtt_what_goes_wrong_is_pending(
    living: Station,
    tmp_path: Path,
    by_mqtt: Callable[[int], Gateway],
    *,
    connack: int,
    suback: int,
    answers: bool,
    cause: str,
) -> None:
    def answer(crl: bytes) -> list[bytes]:
        return [receipt_for(crl).to_bytes()] if answers else []

    with mqtt_gateway(tmp_path, answer, connack=connack, suback=suback) as gateway:
        timeout_s = PATIENCE_S if answers else 1.0
        (delivery,) = deliver_all(living, by_mqtt(gateway.port), timeout_s=timeout_s)
    assert delivery.outcome is Outcome.PENDING
    assert cause in delivery.cause


def test_by_mqtt_nobody_there_is_pending(living: Station, by_mqtt: Callable[[int], Gateway]) -> None:
    port = steady_port()
    (delivery,) = deliver_all(living, by_mqtt(port), timeout_s=SHORT_S)
    assert delivery.outcome is Outcome.PENDING
    assert str(port) in delivery.cause


def test_by_mqtt_without_usable_files_is_pending(living: Station, tmp_path: Path) -> None:
    gateway = Gateway("localhost", host="localhost", operator_path=tmp_path / "none.pem")
    (delivery,) = deliver_all(living, gateway)
    assert delivery.outcome is Outcome.PENDING
    assert "none.pem" in delivery.cause


def test_one_silent_gateway_delays_no_other(living: Station, tmp_path: Path) -> None:
    paths = [tmp_path / f"crl-{number}.pem" for number in range(3)]
    gateways = [Gateway(f"g-{number}", crl_path=path) for number, path in enumerate(paths)]
    others = threading.Semaphore(0)

    def answering(name: str) -> Callable[[bytes], bytes]:
        def answer(crl: bytes) -> bytes:
            others.release()
            return receipt_for(crl, gateway=name).to_bytes()

        return answer

    def silent_until_the_others_have_answered(crl: bytes) -> bytes:
        assert all(others.acquire(timeout=PATIENCE_S) for _ in range(2))
        return receipt_for(crl, gateway="g-1").to_bytes()

    with (
        PathGateway(paths[0], answering("g-0")),
        PathGateway(paths[1], silent_until_the_others_have_answered),
        PathGateway(paths[2], answering("G-2")),
    ):
        deliveries = deliver_all(living, *gateways)
    assert [delivery.outcome for delivery in deliveries] == [Outcome.DONE] * 3


def test_no_gateway_is_no_delivery(living: Station) -> None:
    assert deliver_all(living) == []


def test_by_mqtt_a_ca_that_is_not_trusted_yet_hinders_nothing_until_it_issues(
    living: Station, tmp_path: Path, by_mqtt: Callable[[int], Gateway]
) -> None:
    new = start_issuing(living, lambda: RootKey(PASSPHRASE), derivation=CHEAP)
    crls = up_to_date_crl(living)

    def answer(crl: bytes) -> list[bytes]:
        ours = crl == crls.current.der
        return [receipt_for(crl, gateway="localhost", outcome="current" if ours else "refused").to_bytes()]

    with mqtt_gateway(tmp_path, answer) as gateway:
        (delivery,) = deliver_all(living, by_mqtt(gateway.port))
        assert (delivery.outcome, delivery.distrusted) == (Outcome.DONE, (new.key_id,)), delivery
        assert [receipt.issuer for receipt in delivery.receipts] == [crls.current.issuer]
        assert f"does not trust {new.short} yet" in delivery.described()
        activate(living, force=True)
        (delivery,) = deliver_all(living, by_mqtt(gateway.port))
    assert delivery.outcome is Outcome.REFUSED
    assert gateway.topics.count("gateway/localhost/crl") == 4


def test_whose_file_of_cas_the_station_does_not_reach_is_named_before_and_after(
    birthmark: Command, living: Station, tmp_path: Path, by_mqtt: Callable[[int], Gateway]
) -> None:
    known = living.cas.for_clients.certificate.subject

    def answer(crl: bytes) -> list[bytes]:
        ours = x509.load_der_x509_crl(crl).issuer == known
        return [receipt_for(crl, gateway="localhost", outcome="current" if ours else "refused").to_bytes()]

    with mqtt_gateway(tmp_path, answer) as gateway:
        add_gateway(living.settings_path, by_mqtt(gateway.port))
        started = birthmark("ca", "rollover", "start", "issuing")
        assert started.exit_code == 0, started.stderr
        assert f"localhost: bring {EXPORTED} there, then run this again" in started.stderr
        assert birthmark("ca", "rollover", "activate", "--force").exit_code == 1
        retired = birthmark("ca", "rollover", "retire", "issuing", "--force")
    assert f"localhost: trusts it until {EXPORTED} is brought there" in retired.stderr
