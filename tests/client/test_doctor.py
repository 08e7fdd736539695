"""`birthmark-device doctor`: each step of the way fails once, and the last line says what to do about it."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support.broker_process import BrokerProcess
from support.broker_stub import CONNECT, DISCONNECT, PUBACK, PUBLISH, SUBSCRIBE, UNSUBSCRIBE, BrokerStub
from support.device_command import DeviceCommand, needs_faketime, run
from support.device_folder import enrolled
from support.pki import Pki, crl_pem, now
from support.ports import steady_port
from support.waiting import eventually

from birthmark.device.record import read_record

if TYPE_CHECKING:
    from pathlib import Path

DAY = dt.timedelta(days=1)


def doctor(state: Path, *arguments: str, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any], int]:
    """Return the steps, the verdict and the exit code."""
    done = run("doctor", "--state", state, "--json", "--timeout", "60", *arguments, **options)
    assert done.stderr == ""
    *steps, verdict = map(json.loads, done.stdout.splitlines())
    assert verdict["exit_code"] == done.returncode
    return steps, verdict, done.returncode


def failed_at(state: Path, *arguments: str, **options: Any) -> tuple[str, str, int, str]:
    """Return where it ended, with which check and code, and what is to be done."""
    steps, verdict, code = doctor(state, *arguments, **options)
    assert [step["outcome"] for step in steps].count("failed") == 1
    assert steps[-1]["outcome"] == "failed"
    assert verdict["verdict"] == steps[-1]["said"]
    assert verdict["hint"]
    return steps[-1]["step"], steps[-1]["check"], code, verdict["hint"]


def test_all_is_well(tmp_path: Path, pki: Pki, gateway: BrokerProcess) -> None:
    state = enrolled(tmp_path / "s", pki, port=gateway.port)
    before = sorted(path.name for path in state.iterdir())
    steps, verdict, code = doctor(state)
    assert code == 0
    assert [step["step"] for step in steps] == [
        "clock",
        "own certificate",
        "name",
        "TCP",
        "TLS",
        "anchor 1 (Test Root CA)",
        "server certificate",
        "CONNECT",
        "subscribe",
        "publish",
    ]
    assert {step["outcome"] for step in steps} == {"ok"}
    assert verdict["verdict"] == f"nothing stands between sensor-1 and 127.0.0.1:{gateway.port}"
    assert sorted(path.name for path in state.iterdir()) == before
    told = run("doctor", "--state", state)
    assert told.stdout.splitlines()[-1] == verdict["verdict"]


def test_a_client_that_is_connected_is_not_thrown_out(tmp_path: Path, pki: Pki, gateway: BrokerProcess) -> None:
    state = enrolled(tmp_path / "s", pki, port=gateway.port, name="busy-1")
    with DeviceCommand("run", "--state", state, "--simulate", "--interval", "0.05", "--json") as device:
        device.wait_for("connected")
        eventually(lambda: (record := read_record(state)) and record.state == "connected", "a record")
        steps, _, code = doctor(state)
        assert code == 0
        assert [step["step"] for step in steps[-2:]] == ["handshake", "CONNECT"]
        assert [step["outcome"] for step in steps[-2:]] == ["ok", "skipped"]
        published = len(device.records)
        device.wait_for("published", count=published + 3)
        assert not [record for record in device.records if record["event"] == "disconnected"]


def test_nothing_is_changed_at_the_broker(tmp_path: Path, pki: Pki) -> None:
    """The device's own session, no will, no presence; what was subscribed is unsubscribed, what waits stays."""
    with BrokerStub(pki) as broker:
        state = enrolled(tmp_path / "s", pki, port=broker.port)

        def deliver() -> None:
            broker.wait_for(SUBSCRIBE)
            broker.deliver("devices/sensor-1/commands/reboot", b"", qos=1)

        delivering = threading.Thread(target=deliver)
        delivering.start()
        steps, _, code = doctor(state, "--timeout", "4")
        delivering.join()
        assert (code, steps[-1]["outcome"]) == (0, "skipped")  # this broker tells no time
        assert "policy explain sensor-1 publish" in steps[-1]["said"]
        hello = broker.wait_for(CONNECT).body
        assert hello[7] == 0  # neither clean session nor will
        broker.wait_for(DISCONNECT)
    asked = [name for packet in broker.packets if packet.kind == SUBSCRIBE for name in packet.filters]
    dropped = b"".join(packet.body for packet in broker.packets if packet.kind == UNSUBSCRIBE)
    assert asked
    assert not any(packet.kind == PUBACK for packet in broker.packets), "it is the client's to take"
    assert all(name.encode() in dropped for name in asked)
    assert [packet.topic for packet in broker.packets if packet.kind == PUBLISH] == [
        "devices/sensor-1/time/request"
    ]


def test_the_name(tmp_path: Path, pki: Pki) -> None:
    state = enrolled(tmp_path / "s", pki)
    step, check, code, hint = failed_at(state, "--broker", "no-such-host.invalid:8883")
    assert (step, check, code) == ("name", "host-name", 4)
    assert "name server" in hint


