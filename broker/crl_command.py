"""`birthmark-broker crl show`: which CRLs are in force on this gateway, and how long they last."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from birthmark.broker.config import read_settings
from birthmark.broker.revocation import Revocations
from birthmark.broker.trust import read_trust
from birthmark.device.console import Parser, command

if TYPE_CHECKING:
    import argparse

    from birthmark.device.console import Console

_EXAMPLES = """
birthmark-broker crl show
birthmark-broker crl show --config /etc/birthmark/broker.toml --json
"""
_COLUMNS = ("issuer", "number", "revoked", "this_update", "next_update", "state")


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the `crl` commands."""
    summary = "look at the CRLs in force"
    group = commands.add_parser("crl", help=summary, description=summary, examples=_EXAMPLES)
    actions: argparse._SubParsersAction[Parser] = group.add_subparsers(
        title="actions", metavar="ACTION", required=True
    )
    show = command(actions, "show", _show, "list the CRLs in force, one per issuing CA", _EXAMPLES)
    show.add_argument("--config", type=Path, default=Path("broker.toml"), metavar="FILE", help="broker.toml")


def _show(arguments: argparse.Namespace, console: Console) -> None:
    settings = read_settings(arguments.config)
    trust = read_trust(settings.clients_ca_path)
    revocations = Revocations.read(trust, settings.data_folder, settings.revocation)
    moment = datetime.now(UTC)
    rows = []
    for issuer in trust:
        crl = revocations.crls.get(issuer.key_id)
        rows.append(
            {
                "issuer": issuer.name,
                "number": crl.number if crl else None,
                "revoked": len(crl.serials) if crl else None,
                "this_update": f"{crl.this_update:%FT%TZ}" if crl else None,
                "next_update": f"{crl.next_update:%FT%TZ}" if crl else None,
                "state": "in force" if crl else "missing: nobody of this CA is let in",
            }
        )
    console.table(rows, _COLUMNS, empty="no issuing CA is trusted")
    for alarm in revocations.alarms(moment):
        console.warn(f"{alarm.code}: {alarm.message}")
