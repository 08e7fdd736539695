"""Every way in which a connection can fail says which check failed, over real sockets and real TLS."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import socket
import ssl
import threading
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from support.broker_stub import BrokerStub
from support.device_folder import enrolled
from support.patience import PATIENCE_S
from support.pki import CLIENT, SERVER, Pki, crl_pem, now
from support.ports import steady_port
from support.watching import Watching

from birthmark.device.backoff import Backoff, RetryTimer
from birthmark.device.client import Client
from birthmark.device.connection_checks import Check
from birthmark.device.errors import ConnectionFailedError, RefusedError, UnreachableError
from birthmark.device.events import Connected, Disconnected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DAY = dt.timedelta(days=1)
REFUSED, UNREACHABLE = RefusedError, UnreachableError
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


def failure(
    state: Path,
    kind: type[ConnectionFailedError],
    check: Check,
    *,
    clock: Callable[[], dt.datetime] = now,
    connect_timeout_s: float = PATIENCE_S,
) -> ConnectionFailedError:
    """Connect once, and return the failure it must meet."""
    client = Client.from_folder(state, connect_timeout_s=connect_timeout_s, now=clock)
    with pytest.raises(ConnectionFailedError) as failed:
        client.connect()
    assert type(failed.value) is kind, failed.value
    assert failed.value.check == check, failed.value
    assert failed.value.message.startswith("could not connect to ")
    assert failed.value.hint
    assert not client.is_connected
    return failed.value


@contextlib.contextmanager
def plain_server(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """Something that is no TLS server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = threading.Event()

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    talk(connection)
                    done.wait(PATIENCE_S)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        done.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE_S)


def test_no_such_host(tmp_path: Path, pki: Pki) -> None:
    error = failure(enrolled(tmp_path / "s", pki, host="no-such-host.invalid"), UNREACHABLE, Check.HOST_NAME)
    assert "no-such-host.invalid" in error.message


def test_a_host_name_that_no_name_server_would_take(tmp_path: Path, pki: Pki) -> None:
    failure(enrolled(tmp_path / "s", pki, host="a..b"), UNREACHABLE, Check.HOST_NAME)


def test_nobody_listens(tmp_path: Path, pki: Pki) -> None:
    error = failure(enrolled(tmp_path / "s", pki, port=steady_port()), UNREACHABLE, Check.NETWORK)
    assert "nothing listens on that port" in error.message


def test_nobody_answers_the_handshake(tmp_path: Path, pki: Pki) -> None:
    with plain_server(lambda _: None) as port:
        error = failure(
            enrolled(tmp_path / "s", pki, port=port), UNREACHABLE, Check.NO_ANSWER, connect_timeout_s=1
        )
    assert "did not finish the TLS handshake" in error.message


def test_something_else_than_tls(tmp_path: Path, pki: Pki) -> None:
    with plain_server(lambda connection: connection.sendall(b"220 smtp.example ESMTP\r\n")) as port:
        error = failure(enrolled(tmp_path / "s", pki, port=port), REFUSED, Check.TLS)
    assert "does not speak TLS" in error.message


def test_closed_in_the_middle_of_the_handshake(tmp_path: Path, pki: Pki) -> None:
    def hang_up(connection: socket.socket) -> None:
        connection.recv(100)
        connection.shutdown(socket.SHUT_RDWR)

    with plain_server(hang_up) as port:
        failure(enrolled(tmp_path / "s", pki, port=port), UNREACHABLE, Check.TLS)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_broker_s_certificate_has_expired(tmp_path: Path, pki: Pki, version: ssl.TLSVersion) -> None:
    began, ended = now() - 9 * DAY, now() - DAY
    server = pki.issuing.issue(ous=[], usages=[SERVER], san=_hosts(), not_before=began, not_after=ended)
    with BrokerStub(pki, server=server, highest_tls=version) as broker:
        error = failure(enrolled(tmp_path / "s", pki, port=broker.port), REFUSED, Check.SERVER_EXPIRED)
    assert "by this clock it is" in error.message
    if version is ssl.TLSVersion.TLSv1_3:  # before that, no server shows its certificate to a stranger
        assert f"from {began:%Y-%m-%d %H:%M:%S} UTC to {ended:%Y-%m-%d %H:%M:%S} UTC" in error.message


