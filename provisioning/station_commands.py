"""`birthmark init | issue-broker | issue-operator | list | show`: their options and their answers."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from birthmark.device.console import Console, Parser, command
from birthmark.device.core_dumps import forbid_core_dumps
from birthmark.device.errors import RegistryError
from birthmark.device.escape import escaped
from birthmark.device.options import number, port, taken_from_options
from birthmark.provisioning.founding import found_station, refuse_occupied
from birthmark.provisioning.issuing import OPERATOR, Issued, issue_broker, issue_operator
from birthmark.provisioning.options import (
    add_key_options,
    add_passphrase_option,
    add_root_passphrase_option,
    add_station_option,
    open_station,
    passphrase_source,
    pin_source,
    root_passphrase,
    station_folder,
    token_place,
    token_settings,
)
from birthmark.provisioning.passphrase import ROOT_PROMPT
from birthmark.provisioning.registry.opening import TINYDB, setting_from
from birthmark.provisioning.row_filters import add_filter_options, picked
from birthmark.provisioning.settings import BrokerDefaults, Settings, TokenSettings

if TYPE_CHECKING:
    import argparse

    from birthmark.provisioning.registry.model import Row

_USAGES = {ExtendedKeyUsageOID.CLIENT_AUTH: "clientAuth", ExtendedKeyUsageOID.SERVER_AUTH: "serverAuth"}


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add these commands."""
    _add_init(commands)
    _add_issue_broker(commands)
    _add_issue_operator(commands)
    _add_list(commands)
    _add_show(commands)


def _add_init(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        commands,
        "init",
        _init,
        "make a station: an offline root, an issuing CA, a registry",
        """\
birthmark init --organization 'Acme Sensors'
birthmark init --station ./station --broker-host gateway-1.example.com
birthmark init --registry sqlite:///registry.db
birthmark init --passphrase-fd 3 3< passphrase-file
birthmark init --issuing-key 'pkcs11:token=birthmark;object=issuing?module-path=/usr/lib/libp11.so'""",
    )
    add_station_option(parser)
    add_passphrase_option(parser)
    add_root_passphrase_option(parser)
    add_key_options(parser, "--issuing-key", whose="the issuing CA's")
    defaults = BrokerDefaults()
    parser.add_argument("--organization", default="birthmark", metavar="NAME", help="the O in every subject")
    parser.add_argument(
        "--default-role", default="sensor", metavar="ROLE", help="of devices (default: %(default)s)"
    )
    parser.add_argument(
        "--broker-host", default=defaults.host, metavar="HOST", help="where devices connect (default: %(default)s)"
    )
    parser.add_argument(
        "--broker-port", default=defaults.port, type=port, metavar="PORT", help="default: %(default)s"
    )
    parser.add_argument(
        "--keepalive-s",
        default=defaults.keepalive_s,
        type=number,
        metavar="S",
        help="of devices (default: %(default)s)",
    )
    parser.add_argument(
        "--registry",
        default=TINYDB,
        metavar="URL",
        help="keep the registry in a database: sqlite:///registry.db, postgresql://HOST/NAME (default: TinyDB)",
    )


def _init(arguments: argparse.Namespace, console: Console) -> None:
    forbid_core_dumps()
    place = token_place(arguments)
    with taken_from_options():
        registry = setting_from(arguments.registry)
        settings = Settings(
            organization=arguments.organization,
            default_role=arguments.default_role,
            broker=BrokerDefaults(arguments.broker_host, arguments.broker_port, arguments.keepalive_s),
            registry=registry,
            token=token_settings(place.uri) if place else TokenSettings(),
        )
    folder = station_folder(arguments)
    refuse_occupied(folder)  # before anybody types a passphrase twice
    source = passphrase_source(arguments, confirm=True)
    station = found_station(
        folder,
        settings,
        passphrase=(replace(source, prompt=ROOT_PROMPT) if place else source).read(),
        root_passphrase=root_passphrase(arguments),
        place=place,
        pin=pin_source(arguments),
    )
    cas = station.cas
    root_key = station.key_path(cas.roots[0])
    console.facts(
        {
            "station": str(station.folder),
            "organization": settings.organization,
            "root_sha256": _fingerprint(station.root),
            "issuing_sha256": _fingerprint(station.issuing),
            "registry": station.registry.shown,
            "crl": str(station.crl_path),
            "root_key": str(root_key),
            "issuing_key": cas.for_clients.key_uri or str(station.key_path(cas.for_clients)),
        }
    )
    console.say(f"\nMove {root_key} to a safe place: it is not needed here until the root's CRL ends in a year.")


def _add_issue_broker(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        commands,
        "issue-broker",
        _issue_broker,
        "make a gateway's key and certificate",
        """\
birthmark issue-broker gateway-1.example.com 192.0.2.7 --out /etc/birthmark
birthmark issue-broker localhost 127.0.0.1 ::1
birthmark issue-broker gateway-1.example.com --renew --out /etc/birthmark""",
    )
    add_station_option(parser)
    add_passphrase_option(parser)
    parser.add_argument("hosts", nargs="+", metavar="HOST", help="DNS names and addresses; the first one names it")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for server.pem, clients-ca.pem and crl.pem (default: ./HOST)"
    )
    parser.add_argument(
        "--renew", action="store_true", help="replace the certificate it has; the old one runs out"
    )


