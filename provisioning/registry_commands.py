"""`birthmark registry`: its commands put together, and `migrate`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from birthmark.device.console import INTERRUPTED, Console, Parser, command
from birthmark.device.options import taken_from_options
from birthmark.provisioning import registry_file_commands
from birthmark.provisioning.migration import migrate
from birthmark.provisioning.options import add_station_option, open_station
from birthmark.provisioning.registry.opening import setting_from
from birthmark.provisioning.settings import read_settings

if TYPE_CHECKING:
    import argparse

    from birthmark.provisioning.settings import RegistrySetting
    from birthmark.provisioning.station import Station

PROGRESS_S: Final = 2.0
"""How often somebody who waits is told how far it is."""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add these commands."""
    parser = commands.add_parser(
        "registry",
        help="look after what the station knows of its identities",
        description="look after what the station knows of its identities",
        examples="""\
birthmark registry migrate sqlite:///registry.db
birthmark registry export -o devices.csv
birthmark registry import made.jsonl""",
    )
    actions: argparse._SubParsersAction[Parser] = parser.add_subparsers(
        title="actions", metavar="ACTION", required=True
    )
    _add_migrate(actions)
    registry_file_commands.add_to(actions)


def _add_migrate(actions: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        actions,
        "migrate",
        _migrate,
        "move the registry to another back end, whole or not at all",
        """\
birthmark registry migrate sqlite:///registry.db
birthmark registry migrate postgresql://db.example.com/birthmark
birthmark registry migrate tinydb""",
    )
    add_station_option(parser)
    parser.add_argument("url", metavar="URL", help="a database that has no registry in it, or `tinydb`")


def _migrate(arguments: argparse.Namespace, console: Console) -> int:
    station = open_station(arguments)
    with taken_from_options():
        to = setting_from(arguments.url, log=station.settings.registry.log)
    try:
        _moved(station, to, console)
    except KeyboardInterrupt:
        is_moved = read_settings(station.settings_path).registry == to
        told = "it has moved" if is_moved else "the registry is where it was; the same command again moves it"
        console.emit({"event": "interrupted", "moved": is_moved}, f"interrupted: {told}")
        return INTERRUPTED
    return 0


def _moved(station: Station, to: RegistrySetting, console: Console) -> None:
    told_s = time.monotonic()

    def tell(what: str, rows: int) -> None:
        nonlocal told_s
        if time.monotonic() - told_s >= PROGRESS_S:
            told_s = time.monotonic()
            console.say(f"{what}: {rows:,} rows")

    moved = migrate(station, to, tell=tell)
    console.facts(
        {"registry": moved.after, "before": moved.before, "rows": moved.rows, "verified_sha256": moved.digest}
    )
    if moved.trouble:
        console.warn(f"the old registry could not be marked as moved ({moved.trouble}): see that nobody uses it")
    console.say("\nServices of this station that are running (renewd, crl serve, run) must be started again.")
