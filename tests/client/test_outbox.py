"""The outbox: what was acknowledged as stored goes out, in order, whatever happens in between."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support.broker_stub import PUBLISH, BrokerStub
from support.outbox_alone import TOPIC, outbox_at, put, stored, take_all
from support.patience import PATIENCE_S
from support.waiting import eventually
from support.watching import Watching, impatient

from birthmark.device.client import Client
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.errors import (
    ConfigurationError,
    LocalProtocolError,
    SystemFailureError,
    UnreachableError,
)
from birthmark.device.events import Disconnected, OutboxChanged
from birthmark.device.outbox import outbox as module
from birthmark.device.outbox.database import Database, Row
from birthmark.device.outbox.outbox import IN_FLIGHT, READY, Outbox
from birthmark.device.outbox.settings import OutboxSettings
from birthmark.device.publication import HEAD_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.pki import Pki

    from birthmark.device.received import Command


def client_of(state: Path, **options: Any) -> Client:
    options.setdefault("outbox", OutboxSettings(drain_per_s=0))
    return Client.from_folder(state, retry=impatient(), renewal=False, **options)


def telemetry(broker: BrokerStub) -> list[str]:
    return [p.payload.decode() for p in broker.packets if p.kind == PUBLISH and "telemetry" in p.topic]


def test_what_is_published_is_on_the_disk_when_publish_returns(state: Path) -> None:
    client = client_of(state)
    for number in range(3):
        acknowledgement = client.publish(TOPIC, str(number))
        assert acknowledgement.is_stored
        assert not acknowledgement.done
    client.stop()
    assert stored(state / "outbox.db") == ["0", "1", "2"]
    with pytest.raises(UnreachableError, match="the client stopped first") as error:
        acknowledgement.wait()
    assert "goes out when the client is started again" in error.value.hint
    with pytest.raises(UnreachableError, match="the client has stopped"):
        client.publish(TOPIC, "late")


def test_it_goes_out_in_order_after_a_restart_and_is_removed(state: Path, broker: BrokerStub) -> None:
    before = client_of(state)
    for number in range(150):
        before.publish(TOPIC, str(number), defer=True)
    before.stop()
    watching = Watching()
    with client_of(state, observe=watching) as client:
        client.publish(TOPIC, "last", wait=PATIENCE_S)
    assert telemetry(broker) == [*map(str, range(150)), "last"]
    assert [event.state for event in watching.events if isinstance(event, OutboxChanged)] == ["waiting", "drained"]
    assert stored(state / "outbox.db") == []


def test_that_it_has_drained_is_said_of_a_backlog_alone(state: Path, broker: BrokerStub) -> None:
    watching = Watching()
    with client_of(state, observe=watching) as client:
        for number in range(3):
            client.publish(TOPIC, str(number), wait=PATIENCE_S)
        broker.connack = 3  # "server unavailable"
        broker.drop()
        watching.wait_for(Disconnected)
        for number in range(3, 6):
            client.publish(TOPIC, str(number))
        broker.connack = 0
        watching.wait_for(OutboxChanged)
        client.publish(TOPIC, "6", wait=PATIENCE_S)
    assert [event.state for event in watching.events if isinstance(event, OutboxChanged)] == ["drained"]
    assert list(dict.fromkeys(telemetry(broker))) == list("0123456")


def test_only_its_owner_can_read_it(state: Path) -> None:
    client = client_of(state)
    client.publish(TOPIC, "secret")
    modes = {path.name: path.stat().st_mode & 0o777 for path in state.glob("outbox.db*")}
    assert modes == {"outbox.db": 0o600, "outbox.db-wal": 0o600}
    client.stop()


def test_what_the_broker_never_answered_goes_out_again_in_order(state: Path, broker: BrokerStub) -> None:
    broker.acknowledges = False
    with client_of(state) as client:
        for number in range(50):
            client.publish(TOPIC, str(number), defer=True)
        last_in_flight = str(IN_FLIGHT - 1).encode()
        broker.wait_for(PUBLISH, lambda packet: packet.payload == last_in_flight)
        assert len(telemetry(broker)) == IN_FLIGHT
        broker.drop()
        broker.wait_for(PUBLISH, lambda packet: packet.payload == last_in_flight, count=2)  # not answered either
        broker.acknowledges = True
        broker.drop()
        client.publish(TOPIC, "last", wait=PATIENCE_S)
    last = [p for p in broker.packets if p.kind == PUBLISH and "telemetry" in p.topic and p.connection == 2]
    firsts = list(dict.fromkeys(p.payload.decode() for p in last))
    assert firsts == [*map(str, range(50)), "last"]


def test_qos_0_answers_and_what_is_not_to_be_kept_go_past_it(state: Path, broker: BrokerStub) -> None:
    broker.acknowledges = False
    with client_of(state) as client:
        kept = client.publish(TOPIC, "kept")
        past = client.publish(TOPIC, "past", keep=False)
        client.publish(TOPIC, "once", qos=0)
        broker.wait_for(PUBLISH, lambda packet: packet.payload == b"once")
        assert (kept.is_stored, past.is_stored) == (True, False)
        with pytest.raises(LocalProtocolError, match="no outbox keeps it"):
            past.wait_stored()
        client.stop(timeout_s=0)
    assert stored(state / "outbox.db") == ["kept"]


def test_an_id_tells_what_came_twice(state: Path, broker: BrokerStub) -> None:
    ids = []
    for _ in range(2):
        with client_of(state, outbox=OutboxSettings(message_id="mid")) as client:
            ids += [client.publish(TOPIC, {"n": n}, wait=PATIENCE_S).message_id for n in range(2)]
            client.publish(TOPIC, {"mid": "my own"}, wait=PATIENCE_S)
            client.publish(TOPIC, b'{"n":9}', wait=PATIENCE_S)
    said = [json.loads(payload) for payload in telemetry(broker)]
    assert said[:4] == [{"n": 0, "mid": ids[0]}, {"n": 1, "mid": ids[1]}, {"mid": "my own"}, {"n": 9}]
    assert len(set(ids)) == 4
    epochs, numbers = zip(*(one.split("-") for one in ids), strict=True)
    assert len(set(epochs)) == 1
    assert list(map(int, numbers)) == sorted(map(int, numbers))


def test_an_id_takes_no_message_past_what_the_gateway_takes(state: Path) -> None:
    """Stored, it would end every connection that it is sent on."""
    key = "k" * 100
    with client_of(state, outbox=OutboxSettings(message_id=key), max_packet_bytes=1024) as client:
        with pytest.raises(LocalProtocolError, match="bytes are too many, the gateway takes"):
            client.publish(TOPIC, {"n": "x" * (1024 - HEAD_BYTES - len(TOPIC) - len('{"n":""}'))})
        client.publish(TOPIC, b"x" * (1024 - HEAD_BYTES - len(TOPIC)), wait=PATIENCE_S)


def test_no_number_comes_twice_after_a_kill_with_nothing_left_in_it(tmp_path: Path) -> None:
    database = Database(tmp_path / "o.db", "sensor-1", by_priority=False)
    with database.writing():
        database.add(Row(database.next_seq, TOPIC, b"", retain=False, priority=0, at=0.0))
        database.remove([database.next_seq])
    highest = database.next_seq
    database.close()
    again = Database(tmp_path / "o.db", "sensor-1", by_priority=False)
    assert again.next_seq > highest
    again.close()


@pytest.mark.parametrize("when_full", ["drop-oldest", "refuse-newest", "drop-lowest-priority"])
def test_a_full_outbox_does_what_was_chosen_and_says_so(tmp_path: Path, when_full: str) -> None:
    path = tmp_path / "o.db"
    settings = {"max_messages": 100, "when_full": when_full, "priorities": (("alarm/#", 10),)}
    with outbox_at(path, **settings) as (outbox, told):
        first = outbox.put("alarm/fire", "fire", retain=False)
        kept_from = READY + IN_FLIGHT  # what is read ahead does not give way
        for number in range(99):
            put(outbox, str(number))
        assert not told
        doomed = outbox.put(TOPIC, "100", retain=False)
        if when_full == "refuse-newest":
            for wait in (doomed.wait_stored, doomed.wait):
                with pytest.raises(UnreachableError, match="the outbox is full"):
                    wait(PATIENCE_S)
        else:
            doomed.wait_stored(PATIENCE_S)
            for number in range(101, 110):
                put(outbox, str(number))
        assert [event.state for event in told][:1] == ["dropping"]
        assert "is full (100 messages" in told[0].detail
        assert outbox.state().messages == 100
        assert first.is_stored
    left = stored(path)
    assert len(left) == 100
    assert left[0] == "fire"
    if when_full == "refuse-newest":
        assert left == ["fire", *map(str, range(99))]
    else:
        assert left[-1] == "109"
        assert left[kept_from:] == sorted(left[kept_from:], key=int)
        assert outbox.state().dropped == 10
        assert [event.state for event in told] == ["dropping", "dropping"]  # at the first and at the tenth
    with outbox_at(path, **settings) as (again, _):
        again.start()
        eventually(lambda: again.state().messages == 100, "the count")
        assert again.state().dropped == (1 if when_full == "refuse-newest" else 10)


def test_the_less_important_gives_way_and_never_the_more_important(tmp_path: Path) -> None:
    path = tmp_path / "o.db"
    settings = {
        "max_messages": 100,
        "when_full": "drop-lowest-priority",
        "priorities": (("alarm/#", 10), ("chat/#", -1)),
    }
    with outbox_at(path, **settings) as (outbox, _):
        for number in range(60):
            put(outbox, f"chat {number}", "chat/a")
        for number in range(40):
            put(outbox, f"alarm {number}", "alarm/a")
        given_way = outbox.put(TOPIC, "reading", retain=False)
        given_way.wait_stored(PATIENCE_S)
        put(outbox, "alarm 40", "alarm/a")
        for number in range(41, 90):
            with contextlib.suppress(UnreachableError):
                put(outbox, f"alarm {number}", "alarm/a")
        with pytest.raises(UnreachableError, match="outbox is full"):
            put(outbox, "chat 60", "chat/a")
        with pytest.raises(UnreachableError, match="gave way to others"):
            given_way.wait(PATIENCE_S)
    left = stored(path)
    alarms = [text for text in left if text.startswith("alarm")]
    assert "reading" not in left
    assert alarms == [f"alarm {number}" for number in range(90 - len(alarms), 90)]
    assert len(left) == 100


def test_bytes_are_limited_too(tmp_path: Path) -> None:
    path = tmp_path / "o.db"
    with outbox_at(path, max_bytes=64 * 1024) as (outbox, _):
        with pytest.raises(LocalProtocolError, match="more than the outbox may hold"):
            outbox.put(TOPIC, bytes(64 * 1024), retain=False)
        for _ in range(200):
            outbox.put(TOPIC, bytes(1000), retain=False).wait_stored(PATIENCE_S)
        assert outbox.state().bytes <= 64 * 1024
        assert outbox.state().messages == 64 * 1024 // (1000 + len(TOPIC))


def test_the_backlog_goes_out_at_its_rate_and_what_comes_after_it_at_once(tmp_path: Path) -> None:
    clock = [100.0]
    told: list[OutboxChanged] = []
    outbox = Outbox(
        OutboxSettings(drain_per_s=10),
        tmp_path / "o.db",
        "sensor-1",
        tell=told.append,
        wake=lambda: None,
        send_from_memory=lambda _o, _a: None,
        now_s=lambda: 0.0,
        monotonic_s=lambda: clock[0],
    )
    for number in range(30):
        put(outbox, str(number))
    outbox.connected()
    sent: list[tuple[float, str]] = []

    def send() -> None:
        for delivery in outbox.take():
            sent.append((clock[0], delivery.outgoing.payload.decode()))
            delivery.settle()
        wait_s = outbox.wait_s()
        if wait_s is not None:
            assert 0 < wait_s <= 0.1 + 1e-9
            clock[0] += wait_s

    eventually(lambda: send() or len(sent) == 30, "the backlog")  # type: ignore[func-returns-value]
    assert [text for _, text in sent] == list(map(str, range(30)))
    assert sent[-1][0] - sent[0][0] == pytest.approx(2.9)
    for number in range(30, 45):
        put(outbox, str(number))
    at = clock[0]
    eventually(lambda: send() or len(sent) == 45, "what came after")  # type: ignore[func-returns-value]
    assert clock[0] == at
    outbox.close(PATIENCE_S)


def test_a_batch_is_one_sync_and_nothing_is_acknowledged_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs: list[int] = []
    real = Database.writing
    held, go_on = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def watched(self: Database) -> Iterator[None]:
        with real(self):
            yield
            held.set()
            go_on.wait(PATIENCE_S)
        syncs.append(1)

    monkeypatch.setattr(Database, "writing", watched)
    with outbox_at(tmp_path / "o.db", durability="batch:2000ms") as (outbox, _):
        acknowledgements = [outbox.put(TOPIC, str(number), retain=False) for number in range(20)]
        assert held.wait(PATIENCE_S)
        assert not any(one.is_stored for one in acknowledgements)
        with pytest.raises(UnreachableError, match="the disk did not take it within"):
            acknowledgements[0].wait_stored(0.01)
        go_on.set()
        for one in acknowledgements:
            one.wait_stored(PATIENCE_S)
        assert len(syncs) == 1


def test_a_damaged_file_is_put_aside_and_what_can_be_read_goes_out(state: Path, broker: BrokerStub) -> None:
    path = state / "outbox.db"
    before = client_of(state)
    for number in range(300):
        before.publish(TOPIC, f"{number:03} " + "x" * 200, defer=True)
    before.stop()
    content = bytearray(path.read_bytes())
    middle = len(content) // 4096 // 2 * 4096
    content[middle : middle + 4096] = b"\xa5" * 4096
    path.write_bytes(content)
    watching = Watching()
    with client_of(state, observe=watching) as client:
        client.publish(TOPIC, "after", wait=PATIENCE_S)
    changed = watching.wait_for(OutboxChanged)
    assert changed.state == "set-aside"
    assert str(path) in changed.detail
    assert "messages could still be read" in changed.detail
    assert (state / "outbox.db.damaged").exists()
    got = telemetry(broker)
    assert got[-1] == "after"
    assert got[:-1] == sorted(set(got[:-1]))
    assert 250 < len(got) < 301
    assert got[0].startswith("000")
    assert got[-2].startswith("299")


def test_another_device_s_messages_do_not_go_out(tmp_path: Path) -> None:
    path = tmp_path / "o.db"
    with outbox_at(path) as (outbox, _):
        put(outbox, "one")
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE facts SET value = 'sensor-2' WHERE name = 'owner'")
    with outbox_at(path) as (outbox, told):
        put(outbox, "two")
    assert "another device's (sensor-2)" in told[0].detail
    assert stored(path) == ["two"]
    assert stored(tmp_path / "o.db.of-another") == ["one"]


def test_it_is_used_by_one_client_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "o.db"
    with outbox_at(path) as (one, _), outbox_at(path) as (other, told):
        put(one, "one")
        with pytest.raises(SystemFailureError, match="another process has it") as error:
            put(other, "two")
        assert "keep=False" in error.value.hint
        assert [event.state for event in told] == ["failing"]
    assert stored(path) == ["one"]


def test_a_full_disk_is_said_once_nothing_is_acknowledged_and_it_works_again_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "o.db"
    monkeypatch.setattr(module, "RETRY_DISK_S", 0.05)
    with outbox_at(path) as (outbox, told):
        for number in range(40):
            put(outbox, str(number))
        database = outbox._database
        assert database is not None
        connection = database._connection
        monkeypatch.setattr(database, "_connection", Full(connection))
        for _ in range(3):
            with pytest.raises(SystemFailureError, match="the disk is full"):
                put(outbox, "lost")
        assert outbox.state().failing == "the disk is full"
        assert take_all(outbox, 40) == list(map(str, range(40)))  # what is there can still be sent
        monkeypatch.setattr(database, "_connection", connection)
        eventually(lambda: not outbox.state().failing, "that it works again")
        put(outbox, "found")
        assert [event.state for event in told if event.state != "drained"] == ["failing", "working"]
    assert stored(path) == ["found"]


class Full:
    """A connection whose disk is full."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
        if statement == "COMMIT":
            self._connection.execute("ROLLBACK")
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return self._connection.execute(statement, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


def test_where_that_is_wanted_it_goes_on_in_memory(state: Path, broker: BrokerStub) -> None:
    path = state / "nowhere" / "outbox.db"
    settings = OutboxSettings(path=path, when_failing="memory")
    watching = Watching()
    with client_of(state, outbox=settings, observe=watching) as client:
        acknowledgement = client.publish(TOPIC, "live", wait=PATIENCE_S)
        assert not acknowledgement.is_stored
        with pytest.raises(SystemFailureError, match="No such file or directory"):
            acknowledgement.wait_stored()
    assert telemetry(broker) == ["live"]
    assert "publications wait in memory" in watching.wait_for(OutboxChanged).detail


def test_a_service_names_its_file(tmp_path: Path, pki: Pki, broker: BrokerStub) -> None:
    anchors = tmp_path / "ca.pem"
    anchors.write_bytes(pki.root.pem)
    identity = pki.operator("alice").write(tmp_path / "alice.pem")
    credentials = Credentials.from_files(identity, anchors, BrokerAddress("127.0.0.1", broker.port))
    with pytest.raises(ConfigurationError, match="it has no state folder"):
        Client(credentials, outbox=OutboxSettings())
    with Client(credentials, outbox=OutboxSettings(path=tmp_path / "alice.db")) as client:
        assert client.publish("a", b"", wait=PATIENCE_S).is_stored


def test_whoever_publishes_faster_than_the_disk_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 5)
    highest = 0
    with outbox_at(tmp_path / "o.db") as (outbox, _):
        for number in range(200):
            outbox.put(TOPIC, str(number), retain=False)
            highest = max(highest, len(outbox._pending))
        last = outbox.put(TOPIC, "last", retain=False)
        last.wait_stored(PATIENCE_S)
        assert highest <= 5
        assert outbox.state().messages == 201
        assert len(outbox._waiting) == 1  # nobody waits for the others


