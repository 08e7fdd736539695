"""`birthmark ca show`, and whose place is below it: the station's CAs, their options and their answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from birthmark.device.console import Console, Parser, command
from birthmark.provisioning import rollover_commands
from birthmark.provisioning.options import add_station_option, open_station

if TYPE_CHECKING:
    import argparse

    from birthmark.provisioning.cas import Ca
    from birthmark.provisioning.station import Station


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add these commands."""
    parser = commands.add_parser(
        "ca",
        help="look after the station's CAs and their keys",
        description="look after the station's CAs and their keys",
        examples="birthmark ca show",
    )
    actions: argparse._SubParsersAction[Parser] = parser.add_subparsers(
        title="actions", metavar="ACTION", required=True
    )
    _add_show(actions)
    rollover_commands.add_to(actions)


def _add_show(actions: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        actions,
        "show",
        _show,
        "say which CAs there are, where their keys are and when they end",
        "birthmark ca show\nbirthmark ca show --json",
    )
    add_station_option(parser)


def _show(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    rows = [_described(station, ca) for ca in station.cas]
    console.table(rows, ["ca", "kind", "phase", "key", "not_after", "days_left"], empty="there is no CA")


def _described(station: Station, ca: Ca) -> dict[str, Any]:
    certificate = ca.certificate
    not_after = certificate.not_valid_after_utc
    return {
        "ca": ca.short,
        "kind": ca.kind.value,
        "phase": ca.phase,
        "key": "here" if station.key_path(ca).exists() else "away",
        "not_after": not_after.strftime("%Y-%m-%d"),
        "days_left": (not_after - station.clock()).days,
        "key_id": ca.key_id,
        "root": ca.root,
        "subject": certificate.subject.rfc4514_string(),
        "cert_serial": f"{certificate.serial_number:x}",
        "key_path": str(station.key_path(ca)),
    }
