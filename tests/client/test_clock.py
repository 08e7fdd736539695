"""A device whose clock is wrong: what it knows of the time, what that lets in, and what it says about it."""

from __future__ import annotations

import datetime as dt
import json
import signal
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support.broker_process import BrokerProcess
from support.broker_stub import CONNECT, PUBLISH, BrokerStub
from support.device_command import DeviceCommand, needs_faketime, run
from support.device_folder import enrolled
from support.patience import PATIENCE_S
from support.pki import Authority, Issued, Pki, now
from support.waiting import eventually
from support.watching import Watching

from birthmark.device.backoff import Backoff, RetryTimer
from birthmark.device.certificate_facts import CertificateFacts
from birthmark.device.client import Client
from birthmark.device.clock import FLOOR_FILE, SET_BACK, Clock, Moment, out_of_time
from birthmark.device.connection_checks import Check
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.errors import ConnectionFailedError, RefusedError, UnreachableError
from birthmark.device.events import AttemptFailed, Connected
from birthmark.device.messages import TimeAnswer, TimeRequest
from birthmark.device.tls import device_context

if TYPE_CHECKING:
    from pathlib import Path

DAY, HOUR, SECOND = dt.timedelta(days=1), dt.timedelta(hours=1), dt.timedelta(seconds=1)
NOON = dt.datetime(2026, 6, 1, 12, tzinfo=dt.UTC)
EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
FAR = dt.datetime(2099, 1, 1, tzinfo=dt.UTC)
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


# --- one function decides ---------------------------------------------------------------------------------


def valid(begins: dt.datetime, ends: dt.datetime) -> CertificateFacts:
    return CertificateFacts(1, (), (), begins, ends)


LEAF, CA = valid(NOON, NOON + DAY), valid(NOON - DAY, NOON + DAY + HOUR)


@pytest.mark.parametrize(
    ("moment", "wrong"),
    [
        (Moment(NOON - SECOND), LEAF),
        (Moment(NOON), None),
        (Moment(NOON + DAY), None),
        (Moment(NOON + DAY + SECOND), LEAF),
        (Moment(NOON - 2 * DAY), LEAF),
        (Moment(NOON - 9 * DAY, or_later=True), None),
        (Moment(NOON - SECOND, or_later=True), None),
        (Moment(NOON + DAY, or_later=True), None),
        (Moment(NOON + DAY + SECOND, or_later=True), LEAF),
    ],
)
def test_who_is_out_of_time(moment: Moment, wrong: CertificateFacts | None) -> None:
    assert out_of_time([LEAF, CA], moment) is wrong


def test_every_certificate_of_the_chain_counts() -> None:
    short = valid(NOON - DAY, NOON + HOUR)
    for or_later in (False, True):
        assert out_of_time([LEAF, short, CA], Moment(NOON + HOUR, or_later)) is None
        assert out_of_time([LEAF, short, CA], Moment(NOON + HOUR + SECOND, or_later)) is short


def test_there_must_be_one_moment_for_all_of_them() -> None:
    """A leaf that begins when its CA has ended was never valid, whatever the time is."""
    ended = valid(NOON - 9 * DAY, NOON - SECOND)
    assert out_of_time([LEAF, ended], Moment(NOON - 5 * DAY, or_later=True)) is ended
    assert out_of_time([LEAF, valid(NOON - 9 * DAY, NOON)], Moment(NOON - 5 * DAY, or_later=True)) is None


# --- the floor --------------------------------------------------------------------------------------------


class Times:
    """A system's clock and the time that passes, both set by hand."""

    def __init__(self, at: dt.datetime) -> None:
        self.at = at
        self.elapsed_s = 0.0

    def clock(self, floor: dt.datetime | None, path: Path | None = None, kept: dt.datetime | None = None) -> Clock:
        return Clock(floor, path=path, kept=kept, system=lambda: self.at, elapsed_s=lambda: self.elapsed_s)


def test_at_the_floor_the_system_s_clock_counts_and_below_it_the_floor() -> None:
    times = Times(NOON)
    clock = times.clock(NOON)
    assert clock.moment() == Moment(NOON)
    times.at = NOON - SET_BACK  # it was set back a little, as clocks are
    assert clock.moment() == Moment(NOON - SET_BACK)
    times.at = NOON - SET_BACK - SECOND
    assert clock.moment() == Moment(NOON, or_later=True)
    times.at = FAR
    assert clock.moment() == Moment(FAR)
    assert Times(EPOCH).clock(None).moment() == Moment(EPOCH)


