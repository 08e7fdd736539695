"""`birthmark renewd` as a process: what it says, what it is told, and what it does besides answering."""

from __future__ import annotations

import contextlib
import signal
import socket
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from cryptography import x509
from support.patience import PATIENCE_S
from support.renewal_stand import Stand
from support.renewing import PaperDevice
from support.renewing_client import Renewing, client, client_started
from support.station import PASSPHRASE, Command, enrolled_row, new_station
from support.waiting import eventually
from support.watching import Watching

from birthmark.device import topics
from birthmark.device.client import Client
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.events import AttemptFailed, Connected
from birthmark.device.identity import DeviceId
from birthmark.device.received import Message
from birthmark.device.renewal.messages import RenewalAnswer
from birthmark.provisioning import renewd
from birthmark.provisioning.gateway_settings import Gateway
from birthmark.provisioning.issuing import issue_operator
from birthmark.provisioning.renewal import Renewals
from birthmark.provisioning.renewal_commands import take_up_new_credentials
from birthmark.provisioning.renewd import MAX_ASKED, RenewalService
from birthmark.provisioning.settings_edit import add_gateway

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from support.renewal_stand import Renewd

    from birthmark.provisioning.renewal import Asked


def test_systemd_is_told(stand: Stand, tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.settimeout(PATIENCE_S)
        told.bind(str(path))
        service = stand.renewd(NOTIFY_SOCKET=str(path), WATCHDOG_USEC="200000")
        try:
            heard = {told.recv(64)}
            while not {b"READY=1", b"WATCHDOG=1"} <= heard:
                heard.add(told.recv(64))
            assert service.kill(signal.SIGTERM) == 0
            while b"STOPPING=1" not in heard:
                heard.add(told.recv(64))
        finally:
            service.kill()
    assert [line["event"] for line in service.lines][-2:] == ["metrics", "stopped"]


def test_a_wrong_passphrase_is_said_at_once(stand: Stand) -> None:
    service = stand.renewd(passphrase=b"wrong")
    eventually(lambda: service.has_ended, "its end")
    assert service.kill() == 6
    assert '"exit_code": 6' in "".join(service.noise) or '"exit_code":6' in "".join(service.noise)


@pytest.mark.parametrize("words", [("renewd",), ("renew", "sensor-17")])
def test_an_identity_that_gateways_let_answer_nobody_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway drops what an operator publishes there, and says so to its own log alone."""
    monkeypatch.setenv("BIRTHMARK_PASSPHRASE", PASSPHRASE.decode())
    with contextlib.closing(new_station(tmp_path / "station")) as station:
        enrolled_row(station, "sensor-17")
        issue_operator(station, "alice", tmp_path)
        where = ("--broker", "localhost:1", "--identity", tmp_path / "alice.pem")
        refused = Command(station.folder, capsys)(*words, *where)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: could not renew as alice: its role is operator")


def test_it_waits_for_a_gateway_that_is_not_there_yet(stand: Stand) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        service = stand.renewd(broker=f"localhost:{unused.getsockname()[1]}")
        try:
            service.wait_for("unreachable")
        finally:
            assert service.kill(signal.SIGINT) == 130


def test_junk_and_a_flood_cost_it_nothing(stand: Stand, renewd: Renewd) -> None:
    state, good = stand.device("loud"), stand.device("quiet")
    with Client.from_folder(state, renewal=False) as loud:
        for payload in (b"junk", b"{}", b'{"kind": "renew"}'):
            loud.publish("devices/loud/renewal/request", payload, wait=20)
        request = (
            b'{"kind":"confirm","nonce":"' + b"00" * 16 + b'","leaf_sha256":"' + b"00" * 32 + b'",'
            b'"anchors_sha256":[],"signature":""}'
        )
        for _ in range(3 * MAX_ASKED):
            loud.publish("devices/loud/renewal/request", request)
        loud.publish("devices/loud/telemetry/x", b"1", wait=20)
    with client(good, watching := Renewing()) as device:
        device.renew()
        watching.wait_for_state("renewed")
    malformed = [line for line in renewd.lines if line["event"] == "malformed"]
    assert [line["topic"] for line in malformed] == ["devices/loud/renewal/request"] * 3
    refused = [line for line in renewd.lines if line["event"] == "refused" and line["id"] == "loud"]
    assert len(refused) == MAX_ASKED - 3
    assert len(stand.rows("loud")) == 1


class Told:
    """A gateway's client, as the service uses it."""

    def __init__(self, order: list[Told] | None = None) -> None:
        self.answers: list[RenewalAnswer] = []
        self.credentials = SimpleNamespace(broker=BrokerAddress("gateway-1.example.com", 8883))
        self.order = [] if order is None else order

    def publish(self, _topic: str, payload: bytes) -> None:
        self.answers.append(RenewalAnswer.from_bytes(payload))
        self.order.append(self)

    def bring(self, service: RenewalService, asked: Asked) -> None:
        topic = topics.renewal_request(asked.device_id)
        service.take(cast("Client", self), Message(topic, asked.request.to_bytes(), 1, retained=False))


def test_what_one_gateway_says_in_a_devices_name_keeps_nobody_at_another_from_being_heard(tmp_path: Path) -> None:
    station = new_station(tmp_path / "station")
    device, hostile, honest = PaperDevice.made(station), Told(), Told()
    service = RenewalService(Renewals(station), say=lambda *_, **__: None)
    for _ in range(2 * MAX_ASKED):
        hostile.bring(service, device.renew(signer=device.new_key))
    assert service.counts["too-often"] == MAX_ASKED, "the control: there it is heard no more"
    hostile.bring(service, device.renew())
    honest.bring(service, device.renew())
    service.start()
    service.stop()
    assert [answer.outcome for answer in honest.answers] == ["issued"]
    assert [answer.outcome for answer in hostile.answers] == ["refused"] * MAX_ASKED


def test_a_gateway_that_brings_too_much_leaves_room_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renewd, "MAX_WAITING", 5)
    monkeypatch.setattr(renewd, "MAX_ASKERS", 8)
    station = new_station(tmp_path / "station")
    device, hostile, honest = PaperDevice.made(station), Told(), Told()
    service = RenewalService(Renewals(station), say=lambda *_, **__: None)
    invented = [replace(device.renew(), device_id=DeviceId(f"nobody-{number}")) for number in range(20)]
    for asked in invented:
        hostile.bring(service, asked)
    assert (service.counts["dropped"], service.counts["too-often"]) == (3, 12), "5 wait, 8 are remembered"
    honest.bring(service, device.renew())
    service.start()
    service.stop()
    assert [answer.outcome for answer in honest.answers] == ["issued"]
    assert len(hostile.answers) == 5


