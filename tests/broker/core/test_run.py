"""`birthmark-broker run` as a process: start, signals, lock, log, and a stop under load."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from support import mqtt_client as mqtt
from support.mqtt_client import RawClient, client_context
from support.mqtt_gateway import POLICY_TOML
from support.mqtt_process import BROKER_TOML, broker_process, write_files
from support.patience import PATIENCE_S

from birthmark.device.systemd import watchdog_interval_s

if TYPE_CHECKING:
    import ssl
    from pathlib import Path

    from support.pki import Pki


def context(folder: Path, pki: Pki, name: str = "sensor-1") -> ssl.SSLContext:
    return client_context(pki.device(name).write(folder / f"{name}.pem"), folder / "root.pem")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_when_it_is_ready_and_stops_in_good_order(
    tmp_path: Path, pki: Pki, number: signal.Signals
) -> None:
    config = write_files(tmp_path, pki)
    notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notified.settimeout(PATIENCE_S)
    notified.bind(str(tmp_path / "notify"))
    with (
        notified,
        broker_process(config, environment={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}) as broker,
    ):
        with RawClient.connect(broker.port, context(tmp_path, pki)) as client:
            client.handshake(mqtt.connect("sensor-1")).ping()
            assert broker.wait_for_log("sensor-1 connected")["event"] == "connected"
            assert broker.out[0]["gateway"] == "localhost"
            broker.process.send_signal(number)
            assert client.read_end() == []
        assert broker.process.wait(PATIENCE_S) == 0
        assert broker.wait_for_event("stopped")["counters"]["clients_connected"] == 1
        assert [notified.recv(100), notified.recv(100)] == [b"READY=1", b"STOPPING=1"]


def test_its_keys_stay_out_of_core_files(tmp_path: Path, pki: Pki) -> None:
    with broker_process(write_files(tmp_path, pki)) as broker:
        assert broker.port
        assert resource.prlimit(broker.process.pid, resource.RLIMIT_CORE) == (0, 0)


def test_the_watchdog_of_systemd_is_fed_from_the_loop(tmp_path: Path, pki: Pki) -> None:
    environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "100000"}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.settimeout(PATIENCE_S)
        notified.bind(str(tmp_path / "notify"))
        with broker_process(write_files(tmp_path, pki), environment=environment) as broker:
            told = [notified.recv(100) for _ in range(6)]
            assert told.count(b"READY=1") == 1
            assert told.count(b"WATCHDOG=1") == 5
            broker.process.send_signal(signal.SIGTERM)
            assert broker.process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(
    ("environment", "interval_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_for_the_process_that_systemd_means(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], interval_s: float | None
) -> None:
    for key in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert watchdog_interval_s() == interval_s


def test_a_second_broker_on_the_same_folder_is_refused(tmp_path: Path, pki: Pki) -> None:
    config = write_files(tmp_path, pki)
    with broker_process(config) as first:
        assert first.port
        with broker_process(config) as second:
            assert second.process.wait(PATIENCE_S) == 5
            assert "another broker runs" in second.wait_for_failure()["error"]
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(PATIENCE_S) == 0
    with broker_process(config) as third:
        assert third.port, "the lock went with its holder"


def test_an_occupied_port_is_exit_code_5_with_a_hint(tmp_path: Path, pki: Pki) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with broker_process(write_files(tmp_path, pki), "--listen", f"127.0.0.1:{port}") as broker:
            assert broker.process.wait(PATIENCE_S) == 5
            failure = broker.wait_for_failure()
            assert failure["error"] == f"could not listen on 127.0.0.1, port {port}: Address already in use"
            assert "ss -ltnp" in failure["hint"]
    assert not broker.out


def test_sighup_takes_up_a_new_policy_and_keeps_the_old_one_over_a_bad_one(tmp_path: Path, pki: Pki) -> None:
    config = write_files(tmp_path, pki, broker_toml=BROKER_TOML + "[revocation]\nwatch_interval_s = 3600\n")
    with broker_process(config) as broker, RawClient.connect(broker.port, context(tmp_path, pki)) as client:
        client.handshake(mqtt.connect("sensor-1"))
        client.subscribed(("devices/sensor-1/#", 0))
        (tmp_path / "policy.toml").write_bytes(b"no toml")
        broker.process.send_signal(signal.SIGHUP)
        assert "policy.toml" in broker.wait_for_log("policy.toml")["message"]
        client.subscribed(("devices/sensor-1/#", 1), pid=2)
        (tmp_path / "policy.toml").write_bytes(POLICY_TOML.replace(b'"devices/{id}/#", "fleet', b'"fleet'))
        broker.process.send_signal(signal.SIGHUP)
        broker.wait_for_log("a new policy is in force")
        client.send(mqtt.subscribe(3, ("devices/sensor-1/#", 0)))
        assert client.read() == mqtt.suback(3, 0x80)


def test_it_stops_under_load(tmp_path: Path, pki: Pki) -> None:
    """S17: publishers at full speed, one subscriber that reads and one that does not."""
    with broker_process(write_files(tmp_path, pki)) as broker:
        port = broker.port
        deaf = RawClient.connect(port, context(tmp_path, pki, "free-1")).handshake(mqtt.connect("free-1"))
        deaf.subscribed(("load", 0))
        reader = RawClient.connect(port, context(tmp_path, pki, "free-2")).handshake(mqtt.connect("free-2"))
        reader.subscribed(("load", 1))
        publisher = RawClient.connect(port, context(tmp_path, pki, "free-3")).handshake(mqtt.connect("free-3"))
        flowing = threading.Event()

        def publish() -> None:
            burst = mqtt.publish("load", bytes(500)) * 200
            with contextlib.suppress(OSError):
                while True:
                    publisher.send(burst)
                    flowing.set()

        thread = threading.Thread(target=publish)
        thread.start()
        assert flowing.wait(PATIENCE_S)
        for _ in range(1_000):
            reader.read()
        broker.process.send_signal(signal.SIGTERM)
        assert broker.process.wait(PATIENCE_S) == 0
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        for client in (deaf, reader, publisher):
            client.close()


FROZEN = """
import atexit, gc, sys
from birthmark.broker.__main__ import main
atexit.register(lambda: print("frozen", gc.get_freeze_count(), flush=True))
main()
"""


def test_the_interpreter_ends_without_a_look_through_all_that_was_kept(tmp_path: Path, pki: Pki) -> None:
    """With two million messages in queues, looking for cycles among them kept the process for eight seconds."""
    config = write_files(tmp_path, pki)
    with config.open("a") as file:
        file.write('\n[renewal_listener]\nlisten = "127.0.0.1:0"\n')
    process = subprocess.Popen(
        [sys.executable, "-c", FROZEN, "run", "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read().split()
    assert process.returncode == 0
    address = r"127\.0\.0\.1:[0-9]+"
    assert re.fullmatch(
        f"ready: gateway .+ listens on {address}, mutual TLS only; on {address} for the renewal of .+\n", ready
    )
    assert said[-2] == "frozen"
    assert int(said[-1]) > 10_000, "all that there is, the modules' own objects among it"


def test_a_key_that_others_may_read_is_said_before_anything_listens(tmp_path: Path, pki: Pki) -> None:
    config = write_files(tmp_path, pki)
    (tmp_path / "server.pem").chmod(0o640)
    with broker_process(config) as broker:
        assert broker.process.wait(PATIENCE_S) == 1
        assert broker.wait_for_failure()["hint"] == f"chmod 600 {tmp_path / 'server.pem'}"
        assert not broker.out


def test_a_missing_file_is_said_before_anything_listens(tmp_path: Path, pki: Pki) -> None:
    config = write_files(tmp_path, pki)
    (tmp_path / "server.pem").unlink()
    with broker_process(config) as broker:
        assert broker.process.wait(PATIENCE_S) == 1
        assert "server.pem" in broker.wait_for_failure()["error"]
        assert broker.wait_for_failure()["hint"]