def test_memory_is_bounded_by_what_is_read_ahead(tmp_path: Path) -> None:
    with outbox_at(tmp_path / "o.db", drain_per_s=0) as (outbox, _):
        for _ in range(20):
            outbox.put(TOPIC, bytes(600_000), retain=False).wait_stored(PATIENCE_S)
        assert sum(row.size for row in outbox._ready) <= 2 * module.READY_BYTES
        assert outbox.state().messages == 20
        outbox.connected()
        seen = 0

        def drained() -> bool:
            nonlocal seen
            for delivery in outbox.take():
                seen += 1
                delivery.settle()
            return seen == 20

        eventually(drained, "all of them")


def test_what_durability_rests_on(tmp_path: Path) -> None:
    database = Database(tmp_path / "o.db", "sensor-1", by_priority=False)
    names = ("journal_mode", "synchronous", "locking_mode")
    found = [database._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names]
    database.close()
    assert found == ["wal", 2, "exclusive"]  # 2: every commit is synced


@pytest.mark.parametrize(("together", "after_s"), [(3, 3600.0), (1000, 0.05)])
def test_what_was_accepted_is_removed_together_or_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int, after_s: float
) -> None:
    monkeypatch.setattr(module, "REMOVE_TOGETHER", together)
    monkeypatch.setattr(module, "REMOVE_AFTER_S", after_s)
    with outbox_at(tmp_path / "o.db") as (outbox, _):
        for number in range(3):
            put(outbox, str(number))
        assert take_all(outbox, 3) == ["0", "1", "2"]
        eventually(lambda: not outbox._accepted, "the removal")


def test_a_reply_goes_past_a_week_s_readings(state: Path, broker: BrokerStub) -> None:
    broker.acknowledges = False
    client = client_of(state)

    @client.command("ping")
    def ping(_: Command) -> str:
        return "pong"

    with client:
        for number in range(100):
            client.publish(TOPIC, str(number), defer=True)
        broker.wait_for(PUBLISH, lambda packet: packet.payload == str(IN_FLIGHT - 1).encode())
        broker.deliver("devices/sensor-1/commands/ping", b"", qos=1)
        broker.wait_for(PUBLISH, lambda packet: packet.payload == b"pong")
        client.stop(timeout_s=0)
    assert stored(state / "outbox.db") == list(map(str, range(100)))
