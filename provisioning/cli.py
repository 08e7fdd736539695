"""The command `birthmark`: nothing but its commands, put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from birthmark.device.console import Parser
from birthmark.provisioning import (
    audit_commands,
    backup_commands,
    batch_commands,
    bulk_commands,
    ca_commands,
    doctor_command,
    flash,
    gateway_commands,
    gateways_command,
    inspect_command,
    label_command,
    policy_commands,
    quarantine_commands,
    reflash,
    registry_commands,
    renewal_commands,
    revocation_commands,
    run_command,
    station_commands,
)

if TYPE_CHECKING:
    import argparse


def parser() -> Parser:
    """Return the parser of the whole command."""
    top = Parser(
        prog="birthmark",
        description="The station: enrol devices, issue certificates, revoke them.",
        examples="""\
birthmark init --organization 'Acme Sensors'
birthmark flash --port /dev/ttyUSB0 --id sensor-17
birthmark revoke sensor-17 --reason lost""",
    )
    commands: argparse._SubParsersAction[Parser] = top.add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    station_commands.add_to(commands)
    bulk_commands.add_to(commands)
    flash.add_to(commands)
    run_command.add_to(commands)
    reflash.add_to(commands)
    batch_commands.add_to(commands)
    label_command.add_to(commands)
    quarantine_commands.add_to(commands)
    doctor_command.add_to(commands)
    revocation_commands.add_to(commands)
    gateway_commands.add_to(commands)
    gateways_command.add_to(commands)
    policy_commands.add_to(commands)
    audit_commands.add_to(commands)
    ca_commands.add_to(commands)
    inspect_command.add_to(commands)
    backup_commands.add_to(commands)
    registry_commands.add_to(commands)
    renewal_commands.add_to(commands)
    return top
