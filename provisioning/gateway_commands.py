"""`birthmark gateway | upstream`: which gateways the station serves, and how each is reached."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from birthmark.device.console import Console, Parser, command
from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.options import port, taken_from_options
from birthmark.provisioning import crl_commands
from birthmark.provisioning.gateway_policies import forget_policy
from birthmark.provisioning.gateway_receipts import forget_gateway, standing_of
from birthmark.provisioning.gateway_settings import Gateway, Upstream
from birthmark.provisioning.options import add_station_option, open_station
from birthmark.provisioning.settings_edit import (
    add_gateway,
    add_upstream,
    check_new,
    remove_gateway,
    remove_upstream,
)

if TYPE_CHECKING:
    import argparse


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add these commands."""
    _add_gateway(commands)
    _add_upstream(commands)


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
        "add a gateway, reached by a path, over MQTT or through an upstream",
        """\
birthmark gateway add gateway-1 --path /etc/birthmark/crl.pem --clients-ca /etc/birthmark/clients-ca.pem
birthmark gateway add gateway-1.example.com --host 192.0.2.7 --operator ~/birthmark/alice.pem
birthmark gateway add berlin --via cloud""",
    )
    add.add_argument("name", metavar="NAME", help="the broker's own name (`name` in its broker.toml)")
    add.add_argument("--path", type=Path, metavar="FILE", help="the CRL file that the gateway watches")
    add.add_argument("--clients-ca", type=Path, metavar="FILE", help="its clients-ca.pem, to be written as well")
    add.add_argument("--host", default="", metavar="HOST", help="where its broker listens")
    add.add_argument("--port", type=port, default=8883, metavar="PORT", help="default: %(default)s")
    add.add_argument("--operator", type=Path, metavar="FILE", help="NAME.pem of an operator")
    add.add_argument("--via", default="", metavar="UPSTREAM", help="the upstream that it has a link to")
    listing = command(actions, "list", _gateway_list, "list the gateways", "birthmark gateway list --json")
    remove = command(actions, "remove", _gateway_remove, "remove a gateway", "birthmark gateway remove gateway-1")
    remove.add_argument("name", metavar="NAME", help="as in `birthmark gateway list`")
    for each in (add, listing, remove):
        add_station_option(each)


def _gateway_add(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    with taken_from_options():
        gateway = Gateway(
            name=arguments.name,
            crl_path=arguments.path.absolute() if arguments.path else None,
            host=arguments.host,
            port=arguments.port,
            operator_path=arguments.operator.absolute() if arguments.operator else None,
            clients_ca_path=arguments.clients_ca.absolute() if arguments.clients_ca else None,
            via=arguments.via,
        )
    if gateway.operator_path is not None:
        # Now is better than at the first revocation.
        Credentials.from_files(gateway.operator_path, station.root_path, BrokerAddress(gateway.host, gateway.port))
    check_new(gateway, station.settings)
    with station.registry.transaction() as transaction:
        # What one of that name has confirmed, which a person took out or a killed command, this one has not.
        forget_gateway(transaction, gateway.name)
        forget_policy(transaction, gateway.name)
        transaction.record("gateway-add", gateway.name, reached_by=gateway.reached_by)
    add_gateway(station.settings_path, gateway)
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


def _add_upstream(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "upstream",
        help="say through which brokers or clusters gateways are reached",
        description="say through which brokers or clusters gateways are reached",
        examples="birthmark upstream add cloud --host mq.example --operator alice.pem\nbirthmark upstream list",
    )
    actions: argparse._SubParsersAction[Parser] = parser.add_subparsers(
        title="actions", metavar="ACTION", required=True
    )
    add = command(
        actions,
        "add",
        _upstream_add,
        "add a broker or a cluster that gateways keep a link to",
        """\
birthmark upstream add cloud --host mq.example.com --operator ~/birthmark/alice.pem
birthmark upstream add cloud --host mq1.example.com --host mq2.example.com --operator ~/birthmark/alice.pem
birthmark upstream add cloud --host mq.example.com:8884 --operator station.pem --ca upstream-ca.pem""",
    )
    add.add_argument("name", metavar="NAME", help="one word: letters, digits and hyphens")
    add.add_argument(
        "--host",
        action="append",
        required=True,
        metavar="HOST[:PORT]",
        help="where it listens; once for each node of a cluster",
    )
    add.add_argument(
        "--port", type=port, default=8883, metavar="PORT", help="of hosts without one (default: 8883)"
    )
    add.add_argument(
        "--operator",
        type=Path,
        required=True,
        metavar="FILE",
        help="NAME.pem of whom the station is there",
    )
    add.add_argument(
        "--ca",
        type=Path,
        metavar="FILE",
        help="who signs its certificate (default: the station's roots)",
    )
    listing = command(actions, "list", _upstream_list, "list the upstreams", "birthmark upstream list --json")
    remove = command(actions, "remove", _upstream_remove, "remove an upstream", "birthmark upstream remove cloud")
    remove.add_argument("name", metavar="NAME", help="as in `birthmark upstream list`")
    for each in (add, listing, remove):
        add_station_option(each)


def _upstream_add(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    with taken_from_options():
        upstream = Upstream(
            name=arguments.name,
            servers=tuple(BrokerAddress.parse(text, arguments.port) for text in arguments.host),
            operator_path=arguments.operator.absolute(),
            ca_path=arguments.ca.absolute() if arguments.ca else None,
        )
    # Now is better than at the first revocation.
    anchors_path = upstream.ca_path or station.root_path
    Credentials.from_files(upstream.operator_path, anchors_path, upstream.servers[0])
    add_upstream(station.settings_path, upstream)
    with station.registry.transaction() as transaction:
        transaction.record("upstream-add", upstream.name, reached_by=upstream.reached_by)
    text = f"{upstream.name} leads to gateways: {upstream.reached_by}; name each: birthmark gateway add NAME --via"
    console.emit(_upstream_record(upstream, []), f"{text} {upstream.name}")


def _upstream_list(arguments: argparse.Namespace, console: Console) -> None:
    settings = open_station(arguments).settings
    behind: dict[str, list[str]] = {}
    for gateway in settings.gateways:
        behind.setdefault(gateway.via.lower(), []).append(gateway.name)
    rows = [_upstream_record(upstream, behind.get(upstream.name.lower(), [])) for upstream in settings.upstreams]
    console.table(rows, ["name", "reached_by", "operator", "gateways"], empty="no upstream is configured")


def _upstream_remove(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    remove_upstream(station.settings_path, arguments.name)
    with station.registry.transaction() as transaction:
        transaction.record("upstream-remove", arguments.name)
    console.emit({"removed": arguments.name}, f"{arguments.name} is used no more")


def _upstream_record(upstream: Upstream, gateways: list[str]) -> dict[str, object]:
    return {
        "name": upstream.name,
        "reached_by": upstream.reached_by,
        "operator": str(upstream.operator_path),
        "ca": str(upstream.ca_path) if upstream.ca_path else None,
        "gateways": gateways,
    }
