"""Revocation against a real broker process over real TLS: nobody who is revoked stays in, or comes back."""

from __future__ import annotations

import datetime as dt
import functools
import os
import secrets
import signal
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.mqtt_client import ConnectionEndedError, RawClient, client_context
from support.mqtt_process import BROKER_TOML, BrokerProcess, broker_process, write_files
from support.patience import PATIENCE_S
from support.pki import Authority, Issued, Pki, crl_pem, now
from support.waiting import eventually

from birthmark.device.messages import GatewayStatus, Receipt

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@functools.cache
def pki() -> Pki:
    return Pki.create()


@contextmanager
def running(folder: Path, extra_toml: str = "", **crl: dt.datetime) -> Iterator[BrokerProcess]:
    config = write_files(folder, pki(), broker_toml=BROKER_TOML + extra_toml)
    if crl:
        (folder / "crl.pem").write_bytes(pki().issuing.crl(**crl))  # type: ignore[arg-type]
    with broker_process(config) as broker:
        yield broker


def context_of(folder: Path, issued: Issued, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    path = issued.write(folder / f"{secrets.token_hex(4)}.pem")
    return client_context(path, folder / "root.pem", version=version)


def is_let_in(
    port: int, context: ssl.SSLContext, client_id: str = "sensor-1", session: ssl.SSLSession | None = None
) -> bool:
    """Whether a CONNECT is answered with CONNACK 0."""
    try:
        with RawClient.connect(port, context, session=session) as client:
            client.send(mqtt.connect(client_id))
            return client.read() == mqtt.connack(0)
    except (ssl.SSLError, OSError, ConnectionEndedError):
        return False


def replace(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".new")
    part.write_bytes(content)
    part.replace(path)


def receipts(client: RawClient, number: int) -> Receipt:
    """Read the operator's deliveries up to the receipt for a CRL."""
    while True:
        delivery = client.read_delivery()
        if delivery.topic.endswith("/receipts"):
            receipt = Receipt.from_bytes(delivery.payload)
            if receipt.crl_number == number or receipt.outcome == "refused":
                return receipt


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_crl_file_cuts_a_live_device_off(tmp_path: Path, version: ssl.TLSVersion) -> None:
    lost, kept, alice = pki().device("lost"), pki().device("kept"), pki().operator()
    with running(tmp_path) as broker:
        lost_context = context_of(tmp_path, lost, version)
        observer = RawClient.connect(broker.port, context_of(tmp_path, alice)).handshake(mqtt.connect("alice"))
        observer.subscribed(("devices/lost/#", 1), ("gateway/localhost/receipts", 1))
        will = ("devices/lost/status", b"gone", 1, True)
        device = RawClient.connect(broker.port, lost_context).handshake(mqtt.connect("lost", will=will))
        device.send(mqtt.publish("devices/lost/status", b"here", retain=True))
        assert observer.read_delivery().payload == b"here"
        other = RawClient.connect(broker.port, context_of(tmp_path, kept)).handshake(mqtt.connect("kept"))
        device.ping()  # so that the session ticket has arrived
        session = device.tls.session
        assert session is not None

        crl_der = pki().issuing.crl([lost.cert_serial], number=2)
        replace(tmp_path / "crl.pem", crl_pem(crl_der))
        assert device.read_end() == []
        presence = observer.read_delivery()
        assert (presence.topic, presence.payload) == ("devices/lost/status", b""), "no will, but an empty presence"
        receipt = receipts(observer, 2)
        assert receipt.outcome == "installed"
        (closed,) = receipt.closed
        assert (closed.id, closed.sessions_closed, closed.will_suppressed) == ("lost", 1, True)
        assert closed.retained_presence_purged
        assert 0 < closed.elapsed_ms <= receipt.elapsed_ms

        assert not is_let_in(broker.port, lost_context, "lost")
        assert not is_let_in(broker.port, lost_context, "lost", session)
        other.ping()
        observer.ping()
        broker.process.send_signal(signal.SIGTERM)
        assert broker.process.wait(PATIENCE_S) == 0
    on_disk = Receipt.from_bytes((tmp_path / "crl.pem.receipt").read_bytes())
    assert on_disk == receipt
    # Not after a restart either, with the older file back in its place.
    (tmp_path / "crl.pem").write_bytes(pki().issuing.crl(number=1))
    with broker_process(tmp_path / "broker.toml") as broker:
        assert not is_let_in(broker.port, lost_context, "lost")
        assert is_let_in(broker.port, context_of(tmp_path, kept), "kept")
    for client in (device, other, observer):
        client.close()


def test_a_crl_by_message(tmp_path: Path) -> None:
    lost, alice = pki().device("lost"), pki().operator()
    crl_der = pki().issuing.crl([lost.cert_serial], number=2)
    with running(tmp_path) as broker:
        device = RawClient.connect(broker.port, context_of(tmp_path, lost)).handshake(mqtt.connect("lost"))
        operator = RawClient.connect(broker.port, context_of(tmp_path, alice)).handshake(mqtt.connect("alice"))
        operator.subscribed(("gateway/localhost/receipts", 1), ("gateway/localhost/status", 1))
        status = GatewayStatus.from_bytes(operator.read_delivery().payload)
        assert (status.online, status.crl_numbers) == (True, {pki().issuing.issuer_id: 1})

        # A device may not bring one, whatever it is.
        device.send(mqtt.publish("gateway/localhost/crl", crl_der, qos=1, pid=7))
        assert device.read().first == 0x40
        device.ping()

        operator.send(mqtt.publish("gateway/localhost/crl", pki().stranger.crl(number=9), qos=1, pid=1))
        refused = receipts_and_acks(operator)
        assert (refused.outcome, refused.reason.split(":")[0]) == ("refused", "issuer")
        device.ping()

        operator.send(mqtt.publish("gateway/localhost/crl", crl_der, qos=1, pid=2))
        installed = receipts_and_acks(operator)
        assert (installed.outcome, [closed.id for closed in installed.closed]) == ("installed", ["lost"])
        assert device.read_end() == []
        assert not is_let_in(broker.port, context_of(tmp_path, lost), "lost")
        # Whoever comes later reads the last receipt, retained.
        late = RawClient.connect(broker.port, context_of(tmp_path, pki().operator("bob")))
        late.handshake(mqtt.connect("bob")).subscribed(("gateway/localhost/receipts", 1))
        delivery = late.read_delivery()
        assert delivery.retain
        assert Receipt.from_bytes(delivery.payload) == installed
        for client in (device, operator, late):
            client.close()


def receipts_and_acks(client: RawClient) -> Receipt:
    while True:
        found = client.read()
        if found.first >> 4 == 3:
            delivery = mqtt.delivery(found)
            if delivery.topic.endswith("/receipts"):
                return Receipt.from_bytes(delivery.payload)


def test_killed_while_it_installs_a_large_crl(tmp_path: Path) -> None:
    """What the receipt said before `kill -9` holds after it, with the first file back in its place."""
    filler = [(1 << 152) | secrets.randbits(151) for _ in range(20_000)]
    config = write_files(tmp_path, pki(), broker_toml=BROKER_TOML + "[revocation]\nwatch_interval_s = 0.02\n")
    receipt_path, first = tmp_path / "crl.pem.receipt", (tmp_path / "crl.pem").read_bytes()
    kept_path = tmp_path / "data" / "crl" / f"{pki().issuing.issuer_id}.crl"
    in_force = 1

    def number_said() -> int:
        return Receipt.from_bytes(receipt_path.read_bytes()).crl_number

    def kept() -> tuple[int, int]:
        return kept_path.stat().st_ino, kept_path.stat().st_size

    for number in range(2, 6):
        with broker_process(config) as broker:
            assert broker.port
            before = kept()
            replace(tmp_path / "crl.pem", pki().issuing.crl([*filler, number], number=number))
            if number == 3:  # as soon as the copy is there
                eventually(lambda before=before: kept() != before, every_s=0.001)  # type: ignore[misc]
            elif number == 4:  # as soon as the receipt is there
                eventually(lambda number=number: number_said() == number, every_s=0.001)  # type: ignore[misc]
            elif number == 5:  # as soon as it begins to write
                eventually(
                    lambda before=before: kept() != before or any(kept_path.parent.glob("*.part")),  # type: ignore[misc]
                    every_s=0.001,
                )
            os.kill(broker.process.pid, signal.SIGKILL)
            broker.process.wait(PATIENCE_S)
        said = number_said()
        (tmp_path / "crl.pem").write_bytes(first)
        with broker_process(config) as broker:
            assert is_let_in(broker.port, context_of(tmp_path, pki().device("kept")), "kept")
            assert is_let_in(broker.port, context_of(tmp_path, pki().issuing.issue(cert_serial=number))) is (
                number_said() < number
            )
        assert number_said() in (in_force, number)
        assert number_said() >= said
        in_force = number_said()
    assert in_force >= 4


def test_a_rollover_of_the_issuing_ca(tmp_path: Path) -> None:
    second = Authority.create("Second Issuing CA", parent=pki().root)
    with running(tmp_path) as broker:
        old_context, new_context = (
            context_of(tmp_path, pki().device("old")),
            context_of(tmp_path, second.device("new")),
        )
        old = RawClient.connect(broker.port, old_context).handshake(mqtt.connect("old"))
        assert not is_let_in(broker.port, new_context, "new")
        replace(tmp_path / "crl.pem", crl_pem(pki().issuing.crl(number=2)) + crl_pem(second.crl(number=1)))
        replace(tmp_path / "clients-ca.pem", pki().issuing.pem + second.pem)
        eventually(lambda: is_let_in(broker.port, new_context, "new"))
        old.ping()
        replace(tmp_path / "clients-ca.pem", second.pem)
        assert old.read_end() == []
        assert not is_let_in(broker.port, old_context, "old")
        assert is_let_in(broker.port, new_context, "new")
        old.close()


def test_an_expired_crl_lets_known_devices_in_under_an_alarm(tmp_path: Path) -> None:
    with running(tmp_path, next_update=now() - dt.timedelta(minutes=1)) as broker:
        assert is_let_in(broker.port, context_of(tmp_path, pki().device()))
        assert "everyone is refused after" in broker.wait_for_log("ALARM crl-expired")["message"]


def test_an_expired_crl_refuses_everyone_if_told_to(tmp_path: Path) -> None:
    extra = "[revocation]\nfail_closed = true\n"
    with running(tmp_path, extra, next_update=now() - dt.timedelta(minutes=1)) as broker:
        assert not is_let_in(broker.port, context_of(tmp_path, pki().device()))
        assert broker.wait_for_log("ALARM crl-refusing")
