"""`birthmark renewd` and `birthmark renew`: the renewal service, and asking devices to renew now."""

from __future__ import annotations

import argparse
import fnmatch
import logging
import secrets
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from birthmark.device import event_lines, topics
from birthmark.device.client import Client
from birthmark.device.console import command
from birthmark.device.credentials import Credentials
from birthmark.device.errors import BirthmarkError, ConfigurationError, RegistryError
from birthmark.device.escape import escaped
from birthmark.device.identity import DeviceId
from birthmark.device.options import broker_address
from birthmark.device.renewal.messages import MAX_WAIT_S, RenewalAnswer
from birthmark.device.stopping import stopping_on_signals
from birthmark.device.systemd import notify, watchdog_interval_s
from birthmark.provisioning.options import add_passphrase_option, add_station_option, open_station
from birthmark.provisioning.registry.model import Kind, State
from birthmark.provisioning.renewal import Renewals
from birthmark.provisioning.renewal_seal import Seals
from birthmark.provisioning.renewd import RenewalService
from birthmark.provisioning.retirement import Retiring
from birthmark.provisioning.rollover.anchors import StationAnchors

if TYPE_CHECKING:
    from collections.abc import Callable

    from birthmark.device.console import Console, Parser
    from birthmark.provisioning.registry.model import Row
    from birthmark.provisioning.station import Station

ROLE: Final = "service-renewal"
"""Of whoever renews, as the gateways' policies know it."""
SENT_WITHIN_S: Final = 10.0
DEFAULT_SPREAD_S: Final = 60
METRICS_INTERVAL_S: Final = 60.0

_IDENTITY: Final = "--broker gateway-1.example.com:8883 --identity renewd.pem"
_RENEWD_EXAMPLES: Final = f"""
birthmark issue-operator renewd --role service-renewal
birthmark renewd {_IDENTITY}
birthmark renewd --broker gateway-1.example.com --broker gateway-2.example.com --identity renewd.pem --json
"""
_RENEW_EXAMPLES: Final = f"""
birthmark renew sensor-17 {_IDENTITY}
birthmark renew 'camera-*' --spread 3600 {_IDENTITY} --json
"""


