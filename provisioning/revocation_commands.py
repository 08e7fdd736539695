"""`birthmark revoke | crl | gateway`: their options and their answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from birthmark.device.console import Console, Parser, command
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.provisioning import crl_commands
from birthmark.provisioning.cas import SHORT
from birthmark.provisioning.crl_delivery import deliver_crl, warn_of_pending
from birthmark.provisioning.crls import clock_trouble, sign_and_store_crl, sign_root_crl
from birthmark.provisioning.gateway_policies import forget_policy
from birthmark.provisioning.gateway_receipts import forget_gateway, standing_of
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
from birthmark.provisioning.revocation import REASONS, parse_reason, revoke, revoke_certificate
from birthmark.provisioning.settings import Gateway, add_gateway, remove_gateway

if TYPE_CHECKING:
    import argparse

    from birthmark.provisioning.gateways import Delivery
    from birthmark.provisioning.station import Station


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add these commands."""
    _add_revoke(commands)
    _add_crl(commands)
    _add_gateway(commands)


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
    count = "1 certificate" if len(revocation.rows) == 1 else f"{len(revocation.rows)} certificates"
    again = "" if revocation.newly else " (it was before)"
    head = f"{name} is revoked{again}: {count} on {crls.shown()}, {crls.path}"
    _warn_of_clock(console, station)
    for row in revocation.unlisted:
        console.warn(
            f"the certificate {row.cert_serial:x} is on no CRL, and gateways let it in: the key of its CA "
            f"{row.issuer[:SHORT]} is lost; `birthmark ca rollover retire issuing` ends that"
        )
    return max(_answer(console, record, head, deliveries), 1 if revocation.unlisted else 0)


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
    station = open_station(arguments)
    if arguments.root:
        passphrase = root_passphrase(arguments) or station.read_passphrase()
        path = sign_root_crl(station, station.root_issuer(passphrase, arguments.root_key))
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


def _add_gateway(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "gateway",
        help="say which gateways are sent every CRL",
        description="say which gateways are sent every CRL",
        examples="birthmark gateway add gateway-1 --path /etc/birthmark/crl.pem\nbirthmark gateway list",
    )
    actions: argparse._SubParsersAction[Parser] = parser.add_subparsers(
        title="actions", metavar="ACTION", required=True
    )
    add = command(
        actions,
        "add",
        _gateway_add,
        "add a gateway, reached by a path or over MQTT",
        """\
birthmark gateway add gateway-1 --path /etc/birthmark/crl.pem --clients-ca /etc/birthmark/clients-ca.pem
birthmark gateway add gateway-1.example.com --host 192.0.2.7 --operator ~/birthmark/alice.pem""",
    )
    add.add_argument("name", metavar="NAME", help="the broker's own name (`name` in its broker.toml)")
    add.add_argument("--path", type=Path, metavar="FILE", help="the CRL file that the gateway watches")
    add.add_argument("--clients-ca", type=Path, metavar="FILE", help="its clients-ca.pem, to be written as well")
    add.add_argument("--host", default="", metavar="HOST", help="where its broker listens")
    add.add_argument("--port", type=int, default=8883, metavar="PORT", help="default: %(default)s")
    add.add_argument("--operator", type=Path, metavar="FILE", help="NAME.pem of an operator")
    listing = command(actions, "list", _gateway_list, "list the gateways", "birthmark gateway list --json")
    remove = command(actions, "remove", _gateway_remove, "remove a gateway", "birthmark gateway remove gateway-1")
    remove.add_argument("name", metavar="NAME", help="as in `birthmark gateway list`")
    for each in (add, listing, remove):
        add_station_option(each)


def _gateway_add(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    gateway = Gateway(
        name=arguments.name,
        crl_path=arguments.path.absolute() if arguments.path else None,
        host=arguments.host,
        port=arguments.port,
        operator_path=arguments.operator.absolute() if arguments.operator else None,
        clients_ca_path=arguments.clients_ca.absolute() if arguments.clients_ca else None,
    )
    if gateway.operator_path is not None:
        # Now is better than at the first revocation.
        Credentials.from_files(gateway.operator_path, station.root_path, BrokerAddress(gateway.host, gateway.port))
    add_gateway(station.settings_path, gateway)
    with station.registry.transaction() as transaction:
        transaction.record("gateway-add", gateway.name, reached_by=gateway.reached_by)
    console.emit(_gateway_record(gateway), f"{gateway.name} is sent every CRL: {gateway.reached_by}")


def _gateway_list(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    with station.registry.view() as view:
        rows = [
            {**_gateway_record(gateway), **crl_commands.standing_record(standing_of(view, gateway.name))}
            for gateway in station.settings.gateways
        ]
    columns = ["name", "reached_by", "operator", "crl", "confirmed_at", "trouble"]
    console.table(rows, columns, empty="no gateway is configured")


def _gateway_remove(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    remove_gateway(station.settings_path, arguments.name)
    with station.registry.transaction() as transaction:
        forget_gateway(transaction, arguments.name)
        forget_policy(transaction, arguments.name)
        transaction.record("gateway-remove", arguments.name)
    console.emit({"removed": arguments.name}, f"{arguments.name} is sent no CRL any more")


def _gateway_record(gateway: Gateway) -> dict[str, object]:
    operator = str(gateway.operator_path) if gateway.operator_path else None
    return {"name": gateway.name, "reached_by": gateway.reached_by, "operator": operator}