def test_the_floor_moves_on_with_the_time_that_passes_and_never_back() -> None:
    times = Times(EPOCH)
    clock = times.clock(NOON, kept=NOON - DAY)
    times.elapsed_s = 90
    assert clock.now() == clock.floor == NOON + 90 * SECOND
    clock.connected(Moment(NOON - HOUR))
    assert clock.floor == NOON + 90 * SECOND
    clock.connected(Moment(NOON + HOUR))
    times.elapsed_s = 100
    assert clock.floor == NOON + HOUR + 10 * SECOND
    times.at = FAR
    assert clock.floor == NOON + HOUR + 10 * SECOND  # a clock that jumps proves nothing


def test_what_is_told_is_bounded_by_the_certificates() -> None:
    clock = Times(EPOCH).clock(NOON)
    own = valid(NOON - HOUR, NOON + DAY + SECOND)
    clock.connected(Moment(NOON, or_later=True), [LEAF, CA])
    assert not clock.told(NOON + DAY + SECOND, own)
    assert not clock.told(NOON + DAY, valid(NOON, NOON + DAY - SECOND))
    assert clock.floor == NOON
    assert clock.told(NOON + DAY, own)
    assert clock.floor == NOON + DAY
    assert clock.told(NOON, own)
    assert clock.floor == NOON + DAY  # and only moves forward


def test_it_is_written_seldom(tmp_path: Path) -> None:
    times, path = Times(EPOCH), tmp_path / "clock"
    clock = times.clock(NOON, path, kept=NOON)
    writes = 0
    for elapsed_s in range(0, 4 * 3600 + 1, 5):
        times.elapsed_s = float(elapsed_s)
        clock.keep()
        writes += path.exists()
        path.unlink(missing_ok=True)
    assert writes == 4
    times.elapsed_s += 59
    clock.connected(Moment(NOON, or_later=True))
    assert not path.exists()
    times.elapsed_s += 1
    clock.connected(Moment(NOON, or_later=True))
    assert json.loads(path.read_bytes()) == {"floor": NOON.timestamp() + 4 * 3600 + 60}


