"""`birthmark issue`: its options and its answers."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from birthmark.device.console import INTERRUPTED, Console, Parser, command
from birthmark.device.errors import UsageError
from birthmark.device.identity import device_role
from birthmark.provisioning.broker_choice import broker_address, warn_of_loopback
from birthmark.provisioning.bulk import issue_all
from birthmark.provisioning.bulk_requests import read_wanted
from birthmark.provisioning.options import add_passphrase_option, add_station_option, open_station
from birthmark.provisioning.record_files import CSV, JSONL

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command."""
    parser = command(
        commands,
        "issue",
        _issue,
        "issue the certificates of many devices in one go",
        """\
birthmark issue --from requests/ --role pump --out certificates/
birthmark issue --from devices.csv --out certificates.jsonl
birthmark issue --from devices.csv --keys station --broker gateway-1.example.com:8883 --out boards/""",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        metavar="PATH",
        help="a .csv or .jsonl file with id, role, csr and hwid, or a folder of ID.csr.pem files",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="PATH",
        help="a folder, for a file a device; or a file named .jsonl, for a line a device",
    )
    parser.add_argument("--role", help="of devices for which the file names none (default: the station's)")
    parser.add_argument(
        "--keys", choices=["station"], help="make the key of devices without a csr here, into a folder a device"
    )
    parser.add_argument(
        "--broker", metavar="HOST:PORT", help="where devices with a key made here connect (default: the station's)"
    )
    add_station_option(parser)
    add_passphrase_option(parser)


def _issue(arguments: argparse.Namespace, console: Console) -> int:
    try:
        with _uncollected():
            _issue_from(arguments, console)
    except KeyboardInterrupt:
        console.emit(
            {"event": "interrupted"}, "interrupted; nothing is lost: the same command again goes on from here"
        )
        return INTERRUPTED
    return 0


@contextmanager
def _uncollected() -> Iterator[None]:
    """Let the collector of cycles rest: it would look through all rows over and over, and each is in use."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _issue_from(arguments: argparse.Namespace, console: Console) -> None:
    if arguments.broker is not None and arguments.keys is None:
        raise UsageError(
            "could not use --broker: it is for devices whose key is made here",
            hint="leave it out, or give --keys station",
        )
    _check_out(arguments.source, arguments.out)
    station = open_station(arguments)
    role = device_role(arguments.role or station.settings.default_role)
    broker = broker_address(arguments.broker, station.settings.broker)
    makes_keys = arguments.keys is not None
    wanted = read_wanted(arguments.source, role, station_makes_keys=makes_keys)
    console.emit({"event": "read", "devices": len(wanted)}, f"devices read and checked: {len(wanted)}")
    if any(one.public_key_der is None for one in wanted):
        warn_of_loopback(console, arguments.broker, broker)

    def tell(done: int, of: int) -> None:
        console.emit({"event": "progress", "done": done, "of": of}, f"issued {done} of {of}")

    made = issue_all(station, arguments.source, wanted, arguments.out, broker=broker, tell=tell)
    record = {"event": "result", "issued": made.issued, "known": made.known, "out": str(arguments.out)}
    known = f", and {made.known} were there before" if made.known else ""
    console.emit(record, f"certificates issued: {made.issued}{known}; all are in {arguments.out}")


def _check_out(source: Path, out: Path) -> None:
    """Refuse an output that would be written over the requests or among them, and an unknown form of it."""
    if out.exists() and source.exists() and out.samefile(source):
        raise UsageError(
            f"could not use {out} for --out: the requests are there",
            hint="name another one: the same command, given again, reads them again",
        )
    suffix = out.suffix.lower()
    if not out.is_dir() and suffix != JSONL and (suffix == CSV or out.exists()):
        raise UsageError(
            f"could not use {out} for --out: it is neither a folder nor named {JSONL}",
            hint=f"name a folder, for a file a device; or a file named {JSONL}, for a line a device",
        )
