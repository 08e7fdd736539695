"""The TLS listener: who gets through, how failures are explained, and what half-open connections cost."""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
import ssl
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from support import mqtt_client as mqtt
from support.mqtt_client import ConnectionEndedError, RawClient, client_context, connack
from support.mqtt_gateway import running_gateway
from support.patience import PATIENCE_S
from support.pki import SERVER, Issued, Pki, now
from support.tls_by_hand import TlsByHand

from birthmark.broker.config import Limits
from birthmark.broker.listener import IDLE_PROBE_S, bind
from birthmark.broker.tls import server_context
from birthmark.device.errors import ConfigurationError, SystemFailureError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.mqtt_gateway import RunningGateway

TLS12, TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
REFUSED = (ssl.SSLError, ConnectionError, ConnectionEndedError)


def answer(gateway: RunningGateway, context: ssl.SSLContext, client_id: str = "sensor-1", **options: Any) -> Any:
    """The CONNACK code that a client gets, or None if it gets none."""
    try:
        client = gateway.open(context, **options)
        client.send(mqtt.connect(client_id))
        return client.read().body[1]
    except REFUSED:
        return None


@pytest.mark.parametrize("version", [TLS12, TLS13])
def test_a_device_gets_in_on_both_versions(gateway: RunningGateway, version: ssl.TLSVersion) -> None:
    context = gateway.context("sensor-1", version=version)
    client = gateway.open(context).handshake(mqtt.connect("sensor-1"))
    name = client.tls.cipher()
    assert name is not None
    assert any(part in name[0] for part in ("GCM", "CHACHA20"))
    client.ping()


def _stranger(pki: Pki) -> Issued:
    return pki.stranger.device("sensor-1")


def _expired(pki: Pki) -> Issued:
    return pki.issuing.issue(not_before=now() - timedelta(days=9), not_after=now() - timedelta(days=1))


def _early(pki: Pki) -> Issued:
    return pki.issuing.issue(not_before=now() + timedelta(days=1))


def _server_purpose(pki: Pki) -> Issued:
    return pki.issuing.issue(usages=[SERVER])


def _of_the_root(pki: Pki) -> Issued:
    return pki.root.device("sensor-1")


@pytest.mark.parametrize("version", [TLS12, TLS13])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_stranger, "signature invalid|issuer unknown"),
        (_expired, "certificate expired"),
        (_early, "certificate not yet valid"),
        (_server_purpose, "wrong purpose"),
        (_of_the_root, "self-signed certificate in the chain"),
    ],
)
def test_a_wrong_certificate_is_refused_and_the_log_says_why(
    gateway: RunningGateway,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[Pki], Issued],
    reason: str,
    version: ssl.TLSVersion,
) -> None:
    caplog.set_level(logging.INFO, "birthmark")
    context = gateway.context_of(make(gateway.pki), version=version)
    assert answer(gateway, context) is None
    gateway.wait_for(lambda: gateway.broker.counters.handshakes_failed == 1, "it is counted")
    (line,) = [r.getMessage() for r in caplog.records if "handshake with 127.0.0.1" in r.getMessage()]
    assert any(word in line for word in reason.split("|")), line
    assert "(" in line, "there is a hint"


@pytest.mark.parametrize("version", [TLS12, TLS13])
def test_no_certificate_is_refused(
    gateway: RunningGateway, caplog: pytest.LogCaptureFixture, version: ssl.TLSVersion
) -> None:
    caplog.set_level(logging.INFO, "birthmark")
    context = client_context(None, gateway.folder / "root.pem", version=version)
    assert answer(gateway, context) is None
    gateway.wait_for(lambda: gateway.broker.counters.handshakes_failed == 1, "it is counted")
    assert "no client certificate" in caplog.text


def test_the_client_reads_the_alert_that_says_why(gateway: RunningGateway) -> None:
    client = gateway.open(gateway.context_of(_expired(gateway.pki), version=TLS13))
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_EXPIRED"):
        client.sock.recv(1)


def test_the_alert_of_one_that_is_cut_off_ends_no_other_connection(gateway: RunningGateway) -> None:
    """OpenSSL has one queue of errors for all connections of a thread, and what is left in it is anybody's."""
    third = gateway.client("sensor-3")
    with (
        TlsByHand(gateway.port, gateway.context("sensor-1")) as hostile,
        TlsByHand(gateway.port, gateway.context("sensor-2")) as innocent,
    ):
        for client, name in ((hostile, "sensor-1"), (innocent, "sensor-2")):
            client.sock.sendall(client.record(mqtt.connect(name)))
            assert client.read(4) == b"\x20\x02\0\0"
        violation = hostile.record(b"\0\0")
        hostile.sock.sendall(violation + hostile.alert())
        gateway.wait_for(lambda: gateway.broker.connected_count == 2, "it is cut off")
        ping = innocent.record(mqtt.PINGREQ)
        innocent.sock.sendall(ping[:9])
        third.ping()  # by then the gateway has looked at that half, and waits for the rest
        innocent.sock.sendall(ping[9:])
        assert innocent.read(2) == b"\xd0\0"


