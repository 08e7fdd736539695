"""Group commit: several threads' transactions as one, so that sixteen boards do not wait for sixteen writes.

Rules:

- The first thread opens a transaction of the registry beneath and does its work in it. Threads that came to wait
  meanwhile do theirs in the same one, one after the other; then it is written, once.
- Nobody returns before that write is durable; if it fails, it fails for everybody.
- A share that ends in an exception is rolled back alone; the others stand.
- A thread waits for no company: alone, it writes at once. The group forms by itself while the disk is busy.
- Between processes the registry's own lock holds, as ever.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from birthmark.device.errors import RegistryError
from birthmark.provisioning.registry.interface import RegistryAwayError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from birthmark.provisioning.audit import Head
    from birthmark.provisioning.registry.interface import Registry, Transaction, View

MAX_GROUP: Final = 64
"""How many may share one write: whoever leads a group gets done in the end."""


class _Group:
    """One write, and those who share it. Guarded by the registry's condition."""

    def __init__(self) -> None:
        self.transaction: Transaction | None = None
        """There while somebody may join."""
        self.joined = 0
        self.is_busy = True
        self.is_over = False
        self.error: BaseException | None = None


class GroupedRegistry:
    """A registry (`interface.Registry`) whose threads share their writes.

    Args:
        beneath: the registry.
    """

    def __init__(self, beneath: Registry) -> None:
        self._beneath = beneath
        self._turn = threading.Condition()
        self._group: _Group | None = None
        self._waiting = 0
        self._held = threading.local()

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Open a transaction, or take part in one (`interface.Registry.transaction`)."""
        if getattr(self._held, "held", False):
            raise RuntimeError("transactions of one registry do not nest")
        self._held.held = True
        try:
            group, leads = self._enter()
            if leads:
                yield from self._lead(group)
            else:
                yield from self._join(group)
        finally:
            self._held.held = False

    def view(self) -> AbstractContextManager[View]:
        """Open a view of the last durable state (`interface.Registry.view`)."""
        return self._beneath.view()

    def audit_head(self) -> Head:
        """Bring the audit log up to date (`interface.Registry.audit_head`)."""
        return self._beneath.audit_head()

    def _enter(self) -> tuple[_Group, bool]:
        """Wait for a turn: to lead a group of its own, or to work in the one that is open."""
        with self._turn:
            self._waiting += 1
            try:
                while True:
                    group = self._group
                    if group is None:
                        self._group = group = _Group()
                        return group, True
                    if group.transaction is not None and not group.is_busy and group.joined < MAX_GROUP:
                        group.is_busy = True
                        group.joined += 1
                        return group, False
                    self._turn.wait()
            finally:
                self._waiting -= 1

    def _lead(self, group: _Group) -> Iterator[Transaction]:
        failure: BaseException | None = None
        try:
            with self._beneath.transaction() as transaction:
                try:
                    with transaction.apart():
                        yield transaction
                except BaseException as error:  # noqa: BLE001 - it is raised again when the others are done
                    failure = error
                self._let_others_in(group, transaction)
        except BaseException as error:
            group.error = error
            raise
        finally:
            with self._turn:
                group.transaction = None
                group.is_over = True
                self._group = None
                self._turn.notify_all()
        if failure is not None:
            raise failure

    def _let_others_in(self, group: _Group, transaction: Transaction) -> None:
        with self._turn:
            group.transaction = transaction
            group.is_busy = False
            self._turn.notify_all()
            while group.is_busy or (self._waiting and group.joined < MAX_GROUP):
                self._turn.wait()
            group.transaction = None

    def _join(self, group: _Group) -> Iterator[Transaction]:
        transaction = group.transaction
        if transaction is None:
            raise RuntimeError("a group let somebody in without a transaction")
        failed = True
        try:
            with transaction.apart():
                yield transaction
            failed = False
        finally:
            with self._turn:
                group.is_busy = False
                self._turn.notify_all()
                while not failed and not group.is_over:
                    self._turn.wait()
        if group.error is not None:
            raise _same(group.error) from group.error


def _same(error: BaseException) -> RegistryError:
    """Return an error of the write as everybody else in the group gets it."""
    if isinstance(error, RegistryError):
        kind = RegistryAwayError if isinstance(error, RegistryAwayError) else RegistryError
        return kind(error.message, hint=error.hint)
    return RegistryError(
        "could not write the registry: the write that this one was part of was broken off",
        hint="run the same command again: it resumes where it stopped",
    )
