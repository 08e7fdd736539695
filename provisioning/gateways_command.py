"""`birthmark gateways`: every gateway of the fleet in a row, and how far it is behind."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from birthmark.device.console import Console, Parser, command
from birthmark.device.stopping import stopping_on_signals
from birthmark.provisioning.crl_store import current_crl
from birthmark.provisioning.fleet_policy import current_policy
from birthmark.provisioning.fleet_table import COLUMNS, Aims, GatewayRow
from birthmark.provisioning.gateway_look import DEFAULT_TIMEOUT_S, look_at
from birthmark.provisioning.gateway_policies import note_policies
from birthmark.provisioning.gateway_receipts import completed, look_by_receipts, note_heard, standing_of
from birthmark.provisioning.options import add_station_option, add_timeout_option, open_station
from birthmark.provisioning.settings import read_settings

if TYPE_CHECKING:
    from birthmark.provisioning.station import Station

_CLEAR: str = "\033[H\033[2J"


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command."""
    parser = command(
        commands,
        "gateways",
        _gateways,
        "show what every gateway goes by, and how far it is behind",
        """\
birthmark gateways
birthmark gateways --watch
birthmark gateways --json | jq 'select(.well | not)'""",
    )
    add_station_option(parser)
    add_timeout_option(parser, DEFAULT_TIMEOUT_S, "how long to wait for the gateways")
    parser.add_argument(
        "--watch", type=_interval, nargs="?", const=5.0, metavar="S", help="show it every S seconds (default: 5)"
    )


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError("0.1 to 86400 seconds")
    return seconds


def _gateways(arguments: argparse.Namespace, console: Console) -> int:
    station = open_station(arguments)
    if arguments.watch is None:
        return _show(station, console, arguments.timeout)
    with stopping_on_signals() as stopping:
        wait_s = 0.0
        while not stopping.wait(wait_s):
            station.settings = read_settings(station.settings_path)
            if sys.stdout.isatty() and not console.as_json:
                console.emit_line(_CLEAR)
            _show(station, console, arguments.timeout)
            wait_s = arguments.watch
    return stopping.exit_code


def _show(station: Station, console: Console, timeout_s: float) -> int:
    rows = fleet_rows(station, timeout_s)
    shown = [row.record() if console.as_json else row.shown() for row in rows]
    console.table(shown, COLUMNS, empty="no gateway is configured")
    if not console.as_json:
        for row in rows:
            if row.look.cause:
                console.warn(f"{row.look.name}: {row.look.cause}")
    return 0 if all(row.is_well for row in rows) else 1


def fleet_rows(station: Station, timeout_s: float) -> list[GatewayRow]:
    """Look at every gateway of the station, put on record what is new, and return a row for each.

    Raises:
        RegistryError: the registry cannot be used.
    """
    settings = station.settings
    looks = look_at(
        settings.gateways,
        anchors_path=station.root_path,
        timeout_s=timeout_s,
        upstreams=settings.upstreams,
        sightings=False,
    )
    if not station.is_read_only:
        note_heard(station, looks)
        note_policies(station, looks)
    found = {look.name: look for look in looks}
    kept = current_crl(station)
    issued = {ca.key_id for ca in station.cas.issuing if ca.activated_at is not None}
    crls = {crl.issuer: crl.number for crl in (kept.crls if kept else ()) if crl.issuer in issued}
    with station.registry.view() as view:
        policy = current_policy(view)
        standings = {gateway.name: standing_of(view, gateway.name) for gateway in settings.gateways}
    aims = Aims(crls, 0 if policy is None else policy.version)
    rows = []
    for gateway in settings.gateways:
        standing = standings[gateway.name]
        look = found.get(gateway.name) or look_by_receipts(gateway, standing)
        rows.append(GatewayRow(completed(look, standing), standing, aims))
    return rows
