"""`birthmark revoke | crl`: their options and their answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from birthmark.device.console import Console, Parser, command
from birthmark.device.errors import UsageError
from birthmark.provisioning import crl_commands
from birthmark.provisioning.cas import SHORT
from birthmark.provisioning.crl_delivery import deliver_crl, warn_of_pending
from birthmark.provisioning.crls import clock_trouble, sign_and_store_crl, sign_root_crl
from birthmark.provisioning.options import (
    add_passphrase_option,
    add_root_passphrase_option,
    add_station_option,
    add_timeout_option,
    cert_serial,
    open_station,
    revocation_reason,
    root_passphrase,
)
from birthmark.provisioning.revocation import REASONS, Revocation, parse_reason, revoke, revoke_certificate

if TYPE_CHECKING:
    import argparse

    from birthmark.provisioning.delivery import Delivery
    from birthmark.provisioning.station import Station


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add these commands."""
    _add_revoke(commands)
    _add_crl(commands)


def _add_revoke(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        commands,
        "revoke",
        _revoke,
        "revoke an identity and see it cut off at every gateway",
        """\
birthmark revoke sensor-17 --reason lost
birthmark revoke gateway-1.example.com --reason retired
birthmark revoke alice --reason keyCompromise --json
birthmark revoke --cert-serial 5a0c9d8e7f60514233241506f7e8d9ca --reason lost""",
    )
    add_station_option(parser)
    add_passphrase_option(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("name", metavar="ID", nargs="?", help="a device, a service or a broker")
    which.add_argument(
        "--cert-serial",
        type=cert_serial,
        metavar="HEX",
        help="one certificate alone, by its serial number; also one that this station does not know",
    )
    parser.add_argument(
        "--reason", required=True, type=revocation_reason, metavar="REASON", help=", ".join(REASONS)
    )
    add_timeout_option(parser)


def _revoke(arguments: argparse.Namespace, console: Console) -> int:
    station = open_station(arguments)
    reason = parse_reason(arguments.reason)
    if reason is None:
        raise ValueError("the parser lets no other reason through")
    if arguments.cert_serial is not None:
        revocation = revoke_certificate(station, arguments.cert_serial, reason, word=arguments.reason)
    else:
        revocation = revoke(station, arguments.name, reason, word=arguments.reason)
    name, crls = revocation.rows[-1].name, revocation.crls
    deliveries = deliver_crl(station, crls, arguments.timeout)
    record = {
        "revoked": name,
        "newly": revocation.newly,
        "certificates": [
            {"cert_serial": f"{row.cert_serial:x}", "reason": row.revocation_reason} for row in revocation.rows
        ],
        "crl_number": crls.current.number,
        "crl_path": str(crls.path),
        "crls": crls.records(),
        "gateways": [delivery.record() for delivery in deliveries],
        "unlisted": [f"{row.cert_serial:x}" for row in revocation.unlisted],
    }
    again = "" if revocation.newly else " (it was before)"
    head = f"{name} is revoked{again}: {_counted(revocation)} on {crls.shown()}, {crls.path}"
    _warn_of_clock(console, station)
    for row in revocation.unlisted:
        console.warn(
            f"the certificate {row.cert_serial:x} is on no CRL, and gateways let it in: the key of its CA "
            f"{row.issuer[:SHORT]} is lost; `birthmark ca rollover retire issuing` ends that"
        )
    return max(_answer(console, record, head, deliveries), 1 if revocation.unlisted else 0)


def _counted(revocation: Revocation) -> str:
    """Say how many certificates are on the CRLs: those of a retired CA, or that ended long ago, are not."""
    rows, listed = revocation.rows, revocation.crls.cert_serials
    count = sum(row.cert_serial in listed for row in rows)
    of_all = "" if count == len(rows) else f" of {len(rows)}"
    return f"{count}{of_all} certificate{'' if len(rows) == 1 else 's'}"


def _add_crl(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        commands,
        "crl",
        _crl,
        "sign the CRL anew and bring it to every gateway",
        """\
birthmark crl
birthmark crl --timeout 60 --json
birthmark crl --root --root-key /media/safe/root-1a2b3c4d.key.pem""",
    )
    add_station_option(parser)
    add_passphrase_option(parser)
    add_root_passphrase_option(parser)
    parser.add_argument(
        "--root", action="store_true", help="sign the root's own CRL instead; gateways do not use it"
    )
    parser.add_argument("--root-key", type=Path, metavar="FILE", help="where the root's key is kept")
    add_timeout_option(parser)
    actions: argparse._SubParsersAction[Parser] = parser.add_subparsers(
        title="actions", metavar="ACTION", help="do something else about CRLs instead"
    )
    crl_commands.add_to(actions)


def _crl(arguments: argparse.Namespace, console: Console) -> int:
    if not arguments.root:
        for option, value in (
            ("--root-key", arguments.root_key),
            ("--root-passphrase-fd", arguments.root_passphrase_fd),
        ):
            if value is not None:
                raise UsageError(f"could not use {option}: it is for the root's own CRL", hint="give --root, too")
    station = open_station(arguments)
    if arguments.root:
        path = sign_root_crl(station, station.root_issuer(root_passphrase(arguments), arguments.root_key))
        console.emit({"root_crl_path": str(path)}, f"the root's CRL is at {path}")
        return 0
    crls = sign_and_store_crl(station)
    deliveries = deliver_crl(station, crls, arguments.timeout)
    record = {
        "crl_number": crls.current.number,
        "crl_path": str(crls.path),
        "entries": len(crls.cert_serials),
        "next_update": crls.next_update.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "crls": crls.records(),
        "gateways": [delivery.record() for delivery in deliveries],
    }
    count = "1 certificate" if len(crls.cert_serials) == 1 else f"{len(crls.cert_serials)} certificates"
    verb = "lists" if len(crls.crls) == 1 else "list"
    _warn_of_clock(console, station)
    return _answer(console, record, f"{crls.shown()} {verb} {count}: {crls.path}", deliveries)


def _warn_of_clock(console: Console, station: Station) -> None:
    if trouble := clock_trouble(station):
        console.warn(trouble)


def _answer(console: Console, record: dict[str, object], head: str, deliveries: list[Delivery]) -> int:
    lines = [head, *(f"  {delivery.described()}" for delivery in deliveries)]
    console.emit(record, "\n".join(lines))
    if not deliveries:
        console.warn(
            "no gateway is configured: bring the CRL to each yourself, or see `birthmark gateway add --help`"
        )
    return 0 if warn_of_pending(console, deliveries) else 1