def test_the_broker_s_certificate_is_not_yet_valid(tmp_path: Path, pki: Pki) -> None:
    begins = now() + DAY
    server = pki.issuing.issue(ous=[], usages=[SERVER], san=_hosts(), not_before=begins)
    with BrokerStub(pki, server=server) as broker:
        error = failure(enrolled(tmp_path / "s", pki, port=broker.port), UNREACHABLE, Check.CLOCK)
    assert "not yet valid" in error.message
    assert f"{begins:%Y-%m-%d %H:%M:%S} UTC" in error.message


def test_the_broker_is_of_another_ca_with_the_same_name(tmp_path: Path, pki: Pki) -> None:
    with BrokerStub(pki, server=pki.stranger.server("127.0.0.1")) as broker:
        failure(enrolled(tmp_path / "s", pki, port=broker.port), REFUSED, Check.SERVER_CA)


@pytest.mark.parametrize("name", ["gateway-1.example.com", "127.0.0.2"])
def test_the_broker_s_certificate_is_for_another_name(tmp_path: Path, pki: Pki, name: str) -> None:
    with BrokerStub(pki, server=pki.issuing.server(name)) as broker:
        error = failure(enrolled(tmp_path / "s", pki, port=broker.port), REFUSED, Check.SERVER_NAME)
    assert "not for 127.0.0.1" in error.message
    assert "birthmark issue-broker 127.0.0.1" in error.hint


def test_a_device_that_plays_the_broker(tmp_path: Path, pki: Pki) -> None:
    server = pki.issuing.issue(usages=[CLIENT], san=_hosts())
    with BrokerStub(pki, server=server) as broker:
        failure(enrolled(tmp_path / "s", pki, port=broker.port), REFUSED, Check.SERVER_CERTIFICATE)


def test_a_broker_s_certificate_that_breaks_rfc_5280(tmp_path: Path, pki: Pki) -> None:
    server = pki.issuing.issue(ous=[], usages=[SERVER], san=_hosts(), authority_key_id=None)
    with BrokerStub(pki, server=server) as broker:
        failure(enrolled(tmp_path / "s", pki, port=broker.port), REFUSED, Check.SERVER_CERTIFICATE)


@pytest.mark.parametrize("version", VERSIONS)
def test_our_certificate_is_revoked(tmp_path: Path, pki: Pki, version: ssl.TLSVersion) -> None:
    leaf = pki.device("sensor-1")
    crl = crl_pem(pki.issuing.crl([leaf.cert_serial]))
    with BrokerStub(pki, crl_pem=crl, highest_tls=version) as broker:
        error = failure(enrolled(tmp_path / "s", pki, leaf, port=broker.port), REFUSED, Check.REVOKED)
    assert "as sensor-1" in error.message
    assert "revoked" in error.message


@pytest.mark.parametrize("version", VERSIONS)
def test_our_certificate_has_expired(tmp_path: Path, pki: Pki, version: ssl.TLSVersion) -> None:
    ended = now() - DAY
    leaf = pki.issuing.issue(not_before=now() - 9 * DAY, not_after=ended)
    with BrokerStub(pki, highest_tls=version) as broker:
        error = failure(enrolled(tmp_path / "s", pki, leaf, port=broker.port), REFUSED, Check.EXPIRED)
    assert f"to {ended:%Y-%m-%d %H:%M:%S} UTC, and by this clock it is" in error.message


