"""What the TLS socket does for a client, seen from below."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import TYPE_CHECKING, Any, cast

import pytest
from support.broker_stub import CONNECT, BrokerStub
from support.device_folder import enrolled
from support.patience import PATIENCE_S
from support.pki import Pki, crl_pem

from birthmark.device import tls
from birthmark.device.credentials import Credentials
from birthmark.device.tls import DeviceContext, DeviceSocket, device_context

if TYPE_CHECKING:
    from pathlib import Path

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
CONNECT_PACKET = b"\x10\x14\0\x04MQTT\x04\x02\0\x3c\0\x08sensor-1"


def connected(context: DeviceContext, broker: BrokerStub) -> DeviceSocket:
    plain = socket.create_connection(("127.0.0.1", broker.port), timeout=PATIENCE_S)
    return context.wrap_socket(plain, server_hostname="127.0.0.1")


def context_for(tmp_path: Path, pki: Pki, **options: object) -> DeviceContext:
    return device_context(Credentials.from_folder(enrolled(tmp_path / "state", pki, **options)))  # type: ignore[arg-type]


def test_small_packets_do_not_wait(tmp_path: Path, pki: Pki) -> None:
    with BrokerStub(pki) as broker, connected(context_for(tmp_path, pki), broker) as connection:
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_strictest_settings(tmp_path: Path, pki: Pki) -> None:
    context = context_for(tmp_path, pki)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.verify_flags & ssl.VERIFY_X509_STRICT
    assert [ca["serialNumber"] for ca in context.get_ca_certs()] == [f"{pki.root.certificate.serial_number:040X}"]


def leave_an_error(folder: Path, pki: Pki) -> None:
    """Have OpenSSL keep an error of this thread's: an alert that is in when a connection is shut down."""
    pki.write_broker_files(folder)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(folder / "server.pem")
    serving.verify_mode = ssl.CERT_REQUIRED
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = serving.wrap_bio(there, back, server_side=True)
    client = ssl.create_default_context(cafile=folder / "root.pem").wrap_bio(
        back, there, server_hostname="localhost"
    )
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    with contextlib.suppress(ssl.SSLWantReadError):
        server.do_handshake()
    client.do_handshake()
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        server.do_handshake()
    client.unwrap()


def test_what_another_connection_left_in_openssl_is_no_fault_of_the_anchors(tmp_path: Path, pki: Pki) -> None:
    credentials = Credentials.from_folder(enrolled(tmp_path / "state", pki))
    leave_an_error(tmp_path, pki)
    assert len(device_context(credentials).get_ca_certs()) == 1


def send_for_ever(connection: DeviceSocket) -> None:
    while True:
        connection.send(bytes(16_384))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_next_connection_resumes_the_session(tmp_path: Path, pki: Pki, version: ssl.TLSVersion) -> None:
    context = context_for(tmp_path, pki)
    with BrokerStub(pki, highest_tls=version) as broker:
        for expected in (False, True, True):
            with connected(context, broker) as connection:
                connection.sendall(CONNECT_PACKET)
                assert connection.recv(4) == b"\x20\x02\0\0"  # with TLS 1.3 the ticket comes along with this
                assert connection.session_reused is expected
        broker.wait_for(CONNECT, count=3)
        assert broker.resumed == [False, True, True]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("leaks", [True, False])
def test_where_a_session_leaks_it_is_asked_for_after_full_handshakes_alone(
    tmp_path: Path, pki: Pki, version: ssl.TLSVersion, monkeypatch: pytest.MonkeyPatch, *, leaks: bool
) -> None:
    asked: list[bool] = []
    taken: Any = ssl.SSLSocket.session

    def session(connection: DeviceSocket) -> ssl.SSLSession | None:
        asked.append(bool(connection.session_reused))
        return cast("ssl.SSLSession | None", taken.fget(connection))

    monkeypatch.setattr(tls, "SESSION_LEAKS", leaks)
    monkeypatch.setattr(DeviceSocket, "session", property(session, taken.fset))
    context = context_for(tmp_path, pki)
    with BrokerStub(pki, highest_tls=version) as broker:
        for number in range(4):
            with connected(context, broker) as connection:
                connection.sendall(CONNECT_PACKET)
                assert connection.recv(4) == b"\x20\x02\0\0"
                if number == 2:
                    connection.forget_session()
        broker.wait_for(CONNECT, count=4)
        assert broker.resumed == [False, True, True, False]
    assert asked == ([False, False] if leaks else [False, True, False])


def test_a_session_is_kept_for_its_own_broker_only(tmp_path: Path, pki: Pki) -> None:
    context = context_for(tmp_path, pki)
    with BrokerStub(pki) as broker, connected(context, broker) as connection:
        connection.sendall(CONNECT_PACKET)
        connection.recv(4)
    assert list(context.sessions) == ["127.0.0.1"]


def test_the_alert_after_the_handshake_is_kept(tmp_path: Path, pki: Pki) -> None:
    leaf = pki.device("sensor-1")
    context = context_for(tmp_path, pki, issued=leaf)
    with BrokerStub(pki, crl_pem=crl_pem(pki.issuing.crl([leaf.cert_serial]))) as broker:
        connection = connected(context, broker)  # TLS 1.3: our side is done before the broker has judged us
        with pytest.raises(ssl.SSLError):
            connection.recv(1)
        assert isinstance(connection.failure, ssl.SSLError)
        assert "CERTIFICATE_REVOKED" in str(connection.failure.reason)
        connection.close()
    assert context.sessions == {}


def test_the_alert_is_found_behind_a_write_that_failed(tmp_path: Path, pki: Pki) -> None:
    leaf = pki.device("sensor-1")
    context = context_for(tmp_path, pki, issued=leaf)
    with BrokerStub(pki, crl_pem=crl_pem(pki.issuing.crl([leaf.cert_serial]))) as broker:
        connection = connected(context, broker)
        with pytest.raises(OSError):  # noqa: PT011 - whichever way the system puts it
            send_for_ever(connection)
        assert isinstance(connection.failure, ssl.SSLError)
        assert "CERTIFICATE_REVOKED" in str(connection.failure.reason)
        connection.close()


def test_the_first_bytes_are_kept_however_they_come(tmp_path: Path, pki: Pki) -> None:
    with (
        BrokerStub(pki, answer=b"\x20\x02\0\x05tail") as broker,
        connected(context_for(tmp_path, pki), broker) as connection,
    ):
        connection.sendall(CONNECT_PACKET)
        assert [connection.recv(count) for count in (1, 2)] == [b"\x20", b"\x02\0"]
        connection.recv(100)
        assert connection.head == b"\x20\x02\0\x05"


def test_a_failed_handshake_leaves_no_open_socket(tmp_path: Path, pki: Pki) -> None:
    context = context_for(tmp_path, pki)
    with BrokerStub(pki, server=pki.stranger.server("127.0.0.1")) as broker:
        plain = socket.create_connection(("127.0.0.1", broker.port), timeout=PATIENCE_S)
        wrapped = context.wrap_socket(plain, server_hostname="127.0.0.1", do_handshake_on_connect=False)
        with pytest.raises(ssl.SSLCertVerificationError):
            wrapped.do_handshake()
        assert wrapped.fileno() == -1
