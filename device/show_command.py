"""`birthmark-device show`: who this device is, and how long its certificate lives."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from birthmark.device.console import Console, Parser, command
from birthmark.device.credentials import Credentials
from birthmark.device.renewal.schedule import due_at
from birthmark.device.renewal.store import RenewalStore

if TYPE_CHECKING:
    import argparse

_EXAMPLES = """
birthmark-device show --state /var/lib/birthmark
birthmark-device show --state ./board-1 --json
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `show` to the commands of `birthmark-device`."""
    parser = command(commands, "show", _show, "show the identity and the life of its certificate", _EXAMPLES)
    parser.add_argument("--state", required=True, metavar="DIR", type=Path, help="the device's state folder")


def _show(arguments: argparse.Namespace, console: Console) -> int:
    credentials = Credentials.from_folder(arguments.state)
    facts = credentials.facts
    now = datetime.now(UTC)
    left_s = (facts.not_after - now).total_seconds()
    console.facts(
        {
            "id": str(credentials.device_id),
            "role": str(credentials.role),
            "broker": str(credentials.broker),
            "keepalive_s": credentials.keepalive_s,
            "slot": credentials.pem_path.name,
            "cert_serial": f"{facts.cert_serial:x}",
            "certificate_sha256": hashlib.sha256(credentials.leaf_der).hexdigest(),
            "valid": facts.out_of_time_at(now) or "now",
            "not_before": facts.not_before.isoformat(),
            "not_after": facts.not_after.isoformat(),
            "days_left": int(left_s // 86_400),
            "trust_anchors": len(credentials.anchors_der),
            "renews_at": due_at(facts, credentials.leaf_der).isoformat(timespec="seconds"),
            "renewal": _renewal(RenewalStore(arguments.state)),
        }
    )
    return 0


def _renewal(store: RenewalStore) -> str:
    """Say how far a renewal has come."""
    if store.candidate() is not None:
        return "granted, not confirmed yet"
    return "asked for" if store.asked() is not None else "none under way"
