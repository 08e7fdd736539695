"""`birthmark-device doctor`: the way to the broker, step by step, and one sentence to act on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from birthmark.device.clock import Clock
from birthmark.device.console import Console, Parser, command
from birthmark.device.core_dumps import forbid_core_dumps
from birthmark.device.doctor import walk
from birthmark.device.errors import ConnectionFailedError
from birthmark.device.options import add_broker_option, add_state_option, credentials_of, timeout
from birthmark.device.record import read_record

if TYPE_CHECKING:
    import argparse

    from birthmark.device.doctor import Step

DEFAULT_TIMEOUT_S = 10.0
_MARKS = {"ok": ("ok", "green"), "failed": ("FAILED", "red"), "skipped": ("-", "yellow")}

_EXAMPLES = """
birthmark-device doctor --state /var/lib/birthmark
birthmark-device doctor --state /var/lib/birthmark --broker gateway-2.example.com:8883
birthmark-device doctor --state ./board-1 --json
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `doctor` to the commands of `birthmark-device`."""
    parser = command(commands, "doctor", _doctor, "walk the way to the broker, step by step", _EXAMPLES)
    add_state_option(parser)
    add_broker_option(parser)
    parser.add_argument(
        "--timeout",
        type=timeout,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="for each step that waits (default: %(default)g)",
    )


def _doctor(arguments: argparse.Namespace, console: Console) -> int:
    forbid_core_dumps()
    credentials = credentials_of(arguments)
    logging.getLogger("birthmark.device").addHandler(logging.NullHandler())
    record = read_record(arguments.state)
    connected = record if record is not None and record.is_running and record.state == "connected" else None
    failure = None
    for step in walk(credentials, Clock.of(credentials, writes=False), connected, timeout_s=arguments.timeout):
        _show(console, step)
        failure = step.failure
    if failure is None:
        verdict = f"nothing stands between {credentials.device_id} and {credentials.broker}"
        console.emit({"verdict": verdict, "hint": "", "exit_code": 0}, f"\n{verdict}")
        return 0
    # The step has said what failed: at the end there is what to do.
    verdict = failure.hint or failure.message
    record_said = {"verdict": failure.message, "hint": failure.hint, "exit_code": failure.exit_code}
    console.emit(record_said, f"\n{console.paint('to do:', 'bold')} {verdict}")
    return failure.exit_code


def _show(console: Console, step: Step) -> None:
    check = step.failure.check if isinstance(step.failure, ConnectionFailedError) else ""
    mark, colour = _MARKS[step.outcome]
    console.emit(
        {"step": step.name, "outcome": step.outcome, "said": step.said, "check": str(check)},
        f"{console.paint(f'{mark:<6}', colour)}  {step.name:<20}  {step.said}",
    )
