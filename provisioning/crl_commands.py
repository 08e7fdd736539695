"""`birthmark crl serve | status`: the CRL service, and which gateway has confirmed what."""

from __future__ import annotations

import argparse
import logging
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from birthmark.device import event_lines
from birthmark.device.console import Console, Parser, command
from birthmark.device.stopping import stopping_on_signals
from birthmark.device.systemd import notify, watchdog_interval_s
from birthmark.provisioning.cas import SHORT, read_cas
from birthmark.provisioning.crl_service import CrlService
from birthmark.provisioning.crl_store import current_crl
from birthmark.provisioning.gateway_receipts import Standing, standing_of
from birthmark.provisioning.options import (
    add_passphrase_option,
    add_station_option,
    add_timeout_option,
    open_station,
)

if TYPE_CHECKING:
    from datetime import datetime

    from birthmark.provisioning.station import Station


def add_to(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add these to what `birthmark crl` can do."""
    serve = command(
        actions,
        "serve",
        _serve,
        "keep every CRL fresh and every gateway up to date, until it is stopped",
        "birthmark crl serve\nbirthmark crl serve --every-hours 24 --json",
    )
    add_passphrase_option(serve)
    serve.add_argument(
        "--every-hours", type=_hours, metavar="H", help="sign anew this often (default: at half of a CRL's life)"
    )
    add_timeout_option(serve)
    status = command(
        actions,
        "status",
        _status,
        "say which gateway has confirmed which CRL, and when",
        "birthmark crl status\nbirthmark crl status --json",
    )
    for parser in (serve, status):
        add_station_option(parser)


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not 0 < hours <= 15 * 24:
        raise argparse.ArgumentTypeError("more than 0 and at most 360 hours: half of a CRL's life")
    return hours


def _serve(arguments: argparse.Namespace, console: Console) -> int:
    station = open_station(arguments)
    _ = station.authority  # a wrong passphrase is said now, and not at the first revocation
    logging.getLogger("birthmark.device").addHandler(logging.NullHandler())
    say = partial(event_lines.say, console)
    every = timedelta(hours=arguments.every_hours) if arguments.every_hours else None
    service = CrlService(station, say=say, every=every, timeout_s=arguments.timeout)
    watchdog_s = watchdog_interval_s()
    with stopping_on_signals() as stopping:
        say("ready", f"serving the CRLs of {station.folder}", station=str(station.folder))
        notify("READY=1")
        wait_s = 0.0
        while not stopping.wait(wait_s):
            wait_s = service.turn()
            if watchdog_s:
                notify("WATCHDOG=1")
                wait_s = min(wait_s, watchdog_s / 2)
        notify("STOPPING=1")
    say("stopped", "stopped")
    station.close()
    return stopping.exit_code


def _status(arguments: argparse.Namespace, console: Console) -> int:
    rows = status(open_station(arguments))
    columns = ["gateway", "ca", "phase", "confirmed", "current", "confirmed_at", "state", "trouble"]
    console.table(rows, columns, empty="no gateway is configured")
    return 1 if any(row["state"] == "behind" for row in rows) else 0


def status(station: Station) -> list[dict[str, Any]]:
    """Return for each gateway and issuing CA what is confirmed, and whether that is the CRL in the file."""
    crls = current_crl(station)
    found = {} if crls is None else {crl.issuer: crl for crl in crls.crls}
    rows = []
    with station.registry.view() as view:
        issuing = read_cas(view).issuing
        for gateway in station.settings.gateways:
            standing = standing_of(view, gateway.name)
            for ca in issuing:
                confirmed, current = standing.confirmed.get(ca.key_id), found.get(ca.key_id)
                if confirmed is not None and current is not None and confirmed.sha256 == current.sha256:
                    state = "up to date"
                else:
                    state = "behind" if ca.activated_at is not None else "not trusted yet"
                rows.append(
                    {
                        "gateway": gateway.name,
                        "ca": ca.short,
                        "phase": ca.phase,
                        "confirmed": confirmed.number if confirmed else None,
                        "current": current.number if current else None,
                        "confirmed_at": _moment(confirmed.at if confirmed else None),
                        "state": state,
                        "trouble": standing.trouble or None,
                        "trouble_since": _moment(standing.trouble_since),
                        "key_id": ca.key_id,
                    }
                )
    return rows


def standing_record(standing: Standing) -> dict[str, Any]:
    """Return what a gateway has confirmed last, for a list of gateways."""
    several = len(standing.confirmed) > 1
    latest = max((one.at for one in standing.confirmed.values()), default=None)
    numbers = [
        f"{key_id[:SHORT]}:{one.number}" if several else one.number for key_id, one in standing.confirmed.items()
    ]
    return {"crl": numbers, "confirmed_at": _moment(latest), "trouble": standing.trouble or None}


def _moment(moment: datetime | None) -> str | None:
    return None if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%SZ")
