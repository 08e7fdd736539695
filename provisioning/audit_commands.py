"""`birthmark audit verify | show | export | checkpoint`: their options and their answers."""

from __future__ import annotations

import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509

from birthmark.device.console import Console, Parser, command
from birthmark.device.durable import durable_file, remove_leftovers
from birthmark.device.errors import ConfigurationError, RegistryError, UsageError
from birthmark.device.options import number
from birthmark.provisioning import audit, audit_check, audit_view
from birthmark.provisioning.audit_checkpoint import CHECKPOINT_FILE, Checkpoint, make_checkpoint, read_checkpoint
from birthmark.provisioning.cas import CaKind
from birthmark.provisioning.options import add_passphrase_option, add_station_option, open_station

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from datetime import datetime

    from birthmark.provisioning.station import Station

_MOST_PLACES = 20


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add these commands."""
    parser = commands.add_parser(
        "audit",
        help="check, read or export the audit log",
        description="check, read or export the audit log",
        examples="birthmark audit verify\nbirthmark audit show --last 20",
    )
    actions: argparse._SubParsersAction[Parser] = parser.add_subparsers(
        title="actions", metavar="ACTION", required=True
    )
    _add_verify(actions)
    _add_show(actions)
    _add_export(actions)
    _add_checkpoint(actions)


def _add_verify(actions: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        actions,
        "verify",
        _verify,
        "check that nothing in the log was edited, cut or moved",
        """\
birthmark audit verify
birthmark audit verify --checkpoint /media/safe/audit-2026-11.pem
birthmark audit verify --log audit.jsonl --checkpoint audit-2026-11.pem --root root.pem""",
    )
    add_station_option(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="the log must still have the entry that this checkpoint names; as often as needed",
    )
    parser.add_argument(
        "--root",
        type=Path,
        metavar="FILE",
        help="where checkpoints lead to (default: the station's roots)",
    )
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="a whole copy of a log, instead of the station's own"
    )


def _verify(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.log is not None:
        roots = _roots_in(arguments.root) if arguments.root else []
        checkpoints = [read_checkpoint(path, roots) for path in arguments.checkpoint]
        _check_log(arguments.log)
        verdict = audit_check.verify(arguments.log, None, [one.head for one in checkpoints])
        return _tell(verdict, arguments.log, console, checkpoints)
    station = open_station(arguments)
    own = [ca.certificate for ca in station.cas if ca.kind is CaKind.ROOT]
    roots = _roots_in(arguments.root) if arguments.root else own
    checkpoints = [read_checkpoint(path, roots) for path in arguments.checkpoint]
    kept = station.folder / CHECKPOINT_FILE
    if kept.exists():
        try:
            checkpoints.append(read_checkpoint(kept, own))
        except ConfigurationError as error:
            console.warn(f"{error.message}: it is the station's own copy of the last one")
    checkpoints = list(dict.fromkeys(checkpoints))  # the last one that was carried away is that copy
    verdict = audit_check.check(station.registry, [one.head for one in checkpoints])
    return _tell(verdict, station.registry.audit_path, console, checkpoints)


def _roots_in(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "there is no certificate in it"
        raise ConfigurationError(f"could not use the root {path}: {cause}", hint="name a PEM file") from error


def _check_log(path: Path) -> None:
    if not path.is_file():
        raise ConfigurationError(f"could not check the log {path}: there is no such file", hint="check the path")


def _tell(verdict: audit_check.Verdict, path: Path, console: Console, checkpoints: Sequence[Checkpoint]) -> int:
    record = {
        "sound": not verdict.problems,
        "entries": verdict.entries,
        "head": verdict.head.hash,
        "problems": [
            {
                "line": problem.line,
                "kind": problem.kind,
                "text": problem.text,
                "expected": problem.expected,
                "found": problem.found,
            }
            for problem in verdict.problems
        ],
        "restored": list(verdict.restored),
        "checkpoints": [checkpoint.record() for checkpoint in checkpoints],
    }
    for place in verdict.restored[-_MOST_PLACES:]:
        console.warn(f"{place}: a command was killed then, or somebody cut the end of the log")
    if not verdict.problems:
        lines = [f"{verdict.entries} entries, all sound; the last one's hash is {verdict.head.hash}"]
        lines += [f"entry {one.head.seq} is that of the checkpoint of {one.at.isoformat()}" for one in checkpoints]
        console.emit(record, "\n".join(lines))
        return 0
    lines = [f"{path} is not what was written:"]
    for problem in verdict.problems[:_MOST_PLACES]:
        lines.append(f"  {problem.text}")
        lines += [f"    expected hash {problem.expected}"] if problem.expected else []
        lines += [f"    found hash    {problem.found}"] if problem.found else []
    if len(verdict.problems) > _MOST_PLACES:
        lines.append(f"  and {len(verdict.problems) - _MOST_PLACES} more: --json has all")
    console.emit(record, "\n".join(lines))
    return RegistryError.exit_code


def _add_choice(parser: Parser) -> None:
    add_station_option(parser)
    parser.add_argument(
        "--since", metavar="TIME", help="only from this time on: 2026-11-27, 2026-11-27T08:30Z, 3d"
    )
    parser.add_argument("--until", metavar="TIME", help="only before this time")
    parser.add_argument("--subject", default="", metavar="ID", help="only about this identity or gateway; * and ?")
    parser.add_argument(
        "--action", default="", metavar="ACTION", help="only of this kind, such as revoke; * and ?"
    )
    parser.add_argument("--actor", default="", metavar="WHO", help="only by this user@host; * and ?")


def _choice(arguments: argparse.Namespace, station: Station) -> audit_view.Choice:
    now = station.clock()
    return audit_view.Choice(
        _moment(arguments.since, now),
        _moment(arguments.until, now),
        arguments.subject,
        arguments.action,
        arguments.actor,
    )


def _moment(text: str | None, now: datetime) -> datetime | None:
    try:
        return None if text is None else audit_view.moment(text, now)
    except ValueError as error:
        raise UsageError(f"could not choose entries: {error}", hint="see --help") from error


def _add_show(actions: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        actions,
        "show",
        _show,
        "print the log",
        """\
