"""`birthmark registry export | import`: their options and their answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from birthmark.device.console import Console, Parser, command
from birthmark.device.durable import durable_file, remove_leftovers
from birthmark.provisioning.options import add_station_option, open_station
from birthmark.provisioning.record_files import CSV, JSONL
from birthmark.provisioning.row_filters import add_filter_options, picked
from birthmark.provisioning.row_import import import_rows
from birthmark.provisioning.row_records import csv_lines, jsonl_lines

if TYPE_CHECKING:
    import argparse

_FORMATS: Final = {"csv": csv_lines, "jsonl": jsonl_lines}


def add_to(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add these commands to those of `birthmark registry`."""
    exporting = command(
        actions,
        "export",
        _export,
        "write what is known of identities into a CSV or JSONL file",
        """\
birthmark registry export -o devices.csv
birthmark registry export --state ATTESTED --state VOID -o made.jsonl
birthmark registry export --name 'pump-*' --not-revoked --format jsonl | jq .id""",
    )
    exporting.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="the file to write, or to replace (default: stdout)"
    )
    exporting.add_argument(
        "--format", choices=list(_FORMATS), help="default: by the end of the file's name, else csv"
    )
    add_filter_options(exporting)
    importing = command(
        actions,
        "import",
        _import,
        "add identities that another registry of the same CAs has",
        "birthmark registry import made.jsonl",
    )
    importing.add_argument("file", type=Path, metavar="FILE", help="a .csv or .jsonl file, as `export` writes it")
    for each in (exporting, importing):
        add_station_option(each)


def _export(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    out: Path | None = arguments.out
    with station.registry.view() as view:
        filters = picked(view, arguments, station.clock())
        count = view.count(**filters)
        with station.registry.transaction() as transaction:  # recorded before anything leaves
            transaction.record("registry-export", out.name if out else "stdout", rows=count)
        lines = _FORMATS[_format(arguments)](view.stream(**filters))
        if out is None:
            for line in lines:
                console.emit_line(line)
            return
        remove_leftovers(out.parent, out.name)
        with durable_file(out) as file:
            file.writelines(line.encode() for line in lines)
    console.emit({"rows": count, "file": str(out)}, f"{count} rows are in {out}")


def _format(arguments: argparse.Namespace) -> str:
    if arguments.format is not None:
        return str(arguments.format)
    if arguments.out is None:
        return "jsonl" if arguments.json else "csv"
    return "jsonl" if arguments.out.suffix.lower() == JSONL else CSV.removeprefix(".")


def _import(arguments: argparse.Namespace, console: Console) -> None:
    imported = import_rows(open_station(arguments), arguments.file)
    revoked = sum(row.is_revoked for row in imported.added)
    record = {
        "added": len(imported.added),
        "known": imported.known,
        "empty": imported.empty,
        "revoked": revoked,
    }
    text = f"{len(imported.added)} rows added, {imported.known} known before"
    if imported.empty:
        text += f"; {imported.empty} are void and never had a serial number: nothing to take"
    console.emit(record, text)
    if revoked:
        console.warn(f"{revoked} of them are revoked; `birthmark crl` brings that to the gateways")
