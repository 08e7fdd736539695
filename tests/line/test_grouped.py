"""Group commit: shared writes, each share whole or not at all, nobody back before the disk has it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from support.patience import PATIENCE_S
from support.waiting import eventually

from birthmark.device.errors import RegistryError
from birthmark.provisioning import audit_check
from birthmark.provisioning.registry.grouped import GroupedRegistry
from birthmark.provisioning.registry.interface import DuplicateError, RegistryAwayError
from birthmark.provisioning.registry.model import Kind, Row
from birthmark.provisioning.registry.tiny import TinyRegistry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from birthmark.provisioning.registry.interface import Transaction


class Slow(TinyRegistry):
    """Counts its writes, and lets a write wait until a test says so."""

    writes = 0
    gate: threading.Event | None = None
    at_gate: threading.Event
    failure: RegistryError | None = None

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        with super().transaction() as transaction:
            yield transaction
            if self.gate is not None:
                self.at_gate.set()
                assert self.gate.wait(PATIENCE_S)
            if self.failure is not None:
                raise self.failure
            self.writes += 1


@pytest.fixture
def beneath(tmp_path: Path) -> Slow:
    registry = Slow.create(tmp_path / "registry", clock=lambda: datetime.now(UTC), actor="test@host")
    assert isinstance(registry, Slow)
    return registry


@pytest.fixture
def registry(beneath: Slow) -> GroupedRegistry:
    return GroupedRegistry(beneath)


def insert(transaction: Transaction, name: str) -> Row:
    row = transaction.insert(
        kind=Kind.DEVICE, name=name, role="sensor", hwid=name.encode().ljust(4, b"."), txn=bytes(16)
    )
    transaction.record("reserve", name)
    return row


def names(registry: GroupedRegistry) -> list[str]:
    with registry.view() as view:
        return [row.name for row in view.rows()]


def add(registry: GroupedRegistry, name: str) -> None:
    with registry.transaction() as transaction:
        insert(transaction, name)
    assert name in names(registry), "it came back before its row was durable"


def wait_for_waiting(registry: GroupedRegistry, count: int) -> None:
    eventually(lambda: registry._waiting >= count, "they never came")


def sixteen_behind_one(registry: GroupedRegistry, beneath: Slow, pool: ThreadPoolExecutor, work: Any) -> list[Any]:
    """Start `work(n)` sixteen times while the write of another transaction is held up, then let it go."""
    beneath.gate, beneath.at_gate = threading.Event(), threading.Event()
    first = pool.submit(add, registry, "first")
    assert beneath.at_gate.wait(PATIENCE_S)
    futures = [pool.submit(work, number) for number in range(16)]
    wait_for_waiting(registry, 16)
    beneath.gate.set()
    first.result(PATIENCE_S)
    return futures


def test_alone_it_is_one_write(registry: GroupedRegistry, beneath: Slow) -> None:
    add(registry, "one")
    add(registry, "two")
    assert (beneath.writes, names(registry)) == (2, ["one", "two"])


def test_sixteen_that_wait_share_a_write(registry: GroupedRegistry, beneath: Slow) -> None:
    with ThreadPoolExecutor(20) as pool:
        futures = sixteen_behind_one(registry, beneath, pool, lambda n: add(registry, f"row-{n}"))
        for future in futures:
            future.result(PATIENCE_S)
    assert sorted(names(registry)) == sorted(["first", *(f"row-{n}" for n in range(16))])
    assert beneath.writes == 2
    verdict = audit_check.check(beneath)
    assert (verdict.problems, verdict.entries) == ((), 17)


def test_a_share_that_fails_is_undone_alone(registry: GroupedRegistry, beneath: Slow) -> None:
    def work(number: int) -> None:
        with registry.transaction() as transaction:
            insert(transaction, f"row-{number}")
            transaction.set_counter("count", transaction.counter("count") + 1)
            if number % 2:
                insert(transaction, "FIRST")

    with ThreadPoolExecutor(20) as pool:
        futures = sixteen_behind_one(registry, beneath, pool, work)
        for number, future in enumerate(futures):
            if number % 2:
                with pytest.raises(DuplicateError):
                    future.result(PATIENCE_S)
            else:
                future.result(PATIENCE_S)
    assert sorted(names(registry)) == sorted(["first", *(f"row-{n}" for n in range(0, 16, 2))])
    with registry.view() as view:
        assert view.counter("count") == 8
        assert [row.number for row in view.rows()] == list(range(1, 10)), "no number is lost to a failed share"
    assert not audit_check.check(beneath).problems


def test_a_leader_that_fails_takes_nobody_with_it(registry: GroupedRegistry, beneath: Slow) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def lead() -> None:
        with registry.transaction() as transaction:
            insert(transaction, "lost")
            inside.set()
            assert go_on.wait(PATIENCE_S)
            raise KeyError

    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(lead)
        assert inside.wait(PATIENCE_S)
        other = pool.submit(add, registry, "kept")
        wait_for_waiting(registry, 1)
        go_on.set()
        other.result(PATIENCE_S)
        with pytest.raises(KeyError):
            leader.result(PATIENCE_S)
    assert names(registry) == ["kept"]


@pytest.mark.parametrize("kind", [RegistryError, RegistryAwayError])
def test_a_write_that_fails_fails_for_everybody(
    registry: GroupedRegistry, beneath: Slow, kind: type[RegistryError]
) -> None:
    def work(number: int) -> None:
        with registry.transaction() as transaction:
            insert(transaction, f"row-{number}")
            beneath.failure = kind("could not write the registry: no space", hint="make room")

    with ThreadPoolExecutor(20) as pool:
        for future in sixteen_behind_one(registry, beneath, pool, work):
            with pytest.raises(RegistryError, match="no space") as caught:
                future.result(PATIENCE_S)
            assert type(caught.value) is kind
    beneath.failure = None
    assert names(registry) == ["first"]
    add(registry, "after")


def test_transactions_do_not_nest(registry: GroupedRegistry) -> None:
    with registry.transaction(), pytest.raises(RuntimeError, match="do not nest"), registry.transaction():
        pass
