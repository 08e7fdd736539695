"""`birthmark ca show | detach-root | passphrase`: options, answers; where `ca rollover` and `ca token` are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from birthmark.device.console import Console, Parser, command
from birthmark.device.errors import UsageError
from birthmark.provisioning import rollover_commands, token_commands
from birthmark.provisioning.cas import CaKind
from birthmark.provisioning.key_custody import detach_roots, give_up_key
from birthmark.provisioning.options import (
    add_passphrase_option,
    add_root_passphrase_option,
    add_station_option,
    open_station,
    root_passphrase,
)
from birthmark.provisioning.passphrase import NEW_VARIABLE, ROOT_PROMPT, PassphraseSource
from birthmark.provisioning.passphrase_change import change_passphrase

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
    _add_detach_root(actions)
    _add_lost(actions)
    _add_passphrase(actions)
    rollover_commands.add_to(actions)
    token_commands.add_to(actions)


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
        "key": station.key_place(ca),
        "not_after": not_after.strftime("%Y-%m-%d"),
        "days_left": (not_after - station.clock()).days,
        "key_id": ca.key_id,
        "root": ca.root,
        "subject": certificate.subject.rfc4514_string(),
        "cert_serial": f"{certificate.serial_number:x}",
        "key_path": "" if ca.key_uri else str(station.key_path(ca)),
        "key_uri": ca.key_uri,
    }


def _add_lost(actions: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        actions,
        "lost",
        _lost,
        "give an issuing CA's key up for lost, so that the other CAs go on without it",
        "birthmark ca lost 1a2b3c4d\nbirthmark ca lost 1a2b3c4d --found",
    )
    add_station_option(parser)
    parser.add_argument("ca", metavar="CA", help="as `birthmark ca show` names it")
    parser.add_argument("--found", action="store_true", help="take that back")


def _lost(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    ca = give_up_key(station, arguments.ca, found=arguments.found)
    console.emit(
        {"ca": ca.key_id, "key": station.key_place(ca)}, f"the key of {ca.short}: {station.key_place(ca)}"
    )
    if not arguments.found:
        console.say(
            "What it issued cannot be put on a CRL any more. Replace it: birthmark ca rollover start issuing;\n"
            "have devices renew; birthmark ca rollover retire issuing; its certificate out of every gateway."
        )


def _add_detach_root(actions: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        actions,
        "detach-root",
        _detach_root,
        "move the root's key to a medium that is kept in a safe place",
        """\
birthmark ca detach-root --to /media/safe
birthmark ca detach-root --to /media/safe --root-passphrase-fd 3 3< root-passphrase-file""",
    )
    add_station_option(parser)
    add_passphrase_option(parser)
    add_root_passphrase_option(parser)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a folder on the medium")
    parser.add_argument(
        "--same-disk", action="store_true", help="take a folder on the station's own file system as well"
    )


def _detach_root(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    passphrase = root_passphrase(arguments)
    for done in detach_roots(station, arguments.to, passphrase, same_disk=arguments.same_disk):
        record = {"root": done.root.key_id, "root_key": str(done.path), "newly": done.newly}
        again = "" if done.newly else " (it was moved before)"
        console.emit(record, f"the key of the root CA {done.root.short} is at {done.path}{again}")
    console.say("What needs it takes it from there with --root-key; the station issues and revokes without it.")


def _add_passphrase(actions: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        actions,
        "passphrase",
        _passphrase,
        "change the passphrase of the issuing CAs' key files, or of the root's",
        """\
birthmark ca passphrase issuing
birthmark ca passphrase issuing --passphrase-fd 3 3< old --new-passphrase-fd 4 4< new
birthmark ca passphrase root --root-key /media/safe/root-1a2b3c4d.key.pem""",
    )
    parser.add_argument("kind", choices=[kind.value for kind in CaKind], help="whose keys")
    parser.add_argument("--root-key", type=Path, metavar="FILE", help="where the root's key is kept")
    parser.add_argument(
        "--new-passphrase-fd",
        type=int,
        metavar="N",
        help=f"read the new passphrase from this descriptor (default: {NEW_VARIABLE}, else a prompt)",
    )
    add_station_option(parser)
    add_passphrase_option(parser)
    add_root_passphrase_option(parser)


def _passphrase(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    kind = CaKind(arguments.kind)
    if kind is CaKind.ISSUING and arguments.root_key is not None:
        raise UsageError("could not use --root-key: it is for the root", hint="birthmark ca passphrase root")
    new = PassphraseSource(
        descriptor=arguments.new_passphrase_fd,
        variable=NEW_VARIABLE,
        prompt="The new passphrase: ",
        confirm=True,
        option="--new-passphrase-fd",
    )
    old = root_passphrase(arguments) if kind is CaKind.ROOT else None
    old = old or station.read_passphrase(prompt=ROOT_PROMPT if kind is CaKind.ROOT else "")
    for done in change_passphrase(station, kind, old, new.read(), path=arguments.root_key):
        record = {"ca": done.ca.key_id, "kind": kind.value, "path": str(done.path), "newly": done.newly}
        again = "" if done.newly else " (it did before)"
        console.emit(record, f"{done.path} opens with the new passphrase{again}")
    console.say(
        "Older backups and copies still open with the old one; services take the new one at their next start."
    )