birthmark audit show --last 20
birthmark audit show --subject 'sensor-1*' --since 7d
birthmark audit show --action revoke --json""",
    )
    _add_choice(parser)
    parser.add_argument("--last", type=number, metavar="N", help="only the last N entries")


def _show(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    choice = _choice(arguments, station)
    station.registry.audit_head()  # brings the log up to date
    strange: list[int] = []
    entries: Any = audit_view.chosen(station.registry.audit_path, choice, left_out=strange.append)
    if arguments.last is not None:
        entries = deque(entries, maxlen=arguments.last)
    found = False
    for entry in entries:
        console.emit(entry, audit.described(entry))
        found = True
    if not found:
        console.say("there is no entry that fits")
    _warn_of(strange, console)


def _warn_of(strange: Sequence[int], console: Console) -> None:
    if strange:
        count = "1 line that is" if len(strange) == 1 else f"{len(strange)} lines that are"
        console.warn(f"{count} no audit entry left out, the first is line {strange[0]}: `birthmark audit verify`")


def _add_export(actions: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        actions,
        "export",
        _export,
        "write the log, or a part of it, for another program",
        """\
birthmark audit export --out audit.jsonl
birthmark audit export --format csv --since 2026-11-01 --until 2026-12-01 --out november.csv
birthmark audit export --action revoke | jq .subject""",
    )
    _add_choice(parser)
    parser.add_argument("--format", choices=audit_view.FORMATS, default="jsonl", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: stdout)")


def _export(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    choice = _choice(arguments, station)
    with station.registry.transaction() as transaction:
        # Before anything leaves; so an export of everything ends with its own entry.
        to = str(arguments.out) if arguments.out else "stdout"
        transaction.record("export", "audit-log", to=to, format=arguments.format, **choice.facts())
    strange: list[int] = []
    entries = audit_view.chosen(station.registry.audit_path, choice, left_out=strange.append)
    lines = audit_view.exported(entries, arguments.format)
    if arguments.out is None:
        sys.stdout.writelines(lines)
        sys.stdout.flush()  # a reader that has gone away is told of here, and not when Python ends
        _warn_of(strange, console)
        return
    count = -1 if arguments.format == "csv" else 0  # the headings
    remove_leftovers(arguments.out.parent, arguments.out.name)
    with durable_file(arguments.out) as file:
        for line in lines:
            file.write(line.encode())
            count += 1
    console.emit({"file": str(arguments.out), "entries": count}, f"{arguments.out}: {count} entries")
    _warn_of(strange, console)


def _add_checkpoint(actions: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        actions,
        "checkpoint",
        _checkpoint,
        "sign the log's last number and hash, to be carried away",
        """\
birthmark audit checkpoint --out /media/safe/audit-2026-11.pem
birthmark audit checkpoint --passphrase-fd 3 3< passphrase-file --out audit.pem""",
    )
    add_station_option(parser)
    add_passphrase_option(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to carry away; it is never replaced")


def _checkpoint(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    made = make_checkpoint(station, arguments.out)
    if audit_check.check(station.registry).problems:
        console.warn("the log does not verify, and this is a checkpoint of it as it is: `birthmark audit verify`")
    where = arguments.out or station.folder / CHECKPOINT_FILE
    record = {**made.record(), "file": str(where)}
    console.emit(record, f"{where}: entry {made.head.seq}, hash {made.head.hash}")
    if arguments.out is None:
        console.say("It proves something once it is carried away: --out FILE.")