def _issue_broker(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    out = arguments.out or Path(arguments.hosts[0])
    _tell(issue_broker(station, arguments.hosts, out, renew=arguments.renew), console)


def _add_issue_operator(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        commands,
        "issue-operator",
        _issue_operator,
        "make the key and certificate of an operator or another service",
        """\
birthmark issue-operator alice --out ~/birthmark
birthmark issue-operator billing --role service-billing
birthmark issue-operator alice --renew --out ~/birthmark""",
    )
    add_station_option(parser)
    add_passphrase_option(parser)
    parser.add_argument("name", metavar="NAME", help="the service's name: its certificate's CN")
    parser.add_argument("--role", default=OPERATOR, help="`operator` (default), or one beginning with `service-`")
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="for NAME.pem and ca.pem (default: .)"
    )
    parser.add_argument(
        "--renew", action="store_true", help="replace the certificate it has; the old one runs out"
    )


def _issue_operator(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    issued = issue_operator(station, arguments.name, arguments.out, role=arguments.role, renew=arguments.renew)
    _tell(issued, console)


def _tell(issued: Issued, console: Console) -> None:
    row = issued.row
    if issued.leftovers_revoked:
        console.warn(
            "an interrupted attempt's certificate was revoked; `birthmark crl` brings that to the gateways"
        )
    record = {
        "name": row.name,
        "kind": row.kind.value,
        "cert_serial": f"{row.cert_serial:x}",
        "not_after": _moment(row.not_after),
        "files": [str(path) for path in issued.paths],
    }
    console.facts(record)


def _add_list(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        commands,
        "list",
        _list,
        "list devices, services and brokers",
        """\
birthmark list
birthmark list --state ATTESTED --role sensor
birthmark list --name 'pump-*' --expiring 30d --not-revoked
birthmark list --kind broker --json""",
    )
    add_station_option(parser)
    add_filter_options(parser)


def _list(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    columns = ["name", "kind", "role", "state", "revoked", "not_after", "hwid"]
    with station.registry.view() as view:
        filters = picked(view, arguments, station.clock())
        console.table(map(_summary, view.stream(**filters)), columns, empty="nothing is enrolled that fits")


def _summary(row: Row) -> dict[str, Any]:
    return {
        "number": row.number,
        "name": row.name,
        "kind": row.kind.value,
        "role": row.role or None,
        "state": row.state.value,
        "batch": row.batch or None,
        "revoked": row.revocation_reason or None,
        "not_after": _moment(row.not_after),
        "hwid": row.hwid.hex() if row.hwid else None,
        "cert_serial": f"{row.cert_serial:x}" if row.cert_serial else None,
    }


def _add_show(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = command(
        commands,
        "show",
        _show,
        "show everything that is known of one identity",
        """\
birthmark show sensor-17
birthmark show sensor-17 --json""",
    )
    add_station_option(parser)
    parser.add_argument("name", metavar="ID", help="a device, a service or a broker")


def _show(arguments: argparse.Namespace, console: Console) -> None:
    station = open_station(arguments)
    with station.registry.view() as view:
        rows = view.named(arguments.name)
    if not rows:
        raise RegistryError(
            f"could not show {escaped(arguments.name, 64)}: there is no such identity",
            hint="list them with `birthmark list`",
        )
    row = next((row for row in rows if row.is_live), rows[-1])
    record = {
        **_summary(row),
        "created_at": _moment(row.created_at),
        "changed_at": _moment(row.changed_at),
        "key_mode": row.key_mode.value if row.key_mode else None,
        "txn": row.txn.hex() if row.txn else None,
        "bundle_sha256": row.bundle_sha256.hex() if row.bundle_sha256 else None,
        "issuing_ca": row.issuer or None,
        "anchors": row.anchors.split(" ") if row.anchors else None,
        "replaces": row.replaces,
        "replaced_by": row.replaced_by,
        "renews": row.renews,
        "void_reason": row.void_reason or None,
        "revoked_at": _moment(row.revoked_at),
        **_certificate_facts(row),
        "other_rows": [f"{other.number} {other.state}" for other in rows if other is not row],
    }
    console.facts(record)


def _certificate_facts(row: Row) -> dict[str, Any]:
    if row.certificate_der is None:
        return {}
    try:
        certificate = x509.load_der_x509_certificate(row.certificate_der)
    except ValueError as error:
        raise RegistryError(
            f"could not read the certificate of row {row.number}: it is damaged",
            hint="restore the registry from a backup, together with the audit log",
        ) from error
    extensions = certificate.extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    usage = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    key_id = extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    return {
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "not_before": _moment(row.not_before),
        "certificate_sha256": _fingerprint(certificate),
        "key_id": key_id.hex(),
        "extended_key_usage": [_USAGES.get(oid, oid.dotted_string) for oid in usage],
        "alternative_names": [_shown_name(name) for name in names],
        "certificate_bytes": len(row.certificate_der),
    }


def _shown_name(name: x509.GeneralName) -> str:
    return name.value.rfc4514_string() if isinstance(name, x509.DirectoryName) else str(name.value)


def _fingerprint(certificate: x509.Certificate) -> str:
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def _moment(moment: Any) -> str | None:
    return None if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%SZ")
