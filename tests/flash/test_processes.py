"""`birthmark flash` and the device's agent as real processes on real ptys, killed, unplugged and crossed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from support.board_agent import AgentProcess, AgentThread
from support.board_cable import Cable
from support.board_killed import session
from support.patience import PATIENCE_S
from support.waiting import eventually

from birthmark.device.console import run
from birthmark.device.errors import PortError
from birthmark.device.link.bundle import Bundle
from birthmark.device.pem import read_blocks
from birthmark.provisioning import cli
from birthmark.provisioning.encrypted_key import KeyDerivation
from birthmark.provisioning.enrollment.enrol import Reached, Step, Stored, UnitRefusedError
from birthmark.provisioning.enrollment.journal import Action
from birthmark.provisioning.enrollment.port import PortName, SerialPort, held
from birthmark.provisioning.founding import found_station
from birthmark.provisioning.registry.model import KeyMode, State
from birthmark.provisioning.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from birthmark.provisioning.station import Station

PASSPHRASE = b"correct horse"
TESTS = Path(__file__).parent.parent
CHEAP = KeyDerivation(cost=2, block_size=8, parallelism=1)


@pytest.fixture(scope="module")
def station(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    folder = tmp_path_factory.mktemp("flash") / "station"
    station = found_station(folder, Settings(organization="Acme"), passphrase=PASSPHRASE, derivation=CHEAP)
    yield station
    station.close()


@pytest.fixture
def cable(tmp_path: Path) -> Iterator[Cable]:
    with Cable(tmp_path / "ttyBOARD") as cable:
        yield cable


def environment(station: Station) -> dict[str, str]:
    return {**os.environ, "BIRTHMARK_PASSPHRASE": PASSPHRASE.decode(), "BIRTHMARK_STATION": str(station.folder)}


def flash_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "birthmark.provisioning", "flash", *arguments]


def flash(station: Station, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        flash_command(*arguments),
        env=environment(station),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


class Commanded:
    """`birthmark flash` within this process, for what ends before a device is touched."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture
        self.err = ""

    def __call__(self, *arguments: str) -> int:
        try:
            code = run(cli.parser(), ["flash", *arguments])
        except SystemExit as usage:
            code = int(usage.code or 0)
        self.err = self._capture.readouterr().err
        return code