def test_that_it_cannot_be_written_is_said_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    times, path = Times(NOON), tmp_path / "gone" / "clock"
    clock = times.clock(NOON - DAY, path)
    clock.connected(Moment(NOON))
    times.elapsed_s = 7200
    clock.keep()
    assert clock.floor == NOON + 2 * HOUR
    assert [record.message for record in caplog.records] == [
        f"could not keep the time in {path}: No such file or directory"
    ]
    path.parent.mkdir()
    times.elapsed_s = 2 * 7200
    clock.keep()
    assert json.loads(path.read_bytes()) == {"floor": (NOON + 4 * HOUR).timestamp()}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"floor": "x"}', b'{"floor": -1}', b'{"floor": 1e999}', b"\0" * 4096]
    + [json.dumps({"floor": floor}).encode() for floor in (10**11, 10**30, int(FAR.timestamp()))],
)
def test_a_damaged_file_costs_what_it_held_and_no_more(
    tmp_path: Path, pki: Pki, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """One from after the end of every anchor among them: no flipped bit, and no clock, shuts a device out."""
    state = enrolled(tmp_path / "s", pki, issued_at=int((now() - DAY).timestamp()))
    (state / FLOOR_FILE).write_bytes(content)
    clock = Clock.of(Credentials.from_folder(state), system=lambda: EPOCH)
    assert now() - DAY - 60 * SECOND <= clock.now() <= now() - DAY + 60 * SECOND
    assert "going by the time of enrollment" in caplog.text


def test_it_is_there_after_a_restart(tmp_path: Path, pki: Pki) -> None:
    state = enrolled(tmp_path / "s", pki, issued_at=int((now() - DAY).timestamp()))
    Clock.of(Credentials.from_folder(state)).connected(Moment(now()))
    assert Clock.of(Credentials.from_folder(state), system=lambda: EPOCH).now() >= now() - 60 * SECOND
    assert (state / FLOOR_FILE).stat().st_mode & 0o777 == 0o600


# --- over TLS ---------------------------------------------------------------------------------------------


def server(pki: Pki, begins: dt.datetime, ends: dt.datetime) -> Issued:
    return pki.issuing.server("localhost", "127.0.0.1", not_before=begins, not_after=ends)


def connect(state: Path, clock: dt.datetime) -> ConnectionFailedError | None:
    """Try once with a clock that says so, and return what it fails with."""
    client = Client.from_folder(state, now=lambda: clock)
    try:
        client.connect()
    except ConnectionFailedError as error:
        return error
    client.stop()
    return None


@pytest.mark.parametrize("version", VERSIONS)
def test_a_clock_in_1970_does_not_keep_it_from_connecting(
    tmp_path: Path, pki: Pki, version: ssl.TLSVersion
) -> None:
    with BrokerStub(pki, highest_tls=version) as broker:
        state = enrolled(tmp_path / "s", pki, port=broker.port)
        assert connect(state, EPOCH) is None
        presence = json.loads(broker.wait_for(PUBLISH).payload)
    assert presence["since"] >= Credentials.from_folder(state).issued_at.timestamp()  # type: ignore[union-attr]


@pytest.mark.parametrize("version", VERSIONS)
def test_but_a_broker_that_has_expired_gets_no_byte(tmp_path: Path, pki: Pki, version: ssl.TLSVersion) -> None:
    """OpenSSL was told not to look: what is left is our own check, before CONNECT."""
    ended = now() - DAY
    with BrokerStub(pki, server=server(pki, now() - 9 * DAY, ended), highest_tls=version) as broker:
        state = enrolled(tmp_path / "s", pki, port=broker.port)
        error = connect(state, EPOCH)
        assert isinstance(error, RefusedError)
        assert error.check == Check.SERVER_EXPIRED
        assert f"to {ended:%Y-%m-%d %H:%M:%S} UTC" in error.message
        assert "by this clock it is 1970-01-01" in error.message
        # What came before it ended is another matter: it may be that time still.
        older = enrolled(tmp_path / "older", pki, port=broker.port, issued_at=int((ended - DAY).timestamp()))
        assert connect(older, EPOCH) is None
    assert [packet.connection for packet in broker.packets if packet.kind == CONNECT] == [1]


def test_nor_does_one_whose_ca_has_expired(tmp_path: Path, pki: Pki) -> None:
    ended = Authority.create("Ended CA", parent=pki.root, not_after=now() - DAY)
    leaf = ended.server("localhost", "127.0.0.1", not_before=now() - 9 * DAY)
    with BrokerStub(pki, server=leaf) as broker:
        error = connect(enrolled(tmp_path / "s", pki, port=broker.port), EPOCH)
    assert error is not None
    assert error.check == Check.SERVER_EXPIRED
    assert broker.packets == []


def test_everything_else_is_checked_as_ever(tmp_path: Path, pki: Pki) -> None:
    with BrokerStub(pki, server=Pki.create().issuing.server("127.0.0.1")) as broker:
        error = connect(enrolled(tmp_path / "ca", pki, port=broker.port), EPOCH)
        assert error is not None
        assert error.check == Check.SERVER_CA
    with BrokerStub(pki, server=pki.issuing.server("elsewhere.example")) as broker:
        error = connect(enrolled(tmp_path / "name", pki, port=broker.port), EPOCH)
        assert error is not None
        assert error.check == Check.SERVER_NAME


def test_a_broker_renewed_while_the_device_was_in_a_drawer(tmp_path: Path, pki: Pki) -> None:
    """Its certificate begins after the last time that the device knows: that may have come since."""
    with BrokerStub(pki, server=server(pki, now() - DAY, now() + DAY)) as broker:
        state = enrolled(tmp_path / "s", pki, port=broker.port, issued_at=int((now() - 300 * DAY).timestamp()))
        assert connect(state, EPOCH) is None
        floor = Clock.of(Credentials.from_folder(state), system=lambda: EPOCH).now()
    assert floor < now() - 299 * DAY  # nothing has proven more


def test_the_floor_moves_on_while_it_is_connected(tmp_path: Path, pki: Pki) -> None:
    """And is written without a new connection: a device that stays connected for a year has its power cut, too."""
    with BrokerStub(pki) as broker:
        state = enrolled(tmp_path / "s", pki, port=broker.port)
        times, path = Times(now()), state / FLOOR_FILE
        with Client(Credentials.from_folder(state), clock=times.clock(now() - DAY, path)) as client:
            eventually(path.exists, "a floor on disk")
            before = json.loads(path.read_bytes())["floor"]
            times.elapsed_s = 3 * 3600
            client.publish(client.telemetry("x"), b"1", wait=20)
            eventually(
                lambda: json.loads(path.read_bytes())["floor"] >= before + 3 * 3600 - 1, "three hours later"
            )


def test_openssl_looks_at_the_time_whenever_the_clock_can_be_right(tmp_path: Path, pki: Pki) -> None:
    with BrokerStub(pki) as broker:
        credentials = Credentials.from_folder(enrolled(tmp_path / "s", pki, port=broker.port))
        times = Times(NOON - HOUR)
        context = device_context(credentials, times.clock(NOON))
        for at, is_left_to_us in ((NOON - HOUR, True), (now(), False), (EPOCH, True), (now(), False)):
            times.at = at
            plain = socket.create_connection(("127.0.0.1", broker.port))
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
                assert bool(context.verify_flags & 0x200000) is is_left_to_us
                assert connection.chain[0].common_names == ("localhost",)
                assert len(connection.chain) == 3


def test_a_clock_in_2099_is_reported_and_poisons_nothing(tmp_path: Path, pki: Pki) -> None:
    ends = now() + DAY
    with BrokerStub(pki, server=server(pki, now() - DAY, ends)) as broker:
        state = enrolled(tmp_path / "s", pki, port=broker.port)
        error = connect(state, FAR)
        assert isinstance(error, UnreachableError)  # a clock is usually set within minutes
        assert error.check == Check.CLOCK
        for said in (f"to {ends:%Y-%m-%d %H:%M:%S} UTC", "by this clock it is 2099-01-01 00:00:00 UTC"):
            assert said in error.message
        assert not (state / FLOOR_FILE).exists()
        assert connect(state, now()) is None
        assert connect(state, EPOCH) is None


@pytest.mark.parametrize("version", VERSIONS)
def test_a_clock_that_jumps_between_two_connections(tmp_path: Path, pki: Pki, version: ssl.TLSVersion) -> None:
    """OpenSSL does not look at the validity again when a session is resumed: we do."""
    watching, at = Watching(), [now()]
    soon = Backoff(0.02, 0.05)
    with BrokerStub(pki, highest_tls=version) as broker:
        state = enrolled(tmp_path / "s", pki, port=broker.port)
        retry = RetryTimer(unreachable=soon, refused=soon)
        with Client.from_folder(state, now=lambda: at[0], observe=watching, retry=retry):
            watching.wait_for(Connected)
            for number, clock in enumerate((EPOCH, now() + HOUR), 2):
                at[0] = clock
                broker.drop()
                watching.wait_for(Connected, number)
            at[0] = FAR
            broker.drop()
            assert watching.wait_for(AttemptFailed, 2).error.check == Check.CLOCK
            at[0] = now() + 2 * HOUR
            watching.wait_for(Connected, 4)
    met = [event for event in watching.events if isinstance(event, Connected)]
    assert [event.tls_resumed for event in met] == [False, True, True, False]
    assert [event.moment.or_later for event in met] == [False, True, False, False]
    floor = json.loads((state / FLOOR_FILE).read_bytes())["floor"]
    assert floor == pytest.approx((now() + 2 * HOUR).timestamp(), abs=60)


# --- the gateway's clock ----------------------------------------------------------------------------------


def asking(state: Path, watching: Watching, **options: Any) -> Client:
    return Client.from_folder(state, observe=watching, now=lambda: EPOCH, trusts_gateway_clock=True, **options)


def floor_of(state: Path) -> dt.datetime:
    return Clock.of(Credentials.from_folder(state), system=lambda: EPOCH).now()


def test_the_gateway_tells_the_time(tmp_path: Path, pki: Pki) -> None:
    with BrokerProcess(tmp_path / "broker", pki) as broker:
        early = int((now() - DAY / 2).timestamp())
        state = enrolled(tmp_path / "s", pki, port=broker.port, issued_at=early)
        anchors = tmp_path / "ca.pem"
        anchors.write_bytes(pki.root.pem)
        identity = pki.operator("alice").write(tmp_path / "alice.pem")
        alice = Client(Credentials.from_files(identity, anchors, BrokerAddress("localhost", broker.port)))
        client = asking(state, Watching())
        client.command("open")(lambda _: b"opened")
        with client, alice:
            eventually(lambda: floor_of(state) >= now() - 60 * SECOND, "the floor is at the gateway's time")
            # In 1970 every deadline is years away; by the gateway's time this one is not.
            assert alice.request("sensor-1", "open", timeout_s=20).payload == b"opened"
        with Client.from_folder(
            enrolled(tmp_path / "b", pki, port=broker.port, issued_at=early), now=lambda: EPOCH
        ) as client:
            client.publish(client.telemetry("x"), b"1", wait=20)
        assert floor_of(tmp_path / "b") < now() - DAY / 3  # nobody asked


def test_only_the_answer_to_its_own_request_counts_and_only_once(tmp_path: Path, pki: Pki) -> None:
    begins = now() - 200 * DAY
    with BrokerStub(pki, server=server(pki, begins, now() + DAY)) as broker:
        leaf = pki.issuing.issue(not_before=begins)
        state = enrolled(tmp_path / "s", pki, leaf, port=broker.port, issued_at=int(begins.timestamp()))
        topic = "devices/sensor-1/time/answer"
        with asking(state, Watching()) as client:
            heard = threading.Semaphore(0)
            client.subscribe(topic, lambda _: heard.release())
            request = broker.wait_for(PUBLISH, lambda packet: packet.topic == "devices/sensor-1/time/request")
            assert (request.qos, request.retain) == (0, False)
            nonce = TimeRequest.from_bytes(request.payload).nonce

            def tell(at: dt.datetime, nonce: bytes = nonce, *, retain: bool = False) -> dt.datetime:
                broker.deliver(topic, TimeAnswer(nonce, at.timestamp()).to_bytes(), retain=retain)
                assert heard.acquire(timeout=PATIENCE_S)
                return client._clock.now()

            far = begins + 10 * DAY
            assert tell(begins + 100 * DAY, bytes(16)) < far
            assert tell(begins + 100 * DAY, retain=True) < far
            for junk in (b"", b"{", json.dumps({"nonce": nonce.hex(), "time": 1e300}).encode()):
                broker.deliver(topic, junk)
                assert heard.acquire(timeout=PATIENCE_S)
            assert client._clock.now() < far
            assert begins + 100 * DAY <= tell(begins + 100 * DAY) < begins + 101 * DAY
            assert tell(begins + 150 * DAY) < begins + 101 * DAY  # that request is answered


def test_a_gateway_cannot_tell_a_time_that_its_certificate_does_not_reach(
    tmp_path: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    with BrokerStub(pki, server=server(pki, now() - DAY, now() + DAY)) as broker:
        state = enrolled(tmp_path / "s", pki, port=broker.port)
        with asking(state, Watching()) as client:
            request = broker.wait_for(PUBLISH, lambda packet: packet.topic == "devices/sensor-1/time/request")
            nonce = TimeRequest.from_bytes(request.payload).nonce
            broker.deliver("devices/sensor-1/time/answer", TimeAnswer(nonce, FAR.timestamp()).to_bytes())
            eventually(lambda: "could not go by the gateway's time, 2099-01-01" in caplog.text, "a warning")
            assert client._clock.now() < now() + HOUR


# --- the real thing ---------------------------------------------------------------------------------------


@needs_faketime
def test_a_device_in_1970_and_in_2099(tmp_path: Path, pki: Pki) -> None:
    with BrokerProcess(tmp_path / "broker", pki) as broker:
        state = enrolled(tmp_path / "s", pki, port=broker.port)
        arguments = ("run", "--state", state, "--simulate", "--interval", "0.1", "--json")
        with DeviceCommand(*arguments, at="1970-01-01 12:00:00") as device:
            met = device.wait_for("connected")
            # The certificate began an hour ago: yesterday, just after midnight.
            assert dt.datetime.fromisoformat(met["clock_is_before"]) > now() - 2 * HOUR
            assert met["at"].startswith("1970-01-01")
            device.wait_for("published", count=3)
            assert device.end(signal.SIGTERM) == 0
            assert floor_of(state) < now() - HOUR / 2
        (state / "device.toml").write_text('clock = "trust-broker"\n')
        with DeviceCommand(*arguments, at="1970-01-01 12:00:00") as device:
            device.wait_for("connected")
            eventually(lambda: floor_of(state) >= now() - 60 * SECOND, "the gateway's time")
            assert device.end(signal.SIGTERM) == 0
        after = run("run", "--state", state, "--once", "--json", at="2099-01-01 12:00:00")
        assert after.returncode == 4
        failed = json.loads(after.stdout.splitlines()[0])
        assert failed["check"] == "clock"
        assert "by this clock it is 2099-01-01 12:0" in failed["reason"]
        with DeviceCommand(*arguments) as device:
            assert device.wait_for("connected")["clock_is_before"] is None
            assert device.end(signal.SIGTERM) == 0
        eventually((state / FLOOR_FILE).exists, "a floor on disk")