class Defective(Renewals):
    """Renewals with a defect that one device's requests bring out."""

    def answer(self, asked: Sequence[Asked]) -> list[RenewalAnswer]:
        if any(one.device_id.text == "odd" for one in asked):
            raise KeyError("what nobody is to read")
        return super().answer(asked)


def test_a_defect_over_one_request_is_nobody_elses(tmp_path: Path) -> None:
    station = new_station(tmp_path / "station")
    sound, odd = PaperDevice.made(station), PaperDevice.made(station, "odd")
    gateway, said = Told(), list[str]()
    service = RenewalService(Defective(station), say=lambda name, text, **_: said.append(f"{name}: {text}"))
    for device in (odd, sound):
        gateway.bring(service, device.renew())
    service.start()
    service.stop()
    assert [answer.outcome for answer in gateway.answers] == ["refused", "issued"]
    (trouble,) = (line for line in said if line.startswith("trouble"))
    assert trouble.startswith("trouble: a defect: KeyError at test_renewd.py:")
    assert "read" not in trouble


def test_gateways_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewd, "MAX_GROUP", 5)
    station, order = new_station(tmp_path / "station"), list[Told]()
    device, hostile, honest, other = PaperDevice.made(station), Told(order), Told(order), Told(order)
    service = RenewalService(Renewals(station), say=lambda *_, **__: None)
    for number in range(12):
        hostile.bring(service, replace(device.renew(), device_id=DeviceId(f"nobody-{number}")))
    for gateway in (honest, other):
        for _ in range(2):
            gateway.bring(service, device.renew())
    service.start()
    service.stop()
    assert order[:5] == [hostile, honest, other, hostile, honest]
    assert len(order) == 16, "what waited at the end is answered"


