"""`birthmark audit verify | show`: their options and their answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from birthmark.device.console import Console, Parser, command
from birthmark.device.errors import RegistryError
from birthmark.provisioning import audit
from birthmark.provisioning.options import add_station_option, open_station

if TYPE_CHECKING:
    import argparse

_MOST_PLACES = 20


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add these commands."""
    parser = commands.add_parser(
        "audit",
        help="check or read the audit log",
        description="check or read the audit log",
        examples="birthmark audit verify\nbirthmark audit show --last 20",
    )
    actions: argparse._SubParsersAction[Parser] = parser.add_subparsers(
        title="actions", metavar="ACTION", required=True
    )
    verify = command(
        actions,
        "verify",
        _verify,
        "check that nothing in the log was edited, cut or moved",
        "birthmark audit verify\nbirthmark audit verify --json",
    )
    show = command(
        actions,
        "show",
        _show,
        "print the log",
        """\
birthmark audit show --last 20
birthmark audit show --subject sensor-17
birthmark audit show --action revoke --json""",
    )
    for each in (verify, show):
        add_station_option(each)
    show.add_argument("--last", type=int, metavar="N", help="only the last N entries")
    show.add_argument("--subject", metavar="ID", help="only entries about this identity or gateway")
    show.add_argument("--action", metavar="ACTION", help="only entries of this kind, such as revoke")


def _verify(arguments: argparse.Namespace, console: Console) -> int:
    station = open_station(arguments)
    expected = station.registry.audit_head()
    verdict = audit.verify(station.registry.audit_path, expected)
    record = {
        "sound": not verdict.problems,
        "entries": verdict.entries,
        "head": verdict.head.hash,
        "problems": [
            {"line": problem.line, "kind": problem.kind, "text": problem.text} for problem in verdict.problems
        ],
        "restored": list(verdict.restored),
    }
    for place in verdict.restored[-_MOST_PLACES:]:
        console.warn(f"{place}: a command was killed then, or somebody cut the end of the log")
    if not verdict.problems:
        console.emit(record, f"{verdict.entries} entries, all sound; the last one's hash is {verdict.head.hash}")
        return 0
    lines = [f"{station.registry.audit_path} is not what was written:"]
    lines += [f"  {problem.text}" for problem in verdict.problems]
    console.emit(record, "\n".join(lines))
    return RegistryError.exit_code


def _show(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    station.registry.audit_head()  # brings the log up to date
    entries = [
        entry
        for entry in audit.read(station.registry.audit_path)
        if (arguments.subject is None or entry["subject"].lower() == arguments.subject.lower())
        and (arguments.action is None or entry["action"] == arguments.action)
    ]
    if arguments.last is not None:
        entries = entries[-arguments.last :] if arguments.last > 0 else []
    for entry in entries:
        console.emit(entry, audit.described(entry))
