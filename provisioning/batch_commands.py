"""`birthmark batch open | close | report`: their options and their answers."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from birthmark.device.console import Console, Parser, command
from birthmark.provisioning.crl_delivery import bring_new_crl
from birthmark.provisioning.line.batches import Report, close_batch, moment, open_batch, report
from birthmark.provisioning.options import add_passphrase_option, add_station_option, open_station

if TYPE_CHECKING:
    import argparse

_COLUMNS = ("id", "role", "hwid", "cert_serial", "not_before", "not_after", "made_at", "revoked", "label")


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add these commands."""
    parser = commands.add_parser(
        "batch",
        help="open, close and report on a batch of devices",
        description="open, close and report on a batch of devices",
        examples="birthmark batch open 2026-W47\nbirthmark batch close\nbirthmark batch report 2026-W47 --csv",
    )
    actions: argparse._SubParsersAction[Parser] = parser.add_subparsers(
        title="actions", metavar="ACTION", required=True
    )
    opening = command(
        actions, "open", _open, "open a batch: devices that are begun from now on are in it", _OPEN_EXAMPLES
    )
    opening.add_argument("name", metavar="NAME", help="letters, digits, '.', '-' and '_'; never to be used again")
    closing = command(
        actions,
        "close",
        _close,
        "close the open batch; revoke what was begun and not finished",
        _CLOSE_EXAMPLES,
    )
    add_passphrase_option(closing)
    reporting = command(actions, "report", _report, "say what was made in a batch, and how well", _REPORT_EXAMPLES)
    reporting.add_argument("name", metavar="NAME", nargs="?", help="default: the open batch, else the last one")
    reporting.add_argument("--csv", action="store_true", help="a line for each device that is made")
    for each in (opening, closing, reporting):
        add_station_option(each)


_OPEN_EXAMPLES = "birthmark batch open 2026-W47"
_CLOSE_EXAMPLES = "birthmark batch close\nbirthmark batch close --json"
_REPORT_EXAMPLES = """\
birthmark batch report
birthmark batch report 2026-W47 --json
birthmark batch report 2026-W47 --csv > 2026-W47.csv"""


def _open(arguments: argparse.Namespace, console: Console) -> None:
    batch = open_batch(open_station(arguments), arguments.name)
    console.emit(
        {"batch": batch.name, "opened_at": moment(batch.opened_at)},
        f"{batch.name} is open: devices that are begun from now on are in it",
    )


def _close(arguments: argparse.Namespace, console: Console) -> int:
    station = open_station(arguments)
    closing = close_batch(station)
    record = {
        "batch": closing.batch.name,
        "closed_at": moment(closing.batch.closed_at),
        "made": closing.made,
        "voided": [row.name for row in closing.voided],
        "revoked": closing.revoked,
    }
    text = f"{closing.batch.name} is closed: {closing.made} made"
    if closing.voided:
        text += f"; begun and not finished, so void: {', '.join(row.name for row in closing.voided)}"
    console.emit(record, text)
    return 1 if closing.revoked and not bring_new_crl(station, console) else 0


def _report(arguments: argparse.Namespace, console: Console) -> None:
    result = report(open_station(arguments), arguments.name)
    if arguments.csv:
        console.say(_csv(result))
        return
    record = result.record()
    console.emit(record, _described(result))


def _csv(result: Report) -> str:
    """Return a heading and a line for each made device."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["batch", *_COLUMNS])
    for device in result.record()["devices"]:
        writer.writerow([result.batch.name, *(device[column] for column in _COLUMNS)])
    return lines.getvalue().rstrip("\n")


def _described(result: Report) -> str:
    record = result.record()
    state = f"closed {record['closed_at']}" if record["closed_at"] else "open"
    lines = [f"batch {result.batch.name}, opened {record['opened_at']}, {state}"]
    lines.append(
        f"  {record['made']} made of {record['units']} boards;"
        f" first-pass yield {_percent(record['first_pass_yield'])}, final yield {_percent(record['final_yield'])}"
    )
    rate = record["boards_an_hour"]
    pace = "" if rate is None else f", {rate:.0f} boards an hour"
    lines.append(f"  {record['attempts']} attempts, {record['retries']} retries{pace}")
    for what in ("step", "code"):
        counts = record[f"failures_by_{what}"]
        if counts:
            lines.append(
                f"  failures by {what}: " + ", ".join(f"{word} {count}" for word, count in counts.items())
            )
    lines += [f"  {row.name}  {row.role}  {row.cert_serial:x}" for row in result.made]
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