def test_tcp(tmp_path: Path, pki: Pki) -> None:
    assert failed_at(enrolled(tmp_path / "s", pki, port=steady_port()))[:3] == ("TCP", "network", 4)


def test_something_else_than_tls(tmp_path: Path, pki: Pki) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    connection.sendall(b"220 smtp.example ESMTP\r\n")
                    connection.recv(1000)

        threading.Thread(target=greet, daemon=True).start()
        step, check, code, hint = failed_at(enrolled(tmp_path / "s", pki, port=listener.getsockname()[1]))
        listener.shutdown(socket.SHUT_RDWR)
    assert (step, check, code) == ("TLS", "tls", 3)
    assert "check the port" in hint


def test_each_anchor_is_tried(tmp_path: Path, pki: Pki) -> None:
    with BrokerStub(pki, server=Pki.create().issuing.server("127.0.0.1")) as broker:
        state = enrolled(tmp_path / "s", pki, port=broker.port)
        steps, _, _ = doctor(state)
        assert failed_at(state)[:3] == ("server certificate", "server-ca", 3)
    anchor = next(step for step in steps if step["step"].startswith("anchor 1"))
    assert anchor["outcome"] == "skipped"
    assert "not from a CA that this identity trusts" in anchor["said"]


def test_the_broker_s_name_and_its_end(tmp_path: Path, pki: Pki) -> None:
    with BrokerStub(pki, server=pki.issuing.server("elsewhere.example")) as broker:
        assert failed_at(enrolled(tmp_path / "a", pki, port=broker.port))[:3] == (
            "server certificate",
            "server-name",
            3,
        )
    ended = pki.issuing.server("127.0.0.1", not_before=now() - 9 * DAY, not_after=now() - DAY)
    with BrokerStub(pki, server=ended) as broker:
        step, check, code, hint = failed_at(enrolled(tmp_path / "b", pki, port=broker.port))
    assert (step, check, code) == ("server certificate", "server-expired", 3)
    assert "issue-broker" in hint


@needs_faketime
def test_a_clock(tmp_path: Path, pki: Pki, gateway: BrokerProcess) -> None:
    state = enrolled(tmp_path / "s", pki, port=gateway.port)
    steps, _, code = doctor(state, at="1970-01-01 12:00:00")
    assert code == 0
    assert steps[0]["said"].startswith("1970-01-01 12:00 UTC, which is wrong: ")
    step, check, code, hint = failed_at(state, at="2099-01-01 12:00:00")
    assert (step, check, code) == ("server certificate", "clock", 4)
    assert hint.startswith("set the clock")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_our_certificate(tmp_path: Path, pki: Pki, version: ssl.TLSVersion) -> None:
    leaf = pki.device()
    crl = crl_pem(pki.issuing.crl([leaf.cert_serial]))
    with BrokerStub(pki, crl_pem=crl, highest_tls=version) as broker:
        step, check, code, hint = failed_at(enrolled(tmp_path / "a", pki, leaf, port=broker.port))
    assert (check, code) == ("revoked", 3)
    assert step == ("CONNECT" if version is ssl.TLSVersion.TLSv1_3 else "server certificate")
    assert "enrol the board anew" in hint
    leaf = pki.issuing.issue(not_before=now() - 9 * DAY, not_after=now() - DAY)
    with BrokerStub(pki, highest_tls=version) as broker:
        state = enrolled(tmp_path / "b", pki, leaf, port=broker.port)
        steps, _, _ = doctor(state)
        assert failed_at(state)[1:3] == ("expired", 3)
    assert "it is expired" in steps[1]["said"]


def test_revoked_at_a_real_gateway(tmp_path: Path, pki: Pki) -> None:
    leaf = pki.device("lost-1")
    with BrokerProcess(tmp_path / "broker", pki) as broker:
        broker.revoke(leaf.cert_serial)
        state = enrolled(tmp_path / "s", pki, leaf, port=broker.port, name="lost-1")
        eventually(lambda: doctor(state)[2] == 3, "refused")
        step, check, _, hint = failed_at(state)
    assert (step, check) == ("CONNECT", "not-authorised")
    assert "gateway's log" in hint


def test_connect(tmp_path: Path, pki: Pki) -> None:
    with BrokerStub(pki, connack=2) as broker:
        assert failed_at(enrolled(tmp_path / "a", pki, port=broker.port))[:3] == ("CONNECT", "client-id", 3)
        broker.connack, broker.answer = 0, b"HTTP/1.1 400 Bad Request\r\n\r\n"
        assert failed_at(enrolled(tmp_path / "b", pki, port=broker.port))[:3] == ("CONNECT", "mqtt", 3)


def test_the_policy(tmp_path: Path, pki: Pki) -> None:
    with BrokerStub(pki, suback=0x80) as broker:
        step, check, code, hint = failed_at(enrolled(tmp_path / "s", pki, port=broker.port))
    assert (step, check, code) == ("subscribe", "not-authorised", 3)
    assert "policy explain" in hint


def test_no_credentials(tmp_path: Path) -> None:
    done = run("doctor", "--state", tmp_path, "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "enrol the board first" in done.stderr