@pytest.fixture
def commanded(station: Station, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commanded:
    for name in ("BIRTHMARK_PASSPHRASE", "BIRTHMARK_STATION"):
        monkeypatch.setenv(name, environment(station)[name])
    return Commanded(capsys)


def rows_of(station: Station, name: str) -> list[tuple[State, int | None]]:
    with station.registry.view() as view:
        return [(row.state, row.cert_serial) for row in view.named(name)]


@pytest.mark.parametrize("keys", list(KeyMode))
def test_flash_against_the_real_agent(station: Station, cable: Cable, tmp_path: Path, keys: KeyMode) -> None:
    name, state = f"real-{keys.value}", tmp_path / "state"
    with AgentProcess(state, cable.device_path):
        how = ("--keys", keys.value, "--role", "meter", "--broker", "gateway-1.example.com:8884")
        done = flash(station, "--port", cable.station_path, "--id", name, *how)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        *steps, last = done.stdout.splitlines()
        assert [line.split()[0] for line in steps] == [step.value for step in Step if step is not Step.UNLOCK]
        (row,) = rows_of(station, name)
        assert last.startswith(f"PASS {name}  certificate {row[1]:x}, valid until ")

        again = flash(station, "--port", cable.station_path, "--id", name, "--json")
        assert again.returncode == 3
        events = [json.loads(line) for line in again.stdout.splitlines()]
        assert [event["event"] for event in events] == ["warning", "step", "result"]
        assert "at localhost:8883, on itself" in events[0]["text"]
        assert events[-1]["result"] == "FAIL"
        assert "DUPLICATE" in json.loads(again.stderr)["error"]
        last_entry = json.loads(station.registry.audit_path.read_text().splitlines()[-1])
        assert (last_entry["action"], last_entry["subject"]) == ("refuse", name)
        assert "DUPLICATE" in last_entry["details"]["cause"]

    active = (state / "active").read_bytes()
    assert (state / "active").stat().st_mode & 0o777 == 0o600
    blocks = dict(reversed(read_blocks(active)))
    bundle = Bundle.from_bytes(blocks["BIRTHMARK BUNDLE"])
    assert (bundle.config.host, bundle.config.port) == ("gateway-1.example.com", 8884)
    leaf = x509.load_der_x509_certificate(bundle.leaf_der)
    assert leaf.serial_number == row[1]
    assert leaf.subject.rfc4514_string() == f"CN={name},OU=meter,O=Acme"

    key = load_pem_private_key(active, None)
    scalar = key.private_numbers().private_value.to_bytes(32, "big")  # type: ignore[union-attr]
    if keys is KeyMode.ON_DEVICE:
        assert scalar not in cable.passed_to_device + cable.passed_to_station
    kept = b"".join(path.read_bytes() for path in station.folder.rglob("*") if path.is_file())
    everything = kept + (done.stdout + done.stderr + again.stdout + again.stderr).encode()
    for form in (
        scalar,
        scalar.hex().encode(),
        repr(scalar).encode(),
        str(int.from_bytes(scalar, "big")).encode(),
    ):
        assert form not in everything


POINTS = [
    *(state.value for state in State if state is not State.VOID),
    *(s.value for s in Step if s is not Step.UNLOCK),
]


@pytest.mark.parametrize(
    ("keys", "point"),
    [(KeyMode.ON_DEVICE, point) for point in POINTS]
    + [(KeyMode.STATION, point) for point in ("RESERVED", "keygen", "KEYED", "ISSUED")],
)
def test_the_station_is_killed(station: Station, cable: Cable, tmp_path: Path, keys: KeyMode, point: str) -> None:
    name = f"killed-{point}-{keys.value}"
    command = [sys.executable, "-m", "support.board_killed"]
    command += [str(station.folder), cable.station_path, name, keys.value, point]
    with AgentThread(tmp_path / "state", os.urandom(8), cable.device_path):
        killed = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": str(TESTS)},
            input=PASSPHRASE + b"\n",
            timeout=PATIENCE_S,
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL
        before = rows_of(station, name)
        again = session(station, cable.station_path, name, keys, lambda _: None)
        if point == State.ATTESTED.value:
            with pytest.raises(UnitRefusedError) as caught:
                again.run()
            assert caught.value.action is Action.DUPLICATE
        else:
            assert again.run().state is State.ATTESTED
    ((state, cert_serial),) = rows_of(station, name)
    assert state is State.ATTESTED
    if before and before[0][1] is not None:
        assert cert_serial == before[0][1], "the same certificate as before the kill"


@pytest.mark.parametrize("after_bytes", [60, 700, 1700])
def test_the_agent_is_killed_and_started_again(
    station: Station, cable: Cable, tmp_path: Path, after_bytes: int
) -> None:
    name = f"agent-killed-{after_bytes}"
    agent = AgentProcess(tmp_path / "state", cable.device_path)
    killed: list[bool] = []

    def kill(data: bytes) -> bytes:
        if not killed and len(cable.passed_to_device) > after_bytes:
            killed.append(True)
            agent.kill()
            agent.start()
            return b""
        return data

    cable.to_device = kill
    with agent:
        row = session(station, cable.station_path, name, KeyMode.ON_DEVICE, lambda _: None).run()
    assert killed
    assert rows_of(station, name) == [(State.ATTESTED, row.cert_serial)]


@pytest.mark.parametrize("step", [Step.HELLO, Step.KEYGEN, Step.DATA, Step.PREPARE])
def test_the_cable_falls_out_and_comes_back(station: Station, cable: Cable, tmp_path: Path, step: Step) -> None:
    """The pty hangs up and comes back under another number; the stable name leads to it."""
    name = f"unplugged-{step.value}"
    seen: list[object] = []

    def watch(event: object) -> None:
        seen.append(type(event).__name__)
        if isinstance(event, Reached) and event.step is step and "Unplugged" not in seen:
            cable.unplug()
        if seen[-1] == "Unplugged":
            cable.replug()

    with AgentThread(tmp_path / "state", os.urandom(8), cable.device_path):
        row = session(station, str(cable.link), name, KeyMode.ON_DEVICE, watch).run()
    assert seen.count("Unplugged") == seen.count("Replugged") == 1
    assert rows_of(station, name) == [(State.ATTESTED, row.cert_serial)]


def test_two_stations_on_one_port(commanded: Commanded, station: Station, cable: Cable) -> None:
    with held(PortName.of(str(cable.link))):
        assert commanded("--port", cable.station_path, "--id", "second") == 5
    assert "another station is at work on it" in commanded.err
    assert "hint:" in commanded.err
    assert bytes(cable.passed_to_device) == b"", "the port was not touched"
    assert rows_of(station, "second") == []


def test_another_program_on_the_port(cable: Cable) -> None:
    with SerialPort(PortName.of(cable.station_path), 115_200), pytest.raises(PortError, match="another program"):
        SerialPort(PortName.of(cable.station_path), 115_200)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--port", "/dev/nowhere", "--id", "x"], (5, "there is none")),
        (["--port", "{file}", "--id", "x"], (5, "it is no serial port")),
        (["--port", "{port}", "--id", "a/b"], (1, "outside the grammar")),
        (["--port", "{port}", "--id", "x", "--role", "operator"], (1, "reserved")),
        (["--port", "{port}", "--id", "x", "--broker", "nowhere"], (2, "it is not HOST:PORT")),
        (["--port", "{port}", "--id", "x", "--broker", "a b:1"], (2, "no host name")),
        (["--port", "{port}", "--id", "x", "--keys", "magic"], (2, "invalid choice")),
        (["--port", "socket://127.0.0.1:1", "--id", "x", "--keys", "station"], (3, "no network port")),
        (["--port", "socket://127.0.0.1:1", "--id", "x"], (5, "could not open the port")),
        (["--port", "nonsense://x", "--id", "x"], (5, "could not open the port")),
    ],
)
def test_what_cannot_be_used_is_said(
    commanded: Commanded, station: Station, cable: Cable, arguments: list[str], expected: tuple[int, str]
) -> None:
    places = {"file": "/dev/null", "port": cable.station_path}
    assert commanded(*(argument.format(**places) for argument in arguments)) == expected[0]
    assert expected[1] in commanded.err
    assert rows_of(station, "x") == []
    assert bytes(cable.passed_to_device) == b""


