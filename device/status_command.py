"""`birthmark-device status`: how a device is, from what is on its disk, for people and for monitoring.

Rules:

- Nothing is written and nothing is connected to: it may be asked at any time, whether the client runs or not.
- Everything that can be said is said, however much is broken; the first trouble of these gives the exit code:
  credentials or `device.toml` (1), the storage (5), a refusal (3), no connection or no client (4). A clock that is
  wrong, while the client is connected all the same, is said and is no trouble.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from birthmark.device.clock import Clock
from birthmark.device.console import Console, Parser, command
from birthmark.device.core_dumps import forbid_core_dumps
from birthmark.device.credentials import Credentials
from birthmark.device.errors import BirthmarkError, RefusedError, SystemFailureError, UnreachableError
from birthmark.device.escape import escaped
from birthmark.device.options import add_state_option
from birthmark.device.record import read_record
from birthmark.device.settings import DeviceSettings
from birthmark.device.show_command import identity_facts
from birthmark.device.tls import device_context

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from birthmark.device.record import Record

LEAST_FREE_BYTES: Final = 1024 * 1024
"""With less, a renewed certificate and its neighbours may not find room."""
_LONGEST_SHOWN = 1024

_EXAMPLES = """
birthmark-device status --state /var/lib/birthmark
birthmark-device status --state ./board-1 --json
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `status` to the commands of `birthmark-device`."""
    parser = command(commands, "status", _status, "say how this device is, and what it lacks", _EXAMPLES)
    add_state_option(parser)


def _status(arguments: argparse.Namespace, console: Console) -> int:
    forbid_core_dumps()
    folder: Path = arguments.state
    facts, troubles = _identity(folder)
    storage, trouble = _storage(folder)
    troubles += [trouble] if trouble else []
    record = read_record(folder)
    client, trouble = _client(record)
    troubles += [trouble] if trouble else []
    first = troubles[0] if troubles else None
    said = (
        {"state": first.word, "summary": f"{first.message}: {first.hint}" if first.hint else first.message}
        if first
        else {"state": "ok", "summary": f"connected to {client['last_connected_to']}; nothing to be done"}
    )
    console.facts({**said, **facts, **client, **storage})
    return first.exit_code if first else 0


class _Trouble:
    """A word for a machine, beside an error."""

    def __init__(self, word: str, error: BirthmarkError) -> None:
        self.word = word
        self.message = error.message
        self.hint = error.hint
        self.exit_code = error.exit_code


def _identity(folder: Path) -> tuple[dict[str, Any], list[_Trouble]]:
    """Say who this is, and what is known of the time."""
    try:
        credentials = Credentials.from_folder(folder)
        device_context(credentials)  # whether the key is the certificate's
        clock = Clock.of(credentials)
        moment, system = clock.moment(), clock.system()
        facts = identity_facts(folder, credentials, moment.at)
    except BirthmarkError as error:
        return {}, [_Trouble("credentials", error)]
    facts |= {
        "clock": system.isoformat(timespec="seconds"),
        "clock_is_wrong": moment.or_later,
        "floor": None if clock.floor is None else clock.floor.isoformat(timespec="seconds"),
    }
    try:
        DeviceSettings.from_folder(folder)
    except BirthmarkError as error:
        return facts, [_Trouble("settings", error)]
    if facts["valid"] == "now":
        return facts, []
    expired = BirthmarkError(
        f"the certificate of {credentials.device_id} is {facts['valid']}",
        "a client that runs renews it if the gateway has a renewal listener; else enrol the board again",
    )
    return facts, [_Trouble("certificate", expired)]


def _storage(folder: Path) -> tuple[dict[str, Any], _Trouble | None]:
    """Say whether there is room on the disk, and whether it can be written at all."""
    try:
        found = os.statvfs(folder)
    except OSError as error:
        missing = SystemFailureError(f"could not look at {folder}: {error.strerror}", "check the path")
        return {"storage": "unknown"}, _Trouble("storage", missing)
    free_bytes = found.f_bavail * found.f_frsize
    said = {"storage": "writable", "free_bytes": free_bytes}
    if found.f_flag & os.ST_RDONLY:
        read_only = SystemFailureError(
            f"could not write to {folder}: the file system is read-only",
            "it was mounted so, or the card has failed: `dmesg` says which; renewals and the outbox wait for it",
        )
        return {**said, "storage": "read-only"}, _Trouble("storage", read_only)
    if free_bytes < LEAST_FREE_BYTES:
        full = SystemFailureError(f"could not rely on {folder}: the disk is full", "make room")
        return {**said, "storage": "full"}, _Trouble("storage", full)
    return said, None


def _client(record: Record | None) -> tuple[dict[str, Any], _Trouble | None]:
    """Say what the client does, or did last."""
    start = "start it: `systemctl start birthmark-device`, or `birthmark-device run`"
    if record is None:
        never = UnreachableError("no client has run with this folder", start)
        return {"client": "never ran"}, _Trouble("not-running", never)
    failure = record.failure
    state = record.state if record.is_running or record.state == "stopped" else "ended without a word"
    said = {
        "client": state,
        "client_since": _time(record.since),
        "last_connected_to": record.broker or None,
        "last_connected_at": _time(record.connected_at),
        "clock_was_before": _time(record.clock_is_before),
        "last_failure_at": failure and _time(failure.at),
        "last_failure_check": failure and escaped(failure.check),
        "last_failure": failure and escaped(failure.reason, _LONGEST_SHOWN),
        "last_failure_hint": failure and escaped(failure.hint, _LONGEST_SHOWN),
        "last_trouble_at": _time(record.trouble_at),
        "last_trouble": escaped(record.trouble, _LONGEST_SHOWN) or None,
        "last_renewal": escaped(record.renewal, _LONGEST_SHOWN) or None,
        **_outbox(record),
    }
    if not record.is_running:
        ended = "was stopped" if record.state == "stopped" else "ended without a word: killed, or cut from power"
        return said, _Trouble("not-running", UnreachableError(f"the client is not running: it {ended}", start))
    if record.outbox is not None and record.outbox.failing:
        cause = escaped(record.outbox.failing, _LONGEST_SHOWN)
        failing = SystemFailureError(
            f"could not store what is published: {cause}", "docs/outbox.md says what to do"
        )
        return said, _Trouble("outbox", failing)
    if record.state == "connected":
        return said, None
    if failure is None or record.state == "connecting":
        return said, _Trouble("connecting", UnreachableError("the client is connecting for the first time"))
    kind = RefusedError if failure.refused else UnreachableError
    reason, hint = escaped(failure.reason, _LONGEST_SHOWN), escaped(failure.hint, _LONGEST_SHOWN)
    return said, _Trouble(escaped(failure.check), kind(reason, hint))


def _outbox(record: Record) -> dict[str, Any]:
    """Say what waits in the outbox; nothing where there is none."""
    found = record.outbox
    if found is None:
        return {}
    return {
        "outbox_messages": found.messages,
        "outbox_bytes": found.bytes,
        "outbox_dropped": found.dropped,
        "outbox_failing": escaped(found.failing, _LONGEST_SHOWN) or None,
        "outbox_as_of": _time(found.at),
    }


def _time(at_s: float | None) -> str | None:
    if at_s is None:
        return None
    try:
        return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return None
