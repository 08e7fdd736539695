"""`birthmark backup | restore`: their options and their answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from birthmark.device.console import Console, Parser, command
from birthmark.device.core_dumps import forbid_core_dumps
from birthmark.device.errors import UsageError
from birthmark.device.options import taken_from_options
from birthmark.provisioning import audit_check
from birthmark.provisioning.backup import back_up, check_target, read_backup
from birthmark.provisioning.cas import SHORT
from birthmark.provisioning.founding import refuse_occupied
from birthmark.provisioning.gateway_look import DEFAULT_TIMEOUT_S
from birthmark.provisioning.options import (
    add_passphrase_option,
    add_station_option,
    add_timeout_option,
    open_station,
    passphrase_source,
    pin_source,
)
from birthmark.provisioning.passphrase import PassphraseSource
from birthmark.provisioning.registry.opening import setting_from
from birthmark.provisioning.restore import Merged, Restored, merge_crls, restore
from birthmark.provisioning.tokens.uri import TokenUri

if TYPE_CHECKING:
    import argparse

VARIABLE = "BIRTHMARK_BACKUP_PASSPHRASE"


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add these commands."""
    _add_backup(commands)
    _add_restore(commands)


def _add_backup(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        commands,
        "backup",
        _backup,
        "write the whole station into one encrypted file, or check such a file",
        """\
birthmark backup /media/safe/station-2026-11-26.age
birthmark backup /media/safe/station.age --include ~/birthmark/alice.pem
birthmark backup --verify /media/safe/station-2026-11-26.age""",
    )
    add_station_option(parser)
    _add_backup_passphrase_option(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help="the file to write, or to check")
    parser.add_argument(
        "--include",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="another file that is to come along, such as an operator's; may be given several times",
    )
    parser.add_argument("--verify", action="store_true", help="write nothing: read the file whole")


def _add_restore(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        commands,
        "restore",
        _restore,
        "make a station from its backup; or take over what a CRL lists that a gateway holds",
        """\
birthmark restore /media/safe/station-2026-11-26.age --to ~/birthmark-station
birthmark restore station.age --to ./station --crl gateway-1.crl --crl gateway-2.crl
birthmark restore --crl gateway-2.crl --station ./station""",
    )
    add_station_option(parser)
    add_passphrase_option(parser)
    _add_backup_passphrase_option(parser)
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="the backup")
    parser.add_argument("--to", type=Path, metavar="DIR", help="where the station is to be: not there, or empty")
    parser.add_argument(
        "--registry",
        metavar="URL",
        help="where the registry is to be: `tinydb`, or a database (default: where the lost station had it)",
    )
    add_timeout_option(parser, DEFAULT_TIMEOUT_S, "how long to wait for each gateway")
    parser.add_argument(
        "--lost-key",
        action="append",
        default=[],
        metavar="CA",
        help="an issuing CA whose key is lost: it is given up; may be given several times",
    )
    parser.add_argument(
        "--crl",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a CRL that a gateway holds, PEM or DER; may be given several times",
    )


def _add_backup_passphrase_option(parser: Parser) -> None:
    parser.add_argument(
        "--backup-passphrase-fd",
        type=int,
        metavar="N",
        help=f"read the backup's passphrase from this descriptor (default: {VARIABLE}, else a prompt)",
    )


def _backup_passphrase(arguments: argparse.Namespace, *, confirm: bool = False) -> bytes:
    source = PassphraseSource(
        descriptor=arguments.backup_passphrase_fd,
        variable=VARIABLE,
        prompt="Passphrase of the backup: ",
        confirm=confirm,
        option="--backup-passphrase-fd",
    )
    return source.read()


