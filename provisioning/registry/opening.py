"""Which registry a station has, and opening it: the one place where a back end is chosen.

Rules:

- `station.toml` says which (`[registry]`); without a word there it is TinyDB's `registry.json` in the folder.
- SQLAlchemy is imported for a registry in a database, TinyDB for one without: each costs a command some time.
- A registry that was opened stays the right one only as long as `station.toml` names it (`InForce`).
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from birthmark.device.errors import ConfigurationError, MissingLibraryError, RegistryError
from birthmark.device.loading import loading
from birthmark.provisioning.registry.place import always
from birthmark.provisioning.settings import SETTINGS_FILE, RegistrySetting, read_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import datetime
    from pathlib import Path

    from birthmark.provisioning.registry.content import Placed
    from birthmark.provisioning.registry.interface import StoredRegistry
    from birthmark.provisioning.registry.sql import SqlRegistry
    from birthmark.provisioning.registry.tiny import TinyRegistry

TINYDB = "tinydb"
"""What a command calls the registry that needs no database."""


class InForce:
    """Asks whether the registry that a station's settings name is still the one that was opened.

    Args:
        folder: the station's.

    Raises:
        ConfigurationError: its settings cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / SETTINGS_FILE
        self._signature = _signature(self._path)
        self.settings = read_settings(self._path)

    def __call__(self) -> None:
        """Raise `RegistryError` if it is not; costs one look at the file unless that has changed."""
        signature = _signature(self._path)
        if signature == self._signature:
            return
        if read_settings(self._path).registry != self.settings.registry:
            raise RegistryError(
                "could not use the registry: this station has moved to another one meanwhile",
                hint="start this again: it opens the one that is in force now",
            )
        self._signature = signature


def open_registry(
    folder: Path,
    setting: RegistrySetting,
    *,
    clock: Callable[[], datetime],
    actor: str,
    in_force: Callable[[], None] = always,
) -> StoredRegistry:
    """Return the registry of the station in `folder`; nothing is read yet.

    Raises:
        ConfigurationError: its URL cannot be used, or what is needed for it is not installed.
    """
    with loading():  # the database's driver, too
        if setting.url:
            return _sql()(folder, setting.url, clock=clock, actor=actor, log=setting.log, in_force=in_force)
        return _tiny()(folder, clock=clock, actor=actor, in_force=in_force)


@contextmanager
def new_registry(
    folder: Path,
    setting: RegistrySetting,
    *,
    clock: Callable[[], datetime],
    actor: str,
    documents: Iterable[Placed] = (),
) -> Iterator[StoredRegistry]:
    """Make a registry for a station that is being made in `folder`; it is gone if the block ends in an exception.

    Raises:
        RegistryError: there is one already, or it cannot be written.
        ConfigurationError: its URL cannot be used, or what is needed for it is not installed.
    """
    if not setting.url:
        yield _tiny().create(folder, clock=clock, actor=actor, documents=documents)
        return
    registry = _sql().create(folder, setting.url, clock=clock, actor=actor, log=setting.log, documents=documents)
    try:
        yield registry
    except BaseException:
        registry.discard()
        raise
    finally:
        registry.close()


def setting_from(word: str, *, log: str = "") -> RegistrySetting:
    """Return what a command's argument stands for: `tinydb`, or the URL of a database.

    Raises:
        ConfigurationError: it is no URL, or has a password in it, which every user of the machine could read.
    """
    if word == TINYDB:
        return RegistrySetting()
    setting = RegistrySetting(word, log)
    if has_password(word):
        raise ConfigurationError(
            "could not use the URL of the registry: it has a password in it, and everybody can read arguments",
            hint="leave it out: PostgreSQL's ~/.pgpass, PGPASSFILE or PGPASSWORD gives it",
        )
    return setting


def has_password(url: str) -> bool:
    """Whether a password stands in the URL of a database; `ConfigurationError` if it is none."""
    from birthmark.provisioning.registry import sql_database  # noqa: PLC0415 - it costs time to import

    return sql_database.has_password(url)


def _tiny() -> type[TinyRegistry]:
    try:
        from birthmark.provisioning.registry.tiny import TinyRegistry  # noqa: PLC0415 - it costs time to import
    except ImportError as error:
        raise MissingLibraryError(
            f"could not open the registry: the library {error.name} is not installed",
            hint="pip install 'birthmark[station]'",
        ) from error
    return TinyRegistry


def _sql() -> type[SqlRegistry]:
    from birthmark.provisioning.registry.sql import SqlRegistry  # noqa: PLC0415 - it costs time to import

    return SqlRegistry


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        facts = os.stat(path)  # noqa: PTH116 - called at every transaction
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns, facts.st_size
