"""`birthmark label`: a label with a QR code for a device that is made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from birthmark.device.console import Console, Parser, command
from birthmark.device.durable import remove_leftovers, write_durably
from birthmark.provisioning.line.label import Format, label, made
from birthmark.provisioning.options import add_station_option, open_station

if TYPE_CHECKING:
    import argparse

_FILE_MODE = 0o644


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command."""
    parser = command(
        commands,
        "label",
        _label,
        "write a label with a QR code for a device that is made",
        """\
birthmark label sensor-17
birthmark label sensor-17 sensor-18 --out ./labels
birthmark label sensor-17 --format png""",
    )
    parser.add_argument("ids", nargs="+", metavar="ID", help="devices that are ATTESTED")
    parser.add_argument(
        "--format",
        choices=[form.value for form in Format],
        default=Format.SVG.value,
        help="svg: the whole label; png: the code alone (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="for ID.svg or ID.png, replacing older ones (default: .)",
    )
    add_station_option(parser)


def _label(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    form = Format(arguments.format)
    rows = [made(station.registry, name) for name in arguments.ids]  # all of them, or no file at all
    arguments.out.mkdir(parents=True, exist_ok=True)
    for row in rows:
        path = arguments.out / f"{row.name}.{form.value}"
        remove_leftovers(path.parent, path.name)
        write_durably(path, label(row, form), mode=_FILE_MODE)
        console.emit({"id": row.name, "label": str(path)}, str(path))