def test_plain_mqtt_is_refused_and_explained(gateway: RunningGateway, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "birthmark")
    client = RawClient(socket.create_connection(("127.0.0.1", gateway.port), timeout=PATIENCE_S))
    gateway.clients.append(client)
    client.send(mqtt.connect("sensor-1"))
    gateway.wait_for(lambda: gateway.broker.counters.handshakes_failed == 1, "it is counted")
    assert "not TLS" in caplog.text


def test_rsa_suites_and_old_versions_are_refused(gateway: RunningGateway) -> None:
    context = gateway.context("sensor-1", version=TLS12)
    context.set_ciphers("ECDHE-ECDSA-AES128-SHA256")  # no AEAD
    assert answer(gateway, context) is None


@pytest.mark.parametrize("version", [TLS12, TLS13])
def test_a_resumed_session_of_a_revoked_device_is_refused(
    gateway: RunningGateway, version: ssl.TLSVersion
) -> None:
    issued = gateway.pki.device("sensor-1")
    context = gateway.context_of(issued, version=version)
    first = gateway.open(context).handshake(mqtt.connect("sensor-1"))
    first.ping()
    session = first.tls.session
    first.send(mqtt.DISCONNECT)
    first.read_end()
    again = gateway.open(context, session=session).handshake(mqtt.connect("sensor-1"))
    assert again.tls.session_reused, "the control: it does resume"
    again.ping()
    session = again.tls.session
    again.send(mqtt.DISCONNECT)
    again.read_end()
    gateway.call(gateway.revoked.add, issued.cert_serial)
    assert answer(gateway, context, session=session) == 5
    assert answer(gateway, context) == 5
    assert gateway.broker.counters.peers_refused == 2


def test_a_name_that_openssl_takes_and_we_do_not(gateway: RunningGateway) -> None:
    for name in ("+", "#", "a/b", "x" * 64):
        evil = gateway.pki.issuing.issue(cns=[name])
        assert answer(gateway, gateway.context_of(evil), client_id=name) == 5
    assert len(gateway.broker.exchange.sessions) == 0


def test_a_refused_client_leaves_nothing_behind(gateway: RunningGateway) -> None:
    """S3: on stock amqtt every refusal leaves a session for ever."""
    context = gateway.context("sensor-1")
    for number in range(50):
        client = gateway.open(context)
        client.send(mqtt.connect(f"other-{number}"))
        assert client.read_end() == [connack(2)]
        client.close()
    gateway.wait_for(lambda: len(gateway.broker._connections) == 0, "no connection is left")
    assert len(gateway.broker.exchange.sessions) == 0
    assert gateway.broker.exchange.router.count == 0


def test_clients_that_vanish_at_once_leave_nothing_behind(gateway: RunningGateway) -> None:
    """S8: on stock amqtt and Python 3.12 they stay for ever, and the stop hangs."""
    context = gateway.context("sensor-1")
    for _ in range(50):
        client = gateway.open(context)
        client.send(mqtt.connect("sensor-1"))
        client.close()
    gateway.wait_for(
        lambda: gateway.broker.counters.connections == 50 and len(gateway.broker._connections) == 0, "all gone"
    )
    assert gateway.broker.connected_count == 0


def test_a_handshake_in_slow_motion_is_ended(tmp_path: Path, pki: Pki) -> None:
    """S16."""
    with running_gateway(tmp_path, pki, limits=Limits(handshake_timeout_s=0.3)) as gateway:
        client = RawClient(socket.create_connection(("127.0.0.1", gateway.port), timeout=PATIENCE_S))
        gateway.clients.append(client)
        client.send(b"\x16\x03\x01")
        assert client.read_end() == []


def test_half_open_connections_make_room_for_newcomers(gateway: RunningGateway, monkeypatch: Any) -> None:
    monkeypatch.setattr("birthmark.broker.connections.MAX_HANDSHAKES", 10)
    idle = [socket.create_connection(("127.0.0.1", gateway.port), timeout=PATIENCE_S) for _ in range(15)]
    gateway.wait_for(lambda: gateway.broker.counters.connections == 15, "all accepted")
    assert gateway.broker.counters.handshakes_evicted == 5
    gateway.client("sensor-1").ping()
    for sock in idle:
        sock.close()


def test_too_many_connections_are_closed_at_once(tmp_path: Path, pki: Pki) -> None:
    with running_gateway(tmp_path, pki, limits=Limits(max_connections=2)) as gateway:
        first, second = gateway.client("sensor-1"), gateway.client("sensor-2")
        assert answer(gateway, gateway.context("sensor-3"), "sensor-3") is None
        first.ping()
        second.send(mqtt.DISCONNECT)
        second.read_end()
        second.close()
        gateway.wait_for(lambda: len(gateway.broker._connections) == 1, "there is room again")
        gateway.client("sensor-3").ping()


