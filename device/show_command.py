"""`birthmark-device show`: who this device is, and how long its certificate lives."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from birthmark.device.clock import Clock
from birthmark.device.console import Console, Parser, command
from birthmark.device.core_dumps import forbid_core_dumps
from birthmark.device.credentials import Credentials
from birthmark.device.options import add_state_option
from birthmark.device.renewal.schedule import due_at
from birthmark.device.renewal.store import RenewalStore

if TYPE_CHECKING:
    import argparse
    from datetime import datetime
    from pathlib import Path

_EXAMPLES = """
birthmark-device show --state /var/lib/birthmark
birthmark-device show --state ./board-1 --json
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `show` to the commands of `birthmark-device`."""
    parser = command(commands, "show", _show, "show the identity and the life of its certificate", _EXAMPLES)
    add_state_option(parser)


def _show(arguments: argparse.Namespace, console: Console) -> int:
    forbid_core_dumps()  # the key is in the file that the certificate is read from
    credentials = Credentials.from_folder(arguments.state)
    console.facts(identity_facts(arguments.state, credentials, Clock.of(credentials).now()))
    return 0


def identity_facts(folder: Path, credentials: Credentials, now: datetime) -> dict[str, Any]:
    """Return what there is to say of an identity and its certificate at a time.

    Raises:
        CredentialError: the slot from the enrollment cannot be read.
    """
    facts = credentials.facts
    return {
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
        "days_left": int((facts.not_after - now).total_seconds() // 86_400),
        "trust_anchors": len(credentials.anchors_der),
        "renews_at": due_at(facts, credentials.leaf_der).isoformat(timespec="seconds"),
        "renewal": _renewal(RenewalStore(folder)),
    }


def _renewal(store: RenewalStore) -> str:
    """Say how far a renewal has come."""
    if store.candidate() is not None:
        return "granted, not confirmed yet"
    return "asked for" if store.asked() is not None else "none under way"
