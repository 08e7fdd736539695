"""`birthmark doctor`: what will hurt; `doctor ports`: what may come between a station and its serial ports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from birthmark.device.console import Console, Parser, command
from birthmark.device.errors import ConfigurationError, PortError
from birthmark.device.link.timers import DEFAULT_BAUD
from birthmark.provisioning.checkup import gather
from birthmark.provisioning.checkup_rules import examine as examine_station
from birthmark.provisioning.checkup_view import exit_code, show
from birthmark.provisioning.doctor import Health, Machine, examine, ports_here
from birthmark.provisioning.gateway_look import DEFAULT_TIMEOUT_S
from birthmark.provisioning.gateway_policies import note_policies
from birthmark.provisioning.gateway_receipts import note_heard
from birthmark.provisioning.line.port_choice import choose, read_fixture
from birthmark.provisioning.options import add_station_option, add_timeout_option, open_station

if TYPE_CHECKING:
    import argparse

    from birthmark.provisioning.doctor import Finding

_COLOURS = {Health.OK: "green", Health.WARN: "yellow", Health.FAIL: "red"}


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command."""
    parser = command(
        commands,
        "doctor",
        _station,
        "look for what will hurt: a station, its CAs, gateways, devices, ports",
        """\
birthmark doctor
birthmark doctor --offline
birthmark doctor --json | jq 'select(.level == "BROKEN")'
birthmark doctor ports --ports fixture.toml""",
    )
    add_station_option(parser)
    parser.add_argument("--offline", action="store_true", help="do not look at the gateways")
    add_timeout_option(parser, DEFAULT_TIMEOUT_S, "how long to wait for the gateways")
    actions: argparse._SubParsersAction[Parser] = parser.add_subparsers(
        title="actions", metavar="ACTION", help="look at something else instead"
    )
    ports = command(
        actions,
        "ports",
        _ports,
        "look at serial ports, without opening one",
        """\
birthmark doctor ports
birthmark doctor ports --port /dev/ttyUSB0
birthmark doctor ports --ports fixture.toml --json""",
    )
    which = ports.add_mutually_exclusive_group()
    which.add_argument("--port", action="append", metavar="PORT", help="only this one; may be given several times")
    which.add_argument("--ports", type=Path, metavar="FILE", help="only those of a fixture")


def _station(arguments: argparse.Namespace, console: Console) -> int:
    station = open_station(arguments)
    facts = gather(station, timeout_s=None if arguments.offline else arguments.timeout)
    if not facts.is_read_only:
        note_heard(station, facts.gateways)
        note_policies(station, facts.gateways)
    remarks = examine_station(facts)
    show(console, facts, remarks)
    return exit_code(remarks)


def _ports(arguments: argparse.Namespace, console: Console) -> int:
    findings = examine(Machine.here(), _chosen(arguments))
    for finding in findings:
        console.emit(_record(finding), _line(finding, console))
    return PortError.exit_code if any(finding.health is Health.FAIL for finding in findings) else 0


def _chosen(arguments: argparse.Namespace) -> list[str]:
    if arguments.ports is not None:
        names = [slot.name for slot in read_fixture(arguments.ports, DEFAULT_BAUD)]
    elif arguments.port:
        names = [choose(port) for port in arguments.port]
    else:
        here = ports_here()
        if not here:
            raise PortError(
                "could not look at the ports: this machine has no serial port at present",
                hint="plug an adapter in, or name a port with --port",
            )
        return here
    foreign = [name.text for name in names if not name.is_local]
    if foreign:
        raise ConfigurationError(
            f"could not look at {foreign[0]}: it is not a port of this machine", hint="look at it over there"
        )
    return [name.text for name in names]


def _record(finding: Finding) -> dict[str, object]:
    return {
        "port": finding.port,
        "check": finding.check,
        "health": finding.health.value,
        "text": finding.text,
        "hint": finding.hint or None,
    }


def _line(finding: Finding, console: Console) -> str:
    word = console.paint(f"{finding.health.value:<4}", _COLOURS[finding.health])
    line = f"{word}  {finding.port}  {finding.check}: {finding.text}"
    return f"{line}\n      {console.paint('hint:', 'bold')} {finding.hint}" if finding.hint else line