def test_a_wrong_passphrase_leaves_the_device_alone(
    commanded: Commanded, cable: Cable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIRTHMARK_PASSPHRASE", "wrong")
    assert commanded("--port", cable.station_path, "--id", "wrong") == 6
    assert bytes(cable.passed_to_device) == b""


def test_ctrl_c_says_how_to_go_on(station: Station, cable: Cable, tmp_path: Path) -> None:
    quiet = [False]

    def hush(data: bytes) -> bytes:
        quiet[0] = quiet[0] or len(cable.passed_to_station) > 300  # after HELLO's and KEYGEN's answer
        return b"" if quiet[0] else data

    cable.to_station = hush
    port = str(cable.link)
    with AgentThread(tmp_path / "state", os.urandom(8), cable.device_path):
        where = ("--broker", "gateway-1.example.com:8883")
        command = flash_command("--port", port, "--id", "stopped", "--keys", "station", *where)
        process = subprocess.Popen(
            command, env=environment(station), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        eventually(lambda: quiet[0])
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 130
        assert err == ""
        assert f"birthmark flash --port {port} --id stopped --keys station" in out.splitlines()[-1]
        ((state, _),) = rows_of(station, "stopped")
        assert state in (State.RESERVED, State.KEYED, State.ISSUED)
        entries = [json.loads(line) for line in station.registry.audit_path.read_text().splitlines()]
        mine = [e for e in entries if (e["action"], e["subject"]) == ("interrupt", "stopped")]
        assert [e["details"]["state"] for e in mine] == [state.value]
        cable.to_station = bytes
        assert flash(station, "--port", port, "--id", "stopped").returncode == 0
    assert [state for state, _ in rows_of(station, "stopped")] == [State.ATTESTED]


def test_a_certificate_that_never_reached_its_key_is_on_the_crl(
    commanded: Commanded, station: Station, cable: Cable, tmp_path: Path
) -> None:
    """The station dies after signing, the board is wiped: the row is void, and brokers learn of it."""
    hwid = os.urandom(8)

    class GoneError(Exception):
        pass

    def stop(event: object) -> None:
        if isinstance(event, Stored) and event.row.state is State.ISSUED:
            raise GoneError

    with AgentThread(tmp_path / "before", hwid, cable.device_path), pytest.raises(GoneError):
        session(station, cable.station_path, "wiped", KeyMode.ON_DEVICE, stop).run()
    with AgentThread(tmp_path / "after", hwid, cable.device_path):
        assert commanded("--port", cable.station_path, "--id", "wiped") == 0
    assert "warning: the device will look for its broker at localhost:8883, on itself" in commanded.err
    (void, lost), (made, kept) = rows_of(station, "wiped")
    assert (void, made) == (State.VOID, State.ATTESTED)
    crl = x509.load_pem_x509_crl(station.crl_path.read_bytes())
    assert crl.get_revoked_certificate_by_serial_number(lost or 0) is not None
    assert crl.get_revoked_certificate_by_serial_number(kept or 0) is None


def test_a_login_on_the_port(commanded: Commanded, station: Station, cable: Cable) -> None:
    """A port that is no board: the verdict in seconds, nothing reserved."""
    cable.say_to_station(b"\r\n\x1b[2JDebian GNU/Linux 12 gateway ttyS0\r\n\r\ngateway login: ", after_bytes=1)
    assert commanded("--port", cable.station_path, "--id", "nobody") == 4
    assert "CONSOLE" in commanded.err
    assert "\\x1b[2J" in commanded.err
    assert "\x1b[2J" not in commanded.err
    assert "hint: stop the getty" in commanded.err
    assert rows_of(station, "nobody") == []


@pytest.mark.parametrize(
    ("number", "after_bytes"),
    [
        (signal.SIGKILL, 45),
        (signal.SIGKILL, 900),
        (signal.SIGKILL, 1900),
        (signal.SIGINT, 130),
        (signal.SIGINT, 1900),
    ],
)
def test_the_command_is_stopped_in_the_middle(
    station: Station, cable: Cable, tmp_path: Path, number: signal.Signals, after_bytes: int
) -> None:
    name = f"stopped-{number}-{after_bytes}"
    process: list[subprocess.Popen[str]] = []

    def stop(data: bytes) -> bytes:
        if len(cable.passed_to_device) >= after_bytes and process and process[0].poll() is None:
            process[0].send_signal(number)
            process[0].wait()
        return data

    cable.to_device = stop
    with AgentThread(tmp_path / "state", os.urandom(8), cable.device_path):
        command = flash_command("--port", cable.station_path, "--id", name, "--broker", "[fd00::1]:8883")
        started = subprocess.Popen(
            command, env=environment(station), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        process.append(started)
        _, err = started.communicate(timeout=PATIENCE_S)
        assert started.returncode == (-signal.SIGKILL if number is signal.SIGKILL else 130)
        assert err == ""
        before = rows_of(station, name)
        row = session(station, cable.station_path, name, KeyMode.ON_DEVICE, lambda _: None).run()
    assert rows_of(station, name) == [(State.ATTESTED, row.cert_serial)]
    if before and before[0][1] is not None:
        assert row.cert_serial == before[0][1]


def test_every_enrollment_is_in_the_audit_log(station: Station, cable: Cable, tmp_path: Path) -> None:
    with AgentThread(tmp_path / "state", os.urandom(8), cable.device_path):
        row = session(station, cable.station_path, "audited", KeyMode.ON_DEVICE, lambda _: None).run()
    entries = [json.loads(line) for line in station.registry.audit_path.read_text().splitlines()]
    mine = [entry for entry in entries if entry["subject"] == "audited"]
    assert [entry["action"] for entry in mine] == ["reserve", "key", "issue", "prepare", "commit", "attest"]
    assert {entry["details"]["txn"] for entry in mine} == {(row.txn or b"").hex()}
    assert mine[2]["details"]["cert_serial"] == f"{row.cert_serial:x}"