def _spread(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) > MAX_WAIT_S:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no number of seconds from 0 to {MAX_WAIT_S}")
    return int(text)


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add these commands."""
    renewd = command(commands, "renewd", _renewd, "renew devices' certificates over the network", _RENEWD_EXAMPLES)
    renew = command(commands, "renew", _renew, "ask devices to renew their certificates now", _RENEW_EXAMPLES)
    renew.add_argument("id", metavar="ID|GLOB", help="a device, or a pattern such as 'camera-*'")
    renew.add_argument(
        "--spread",
        type=_spread,
        default=DEFAULT_SPREAD_S,
        metavar="S",
        help="each device draws its moment within so many seconds (default: %(default)s)",
    )
    for parser in (renewd, renew):
        add_passphrase_option(parser)
        parser.add_argument(
            "--broker", required=True, action="append", metavar="HOST:PORT", help="a gateway; may be repeated"
        )
        parser.add_argument(
            "--identity",
            required=True,
            type=Path,
            metavar="PEM",
            help="key, certificate and chain of a service with the role service-renewal",
        )
        add_station_option(parser)


def _renewd(arguments: argparse.Namespace, console: Console) -> int:
    station = open_station(arguments)
    # What ends every renewal is said now, and not to the first device.
    station.settings.lifetimes.of(Kind.DEVICE)
    _ = station.authority
    logging.getLogger("birthmark.device").addHandler(logging.NullHandler())
    say = partial(event_lines.say, console)
    watchdog_s = watchdog_interval_s()
    retiring = Retiring(station, console)
    service = RenewalService(
        Renewals(station, anchors=StationAnchors(station)),
        say=say,
        alive=(lambda: notify("WATCHDOG=1")) if watchdog_s else (lambda: None),
        confirmed=retiring.look,
        turn_s=watchdog_s / 2 if watchdog_s else METRICS_INTERVAL_S,
    )
    clients: list[tuple[str, Client]] = []
    with ExitStack() as running, stopping_on_signals() as stopping:
        service.start()
        running.callback(service.stop)
        retiring.start()
        running.callback(retiring.stop)
        for address in arguments.broker:
            # A session of its own: several services may answer, and the registry decides.
            client = Client(
                _credentials(arguments, station, address),
                client_suffix=f"renewd-{secrets.token_hex(4)}",
                observe=partial(event_lines.show, console),
            )
            client.subscribe(topics.RENEWAL_REQUESTS, partial(service.take, client))
            client.start()
            running.callback(client.stop)
            clients.append((address, client))
        say("ready", f"renewing for {', '.join(map(escaped, arguments.broker))}", brokers=arguments.broker)
        notify("READY=1")
        while not stopping.wait(METRICS_INTERVAL_S):
            _tell_counts(service, say)
            for address, client in clients:
                take_up_new_credentials(client, partial(_credentials, arguments, station, address), say)
        notify("STOPPING=1")
    _tell_counts(service, say)
    say("stopped", "stopped")
    station.close()
    return stopping.exit_code


def take_up_new_credentials(client: Client, read: Callable[[], Credentials], say: Callable[..., None]) -> None:
    """Have a client go on with what is in its files by now: a new certificate, or the roots after a rollover."""
    try:
        credentials = read()
        if credentials == client.credentials:
            return
        client.use(credentials)
    except BirthmarkError as error:  # written only in part, perhaps: the next look finds it whole
        say("trouble", f"{error.message}\n          {error.hint}", reason=error.message, hint=error.hint)
    else:
        until = credentials.facts.not_after
        say("credentials", f"going on with a certificate until {until:%Y-%m-%d}", not_after=until.isoformat())


def _tell_counts(service: RenewalService, say: Callable[..., None]) -> None:
    counts = dict(sorted(service.counts.items()))
    text = ", ".join(f"{name} {count}" for name, count in counts.items()) or "nothing was asked"
    say("metrics", f"since the start: {text}", **counts)


def _renew(arguments: argparse.Namespace, console: Console) -> int:
    station = open_station(arguments)
    identities = [_credentials(arguments, station, address) for address in arguments.broker]
    rows = _wanted(station, arguments.id)
    seals, word = Seals(station), RenewalAnswer("renew-now", retry_after_s=arguments.spread)
    payloads = {topics.renewal_answer(DeviceId(row.name)): seals.sealed(word, row).to_bytes() for row in rows}
    logging.getLogger("birthmark.device").addHandler(logging.NullHandler())
    for credentials in identities:
        with Client(credentials, client_suffix=f"renew-{secrets.token_hex(4)}") as client:
            sent = [client.publish(topic, payload) for topic, payload in payloads.items()]
            for acknowledgement in sent:
                acknowledgement.wait(SENT_WITHIN_S)
    names = [row.name for row in rows]
    text = f"asked {names[0] if len(names) == 1 else f'{len(names)} devices'} to renew"
    console.emit(
        {"asked": names, "brokers": arguments.broker, "spread_s": arguments.spread},
        f"{text} within {arguments.spread} s; one that is offline hears it when it is back",
    )
    return 0


def _wanted(station: Station, pattern: str) -> list[Row]:
    with station.registry.view() as view:
        if any(character in pattern for character in "*?["):
            found = [
                row
                for row in view.rows(kind=Kind.DEVICE, states={State.ATTESTED})
                if fnmatch.fnmatchcase(row.name_folded, pattern.lower())
            ]
        else:
            live = view.live_by_name(pattern)
            found = [] if live is None else [live]
    rows = [row for row in found if row.kind is Kind.DEVICE and row.state is State.ATTESTED]
    rows = [row for row in rows if row.is_live and not row.is_revoked]
    if not rows:
        raise RegistryError(
            f"could not ask {escaped(pattern, 64)} to renew: no device of that name is made and not revoked",
            hint="list them with `birthmark list --state ATTESTED`",
        )
    return rows


def _credentials(arguments: argparse.Namespace, station: Station, address: str) -> Credentials:
    """Read the identity; one of another role is refused here, since no broker says which PUBLISH it has denied."""
    credentials = Credentials.from_files(arguments.identity, station.root_path, broker_address(address))
    if credentials.role.name != ROLE:
        raise ConfigurationError(
            f"could not renew as {credentials.device_id}: its role is {credentials.role}, and gateways let "
            f"{ROLE} alone speak to devices of renewals",
            hint=f"birthmark issue-operator renewd --role {ROLE}, and name its file with --identity",
        )
    return credentials