def test_junk_does_not_fill_the_log(tmp_path: Path) -> None:
    said: list[str] = []
    service = RenewalService(
        Renewals(new_station(tmp_path / "station")), say=lambda name, *_, **__: said.append(name)
    )
    for topic in ("devices/sensor-17/renewal/request", "devices/not an id/renewal/request"):
        for _ in range(5 * MAX_ASKED):
            service.take(cast("Client", Told()), Message(topic, b"junk", 1, retained=False))
    assert said == ["malformed"] * 10 * MAX_ASKED, "of as many gateways"
    said.clear()
    one = cast("Client", Told())
    for topic in ("devices/sensor-17/renewal/request", "devices/not an id/renewal/request"):
        for _ in range(5 * MAX_ASKED):
            service.take(one, Message(topic, b"junk", 1, retained=False))
    assert said == ["malformed"] * 2 * MAX_ASKED


def test_the_old_certificate_is_revoked_when_its_time_has_come(tmp_path: Path) -> None:
    with Stand(tmp_path, settings="[renewal]\nretire_after_hours = 0\n") as stand:
        add_gateway(stand.station.settings_path, Gateway("localhost", crl_path=stand.crl_path))
        state, watching = stand.device(), Renewing()
        old = (state / "active").read_bytes()
        with stand.renewd() as renewd, client(state, watching) as device:
            device.renew()
            watching.wait_for_state("renewed")
            brought = renewd.wait_for("crl")
            assert [gateway["outcome"] for gateway in brought["gateways"]] == ["done"]
            device.publish(device.telemetry("x"), b"1", wait=20)
        row, renewed = stand.rows()
        assert (row.revocation_reason, renewed.is_revoked) == ("superseded", False)
        crl = x509.load_pem_x509_crl(stand.crl_path.read_bytes())
        assert crl.get_revoked_certificate_by_serial_number(row.cert_serial or 0) is not None
        (tmp_path / "copy").mkdir(mode=0o700)
        copy = tmp_path / "copy" / "active"
        copy.write_bytes(old)
        copy.chmod(0o600)
        refused = Renewing()
        with client_started(copy.parent, refused):
            assert refused.wait_for(AttemptFailed).error.check in ("revoked", "not-authorised")
        assert Credentials.from_folder(state).leaf_der == renewed.certificate_der


def test_it_goes_on_with_the_certificate_and_the_roots_that_are_there_by_now(stand: Stand) -> None:
    path, said = stand.folder / "renewd.pem", []

    def read() -> Credentials:
        return Credentials.from_files(path, stand.folder / "ca.pem", BrokerAddress("localhost", stand.port))

    watching = Watching()
    with Client(read(), client_suffix="test", observe=watching) as service:
        take_up_new_credentials(service, read, lambda name, *_: said.append(name))
        issue_operator(stand.station, "renewd", stand.folder, role="service-renewal", renew=True)
        whole = path.read_bytes()
        path.write_bytes(whole[:200])
        take_up_new_credentials(service, read, lambda name, *_, **__: said.append(name))
        path.write_bytes(whole)
        take_up_new_credentials(service, read, lambda name, *_, **__: said.append(name))
        assert watching.wait_for(Connected, 2).client_id == "renewd:test"
        assert service.credentials == read()
    assert said == ["trouble", "credentials"]