@pytest.mark.parametrize("version", VERSIONS)
def test_our_ca_is_unknown(tmp_path: Path, pki: Pki, version: ssl.TLSVersion) -> None:
    with BrokerStub(pki, clients_ca=Pki.create().root, highest_tls=version) as broker:
        error = failure(enrolled(tmp_path / "s", pki, port=broker.port), REFUSED, Check.UNKNOWN_CA)
    assert "reflash" in error.hint, "its CA may have been retired"


@pytest.mark.parametrize("version", VERSIONS)
def test_our_certificate_is_not_a_client_s(tmp_path: Path, pki: Pki, version: ssl.TLSVersion) -> None:
    leaf = pki.issuing.issue(usages=[SERVER])
    with BrokerStub(pki, highest_tls=version) as broker:
        failure(enrolled(tmp_path / "s", pki, leaf, port=broker.port), REFUSED, Check.CERTIFICATE)


def test_closed_without_a_word(tmp_path: Path, pki: Pki) -> None:
    with BrokerStub(pki, closes_before_connack=True) as broker:
        error = failure(enrolled(tmp_path / "s", pki, port=broker.port), REFUSED, Check.CLOSED)
    assert "without a word" in error.message


def test_closed_without_a_word_and_our_certificate_is_out_of_date(tmp_path: Path, pki: Pki) -> None:
    with BrokerStub(pki, closes_before_connack=True) as broker:
        leaf = pki.issuing.issue(not_before=now() - 9 * DAY, not_after=now() + DAY)
        state = enrolled(tmp_path / "s", pki, leaf, port=broker.port)
        error = failure(state, REFUSED, Check.EXPIRED, clock=lambda: now() + 2 * DAY)
    assert "our certificate is expired" in error.message


@pytest.mark.parametrize(
    ("code", "kind", "check"),
    [
        (1, REFUSED, Check.MQTT_VERSION),
        (2, REFUSED, Check.CLIENT_ID),
        (3, UNREACHABLE, Check.BROKER_UNAVAILABLE),
        (4, REFUSED, Check.NOT_AUTHORISED),
        (5, REFUSED, Check.NOT_AUTHORISED),
        (99, REFUSED, Check.MQTT),
    ],
)
def test_connack(tmp_path: Path, pki: Pki, code: int, kind: type[ConnectionFailedError], check: Check) -> None:
    with BrokerStub(pki, connack=code) as broker:
        error = failure(enrolled(tmp_path / "s", pki, port=broker.port), kind, check)
        assert len(broker.resumed) == 1  # it asked once, and did not fall back to another version of MQTT
    assert f"CONNACK {code}" in error.message or f"code {code}" in error.message


def test_something_else_than_mqtt(tmp_path: Path, pki: Pki) -> None:
    with BrokerStub(pki, answer=b"HTTP/1.1 400 Bad Request\r\n\r\n") as broker:
        failure(enrolled(tmp_path / "s", pki, port=broker.port), REFUSED, Check.MQTT)


def test_connect_is_not_answered(tmp_path: Path, pki: Pki) -> None:
    with BrokerStub(pki, connack=None) as broker:
        state = enrolled(tmp_path / "s", pki, port=broker.port)
        error = failure(state, UNREACHABLE, Check.NO_ANSWER, connect_timeout_s=3)
    assert "did not answer CONNECT within 3 s" in error.message


def test_a_broker_that_falls_silent(tmp_path: Path, pki: Pki) -> None:
    with BrokerStub(pki, answers_pings=False) as broker:
        state = enrolled(tmp_path / "s", pki, port=broker.port, keepalive_s=1)
        watching = Watching()
        with Client.from_folder(state, observe=watching, retry=RetryTimer(unreachable=Backoff(0.01, 0.01))):
            error = watching.wait_for(Disconnected).error
            assert error.check == Check.NO_ANSWER
            assert "nothing was heard for 1 s" in error.message
            watching.wait_for(Connected, 2)


def _hosts() -> list[x509.GeneralName]:
    return [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
