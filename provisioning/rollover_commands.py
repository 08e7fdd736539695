"""`birthmark ca rollover start | activate | status | retire` and `birthmark ca export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from birthmark.device.console import INTERRUPTED, Console, Parser, command
from birthmark.device.durable import remove_leftovers, write_durably
from birthmark.device.errors import UsageError
from birthmark.provisioning.cas import CaKind, read_cas
from birthmark.provisioning.crl_delivery import warn_of_pending
from birthmark.provisioning.crls import sign_and_store_crl
from birthmark.provisioning.gateway_trust import bring_trust, was_interrupted
from birthmark.provisioning.options import (
    add_key_options,
    add_passphrase_option,
    add_root_passphrase_option,
    add_station_option,
    add_timeout_option,
    open_station,
    root_passphrase,
    token_place,
    token_settings,
)
from birthmark.provisioning.registry.model import Kind
from birthmark.provisioning.rollover.census import take_census
from birthmark.provisioning.rollover.phases import (
    activate,
    activate_for_brokers,
    close_old,
    gateways_without,
    retire_closed,
)
from birthmark.provisioning.rollover.starting import RootKey, start_issuing, start_root
from birthmark.provisioning.settings import read_settings
from birthmark.provisioning.settings_edit import set_token
from birthmark.provisioning.station import PUBLIC_FILE_MODE

if TYPE_CHECKING:
    import argparse

    from birthmark.provisioning.cas import Ca
    from birthmark.provisioning.station import Station

_KINDS = [kind.value for kind in CaKind]
_FEW = 3
_EXPORTED = "`birthmark ca export issuing --out clients-ca.pem`"


def add_to(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add these commands to those of `birthmark ca`."""
    _add_export(actions)
    parser = actions.add_parser(
        "rollover",
        help="replace an issuing CA or the root, while everybody stays connected",
        description="replace an issuing CA or the root, while everybody stays connected",
        examples="birthmark ca rollover start issuing\nbirthmark ca rollover status",
    )
    phases: argparse._SubParsersAction[Parser] = parser.add_subparsers(
        title="actions", metavar="ACTION", required=True
    )
    _add_start(phases)
    _add_activate(phases)
    _add_status(phases)
    _add_retire(phases)


def _add_export(actions: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        actions,
        "export",
        _export,
        "write the certificates of the CAs that are trusted now",
        "birthmark ca export issuing --out clients-ca.pem\nbirthmark ca export root --out ca.pem",
    )
    parser.add_argument("kind", choices=_KINDS, help="issuing: for gateways; root: for services")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the PEM file to write")
    add_station_option(parser)


