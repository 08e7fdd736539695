"""The journal between the broker's state and its store: groups, promises, failures. The store is the test's."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from support.patience import PATIENCE_S
from support.waiting import until

from birthmark.broker import journal as journal_module
from birthmark.broker.config import Durability
from birthmark.broker.counters import Counters
from birthmark.broker.journal import Journal
from birthmark.broker.packets import topic_field
from birthmark.broker.peer import Peer
from birthmark.broker.policy_file import parse_policy
from birthmark.broker.records import Changes, Stored
from birthmark.broker.retained import Retained
from birthmark.broker.session import Message, Outgoing, Session
from birthmark.broker.store import StoreError
from birthmark.device.identity import DeviceId, Role

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


WHEN = datetime(2026, 1, 1, tzinfo=UTC)
PEER = Peer(
    DeviceId("s-1"), Role("device"), is_service=False, issuer="ab", cert_serial=1, not_before=WHEN, not_after=WHEN
)
POLICY = parse_policy(b'[roles.device]\npublish = ["#"]\n[[assignments]]\nou = "device"\nrole = "device"\n', "p")


class Sink:
    """A store that says when it may write, and whether it can."""

    def __init__(self) -> None:
        self.groups: list[Changes] = []
        self.may_write = threading.Event()
        self.may_write.set()
        self.failing = False
        self.is_closed = False

    def apply(self, changes: Changes) -> None:
        assert self.may_write.wait(PATIENCE_S)
        if self.failing:
            raise StoreError("could not write to the store: full", "make room")
        self.groups.append(changes)

    def close(self) -> None:
        self.is_closed = True


class Stream:
    """What the journal asks of a stream."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.held: list[tuple[int, bytes]] = []
        self.error: Exception | None = None
        self.pauses: list[bool] = []

    def write(self, data: bytes) -> None:
        if self.held:
            self.held.append((0, data))
        else:
            self.sent.append(data)

    def hold(self, number: int, data: bytes) -> None:
        self.held.append((number, data))

    def release(self, number: int) -> bool:
        while self.held and self.held[0][0] <= number:
            self.sent.append(self.held.pop(0)[1])
        return not self.held

    def abort(self, error: Exception | None = None) -> None:
        self.error = error

    def pause(self) -> None:
        self.pauses.append(True)

    def resume(self) -> None:
        self.pauses.append(False)


def session() -> Session:
    return Session("s-1", PEER, POLICY.rights(PEER.device_id, PEER.role), clean=False)


def outgoing() -> Outgoing:
    return Outgoing(Message("t", topic_field("t"), b"x", 1), 1)


def run(
    test: Callable[[Journal, Sink, Counters], Awaitable[None]], durability: Durability = Durability.ACKNOWLEDGED
) -> Sink:
    sink = Sink()

    async def main() -> None:
        counters = Counters()
        journal = Journal(asyncio.get_running_loop(), durability, counters)
        journal.start(sink, Stored())
        try:
            await test(journal, sink, counters)
        finally:
            sink.may_write.set()
            await journal.close(5)

    asyncio.run(main())
    assert sink.is_closed
    return sink


def test_a_promise_waits_for_its_change_and_nothing_overtakes_it() -> None:
    async def test(journal: Journal, sink: Sink, counters: Counters) -> None:
        sink.may_write.clear()
        stream, other = Stream(), Stream()
        journal.open_session(session())
        journal.send_after(stream, journal.recorded, b"first")
        stream.write(b"second")
        journal.send_after(other, 0, b"owed to nobody")
        assert other.sent == [b"owed to nobody"]
        await asyncio.sleep(0.05)
        assert stream.sent == []
        sink.may_write.set()
        await until(lambda: stream.sent == [b"first", b"second"])
        journal.send_after(stream, journal.recorded, b"on disk already")
        assert stream.sent[-1] == b"on disk already"

    run(test)


def test_what_changes_during_a_commit_is_one_group() -> None:
    async def test(journal: Journal, sink: Sink, counters: Counters) -> None:
        sink.may_write.clear()
        one = session()
        journal.open_session(one)
        await asyncio.sleep(0.01)
        for _ in range(100):
            journal.note_delivery(one, outgoing())
            await asyncio.sleep(0)
        sink.may_write.set()
        assert await journal.settle(5)
        assert [len(group.deliveries) for group in sink.groups] == [0, 100]
        assert counters.commits == 2

    run(test)


def test_what_comes_and_goes_within_a_group_is_not_written() -> None:
    async def test(journal: Journal, sink: Sink, counters: Counters) -> None:
        one, message = session(), outgoing()
        journal.open_session(one)
        journal.note_delivery(one, message)
        journal.drop_delivery(message)
        assert await journal.settle(5)

    (group,) = run(test).groups
    assert not group.deliveries
    assert not group.messages


