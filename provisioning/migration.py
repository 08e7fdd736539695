"""A station's registry, moved to another back end: whole or not at all.

Rules:

- Nobody else writes meanwhile: the registry's lock is held from the first row that is read until `station.toml`
  names the new place. Whoever waited for it, or works with the old registry after that, is told to start again.
- What arrived is read again and compared, row count and digest over everything, before it counts.
- `station.toml` is the one switch. Killed before it, the old registry is in force, and what lies unfinished in the
  new place is overwritten by the next attempt; killed after it, the new one is.
- The old registry is marked as moved, and not opened by mistake again; nothing in it is deleted.
- A registry that several stations share is not moved from under the others.
"""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from birthmark.device.durable import remove_leftovers
from birthmark.device.errors import BirthmarkError, ConfigurationError, RegistryError
from birthmark.provisioning.actor import actor
from birthmark.provisioning.audit import append_missing
from birthmark.provisioning.registry.content import MOVED, ROWS, UNFINISHED, Tally
from birthmark.provisioning.registry.opening import open_registry
from birthmark.provisioning.registry.place import REGISTRY_FILE
from birthmark.provisioning.settings import read_settings
from birthmark.provisioning.settings_edit import put_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from birthmark.provisioning.registry.content import Placed
    from birthmark.provisioning.registry.interface import StoredRegistry
    from birthmark.provisioning.settings import RegistrySetting
    from birthmark.provisioning.station import Station


@dataclass(frozen=True, slots=True)
class Migration:
    """What was moved."""

    before: str
    after: str
    rows: int
    digest: str
    """SHA-256 over everything that the registry holds, the same on both sides."""
    trouble: str
    """Why the old registry could not be marked as moved; empty if it is."""


def migrate(station: Station, to: RegistrySetting, *, tell: Callable[[str, int], None]) -> Migration:
    """Move a station's registry.

    Args:
        station: which; it need not be unlocked. Its registry is the old one still: open it again.
        to: where to.
        tell: is called for each row, with what is being done and how many it was done with.

    Raises:
        ConfigurationError: it is there already; or the new place cannot be used.
        RegistryError: there is a registry in the new place; one of the two cannot be read or written; what arrived
            is not what was sent; other stations share the old one. The old one is in force, unchanged.
    """
    source = station.registry
    with source.snapshot():  # its lock keeps everybody else from writing the file
        remove_leftovers(station.folder, REGISTRY_FILE)
    if to == station.settings.registry:
        raise ConfigurationError(
            f"could not move the registry to {source.shown}: that is where it is",
            hint="`birthmark list` reads it there; there is nothing to be done",
        )
    if source.shares():
        raise RegistryError(
            f"could not move the registry {source.shown}: other stations share it, and would be left behind",
            hint="back this station up and restore it with --registry, if it is to go its own way",
        )
    target = open_registry(station.folder, to, clock=station.clock, actor=actor())
    try:
        with source.snapshot() as snapshot:
            standing = f"{UNFINISHED} {secrets.token_hex(8)}"
            sent = Tally()
            target.make(_told(tell, "copied", sent(snapshot.documents)), standing=standing)
            with _gone_unless_in_force(target, standing, station, to):
                _verify(target, sent, tell)
                lines = target.arrive(
                    standing,
                    "registry-migrate",
                    "registry",
                    before=source.shown,
                    after=target.shown,
                    rows=sent.rows,
                    digest=sent.digest,
                )
                put_registry(station.settings_path, to)
            append_missing(source.audit_path, lines)
            target.stand("")
        return Migration(source.shown, target.shown, sent.rows, sent.digest, _mark_moved(source))
    finally:
        target.close()


def _verify(target: StoredRegistry, sent: Tally, tell: Callable[[str, int], None]) -> None:
    received = Tally()
    with target.documents() as documents:
        for _ in _told(tell, "verified", received(documents)):
            pass
    if (received.rows, received.digest) != (sent.rows, sent.digest):
        raise RegistryError(
            f"could not move the registry to {target.shown}: {sent.rows} rows were sent, {received.rows} arrived, "
            "and not all that was sent is there",
            hint="the old one stays in force; was it written by a newer birthmark?",
        )


@contextmanager
def _gone_unless_in_force(
    target: StoredRegistry, standing: str, station: Station, to: RegistrySetting
) -> Iterator[None]:
    """Remove what was brought to the new place if the block fails, unless it is in force by then."""
    try:
        yield
    except BaseException:
        if read_settings(station.settings_path).registry != to:
            target.discard(standing)
        raise


def _mark_moved(source: StoredRegistry) -> str:
    try:
        source.stand(MOVED)
    except BirthmarkError as error:
        return error.message
    return ""


def _told(tell: Callable[[str, int], None], what: str, documents: Iterable[Placed]) -> Iterator[Placed]:
    rows = 0
    for placed in documents:
        if placed.table == ROWS:
            rows += 1
            tell(what, rows)
        yield placed