def _export(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    cas = station.cas
    chosen = cas.issuing if arguments.kind == CaKind.ISSUING else cas.roots
    with station.registry.transaction() as transaction:
        transaction.record(
            "export", f"{arguments.kind}-ca", to=str(arguments.out), cas=" ".join(ca.short for ca in chosen)
        )
    remove_leftovers(arguments.out.parent, arguments.out.name)
    write_durably(arguments.out, b"".join(ca.pem for ca in chosen), mode=PUBLIC_FILE_MODE)
    names = ", ".join(ca.short for ca in chosen)
    console.emit({"file": str(arguments.out), "cas": [ca.key_id for ca in chosen]}, f"{arguments.out}: {names}")


def _add_start(phases: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        phases,
        "start",
        _start,
        "make the next CA, and have the gateways trust it",
        """\
birthmark ca rollover start issuing
birthmark ca rollover start issuing --root-key /media/safe/root-1a2b3c4d.key.pem
birthmark ca rollover start issuing --key 'pkcs11:token=birthmark;object=issuing-2'
birthmark ca rollover start root""",
    )
    parser.add_argument("kind", choices=_KINDS, help="what is to be replaced")
    parser.add_argument("--root-key", type=Path, metavar="FILE", help="where the root's key is kept")
    add_key_options(parser, "--key", whose="the next issuing CA's")
    add_root_passphrase_option(parser)
    _add_common(parser)


def _start(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.kind == CaKind.ROOT and arguments.root_key is not None:
        raise UsageError("could not use --root-key: the next root gets a key of its own", hint="leave it out")
    place = token_place(arguments)
    station = open_station(arguments)
    if place is not None and token_settings(place.uri).module is not None:
        set_token(station.settings_path, token_settings(place.uri))
        station.settings = read_settings(station.settings_path)
    if arguments.kind == CaKind.ROOT:
        new = start_root(station, root_passphrase(arguments), place=place)
    else:
        new = start_issuing(
            station,
            lambda: RootKey(root_passphrase(arguments), arguments.root_key),
            place=place,
        )
    return _bring(arguments, console, station, new, f"{new.short} is made, to issue next")


def _add_activate(phases: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        phases,
        "activate",
        _activate,
        "issue from the new CA from now on",
        "birthmark ca rollover activate\nbirthmark ca rollover activate --brokers",
    )
    parser.add_argument(
        "--brokers", action="store_true", help="brokers' certificates too, once every device holds the new root"
    )
    _add_force(parser)
    _add_common(parser)


def _activate(arguments: argparse.Namespace, console: Console) -> int:
    station = open_station(arguments)
    step = activate_for_brokers if arguments.brokers else activate
    current = step(station, force=arguments.force)
    return _bring(arguments, console, station, current, f"{current.short} is {current.phase}")


def _add_retire(phases: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        phases,
        "retire",
        _retire,
        "close the old CA for good: a last CRL, and nobody trusts it any more",
        "birthmark ca rollover retire issuing\nbirthmark ca rollover retire root",
    )
    parser.add_argument("kind", choices=_KINDS, help="what was replaced")
    _add_force(parser)
    _add_common(parser)


def _retire(arguments: argparse.Namespace, console: Console) -> int:
    station = open_station(arguments)
    _ = station.authority  # a wrong passphrase must stop this before anything is changed
    closed = close_old(station, CaKind(arguments.kind), force=arguments.force)
    _, deliveries, _ = bring_trust(station, timeout_s=arguments.timeout)  # the last CRL, while it still counts
    if closed and was_interrupted(deliveries):  # whoever stops here has not seen whom the next step cuts off
        names = ", ".join(ca.short for ca in closed)
        console.emit(
            {"event": "interrupted", "closed": [ca.key_id for ca in closed]},
            f"interrupted: closed, and still trusted: {names}; the same command again goes on from here",
        )
        return INTERRUPTED
    retired = retire_closed(station, closed, force=arguments.force)
    sign_and_store_crl(station)  # the file without the last one's
    names = " and ".join(f"the {ca.kind} CA {ca.short}" for ca in retired) or "what was retired before"
    first = retired[0] if retired else next(ca for ca in station.cas if not ca.is_standing)
    code = _bring(arguments, console, station, first, f"{names}: trusted no more")
    by_hand = [one.name for one in station.settings.gateways if one.clients_ca_path is None]
    if by_hand:
        console.warn(f"{', '.join(by_hand)}: trusts it until {_EXPORTED} is brought there")
    if any(ca.kind is CaKind.ISSUING for ca in retired):
        console.say("The root's CRL lists it with the next `birthmark crl --root`.")
    return code


def _bring(arguments: argparse.Namespace, console: Console, station: Station, ca: Ca, head: str) -> int:
    """Bring what a phase changed to the gateways, and say how far that has come."""
    crls, deliveries, troubles = bring_trust(station, timeout_s=arguments.timeout)
    record = {
        "ca": ca.key_id,
        "kind": ca.kind.value,
        "phase": ca.phase,
        "crls": crls.records(),
        "gateways": [delivery.record() for delivery in deliveries],
    }
    console.emit(record, "\n".join([head, *(f"  {delivery.described()}" for delivery in deliveries)]))
    for trouble in troubles:
        console.warn(trouble)
    for delivery in deliveries:
        if delivery.distrusted:
            console.warn(f"{delivery.gateway}: bring {_EXPORTED} there, then run this again")
    return 0 if warn_of_pending(console, deliveries) and not troubles else 1


def _add_status(phases: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        phases,
        "status",
        _status,
        "say who trusts which CA, and who still presents the old one",
        "birthmark ca rollover status\nbirthmark ca rollover status --json",
    )
    add_station_option(parser)


def _status(arguments: argparse.Namespace, console: Console) -> None:
    rows = status(open_station(arguments))
    columns = ["ca", "kind", "phase", "root", "devices", "services", "brokers", "replaced", "trusted_by", "not_by"]
    console.table(rows, columns, empty="there is no CA")


def status(station: Station) -> list[dict[str, Any]]:
    """Return for each trusted CA who goes by it (by name, if it is to go), and who does not trust it yet."""
    described = []
    with station.registry.view() as view:
        cas = read_cas(view)
        census = take_census(station, view)
        for ca in (*cas.roots, *cas.issuing):
            record: dict[str, Any] = {
                "ca": ca.short,
                "kind": ca.kind.value,
                "phase": ca.phase,
                "key_id": ca.key_id,
            }
            if ca.kind is CaKind.ROOT:
                lacking = sorted(row.name for row in census.distrusting(ca.key_id))
                trusting = len(census.holders()) - len(lacking)
                record |= {"trusted_by": f"{trusting} of {len(census.holders())}"}
            else:
                lacking = gateways_without(station, view, ca)
                gateways = len(station.settings.gateways)
                record |= {
                    "root": ca.root[: len(ca.short)],
                    **{f"{kind}s": len(census.used(ca.key_id, kind)) for kind in Kind},
                    "replaced": len(census.still_valid.get(ca.key_id, ())),
                    "trusted_by": f"{gateways - len(lacking)} of {gateways} gateways",
                }
                if ca.phase == "old":
                    record["used_by"] = sorted({row.name for row in census.used(ca.key_id)})
            few = lacking if len(lacking) <= _FEW else [*lacking[:_FEW], f"and {len(lacking) - _FEW} more"]
            described.append(record | {"not_by": few, "distrusting": lacking})
    return described


def _add_force(parser: Parser) -> None:
    parser.add_argument("--force", action="store_true", help="whoever is cut off by it")


def _add_common(parser: Parser) -> None:
    add_station_option(parser)
    add_passphrase_option(parser)
    add_timeout_option(parser)