def test_a_message_is_kept_once_and_goes_with_the_last_it_is_owed_to() -> None:
    async def test(journal: Journal, sink: Sink, counters: Counters) -> None:
        one, shared = session(), Message("t", topic_field("t"), b"x", 1)
        journal.open_session(one)
        both = [Outgoing(shared, 1), Outgoing(shared, 1)]
        for item in both:
            journal.note_delivery(one, item)
        assert await journal.settle(5)
        assert len(sink.groups[-1].messages) == 1
        journal.drop_delivery(both[0])
        assert await journal.settle(5)
        assert not sink.groups[-1].messages
        journal.drop_delivery(both[1])
        assert await journal.settle(5)
        assert list(sink.groups[-1].messages.values()) == [None]

    run(test)


def test_a_failure_breaks_its_promises_and_the_changes_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.05)

    async def test(journal: Journal, sink: Sink, counters: Counters) -> None:
        sink.failing = True
        stream, one = Stream(), session()
        journal.open_session(one)
        journal.send_after(stream, journal.recorded, b"never said")
        await until(lambda: stream.error is not None)
        assert isinstance(stream.error, StoreError)
        assert journal.is_failing
        journal.note_incoming(one, 7)
        await until(lambda: counters.store_failures >= 3)
        assert counters.unstored_closed == 1
        assert not await journal.settle(0.01)
        sink.failing = False
        await until(lambda: not journal.is_failing)
        assert stream.sent == []
        assert sink.groups[0].sessions
        assert sink.groups[0].incoming

    run(test)


def test_publishers_wait_while_the_writer_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(journal: Journal, sink: Sink, counters: Counters) -> None:
        sink.may_write.clear()
        journal.open_session(session())
        await asyncio.sleep(0.01)
        stream = Stream()
        journal.note_retained(Retained("t", bytes(1_000_000), 0, None))
        assert journal.pending_bytes > 1_000_000
        journal.slow_down(stream)
        journal.slow_down(stream)
        assert stream.pauses == [True]
        sink.may_write.set()
        await until(lambda: stream.pauses == [True, False])
        assert journal.pending_bytes == 0
        assert counters.publishers_paused == 1

    run(test)


def test_periodic_promises_nothing_and_writes_at_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "PERIOD_S", 1e9)

    async def test(journal: Journal, sink: Sink, counters: Counters) -> None:
        stream = Stream()
        journal.open_session(session())
        journal.send_after(stream, journal.recorded, b"at once")
        assert stream.sent == [b"at once"]
        await asyncio.sleep(0.05)
        assert sink.groups == []

    assert len(run(test, Durability.PERIODIC).groups) == 1


def test_periodic_does_not_have_publishers_wait_for_the_end_of_the_period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "PERIOD_S", 1e9)

    async def test(journal: Journal, sink: Sink, counters: Counters) -> None:
        journal.note_retained(Retained("a/b", b"x", 1, PEER))
        stream = Stream()
        journal.slow_down(stream)
        assert stream.pauses == [True, False]
        await until(lambda: len(sink.groups) == 1)  # not `settle`, which ends a period by itself

    run(test, Durability.PERIODIC)


def test_periodic_goes_on_at_once_for_who_waits_while_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "PERIOD_S", 1e9)

    async def test(journal: Journal, sink: Sink, counters: Counters) -> None:
        sink.may_write.clear()
        journal.note_retained(Retained("a/b", b"x", 1, PEER))
        journal.slow_down(Stream())
        stream = Stream()
        journal.note_retained(Retained("a/c", b"x", 1, PEER))
        journal.slow_down(stream)
        assert stream.pauses == [True]
        sink.may_write.set()
        await until(lambda: stream.pauses == [True, False])
        await until(lambda: len(sink.groups) == 2)

    run(test, Durability.PERIODIC)


def test_nothing_is_noted_of_the_brokers_own_topics() -> None:
    async def test(journal: Journal, sink: Sink, counters: Counters) -> None:
        journal.note_retained(Retained("$SYS/broker/uptime", b"1", 0, None))
        assert journal.recorded == 0

    assert run(test).groups == []


@pytest.mark.parametrize(
    ("durability", "said"),
    [
        (Durability.ACKNOWLEDGED, "nothing of them was acknowledged"),
        (Durability.PERIODIC, "what was acknowledged may be among them"),
    ],
)
def test_what_is_not_on_disk_at_the_end_is_said_as_it_is(
    durability: Durability, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(journal: Journal, sink: Sink, counters: Counters) -> None:
        sink.may_write.clear()
        journal.open_session(session())
        thread = journal._thread
        assert thread is not None
        await journal.close(0.05)  # it does not wait for a disk that hangs
        sink.may_write.set()
        await asyncio.to_thread(thread.join, PATIENCE_S)

    run(test, durability)
    assert caplog.messages[0] == f"stopped with changes that are not on disk; {said}"