def test_out_of_descriptors_accepting_pauses_and_goes_on(
    gateway: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    first = gateway.client("sensor-1")
    context = gateway.context("sensor-2")
    waiting = socket.socket()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        waiting.connect(("127.0.0.1", gateway.port))
        gateway.wait_for(lambda: "pausing" in caplog.text, "the broker has noticed")
        first.ping()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    gateway.open(context).handshake(mqtt.connect("sensor-2"))
    waiting.close()


def test_ipv6_and_ipv4_on_one_port(tmp_path: Path, pki: Pki) -> None:
    sockets = bind("::", 0)
    port = sockets[0].getsockname()[1]
    for host in ("127.0.0.1", "::1"):
        socket.create_connection((host, port), timeout=PATIENCE_S).close()
    for sock in sockets:
        sock.close()
    with running_gateway(tmp_path, pki, listen_host="::1") as gateway:
        context = gateway.context("sensor-1")
        context.check_hostname = False
        gateway.open(context, host="::1").handshake(mqtt.connect("sensor-1")).ping()


def test_a_connection_has_the_options_of_the_socket_that_accepted_it() -> None:
    (listening,) = bind("127.0.0.1", 0)
    with listening, socket.create_connection(listening.getsockname(), timeout=PATIENCE_S):
        listening.settimeout(PATIENCE_S)
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if sys.platform == "linux":
                assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == IDLE_PROBE_S


def test_an_occupied_port_is_an_error_with_a_hint(tmp_path: Path, pki: Pki) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with (
            pytest.raises(SystemFailureError, match="could not listen on 127") as caught,
            running_gateway(tmp_path, pki, listen_port=taken.getsockname()[1]),
        ):
            pass
    assert "ss -ltnp" in caught.value.hint
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EADDRINUSE


@pytest.mark.parametrize("host", ["no such host", "a..b", "a" * 64 + ".b"])
def test_an_unknown_host_is_an_error_with_a_hint(host: str) -> None:
    with pytest.raises(SystemFailureError, match=f"could not listen on {host}: ") as caught:
        bind(host, 0)
    assert "0.0.0.0:8883" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("server.pem", None),
        ("server.pem", b"no pem"),
        ("clients-ca.pem", None),
        ("clients-ca.pem", b"no pem"),
    ],
)
def test_unusable_files_are_errors_with_a_hint(tmp_path: Path, pki: Pki, name: str, content: bytes | None) -> None:
    pki.write_broker_files(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=name) as caught:
        server_context(tmp_path / "server.pem", tmp_path / "clients-ca.pem")
    assert "birthmark issue-broker" in caught.value.hint


def test_a_key_that_is_not_the_certificates_or_is_encrypted_is_refused(tmp_path: Path, pki: Pki) -> None:
    pki.write_broker_files(tmp_path)
    other = pki.issuing.server("localhost")
    mine = pki.issuing.server("localhost")
    mixed = mine.pem[: mine.pem.index(b"-----BEGIN CERT")] + other.pem[other.pem.index(b"-----BEGIN CERT") :]
    (tmp_path / "server.pem").write_bytes(mixed)
    with pytest.raises(ConfigurationError, match="the key is not the certificate's"):
        server_context(tmp_path / "server.pem", tmp_path / "clients-ca.pem")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, pki: Pki, mode: int) -> None:
    pki.write_broker_files(tmp_path)
    (tmp_path / "server.pem").chmod(mode)
    with pytest.raises(ConfigurationError, match="others than its owner may read it") as caught:
        server_context(tmp_path / "server.pem", tmp_path / "clients-ca.pem")
    assert caught.value.hint == f"chmod 600 {tmp_path / 'server.pem'}"
    (tmp_path / "server.pem").chmod(0o400)
    assert server_context(tmp_path / "server.pem", tmp_path / "clients-ca.pem")


def test_a_client_s_certificate_is_refused_as_the_broker_s(tmp_path: Path, pki: Pki) -> None:
    pki.write_broker_files(tmp_path)
    pki.device("sensor-1").write(tmp_path / "server.pem")
    with pytest.raises(ConfigurationError, match="not a server's"):
        server_context(tmp_path / "server.pem", tmp_path / "clients-ca.pem")


def test_credentials_that_are_no_pem_are_said_to_be_none(tmp_path: Path, pki: Pki) -> None:
    pki.write_broker_files(tmp_path)
    (tmp_path / "server.pem").write_text("garbage")
    with pytest.raises(ConfigurationError, match="no PEM of a key and its certificate"):
        server_context(tmp_path / "server.pem", tmp_path / "clients-ca.pem")


def test_large_data_both_ways_under_tls(gateway: RunningGateway) -> None:
    """More than the socket's buffers: writes that wait, reads that go on, and both at once."""
    free = gateway.client("free-1").subscribed(("echo", 1))
    payload = os.urandom(900_000)
    for number in range(1, 6):
        free.send(mqtt.publish("echo", payload, qos=1, pid=number))
    deliveries = acknowledgements = 0
    while deliveries < 5 or acknowledgements < 5:
        packet = free.read()
        if packet.first == 0x40:
            acknowledgements += 1
        else:
            assert mqtt.delivery(packet).payload == payload
            free.send(mqtt.puback(mqtt.delivery(packet).packet_id))
            deliveries += 1
    free.ping()