def _backup(arguments: argparse.Namespace, console: Console) -> None:
    forbid_core_dumps()
    if arguments.verify:
        if arguments.include:
            raise UsageError("could not check a backup: --include is for writing one")
        _check_readable(arguments.file)
        found = read_backup(arguments.file, _backup_passphrase(arguments))
        console.facts(found.record())
        return
    station = open_station(arguments)
    check_target(arguments.file.absolute(), station.folder)  # before anybody types a passphrase twice
    passphrase = _backup_passphrase(arguments, confirm=True)
    problems = audit_check.check(station.registry).problems
    if problems:
        console.warn("the audit log does not verify, and goes into the backup as it is: `birthmark audit verify`")
    manifest = back_up(station, arguments.file, passphrase, extra=arguments.include)
    record = {
        "backup": str(arguments.file),
        "created_at": manifest.created_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "size_bytes": arguments.file.stat().st_size,
        "files": list(manifest.files),
    }
    console.facts(record)
    for ca in station.cas.issuing:
        if ca.key_uri:
            console.say(
                f"The key of the issuing CA {ca.short} is in a PKCS#11 token and not in this file: "
                f"{TokenUri.parse(ca.key_uri).label}. Without that token a restored station cannot sign."
            )


def _check_readable(path: Path) -> None:
    with path.open("rb"):
        pass  # nobody types a passphrase for a file that is not there


def _restore(arguments: argparse.Namespace, console: Console) -> int:
    forbid_core_dumps()
    if arguments.file is None:
        return _merge(arguments, console)
    if arguments.to is None:
        raise UsageError("could not restore: no place is named", hint="name a new folder: --to DIR")
    _check_readable(arguments.file)
    refuse_occupied(arguments.to)
    with taken_from_options():
        registry = None if arguments.registry is None else setting_from(arguments.registry)
    restored = restore(
        arguments.file,
        arguments.to,
        backup_passphrase=_backup_passphrase(arguments),
        passphrase=passphrase_source(arguments),
        pin=pin_source(arguments),
        crls=arguments.crl,
        lost=arguments.lost_key,
        timeout_s=arguments.timeout,
        registry=registry,
    )
    with restored.station.registry.view() as view:
        rows = view.count()
    record = {
        "station": str(restored.station.folder),
        "backup_of": restored.manifest.created_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "made_by": restored.manifest.made_by,
        "rows": rows,
        "crl_number": restored.crls.current.number,
        "crl_path": str(restored.crls.path),
        "merged": [merged.record() for merged in restored.merged],
    }
    if console.as_json:
        console.emit(record, "")
    else:
        console.facts({**record, "merged": [_line(merged) for merged in restored.merged]})
    return _say_what_is_open(restored, console)


def _say_what_is_open(restored: Restored, console: Console) -> int:
    for problem in restored.audit_problems:
        console.warn(f"the audit log did not verify when it was backed up: {problem.text}")
    for gateway in restored.station.settings.gateways:
        if gateway.operator_path is not None and not gateway.operator_path.exists():
            console.warn(
                f"the operator's file for the gateway {gateway.name} is not here: {gateway.operator_path}"
            )
    unknown = [merged for merged in restored.merged if merged.cause]
    for merged in unknown:
        console.warn(
            f"what the gateway {merged.source} holds is not known ({merged.cause}): what was revoked after the "
            "backup is on its CRL only; `birthmark restore --crl FILE` takes it over"
        )
    console.say(
        f"\nNow: birthmark crl (every gateway takes {restored.crls.shown()}), then birthmark doctor (who was "
        "made after the backup).\nThe lost station must not be used again."
    )
    return 1 if unknown else 0


def _merge(arguments: argparse.Namespace, console: Console) -> int:
    for_a_backup = (arguments.to, arguments.registry, arguments.lost_key or None)
    if not arguments.crl or for_a_backup != (None, None, None):
        raise UsageError(
            "could not restore: no backup is named", hint="name its file, or only CRLs of gateways with --crl"
        )
    merged, crl = merge_crls(open_station(arguments), arguments.crl)
    record = {
        "merged": [one.record() for one in merged],
        "crl_number": crl.current.number,
        "crl_path": str(crl.path),
        "entries": len(crl.cert_serials),
    }
    lines = [_line(one) for one in merged]
    lines.append(f"all of it is on {crl.shown()}: `birthmark crl` brings it to the gateways")
    console.emit(record, "\n".join(lines))
    return 0


def _line(merged: Merged) -> str:
    if merged.cause:
        return f"{merged.source}: not known"
    revocations = "1 revocation that was" if merged.newly == 1 else f"{merged.newly} revocations that were"
    return f"{merged.source}: CRL {merged.number} of {merged.issuer[:SHORT]}, {revocations} not known here"
